"""How one series differs from the next: by colour, and for who sees no colours by dash and by shape of mark.

The colours themselves are in style.css (`.s0` …), once for light and once for dark paper: Okabe and Ito's hues for the
colour-blind, each moved in lightness until it stands out from the paper by 3 : 1.
"""

from __future__ import annotations

from liborth_cli.verify.report.markup import Element, element

COLOURS = 8
DASHES = (None, "7 3", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2")
# A thick × as one outline, going round its four arms; half its width is 1.15.
_CROSS = (
    (0, -0.5), (0.65, -1.15), (1.15, -0.65), (0.5, 0), (1.15, 0.65), (0.65, 1.15),
    (0, 0.5), (-0.65, 1.15), (-1.15, 0.65), (-0.5, 0), (-1.15, -0.65), (-0.65, -1.15),
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "wedge")


def colour(index: int) -> str:
    """Return the class that sets the colour of a series."""
    return f"s{index % COLOURS}"


def line(path: str, index: int) -> Element:
    """Draw the line of a series."""
    return element("path", d=path, class_=f"line {colour(index)}", stroke_dasharray=DASHES[index % len(DASHES)])


def mark(x: float, y: float, index: int, title: str | None = None, radius: float = 4.0) -> Element:
    """Draw one point of a series.

    Args:
        x: its middle.
        y: its middle.
        index: which series.
        title: what pointing at it shows.
        radius: half its size, in drawing units.
    """
    words = element("title", title) if title else None
    return element("path", words, d=_shape(SHAPES[index % len(SHAPES)], x, y, radius), class_=f"mark {colour(index)}")


def key(index: int, joined: bool) -> Element:
    """Draw the sample beside a series' name in the legend."""
    parts = [line("M0 6H26", index) if joined else None, mark(13, 6, index)]
    return element("svg", parts, class_="key", viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")


def coordinate(value: float) -> str:
    """Write a coordinate to a tenth of a drawing unit."""
    return f"{value:.1f}".removesuffix(".0").replace("-0.0", "0")


def _shape(name: str, x: float, y: float, r: float) -> str:
    if name == "circle":
        left, middle, wide = coordinate(x - r), coordinate(y), coordinate(2 * r)
        return f"M{left} {middle}a{r:g} {r:g} 0 1 0 {wide} 0a{r:g} {r:g} 0 1 0 -{wide} 0z"
    corners = {
        "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
        "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "wedge": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "cross": _CROSS,
    }[name]
    return "M" + "L".join(f"{coordinate(x + r * dx)} {coordinate(y + r * dy)}" for dx, dy in corners) + "z"
