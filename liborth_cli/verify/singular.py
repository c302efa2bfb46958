"""Singular spectra of the skill and of the memory, matrix by matrix: a table and figures for `--spectrum`.

The edge is that of the Marchenko–Pastur law at the median singular value, so it says where a stream stops looking like noise; a
stream of low rank has a median of 0, and no edge.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from liborth_cli.verify.result import Plot, Result, Series, Table

if TYPE_CHECKING:
    from liborth_cli.measure.directions import Decomposed

SHOWN = 4
"""Matrices whose singular values get a figure of their own: those that fine-tuning changed most."""


def singular_figures(streams: dict[str, dict[str, Decomposed]], result: Result) -> str:
    """Add a table of all matrices and figures of the most changed ones.

    Args:
        streams: "skill" and "memory" → parameter → its spectrum.
        result: added to.

    Returns:
        A sentence for the verdict.
    """
    import torch

    from liborth_cli.linalg.noise import effective_rank

    rows, above, total, energies = [], dict.fromkeys(streams, 0), dict.fromkeys(streams, 0), dict[str, float]()
    for name in dict.fromkeys(name for parts in streams.values() for name in parts):
        cells: list[str | float | None] = [name]
        for stream, parts in streams.items():
            part = parts.get(name)
            if part is None:
                cells += [0.0, None, None, None]
                continue
            energy = float((part.values**2).sum())
            energies[name] = energies.get(name, 0.0) + energy
            edges = [_edge(part, matrix) for matrix in range(len(part.values))]
            count = sum(int((part.values[m] > edge).sum()) for m, edge in enumerate(edges) if edge is not None)
            above[stream] += count
            total[stream] += part.values.size
            rank = sum(effective_rank(torch.from_numpy(values)) for values in part.values) / len(part.values)
            known = [edge for edge in edges if edge is not None]
            cells += [math.sqrt(energy), sum(known) / len(known) if known else None, float(count), rank]
        rows.append(tuple(cells))
    columns = ["matrix"]
    for stream in streams:
        columns += [f">{stream}: norm", ">noise edge", ">above it", ">effective rank"]
    result.figures.append(Table("Singular spectra of both streams", tuple(columns), tuple(rows)))
    for name in sorted(energies, key=lambda n: -energies[n])[:SHOWN]:
        result.figures.append(_plot(name, streams))
    words = " and ".join(f"{above[s]} of {total[s]} in the {s}" for s in streams)
    return f"Singular values above the noise edge: {words}."


def _plot(name: str, streams: dict[str, dict[str, Decomposed]]) -> Plot:
    series, levels, words = [], {}, []
    for stream, parts in streams.items():
        if name not in parts:
            continue
        part = parts[name]
        matrix = int((part.values**2).sum(1).argmax())
        values = part.values[matrix][part.values[matrix] > 0]
        series.append(Series(stream, tuple(float(i) for i in range(1, len(values) + 1)), tuple(values.tolist())))
        edge = _edge(part, matrix)
        if edge is not None:
            levels[f"{stream}: noise edge"] = edge
            words.append(f"{stream}: {int((values > edge).sum())} of {len(values)} above the noise edge at {edge:.3g}")
        else:
            words.append(f"{stream}: rank {len(values)}, so no noise edge")
    return Plot(
        f"Singular values of {name}",
        alt="; ".join(words) + ".",
        x_label="index",
        y_label="singular value",
        series=tuple(series),
        x_log=False,
        y_log=True,
        lines={},
        levels=levels,
    )


def _edge(part: Decomposed, matrix: int) -> float | None:
    import torch

    from liborth_cli.linalg.noise import bulk_edge

    values = torch.from_numpy(part.values[matrix])
    edge = bulk_edge(values, (part.left.shape[1], part.right.shape[1]))
    return edge if edge > 1e-6 * float(values[0]) else None
