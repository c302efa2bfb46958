"""JSON of strangers: one sound document within limits, or one line that says why not; in linear time."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from liborth_cli.checkpoint import documents
from liborth_cli.errors import BadInput, shown

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=10,
)
NOISE = [b"", b'"', b"{", b"[", b"\xff", b"\\ud800", b"9" * 5000, b"\0", b"NaN"]


@given(JSON, st.booleans())
def test_what_json_writes_is_read_back(value, escape):
    assert documents.parse(json.dumps(value, ensure_ascii=escape).encode()) == value


@given(JSON, st.randoms(use_true_random=False))
def test_whatever_is_changed_gives_a_document_or_a_reason(value, random):
    raw = bytearray(json.dumps(value).encode())
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(raw) + 1)
        raw[at : at + random.randint(0, 3)] = random.choice(
            [b"", b'"', b"{", b"[", b"\xff", b"\\ud800", b"9" * 5000, b"\0", b"NaN"]
        )
    try:
        documents.parse(bytes(raw))
    except documents.NotJson as error:
        assert len(str(error)) < 200


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b"[" * 65 + b"]" * 65, "more than 64"),
        (b"[" * 10**6, "within each other"),
        (b'{"a": {"b": 1, "b": 2}}', "names 'b' twice"),
        (b'{"%s": 1, "%s": 2}' % (b"x" * 10**5, b"x" * 10**5), "twice"),
        (b'{"a": "\\udc00"}', "surrogate"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_refused(raw, says):
    with pytest.raises(documents.NotJson, match=says) as refused:
        documents.parse(raw)
    assert len(str(refused.value)) < 200


def test_a_doubled_key_among_many_is_found():
    """In linear time: it took 40 seconds for 20,000 keys when every key was looked for from the beginning."""
    raw = b"{" + b",".join(b'"%x":0' % i for i in range(200_000)) + b',"%x":0}' % 199_999
    with pytest.raises(documents.NotJson, match="names '30d3f' twice"):
        documents.parse(raw)


def test_a_file_is_looked_at_before_it_is_read(tmp_path):
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (big, "larger than"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular|directory"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(BadInput, match=says):
            documents.load_json(path)
    with pytest.raises(BadInput, match="larger than"):
        documents.check_size(big)


class Named(BaseModel):
    name: str
    sizes: list[int] = []


@pytest.mark.parametrize(
    ("document", "says"), [([], "field ''"), ({}, "field 'name'"), ({"name": "a", "sizes": [1, "x" * 999]}, "field 'sizes.1'")]
)
def test_a_document_that_does_not_fit_its_record_is_refused_by_field(document, says):
    with pytest.raises(BadInput, match=says) as refused:
        documents.fit(Named, document, "file.json")
    assert len(str(refused.value)) < 200
    assert documents.fit(Named, {"name": "a"}, "file.json").sizes == []


def test_names_are_shown_short_and_printable():
    assert shown("a\x1b[31m") == r"'a\x1b[31m'"
    assert len(shown("x" * 10**6)) < 90
    assert shown("\ud800").isprintable()
