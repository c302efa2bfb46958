"""Retain factors that a check measures for itself, at any of the states, on rows that it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    from liborth_cli.stream.texts import Row


def estimate(subject: Subject, state: str, rows: Sequence[Row], out: Path) -> Path:
    """Measure Kronecker factors of some rows at the weights of a state, with labels drawn from the model.

    Args:
        subject: has the states.
        state: "reference", "general" or "finetuned".
        rows: that are read.
        out: directory to create.

    Returns:
        `out`.
    """
    from liborth_cli.console import SILENT
    from liborth_cli.curvature.estimate import Estimator
    from liborth_cli.curvature.plan import CurvatureOptions, Resources
    from liborth_cli.machine import available_bytes
    from liborth_cli.ranks import ALONE
    from liborth_cli.stream.weights import Point

    point = subject.states.weights[state]
    assert isinstance(point, Point)
    model = subject.states.model(state)
    resources = Resources(available_bytes(), None, "resident" if model.resident else "auto")
    alone = replace(subject.run, world=ALONE)  # every rank measures them for itself
    Estimator(point, model, list(rows), CurvatureOptions(seed=subject.seed), resources, alone).write(
        out, [], (subject.source, None), SILENT
    )
    return out
