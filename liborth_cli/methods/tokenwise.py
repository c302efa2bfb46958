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
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method, setting

if TYPE_CHECKING:
    import torch

    from liborth_cli.curvature.layer import TokenGradients
    from liborth_cli.linalg.khatri_rao import KhatriRao
    from liborth_cli.linalg.rows import ThinProduct
    from liborth_cli.methods.kronecker import Whitening
    from liborth_cli.methods.selection import Basis, Facts, Keep

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
    strongest: float = math.inf
    facts: Facts = field(default_factory=dict)
    in_place: bool = False

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return Σ_k keep_k z_k E_k, (d_out, d_in), in the update's dtype, or in two factors when there are few tokens."""
        from liborth_cli.linalg.rows import ThinProduct
        from liborth_cli.methods.selection import kept

        shares = self.mixing @ kept(self.coefficients, keep)
        if 2 * len(self.tokens) < min(self.tokens.shape):
            left, right = (side.double().T for side in (self.tokens.left, self.tokens.right))
            return ThinProduct(self.output.unwhiten(left * shares), self.input.unwhiten(right.contiguous()))
        white = self.tokens.combine(shares).double()
        return self.input.unwhiten(self.output.unwhiten(white).T).T.to(self.dtype)


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
        from liborth_cli.methods.kronecker import Whitening

        retain, u = layer.need("retain"), layer.update
        sets: list[tuple[TokenGradients, float]] = layer.weighed("tokens")
        count = sum(len(one.inputs) for one, _ in sets)
        dtype = torch.float64 if count <= DENSE_UP_TO else torch.float32

        def side(covariance: torch.Tensor, x: Sequence[torch.Tensor]) -> tuple[Whitening, torch.Tensor]:
            found = Whitening.of(covariance, self.damping, layer.name)
            return found, _whitened(found, x, dtype)

        key = layer.input_key and ("tokenwise", layer.input_key)
        input_side = lambda: side(retain.input_covariance, [one.inputs for one, _ in sets])  # noqa: E731
        right, a = layer.memo.get(key, input_side, lambda made: made[0].lower.nbytes + made[1].nbytes)
        left, g = side(retain.gradient_covariance, [one.gradients for one, _ in sets])
        _weigh(g, sets)
        tokens = KhatriRao(g, a)
        felt = float(tokens.diagonal().sum())
        # κ is 1 on average over all directions a matrix has, so that λ means the same in every layer.
        g *= (u.numel() * sum(share for _, share in sets) / felt) ** 0.5 if felt > 0 else 0.0
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
        root = kappa.rsqrt()
        return TokenBasis(
            (q.T @ y) * root,
            ratios=kappa,
            mixing=q * root,
            tokens=tokens,
            output=left,
            input=right,
            dtype=u.dtype,
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


def _weigh(gradients: torch.Tensor, sets: Sequence[tuple[TokenGradients, float]]) -> None:
    """Scale the gradients of every set, one set after the other (tokens, d_out), to count its share whatever its scale."""
    from liborth_cli.linalg.khatri_rao import KhatriRao

    start = 0
    for one, share in sets:
        felt = float(KhatriRao(one.gradients, one.inputs).diagonal().sum())
        gradients[start : start + len(one.inputs)] *= (share / felt) ** 0.5 if felt > 0 else 1.0
        start += len(one.inputs)


def _diagonalised(tokens: KhatriRao) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of K that are no rounding, descending, (k,), and their vectors, (tokens, k)."""
    import torch

    kappa, q = torch.linalg.eigh(tokens.kernel())
    real = kappa > NEGLIGIBLE * kappa[-1].clamp(min=0)
    return kappa[real].flip(0), q[:, real].flip(1)
