"""`make bench-gpu` is ready: it refuses without a GPU in one line, and its code runs from end to end in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_parts

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


@pytest.mark.parametrize(
    ("end", "left"), [(None, "startup.md"), (gpu_parts.TooLate(), "startup.cut"), (ValueError(), "startup.cut")]
)
def test_what_a_part_found_before_it_was_cut_off_stays(end, left, tmp_path, monkeypatch):
    def found(part, asked):
        yield "a line"
        if end is not None:
            raise end

    monkeypatch.setattr(gpu_parts, "_found", found)
    (tmp_path / "results").mkdir()
    gpu_parts._run("startup", gpu_parts.Asked(tmp_path, "cpu", True, False, True), 60.0)
    assert (tmp_path / "results" / left).read_text() == "a line\n"
    assert (tmp_path / "results" / "startup.failed").exists() == (end is not None)


def test_only_what_is_open_on_the_page_gives_way_to_what_was_cut_off():
    assert gpu.OPEN.search("Not yet measured.\n") and gpu.OPEN.search(f"H200.\n\n{gpu.CUT}\n\n| a |")
    assert not gpu.OPEN.search(gpu.standing("gpu-kernels"))
