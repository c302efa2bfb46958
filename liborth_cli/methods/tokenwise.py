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

On the input side alone, with keys as tokens, this is the closed form of MEMIT (arXiv 2210.07229); the metric on both sides
is K-FAC's (arXiv 1503.05671). Nothing of size d² is diagonalised: a Cholesky factorisation a side, and an eigenproblem of
the size of the tokens. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method, setting

if TYPE_CHECKING:
    import torch

    from liborth_cli.curvature.layer import TokenGradients
    from liborth_cli.linalg.rows import ThinProduct
    from liborth_cli.methods.selection import Basis, Facts, Keep

NEGLIGIBLE = 1e-13
"""Directions below this share of the largest κ are rounding."""


@dataclass
class TokenBasis:
    """U's coordinates along the directions that forget tokens feel; the rest of U is not represented.

    Attributes:
        coefficients: z, (k,), float64.
        ratios: κ, (k,): forget curvature per unit of retain curvature.
        mixing: Q/√κ, (tokens, k): what each direction takes of each token.
        outputs: M⁻ᵀg̃, (d_out, tokens).
        inputs: L⁻ᵀã, (d_in, tokens).
        dtype: of the update, and of what is rebuilt.
        facts: how many tokens and directions there are.
        in_place: the update is left as it is.
    """

    coefficients: torch.Tensor
    ratios: torch.Tensor
    mixing: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor
    dtype: torch.dtype
    facts: Facts = field(default_factory=dict)
    in_place: bool = False

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return Σ_k keep_k z_k E_k, (d_out, d_in), in the update's dtype, or in two factors when there are few tokens."""
        from liborth_cli.linalg.rows import ThinProduct
        from liborth_cli.methods.selection import kept

        shares = self.mixing @ kept(self.coefficients, keep)
        product = ThinProduct(self.outputs * shares, self.inputs)
        return product if 2 * len(shares) < min(len(self.outputs), len(self.inputs)) else product.whole(self.dtype)


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

        from liborth_cli.methods.kronecker import Whitening

        retain, u = layer.need("retain"), layer.update.double()
        sets = layer.weighed("tokens")
        inputs, gradients = _together(sets)

        def side(covariance: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = Whitening.of(covariance, self.damping, layer.name)
            white = found.whiten(x.T)
            return white, found.unwhiten(white)

        key = layer.input_key and ("tokenwise", layer.input_key)
        a, right = layer.memo.get(key, lambda: side(retain.input_covariance, inputs), lambda made: sum(t.nbytes for t in made))
        g, left = side(retain.gradient_covariance, gradients)
        kernel = (g.T @ g).mul_(a.T @ a)
        felt = kernel.trace().item()
        # κ is 1 on average over all directions a matrix has, so that λ means the same in every layer.
        scale = u.numel() * sum(share for _, share in sets) / felt if felt > 0 else 0.0
        kernel *= scale
        kappa, q = torch.linalg.eigh(kernel)
        real = kappa > NEGLIGIBLE * kappa[-1].clamp(min=0)
        kappa, q = kappa[real].flip(0), q[:, real].flip(1)
        y = ((gradients @ u) * inputs).sum(1)
        root = scale**0.5 / kappa.sqrt()
        facts: Facts = {"tokens": len(inputs), "directions": len(kappa)}
        return TokenBasis(
            (q.T @ y) * root, ratios=kappa, mixing=q * root, outputs=left, inputs=right, dtype=layer.update.dtype, facts=facts
        )

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return κ, (k,)."""
        assert isinstance(basis, TokenBasis)
        return basis.ratios


def _together(sets: Sequence[tuple[TokenGradients, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the tokens of all sets together, every set as heavy as its share whatever its scale.

    Returns:
        a (tokens, d_in) and √w·g (tokens, d_out), float64.
    """
    import torch

    inputs, gradients = [], []
    for one, share in sets:
        a, g = one.inputs.double(), one.gradients.double()
        felt = float((a.square().sum(1) * g.square().sum(1)).sum())
        inputs.append(a)
        gradients.append(g * (share / felt) ** 0.5 if felt > 0 else g)
    return torch.cat(inputs), torch.cat(gradients)
