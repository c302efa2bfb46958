"""`tokenwise`: the contrastive objective with the forget data's Fisher exact, token by token.

A token t of the forget data has the weight gradient g_t a_tᵀ, a matrix of rank one. `contrastive` knows these only through the
product of two averages, E[g gᵀ] ⊗ E[a aᵀ], which also holds every g_s a_tᵀ that never occurred, and removing those costs
skill. Here the kept part X minimises

    tr(G_r (X−U) A_r (X−U)ᵀ) + λ · Σ_t w_t (g_tᵀ X a_t)²

with the same damped K-FAC metric (G_r, A_r) on the retain data. There are far fewer tokens than weights, so it is solved
among tokens (the Woodbury identity). With G_r = M Mᵀ, A_r = L Lᵀ, g̃ = √w·M⁻¹g and ã = L⁻¹a, the kernel

    K_st = (g̃_s·g̃_t)(ã_s·ã_t),    y_t = √w·g_tᵀ U a_t,    α = (K + I/λ)⁻¹y

the removed part is U − X = M⁻ᵀ(Σ_t α_t g̃_t ã_tᵀ)L⁻¹. Along an eigenvector of K with value κ, forget curvature per unit of
retain curvature, that is the filter z → z/(1 + λκ) on U's coordinate. Whatever no forget token feels stays.

Few tokens are solved by a Cholesky factorisation of K, in float64: up to 1,024, and up to 4,096 of a matrix that is large
enough for this to be the shorter way. For more, K is only multiplied with (linalg/khatri_rao.py),
until the objective at X is proven to be within `TOLERANCE` of its minimum (linalg/regularised.py; `gap` in the manifest): cost
and memory are linear in the tokens.

On the input side alone, with keys as tokens, this is the closed form of MEMIT (arXiv 2210.07229); the metric on both sides
is K-FAC's (arXiv 1503.05671). Nothing of size d² is diagonalised: a Cholesky factorisation a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from liborth_cli.errors import BadInput
from liborth_cli.methods.method import Amount, Layer, Method, setting

if TYPE_CHECKING:
    import torch

    from liborth_cli.curvature.layer import TokenGradients
    from liborth_cli.linalg.khatri_rao import KhatriRao
    from liborth_cli.linalg.rows import ThinProduct
    from liborth_cli.methods.selection import Basis, Facts, Felt, Keep
    from liborth_cli.methods.whitening import Whitening

TOLERANCE = 5e-3
"""How far the objective may be from its minimum, as a share of it: what is removed is then 3 % off (docs/decisions/0058)."""


@dataclass
class WhiteTokens:
    """One side of the tokens, in coordinates where the retain data's metric is the identity; matrices with one input share it.

    Attributes:
        metric: L.
        rows: x̃ = L⁻¹x, (tokens, d).
    """

    metric: Whitening
    rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held, with what of few tokens is kept once it was asked for."""
        return self.metric.lower.nbytes + 2 * self.rows.nbytes

    @cached_property
    def gram(self) -> torch.Tensor:
        """X̃X̃ᵀ, (tokens, tokens), float64."""
        from liborth_kernels.gram import gram

        return gram(self.rows.double())

    @cached_property
    def back(self) -> torch.Tensor:
        """L⁻ᵀx̃, (d, tokens), float64."""
        return self.metric.unwhiten(self.rows.T)

    @cached_property
    def plain(self) -> torch.Tensor:
        """The Gram matrix of these, (tokens, tokens)."""
        from liborth_kernels.gram import gram

        return gram(self.back.T.contiguous())


