"""The mathematics of a split, on one matrix in memory: dividing its update, and what the quadratic model predicts of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from liborth_kernels.gram import gram

from liborth_cli.curvature.layer import SampledFactors, TokenGradients
from liborth_cli.linalg.khatri_rao import PIECE, KhatriRao
from liborth_cli.linalg.rows import Rows, ThinProduct
from liborth_cli.linalg.truncated import LeadingSubspace, energy, leading_subspace
from liborth_cli.machine import multiplies_bfloat16
from liborth_cli.methods import Layer
from liborth_cli.methods.kronecker import Factors, SummedFactors, quadratic_form
from liborth_cli.methods.selection import Basis, Facts, Feeling, Felt, kept_energy, select
from liborth_cli.methods.svd import known_rank
from liborth_cli.split.options import SplitOptions

NARROWED_FROM = 512
"""Shorter side from which sums over a Gram matrix in bfloat16 are as good as those in float32: roundings average out."""


@dataclass(frozen=True)
class Prediction:
    """What the removed part D = W_f − W_g is, and what the quadratic model says it does.

    Attributes:
        dimension: of the update, see `participation`.
        memory_dimension: of D.
        retain_cost: loss on the retain data, nats a token; None without their factors.
        forget_gain: of each set of forget data.
    """

    dimension: float
    memory_dimension: float
    retain_cost: float | None = None
    forget_gain: list[float] = field(default_factory=list)


@dataclass
class MatrixReport:
    """What a split did to one matrix.

    Attributes:
        energy: ‖U‖².
        skill: ‖U_s‖²/‖U‖².
        memory: ‖U − U_s‖²/‖U‖².
        facts: what the method adds: rank, certificate.
        leading: the leading part, when it comes as two thin factors.
        felt: what curvature feels of it, when its basis can tell.
        prediction: where there are factors to predict by.
    """

    energy: float
    skill: float
    memory: float
    facts: Facts
    leading: ThinProduct | None = None
    felt: Felt | None = None
    prediction: Prediction | None = None


def split_matrix(layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
    """Divide one update into skill and memory.

    Args:
        layer: the update and its seed; the update's storage is reused for the result.
        options: method, amount and side.

    Returns:
        U_s, (d_out, d_in), and the report. U_m is what is left of U.
    """
    method, u = options.rule, layer.update
    tail = options.side == "tail"
    basis = method.basis(layer, options.amount)
    scores = method.score(basis, layer)
    if not basis.in_place:
        return divide(basis, scores, layer, options)
    whole = u if tail else u.clone()
    keep = select(options.amount, basis, scores, (u.shape[0], u.shape[1]), layer.energy)
    leading_share = kept_energy(basis, keep) / layer.energy
    rest_share = (1 - keep) ** 2 if isinstance(keep, float) else max(1.0 - leading_share, 0.0)
    leading = basis.rebuild(keep)
    assert isinstance(leading, torch.Tensor)
    if tail:
        return leading, MatrixReport(layer.energy, leading_share, rest_share, basis.facts)
    return whole.sub_(leading), MatrixReport(layer.energy, rest_share, leading_share, basis.facts)


def divide(basis: Basis, scores: torch.Tensor, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
    """Divide an update whose basis does not use it up, once basis and scores are there; see `split_matrix`."""
    u = layer.update
    keep = select(options.amount, basis, scores, (u.shape[0], u.shape[1]), layer.energy)
    found = basis.rebuild(keep)
    leading = found.whole(u.dtype, exact=layer.tolerance == 0) if isinstance(found, ThinProduct) else found
    rest = u.sub_(leading)
    skill, memory = (leading, rest) if options.side == "tail" else (rest, leading)
    shares = energy(skill) / layer.energy, energy(memory) / layer.energy
    thin = found if isinstance(found, ThinProduct) else None
    felt = basis.felt(keep) if isinstance(basis, Feeling) else None
    return skill, MatrixReport(layer.energy, *shares, basis.facts, thin, felt)


def keep_first(found: LeadingSubspace, rank: int, layer: Layer) -> tuple[torch.Tensor, MatrixReport]:
    """Divide an update whose leading directions were found for a larger rank: what `svd` keeps at this one.

    Args:
        found: directions of this update, at least `rank`.
        rank: how many of them are skill.
        layer: the update; its storage is reused for the result.

    Returns:
        U_s, (d_out, d_in), and the report.
    """
    wide = layer.update.shape[0] <= layer.update.shape[1]
    coordinates = found.coordinates[:rank] if wide else found.coordinates[:, :rank]
    part = LeadingSubspace(found.vectors[:, :rank], coordinates, energy(coordinates), found.excess, found.route)
    share = part.captured / layer.energy
    return part.rebuild(layer.update), MatrixReport(layer.energy, share, max(1 - share, 0.0), {"rank": rank})


def truncate(
    u: torch.Tensor | Rows, total: float, generator: torch.Generator, options: SplitOptions
) -> tuple[ThinProduct, MatrixReport]:
    """Find the low-rank part of an update without multiplying it out: what `svd` at a rank keeps of it.

    Args:
        u: U, (m, n), in memory or formed by rows.
        total: ‖U‖².
        generator: seeded.
        options: the rank and the tolerance.

    Returns:
        U_s as two thin factors, and the report.
    """
    found = leading_subspace(u, int(options.amount.value or 0), total, generator, options.tolerance)
    facts: Facts = {"rank": found.vectors.shape[1], "excess": found.excess, "route": found.route}
    facts |= known_rank(found.values, total)
    skill = found.captured / total
    return found.thin(u.shape[0] > u.shape[1]), MatrixReport(total, skill, max(1.0 - skill, 0.0), facts)


def participation(u: torch.Tensor | ThinProduct) -> float:
    """Return (Σσ²)² / Σσ⁴ of a matrix (m, n): how many singular directions share its energy.

    The participation ratio of the energies: 1 for rank one, min(m, n) for a flat spectrum. It needs the Gram matrix and no
    decomposition, and is the same in every basis. It is the estimator of intrinsic dimension in every report. Of a large
    float32 matrix it is within some 1e-4, where a processor or GPU is faster with bfloat16.
    """
    if isinstance(u, ThinProduct):
        both = (u.left.T @ u.left) @ (u.right.T @ u.right)  # DᵀD = R LᵀL Rᵀ has the eigenvalues of LᵀL·RᵀR
        whole, squares = float(both.trace()), float((both * both.T).sum())
    else:
        whole, squares = energy(u), energy(_gram(u))
    return whole * whole / squares if squares > 0 else 0.0


def _gram(u: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix of a matrix (m, n), for sums over all of it: of a large one in bfloat16, where that is faster."""
    if u.dtype != torch.float32 or min(u.shape) < NARROWED_FROM or not multiplies_bfloat16(u.device):
        return gram(u.contiguous(), u.dtype)
    side = (u.T if u.shape[0] > u.shape[1] else u).bfloat16()
    return (side @ side.T).float()


