"""How far marginal moments, and plain K-FAC, are from the exact corrected eigenvalues of EK-FAC, layer by layer.

    python tests/benchmarks/curvature_moments.py MODEL DATA [--tokens N]

Both are taken in the same eigenbasis on the same tokens and sampled labels. Three figures a layer: the relative error in the
Frobenius norm, the correlation of the logarithms over all directions (i, j), and the share of the exact mass that the right
half of the directions would hold, as ranked by the approximation, relative to the exact ranking.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from liborth_cli.curvature.factors import FactorSet, KroneckerFactors


def compare(exact: torch.Tensor, guess: torch.Tensor) -> tuple[float, float, float]:
    """Return relative error, correlation of logarithms, and relative mass of the top half."""
    error = float((guess - exact).norm() / exact.norm())
    floor = 1e-12 * float(exact.max())
    logs = torch.stack([exact.clamp(min=floor).log().flatten(), guess.clamp(min=floor).log().flatten()])
    half = exact.numel() // 2
    chosen = exact.flatten()[guess.flatten().topk(half).indices].sum()
    return error, float(torch.corrcoef(logs)[0, 1]), float(chosen / exact.flatten().topk(half).values.sum())


def in_basis(layer: KroneckerFactors, other: KroneckerFactors) -> torch.Tensor:
    """Return the marginal curvature of one set in the eigenbasis of another."""
    import dataclasses

    return dataclasses.replace(layer, cached_basis=other.basis).curvature("marginal")


def main() -> None:
    """Estimate twice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--tokens", type=int, default=20000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for moments in ("marginal", "exact"):
            command = [sys.executable, "-m", "liborth_cli", "curvature", asked.model, "--data", asked.data, "-q"]
            command += [
                "--tokens",
                str(asked.tokens),
                "--moments",
                moments,
                "-o",
                f"{place}/{moments}",
                "--tensors",
                "layers|\\.h\\.",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with FactorSet.open(Path(place) / "marginal") as cheap, FactorSet.open(Path(place) / "exact") as exact:
            kinds: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
            for name in exact.names:
                layer = exact.layer(name)
                truth = layer.curvature("exact")
                row = (*compare(truth, in_basis(cheap.layer(name), layer)), *compare(truth, layer.curvature("kfac")))
                kinds[name.removesuffix(".weight").split(".", 3)[3]].append(row)
    show("matrix", *("marginal: error", "log corr.", "top half", "kfac: error", "log corr.", "top half"))
    for kind, rows in kinds.items():
        show(kind, *map(statistics.mean, zip(*rows, strict=True)))
    every = list(zip(*(row for rows in kinds.values() for row in rows), strict=True))
    show("mean", *map(statistics.mean, every))
    show("worst", *(worst(column) for worst, column in zip((max, min, min) * 2, every, strict=True)))


def show(name: str, *cells: float | str) -> None:
    """Print one row."""
    print(f"{name:20}", *(f"{cell:>15}" if isinstance(cell, str) else f"{cell:>15.3f}" for cell in cells))


if __name__ == "__main__":
    main()
