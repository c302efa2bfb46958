"""The spectrum of one weight, or of one update, in a few numbers."""

from __future__ import annotations

import torch
from liborth_kernels.update import update

from liborth_cli.checkpoint.pair import grid
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.linalg.eigen import singular_values
from liborth_cli.linalg.noise import bulk_edge, effective_rank, optimal_threshold

KEYS = ("norm", "top", "stable_rank", "effective_rank", "rank_90", "rank_99", "above_threshold", "above_bulk")


def profile_matrix(
    tensor: TensorInfo, checkpoint: Checkpoint, old: TensorInfo | None = None, reference: Checkpoint | None = None
) -> dict[str, float]:
    """Summarise the singular values of a matrix; of a stack of matrices, the average over the stack.

    Args:
        tensor: the matrix, of a plain floating dtype.
        checkpoint: where it lies.
        old: subtracted first, when given; rows it lacks are left out.
        reference: where `old` lies.

    Returns:
        norm ‖·‖_F, top σ₁, stable_rank ‖·‖²/σ₁², effective_rank (entropy), rank_90 and rank_99 (directions that hold
        90 and 99 % of the energy), above_threshold (Gavish–Donoho), above_bulk (Marchenko–Pastur edge). NaN when the
        tensor holds NaN or infinity.
    """
    matrices, rows, cols = grid(tensor.name, min((old or tensor).shape, tensor.shape))
    found: list[dict[str, float]] = []
    for number in range(matrices):
        span = number * rows * cols, (number + 1) * rows * cols
        u = checkpoint.load_elements(tensor.name, *span).float()
        if old is not None and reference is not None:
            u = update(u, reference.load_elements(old.name, *span), torch.empty(rows * cols))
        found.append(_summary(u.view(rows, cols)))
    return {key: sum(f[key] for f in found) / len(found) for key in KEYS}


def _summary(u: torch.Tensor) -> dict[str, float]:
    shape = (u.shape[0], u.shape[1])
    if not torch.isfinite(u).all():
        return dict.fromkeys(KEYS, float("nan"))
    values = singular_values(u).double()
    share = values.square().cumsum(0)
    total = share[-1].item()
    if total == 0:
        return dict.fromkeys(KEYS, 0.0)
    return dict(
        zip(
            KEYS,
            (
                total**0.5,
                values[0].item(),
                total / values[0].item() ** 2,
                effective_rank(values),
                int((share < 0.9 * total).sum()) + 1,
                int((share < 0.99 * total).sum()) + 1,
                int((values > optimal_threshold(values, shape)).sum()),
                int((values > bulk_edge(values, shape)).sum()),
            ),
            strict=True,
        )
    )
