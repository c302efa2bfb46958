"""`tokenwise`: the contrastive objective with the forget data's Fisher exact, token by token.

A token t of the forget data has the weight gradient g_t a_tᵀ, a matrix of rank one. `contrastive` knows these only through the
product of two averages, E[g gᵀ] ⊗ E[a aᵀ], which also holds every g_s a_tᵀ that never occurred, and removing those costs
skill. Here the kept part X minimises

    tr(G_r (X−U) A_r (X−U)ᵀ) + λ · Σ_t w_t (g_tᵀ X a_t)²

with the same damped K-FAC metric (G_r, A_r) on the retain data. There are far fewer tokens than weights, so it is solved
among tokens (the Woodbury identity). With G_r = M Mᵀ, A_r = L Lᵀ, g̃ = √w·M⁻¹g and ã = L⁻¹a, the kernel

    K_st = (g̃_s·g̃_t)(ã_s·ã_t) = Q κ Qᵀ

gives the directions E_k = M⁻ᵀ(Σ_t Q_tk g̃_t ã_tᵀ)L⁻¹ / √κ_k. They are orthonormal for the retain data, κ_k is their forget
curvature per unit of retain curvature, U's coordinate is z_k = (Qᵀy)_k / √κ_k with y_t = √w·g_tᵀ U a_t, and the filter is
z_k → z_k/(1 + λκ_k). Whatever lies outside of them no forget token feels, and it stays.

Few tokens are diagonalised so, in float64. For many, K is only multiplied with (linalg/khatri_rao.py): Lanczos from y finds the
directions that y, and so U, has a share in, as many as the strength asks for: until the objective at the kept part is proven to
be within `TOLERANCE` of its minimum (linalg/shifted.py; `gap` in the manifest). Cost and memory are then linear in the tokens.

On the input side alone, with keys as tokens, this is the closed form of MEMIT (arXiv 2210.07229); the metric on both sides
is K-FAC's (arXiv 1503.05671). Nothing of size d² is diagonalised: a Cholesky factorisation a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method, setting

if TYPE_CHECKING:
    import torch

    from liborth_cli.curvature.layer import TokenGradients
    from liborth_cli.linalg.khatri_rao import KhatriRao
    from liborth_cli.linalg.rows import ThinProduct
    from liborth_cli.methods.selection import Basis, Facts, Felt, Keep
    from liborth_cli.methods.whitening import Whitening

NEGLIGIBLE = 1e-13
"""Directions below this share of the largest κ are rounding."""
DENSE_UP_TO = 1024
"""Tokens up to which the kernel is diagonalised whole; beyond, a few dozen products with it cost less."""
TOLERANCE = 1e-3
"""How far the objective may be from its minimum, as a share of it."""
WEAKEST = 1e-6
"""Strengths below this one find the directions of this one."""


@dataclass
class TokenBasis:
    """U's coordinates along the directions that forget tokens feel; the rest of U is not represented.

    Attributes:
        coefficients: z, (k,), float64.
        ratios: κ, (k,): forget curvature per unit of retain curvature.
        mixing: Q/√κ, (tokens, k): what each direction takes of each token.
        tokens: g̃ and ã.
        output: M.
        input: L.
        dtype: of the update, and of what is rebuilt.
        felt_as: how the raw tokens became g̃, and what the metric was made of; None where that is not one product.
        strongest: the largest λ that the directions were found for.
        facts: how many tokens and directions there are.
        in_place: the update is left as it is.
    """

    coefficients: torch.Tensor
    ratios: torch.Tensor
    mixing: torch.Tensor
    tokens: KhatriRao
    output: Whitening
    input: Whitening
    dtype: torch.dtype
    felt_as: Origin | None = None
    strongest: float = math.inf
    facts: Facts = field(default_factory=dict)
    in_place: bool = False

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return Σ_k keep_k z_k E_k, (d_out, d_in), in the update's dtype, or in two factors when there are few tokens."""
        from liborth_cli.linalg.rows import ThinProduct
        from liborth_cli.methods.selection import kept

        shares = self.mixing @ kept(self.coefficients, keep)
        if self.few:
            outputs, inputs = self.sides
            return ThinProduct(outputs * shares, inputs)
        white = self.tokens.combine(shares).double()
        return self.input.unwhiten(self.output.unwhiten(white).T).T.to(self.dtype)

    @property
    def few(self) -> bool:
        """Whether there are fewer tokens than half of what the matrix is wide."""
        return 2 * len(self.tokens) < min(self.tokens.shape)

    @cached_property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """X = M⁻ᵀg̃, (d_out, tokens), and Y = L⁻ᵀã, (d_in, tokens), of few tokens."""
        left, right = (side.double().T.contiguous() for side in (self.tokens.left, self.tokens.right))
        return self.output.unwhiten(left), self.input.unwhiten(right)

    def felt(self, keep: Keep) -> Felt | None:
        """Return what curvature feels of D = X diag(s) Yᵀ, among the tokens; None where they are many.

        With G = M Mᵀ − δI, XᵀGX is g̃ᵀg̃ − δ XᵀX, and so on the other side.
        """
        from liborth_cli.methods.selection import Felt, kept

        if self.felt_as is None or not self.few:
            return None
        one, shares = self.felt_as, self.mixing @ kept(self.coefficients, keep)
        white = [side.double() @ side.double().T for side in (self.tokens.left, self.tokens.right)]
        plain = [side.T @ side for side in self.sides]
        both = shares.outer(shares)
        cost = (both * (white[0] - one.damping * plain[0]) * (white[1] - one.damping * plain[1])).sum().item()
        product = (both * plain[0]) @ plain[1]
        whole, squares = product.trace().item(), (product * product.T).sum().item()
        single = ((white[0] * white[1]) @ shares / one.factors).square().split(one.counts)
        return Felt(
            dimension=whole * whole / squares if squares > 0 else 0.0,
            retain_cost=0.5 * cost / one.scale,
            forget_gain=[0.5 * part.sum().item() / weight for part, weight in zip(single, one.weights, strict=True)],
        )