@dataclass
class TokenBasis:
    """What single tokens feel of an update: one coordinate a token, and not orthogonal, so that a filter has to be solved for.

    Attributes:
        coefficients: y, (tokens,), float64.
        ratios: K_tt, (tokens,): forget curvature per unit of retain curvature along what the token alone feels.
        tokens: g̃ and ã.
        output: M, and g̃.
        input: L, and ã.
        dtype: of the update, and of what is rebuilt.
        felt_as: how the raw tokens became g̃, and what the metric was made of; None where that is not one product.
        facts: how many tokens there are; once rebuilt, of many the steps it took and the gap.
        parts: of equal length that the tokens come in, the n-th of each of one position; 1 where they are not.
        in_place: the update is left as it is.
    """

    coefficients: torch.Tensor
    ratios: torch.Tensor
    tokens: KhatriRao
    output: WhiteTokens
    input: WhiteTokens
    dtype: torch.dtype
    felt_as: Origin | None = None
    facts: Facts = field(default_factory=dict)
    parts: int = 1
    in_place: bool = False
    _last: tuple[float, torch.Tensor] | None = None

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return what a filter λ takes, (d_out, d_in), in the update's dtype, or in two factors when there are few tokens."""
        from liborth_cli.linalg.regularised import solve
        from liborth_cli.linalg.rows import ThinProduct
        from liborth_cli.methods.selection import Filter

        assert isinstance(keep, Filter)
        if not self.exact:
            found = solve(self.tokens, self.coefficients, keep.strength, TOLERANCE, self.parts)
            if not math.isfinite(found.gap):
                raise BadInput(
                    f"tokenwise: --strength {keep.strength:g} is too large: only rounding is left; take a smaller one"
                )
            self.facts |= {"steps": found.steps, "gap": found.gap}
            return self._whole(found.part)
        alpha = self._dual(keep.strength)
        if self.few:
            outputs, inputs = self.sides
            return ThinProduct(outputs * alpha, inputs)
        return self._whole(self.tokens.combine(alpha))

    def _whole(self, white: torch.Tensor) -> torch.Tensor:
        return self.input.metric.unwhiten(self.output.metric.unwhiten(white.double()).T).T.to(self.dtype)

    def _dual(self, strength: float) -> torch.Tensor:
        """Return α, (tokens,), of few tokens; the last one is kept."""
        from liborth_cli.linalg.regularised import dual

        if self._last is None or self._last[0] != strength:
            self._last = strength, dual(self.kernel if self.few else self.tokens.kernel(), self.coefficients, strength)
        return self._last[1]

    def thinned(self) -> TokenBasis | FewTokens:
        """Return what `rebuild` needs, and nothing else: of few tokens what they are multiplied back to, not the metric."""
        return FewTokens(self.coefficients, self.kernel, *self.sides, facts=self.facts) if self.few else self

    @property
    def exact(self) -> bool:
        """Whether the tokens' own kernel is factorised."""
        return self.tokens.left.dtype.itemsize == 8

    @property
    def few(self) -> bool:
        """Whether there are fewer tokens than half of what the matrix is wide."""
        return 2 * len(self.tokens) < min(self.tokens.shape)

    @property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """X = M⁻ᵀg̃, (d_out, tokens), and Y = L⁻ᵀã, (d_in, tokens), of few tokens."""
        return self.output.back, self.input.back

    @property
    def kernel(self) -> torch.Tensor:
        """K, (tokens, tokens), of few tokens."""
        return self.output.gram * self.input.gram

    def felt(self, keep: Keep) -> Felt | None:
        """Return what curvature feels of D = X diag(s) Yᵀ, among the tokens; None where they are many.

        With G = M Mᵀ − δI, XᵀGX is g̃ᵀg̃ − δ XᵀX, and so on the other side.
        """
        from liborth_cli.methods.selection import Felt, Filter

        if self.felt_as is None or not self.few:
            return None
        assert isinstance(keep, Filter)
        one, shares = self.felt_as, self._dual(keep.strength)
        sides = self.output, self.input
        white, plain = [side.gram for side in sides], [side.plain for side in sides]
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


