"""What an edit should do, by the quadratic model, and how many directions an update has: for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from liborth_kernels.gram import gram

from liborth_cli.curvature.layer import TokenGradients
from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.linalg.truncated import energy
from liborth_cli.methods.kronecker import Factors, SummedFactors, quadratic_form


def participation(u: torch.Tensor | ThinProduct) -> float:
    """Return (Σσ²)² / Σσ⁴ of a matrix (m, n): how many singular directions share its energy.

    The participation ratio of the energies: 1 for rank one, min(m, n) for a flat spectrum. It needs the Gram matrix and no
    decomposition, and is the same in every basis. It is the estimator of intrinsic dimension in every report.
    """
    if isinstance(u, ThinProduct):
        both = (u.left.T @ u.left) @ (u.right.T @ u.right)  # DᵀD = R LᵀL Rᵀ has the eigenvalues of LᵀL·RᵀR
        whole, squares = float(both.trace()), float((both * both.T).sum())
    else:
        whole, squares = energy(u), energy(gram(u.contiguous(), u.dtype))
    return whole * whole / squares if squares > 0 else 0.0


def predict(removed: torch.Tensor | ThinProduct, factors: Factors | TokenGradients) -> float:
    """Return ½ tr(G D A Dᵀ) summed over the uses of the matrix, in nats a token; of single tokens ½ Σ w (gᵀDa)² / Σ w.

    Args:
        removed: D = W_f − W_g, (d_out, d_in).
        factors: curvature of the mean loss of one kind of data. For forget data measured on the path this is the curvature
            there, an order of magnitude for what the edit at the fine-tuned point does.
    """
    if isinstance(factors, TokenGradients):
        thin = isinstance(removed, ThinProduct)
        a, g = factors.inputs.to(removed.dtype), factors.gradients.to(removed.dtype)
        felt = ((g @ removed.left) * (a @ removed.right) if thin else (g @ removed) * a).sum(1)
        return 0.5 * energy(felt) / factors.weight
    parts = factors.parts if isinstance(factors, SummedFactors) else (factors,)
    return 0.5 * sum(quadratic_form(removed, p.gradient_covariance, p.input_covariance) for p in parts)


def facts(
    removed: torch.Tensor | ThinProduct, retain: Factors | None, forget: Sequence[Factors | TokenGradients]
) -> dict[str, Any]:
    """Return what the report says of one matrix's memory: its dimension, the cost of removing it and the gain.

    Args:
        removed: D = W_f − W_g, (d_out, d_in).
        retain: curvature of the data to keep good at.
        forget: curvature of each set of forget data, or its single tokens.
    """
    found: dict[str, Any] = {"memory_dimension": participation(removed)}
    if retain is not None:
        found["retain_cost"] = predict(removed, retain)
    if forget:
        found["forget_gain"] = [predict(removed, one) for one in forget]
    return found
