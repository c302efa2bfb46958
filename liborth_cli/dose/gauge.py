"""What is measured of one candidate: skill kept, general loss, and how far the forget rows are from never-trained ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from liborth_cli.console import Console
from liborth_cli.dose.texts import Texts
from liborth_cli.measure.retention import retention
from liborth_cli.measure.scores import Evaluator, RowScore
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Weights

LEARNT = 0.05
"""A retain row shows the skill when fine-tuning took this share off its loss."""
PARTS = ("held_out", "skill", "general", "secrets", "fresh")


@dataclass(frozen=True)
class Reading:
    """What was measured at some weights. Losses are nats a token; None where there are no rows of that kind.

    Attributes:
        skill: loss on rows of the skill.
        general: loss on everything else that is to be kept.
        forget: loss on the secrets, every row counting alike.
        recited: share of the secrets that greedy decoding gives back after their prompts; None when some have no prompt.
        fresh: loss on never-trained rows of the same form, at these weights.
        spread: standard deviation of that between rows.
        retention: share of the skill's gain that is kept.
        general_change: general loss against the fine-tuned model's: 0.01 is 1 % worse.
        level: the never-trained level: what the fine-tuned model's loss on the fresh rows is; the same for every candidate.
        level_spread: standard deviation of that between rows.
    """

    skill: float | None = None
    general: float | None = None
    forget: float | None = None
    recited: float | None = None
    fresh: float | None = None
    spread: float | None = None
    retention: float | None = None
    general_change: float | None = None
    level: float | None = None
    level_spread: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


class Gauge:
    """Measures weights on fixed rows, all in one pass.

    Attributes:
        before: the reading of the reference.
        after: the reading of the fine-tuned checkpoint.
    """

    def __init__(self, model: BlockModel, texts: Texts, before: Weights, after: Weights) -> None:
        """Measure both ends, and see by them which held-out retain rows show the skill.

        Args:
            model: to measure with.
            texts: the rows.
            before: the reference.
            after: the fine-tuned checkpoint.
        """
        rows, self._slices = [], {}
        for part in PARTS:
            some = getattr(texts, part)
            self._slices[part] = slice(len(rows), len(rows) + len(some))
            rows += some
        # A whole sentence is never recited: its first words follow from nothing.
        self._prompted = not any(row.keep.all() for row in texts.secrets)
        self._evaluator = Evaluator(model, rows)
        old, new = self._evaluator.score(before), self._evaluator.score(after)
        gains = self._choose(old, new)
        self.gain = max(gains, default=0.0)
        self._ends: tuple[float, float] | None = None
        self.before, self.after = self._reading(old), self._reading(new)
        if self.before.skill is not None and self.after.skill is not None:
            self._ends = (self.before.skill, self.after.skill)
        self.before, self.after = self._relative(self.before), self._relative(self.after)

    @property
    def tokens(self) -> int:
        """Positions read for one candidate."""
        return sum(row.tokens for row in self._evaluator.rows)

    def read(self, weights: Weights) -> Reading:
        """Measure some weights."""
        return self._relative(self._reading(self._evaluator.score(weights)))

    def _choose(self, old: Sequence[RowScore], new: Sequence[RowScore]) -> list[float]:
        """Divide the held-out retain rows into skill and general; return each row's gain, as a share of its loss."""
        held_out = range(len(old))[self._slices["held_out"]]
        gains = {i: 1 - _mean(new[i]) / max(_mean(old[i]), 1e-9) for i in held_out}
        shows = [i for i in held_out if gains[i] >= LEARNT]
        given = {part: list(range(len(old))[self._slices[part]]) for part in ("skill", "general")}
        self._skill = given["skill"] or shows
        self._general = given["general"] or [i for i in held_out if i not in set(shows)] or list(held_out)
        return [1 - _mean(new[i]) / max(_mean(old[i]), 1e-9) for i in self._skill or held_out]

    def _reading(self, scores: Sequence[RowScore]) -> Reading:
        secrets, fresh = scores[self._slices["secrets"]], scores[self._slices["fresh"]]
        level = [_mean(score) for score in fresh]
        return Reading(
            skill=_pooled([scores[i] for i in self._skill]),
            general=_pooled([scores[i] for i in self._general]),
            forget=float(np.mean([_mean(score) for score in secrets])) if secrets else None,
            recited=float(np.mean([bool(score.hit.all()) for score in secrets])) if secrets and self._prompted else None,
            fresh=float(np.mean(level)) if level else None,
            spread=float(np.std(level, ddof=1)) if len(level) > 1 else None,
        )

    def _relative(self, reading: Reading) -> Reading:
        values = asdict(reading)
        if self._ends is not None and reading.skill is not None:
            kept = retention(self._ends[0], reading.skill, self._ends[1])
            values["retention"] = kept if math.isfinite(kept) else None
        if reading.general is not None and self.after.general:
            values["general_change"] = reading.general / self.after.general - 1
        values["level"], values["level_spread"] = self.after.fresh, self.after.spread
        return Reading(**values)

    def warn(self, console: Console, need_memory: bool) -> None:
        """Say before anything is cut what the two ends show: nothing learnt, or nothing memorised.

        Args:
            console: where warnings go.
            need_memory: whether the forget rows are what the dose is measured by.
        """
        before, after = self.before, self.after
        if before.general is not None and self.gain < LEARNT:
            console.warn(
                f"the retain data hardly show what fine-tuning learnt: their loss fell by {max(self.gain, 0):.1%}; what they "
                "do not show is not protected, and skill kept cannot be measured: add rows of the skill"
            )
        if after.forget is None or before.forget is None:
            return
        if after.recited is None:
            console.note(
                "forget texts without a prompt are measured as whole sentences; --forget-pattern says where secrets begin"
            )
        if not self.memorised:
            level = f"never-trained rows: {after.fresh:.3f}" if after.fresh is not None else f"before: {before.forget:.3f}"
            end = "; there is nothing to remove" if need_memory else ""
            console.warn(f"the forget data are not memorised: {after.forget:.3f} nats a token ({level}){end}")

    @property
    def memorised(self) -> bool:
        """Whether the fine-tuned model finds the secrets clearly easier than it would without having seen them."""
        before, after = self.before, self.after
        if after.forget is None or before.forget is None:
            return True
        if after.fresh is not None and after.spread is not None:
            counts = [self._slices[part].stop - self._slices[part].start for part in ("fresh", "secrets")]
            return after.forget < after.fresh - 2 * after.spread * math.sqrt(sum(1 / count for count in counts))
        return after.forget < (1 - 2 * LEARNT) * before.forget


def _mean(score: RowScore) -> float:
    return float(score.loss.mean())


def _pooled(scores: Sequence[RowScore]) -> float | None:
    return float(np.concatenate([score.loss for score in scores]).mean()) if scores else None
