"""What is measured of one candidate: skill kept, the secrets' distance from never-trained rows, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

import numpy as np

from liborth_cli.console import Console, JsonObject
from liborth_cli.dose.texts import Texts
from liborth_cli.machine import LOW_RANK_BYTES, too_large
from liborth_cli.measure.retention import retention
from liborth_cli.measure.scores import Evaluator, RowScore
from liborth_cli.ranks import ALONE, World
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Weights
from liborth_cli.verify import relearning
from liborth_cli.verify.attacks import QUICK, AttackRows, Grid, fitting
from liborth_cli.verify.memorisation import auc_kernel

LEARNT = 0.05
"""A retain row shows the skill when fine-tuning took this share off its loss."""
PARTS = ("held_out", "skill", "general", "secrets", "fresh")
ATTACK_STEPS = 20
"""Training steps of the relearning attack: half of what `verify` spends, for it is run on several candidates."""
FEWEST = 4
"""Secrets, and fresh rows, from which they are held against each other, and half of the secrets taught."""


@dataclass(frozen=True)
class Reading:
    """What was measured at some weights. Losses are nats a token; None where it was not measured.

    Attributes:
        skill: loss on rows of the skill.
        general: loss on everything else that is to be kept.
        forget: loss on the secrets, every row counting alike.
        recited: share of the secrets that greedy decoding gives back after their prompts; None when some have no prompt.
        fresh: loss on never-trained rows of the same form, at these weights.
        spread: standard deviation of that between rows.
        leak: |2·AUC − 1| of telling secrets from fresh rows by their loss: 0 when they cannot be told apart.
        relearn: nats by which untaught secrets get closer than fresh rows when others are taught, beyond the reference's own:
            `relearn_gap_fresh` of `verify`. Without fresh rows to watch: than in the reference, given the same steps.
        relearned: share of the secrets recited after others were taught.
        retention: share of the skill's gain that is kept.
        general_change: general loss against the fine-tuned model's: 0.01 is 1 % worse.
    """

    skill: float | None = None
    general: float | None = None
    forget: float | None = None
    recited: float | None = None
    fresh: float | None = None
    spread: float | None = None
    leak: float | None = None
    relearn: float | None = None
    relearned: float | None = None
    retention: float | None = None
    general_change: float | None = None

    def to_json(self) -> JsonObject:
        """Return a JSON object."""
        return asdict(self)


class Measure:
    """Measures weights on fixed rows, all in one pass.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        before: the reading of the reference.
        after: the reading of the fine-tuned checkpoint.
        improved: of every held-out retain row whether fine-tuning lowered its loss.
        no_attack: why relearning is not tried, or "".
    """

    def __init__(
        self, model: BlockModel, texts: Texts, before: Weights, after: Weights, seed: int = 0, world: World = ALONE
    ) -> None:
        """Measure both ends, and see by them which held-out retain rows show the skill.

        Args:
            model: to measure with.
            texts: the rows.
            before: the reference.
            after: the fine-tuned checkpoint.
            seed: of the halves that are taught.
            world: the ranks that share the rows.
        """
        rows, self._slices = [], {}
        for part in PARTS:
            some = getattr(texts, part)
            self._slices[part] = slice(len(rows), len(rows) + len(some))
            rows += some
        # A whole sentence is never recited: its first words follow from nothing.
        self._prompted = not any(row.keep.all() for row in texts.secrets)
        self._secrets, self._fresh, self._seed = texts.secrets, texts.fresh, seed
        self.reference, self.finetuned = before, after
        self._evaluator, self._device = Evaluator(model, rows, world=world), model.device
        self._control: relearning.Relearnt | None = None
        self.no_attack, self._attacks = _no_attack(len(texts.secrets), model), fitting(QUICK, model)
        old, new = self._evaluator.score(before), self._evaluator.score(after)
        self._skill, self._general, self._gain = self._choose(old, new, texts)
        self._ends = _pooled([old[i] for i in self._skill]), _pooled([new[i] for i in self._skill])
        self._general_after = _pooled([new[i] for i in self._general])
        self.before, self.after = self._reading(old), self._reading(new)
        held = self._slices["held_out"]
        self.improved = [_mean(now) < _mean(then) for then, now in zip(old[held], new[held], strict=True)]

    @property
    def tokens(self) -> int:
        """Positions read for one candidate."""
        return sum(row.tokens for row in self._evaluator.rows)

    @property
    def rows(self) -> str:
        """On which rows, in words."""
        kinds = {
            "secrets": len(self._secrets), "never-trained rows": len(self._fresh), "rows of the skill": len(self._skill),
            "other rows to keep": len(self._general),
        }  # fmt: skip
        return f"measured on {', '.join(f'{count:,} {name}' for name, count in kinds.items())}"

    def alone(self) -> AbstractContextManager[None]:
        """Have this rank read candidates by itself, while others are at other ones."""
        return self._evaluator.alone()

    def read(self, weights: Weights) -> Reading:
        """Measure some weights."""
        return self._reading(self._evaluator.score(weights))

    def attacked(self, weights: Weights, reading: Reading) -> Reading:
        """Return a reading with what relearning brings back: half of the secrets are taught, the other half is watched.

        Args:
            weights: that it is a reading of.
            reading: what was measured already; returned as it is when there is a reason not to attack.
        """
        if self.no_attack:
            return reading
        if self._control is None:
            self._control = self._relearn(self.reference)
        control, found = self._control, self._relearn(weights)
        gap = control.lowest()[0] - found.lowest()[0]
        if np.isfinite(found.fresh).any():  # rows whose prompt was just taught are not watched: sometimes none is
            alike = (np.ones((1, len(rows))) for rows in (self._fresh, self._secrets))
            gap = float(relearning.beyond_fresh((found, control), *alike).max())
        return replace(reading, relearn=gap, relearned=float(found.recited.any((0, 2, 3)).mean()))

    def warn(self, console: Console, need_memory: bool) -> None:
        """Say before anything is cut what the two ends show: nothing learnt, or nothing memorised.

        Args:
            console: where warnings go.
            need_memory: whether the forget rows are what the dose is measured by.
        """
        before, after = self.before, self.after
        if before.general is not None and self._gain < LEARNT:
            console.warn(
                f"the retain data hardly show what fine-tuning learnt: their loss fell by {max(self._gain, 0):.1%}; what they "
                "do not show is not protected, and skill kept cannot be measured: add rows of the skill"
            )
        if 0 < len(self._skill) < FEWEST:
            console.warn(f"skill kept is measured on {len(self._skill)} rows: too few to tell one dose from another")
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

    def _choose(self, old: Sequence[RowScore], new: Sequence[RowScore], texts: Texts) -> tuple[list[int], list[int], float]:
        """Divide the measured retain rows into skill and general; return both, and the largest gain, as a share of the loss."""
        gains = [1 - _mean(after) / max(_mean(before), 1e-9) for before, after in zip(old, new, strict=True)]
        places = {part: list(range(len(old))[self._slices[part]]) for part in PARTS}
        shows = [i for i in places["held_out"] if gains[i] >= LEARNT]
        skill = places["skill"] if texts.skill else shows
        others = [i for i in places["held_out"] if i not in set(shows)]
        general = places["general"] if texts.general else others or places["held_out"]
        return skill, general, max((gains[i] for i in skill or places["held_out"]), default=0.0)

    def _reading(self, scores: Sequence[RowScore]) -> Reading:
        secrets = scores[self._slices["secrets"]]
        losses, level = ([_mean(score) for score in some] for some in (secrets, scores[self._slices["fresh"]]))
        skill, general = _pooled([scores[i] for i in self._skill]), _pooled([scores[i] for i in self._general])
        kept = math.nan if skill is None else retention(self._ends[0], skill, self._ends[1])
        leak = None
        if min(len(losses), len(level)) >= FEWEST:
            leak = abs(2 * float(auc_kernel([-loss for loss in losses], [-loss for loss in level]).mean()) - 1)
        return Reading(
            skill=skill,
            general=general,
            forget=float(np.mean(losses)) if losses else None,
            recited=float(np.mean([bool(score.hit.all()) for score in secrets])) if secrets and self._prompted else None,
            fresh=float(np.mean(level)) if level else None,
            spread=float(np.std(level, ddof=1)) if len(level) > 1 else None,
            leak=leak,
            retention=kept if math.isfinite(kept) else None,
            general_change=general / self._general_after - 1 if general is not None and self._general_after else None,
        )

    def _relearn(self, weights: Weights) -> relearning.Relearnt:
        """Teach each half of the secrets in turn, and watch the other half and the fresh rows."""
        target = AttackRows(self._secrets, np.arange(len(self._secrets)), self._fresh, np.arange(len(self._fresh)))
        grid = Grid(self._attacks, ATTACK_STEPS, (self._seed,))
        return relearning.relearn(weights, target, grid, device=self._device)


def _no_attack(secrets: int, model: BlockModel) -> str:
    if secrets < FEWEST:
        return f"relearning needs {FEWEST} secrets to teach half of, and there are {secrets}"
    too_much = too_large(LOW_RANK_BYTES * model.elements, model.device)
    return f"relearning takes {too_much}" if too_much else ""


def _mean(score: RowScore) -> float:
    return float(score.loss.mean())


def _pooled(scores: Sequence[RowScore]) -> float | None:
    return float(np.concatenate([score.loss for score in scores]).mean()) if scores else None
