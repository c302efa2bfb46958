"""The orthogonal projector: take out of an update what lies in the directions that public text uses. Pure.

Input form (gradient projection memory, Saha et al. 2021, arXiv 2103.09762): U ← U − U P_A. The layer then answers as before
to every input inside the protected input space. Kronecker form: U ← U − P_G U P_A. It gives up only what is protected on
both sides, and leaves more room. P_A and P_G project on the leading eigenvectors of A = E[a aᵀ] and G = E[g gᵀ].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Subspace:
    """A protected subspace of one side of a matrix.

    Attributes:
        size: dimensions of the side, d.
        vectors: orthonormal columns, (d, k); None when the subspace is spanned by coordinates.
        axes: the coordinates, (k,), int64; None when it is spanned by vectors.
    """

    size: int
    vectors: torch.Tensor | None = None
    axes: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Dimensions of the subspace, k."""
        if self.vectors is not None:
            return self.vectors.shape[1]
        return len(self.axes) if self.axes is not None else self.size

    def right(self, u: torch.Tensor) -> torch.Tensor:
        """Return U P, (m, d)."""
        if self.vectors is not None:
            vectors = self.vectors.to(u)
            return (u @ vectors) @ vectors.T
        if self.axes is None:
            return u
        kept = torch.zeros_like(u)
        kept[:, self.axes] = u[:, self.axes]
        return kept

    def left(self, u: torch.Tensor) -> torch.Tensor:
        """Return P U, (d, n)."""
        return self.right(u.T).T


def leading(values: torch.Tensor, vectors: torch.Tensor, mass: float) -> Subspace:
    """Span the fewest eigenvectors that hold a share of the trace.

    Args:
        values: eigenvalues, (d,), any order; or (blocks, d) for a matrix that is block-diagonal.
        vectors: their eigenvectors as columns, (d, d) or (blocks, d, d); empty when they are the coordinates.
        mass: share of the trace, in [0, 1].

    Returns:
        The subspace; 1 gives every direction with an eigenvalue above rounding.
    """
    flat = values.flatten().double().clamp(min=0.0)
    order = torch.argsort(flat, descending=True, stable=True)
    running = flat[order].cumsum(0)
    total = float(running[-1])
    rank = int((running < mass * total * (1 - 1e-12)).sum()) + 1 if mass > 0 and total > 0 else 0
    chosen = order[: min(rank, len(flat))]
    if not vectors.numel():
        return Subspace(len(flat), axes=chosen.sort().values)
    whole = torch.block_diag(*vectors) if vectors.dim() == 3 else vectors
    return Subspace(len(flat), vectors=whole[:, chosen].contiguous())


@dataclass(frozen=True)
class Projector:
    """Protects one matrix, U of shape (d_out, d_in).

    Attributes:
        inputs: P_A.
        outputs: P_G, or None for the input form, where every output is protected.
    """

    inputs: Subspace
    outputs: Subspace | None = None

    @property
    def free(self) -> int:
        """How many of the d_out·d_in directions an update may take."""
        rows = self.outputs.size if self.outputs is not None else 1
        protected = self.outputs.rank if self.outputs is not None else 1
        return rows * self.inputs.size - protected * self.inputs.rank

    @property
    def protected(self) -> float:
        """Share of the directions that is protected."""
        rows, kept = (self.outputs.size, self.outputs.rank) if self.outputs is not None else (1, 1)
        return kept * self.inputs.rank / (rows * self.inputs.size)

    def inside(self, u: torch.Tensor) -> torch.Tensor:
        """Return the protected part P_G U P_A, in the dtype of `u`."""
        part = self.inputs.right(u)
        return part if self.outputs is None else self.outputs.left(part)

    def project(self, u: torch.Tensor) -> torch.Tensor:
        """Return U without its protected part."""
        return u - self.inside(u)

    def leak(self, u: torch.Tensor) -> float:
        """Return ‖P_G U P_A‖ / ‖U‖ in float64; 0 for no update."""
        u = u.double()
        norm = float(u.norm())
        return float(self.inside(u).norm()) / norm if norm else 0.0