def predict(removed: torch.Tensor | ThinProduct, factors: Factors | SampledFactors | TokenGradients) -> float:
    """Return ½ tr(G D A Dᵀ) summed over the uses of the matrix, in nats a token; of single tokens ½ Σ w (gᵀDa)² / Σ w.

    Args:
        removed: D = W_f − W_g, (d_out, d_in).
        factors: curvature of the mean loss of one kind of data. For forget data measured on the path this is the curvature
            there, an order of magnitude for what the edit at the fine-tuned point does.
    """
    if isinstance(factors, TokenGradients):
        a, g = factors.inputs.to(removed.dtype), factors.gradients.to(removed.dtype)
        if isinstance(removed, ThinProduct):
            felt = ((g @ removed.left) * (a @ removed.right)).sum(1)
        else:
            tokens = KhatriRao(g, a)
            felt = (tokens.narrowed() if len(tokens) > PIECE else tokens).along(removed)  # of many a sum, and no more
        return 0.5 * energy(felt) / factors.weight
    parts = factors.parts if isinstance(factors, SummedFactors) else (factors,)
    return 0.5 * sum(quadratic_form(removed, p.gradient_covariance, p.input_covariance) for p in parts)


def predicted(
    update: float,
    removed: torch.Tensor | ThinProduct,
    retain: Factors | None,
    forget: Sequence[Factors | SampledFactors | TokenGradients],
) -> Prediction:
    """Return what an edit should do.

    Args:
        update: dimension of U.
        removed: D = W_f − W_g.
        retain: curvature of the data to keep good at.
        forget: curvature of each set of forget data, or its single tokens.
    """
    cost = None if retain is None else predict(removed, retain)
    return Prediction(update, participation(removed), cost, [predict(removed, one) for one in forget])
