"""Shards are flushed while they are written; what the disk refuses then is not forgotten."""

import hashlib
import os

import numpy as np
import pytest

from liborth_cli.checkpoint import writer
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.errors import LiborthError

PLANNED = [(f"w{number}", "U8", (1000,)) for number in range(8)]


def fill(path):
    """Write a shard of eight tensors."""
    shard = ShardWriter(path, PLANNED)
    for number, entry in enumerate(PLANNED):
        shard.begin(*entry)
        shard.write(np.full(1000, number, np.uint8))
    return shard


def test_the_disk_begins_before_the_end_and_the_file_is_the_same(tmp_path, monkeypatch):
    plain = fill(tmp_path / "plain").finish()
    flushed = []
    monkeypatch.setattr(writer, "AHEAD", 2000)
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    ahead = fill(tmp_path / "ahead").finish()
    assert 1 <= len(flushed) <= 4
    assert ahead.sha256 == plain.sha256 == hashlib.sha256((tmp_path / "ahead").read_bytes()).hexdigest()


@pytest.mark.parametrize("end", ["finish", "abandon"])
def test_what_the_disk_refuses_beside_the_work_ends_it(tmp_path, monkeypatch, end):
    def refuse(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "AHEAD", 8000)
    monkeypatch.setattr(os, "fdatasync", refuse)
    shard = fill(tmp_path / "file")
    if end == "finish":
        with pytest.raises(LiborthError, match="Input/output error"):
            shard.finish()
        assert not (tmp_path / "file").exists()
    shard.abandon()
    assert not list(tmp_path.iterdir())
