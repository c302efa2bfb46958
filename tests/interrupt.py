"""A split that takes a moment, and how to tell when to stop it."""

import time
from pathlib import Path

import torch
from tiny import save


def slow_pair(folder: Path) -> Path:
    """Write a pair of 8 files each side that takes a moment to split."""
    g = torch.Generator().manual_seed(0)
    old = {f"layers.{i}.weight": torch.randn(400, 500, generator=g) for i in range(16)}
    new = {name: t + 0.1 * torch.randn(t.shape, generator=g) for name, t in old.items()}
    save(folder / "base", old, shards=8), save(folder / "finetuned", new, shards=8)
    return folder


def wait_for(partial: Path, finished: int) -> None:
    """Wait until the journal tells of this many finished files."""
    for _ in range(4000):
        journal = partial / "journal.jsonl"
        if journal.exists() and journal.read_text().count('"unit"') >= finished:
            return
        time.sleep(0.005)
    raise AssertionError("the run never got that far")
