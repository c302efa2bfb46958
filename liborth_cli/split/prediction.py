"""What the quadratic model says an edit will do, and how many directions each part has; one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liborth_cli.methods import Layer
from liborth_cli.methods.kronecker import apply
from liborth_cli.methods.method import Factors
from liborth_cli.methods.terms import terms_of

PREDICTED = ("retain_cost", "forget_gain")
"""Facts that add up over matrices, in nats a token."""


def predict(layer: Layer, skill: torch.Tensor, memory: torch.Tensor) -> dict[str, float]:
    """Predict what removing the memory part does to the loss, to second order.

    ½ tr(G U_m A U_mᵀ), the Kronecker form of ½ δᵀFδ (Martens and Grosse 2015, arXiv 1503.05671). Gradients and terms between
    matrices are left out, so the sum over a model is a rough number; `verify` measures the real one.

    Args:
        layer: its factors.
        skill: U_s, (d_out, d_in).
        memory: U_m, (d_out, d_in).

    Returns:
        `retain_cost` and `forget_gain`, nats a token, where there are factors; and the intrinsic dimension of both parts.
    """
    found = {"skill_dimension": dimension(skill), "memory_dimension": dimension(memory)}
    if layer.retain is not None:
        found["retain_cost"] = quadratic(memory, [layer.retain])
    if layer.forget:
        found["forget_gain"] = quadratic(memory, layer.forget)
    return found


def quadratic(part: torch.Tensor, factors: Sequence[Factors]) -> float:
    """Return ½ Σ tr(G D A Dᵀ) over factor sets and the uses of a matrix, for D (d_out, d_in)."""
    total = 0.0
    for term in (t for one in factors for t in terms_of(one)):
        output, inputs = term.output.to(part.dtype), term.input.to(part.dtype)
        bent = apply(inputs, apply(output, part).T).T
        total += float((bent * part).sum(dtype=torch.float64)) / 2
    return total


def dimension(part: torch.Tensor) -> float:
    """Return the participation ratio of the spectrum, (Σσ²)² / Σσ⁴: how many directions carry a matrix; 0 for zero."""
    gram = part @ part.T if part.shape[0] <= part.shape[1] else part.T @ part
    fourth = float(gram.square().sum(dtype=torch.float64))
    return float(gram.trace().double()) ** 2 / fourth if fourth > 0 else 0.0
