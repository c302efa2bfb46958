"""The skill part of a matrix, from the rank that divided it to the rank that writes its file."""

from __future__ import annotations

from dataclasses import asdict, replace

from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.ranks import World
from liborth_cli.split.divide import Skill
from liborth_cli.split.matrix import MatrixReport, Prediction

SKILLS = 3
"""Tag of what is sent."""


def send_skill(world: World, skill: Skill, to: int) -> None:
    """Send what became of a matrix: the part, whole or as two thin factors, and the report without its tensors."""
    part, report = skill
    tensors = [] if part is None else [part.left, part.right] if isinstance(part, ThinProduct) else [part]
    plain = asdict(replace(report, leading=None, felt=None)) if report is not None else None
    world.tensors.send_value((plain, len(tensors)), to, SKILLS)
    for tensor in tensors:
        world.tensors.send(tensor, to, SKILLS)


def receive_skill(world: World, source: int) -> Skill:
    """Wait for what `send_skill` sends; the part comes in host memory."""
    plain, count = world.tensors.receive_value(source, SKILLS)
    tensors = [world.tensors.receive(source, SKILLS) for _ in range(count)]
    report = MatrixReport(**{**plain, "prediction": _prediction(plain["prediction"])}) if plain is not None else None
    return (ThinProduct(*tensors) if count > 1 else tensors[0] if tensors else None), report


def _prediction(plain: dict[str, float] | None) -> Prediction | None:
    return Prediction(**plain) if plain is not None else None  # type: ignore[arg-type]
