"""What single tokens feel of a weight matrix: read from a factor set made with `--per-token`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from liborth_kernels.covariance import add_covariance, symmetric

from liborth_cli.curvature.collect import TOKEN_GRADIENTS, TOKEN_INPUTS, TOKEN_WEIGHTS, A
from liborth_cli.errors import BadInput

if TYPE_CHECKING:
    from liborth_cli.curvature.factors import FactorSet


@dataclass(frozen=True)
class TokenGradients:
    """Inputs and output gradients of one matrix: the weight gradient of token t is g_t a_tᵀ.

    Attributes:
        inputs: a, (tokens, d_in).
        gradients: g of the summed loss, times the root of the token's weight, (tokens, d_out).
        weight: of all tokens together.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    weight: float = 1.0

    def flipped(self) -> TokenGradients:
        """Return what is felt of Wᵀ."""
        return replace(self, inputs=self.gradients, gradients=self.inputs)

    def of_bias(self) -> TokenGradients:
        """Return what is felt of the bias added to the matrix's output, a column (d_out, 1): its input is 1."""
        return replace(self, inputs=self.inputs.new_ones(len(self.inputs), 1))


def count_tokens(found: FactorSet) -> int:
    """Return how many tokens were kept one by one for the matrix that saw most of them."""
    kept = (found.shape(TOKEN_GRADIENTS + name)[0] for name in found.names if found.holds("tokens", name))
    return max(kept, default=0)


def read_tokens(found: FactorSet, name: str) -> TokenGradients:
    """Read one layer's tokens.

    Args:
        found: the set; `found.holds("tokens", name)` must be true.
        name: of the layer.

    Raises:
        BadInput: when its inputs and gradients are not of the same tokens.
    """
    record = found.manifest["layers"][name]
    inputs, gradients = found.read(TOKEN_INPUTS + record["input"]), found.read(TOKEN_GRADIENTS + name)
    tokens = TokenGradients(inputs, gradients, record["tokens"])
    if len(tokens.inputs) != len(tokens.gradients):
        raise BadInput(f"{found.path}: {name!r} has {len(tokens.inputs)} inputs and {len(tokens.gradients)} gradients; damaged")
    return tokens


def covariance(found: FactorSet, kind: str, name: str) -> torch.Tensor:
    """Form A or G of a layer from its tokens, (d, d).

    Args:
        found: the set.
        kind: `collect.A` or `collect.G`.
        name: of the layer; for A, of the one whose name its inputs go under.
    """
    if kind == A:
        rows = found.read(TOKEN_INPUTS + name) * found.read(TOKEN_WEIGHTS + name).sqrt()[:, None]
    else:
        rows = found.read(TOKEN_GRADIENTS + name)
    total = torch.zeros(rows.shape[1], rows.shape[1])
    add_covariance(total, rows, 1.0 / found.manifest["layers"][name]["tokens"])
    symmetric(total)
    return total
