"""Where a prompt's answer comes from: corrupt the prompt, put one state back, and see how much of the answer returns.

Causal tracing (Meng et al. 2022, arXiv 2202.05262): noise of three standard deviations on the prompt's embeddings takes the
answer away; then the hidden state of one place after one block is set to what it is without the noise. The tokens of the answer
are given, and never corrupted. One block of weights is in memory at a time, but for models that are resident.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.labels import row_seed
from liborth_cli.stream.model import TAIL, BlockModel
from liborth_cli.stream.sizes import logit_rows
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import ForwardWalk

NOISE = 3.0
"""Standard deviations of a prompt's embeddings."""
STATE_BYTES = 1 << 28
"""Hidden states that are held at a time, at most; one row at least."""


@dataclass(frozen=True)
class Restored:
    """What one row's answer loses and gets back, in nats a token; means over draws of the noise.

    Attributes:
        clean: loss as it is.
        corrupted: loss with the whole prompt under noise.
        restored: loss with one place put back, (blocks + 1, columns): after the embeddings, after block 0, …; the last place is
            the last token of the prompt, the one before it the token before; the second all that stand further ahead, the first
            the whole prompt; NaN where the prompt is too short.
    """

    clean: float
    corrupted: float
    restored: np.ndarray


@dataclass(frozen=True)
class Restoration:
    """How restoration is done.

    Attributes:
        places: the last tokens of a prompt, one by one.
        draws: of the noise.
        noise: its size in standard deviations of the prompt's embeddings.
        seed: of the draws; each row's are its own.
    """

    places: int
    draws: int = 3
    noise: float = NOISE
    seed: int = 0

    @property
    def columns(self) -> int:
        """Places, and those for the whole prompt and for all ahead of the single ones."""
        return self.places + 2


def restoration(
    model: BlockModel, rows: Sequence[Row], how: Restoration, advance: Callable[[int], None] = lambda rows: None
) -> list[Restored]:
    """Trace every row.

    Args:
        model: with the weights in use.
        rows: each with a prompt of two tokens at least and an answer that carries the loss.
        how: places, draws, noise.
        advance: told how many rows are done.

    Returns:
        One result a row, in the order of the rows.
    """
    copies, depth = how.columns * how.draws, len(model.blocks)
    found: dict[int, Restored] = {}
    order = sorted(range(len(rows)), key=lambda i: (rows[i].tokens, rows[i].weight), reverse=True)
    longest = max(row.tokens for row in rows)
    held = STATE_BYTES // (4 * model.hidden * copies * (depth + 3))
    with torch.no_grad():
        for batch in batches(rows, max(held, longest), None, model.device):
            some, order = order[: len(batch.ids)], order[len(batch.ids) :]
            found |= dict(zip(some, _Trace(model, batch, how).run(), strict=True))
            advance(len(some))
    return [found[i] for i in range(len(rows))]


class _Trace:
    """Rows of one length; each stands there once for every place and draw."""

    def __init__(self, model: BlockModel, batch: Batch, how: Restoration) -> None:
        self._model, self._how, self._rows = model, how, len(batch.ids)
        copies = how.columns * how.draws
        tiled = {name: getattr(batch, name).repeat_interleave(copies, 0) for name in ("ids", "labels", "keep")}
        self._batch = replace(batch, **tiled)
        last = self._batch.keep.int().argmax(1)  # the position that predicts the answer's first token holds the prompt's last
        at = torch.arange(batch.ids.shape[1], device=model.device)
        self._prompt = at[None] <= last[:, None]
        column = torch.arange(how.columns, device=model.device).repeat(self._rows * how.draws)[:, None]
        target = last[:, None] - (how.columns - 1 - column)
        ahead = torch.where(column == 1, at[None] <= target, at[None] == target)
        self._place = torch.where(column == 0, self._prompt, ahead)
        self._there = self._place.any(1).view(self._rows, how.draws, how.columns)[:, 0].cpu().numpy()

    def run(self) -> list[Restored]:
        """Walk through the model once; return the rows' results."""
        walk = ForwardWalk(self._model, [self._batch])
        states: list[torch.Tensor] = []  # clean, corrupted, restored after the embeddings, after block 0, …
        for part in walk:
            if part.level == 0:
                clean = part.run(None)
                states = [clean, torch.where(self._prompt[..., None], clean + self._noise(clean), clean)]
            else:
                states = [part.run(states[0]), *(walk.block(part.level - 1, 0, one) for one in states[1:])]
            states.append(torch.where(self._place[..., None], states[0], states[1]))
        with self._model.loaded(TAIL):
            losses = np.stack([self._loss(state) for state in states])
        clean, corrupted, restored = losses[0], losses[1], losses[2:]
        return [
            Restored(
                float(clean[i].mean()),
                float(corrupted[i].mean()),
                np.where(self._there[i], restored[:, i].mean(1), np.nan),
            )
            for i in range(self._rows)
        ]

    def _noise(self, clean: torch.Tensor) -> torch.Tensor:
        """Draw what is added to the embeddings: the same for all places, different for every draw; by the row's own tokens."""
        rows = clean.view(self._rows, self._how.draws, self._how.columns, *clean.shape[1:])
        ids = self._batch.ids.view(self._rows, -1, self._batch.ids.shape[1])[:, 0].cpu().numpy()
        real = self._prompt.view(self._rows, -1, self._prompt.shape[1])[:, 0]
        drawn = torch.empty_like(rows)
        for i in range(self._rows):
            generator = torch.Generator().manual_seed(row_seed(self._how.seed, ids[i].tobytes()))
            noise = torch.randn((self._how.draws, 1, *clean.shape[1:]), generator=generator)
            size = self._how.noise * rows[i, 0, 0][real[i]].std()
            drawn[i] = size * noise.to(clean)
        return drawn.view_as(clean)

    def _loss(self, hidden: torch.Tensor) -> np.ndarray:
        """Return the mean loss of each copy's answer, (rows, draws, places)."""
        keep = self._batch.keep
        flat, labels = hidden[keep], self._batch.labels[keep]
        step = logit_rows(self._model.vocabulary, self._model.device)
        parts = []
        for start in range(0, len(flat), step):
            scores = self._model.tail(flat[start : start + step]).float().log_softmax(-1)
            parts.append(-scores.gather(-1, labels[start : start + step, None])[:, 0])
        total = torch.zeros(keep.shape, dtype=torch.float64, device=keep.device)
        total[keep] = torch.cat(parts).double()
        return (total.sum(1) / keep.sum(1)).view(self._rows, self._how.draws, self._how.columns).cpu().numpy()
