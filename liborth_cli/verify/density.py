"""Spectral densities of one or several spaces, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from liborth_cli.linalg.lanczos import Quadrature, merged
from liborth_cli.linalg.noise import covariance_edge
from liborth_cli.verify.result import Plot, Series

FLOOR = 1e-6
"""Eigenvalues below this share of the largest are noise of float32 arithmetic, and are drawn as 0."""


@dataclass
class Spectra:
    """What was found, by the name of the space.

    Attributes:
        runs: one quadrature a probe.
        sizes: dimensions.
        left_out: why there is no spectrum of all weights, or nothing.
        tokens: how many carried loss.
    """

    runs: dict[str, list[Quadrature]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    tokens: int = 0

    @property
    def edge(self) -> float:
        """Where the bulk over all weights would end if it were noise; infinite where that was not measured."""
        if "all weights" not in self.runs:
            return float("inf")
        nodes, weights = merged(self.runs["all weights"])
        return covariance_edge(float(weights @ nodes), self.sizes["all weights"], self.tokens)


def density_plot(spectra: Spectra, matrix: str) -> Plot:
    """Draw each density over the logarithm of the eigenvalue, smoothed by a Gaussian of 0.15 decades.

    Args:
        spectra: what was found.
        matrix: "ggn" or "hessian".
    """
    top = max(float(run.nodes[-1]) for runs in spectra.runs.values() for run in runs)
    floor = max(top, 1e-30) * FLOOR
    grid = np.logspace(np.log10(floor), np.log10(max(top, floor)) + 0.5, 160)
    series, words = [], []
    for name, runs in spectra.runs.items():
        nodes, weights = merged(runs)
        curve = _smooth(nodes, weights, grid, floor)
        series.append(Series(name, tuple(grid.tolist()), tuple(curve.tolist())))
        words.append(f"{name}: {weights[nodes > floor].sum():.0%} of directions above {floor:.1g}, largest {nodes[-1]:.3g}")
        if nodes[0] < -floor:
            negative = _smooth(-nodes, weights, grid, floor)
            series.append(Series(f"{name}, negative", tuple(grid.tolist()), tuple(negative.tolist())))
    lines = {"edge of the bulk": spectra.edge}
    title = "Spectral density of the " + ("Hessian" if matrix == "hessian" else "Gauss–Newton matrix")
    lines = {name: at for name, at in lines.items() if floor < at < float("inf")}
    return Plot(
        title,
        "; ".join(words) + ".",
        "eigenvalue (absolute)",
        "share of directions a decade",
        tuple(series),
        True,
        False,
        lines,
    )


def _smooth(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, floor: float, width: float = 0.15) -> np.ndarray:
    high = nodes > floor
    apart = np.log10(grid)[:, None] - np.log10(nodes[high])[None]
    return np.exp(-0.5 * (apart / width) ** 2) @ weights[high] / (width * np.sqrt(2 * np.pi))
