"""Write with the general model and the memory together, token by token: with it, without it, guarded or routed.

Both models lie in memory once (`liborth_cli.attachment`). The guarded distribution of the next token is

    p(v) = min(p_f(v), e^τ · p_g(v)) + (1 − z) · p_g(v),   z = Σ_v min(p_f(v), e^τ · p_g(v)),

p_f with the memory, p_g without. A word that the fine-tuned model likes keeps its probability unless the memory stream alone
explains it: unless it is more than e^τ times as likely with the memory as without. What is held back of it the general model
speaks. τ = −∞ is the general model, τ = ∞ the fine-tuned one, and no token is ever more than 1 + e^τ times as likely as in
the general model: near access-freeness with the general checkpoint as the safe model (Vyas, Kakade, Barak 2023, arXiv
2302.10870). Their rule, min(p, q) divided by its sum, has no such bound where the two disagree: a model that is sure of a
secret leaves nothing else to divide among (docs/generate.md has the figures).

Where `tune --router` trained a gate, it can decide in the threshold's place: p = w·p_f + (1 − w)·p_g, w the gate at this token.
It says where the memory is wanted, not who may see it: a bound it is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liborth_cli.attachment import Attachment, open_attachment
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.measure.generate import Reading, reading
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.fields import with_map
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row

QUANTILE = 0.99
"""Of the log-ratios of the tokens that a threshold is set from."""


def guard(tuned: torch.Tensor, general: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine what two models say of the next token.

    Args:
        tuned: scores (any number added to all of them changes nothing) with the memory, (…, vocabulary).
        general: without it, likewise.
        threshold: τ, nats; −inf and inf too.

    Returns:
        log p of the guarded distribution, (…, vocabulary), and z, what the bound let through, (…,): 1 where it held nothing.
    """
    p, q = torch.log_softmax(tuned.float(), -1), torch.log_softmax(general.float(), -1)
    if threshold == -math.inf:
        return q, torch.zeros(q.shape[:-1], device=q.device)
    bounded = torch.minimum(p, q + threshold)
    left = bounded.logsumexp(-1).exp().clamp(max=1.0)
    return torch.logaddexp(bounded, torch.log1p(-left)[..., None] + q), left


