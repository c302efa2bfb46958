"""Places the texts inside a plot so that they cover neither each other nor the points."""

from __future__ import annotations

from dataclasses import dataclass, field

# Drawing units of the larger type that narrow screens and print get, so that what is free here is free there too.
CHARACTER = 9.2
LINE = 18.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Place:
    """Where a text could stand.

    Attributes:
        x: the anchor.
        y: the baseline.
        anchor: "start", "middle" or "end": which part of the text is at x.
    """

    x: float
    y: float
    anchor: str = "start"

    def box(self, text: str) -> Box:
        """Return left, top, right and bottom of the text."""
        width = len(text) * CHARACTER
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - 0.75 * LINE, left + width, self.y + 0.25 * LINE


@dataclass
class Placer:
    """What is taken already.

    Attributes:
        frame: nothing may stand outside of it.
        texts: boxes of the texts placed so far.
        points: boxes of the marks.
    """

    frame: Box
    texts: list[Box] = field(default_factory=list)
    points: list[Box] = field(default_factory=list)

    def add_point(self, x: float, y: float, radius: float = 4.0) -> None:
        """Note a mark that texts should not cover."""
        self.points.append((x - radius, y - radius, x + radius, y + radius))

    def best(self, text: str, places: list[Place]) -> Place:
        """Take the place with the least overlap: for texts that must be shown."""
        chosen = min(places, key=lambda place: self._cost(place.box(text)))
        self.texts.append(chosen.box(text))
        return chosen

    def free(self, text: str, places: list[Place]) -> Place | None:
        """Take the first place that is nearly free, or None: for texts that the reader can also get by pointing."""
        for allowed in (0.0, 40.0):
            for place in places:
                box = place.box(text)
                if self._cost(box) <= allowed:
                    self.texts.append(box)
                    return place
        return None

    def _cost(self, box: Box) -> float:
        left, top, right, bottom = self.frame
        outside = max(0.0, left - box[0]) + max(0.0, box[2] - right) + max(0.0, top - box[1]) + max(0.0, box[3] - bottom)
        texts = sum(_overlap(box, other) for other in self.texts)
        return 100 * outside + 10 * texts + sum(_overlap(box, other) for other in self.points)


def beside(x: float, y: float, distance: float = 8.0) -> list[Place]:
    """List the places around a point, the best first."""
    return [
        Place(x + distance, y + 4.5),
        Place(x - distance, y + 4.5, "end"),
        Place(x, y - distance - 2, "middle"),
        Place(x, y + distance + 11, "middle"),
        Place(x + distance - 2, y - distance + 1),
        Place(x - distance + 2, y - distance + 1, "end"),
        Place(x + distance - 2, y + distance + 9),
        Place(x - distance + 2, y + distance + 9, "end"),
    ]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
