"""Journals, owner files and manifests of ours are parsed into records, and believed as far as they can be read."""

import json

import pytest

from liborth_cli.checkpoint.claim import foreign
from liborth_cli.checkpoint.documents import json_lines
from liborth_cli.checkpoint.journal import Lines, owner_of

OWNER = "0" * 32
HEAD = {"owner": OWNER, "plan": "p", "private": "/x"}
UNIT = {"unit": "part", "files": [{"name": "a", "size": 1, "sha256": "0" * 64}], "inputs": {"in": "hash"}, "kept": [1]}


def test_a_whole_journal_comes_back_as_it_was_written():
    lines = Lines(
        json_lines([HEAD, UNIT, {"unit": "odd", "files": []}, {"unit": "no", "inputs": {}}, {"commit": [[1, 2], [3, 4]]}])
    )
    assert lines.head and lines.head.owner == OWNER and lines.commit == [(1, 2), (3, 4)] and lines.count == 5
    (unit,) = lines.units  # one that does not name its inputs is made again
    assert unit.line | {"private": []} == UNIT | {"private": []}
    assert Lines(json_lines([HEAD, {"commit": [[1, 2]]}, UNIT])).commit is None, "work went on after it"


@pytest.mark.parametrize(
    "line",
    [
        b'{"unit": "part"', b"5", b'{"unit": 1, "files": [], "inputs": {}}', b'{"commit": []}', b'{"commit": [[1, "x"]]}',
        b'{"unit": "p", "files": [{"name": "../a", "size": 1, "sha256": ""}], "inputs": {}}', b"{" * 100_000,
        b'{"unit": "p", "files": [], "inputs": {}, "inputs": {}}', b'{"unit": "p", "files": [], "inputs": {"a": 1}}',
    ],
)  # fmt: skip
def test_nothing_after_a_line_that_cannot_be_read_is_believed(line):
    lines = Lines(json_lines([HEAD]) + line + b"\n" + json_lines([UNIT]))
    assert lines.count == 1 and lines.commit is None and not lines.units


@pytest.mark.parametrize(
    "raw", [None, b"", b"{}", b'{"id": 5}', b'{"id": "x"}', b'{"id": "%s"' % OWNER.encode(), b"[" * 10_000]
)
def test_an_owner_file_that_is_none(raw):
    assert owner_of(raw) is None
    assert owner_of(json.dumps({"id": OWNER}).encode()) == OWNER


def test_a_size_that_is_no_number_is_no_bug(tmp_path):
    """1e999 is infinity to a JSON parser; --force over such a manifest ended in an unexpected OverflowError."""
    (tmp_path / "liborth.manifest.json").write_text('{"outputs": [{"name": "a", "size": 1e999, "sha256": ""}]}')
    assert foreign(tmp_path) == "liborth.manifest.json"