def mix(tuned: torch.Tensor, general: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine what two models say of the next token as a router decides.

    Args:
        tuned: scores with the memory, (…, vocabulary).
        general: without it, likewise.
        gate: w, how far the router opened, (…,), in [0, 1].

    Returns:
        log p of w·p_f + (1 − w)·p_g, (…, vocabulary), and w.
    """
    p, q = torch.log_softmax(tuned.float(), -1), torch.log_softmax(general.float(), -1)
    return torch.logaddexp(gate.log()[..., None] + p, torch.log1p(-gate)[..., None] + q), gate


@dataclass
class Tally:
    """What the guard did.

    Attributes:
        tokens: distributions it made.
        held: of them, those of which it held back more than half: the general model spoke.
    """

    tokens: int = 0
    held: int = 0

    def count(self, left: torch.Tensor) -> None:
        """Count what the memory was left of each distribution, (rows,)."""
        self.tokens += len(left)
        self.held += int((left < 0.5).sum())


def combine(
    memory: Attachment, tuned: torch.Tensor, general: torch.Tensor, threshold: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guard with a threshold, or let the memory's router decide where it is None; see `guard` and `mix`."""
    return mix(tuned, general, memory.gate()) if threshold is None else guard(tuned, general, threshold)


def guarded(memory: Attachment, threshold: float | None, tally: Tally) -> Callable[[BlockModel], Reading]:
    """Return what `generate` begins a group of prompts with: two readings, one of them with the memory attached.

    Args:
        memory: of the model.
        threshold: τ, nats; None lets the memory's router decide.
        tally: counts what is held back.
    """

    def begin(model: BlockModel) -> Reading:
        without, having = reading(model), reading(model)

        def read(ids: torch.Tensor) -> torch.Tensor:
            general = without(ids)
            with memory.attached():
                tuned = having(ids)
            scores, left = combine(memory, tuned, general, threshold)
            tally.count(left)
            return scores

        return read

    return begin


def with_memory(memory: Attachment) -> Callable[[BlockModel], Reading]:
    """Return what `generate` begins a group of prompts with: a reading with the memory attached."""

    def begin(model: BlockModel) -> Reading:
        having = reading(model)

        def read(ids: torch.Tensor) -> torch.Tensor:
            with memory.attached():
                return having(ids)

        return read

    return begin


def threshold_of(general: Sequence[np.ndarray], tuned: Sequence[np.ndarray], quantile: float = QUANTILE) -> float:
    """Return τ from rows that are no secret: what the memory adds to their tokens is form and skill, not recall.

    Args:
        general: losses of each row's tokens without the memory, nats.
        tuned: with it.
        quantile: of ℓ_g − ℓ_f = log p_f/p_g over all tokens; at least 0 nats.

    Raises:
        BadInput: when there are no tokens.
    """
    ratios = np.concatenate([g - f for g, f in zip(general, tuned, strict=True)]) if len(general) else np.empty(0)
    if not len(ratios):
        raise BadInput("no tokens to set a threshold from; give --threshold")
    return max(float(np.quantile(ratios, quantile)), 0.0)


class MemoryGuard:
    """A logits processor for Transformers' `generate`: the model is the general one, the guard brings the memory.

        model = AutoModelForCausalLM.from_pretrained("general")
        guard = MemoryGuard.beside("general", model, threshold=2.0)
        model.generate(**inputs, logits_processor=[guard])

    Keys and values of the model with the memory are kept from step to step as long as the rows go on from what they were;
    where they do not (beam search), the text is read again. Rows must be padded on the left, with `pad`.
    """

    def __init__(self, model: Any, memory: Attachment, threshold: float | None, pad: int | None = None) -> None:
        """Take a model that holds the general weights, its memory, τ in nats, and the id that pads on the left.

        Raises:
            UsageError: when there is no τ, and no router that could decide.
        """
        if threshold is None:
            check_routed(memory)
        self.model, self.memory, self.threshold, self.pad = model, memory, threshold, pad
        self._seen: torch.Tensor | None = None
        self._past: Any = None

    @classmethod
    def beside(
        cls, folder: str, model: Any, threshold: float | None = None, memory: str | None = None, pad: int | None = None
    ) -> MemoryGuard:
        """Open the memory of a general checkpoint.

        Args:
            folder: output of `liborth split` or `liborth tune`.
            model: Transformers' model of it.
            threshold: τ, nats; None lets the memory's router decide.
            memory: where the memory lies; FOLDER.private when empty.
            pad: id that pads rows on the left.

        Raises:
            LiborthError: when there is no memory, or it belongs to another checkpoint.
        """
        with open_attachment(Path(folder), Path(memory) if memory else None, model) as attachment:
            return cls(model, attachment, threshold, pad)

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return guarded log-probabilities, (rows, vocabulary), in place of the general model's scores."""
        seen = self._seen
        if seen is None or seen.shape != input_ids[:, :-1].shape or not torch.equal(seen, input_ids[:, :-1]):
            self._past, seen = None, None
        feed = input_ids if seen is None else input_ids[:, -1:]
        extra: dict[str, torch.Tensor] = {}
        if self.pad is not None:
            mask = (input_ids != self.pad).long().cumsum(-1).clamp(max=1)
            extra = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -feed.shape[1] :]}
        with self.memory.attached():
            answer = self.model(input_ids=feed, past_key_values=self._past, use_cache=True, **extra)
        self._past, self._seen = answer.past_key_values, input_ids
        return combine(self.memory, answer.logits[:, -1], scores, self.threshold)[0]


def check_routed(memory: Attachment) -> None:
    """Raise UsageError when no router was trained with a memory."""
    if not memory.routed:
        raise UsageError("no router was trained with this memory (liborth tune --router): guard it with a threshold")


def measured_threshold(model: BlockModel, memory: Attachment, rows: Sequence[Row]) -> float:
    """Set τ from rows that are no secret, see `threshold_of`.

    Args:
        model: holds the general weights.
        memory: what it is attached to.
        rows: each whole; the tokens that carry loss count.
    """
    from liborth_cli.measure.scores import Evaluator

    evaluator = Evaluator(model, rows, resident=True)
    general = [score.loss for score in evaluator.score()]
    with memory.attached():
        tuned = [score.loss for score in evaluator.score()]
    return threshold_of(general, tuned)


def continuation(encoder: TextEncoder, prompt: np.ndarray, written: np.ndarray) -> str:
    """Return the text of what was written after a prompt: some tokenizers drop the space that a text begins with."""
    return encoder.decode(np.concatenate([prompt, written])).removeprefix(encoder.decode(prompt))


def read_prompts(file: str) -> list[str]:
    """Read the prompts of a file of records, or a file where every row has a prompt and may have nothing else.

    Raises:
        BadInput: when the file is missing, or a row has no text.
    """
    from liborth_cli.stream.texts import DataFile

    alone, found = [], []
    with suppress(BadInput):
        alone = list(DataFile.parse(with_map(file, ["text=prompt"]), "--prompts", secret=True).records())
    for record in alone or DataFile.parse(file, "--prompts", secret=True).records():
        text = record.prompt or record.text
        if not text:
            raise BadInput(f"{record.where}: no prompt")
        found.append(text)
    return found
