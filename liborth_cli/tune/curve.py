"""Loss curves: kept while training, saved as JSON and CSV, and drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from liborth_cli.chart import Plot, Series, standalone


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
        made = {"training.json": document, "training.csv": self._csv(), "training.svg": standalone(self._chart())}
        return {name: text.encode() for name, text in made.items()}

    def _csv(self) -> str:
        looks = {int(e["step"]): e["loss"] for e in self.evaluations if "loss" in e}
        lines = ["step,loss,rate,evaluation"]
        lines += [f"0,,,{looks[0]!r}"] if 0 in looks else []
        for entry in self.steps:
            step = int(entry["step"]) + 1
            lines.append(f"{step},{entry['loss']!r},{entry['rate']!r},{looks.get(step, '')!r}".replace("''", ""))
        return "\n".join(lines) + "\n"

    def _chart(self) -> Plot:
        train = Series("training", *zip(*((e["step"] + 1, e["loss"]) for e in self.steps), strict=True)) if self.steps else None
        looks = [(e["step"], e["loss"]) for e in self.evaluations if "loss" in e]
        held = Series("held out", *zip(*looks, strict=True)) if looks else None
        series = tuple(one for one in (train, held) if one is not None)
        ends = "; ".join(f"{one.label} from {one.y[0]:.3f} to {one.y[-1]:.3f}" for one in series)
        return Plot("Loss while training", f"Loss in nats a token: {ends or 'nothing was measured'}.", "step",
                    "loss, nats a token", series)  # fmt: skip
