"""A thousand damaged files for every reader of texts: a refusal in one line or rows, and nothing else."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
from tiny import OWNGPT

from liborth_cli.errors import BadInput, LiborthError
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.texts import DataFile, RowReader

FINETUNED = OWNGPT / "finetuned"
CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 1}], "tools": [{}]},
    {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
    },
]
ROWS = [{"prompt": "The code is ", "completion": "42"}, {"text": "to be"}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SPLICES = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\ud800",
    b"\\u0000",
    b",",
    b"\n",
    b"\xef\xbb\xbf",
    b"null",
    b"1e999",
    b"\x00",
    b"-1",
    b"\xff",
)


def parquet():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as module

    sink = io.BytesIO()
    module.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 3), sink)
    return sink.getvalue()


def npy():
    sink = io.BytesIO()
    np.save(sink, np.arange(24).reshape(4, 6))
    return sink.getvalue()


SEEDS = {
    "rows.jsonl": lambda: "\n".join(map(json.dumps, [*CHAT, *ROWS])).encode(),
    "rows.json": lambda: json.dumps([*CHAT, *ROWS], indent=1).encode(),
    "rows.csv": lambda: b'prompt,completion\n"a, b",c\nd,"e ""f"""\n',
    "rows.parquet": parquet,
    "rows.npy": npy,
}


def damaged(data, rng):
    """Change some bytes, cut, double or splice a file."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 3, 20))]
        elif kind == 2:
            data[at:at] = rng.choice(SPLICES)
        elif kind == 3:
            data[at:at] = data[max(at - 12, 0) : at]
        else:
            data = data[:at] if rng.randrange(4) == 0 else data
    return bytes(data)


@pytest.fixture(scope="module")
def encoder():
    found = TextEncoder(FINETUNED)
    found._tokenizer.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("secret", [False, True])
def test_damaged_texts(name, secret, encoder, tmp_path):
    seed, rng, refused = SEEDS[name](), random.Random(name), 0
    for _ in range(1000):
        (tmp_path / name).write_bytes(damaged(seed, rng))
        try:
            rows = RowReader(encoder, 72, 64).read([DataFile.parse(str(tmp_path / name), secret=secret)])
            assert all(row.tokens and row.keep.any() and row.ids.min() >= 0 and row.ids.max() < 72 for row in rows)
        except LiborthError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300 + len(str(tmp_path))
    assert 0 < refused < 1000


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_tokenizers(count, tmp_path):
    seeds = {file.name: file.read_bytes() for file in FINETUNED.glob("token*.json")}
    rng, refused = random.Random("tokenizer"), 0
    for _ in range(count):
        name = rng.choice(sorted(seeds))
        for file, data in seeds.items():
            (tmp_path / file).write_bytes(damaged(data, rng) if file == name else data)
        try:
            TextEncoder(tmp_path)._ids("to be or not to be")
        except BadInput:
            refused += 1
    assert refused
