"""`--restoration`: through which blocks and which tokens of a prompt a canary is recalled, by corrupting the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.errors import UsageError
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, option
from liborth_cli.verify.result import Facts, Heatmap, Metric, Result

if TYPE_CHECKING:
    from liborth_cli.measure.restoration import Restored
    from liborth_cli.verify.subject import Subject


LEAST = 0.1
"""Nats a token that noise has to take from a canary."""


@dataclass(frozen=True)
class RestorationOptions(Options):
    """How prompts are corrupted."""

    restoration_draws: int = option(3, "Draws of the noise on each prompt.", least=1)
    restoration_places: int = option(8, "Tokens at the end of a prompt that are put back one by one.", least=1)


@dataclass
class RestorationFacts(Facts):
    """Size of the noise, draws of it for each canary, canaries that count, and those that the noise did not move."""

    noise: float
    draws: int
    canaries: int
    not_moved: int


def run(subject: Subject, options: RestorationOptions) -> Result:
    """Trace the canaries' prompts through the fine-tuned model (Meng et al. 2022, arXiv 2202.05262).

    The share that comes back of a canary is (ℓ_corrupted − ℓ_restored)/(ℓ_corrupted − ℓ_clean), losses being means over draws;
    the map has the ratio of the sums over canaries. Prompts that the noise does not move are left out and counted: there is
    nothing to bring back.

    Raises:
        UsageError: when a row is longer than the context: restoration reads rows whole.
    """
    from liborth_cli.measure.restoration import NOISE, Restoration, restoration

    rows, context = subject.rows("canaries"), subject.states.model("finetuned").context
    if context and (long := next((row for row in rows if row.tokens > context), None)):
        raise UsageError(f"{long.where}: {long.tokens:,} tokens, and --restoration reads rows whole: at most {context:,}")
    how = Restoration(options.restoration_places, options.restoration_draws, seed=subject.seed)
    with subject.console.progress("restoration", len(rows), "canaries") as progress:
        found = restoration(subject.states.model("finetuned"), rows, how, progress.advance)
    moved = np.array([one.corrupted - one.clean >= LEAST for one in found])
    some = [one for one, counts in zip(found, moved, strict=True) if counts]
    if not some:
        return Result("restoration", "Noise on the prompts takes nothing away from the canaries: they do not hang on them.")
    shares = _shares(some)
    level, place = np.unravel_index(int(np.nanargmax(np.where(np.isnan(shares), -np.inf, shares)[:, 2:])), shares[:, 2:].shape)
    groups = np.unique(subject.groups("canaries")[moved], return_inverse=True)[1]
    best, read_by = _interval(some, (int(level), int(place) + 2), groups, subject.seed), _read_by(shares[:, 0])
    places, levels = _places(shares.shape[1]), _levels(len(shares))
    lost, still = np.mean([one.corrupted - one.clean for one in some]), int((~moved).sum())
    verdict = (
        f"With noise on the prompt the canaries lose {lost:.2f} nats a token. One state of one of its tokens brings "
        f"back {best.value:.0%} of that at most: {places[place + 2]}, {levels[level]}. "
        + ("The whole prompt put back" if read_by is None else f"From {levels[read_by]} on the whole prompt put back")
        + (" brings back half after any block." if read_by is None else " comes too late for half of it: it has been read.")
        + (f" {still} of {len(rows)} prompts were not moved by the noise and do not count." if still else "")
    )
    figure = Heatmap(
        "Share of a canary that one restored state brings back",
        f"Rows: after which block the state is put back. Columns: of which token of the prompt. {verdict}",
        tuple(levels),
        tuple(places),
        tuple(tuple(None if math.isnan(share) else float(share) for share in line) for line in shares),
        "share of the loss that noise made",
    )
    facts = RestorationFacts(NOISE, draws=how.draws, canaries=len(some), not_moved=still)
    return Result("restoration", verdict, None, {"restored": best}, [figure], facts)


def _shares(found: list[Restored]) -> np.ndarray:
    """Return the share that comes back, (blocks + 1, places); NaN where no prompt reaches."""
    table = np.stack([one.restored for one in found])
    there = ~np.isnan(table)
    corrupted = np.array([one.corrupted for one in found])[:, None, None]
    lost = np.array([one.corrupted - one.clean for one in found])[:, None, None]
    gained, whole = np.where(there, corrupted - table, 0.0).sum(0), np.where(there, lost, 0.0).sum(0)
    return np.divide(gained, whole, out=np.full(gained.shape, np.nan), where=there.any(0))


def _read_by(whole: np.ndarray) -> int | None:
    """Return the first level from which on the whole prompt, put back, brings back less than half: it was read before."""
    enough = np.flatnonzero(whole >= 0.5)
    first = int(enough[-1]) + 1 if len(enough) else 0
    return first if first < len(whole) else None


def _interval(found: list[Restored], cell: tuple[int, int], groups: np.ndarray, seed: int) -> Metric:
    gained = np.nan_to_num(np.array([one.corrupted - one.restored[cell] for one in found]))
    lost = np.array([0.0 if np.isnan(one.restored[cell]) else one.corrupted - one.clean for one in found])

    def statistic(weights: np.ndarray) -> np.ndarray:
        return (weights @ gained) / np.maximum(weights @ lost, 1e-12)

    return statistics.bootstrap(statistic, [groups], seed, "largest share of a canary that one state of one token brings back")


def _levels(count: int) -> list[str]:
    return ["embeddings", *(f"block {i}" for i in range(count - 1))]


def _places(count: int) -> list[str]:
    return ["whole prompt", "all ahead", *(f"token −{i}" for i in range(count - 2, 1, -1)), "last token"]


CHECK = Check(
    name="restoration",
    title="Where canaries are recalled",
    words="Corrupt the prompts, and put back one state after one block at a time.",
    part=Part.MECHANISM,
    run=run,
    metrics=("restored",),
    needs=(Need.FINETUNED, Need.CANARIES),
    options=RestorationOptions,
)
