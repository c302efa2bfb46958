"""Loss curves: kept while training, saved as JSON and CSV, and drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 720, 320, 48


@dataclass
class Curve:
    """What was measured along the way. A step's number counts the steps done before it was measured.

    Attributes:
        steps: of every training step: step, mean loss a token in nats, learning rate, and the penalties by name.
        evaluations: of every look at the held-out rows: step, loss, and what the method measures of itself.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Curve:
        """Take up a curve that `to_json` gave."""
        return cls(document["steps"], document["evaluations"])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)

    def files(self) -> dict[str, bytes]:
        """Render training.json, training.csv and training.svg."""
        document = json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n"
        return {"training.json": document.encode(), "training.csv": self._csv().encode(), "training.svg": self._svg().encode()}

    def _csv(self) -> str:
        looks = {int(e["step"]): e["loss"] for e in self.evaluations if "loss" in e}
        lines = ["step,loss,rate,evaluation"]
        lines += [f"0,,,{looks[0]!r}"] if 0 in looks else []
        for entry in self.steps:
            step = int(entry["step"]) + 1
            lines.append(f"{step},{entry['loss']!r},{entry['rate']!r},{looks.get(step, '')!r}".replace("''", ""))
        return "\n".join(lines) + "\n"

    def _svg(self) -> str:
        train = [(e["step"] + 1, e["loss"]) for e in self.steps]
        held = [(e["step"], e["loss"]) for e in self.evaluations if "loss" in e]
        points = [*train, *held] or [(0.0, 0.0)]
        last, top = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
        left, bottom = MARGIN, HEIGHT - MARGIN

        def path(some: list[tuple[float, float]], colour: str) -> str:
            spots = " ".join(
                f"{left + x / last * (WIDTH - 2 * MARGIN):.1f},{bottom - y / top * (HEIGHT - 2 * MARGIN):.1f}" for x, y in some
            )
            return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{spots}"/>' if some else ""

        labels = [
            (left, HEIGHT - 16, "0"), (WIDTH - MARGIN - 20, HEIGHT - 16, f"{last:.0f}"), (8, MARGIN, f"{top:.2f}"),
            (8, bottom, "0"), (WIDTH // 2 - 20, HEIGHT - 16, "step"), (left, 24, "loss, nats a token: training (blue)"),
            (left + 240, 24, "held out (orange)" if held else ""),
        ]  # fmt: skip
        words = "".join(f'<text x="{x}" y="{y}">{escape(text)}</text>' for x, y, text in labels)
        axes = f'<path d="M{left} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{axes}'
            f"{path(train, '#1f77b4')}{path(held, '#ff7f0e')}{words}</svg>\n"
        )
