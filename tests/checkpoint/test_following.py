"""A file that is hashed behind its writer has the hash of the file; and what comes of pieces in any thread."""

import gc
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from liborth_cli.checkpoint import following
from liborth_cli.checkpoint.following import HashBehind
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.writer import Coming, ShardWriter

PLANNED = [("a", "U8", (3000,)), ("b", "U8", (5000,)), ("c", "U8", (100,))]


@pytest.fixture(autouse=True, params=[1, 2], ids=["one core", "two cores"])
def small_pieces(monkeypatch, request):
    monkeypatch.setattr(following, "PIECE", 256)
    monkeypatch.setattr(following, "available_cores", lambda: request.param)


def data(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def write(path, coming=Coming.PLANNED, planned=PLANNED, drop=()):
    writer = ShardWriter(path, PLANNED, coming=coming)
    for number, (name, dtype, shape) in enumerate(planned):
        writer.begin(name, dtype, shape)
        for piece in np.array_split(data(shape[0], number), 7):
            writer.write(piece)
        if name in drop:
            writer.discard()
    return writer, writer.finish()


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("coming", list(Coming))
def test_the_hash_is_the_files_whatever_was_certain_of_it(tmp_path, coming):
    _, written = write(tmp_path / "x", coming)
    assert written.sha256 == sha(tmp_path / "x") and written.size == (tmp_path / "x").stat().st_size


@pytest.mark.parametrize("drop", [{"a"}, {"b"}, {"c"}, {"a", "b"}])
def test_a_tensor_that_is_dropped_after_all_leaves_the_right_hash(tmp_path, drop):
    _, written = write(tmp_path / "x", Coming.PLANNED, drop=drop)
    assert written.sha256 == sha(tmp_path / "x")
    _, again = write(tmp_path / "y", Coming.FEWER, drop=drop)
    assert again.sha256 == written.sha256


def test_metadata_that_change_after_all_leave_the_right_hash(tmp_path):
    writer = ShardWriter(tmp_path / "x", PLANNED[:1], {"of": "aaaa"})
    writer.begin(*PLANNED[0])
    writer.write(data(3000))
    assert writer.finish({"of": "bbb"}).sha256 == sha(tmp_path / "x")


def test_what_is_planned_is_hashed_before_the_end(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the file was read again")

    monkeypatch.setattr("liborth_cli.checkpoint.writer.hash_open", refuse)
    _, written = write(tmp_path / "x")
    assert written.sha256 == sha(tmp_path / "x")
    with pytest.raises(AssertionError, match="read again"):
        write(tmp_path / "y", Coming.FEWER)


def test_pieces_from_many_threads_in_any_order(tmp_path):
    writer, all_of_it = ShardWriter(tmp_path / "x", PLANNED), data(5000)
    writer.begin(*PLANNED[0])
    writer.write(data(3000))
    writer.begin(*PLANNED[1])
    pieces = np.array_split(all_of_it, 50)
    places = [writer.place(len(piece)) for piece in pieces]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(writer.put, reversed(pieces), reversed(places)))
    for piece in pieces:
        writer.written(len(piece))
    writer.begin(*PLANNED[2])
    writer.write(data(100, 2))
    assert writer.finish().sha256 == sha(tmp_path / "x")
    assert all_of_it.tobytes() in (tmp_path / "x").read_bytes()


def test_a_file_that_cannot_be_read_is_told_of_at_the_end(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    behind = HashBehind(fd, b"abc")
    behind.reach(5000)
    with pytest.raises(OSError, match="shorter"):
        behind.finish()
    os.close(fd)


def test_a_writer_that_is_dropped_leaves_no_thread_and_no_descriptor(tmp_path):
    before = {thread.name for thread in threading.enumerate()}, len(os.listdir("/proc/self/fd"))
    for number in range(5):
        writer = ShardWriter(tmp_path / f"{number}", PLANNED)
        writer.begin(*PLANNED[0])
        writer.write(data(3000))
    del writer
    gc.collect()
    assert ({thread.name for thread in threading.enumerate()}, len(os.listdir("/proc/self/fd"))) == before


def test_where_the_system_has_no_more_threads_it_is_hashed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    behind_fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    os.write(behind_fd, data(4000).tobytes())
    behind = HashBehind(behind_fd, data(4000)[:10].tobytes())
    behind.reach(3990)
    assert behind.finish() == sha(tmp_path / "x")
    os.close(behind_fd)


def test_empty_tensors_in_any_order_are_where_the_plan_has_them(tmp_path):
    planned = [("a", "U8", (0,)), ("b", "U8", (300,)), ("c", "U8", (0,))]
    for name, order in (("x", (0, 1, 2)), ("y", (2, 1, 0)), ("z", (1, 0, 2))):
        writer = ShardWriter(tmp_path / name, planned, coming=Coming.ANY_ORDER)
        for number in order:
            writer.begin(*planned[number])
            writer.write(data(planned[number][2][0]))
        writer.finish()
    assert sha(tmp_path / "x") == sha(tmp_path / "y") == sha(tmp_path / "z")


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its length begins as a pickle does: 80 02 in hexadecimal."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode().ljust(640)
    (tmp_path / "model.safetensors").write_bytes((640).to_bytes(8, "little") + header + b"abc")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read("a").tobytes() == b"abc"
