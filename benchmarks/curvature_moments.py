"""How far marginal moments, and plain K-FAC, are from the exact corrected eigenvalues of EK-FAC, layer by layer.

    python benchmarks/curvature_moments.py MODEL=DATA … [--tokens N]

Both are taken in the same eigenbasis on the same tokens and sampled labels. Three figures a layer: the relative error in the
Frobenius norm, the correlation of the logarithms over all directions (i, j), and the share of the exact mass that the right
half of the directions would hold, as ranked by the approximation, relative to the exact ranking. Writes the section "moments"
of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from record import record

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.layer import KroneckerFactors


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


def layers(model: str, data: str, tokens: int) -> dict[str, list[tuple[float, ...]]]:
    """Estimate twice and return the six figures of every layer, by kind of layer."""
    kinds: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        for moments in ("marginal", "exact"):
            command = [sys.executable, "-m", "liborth_cli", "curvature", model, "--data", data, "-q", "--tokens", str(tokens)]
            command += ["--moments", moments, "-o", f"{place}/{moments}", "--tensors", r"layers|\.h\."]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with FactorSet.open(Path(place) / "marginal") as cheap, FactorSet.open(Path(place) / "exact") as exact:
            for name in exact.names:
                layer = exact.layer(name)
                truth = layer.curvature("exact")
                row = (*compare(truth, in_basis(cheap.layer(name), layer)), *compare(truth, layer.curvature("kfac")))
                kinds[re.sub(r"^.*?\.\d+\.|\.weight$", "", name)].append(row)
    return kinds


def main() -> None:
    """Measure every model, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="MODEL=DATA")
    parser.add_argument("--tokens", type=int, default=10_000)
    asked = parser.parse_args()
    lines = [
        "| model, text | layers | marginal: error | corr. | top half | K-FAC: error | corr. | top half |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in asked.pairs:
        model, _, data = pair.partition("=")
        kinds = layers(model, data, asked.tokens)
        every = list(zip(*(row for rows in kinds.values() for row in rows), strict=True))
        title = f"{Path(model).name}, {Path(data).name}"
        found = {f"{kind}, mean": list(map(statistics.mean, zip(*rows, strict=True))) for kind, rows in kinds.items()}
        found["**all, mean**"] = list(map(statistics.mean, every))
        found["**worst**"] = [worst(column) for worst, column in zip((max, min, min) * 2, every, strict=True)]
        lines += [f"| {title} | {name} | " + " | ".join(f"{cell:.3f}" for cell in row) + " |" for name, row in found.items()]
    text = f"{asked.tokens:,} tokens, sampled labels.\n\n" + "\n".join(lines)
    print(text)
    record("moments", text)


if __name__ == "__main__":
    main()
