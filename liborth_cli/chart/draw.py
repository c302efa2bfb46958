"""Puts curves, marks, axes and names into one SVG.

Series are told apart by colour, and for who sees no colours by dash and by shape of mark. The colours are in chart.css
(`.s0` …), once for light and once for dark paper: Okabe and Ito's hues for the colour-blind, each moved in lightness until it
stands out from the paper by 3 : 1.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from xml.etree import ElementTree

from liborth_cli.chart.axes import Scale, fit, interval_text, number
from liborth_cli.chart.labels import CHARACTER, LINE, Place, Placer, beside
from liborth_cli.console import clean
from liborth_cli.errors import cut

WIDTH, HEIGHT = 520.0, 300.0
RIGHT, BOTTOM = 14.0, 46.0
COLUMN = 2.0  # a long line is thinned to what shows in columns of this width
MARKED = 24  # a longer line shows no marks of its own
NAMED = 16  # more marks than this are named only when pointed at
SCATTERED = 1500  # more marks than this are thinned to one a place
COLOURS = 8
LONGEST_NAME = 34  # a longer one is cut; pointing at it, or the downloads, give all of it
DASHES = (None, "7 3", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2")
LEGEND_ROW, LEGEND_COLUMN = 18, 260
CORNERS = {
    "circle": (),
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    # A thick × as one outline, going round its four arms; half its width is 1.15.
    "cross": (
        (0, -0.5), (0.65, -1.15), (1.15, -0.65), (0.5, 0), (1.15, 0.65), (0.65, 1.15),
        (0, 0.5), (-0.65, 1.15), (-1.15, 0.65), (-0.5, 0), (-1.15, -0.65), (-0.65, -1.15),
    ),
    "wedge": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
}  # fmt: skip
"""Marks by their corners, in units of half their size; the circle has none."""

Point = tuple[float, float]
Node = ElementTree.Element


@dataclass(frozen=True)
class Series:
    """One curve, or one row of marks.

    Attributes:
        label: what the legend calls it.
        x: abscissae.
        y: ordinates, as many.
        low: lower ends of intervals, or empty.
        high: upper ends, or empty.
        marks: a name for each point, shown when it is pointed at, or empty.
        line: whether the points are joined.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    marks: tuple[str, ...] = ()
    line: bool = True


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes.

    Attributes:
        title: heading.
        alt: what a reader who cannot see it has to know, in a sentence or two.
        x_label: with the unit.
        y_label: with the unit.
        series: the curves.
        x_log: whether x is logarithmic.
        y_log: whether y is logarithmic.
        lines: vertical lines, by name (a noise edge, a never-trained level).
        levels: horizontal lines, by name.
    """

    title: str
    alt: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    lines: dict[str, float] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """The axes of one plot and the box they span, in drawing units.

    Attributes:
        x: across.
        y: upwards.
        top: where the box begins; the label of the y axis is above.
        bottom: where it ends.
    """

    x: Scale
    y: Scale
    top: float
    bottom: float

    @classmethod
    def around(cls, plot: Plot, top: float) -> Frame:
        """Lay axes over everything a plot shows."""
        bottom = top + HEIGHT - BOTTOM
        heights = [v for s in plot.series for v in (*s.y, *s.low, *s.high)] + list(plot.levels.values())
        y = fit(heights, bottom, top, plot.y_log)
        left = 10 + CHARACTER * max((len(label) for _, label in y.ticks()), default=1)
        places = [v for s in plot.series for v in s.x] + list(plot.lines.values())
        joined = all(series.line for series in plot.series)
        return cls(fit(places, left, WIDTH - RIGHT, plot.x_log, pad=0.0 if joined else 0.06), y, top, bottom)

    @property
    def left(self) -> float:
        """Where the box begins, across."""
        return self.x.start

    @property
    def right(self) -> float:
        """Where the box ends, across."""
        return self.x.end

    def point(self, x: float, y: float) -> Point | None:
        """Return where a point is drawn, or None when it has no place on these axes."""
        across, up = self.x(x), self.y(y)
        return None if across is None or up is None else (across, up)

    def points(self, series: Series) -> list[Point | None]:
        """Return where the points of a series are drawn."""
        return [self.point(x, y) for x, y in zip(series.x, series.y, strict=False)]


def inline(plot: Plot, labelled_by: str) -> str:
    """Draw a plot for a page that has the style sheet.

    Args:
        plot: what to draw.
        labelled_by: ids of the heading and the alternative text.

    Returns:
        An svg element as text; every text of the plot is escaped in it.
    """
    return _written(_draw(plot, labelled_by))


def standalone(plot: Plot) -> str:
    """Draw a plot as a file of its own, with title, legend and colours for light and dark."""
    picture = _draw(plot, "title alt")
    inner = float(picture.attrib["viewBox"].split()[3])
    rows = -(-len(plot.series) // 2) if len(plot.series) > 1 else 0
    height = inner + 24 + LEGEND_ROW * rows
    svg = _node(None, "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"-8 -8 {_short(WIDTH + 16)} {_short(height + 16)}")
    _node(svg, "title", plot.title, id="title")
    _node(svg, "desc", plot.alt, id="alt")
    _node(svg, "style", style() + "text { font: 12px system-ui, sans-serif }")
    _node(svg, "rect", x=-8, y=-8, width="100%", height="100%", class_="paper")
    picture.attrib |= {"width": _short(WIDTH), "height": _short(inner)}
    svg.append(picture)
    for index, series in enumerate(plot.series if rows else ()):
        x, y = LEGEND_COLUMN * (index % 2), inner + 16 + LEGEND_ROW * (index // 2)
        _sample(_node(svg, "g", transform=f"translate({x} {_short(y)})"), index, series.line)
        _node(svg, "text", series.label, x=x + 34, y=y + 10.5, class_="tick")
    return _written(svg) + "\n"


def legend(plot: Plot) -> list[tuple[str, str]]:
    """Return sample (an svg element) and name of each series, where there is more than one."""
    if len(plot.series) < 2:
        return []
    samples = []
    for index, series in enumerate(plot.series):
        svg = _node(None, "svg", class_="key", viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")
        _sample(svg, index, series.line)
        samples.append((_written(svg), series.label))
    return samples


def hidden_points(plot: Plot) -> int:
    """Count the points that have no place on the axes: not finite, or not positive on a logarithmic one."""
    frame = Frame.around(plot, top=LINE)
    return sum(point is None for series in plot.series for point in frame.points(series))


def style() -> str:
    """Return the style sheet of charts."""
    return files("liborth_cli.chart").joinpath("chart.css").read_text(encoding="utf-8")


def _draw(plot: Plot, labelled_by: str) -> Node:
    title = textwrap.wrap(f"↑ {cut(plot.y_label, 112)}", int(WIDTH / CHARACTER)) or [""]
    frame = Frame.around(plot, top=LINE * len(title) + 10)
    axes = {name: " ".join(f"{v:.9g}" for v in (s.start, s.end, s.low, s.high)) for name, s in (("x", frame.x), ("y", frame.y))}
    svg = _node(
        None, "svg", viewBox=f"0 0 {_short(WIDTH)} {_short(frame.bottom + BOTTOM)}", role="img", aria_labelledby=labelled_by,
        data_x=axes["x"], data_y=axes["y"],
    )  # fmt: skip
    for row, line in enumerate(title):
        _node(svg, "text", line, x=0, y=13 + LINE * row, class_="axis")
    label = f"{cut(plot.x_label, 56)} →"
    _node(svg, "text", label, x=WIDTH, y=frame.bottom + 41, class_="axis", text_anchor="end")
    _grid(svg, frame)
    _references(svg, plot, frame)
    placer = Placer((frame.left + 2, frame.top - 6, frame.right - 2, frame.bottom - 2))
    for i, series in enumerate(plot.series):
        _curve(svg, series, i, frame)
    for i in range(len(plot.series)):
        _marks(svg, plot, i, frame, placer)
    _mark_names(svg, plot, frame, placer)
    _reference_names(svg, plot, frame, placer)
    return svg


def _grid(svg: Node, frame: Frame) -> None:
    group, left, right = _node(svg, "g"), _short(frame.left), _short(frame.right)
    _node(group, "path", d=f"M{left} {_short(frame.bottom)}H{right}", class_="base")
    for y, label in frame.y.ticks():
        _node(group, "path", d=f"M{left} {_short(y)}H{right}", class_="rule")
        _node(group, "text", label, x=frame.left - 6, y=y + 4.5, class_="tick", text_anchor="end")
    for x, label in frame.x.ticks():
        _node(group, "path", d=f"M{_short(x)} {_short(frame.bottom)}v5", class_="base")
        _node(group, "text", label, x=x, y=frame.bottom + 20, class_="tick", text_anchor="middle")


def _curve(svg: Node, series: Series, index: int, frame: Frame) -> None:
    low, high = _ends(series)
    if not series.line:
        for x, bottom, top in zip(series.x, low, high, strict=False):
            across, a, b = frame.x(x), frame.y(bottom), frame.y(top)
            if across is not None and b is not None:
                reach = f"M{_short(across)} {_short(frame.bottom if a is None else a)}V{_short(b)}"
                _node(svg, "path", d=reach, class_=f"whisker {_colour(index)}")
        return
    if low:
        upper = [p for piece in _pieces(series.x, high, frame) for p in thin(piece)]
        lower = [p for piece in _pieces(series.x, low, frame) for p in thin(piece)]
        if upper and lower:
            _node(svg, "path", d=_joined(upper + lower[::-1]) + "z", class_=f"band {_colour(index)}")
    path = "".join(_joined(thin(piece)) for piece in _pieces(series.x, series.y, frame))
    if path:
        _line(svg, path, index)


def _marks(svg: Node, plot: Plot, index: int, frame: Frame, placer: Placer) -> None:
    series = plot.series[index]
    points = frame.points(series)
    sparse = len(points) <= MARKED
    seen: set[tuple[int, int]] = set()
    for i, point in enumerate(points):
        if point is None:
            continue
        if sparse:
            placer.add_point(*point)
        place = (round(point[0] / 2), round(point[1] / 2))
        if (series.line and not sparse) or (len(points) > SCATTERED and place in seen):
            continue
        seen.add(place)
        mark = _mark(svg, point, index, radius=3.0 if series.line else 4.5)
        if len(points) <= SCATTERED:
            _node(mark, "title", _described(plot, series, i))


def _described(plot: Plot, series: Series, i: int) -> str:
    low, high = _ends(series)
    name = f"{series.label}, {series.marks[i]}" if i < len(series.marks) and series.marks[i] else series.label
    ends = f" ({interval_text(low[i], high[i])})" if i < min(len(low), len(high)) else ""
    return f"{name}: {plot.x_label} {number(series.x[i])}, {plot.y_label} {number(series.y[i])}{ends}"


def _references(svg: Node, plot: Plot, frame: Frame) -> None:
    lines = [x for value in plot.lines.values() if (x := frame.x(value)) is not None]
    levels = [y for value in plot.levels.values() if (y := frame.y(value)) is not None]
    paths = [f"M{_short(x)} {_short(frame.top)}V{_short(frame.bottom)}" for x in lines]
    paths += [f"M{_short(frame.left)} {_short(y)}H{_short(frame.right)}" for y in levels]
    if paths:
        _node(svg, "path", d="".join(paths), class_="reference")


def _reference_names(svg: Node, plot: Plot, frame: Frame, placer: Placer) -> None:
    for name, value in plot.levels.items():
        words = cut(name, LONGEST_NAME)
        if (y := frame.y(value)) is not None:
            sides = ((frame.right - 4, "end"), (frame.left + 6, "start"))
            places = [Place(x, y + dy, anchor) for x, anchor in sides for dy in (-5, 14)]
            _name(svg, words, placer.best(words, places), "name")
    for name, value in plot.lines.items():
        words = cut(name, LONGEST_NAME)
        if (x := frame.x(value)) is not None:
            rows = [frame.top + 13 + LINE * row for row in range(4)]
            places = [Place(x + dx, y, anchor) for y in rows for dx, anchor in ((5, "start"), (-5, "end"))]
            _name(svg, words, placer.best(words, places), "name")


def _mark_names(svg: Node, plot: Plot, frame: Frame, placer: Placer) -> None:
    scattered = [(i, series) for i, series in enumerate(plot.series) if not series.line and series.marks]
    if sum(len(series.x) for _, series in scattered) > NAMED:
        return
    for i, series in scattered:
        for point, name in zip(frame.points(series), series.marks, strict=False):
            words = cut(name, LONGEST_NAME)
            if point and name and (place := placer.free(words, beside(*point))):
                _name(svg, words, place, f"name {_colour(i)}")


def _name(svg: Node, words: str, place: Place, class_: str) -> None:
    anchor = None if place.anchor == "start" else place.anchor
    _node(svg, "text", words, x=place.x, y=place.y, class_=class_, text_anchor=anchor)


def _sample(parent: Node, index: int, joined: bool) -> None:
    """Draw what stands beside a series' name in a legend, 26 × 12."""
    if joined:
        _line(parent, "M0 6H26", index)
    _mark(parent, (13, 6), index, 4.0)


