"""What a factor set's manifest says of the model and of its matrices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from liborth_cli.curvature.selection import Target


def describe_layers(targets: Sequence[Target], shared: Mapping[str, str], tokens: Mapping[str, float]) -> dict[str, Any]:
    """Say what each matrix is that was seen.

    Args:
        targets: the chosen matrices, in the order of the model.
        shared: layer → the layer under whose name its A is kept; one that is missing was never seen.
        tokens: layer → how many tokens it saw, weighted.
    """
    return {
        target.name: {
            "tensor": target.tensor,
            "matrix": target.matrix,
            "d_out": target.d_out,
            "d_in": target.d_in,
            "transposed": target.transposed,
            "kind": target.kind,
            "input": shared[target.name],
            "tokens": tokens[target.name],
            "position": position,
        }
        for position, target in enumerate(targets)
        if target.name in shared
    }


def model_hash(inputs: dict[str, Any], at: float) -> str:
    """Hash which weights the factors belong to: the files of the model, and of the reference when the point is not at 1."""
    seen = {
        side: sorted(f["sha256"] for f in i["files"].values()) for side, i in inputs.items() if side == "model" or at != 1.0
    }
    return hashlib.sha256(json.dumps([seen, at], sort_keys=True).encode()).hexdigest()
