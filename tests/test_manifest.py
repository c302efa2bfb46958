"""Manifests: any change is found, anything that does not fit the records is one line, older ones are still read."""

import copy
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import pair, reseal

from liborth_cli import manifest
from liborth_cli.errors import BadInput


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One output of `split`, to be copied or read."""
    from liborth_cli.checkpoint.hub import Source
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.console import Console
    from liborth_cli.machine import configure
    from liborth_cli.methods import Amount
    from liborth_cli.split import SplitOptions, Splitter
    from liborth_cli.split.write import Destination, write_split

    folder = tmp_path_factory.mktemp("manifest")
    base, finetuned = pair(folder)
    with Checkpoint.open(base) as old, Checkpoint.open(finetuned) as new:
        plan = Splitter(old, new, SplitOptions("svd", Amount("rank", 2)))
        to = Destination(folder / "out", (Source(base), Source(finetuned)))
        write_split(plan, to, configure("cpu", 1), Console(quiet=True))
    return folder / "out"


@pytest.fixture
def file(written, tmp_path):
    copied = tmp_path / manifest.FILE
    copied.write_bytes((written / manifest.FILE).read_bytes())
    return copied


def test_what_is_written_is_what_is_read(written):
    found = manifest.read(written, manifest.Split)
    raw = (written / manifest.FILE).read_bytes()
    assert manifest.dump(found) == raw
    assert found.document == json.loads(raw)
    assert found.digest == manifest.sealed(found.document)["digest"]
    assert found.tensors["layers.0.up.weight"].action == "split"
    assert found.parameters.policy.vectors == "skill"
    assert set(found.weights) == {"model.safetensors"}


def test_every_changed_byte_is_found(file):
    """Any bit, any byte, a byte more or less, or another way of spacing: the seal does not fit."""
    raw, draw = file.read_bytes(), random.Random(0)
    for _ in range(400):
        changed = bytearray(raw)
        place = draw.randrange(len(raw))
        changed[place] = draw.choice([changed[place] ^ 1 << draw.randrange(8), (changed[place] + draw.randrange(1, 256)) % 256])
        file.write_bytes(changed)
        with pytest.raises(BadInput) as error:
            manifest.read(file)
        assert len(str(error.value)) < 300
    for other in (raw[:-1], raw + b"\n", json.dumps(json.loads(raw)).encode(), json.dumps(json.loads(raw), indent=1).encode()):
        file.write_bytes(other)
        with pytest.raises(BadInput, match=r"changed by hand|damaged"):
            manifest.read(file)


PLACES = [
    ("outputs",), ("inputs",), ("parameters",), ("tensors",), ("totals",), ("factors",), ("kind",), ("schema_version",),
    ("libraries",), ("outputs", 0), ("outputs", 0, "name"), ("outputs", 0, "size"), ("outputs", 0, "sha256"),
    ("inputs", "finetuned"), ("inputs", "finetuned", "files"), ("parameters", "alpha"), ("parameters", "policy"),
    ("tensors", "layers.0.up.weight"), ("tensors", "layers.0.up.weight", "action"), ("tensors", "layers.0.up.weight", "energy"),
    ("totals", "energy"), ("digest",), ("private",), ("dose",),
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON, gone=st.booleans())
def test_anything_else_in_a_field_is_one_line(written, file, place, value, gone):
    document = json.loads((written / manifest.FILE).read_bytes())
    target = document
    for key in place[:-1]:
        target = target[key]
    if gone and place[-1] in (target if isinstance(target, dict) else ()):
        del target[place[-1]]
    else:
        target[place[-1]] = value
    try:
        file.write_bytes(manifest.dump(document))
        found = manifest.read(file)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) < 300 + len(str(file))
    else:
        assert found.kind in manifest.KINDS


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b/c", "..", "a/..", "a//b", "", "x\0y", "n" * 512])
def test_a_file_outside_the_directory_is_refused(file, name):
    reseal(file.parent, lambda m: m["outputs"][0].update(name=name))
    with pytest.raises(BadInput, match=r"outputs\.0\.name"):
        manifest.read(file)


def test_no_file_a_pipe_and_a_directory_are_refused(tmp_path):
    import os

    with pytest.raises(BadInput, match=r"no liborth\.manifest\.json here"):
        manifest.read(tmp_path)
    os.mkfifo(tmp_path / manifest.FILE)
    with pytest.raises(BadInput, match="not a regular file"):
        manifest.read(tmp_path)
    os.unlink(tmp_path / manifest.FILE)
    (tmp_path / manifest.FILE).mkdir()
    with pytest.raises(BadInput):
        manifest.read(tmp_path)
    (tmp_path / manifest.FILE).rmdir()
    (tmp_path / manifest.FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="cannot be read"):
        manifest.read(tmp_path)


def test_an_older_manifest_is_still_read(written, file):
    """Version 1: no digest, the memory among the outputs, one forget set without a list, a hash of its rows."""
    document = copy.deepcopy(manifest.read(written).document)
    used = {"model": "0" * 64, "data": ["1" * 64], "at": 0.5, "fisher": "empirical", "tokens": 12}
    memory = {"name": "memory.safetensors", "size": 1, "sha256": "2" * 64}
    del document["digest"]
    document |= {"schema_version": 1, "factors": {"forget": used}, "outputs": [*document["outputs"], memory]}
    file.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    found = manifest.read(file, manifest.Split)
    assert [one.at for one in found.factors.forget] == [0.5]
    assert set(found.weights) == {"model.safetensors"}
    file.write_text(json.dumps({**document, "digest": "0" * 64}))
    with pytest.raises(BadInput, match="digest"):
        manifest.read(file)


def test_numbers_that_json_has_no_words_for_become_null():
    assert manifest.finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {"a": [None, 1.0], "b": [None]}
