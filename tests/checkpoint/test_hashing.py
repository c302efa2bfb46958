"""Hashes name the whole file, however it was read."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from liborth_cli.checkpoint import hashing
from liborth_cli.checkpoint.hashing import BackgroundHasher, ReadHash
from liborth_cli.checkpoint.reader import Shard
from liborth_cli.errors import BadInput


@pytest.fixture
def shard(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "PIECE", 1000)
    save_file({"a": torch.arange(5000), "b": torch.randn(777)}, tmp_path / "x.safetensors")
    return Shard(tmp_path / "x.safetensors")


def truth(shard):
    return hashlib.sha256(shard.path.read_bytes()).hexdigest()


def spans(shard, step=613):
    return [(at, min(step, shard.size - at)) for at in range(len(shard.header), shard.size, step)]


def in_order(shard):
    return spans(shard)


def with_gaps(shard):
    return spans(shard)[1::3]


def twice_and_overlapping(shard):
    return [span for span in spans(shard) for _ in range(2)] + spans(shard, 1001)


def shuffled(shard):
    found = spans(shard)
    random.Random(0).shuffle(found)
    return found


def nothing(shard):
    return []


@pytest.mark.parametrize("reads", [in_order, with_gaps, twice_and_overlapping, shuffled, nothing])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_reads_hash_the_file(shard, reads, threads):
    seen = ReadHash(shard)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda span: shard.read_into(np.empty(span[1], np.uint8), span[0]), reads(shard)))
    found = seen.finish()
    assert (found.name, found.size, found.sha256) == (shard.name, shard.size, truth(shard))


def test_what_is_in_order_is_read_once(shard, monkeypatch):
    seen = ReadHash(shard)
    for at, count in spans(shard):
        shard.read_into(np.empty(count, np.uint8), at)
    monkeypatch.setattr(Shard, "read_into", None)
    assert seen.finish().sha256 == truth(shard)


def test_a_head_start_takes_what_it_can(shard, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"nothing of the kind")
    hasher = BackgroundHasher.head_start(str(shard.path), "org/name", None, str(tmp_path / "junk.safetensors"))
    hasher.ask(shard.path)
    assert {path: w.sha256 for path, w in hasher.collect().items()} == {shard.path: truth(shard)}


def test_a_head_start_on_another_file_is_noticed(shard):
    """The file is replaced after hashing began and before the split opened it: the hash is not of what the split reads."""
    hasher = BackgroundHasher.head_start(str(shard.path))
    hasher.collect()
    hasher.check_same([shard])
    raw = shard.path.read_bytes()
    shard.path.unlink()
    shard.path.write_bytes(raw[:-1] + b"?")
    with pytest.raises(BadInput, match="changed"):
        hasher.check_same([Shard(shard.path)])


def test_threads_end_when_nothing_is_left_to_hash_and_begin_again(tmp_path):
    """A process that runs many commands keeps no thread of a hasher whose work is done, nor its buffer."""
    before = set(threading.enumerate())
    hasher = BackgroundHasher()
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
        assert hasher.wait(tmp_path / name).size == 1
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
        assert set(threading.enumerate()) <= before
    assert [file.name for file in hasher.collect().values()] == ["a", "b"]