@dataclass(frozen=True)
class Origin:
    """What a basis of tokens was made from.

    Attributes:
        factors: what √w·g of every token was multiplied by, (tokens,).
        counts: tokens of each set.
        weights: of each set's tokens together.
        damping: δ, relative to the mean eigenvalues of the retain factors.
        scale: what both retain factors together were multiplied by to have the mean eigenvalue 1.
    """

    factors: torch.Tensor
    counts: list[int]
    weights: list[float]
    damping: float
    scale: float


@dataclass(frozen=True)
class Tokenwise(Method):
    """Basis: the directions forget tokens feel, orthonormal for the retain data. Score: κ, their ratio of curvatures."""

    name = "tokenwise"
    summary = "what single forget tokens feel is memory, weighed by retain curvature (the strongest)"
    amounts = ("strength",)
    needs = ("retain", "tokens")
    memory_side = "top"
    default = Amount("strength", 0.1)

    damping: float = setting(1e-2, "added to retain factors, relative to their mean eigenvalue.", low=0)

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the update's coordinates along what the forget tokens feel."""
        import torch

        from liborth_cli.linalg.khatri_rao import KhatriRao, kernel_product
        from liborth_cli.linalg.shifted import solve_shifted
        from liborth_cli.methods.kronecker import SummedFactors
        from liborth_cli.methods.whitening import Whitening, mean_scale

        retain, u = layer.need("retain"), layer.update
        sets: list[tuple[TokenGradients, float]] = layer.weighed("tokens")
        count = sum(len(one.inputs) for one, _ in sets)
        dtype = torch.float64 if count <= DENSE_UP_TO else torch.float32

        def side(covariance: torch.Tensor, x: Sequence[torch.Tensor]) -> tuple[Whitening, torch.Tensor]:
            found = Whitening.of(covariance, self.damping, layer.name, layer.tolerance)
            return found, _whitened(found, x, dtype)

        key = layer.input_key and ("tokenwise", layer.input_key)
        input_side = lambda: side(retain.input_covariance, [one.inputs for one, _ in sets])  # noqa: E731
        right, a = layer.memo.get(key, input_side, lambda made: made[0].lower.nbytes + made[1].nbytes)
        left, g = side(retain.gradient_covariance, [one.gradients for one, _ in sets])
        factors = _weigh(g, sets)
        tokens = KhatriRao(g, a)
        felt = float(tokens.diagonal().sum())
        # κ is 1 on average over all directions a matrix has, so that λ means the same in every layer.
        scale = (u.numel() * sum(share for _, share in sets) / felt) ** 0.5 if felt > 0 else 0.0
        g *= scale
        factors *= scale
        if 2 * count < min(u.shape):
            y = _along([one for one, _ in sets], u if layer.tolerance > 0 else u.double()) * factors
        else:
            y = tokens.along(right.colour(left.colour(u.double()).T).T).double()
        strength = amount.value or 0.0
        facts: Facts = {"tokens": count}
        if dtype == torch.float64:
            strength, (kappa, q) = math.inf, _diagonalised(tokens)
        else:
            found = solve_shifted(lambda v: kernel_product([tokens], v), y, 1 / max(strength, WEAKEST), TOLERANCE)
            kappa, q = found.nodes, found.basis @ found.rotation
            facts["gap"] = found.gap(1 / max(strength, WEAKEST))
        facts["directions"] = len(kappa)
        root, origin = kappa.rsqrt(), None
        if scale > 0 and not isinstance(retain, SummedFactors):
            whole = mean_scale(retain.input_covariance) * mean_scale(retain.gradient_covariance)
            counts, weights = [len(one.inputs) for one, _ in sets], [one.weight for one, _ in sets]
            origin = Origin(factors, counts=counts, weights=weights, damping=self.damping, scale=whole)
        return TokenBasis(
            (q.T @ y) * root,
            ratios=kappa,
            mixing=q * root,
            tokens=tokens,
            output=left,
            input=right,
            dtype=u.dtype,
            felt_as=origin,
            strongest=strength,
            facts=facts,
        )

    def serves(self, basis: Basis, amount: Amount) -> bool:
        """Tell whether the directions were found for this strength or a larger one."""
        assert isinstance(basis, TokenBasis)
        return (amount.value or 0.0) <= basis.strongest

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return κ, (k,)."""
        assert isinstance(basis, TokenBasis)
        return basis.ratios


def _whitened(metric: Whitening, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return L⁻¹x of all rows x, (tokens, d), computed in float64 and rounded to a dtype."""
    from liborth_cli.linalg.khatri_rao import PIECE

    pieces = (piece for part in parts for piece in part.split(PIECE))
    out, start = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1], dtype=dtype), 0
    for piece in pieces:
        out[start : start + len(piece)] = metric.whiten(piece.T.double()).T
        start += len(piece)
    return out


