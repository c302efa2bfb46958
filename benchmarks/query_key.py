"""Would treating q and k through their product be worth it? Measured on a pair without rotary positions (decision 0013).

    python benchmarks/query_key.py REFERENCE FINETUNED DATA

For every head of a GPT-2: B = W_qᵀW_k is what the scores see. All norms are of √A M √A, the root mean square of a change of
score over independent pairs of tokens. Three figures, medians and worst over the heads:

- product: the share of ΔB that is ΔW_qᵀΔW_k, which an edit of W_q and W_k each by itself leaves out of its model;
- rank: B_r + filter(ΔB) has a higher rank than a head has dimensions, so it has to be cut back before it can be divided
  into W_q and W_k again. What the cut changes, relative to what the filter changed;
- apart: the same filter on ΔW_q and ΔW_k apart, its change of B relative to the joint filter's. Nothing is cut.

The filter keeps the directions of A's eigenbasis with the highest λ_i·λ_j (for W alone: λ_j) that hold 0.9 of the update's
energy.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.curvature.factor_set import FactorSet

MASS = 0.9


def weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read a Conv1D's weight, (d_in, d_out), as float64."""
    return checkpoint.load(name).double()


def keep(coefficients: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Zero the coefficients of the lowest scores, until what is left holds MASS of the energy."""
    order = scores.flatten().argsort(descending=True)
    energy = coefficients.flatten()[order].square().cumsum(0)
    count = int((energy < MASS * energy[-1]).sum()) + 1
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return coefficients * mask.view(scores.shape)


def head(old: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...], basis: torch.Tensor, values: torch.Tensor):
    """Return the three figures of one head from its (W_q, W_k), each (d_head, d), before and after."""
    root = values.sqrt()

    def turned(w: torch.Tensor) -> torch.Tensor:
        return w @ basis

    def norm(m: torch.Tensor) -> float:
        return float((root[:, None] * m * root).norm())

    (q, k), (dq, dk) = map(turned, old), (turned(n - o) for n, o in zip(new, old, strict=True))
    b, change = q.T @ k, (q + dq).T @ (k + dk) - q.T @ k
    filtered = keep(change, torch.outer(values, values))
    u, s, v = torch.linalg.svd(root[:, None] * (b + filtered) * root)
    cut = (u[:, len(q) :] * s[len(q) :]) @ v[len(q) :]
    apart_q, apart_k = (keep(d, values.expand_as(d)) for d in (dq, dk))
    apart = (q + apart_q).T @ (k + apart_k) - b
    edit = norm(filtered - change)
    return norm(dq.T @ dk) / norm(change), float(cut.norm()) / edit, norm(apart - change) / edit


def main() -> None:
    """Measure every head and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("reference", "finetuned", "data"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "liborth_cli", "curvature", asked.finetuned, "--data", asked.data, "-q"]
        command += ["--tokens", str(asked.tokens), "--tensors", "c_attn", "-o", f"{place}/factors"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = []
        with (
            FactorSet.open(Path(place) / "factors") as factors,
            Checkpoint.open(Path(asked.reference)) as before,
            Checkpoint.open(Path(asked.finetuned)) as after,
        ):
            import transformers

            heads = transformers.AutoConfig.from_pretrained(asked.finetuned).n_head
            for name in factors.names:
                layer = factors.layer(name)
                sides = []
                for checkpoint in (before, after):
                    q, k, _ = weight(checkpoint, layer.tensor).T.chunk(3)
                    sides.append([(a, b) for a, b in zip(q.chunk(heads), k.chunk(heads), strict=True)])
                basis = layer.basis
                found += [head(old, new, basis.input_vectors, basis.input_values) for old, new in zip(*sides, strict=True)]
    print(f"{len(found)} heads; median (largest)")
    for title, column in zip(("product", "rank", "apart"), zip(*found, strict=True), strict=True):
        print(f"{title:10} {statistics.median(column):.3f} ({max(column):.3f})")


if __name__ == "__main__":
    main()
