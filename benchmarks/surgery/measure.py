"""What is left in a model, by Transformers and not by liborth: losses, recitation, membership, distance to what was edited."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.surgery.job import Completion

WIDTH = 128
"""Tokens of a text that count."""
PIECES = 16
"""Texts that go through the model together."""


@dataclass(frozen=True)
class Score:
    """One row: its loss a token in nats, and the share of its tokens that are the likeliest ones."""

    loss: float
    right: float


@dataclass(frozen=True)
class Found:
    """What is left in one model. Losses are nats a token, shares lie between 0 and 1; None where there is nothing to measure.

    Attributes:
        skill: loss on held-out text of the skill.
        general: on held-out text of what the base knew.
        kl: from the fine-tuned model's predictions there to this one's, nats a token.
        forget: loss of the secrets; of those the split was not told of, too.
        untold: likewise.
        fresh: of rows of the form that nobody trained on.
        recited: secrets that come out whole, greedily.
        right: their tokens that are right.
        auc: that a secret has a lower loss than a fresh row.
        tpr: secrets found by how much lower their loss is than in the reference, at a threshold that 1 % of the fresh rows pass
            (none, where there are fewer than a hundred).
        kept: rows of skill that looks like memory, not shown to the split, that are right.
        copies: loss by how often a secret was trained on.
    """

    skill: float
    general: float
    kl: float
    forget: float
    untold: float | None
    fresh: float
    recited: float
    right: float
    auc: float
    tpr: float | None
    kept: float | None
    copies: tuple[float, ...] = ()

    def skill_kept(self, base: Found, finetuned: Found) -> float:
        """Return the share of what fine-tuning taught that is left: 1 as the fine-tuned model has it, 0 as the base."""
        return (base.skill - self.skill) / (base.skill - finetuned.skill)


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_texts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Read rows as running text, cut to `WIDTH` tokens each."""
    texts = [row.get("text") or row["prompt"] + row["completion"] for row in read(path)]
    return [tokenizer(text, verbose=False).input_ids[:WIDTH] for text in texts]


def read_pairs(path: Path, tokenizer: Any) -> list[Completion]:
    """Read rows as prompts and completions; what both tokenisations begin with in common is the prompt."""
    rows = []
    for row in read(path):
        prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["completion"]))
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        rows.append(Completion(whole, max(min(same, len(whole) - 1), 1)))
    return rows


