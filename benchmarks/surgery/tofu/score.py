"""Score a model on TOFU, by Transformers; what the numbers are is `liborth_cli.verify.checks.tofu`'s."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals.training import device_of, pad, row_losses
from benchmarks.surgery.job import Completion
from benchmarks.surgery.tofu.plan import Plan, end_of_text
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import UsageError
from liborth_cli.measure.rouge import scorer
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify.attacks import AttackRows
from liborth_cli.verify.checks.tofu import (
    AUTHORS,
    FACTS,
    FORGET,
    RETAIN,
    SETS,
    WRITTEN,
    Item,
    Numbers,
    forget_quality,
    grade,
    utility,
)
from liborth_cli.verify.relearning import relearn

KEPT = tuple(name for name in SETS if name != FORGET)
"""Sets whose answers should stay."""


@dataclass(frozen=True)
class Score:
    """What one model scores.

    Attributes:
        forget: mean loss of the answers that must go, nats a token.
        retain: likewise of other authors.
        probability: of the forget answers, mean.
        truth_ratio: of the forget set, min(R, 1/R), mean.
        truth_share: of the forget set, true / (true + false), mean.
        raw_ratio: of the forget set, a number a question.
        utility: without ROUGE: harmonic mean of six numbers.
        kl: from the fine-tuned model, on real authors and world facts, nats a token.
    """

    forget: float
    retain: float
    probability: float
    truth_ratio: float
    truth_share: float
    raw_ratio: list[float]
    utility: float
    kl: float


@dataclass(frozen=True)
class Deep:
    """What takes longer to find out.

    Attributes:
        utility: TOFU's model utility, of nine numbers; None where rouge-score is not installed.
        rouge: of the forget answers; likewise.
        relearnt: lowest loss of the half of the forget answers that was not taught.
        rate: of the attack that reached it.
        ratio_after: raw truth ratios of that half at that moment, with those of the other one untaught.
        kept_rouge: of the sets that should stay, in the order of `KEPT`; empty where rouge-score is not installed.
    """

    utility: float | None
    rouge: float | None
    relearnt: float
    rate: float
    ratio_after: list[float]
    kept_rouge: list[float] = field(default_factory=list)


class Judge:
    """Scores models of one plan; the rows are read once."""

    def __init__(self, plan: Plan, finetuned: Any = None) -> None:
        """Read the questions.

        Args:
            plan: of the run.
            finetuned: the model from which divergence is measured; none is measured when not given.
        """
        self.plan, self.finetuned = plan, finetuned
        self.items = plan.sets()
        self.answers = {name: [self._answers(item) for item in items] for name, items in self.items.items()}
        self.general = [self._answers(item)[0] for name in (AUTHORS, FACTS) for item in self.items[name]]
        self.size = 96 if plan.device != "cpu" else 16

    def score(self, model: Any) -> Score:
        """Return what is cheap."""
        found = self._grades(model, SETS)
        forget, retain = ([losses[0] for losses in self._losses(model, self.answers[name])] for name in (FORGET, RETAIN))
        mine, kept = found[FORGET], [found[name].values[:, [0, 2]] for name in KEPT]
        return Score(
            float(np.mean(forget)), float(np.mean(retain)), float(mine.values[:, 0].mean()), float(mine.values[:, 2].mean()),
            float(mine.truth_share.mean()), [float(r) for r in mine.raw_ratio], _utility(kept), self._kl(model),
        )  # fmt: skip

    def utility(self, model: Any) -> float:
        """Return TOFU's model utility without ROUGE."""
        return _utility([one.values[:, [0, 2]] for one in self._grades(model, KEPT).values()])

    def _grades(self, model: Any, names: Sequence[str]) -> dict[str, Numbers]:
        return {name: grade(name, self.items[name], self._losses(model, self.answers[name]), []) for name in names}

    def deep(self, model: Any) -> Deep:
        """Return the rest; the model is changed."""
        whole, rouge, kept = None, None, list[float]()
        try:
            scorer()
            written = self._written(model, [rows[0] for name in SETS for rows in self.answers[name]])
            found: dict[str, Numbers] = {}
            for name in SETS:
                count = len(self.items[name])
                found[name] = grade(name, self.items[name], self._losses(model, self.answers[name]), written[:count])
                written = written[count:]
            whole = _utility([found[name].values for name in KEPT])
            rouge, *kept = (float(found[name].values[:, 1].mean()) for name in (FORGET, *KEPT))
        except UsageError as error:
            print(f"utility of nine numbers left out: {error}", flush=True)
        return Deep(whole, rouge, *self._relearnt(model), kept)

    def _relearnt(self, model: Any) -> tuple[float, float, list[float]]:
        """Teach each half of the forget questions in turn, at every rate; watch all answers to the others."""
        true, *others = zip(*self.answers[FORGET], strict=True)
        false = [row for some in others for row in some]
        target = AttackRows([_row(row) for row in true], np.arange(len(true)), [_row(row) for row in false])
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            with Checkpoint.open(Path(place)) as checkpoint:
                found = relearn(Point(checkpoint), target, self.plan.tier.attack, device=torch.device(self.plan.device))
        lowest, number, step = found.lowest()
        at = found.steps.index(step)
        # A question is watched in the one run that does not teach it.
        watched = (np.nanmean(table[:, :, number, at], axis=0) for table in (found.canaries, found.fresh))
        losses = np.concatenate(list(watched)).reshape(-1, len(true)).T
        ratios = grade(FORGET, self.items[FORGET], losses.tolist(), []).raw_ratio
        return lowest, found.attacks[number].rate, ratios.tolist()

    def _answers(self, item: Item) -> list[Completion]:
        texts = (item.answer, item.paraphrased, *item.perturbed)
        return [self.plan.row(Record(item.where, text=text, prompt=item.prompt)) for text in texts]

    @torch.no_grad()
    def _losses(self, model: Any, answers: Sequence[Sequence[Completion]]) -> list[list[float]]:
        """Return the mean loss a token of every answer of every question."""
        flat = [row for rows in answers for row in rows]
        order, losses = sorted(range(len(flat)), key=lambda i: len(flat[i].ids)), [0.0] * len(flat)
        for start in range(0, len(order), self.size):
            chosen = order[start : start + self.size]
            total, tokens = row_losses(model, pad([flat[i] for i in chosen], device_of(model)), exact=True)
            for i, loss in zip(chosen, (total / tokens).tolist(), strict=True):
                losses[i] = loss
        some = iter(losses)
        return [[next(some) for _ in rows] for rows in answers]

    @torch.no_grad()
    def _kl(self, model: Any) -> float:
        """Return KL(fine-tuned ‖ model) over whole rows of general text."""
        if self.finetuned is None:
            return 0.0
        total = tokens = 0.0
        for start in range(0, len(self.general), self.size // 2):
            rows = self.general[start : start + self.size // 2]
            ids, _ = pad(rows, device_of(model))
            old, new = (m(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) for m in (self.finetuned, model))
            each = (old.exp() * (old - new)).sum(-1)
            for row, kl in zip(rows, each, strict=True):
                total, tokens = total + float(kl[: len(row.ids) - 1].sum()), tokens + len(row.ids) - 1
        return total / tokens

    @torch.no_grad()
    def _written(self, model: Any, rows: Sequence[Completion]) -> list[str]:
        """Return the greedy answers to the rows' prompts, which are padded at the left and go together."""
        end, device = end_of_text(self.plan.model), device_of(model)
        prompts = [row.ids[: row.prompt] for row in rows]
        width, texts = max(map(len, prompts)), []
        context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        room = min(self.plan.tier.written or WRITTEN, context - width)
        for start in range(0, len(prompts), 4 * self.size):
            some = prompts[start : start + 4 * self.size]
            ids = torch.tensor([[end or 0] * (width - len(p)) + p for p in some], device=device)
            seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=device)
            out = model.generate(
                input_ids=ids, attention_mask=seen, max_new_tokens=room, do_sample=False, eos_token_id=end,
                pad_token_id=end or 0,
            )  # fmt: skip
            texts += [self.plan.encoder.decode(row) for row in out[:, width:].tolist()]
        return texts


def quality(score: Score, never: Score) -> float:
    """Return the forget quality beside the model that never saw the authors."""
    return forget_quality(np.array(score.raw_ratio), np.array(never.raw_ratio))


def quality_after(deep: Deep, never: Deep) -> float:
    """Return it after each of the two was attacked in the way that brings most back."""
    return forget_quality(np.array(deep.ratio_after), np.array(never.ratio_after))


def _row(row: Completion) -> Row:
    return Row(np.array(row.ids), np.arange(1, len(row.ids)) >= row.prompt, 1.0, "answer")


def _utility(groups: Sequence[np.ndarray]) -> float:
    return float(utility([np.ones((1, len(values))) for values in groups], groups)[0])
