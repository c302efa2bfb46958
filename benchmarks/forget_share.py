"""A candidate that failed: only the forget tokens whose losses fell most, and how far their cut is from that of all tokens.

    python benchmarks/forget_share.py PAIR --retain TEXTS --forget TEXTS [--shares 0.5 0.9 0.99 1] [--strength 0.1]

PAIR holds `base` and `finetuned`. For every linear layer f(Δ) = ‖Δ‖² + λ‖y − BΔ‖² is that of all forget tokens, half way; Δ is
the minimiser for the tokens that are taken: the fewest that hold a share of all that fell. A row ends with its last one, and a
row without any is not read. The control takes whole rows by lot, as many positions.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from record import machine

from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import SILENT
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions
from liborth_cli.dose.passes import Pass, Passes, retain_options
from liborth_cli.dose.texts import open_reader, whole
from liborth_cli.linalg.regularised import solve
from liborth_cli.linalg.truncated import energy
from liborth_cli.machine import configure
from liborth_cli.measure.scores import Evaluator
from liborth_cli.methods import METHODS, Amount, Layer
from liborth_cli.methods.tokenwise import TokenBasis
from liborth_cli.split.factors import FactorSource
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, Row
from liborth_cli.stream.weights import Point

EXACT = 1e-6
"""Gap to which both problems are solved."""


@dataclass(frozen=True)
class Carriers:
    """Rows in which only those tokens carry loss that are taken.

    Attributes:
        rows: those that have any.
        taken: tokens that carry loss, of all.
        share: of the fall of all losses that fell, what theirs have.
    """

    rows: list[Row]
    taken: int
    share: float


def carriers(rows: Sequence[Row], before: Sequence[np.ndarray], after: Sequence[np.ndarray], share: float) -> Carriers:
    """Take the fewest tokens whose losses fell by a share of what all losses that fell did.

    Args:
        rows: forget rows.
        before: losses of each row's tokens that carry loss, in the reference, nats.
        after: likewise, in the fine-tuned model.
        share: above 0; 1 takes every token whose loss fell, and all tokens where none did.
    """
    fell = [row.weight * np.maximum(old - new, 0.0) for row, old, new in zip(rows, before, after, strict=True)]
    every = np.concatenate(fell) if fell else np.zeros(0)
    whole = float(every.sum())
    if not whole > 0.0:
        return Carriers(list(rows), len(every), 1.0)
    order = np.argsort(-every, kind="stable")
    sums = np.cumsum(every[order])
    count = min(int(np.searchsorted(sums, share * whole * (1 - 1e-12))) + 1, int((every > 0).sum()))
    chosen = np.zeros(len(every), bool)
    chosen[order[:count]] = True
    kept, start = list[Row](), 0
    for row in rows:
        keep = row.keep.copy()
        size = int(keep.sum())
        keep[keep] = chosen[start : start + size]
        start += size
        if keep.any():
            end = int(np.flatnonzero(keep)[-1]) + 1
            kept.append(replace(row, ids=row.ids[: end + 1], keep=keep[:end]))
    return Carriers(kept, count, float(every[chosen].sum()) / whole)


class Bench:
    """One pair, and factor sets of its texts."""

    def __init__(self, pair: Path, folder: Path, texts: tuple[str, str], tokens: int) -> None:
        """Read the texts, score the forget rows at both ends, and measure the retain factors."""
        sides = [pair / name for name in ("base", "finetuned")]
        self.old, self.new = (Checkpoint.open(side) for side in sides)
        self.model = BlockModel(Point(self.new), torch.float32, torch.device("cpu"))
        sources = Source(sides[0]), Source(sides[1])
        self.passes = Passes(folder, self.old, self.new, sources, self.model, configure("cpu", None), SILENT)
        reader = open_reader(self.model, self.new, True, lambda _: None)
        self.files = [[DataFile.parse(text, secret=secret)] for text, secret in zip(texts, (False, True), strict=True)]
        retain, self.rows = reader.read(self.files[0]), _first(whole(reader.read(self.files[1])), tokens)
        evaluator = Evaluator(self.model, self.rows)
        points = Point(self.new, self.old, 0.0), Point(self.new)
        self.losses = [[score.loss for score in evaluator.score(point)] for point in points]
        self.retain = self._set("retain", _first(retain, 20_000), retain_options([], 0, "float32"))

    def _set(self, kind: str, rows: Sequence[Row], options: CurvatureOptions) -> FactorSet:
        return FactorSet.open(self.passes.run_pass(Pass(kind, rows, self.files[kind == "forget"], options)))

    def bases(self, rows: Sequence[Row]) -> dict[str, TokenBasis]:
        """Return what the tokens of some rows feel of every matrix."""
        single = CurvatureOptions("empirical", at=0.5, per_token=True)
        sets = FactorSource(("retain", "tokens"), self.new, self.retain, self._set("forget", rows, single))
        found = {}
        for name, info in self.new.tensors.items():
            if len(info.shape) == 2 and sets.covers(name) and (one := sets.of(name, 0)) is not None:
                u = self.new.load(name).float() - self.old.load(name).float()
                u = u.T.contiguous() if one.transposed else u
                layer = Layer(name, u, energy(u), torch.Generator(), 0.0, one.retain, tokens=one.tokens, shares=one.shares)
                basis = METHODS["tokenwise"].basis(layer, Amount("strength", 1.0))
                assert isinstance(basis, TokenBasis)
                found[name] = basis
        return found


def _first(rows: Sequence[Row], tokens: int) -> list[Row]:
    kept = []
    for row in rows:
        if tokens <= 0:
            break
        kept.append(row)
        tokens -= row.tokens
    return kept


def minimiser(basis: TokenBasis, strength: float) -> torch.Tensor:
    """Return Δ, whitened, (d_out, d_in)."""
    return solve(basis.tokens, basis.coefficients, strength, EXACT).part.double()


def objective(basis: TokenBasis, delta: torch.Tensor, strength: float) -> float:
    """Return f(Δ)."""
    error = basis.coefficients - basis.tokens.along(delta).double()
    return float(delta.square().sum() + strength * error.square().sum())


def main() -> None:
    """Measure every share, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the forget texts, at most")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.9, 0.99, 1.0])
    parser.add_argument("--strength", type=float, default=0.1)
    a = parser.parse_args()
    lines = (
        "| taken | share of the fall | tokens | rows | positions | f above its minimum | worst matrix | Δ moved by | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    )
    with tempfile.TemporaryDirectory(prefix="liborth-bench-") as folder:
        bench = Bench(a.pair, Path(folder), (a.retain, a.forget), a.tokens)
        full = bench.bases(bench.rows)
        best = {name: minimiser(basis, a.strength) for name, basis in full.items()}
        least = {name: objective(basis, best[name], a.strength) for name, basis in full.items()}
        tokens = sum(row.tokens for row in bench.rows)
        head = f"{machine()}. {len(bench.rows):,} rows, {tokens:,} tokens; λ {a.strength:g}."
        print(head, "", *lines, sep="\n", flush=True)
        for share in a.shares:
            taken = carriers(bench.rows, bench.losses[0], bench.losses[1], share)
            positions = sum(row.tokens for row in taken.rows)
            lots = random.Random(0).sample(bench.rows, len(bench.rows))
            for title, rows in ((f"those that hold {share:g} of the fall", taken.rows), ("by lot", _first(lots, positions))):
                start = time.process_time()
                some = bench.bases(rows)
                parts = {name: minimiser(basis, a.strength) for name, basis in some.items()}
                spent = time.process_time() - start
                reached = {name: objective(full[name], parts[name], a.strength) for name in parts}
                above = sum(reached.values()) / sum(least[name] for name in reached) - 1
                worst = max(reached[name] / least[name] - 1 for name in reached)
                moved = sum(float((parts[n] - best[n]).square().sum()) for n in parts) ** 0.5
                moved /= sum(float(best[n].square().sum()) for n in parts) ** 0.5
                known = (f"{taken.share:.3f}", f"{taken.taken:,}") if rows is taken.rows else ("", "")
                print(
                    f"| {title} | {known[0]} | {known[1]} | {len(rows):,} | {sum(r.tokens for r in rows):,} | {above:.1%} | "
                    f"{worst:.1%} | {moved:.1%} | {spent:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