def load(folder: Path) -> Any:
    """Load a model as Transformers does, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Judge:
    """Measures models on the rows of one kind.

    Attributes:
        folder: of the kind.
        tokenizer: of its models.
        finetuned: the model that was edited.
        reference: the model before, or None.
    """

    def __init__(self, folder: Path, texts: int) -> None:
        """Read the rows, and measure what is only measured once.

        Args:
            folder: as `pairs.py` makes it.
            texts: held-out texts of each kind that count.
        """
        from transformers import AutoTokenizer

        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder / "finetuned")
        self.finetuned = load(folder / "finetuned")
        self.reference = load(folder / "base") if (folder / "base").exists() else None
        self.skill, self.general = (self._texts(name)[:texts] for name in ("held_out", "general"))
        self.rows = {name: self._pairs(name) for name in ("secrets", "fresh", "given")}
        self.kept = self._pairs("kept")[1::2]
        with torch.inference_mode():
            self._before = {name: self._score(self.reference, self.rows[name]) for name in ("secrets", "fresh")}
            self._predicted = [self._log_p(self.finetuned, ids) for ids in _pieces(self.general)]

    def retain(self) -> list[list[int]]:
        """Return the rows that must stay, as rivals take them."""
        return self._texts("retain")

    def forget(self, name: str = "given") -> list[Completion]:
        """Return the rows that must go, as rivals take them."""
        return self._pairs(name)

    @torch.inference_mode()
    def measure(self, model: Any, copies: Sequence[int] = (), given: str = "given") -> Found:
        """Measure one model.

        Args:
            model: of Transformers.
            copies: how often each secret was trained on, where that differs.
            given: the file of the secrets that its split was told of; "" where it was told of none.
        """
        secrets, fresh = (self._score(model, self.rows[name]) for name in ("secrets", "fresh"))
        assert secrets and fresh
        losses, level = np.array([s.loss for s in secrets]), np.array([s.loss for s in fresh])
        tpr = None
        if self._before["secrets"]:
            gained, others = (
                np.array([old.loss for old in self._before[name]]) - now
                for name, now in (("secrets", losses), ("fresh", level))
            )
            allowed = int(len(others) * 0.01)
            tpr = float((gained > np.sort(others)[::-1][allowed]).mean())
        general, kl = self._general(model)
        kept = self._score(model, self.kept) if self.kept else []
        times = sorted(set(copies)) if len(set(copies)) > 1 else []
        known = {tuple(row.ids) for row in self._pairs(given)} if given else set()
        untold = [i for i, row in enumerate(self.rows["secrets"]) if tuple(row.ids) not in known]
        return Found(
            skill=self._text_loss(model, self.skill), general=general, kl=kl, forget=float(losses.mean()),
            untold=float(losses[untold].mean()) if untold else None, fresh=float(level.mean()),
            recited=float(np.mean([s.right == 1.0 for s in secrets])), right=float(np.mean([s.right for s in secrets])),
            auc=float(((losses[:, None] < level) + 0.5 * (losses[:, None] == level)).mean()), tpr=tpr,
            kept=float(np.mean([s.right == 1.0 for s in kept])) if kept else None,
            copies=tuple(float(losses[np.array(copies) == n].mean()) for n in times),
        )  # fmt: skip

    @torch.inference_mode()
    def kl(self, model: Any) -> float:
        """Return the distance to the fine-tuned model on general text, nats a token."""
        return self._general(model)[1]

    @torch.inference_mode()
    def skill_loss(self, model: Any) -> float:
        """Return the loss on held-out text of the skill."""
        return self._text_loss(model, self.skill)

    def _general(self, model: Any) -> tuple[float, float]:
        loss = divergence = count = 0.0
        for ids, known in zip(_pieces(self.general), self._predicted, strict=True):
            found, real = self._log_p(model, ids), _real(ids)
            loss -= float(found.gather(-1, ids[:, 1:].clamp(min=0)[..., None])[..., 0][real].sum())
            divergence += float((known.exp() * (known - found)).sum(-1)[real].sum())
            count += int(real.sum())
        return loss / count, divergence / count

    def _text_loss(self, model: Any, rows: list[list[int]]) -> float:
        loss = count = 0.0
        for ids in _pieces(rows):
            found, real = self._log_p(model, ids), _real(ids)
            loss -= float(found.gather(-1, ids[:, 1:].clamp(min=0)[..., None])[..., 0][real].sum())
            count += int(real.sum())
        return loss / count

    @staticmethod
    def _log_p(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(ids[:, :-1].clamp(min=0)).logits.log_softmax(-1)

    def _texts(self, name: str) -> list[list[int]]:
        return read_texts(self.folder / f"{name}.jsonl", self.tokenizer)

    def _pairs(self, name: str) -> list[Completion]:
        return read_pairs(self.folder / f"{name}.jsonl", self.tokenizer)

    @staticmethod
    def _score(model: Any, rows: list[Completion]) -> list[Score]:
        found = []
        for row in rows if model is not None else []:
            ids = torch.tensor(row.ids)
            log_p = model(ids[None, :-1]).logits[0, row.prompt - 1 :].log_softmax(-1)
            target = ids[row.prompt :]
            right = float((log_p.argmax(-1) == target).float().mean())
            found.append(Score(float(-log_p.gather(1, target[:, None]).mean()), right))
        return found


def _pieces(rows: list[list[int]]) -> list[torch.Tensor]:
    """Pad rows with −1 at their end, some at a time."""
    pad = torch.nn.utils.rnn.pad_sequence
    some = [[torch.tensor(row) for row in rows[i : i + PIECES]] for i in range(0, len(rows), PIECES)]
    return [pad(group, batch_first=True, padding_value=-1) for group in some]


def _real(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, 1:] >= 0


def blend(start: Any, end: Any, share: float, into: Any) -> None:
    """Set a model to start + share·(end − start)."""
    first, last = start.state_dict(), end.state_dict()
    mixed = {n: torch.lerp(first[n], last[n], share) if first[n].is_floating_point() else first[n] for n in first}
    into.load_state_dict(mixed)
