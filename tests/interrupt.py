"""A split that takes a moment, and how to tell when to stop it."""

import time
from pathlib import Path

from tiny import matrices


def slow_pair(folder: Path) -> Path:
    """Write a pair of 8 files each side that takes a moment to split."""
    return matrices(folder, [(400, 500)] * 16, shards=8)


def wait_for(partial: Path, finished: int) -> None:
    """Wait until the journal tells of this many finished files."""
    for _ in range(4000):
        journal = partial / "journal.jsonl"
        if journal.exists() and journal.read_text().count('"unit"') >= finished:
            return
        time.sleep(0.005)
    raise AssertionError("the run never got that far")