def _along(sets: Sequence[TokenGradients], u: torch.Tensor) -> torch.Tensor:
    """Return √w·g_tᵀ U a_t of every token, float64, (tokens,)."""
    import torch

    return torch.cat([((one.gradients.to(u) @ u) * one.inputs.to(u)).sum(1, dtype=torch.float64) for one in sets])


def _weigh(gradients: torch.Tensor, sets: Sequence[tuple[TokenGradients, float]]) -> torch.Tensor:
    """Scale the gradients of every set, one set after the other (tokens, d_out), to count its share whatever its scale.

    Returns:
        What each token's gradient was multiplied by, float64, (tokens,).
    """
    import torch

    from liborth_cli.linalg.khatri_rao import KhatriRao

    factors, start = torch.ones(len(gradients), dtype=torch.float64, device=gradients.device), 0
    for one, share in sets:
        felt = float(KhatriRao(one.gradients, one.inputs).diagonal().sum())
        factors[start : start + len(one.inputs)] = (share / felt) ** 0.5 if felt > 0 else 1.0
        start += len(one.inputs)
    gradients *= factors[:, None].to(gradients)
    return factors


def _diagonalised(tokens: KhatriRao) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of K that are no rounding, descending, (k,), and their vectors, (tokens, k)."""
    import torch

    kappa, q = torch.linalg.eigh(tokens.kernel())
    real = kappa > NEGLIGIBLE * kappa[-1].clamp(min=0)
    return kappa[real].flip(0), q[:, real].flip(1)
