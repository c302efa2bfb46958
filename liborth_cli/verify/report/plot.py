"""Draws curves and marks over a pair of axes, as SVG that needs no script to be read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liborth_cli.verify.report import palette
from liborth_cli.verify.report.labels import CHARACTER, LINE, Place, Placer, beside
from liborth_cli.verify.report.markup import Element, element
from liborth_cli.verify.report.numbers import between, number
from liborth_cli.verify.report.palette import coordinate
from liborth_cli.verify.report.scale import Scale, fit
from liborth_cli.verify.result import Plot, Series

WIDTH, HEIGHT = 520.0, 300.0
RIGHT, BOTTOM = 14.0, 46.0
COLUMN = 2.0  # a long line is thinned to what shows in columns of this width
MARKED = 24  # a longer line shows no marks of its own
NAMED = 16  # more marks than this are named only when pointed at
SCATTERED = 1500  # more marks than this are thinned to one a place

Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The axes of one plot and the box they span.

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


def draw(plot: Plot, labelled_by: str) -> Element:
    """Draw a plot.

    Args:
        plot: what to draw.
        labelled_by: ids of the heading and the alternative text.
    """
    title = textwrap.wrap(f"↑ {short(plot.y_label, 112)}", int(WIDTH / CHARACTER)) or [""]
    frame = _frame(plot, top=LINE * len(title) + 10)
    placer = Placer((frame.left + 2, frame.top - 6, frame.right - 2, frame.bottom - 2))
    curves = [part for i, series in enumerate(plot.series) for part in _curve(series, i, frame)]
    marks = [part for i, series in enumerate(plot.series) for part in _marks(plot, series, i, frame, placer)]
    names = [*_mark_names(plot, frame, placer), *_reference_names(plot, frame, placer)]
    return element(
        "svg",
        [element("text", line, x=0, y=13 + LINE * row, class_="axis") for row, line in enumerate(title)],
        element("text", f"{short(plot.x_label, 56)} →", x=WIDTH, y=frame.bottom + 41, class_="axis", text_anchor="end"),
        _grid(frame),
        _references(plot, frame),
        curves,
        marks,
        names,
        viewBox=f"0 0 {coordinate(WIDTH)} {coordinate(frame.bottom + BOTTOM)}",
        role="img",
        aria_labelledby=labelled_by,
        data_x=_scale_for_script(frame.x),
        data_y=_scale_for_script(frame.y),
    )


def legend(plot: Plot) -> Element | None:
    """List the names of the series, where there is more than one."""
    if len(plot.series) < 2:
        return None
    entries = (element("li", palette.key(i, series.line), series.label) for i, series in enumerate(plot.series))
    return element("ul", entries, class_="legend")


def hidden_points(plot: Plot) -> int:
    """Count the points that have no place on the axes: not finite, or not positive on a logarithmic one."""
    frame = _frame(plot, top=LINE)
    return sum(frame.point(x, y) is None for series in plot.series for x, y in zip(series.x, series.y, strict=False))


def _frame(plot: Plot, top: float) -> Frame:
    bottom = top + HEIGHT - BOTTOM
    heights = [v for s in plot.series for v in (*s.y, *s.low, *s.high)] + list(plot.levels.values())
    y = fit(heights, bottom, top, plot.y_log)
    left = 10 + CHARACTER * max((len(label) for _, label in y.ticks()), default=1)
    places = [v for s in plot.series for v in s.x] + list(plot.lines.values())
    joined = all(series.line for series in plot.series)
    return Frame(fit(places, left, WIDTH - RIGHT, plot.x_log, pad=0.0 if joined else 0.06), y, top, bottom)


def _grid(frame: Frame) -> Element:
    left, right = coordinate(frame.left), coordinate(frame.right)
    parts = [element("path", d=f"M{left} {coordinate(frame.bottom)}H{right}", class_="base")]
    for y, label in frame.y.ticks():
        parts.append(element("path", d=f"M{left} {coordinate(y)}H{right}", class_="rule"))
        parts.append(element("text", label, x=frame.left - 6, y=y + 4.5, class_="tick", text_anchor="end"))
    for x, label in frame.x.ticks():
        parts.append(element("path", d=f"M{coordinate(x)} {coordinate(frame.bottom)}v5", class_="base"))
        parts.append(element("text", label, x=x, y=frame.bottom + 20, class_="tick", text_anchor="middle"))
    return element("g", parts)


def _curve(series: Series, index: int, frame: Frame) -> Iterator[Element]:
    low, high = _ends(series)
    if not series.line:
        for x, bottom, top in zip(series.x, low, high, strict=False):
            across, a, b = frame.x(x), frame.y(bottom), frame.y(top)
            if across is not None and b is not None:
                reach = f"M{coordinate(across)} {coordinate(frame.bottom if a is None else a)}V{coordinate(b)}"
                yield element("path", d=reach, class_=f"whisker {palette.colour(index)}")
        return
    if low:
        upper = [p for piece in _pieces(series.x, high, frame) for p in thin(piece)]
        lower = [p for piece in _pieces(series.x, low, frame) for p in thin(piece)]
        if upper and lower:
            yield element("path", d=_joined(upper + lower[::-1]) + "z", class_=f"band {palette.colour(index)}")
    path = "".join(_joined(thin(piece)) for piece in _pieces(series.x, series.y, frame))
    if path:
        yield palette.line(path, index)


def _marks(plot: Plot, series: Series, index: int, frame: Frame, placer: Placer) -> Iterator[Element]:
    points = [frame.point(x, y) for x, y in zip(series.x, series.y, strict=False)]
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
        title = _title(plot, series, i) if len(points) <= SCATTERED else None
        yield palette.mark(*point, index, title, radius=3.0 if series.line else 4.5)


def _title(plot: Plot, series: Series, i: int) -> str:
    low, high = _ends(series)
    name = f"{series.label}, {series.marks[i]}" if i < len(series.marks) and series.marks[i] else series.label
    ends = f" ({between(low[i], high[i])})" if i < min(len(low), len(high)) else ""
    return f"{name}: {plot.x_label} {number(series.x[i])}, {plot.y_label} {number(series.y[i])}{ends}"


def _references(plot: Plot, frame: Frame) -> Element | None:
    lines = [x for value in plot.lines.values() if (x := frame.x(value)) is not None]
    levels = [y for value in plot.levels.values() if (y := frame.y(value)) is not None]
    paths = [f"M{coordinate(x)} {coordinate(frame.top)}V{coordinate(frame.bottom)}" for x in lines]
    paths += [f"M{coordinate(frame.left)} {coordinate(y)}H{coordinate(frame.right)}" for y in levels]
    return element("path", d="".join(paths), class_="reference") if paths else None


def _reference_names(plot: Plot, frame: Frame, placer: Placer) -> Iterator[Element]:
    for name, value in plot.levels.items():
        words = short(name)
        if (y := frame.y(value)) is not None:
            sides = ((frame.right - 4, "end"), (frame.left + 6, "start"))
            places = [Place(x, y + dy, anchor) for x, anchor in sides for dy in (-5, 14)]
            yield _text(words, placer.best(words, places), "name")
    for name, value in plot.lines.items():
        words = short(name)
        if (x := frame.x(value)) is not None:
            rows = [frame.top + 13 + LINE * row for row in range(4)]
            places = [Place(x + dx, y, anchor) for y in rows for dx, anchor in ((5, "start"), (-5, "end"))]
            yield _text(words, placer.best(words, places), "name")


def _mark_names(plot: Plot, frame: Frame, placer: Placer) -> Iterator[Element]:
    scattered = [(i, series) for i, series in enumerate(plot.series) if not series.line and series.marks]
    if sum(len(series.x) for _, series in scattered) > NAMED:
        return
    for i, series in scattered:
        for x, y, name in zip(series.x, series.y, series.marks, strict=False):
            point = frame.point(x, y)
            words = short(name)
            if point and name and (place := placer.free(words, beside(*point))):
                yield _text(words, place, f"name {palette.colour(i)}")


def _text(words: str, place: Place, class_: str) -> Element:
    anchor = None if place.anchor == "start" else place.anchor
    return element("text", words, x=place.x, y=place.y, class_=class_, text_anchor=anchor)


def _ends(series: Series) -> tuple[Sequence[float], Sequence[float]]:
    return (series.low, series.high) if series.low and series.high else ((), ())


def _pieces(xs: Sequence[float], ys: Sequence[float], frame: Frame) -> Iterator[list[Point]]:
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


def short(name: str, most: int = 34) -> str:
    """Cut a name that would not fit into a plot; pointing at it, or the downloads, give all of it."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _joined(points: list[Point]) -> str:
    return "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)


def _scale_for_script(scale: Scale) -> str:
    return " ".join(f"{value:.9g}" for value in (scale.start, scale.end, scale.low, scale.high))
