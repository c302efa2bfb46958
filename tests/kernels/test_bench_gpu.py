"""`make bench-gpu` is ready: it refuses without a GPU in one line, and its code runs from end to end in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def bench(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, "--work", tmp_path / "work", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = bench(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("bench-gpu: no NVIDIA GPU")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_dry_run_goes_through_everything_and_records_nothing(tmp_path):
    pytest.importorskip("triton")
    page = SCRIPT.parents[1] / "docs" / "benchmarks.md"
    before = page.read_bytes()
    done = bench(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("startup", "kernels", "curvature", "split", "texts", "verify", "large"):
        assert f"== {part}: not done" not in done.stdout
        assert (tmp_path / "work" / "results" / f"{part}.md").read_text().strip(), part
    assert "× plain" in done.stdout
    assert "TOO LITTLE" not in done.stdout
    assert page.read_bytes() == before


def test_an_unknown_part_is_named(tmp_path):
    done = bench(tmp_path, "--only", "kernels,kurvature")
    assert done.returncode == 1
    assert done.stderr.startswith("bench-gpu: no part 'kurvature'; there are ")