@dataclass
class FewTokens:
    """What single tokens feel, where they are few: enough to take out any strength of it.

    Attributes:
        coefficients: y, (tokens,), float64.
        kernel: K, (tokens, tokens), float64.
        outputs: M⁻ᵀg̃, (d_out, tokens), float64.
        inputs: L⁻ᵀã, (d_in, tokens), float64.
        facts: how many tokens there are.
        in_place: the update is left as it is.
    """

    coefficients: torch.Tensor
    kernel: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor
    facts: Facts = field(default_factory=dict)
    in_place: bool = False

    def rebuild(self, keep: Keep) -> ThinProduct:
        """Return what a filter λ takes, (d_out, d_in), in two factors."""
        from liborth_cli.linalg.regularised import dual
        from liborth_cli.linalg.rows import ThinProduct
        from liborth_cli.methods.selection import Filter

        assert isinstance(keep, Filter)
        alpha = dual(self.kernel.clone(), self.coefficients, keep.strength)
        return ThinProduct(self.outputs * alpha, self.inputs)


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
        """Return what the forget tokens feel of the update."""
        import torch

        from liborth_cli.linalg.khatri_rao import KhatriRao
        from liborth_cli.linalg.regularised import is_factorised
        from liborth_cli.methods.kronecker import SummedFactors
        from liborth_cli.methods.whitening import Whitening, mean_scale

        retain, u = layer.need("retain"), layer.update
        sets: list[tuple[TokenGradients, float]] = layer.weighed("tokens")
        count = sum(len(one.inputs) for one, _ in sets)
        exact = is_factorised(count, (u.shape[0], u.shape[1])) or 2 * count < min(u.shape)
        dtype = torch.float64 if exact else torch.float32

        def side(covariance: torch.Tensor, x: Sequence[torch.Tensor]) -> WhiteTokens:
            metric = Whitening.of(covariance, self.damping, layer.name, layer.tolerance)
            return WhiteTokens(metric, _whitened(metric, x, dtype))

        key = layer.input_key and ("tokenwise", layer.input_key)
        input_side = lambda: side(retain.input_covariance, [one.inputs for one, _ in sets])  # noqa: E731
        right: WhiteTokens = layer.memo.get(key, input_side, lambda made: made.nbytes)
        left = side(retain.gradient_covariance, [one.gradients for one, _ in sets])
        g = left.rows
        factors = _weigh(g, sets)
        tokens = KhatriRao(g, right.rows)
        kappa = tokens.diagonal()
        felt = float(kappa.sum())
        # κ is 1 on average over all directions a matrix has, so that λ means the same in every layer.
        scale = (u.numel() * sum(share for _, share in sets) / felt) ** 0.5 if felt > 0 else 0.0
        g *= scale
        factors *= scale
        if 2 * count < min(u.shape):
            y = _along([one for one, _ in sets], u if layer.tolerance > 0 else u.double()) * factors
        else:
            y = tokens.along(right.metric.colour(left.metric.colour(u.double()).T).T).double()
        origin = None
        if scale > 0 and not isinstance(retain, SummedFactors):
            whole = mean_scale(retain.input_covariance) * mean_scale(retain.gradient_covariance)
            counts, weights = [len(one.inputs) for one, _ in sets], [one.weight for one, _ in sets]
            origin = Origin(factors, counts=counts, weights=weights, damping=self.damping, scale=whole)
        return TokenBasis(
            y,
            ratios=kappa * scale**2,
            tokens=tokens,
            output=left,
            input=right,
            dtype=u.dtype,
            felt_as=origin,
            facts={"tokens": count},
            # One text at several points of the path is as many sets of equal length; others are no worse for it.
            parts=len(sets) if len({len(one.inputs) for one, _ in sets}) == 1 else 1,
        )

    def dose_bytes(self, shape: tuple[int, int], full: Sequence[int], tokens: float) -> int:
        """Return what the tokens take on both sides, with their kernel where they are few, with the metric where not."""
        count = int(tokens)
        rest = count * count if 2 * count < min(shape) else sum(width * width for width in full)
        return 8 * (count * sum(shape) + rest)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return K_tt, (tokens,)."""
        assert isinstance(basis, TokenBasis)
        return basis.ratios


def _whitened(metric: Whitening, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return L⁻¹x of all rows x, (tokens, d), computed in the precision of the metric and rounded to a dtype."""
    from liborth_cli.linalg.khatri_rao import PIECE

    pieces = (piece for part in parts for piece in part.split(PIECE))
    out, start = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1], dtype=dtype), 0
    for piece in pieces:
        out[start : start + len(piece)] = metric.whiten_rows(piece)
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
