"""What `inspect` says of a factor set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from liborth_cli.console import JsonObject
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.layer import eigenbasis, participation_ratio, trace

Section = tuple[str, Sequence[str], Sequence[Sequence[object]]]
SMALL = 1e-7
"""Eigenvalues below this share of the largest are rounding of float32 sums: the condition number stops there."""


def describe_factors(path: Path, every: bool) -> tuple[JsonObject, list[Section]]:
    """Describe a factor set: what it was made from, and the shape of every layer's curvature.

    Args:
        path: its directory.
        every: also list what was left out.

    Returns:
        A JSON document and the same as tables: (title, columns, rows).

    Raises:
        BadInput: when it is damaged.
    """
    with FactorSet.open(path) as factors:
        made = factors.manifest
        rows, facts = [], {}
        inputs: dict[str, dict[str, float]] = {}
        for name in factors.names:
            layer = factors.layer(name)
            owner = layer.shares_input_with[0]
            cached = layer.cached_basis
            if owner not in inputs:
                inputs[owner] = spectrum(layer.input_covariance, cached.input_values if cached else None)
            a, g = inputs[owner], spectrum(layer.gradient_covariance, cached.gradient_values if cached else None)
            facts[name] = {"tokens": layer.tokens, "A": a, "G": g}
            shape = f"{factors.layers[name].d_out}×{factors.layers[name].d_in}"
            numbers = (f"{side[key]:.3g}" for side in (a, g) for key in ("trace", "participation", "condition"))
            rows.append((name, shape, f"{layer.tokens:,.0f}", *numbers))
    title = f"factor set: {len(rows)} matrices, {factors.tokens:,.0f} tokens, {factors.fisher} Fisher at t = {factors.point:g}"
    columns = ("matrix", "shape", ">tokens", ">tr A", ">particip.", ">cond.", ">tr G", ">particip.", ">cond.")
    sections: list[Section] = [(title, columns, rows)]
    parameters = [
        (key, value)
        for key, value in sorted(made.parameters.model_dump(exclude_unset=True).items())
        if value not in (None, False, [])
    ]
    sections.append((f"made by liborth {made.liborth} curvature", ["parameter", "value"], parameters))
    if every:
        sections.append(("left out", ["tensor", "because"], sorted(made.left_out.items())))
    return {"kind": "factors", "manifest": made.document, "layers": facts}, sections


def spectrum(factor: torch.Tensor, values: torch.Tensor | None = None) -> dict[str, float]:
    """Summarise a covariance.

    Args:
        factor: matrix, diagonal, or blocks.
        values: its eigenvalues when they are known.

    Returns:
        trace; participation (Σλ)²/Σλ²; condition, the largest over the smallest eigenvalue above rounding; rank, how many
        are above it.
    """
    values = (eigenbasis(factor)[0] if values is None else values).flatten()
    top = float(values.max()) if values.numel() else 0.0
    real = values[values > SMALL * top]
    condition = top / float(real.min()) if len(real) else 1.0
    return {"trace": trace(factor), "participation": participation_ratio(factor), "condition": condition, "rank": len(real)}
