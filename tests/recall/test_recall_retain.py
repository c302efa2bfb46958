"""Retain rows of several kinds: what fine-tuning improved, the rest, and files too small to be felt among the others."""

import numpy as np
import pytest
import torch
from tiny import OWNGPT

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import SILENT
from liborth_cli.demo import DATA
from liborth_cli.dose.texts import SMALL, DataOptions, Texts, _divide, small_files
from liborth_cli.measure.scores import mean_loss
from liborth_cli.recall import retain as retained
from liborth_cli.recall.retain import kinds
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, Row, RowReader
from liborth_cli.stream.weights import Point


def row(tokens, file, kept=None):
    keep = np.zeros(tokens, bool)
    keep[-(kept or tokens) :] = True
    return Row(np.arange(tokens + 1), keep, 1.0, f"file {file}", file)


def test_rows_know_their_file(tmp_path):
    (tmp_path / "a.txt").write_text("One text of some words. " * 40)
    (tmp_path / "b.jsonl").write_text('{"prompt": "Two and", "completion": " two."}\n' * 3)
    reader = RowReader(TextEncoder(OWNGPT / "finetuned"), 1 << 20, 32)
    rows = reader.read([DataFile(tmp_path / "a.txt"), DataFile(tmp_path / "b.jsonl")])
    assert [r.file for r in rows] == [int("b.jsonl" in r.where) for r in rows]
    assert {r.file for r in rows} == {0, 1}


@pytest.mark.parametrize(
    ("files", "small"),
    [
        ([[900], [4] * 10], {1}),  # 40 of 940 tokens
        ([[900], [4] * 9], set()),  # too few rows to hold some of them back
        ([[900], [6] * 10], set()),
        ([[900], [(50, 4)] * 10], {1}),  # what carries loss counts
        ([[10]] * 40, set()),  # of many files each may be small
        ([[10]] * 30 + [[1000]], set(range(30))),
        ([[5]], set()),
    ],
)
def test_a_file_is_small_beside_the_others(files, small):
    rows = [row(*(n if isinstance(n, tuple) else (n,))[:1], i, n[1] if isinstance(n, tuple) else None)
            for i, file in enumerate(files) for n in file]  # fmt: skip
    assert small_files(rows) == small


@pytest.mark.parametrize("told", [False, True])
def test_a_small_file_is_a_kind_by_itself(told, monkeypatch):
    """What is held back of it, and nothing else, says what becomes of it; the rest is told apart as before."""
    with Checkpoint.open(DATA / "finetuned") as checkpoint, Checkpoint.open(DATA / "base") as base:
        model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
        reader = RowReader(TextEncoder(DATA / "finetuned"), model.vocabulary, 64, truncate=True)
        rows = reader.read([DataFile(DATA / "retain.jsonl"), DataFile(DATA / "unseen.jsonl")], 6000)
        facts = reader.read([DataFile(DATA / "retain.jsonl"), DataFile(DATA / "unseen.jsonl")])
        big, few = [r for r in rows if r.file == 0], [r for r in facts if r.file == 1][:6]
        retain, held = [*big[::2], *few[:3]], [*big[1::2], *few[3:]]
        worse = {id(row) for row in (*big[::3], few[0], few[3])}
        monkeypatch.setattr(retained, "_improved", lambda model, rows, *ends: [id(row) not in worse for row in rows])
        ends = (Point(checkpoint), Point(checkpoint, base, 0.0))
        improved = [id(row) not in worse for row in held] if told else ()
        better, others, small = kinds(model, ends, retain, held, improved, {1})
        assert {r.where for part in small.parts for r in part} == {r.where for r in few[1:3]}
        assert len(small.held_out.score()) == 2
        assert len(better.held_out.score()) == sum(id(row) not in worse for row in big[1::2])
        assert len(others.held_out.score()) == sum(id(row) in worse for row in big[1::2]) + 1, (
            "nobody has what was not learnt to lose"
        )
        assert few[0].where in [r.where for part in others.parts for r in part]
        model.use(ends[0])
        assert mean_loss(small.held_out.score()) != mean_loss(better.held_out.score())
        # Nothing of it is held back: it cannot be told what becomes of it, and it goes with the rest.
        assert len(kinds(model, ends, retain, big[1::2], (), {1})) == 2
        worse |= {id(row) for row in (few[1], few[4])}
        assert len(kinds(model, ends, retain, held, (), {1})) == 2, "a file that was not learnt has nothing to lose"
        alone = kinds(model, (ends[0], None), retain, held, (), {1})
        assert [len(kind.held_out.score()) for kind in alone] == [len(held) - 3, 3]


@pytest.mark.parametrize(("bulk", "few"), [(20, 12), (300, 10), (3000, 50), (5, 30)])
def test_of_small_files_some_rows_are_held_back_and_some_are_read_however_few(bulk, few):
    rows = [row(200 + i % 7, 0) for i in range(bulk)] + [row(3 + i % 4, 1, 1) for i in range(few)]
    found, given = Texts(), DataOptions()
    _divide(found, rows, given, False, SILENT)
    assert found.small == {1}
    for part, limit in ((found.held_out, given.probe_tokens), (found.retain, given.retain_tokens)):
        small = [r for r in part if r.file == 1]
        assert small and sum(r.tokens for r in small) <= SMALL * limit + 7
        assert sum(r.tokens for r in part) <= (1 + SMALL) * limit + 7
    assert sum(r.file == 1 for r in found.held_out) == few // 5
    assert not {id(r) for r in found.held_out} & {id(r) for r in found.public}
    assert len(found.public) == bulk + few - len(found.held_out)
