"""Factors seen from another side: a matrix used the other way round, and the bias beside a matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from liborth_cli.curvature.layer import DiagonalFisher, KroneckerFactors


def flipped(factors: KroneckerFactors) -> KroneckerFactors:
    """Return the factors of Wᵀ: a tied head is the embedding the other way round."""
    return replace(
        factors,
        transposed=not factors.transposed,
        input_covariance=factors.gradient_covariance,
        gradient_covariance=factors.input_covariance,
        input_moment=factors.gradient_moment,
        gradient_moment=factors.input_moment,
        second_moments=None if factors.second_moments is None else factors.second_moments.T,
        cached_basis=None,
    )


def of_bias(factors: KroneckerFactors) -> KroneckerFactors:
    """Return the factors of the bias that is added to a matrix's output, as a column (d_out, 1).

    Its input is 1 and its gradient is g: A = 1, and the curvature is G itself, not an approximation.
    """
    g = factors.gradient_covariance
    total = g.sum() if g.dim() == 1 else g.diagonal(dim1=-2, dim2=-1).sum()
    return replace(
        factors,
        transposed=False,
        input_covariance=torch.ones(1, dtype=g.dtype),
        input_moment=total.reshape(1),
        gradient_moment=g,
        second_moments=None,
        cached_basis=None,
    )


def diagonal_of_bias(factors: KroneckerFactors) -> DiagonalFisher:
    """Return the diagonal Fisher of that bias, (d_out, 1): the diagonal of G."""
    g = factors.gradient_covariance
    values = g if g.dim() == 1 else g.diagonal(dim1=-2, dim2=-1).reshape(-1)
    return DiagonalFisher(factors.name, factors.tokens, values[:, None])
