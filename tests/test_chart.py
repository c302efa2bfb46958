"""Charts: axes, numbers, thinning, and files of their own that hold whatever names they are given."""

import math
from xml.etree import ElementTree

import pytest

from liborth_cli import chart
from liborth_cli.chart import Plot, Series
from liborth_cli.chart.axes import fit, number
from liborth_cli.chart.draw import thin

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"), (0.05, "0.05"), (0.942, "0.942"), (12.3456, "12.35"), (291, "291"), (12345.0, "12\u202f345"),
        (-0.5, "−0.5"),
        (1.23456e-7, "1.235e−7"), (2.5e12, "2.5e12"), (math.nan, "–"), (None, "–"), (math.inf, "∞"), (-math.inf, "−∞"),
        (0.99999, "1"), (1e-300, "1e−300"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value, written):
    assert number(value) == written


def test_ticks_are_round_and_where_they_say():
    axis = fit([0.0, 0.97], 0, 100)
    labels = {label: place for place, label in axis.ticks()}
    assert set(labels) >= {"0.0", "0.2", "0.8"}
    assert labels["0.8"] == pytest.approx(axis(0.8))


def test_a_logarithmic_axis_has_powers_of_ten_over_any_range():
    axis = fit([1e-12, 1.0], 0, 100, log=True)
    assert all("10" in label or label in ("1", "0.001", "0.01") for _, label in axis.ticks())
    assert 3 <= len(axis.ticks()) <= 7
    assert axis(1e-6) == pytest.approx(50)
    assert [label for _, label in fit([1.0, 8.0], 0, 100, log=True, pad=0).ticks()] == ["1", "2", "5"]
    narrow = fit([1.01, 1.05], 0, 100, log=True).ticks()
    assert len(narrow) >= 3
    assert len({label for _, label in narrow}) == len(narrow)


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0], [math.nan], [-1e308, 1e308], [1e-320], [5.0, 5.0 + 1e-15]])
@pytest.mark.parametrize("log", [False, True])
def test_no_range_breaks_an_axis(values, log):
    axis = fit(values, 0, 100, log)
    assert axis.high > axis.low
    assert all(math.isfinite(place) for place, _ in axis.ticks())


def test_thinning_keeps_the_extremes_of_every_column():
    points = [(i / 10, math.sin(i * 12.9898) * 50) for i in range(5000)]
    kept = thin(points)
    assert len(kept) <= 4 * 251
    for start in range(0, 500, 2):
        column = [y for x, y in points if start <= x < start + 2]
        left = [y for x, y in kept if start <= x < start + 2]
        assert (min(column), max(column)) == (min(left), max(left))


@pytest.mark.parametrize("name", ["loss", "</text><script>x</script>", 'a & b "c" ]]>', "\u202e\x1b[31m\ud800"])
def test_a_file_of_its_own_has_title_legend_and_every_point(name):
    made = Plot(name, name, name, name, (Series(name, (0.0, 1.0), (1.0, 2.0)), Series(name, (0.5,), (3.0,), line=False)))
    svg = ElementTree.fromstring(chart.standalone(made))
    assert svg.tag == f"{SVG}svg"
    assert len(svg.findall(f".//{SVG}script")) == 0
    marks = [node for node in svg.iter(f"{SVG}path") if "mark" in node.get("class", "")]
    assert len(marks) == 3 + 2, "three points, and a sample of each series in the legend"
    assert svg.find(f"{SVG}style").text.startswith(chart.style())
    assert not any(ord(c) < 32 and c != "\n" for text in svg.itertext() for c in text)


def test_a_chart_without_points_is_a_file_too():
    assert ElementTree.fromstring(chart.standalone(Plot("t", "", "x", "y", ()))) is not None
