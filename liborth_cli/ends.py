"""Retain factors at both ends of a path: between them the geodesic replaces the straight line, matrix by matrix.

An experiment (docs/origins.md). What it needs are two factor sets of the same texts, one measured at each end.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.errors import UsageError
from liborth_cli.methods.geodesic import Chart
from liborth_cli.methods.memo import Memo


class Ends:
    """Two factor sets, and the matrices that both cover.

    Tables and heads that are used twice, and experts, are left on the straight line: they have no one pair of factors.

    Attributes:
        start: measured where the path begins.
        end: measured where it ends.
        layers: stored tensor → the layer's name in both sets.
    """

    def __init__(self, start: FactorSet, end: FactorSet, *, keep: int = 0) -> None:
        """Hold the two against each other.

        Args:
            start: measured where the path begins.
            end: measured where it ends.
            keep: bytes of coordinates to keep, for matrices that are asked for at several t.

        Raises:
            UsageError: when they have no matrix in common.
        """
        self.start, self.end, self._charts = start, end, Memo(keep)
        uses = Counter(layer.tensor for layer in start.layers.values())
        self.layers = {
            layer.tensor: name
            for name, layer in start.layers.items()
            if uses[layer.tensor] == 1 and layer.matrix is None and self._alike(name)
        }
        if not self.layers:
            raise UsageError(f"{end.path}: has factors of none of the matrices that {start.path} has")

    def _alike(self, name: str) -> bool:
        one, other = self.start.layers[name], self.end.layers.get(name)
        shapes = [(layer.tensor, layer.d_out, layer.d_in, layer.transposed) for layer in (one, other) if layer is not None]
        return len(shapes) == 2 and shapes[0] == shapes[1] and all(s.holds("factors", name) for s in (self.start, self.end))

    def at(self, tensor: str, start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
        """Return one matrix on the geodesic.

        Args:
            tensor: its stored name, one of `layers`.
            start: at t = 0, as stored, any floating dtype.
            end: at t = 1.
            t: in [0, 1].

        Returns:
            The matrix at t, as stored, float64.

        Raises:
            BadInput: when a factor is not positive.
        """
        name, base = self.layers[tensor], start.double()
        difference = end.double() - base
        turned = self.start.layers[name].transposed
        chart = self._charts.get(name, lambda: Chart.of(self.start.layer(name), self.end.layer(name)), lambda made: made.nbytes)
        moved = chart.travelled(difference.T if turned else difference, t)
        self._charts.release()
        return base + (moved.T if turned else moved)


def open_ends(stack: ExitStack, start: Path, end: Path) -> Ends:
    """Open two stored factor sets.

    Args:
        stack: closes them.
        start: directory of the set that was measured where the path begins.
        end: where it ends.

    Raises:
        UsageError: when they are of one model, or have no matrix in common.
        BadInput: when one is no factor set, or damaged.
    """
    sets = [stack.enter_context(FactorSet.open(one)) for one in (start, end)]
    if sets[0].manifest.model_sha256 == sets[1].manifest.model_sha256 and sets[0].point == sets[1].point:
        raise UsageError(
            f"{end}: measured at the same model as {start}; with the metric of one point the geodesic is the straight line"
        )
    return Ends(*sets)
