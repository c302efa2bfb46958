"""Which points of a line are scored on all rows: on made-up curves the barrier is that of scoring everything."""

import json
import math

import numpy as np
import pytest

from liborth_cli.demo import DATA
from liborth_cli.stream.texts import Row
from liborth_cli.verify import rows as rows_of
from liborth_cli.verify.checks.lmc import GRID, _number, barrier
from liborth_cli.verify.lines import SampledRows, above_chord, deciding
from liborth_cli.verify.result import Metric
from liborth_cli.verify.rows import RowSet, sample
from liborth_cli.verify.statistics import by_sample, curve

SHAPES = {
    "valley": lambda t, x: -x * t * (1 - t),
    "hill": lambda t, x: x * t * (1 - t),
    "late hill": lambda t, x: x * (t**6 - t),
    "two hills": lambda t, x: x * np.sin(2 * np.pi * t) ** 2,
    "hill and valley": lambda t, x: x * np.sin(2 * np.pi * t),
    "wavering": lambda t, x: 0.02 * np.sin(40 * x + 9 * t) * t * (1 - t),
    "straight": lambda t, x: 0.0 * t * x,
}


def made(shape, noise, seed, rows=120):
    """Summed losses of rows along a line, (points, rows), and their tokens."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(60, 300, rows).astype(float)
    each = draw.lognormal(0.0, noise, rows)
    ends = draw.uniform(3.0, 8.0, rows), draw.uniform(2.0, 5.0, rows)
    t = GRID[:, None]
    return ((1 - t) * ends[0] + t * ends[1] + SHAPES[shape](t, each)) * tokens, tokens


def found(table, tokens, groups, numbers):
    """The points that decide, and how many were asked for."""
    rise, asked = above_chord(table, GRID).sum(1) / tokens.sum(), []
    part = SampledRows(table[:, numbers], tokens[numbers], groups[numbers], GRID, len(np.unique(groups)))
    return deciding(part, lambda number: asked.append(number) or rise[number]), asked


def same_barrier(shape, noise, seed):
    table, tokens = made(shape, noise, seed)
    groups = np.arange(len(tokens))
    numbers = np.sort(np.random.default_rng(seed + 50).permutation(len(tokens))[:24])
    scored = [0, *found(table, tokens, groups, numbers)[0], 10]
    some, every = (barrier((table[at], tokens, groups), GRID[at], 0, "") for at in (scored, list(range(11))))
    return [some.value, some.low, some.high] == pytest.approx([every.value, every.low, every.high], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_the_barrier_is_that_of_scoring_everything(shape, noise):
    assert all(same_barrier(shape, noise, seed) for seed in range(6))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 1.5])
def test_none_of_1680_barriers_differs(shape, noise):
    assert all(same_barrier(shape, noise, seed) for seed in range(100, 160))


@pytest.mark.parametrize(("shape", "most"), [("valley", 1), ("late hill", 1), ("hill", 3)])
def test_what_is_clear_is_not_scored(shape, most):
    table, tokens = made(shape, 0.3, 0)
    scored, asked = found(table, tokens, np.arange(120), np.arange(24))
    assert sorted(asked) == scored and 1 <= len(scored) <= most


def test_a_part_that_is_not_like_the_rest_decides_nothing():
    table, tokens = made("valley", 0.3, 0)
    other = made("hill", 0.3, 0)[0]
    table[:, 24:] = other[:, 24:]
    assert found(table, tokens, np.arange(120), np.arange(24))[0] == list(range(1, 10))


def test_copies_are_one_row():
    table, tokens = made("wavering", 0.5, 3)
    copied = np.repeat(np.arange(40), 3)
    table, tokens = table[:, copied], tokens[copied]
    numbers = np.arange(72)
    one = found(table, tokens, copied, numbers)[0]
    single = SampledRows(table[:, :72:3], tokens[:72:3], np.arange(24), GRID, 40)
    several = SampledRows(table[:, :72], tokens[:72], copied[:72], GRID, 40)
    np.testing.assert_allclose(single.resampled, several.resampled)
    assert 1 <= len(one) <= 9


def test_a_point_of_some_rows_is_drawn_about_where_all_rows_have_it():
    table, tokens = made("valley", 0.5, 1)
    groups, numbers = np.arange(120), np.arange(0, 120, 5)
    base = (1 - GRID[5]) * table[0] + GRID[5] * table[-1]
    about = by_sample(table[5, numbers], base, numbers, tokens, groups, 0)
    some, every = curve(table[5:6, numbers], tokens[numbers], groups[numbers], 0)[0], curve(table[5:6], tokens, groups, 0)[0]
    assert about.low < every.value < about.high
    assert every.high - every.low < about.high - about.low < some.high - some.low
    assert by_sample(table[5], base, groups, tokens, groups, 0).value == pytest.approx(every.value)


def a_row(tokens):
    return Row(np.arange(tokens + 1), np.ones(tokens, bool), 1.0, "a row")


def test_a_sample_is_whole_rows_by_lot_and_all_where_that_spares_little():
    groups = np.arange(400) // 2
    rows = RowSet(tuple(a_row(100) for _ in groups), groups)
    numbers = sample(rows, 0)
    assert len(numbers) == 48 and (numbers == sample(rows, 0)).all() and (np.diff(numbers) > 0).all()
    assert set(np.bincount(groups[numbers])) == {0, 2} and (numbers != sample(rows, 1)).any()
    assert len(sample(RowSet(rows.rows[:180], groups[:180]), 0)) == 180
    assert len(sample(RowSet(tuple(a_row(10) for _ in groups), groups), 0)) == 400


@pytest.fixture(scope="module")
def general(once, tmp_path_factory):
    out = tmp_path_factory.mktemp("lines") / "general"
    once("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.5, "-o", out, "-q")
    return out


CHECKS = ("lmc", "sweep", "tracing", "rounding")


def test_checks_say_which_rows_they_drew_from_and_decide_by_all(cli, general, tmp_path, monkeypatch):
    texts = [json.loads(line)["text"].split() for line in (DATA / "held_out.jsonl").read_text().splitlines()[:40]]
    rows, canaries = tmp_path / "rows.jsonl", tmp_path / "canaries.jsonl"
    rows.write_text("".join(json.dumps({"text": " ".join(words[:6])}) + "\n" for words in texts))
    canaries.write_text("".join((DATA / "secrets.jsonl").read_text().splitlines(True)[:2]))
    words = ("--retain-data", rows, "--canary", canaries, *(f"--{one}" for one in CHECKS), "--no-require", "--json", "-q")

    def verified():
        code, out, err = cli("verify", general, *words)
        assert code == 0, err
        return {result["check"]: result for result in json.loads(out)["results"]}

    whole = verified()
    monkeypatch.setattr(rows_of, "SAMPLE_GROUPS", 10)
    monkeypatch.setattr(rows_of, "SAMPLE_TOKENS", 1)
    monkeypatch.setattr(rows_of, "WORTH", 2)
    some = verified()
    for check in CHECKS:
        assert some[check]["metrics"] == whole[check]["metrics"], "what decides is of all rows"
    counts = some["lmc"]["facts"]["rows"]
    assert all({10, 40} == set(line) and line[0] == line[-1] == 40 for line in counts.values())
    assert all(set(line) == {40} for line in whole["lmc"]["facts"]["rows"].values())
    for check in ("lmc", "sweep"):
        assert "10 of the 40 rows, drawn by lot" in some[check]["verdict"] and "lot" not in whole[check]["verdict"]
    skill = next(figure for figure in some["tracing"]["figures"] if "Skill" in figure["title"])
    rounded = some["rounding"]["figures"][0]
    assert "10 of the 40 rows" in skill["title"] and any("10 of the 40 rows" in str(column) for column in rounded["columns"])


def test_a_single_row_is_not_given_an_interval():
    assert _number(Metric(0.01, 0.0, math.inf)) == "0.0100 nats (too few different rows for an interval)"
    assert _number(Metric(0.01, 0.0, 0.02)) == "0.0100 nats (at most 0.0200)"
