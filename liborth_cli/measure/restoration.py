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
    """Rows of one length: as they are, once for every draw of the noise, and once for every draw and place."""

    def __init__(self, model: BlockModel, batch: Batch, how: Restoration) -> None:
        self._model, self._how, self._rows = model, how, len(batch.ids)
        self._batches = [_tiled(batch, copies) for copies in (1, how.draws, how.draws * how.columns)]
        last = batch.keep.int().argmax(1)  # the position that predicts the answer's first token holds the prompt's last
        at = torch.arange(batch.ids.shape[1], device=model.device)
        self._prompt = at[None] <= last[:, None]
        column = torch.arange(how.columns, device=model.device)[:, None]
        target = last[:, None, None] - (how.columns - 1 - column)
        place = torch.where(column == 1, at <= target, at == target)  # (rows, places, tokens)
        place[:, 0] = self._prompt
        self._place = place.repeat_interleave(how.draws, 0).flatten(0, 1)
        self._there = place.any(2).cpu().numpy()

    def run(self) -> list[Restored]:
        """Walk through the model once; return the rows' results."""
        walk, how = ForwardWalk(self._model, self._batches), self._how
        clean = corrupted = torch.empty(0)
        restored: list[torch.Tensor] = []  # after the embeddings, after block 0, …
        for part in walk:
            if part.index == 0:
                clean = part.run(clean if part.level else None)
            elif part.index == 1 and part.level == 0:
                as_is, prompt = part.run(None), self._prompt.repeat_interleave(how.draws, 0)[..., None]
                corrupted = torch.where(prompt, as_is + self._noise(clean), as_is)
            elif part.index == 1:
                corrupted = part.run(corrupted)
            else:
                after = [part.run(first) for first in restored[:1]]
                after += [walk.block(part.level - 1, 2, one) for one in restored[1:]]
                if not part.level:
                    part.run(None)  # how blocks are called with so many rows
                sides = clean.repeat_interleave(how.draws * how.columns, 0), corrupted.repeat_interleave(how.columns, 0)
                restored = [*after, torch.where(self._place[..., None], *sides)]
        with self._model.loaded(TAIL):
            as_it_is, without = (
                self._loss(state, batch) for state, batch in zip((clean, corrupted), self._batches[:2], strict=True)
            )
            losses = np.stack([self._loss(state, self._batches[2]) for state in restored])
        losses = losses.reshape(len(restored), self._rows, how.draws, how.columns).mean(2)
        without = without.reshape(self._rows, how.draws).mean(1)
        return [
            Restored(float(as_it_is[i]), float(without[i]), np.where(self._there[i], losses[:, i], np.nan))
            for i in range(self._rows)
        ]

    def _noise(self, clean: torch.Tensor) -> torch.Tensor:
        """Draw what is added to the embeddings, (rows × draws, tokens, width); a row's own tokens decide it."""
        drawn = []
        for states, ids, prompt in zip(clean, self._batches[0].ids.cpu().numpy(), self._prompt, strict=True):
            generator = torch.Generator().manual_seed(row_seed(self._how.seed, ids.tobytes()))
            noise = torch.randn((self._how.draws, 1, *states.shape), generator=generator)
            drawn.append(self._how.noise * states[prompt].std() * noise[:, 0].to(states))
        return torch.cat(drawn)

    def _loss(self, hidden: torch.Tensor, batch: Batch) -> np.ndarray:
        """Return the mean loss of each row's answer, (rows,)."""
        keep = batch.keep
        flat, labels = hidden[keep], batch.labels[keep]
        step = logit_rows(self._model.vocabulary, self._model.device)
        parts = []
        for start in range(0, len(flat), step):
            scores = self._model.tail(flat[start : start + step]).float().log_softmax(-1)
            parts.append(-scores.gather(-1, labels[start : start + step, None])[:, 0])
        total = torch.zeros(keep.shape, dtype=torch.float64, device=keep.device)
        total[keep] = torch.cat(parts).double()
        return (total.sum(1) / keep.sum(1)).cpu().numpy()


def _tiled(batch: Batch, copies: int) -> Batch:
    """Repeat every row, one copy beside the other."""
    return replace(batch, **{name: getattr(batch, name).repeat_interleave(copies, 0) for name in ("ids", "labels", "keep")})