def _line(parent: Node, path: str, index: int) -> None:
    _node(parent, "path", d=path, class_=f"line {_colour(index)}", stroke_dasharray=DASHES[index % len(DASHES)])


def _mark(parent: Node, point: Point, index: int, radius: float) -> Node:
    x, y, r = *point, radius
    corners = list(CORNERS.values())[index % len(CORNERS)]
    if corners:
        path = _joined([(x + r * dx, y + r * dy) for dx, dy in corners]) + "z"
    else:
        path = f"M{_short(x - r)} {_short(y)}a{r:g} {r:g} 0 1 0 {_short(2 * r)} 0a{r:g} {r:g} 0 1 0 -{_short(2 * r)} 0z"
    return _node(parent, "path", d=path, class_=f"mark {_colour(index)}")


def _colour(index: int) -> str:
    return f"s{index % COLOURS}"


def _ends(series: Series) -> tuple[Sequence[float], Sequence[float]]:
    return (series.low, series.high) if series.low and series.high else ((), ())


def _pieces(xs: Sequence[float], ys: Sequence[float], frame: Frame) -> Iterator[list[Point]]:
    """Cut a curve where a point has no place."""
    piece: list[Point] = []
    for x, y in zip(xs, ys, strict=False):
        point = frame.point(x, y)
        if point is not None:
            piece.append(point)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def thin(points: list[Point]) -> list[Point]:
    """Keep of each narrow column the first, lowest, highest and last point: the line looks the same."""
    if len(points) <= 4 * MARKED:
        return points
    kept: list[Point] = []
    column: list[Point] = []
    for point in [*points, None]:
        if column and (point is None or int(point[0] / COLUMN) != int(column[0][0] / COLUMN)):
            heights = [y for _, y in column]
            wanted = {0, heights.index(min(heights)), heights.index(max(heights)), len(column) - 1}
            kept.extend(column[i] for i in sorted(wanted))
            column = []
        if point is not None:
            column.append(point)
    return kept


def _joined(points: list[Point]) -> str:
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points)


def _short(value: float) -> str:
    """Write a coordinate to a tenth of a drawing unit."""
    return f"{value:.1f}".removesuffix(".0")


def _node(parent: Node | None, tag: str, text: str = "", **attributes: str | float | None) -> Node:
    """Add an element; None leaves an attribute out. Names: `_` stands for `-`, a trailing one is dropped (`class_`)."""
    named = {
        name.rstrip("_").replace("_", "-"): clean(value) if isinstance(value, str) else _short(value)
        for name, value in attributes.items()
        if value is not None
    }
    node = ElementTree.Element(tag, named) if parent is None else ElementTree.SubElement(parent, tag, named)
    node.text = clean(text) if tag != "style" else text
    return node


def _written(node: Node) -> str:
    ElementTree.indent(node, space="")
    return ElementTree.tostring(node, encoding="unicode")
