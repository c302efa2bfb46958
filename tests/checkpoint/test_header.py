"""The header: byte for byte what the library writes, and nothing hostile gets through."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import save, weights

from liborth_cli.checkpoint import header
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TENSOR_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@given(
    st.dictionaries(TENSOR_NAMES, st.tuples(st.sampled_from(list(NAMES)), st.lists(st.integers(0, 4), max_size=3)), max_size=6)
)
def test_build_equals_save_file(tmp_path_factory, described):
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    tensors = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in described.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    raw = file.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    triples = [(name, NAMES[dtype], tuple(shape)) for name, (dtype, shape) in described.items()]
    rank = {dtype: position for position, dtype in enumerate(DTYPES)}
    entries = header.plan(sorted(triples, key=lambda one: (-rank[one[1]], one[0])))  # widest alignment first, then by name
    assert header.build(entries) == raw[:length]
    parsed, metadata = header.parse(raw[8:length], len(raw) - length, "file")
    assert {e.name: (e.dtype, e.shape, e.nbytes) for e in parsed} == {e.name: (e.dtype, e.shape, e.nbytes) for e in entries}
    assert metadata == {"format": "pt"}


def _entry(start=0, stop=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "not a JSON object"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": _entry(dtype="F99")}, "unknown dtype 'F99'"),
        ({"a": _entry(shape=(2,))}, "does not fill"),
        ({"a": _entry(shape=(-1,))}, "does not fill"),
        ({"a": _entry(4, 8)}, "overlaps its neighbour or leaves a hole"),
        ({"a": _entry(), "b": _entry()}, "overlaps"),
        ({"a": _entry(0, 4), "b": _entry(4, 8), "c": _entry(8, 12)}, "truncated, 4 bytes are missing"),
        ({"a": _entry()}, "4 bytes follow the last tensor"),
        ({"__metadata__": {"a": 1}}, "map of strings"),
    ],
)
def test_parse_refuses(document, says):
    with pytest.raises(BadInput, match=says):
        header.parse(json.dumps(document).encode(), 8, "file")


def test_parse_refuses_duplicates_and_noise():
    with pytest.raises(BadInput, match="'a' twice"):
        header.parse(b'{"a":1,"a":2}', 0, "file")
    for raw in (b"\xff\xfe", b"{", "{}".encode("utf-16"), b"[" * 100_000, b"[" * 70 + b"]" * 70, b'{"\\ud800": 1}'):
        with pytest.raises(BadInput, match=r"not JSON|within each other|surrogate"):
            header.parse(raw, 0, "file")


def test_every_dtype_of_the_table_has_a_torch_twin_or_none():
    for name, dtype in DTYPES.items():
        if dtype.torch:
            assert getattr(torch, dtype.torch).itemsize * 8 == dtype.bits, name
        if dtype.editable:
            assert DTYPES[dtype.bit_view].bits == dtype.bits


def test_reads_what_the_library_wrote(tmp_path):
    tensors = weights(torch.bfloat16)
    with Checkpoint.open(save(tmp_path, tensors)) as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.read(name).tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_metadata_that_is_null_is_none_as_the_library_reads_it(tmp_path, cli):
    from safetensors import safe_open
    from tiny import pair

    pair(tmp_path)
    for side in ("base", "finetuned"):
        for file in (tmp_path / side).glob("*.safetensors"):
            raw = file.read_bytes()
            length = 8 + int.from_bytes(raw[:8], "little")
            document = json.loads(raw[8:length]) | {"__metadata__": None}
            text = json.dumps(document).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + raw[length:])
            with safe_open(file, "pt") as opened:
                assert opened.metadata() is None
    assert cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 4, "-o", tmp_path / "out", "-q")[0] == 0
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "back", "-q")[0] == 0
    for file in (tmp_path / "finetuned").glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
