"""Whole commands on generated pairs of real shapes: split, curvature and excise, with torch's inner loops and with Triton's.

Called by gpu.py. Seconds are without the import of torch (the first use of a kernel compiles it, which is in them); bytes are
those of the inputs and the output, each once.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from make_pair import SHAPES, make_pair

FEW = {"1b": 16, "7b": 2, "tiny": 2}
"""Layers that curvature and contrastive work on: the factors of a whole 7B take 64 GB a set."""
TOKENS = {"1b": 65_536, "7b": 65_536, "tiny": 256}
RANK = {"1b": 64, "7b": 64, "tiny": 8}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        title: for the table.
        words: its arguments, without where it runs and where it writes.
        reads: what goes in.
        out: what comes out.
        spent: outputs that no later command reads; they are deleted, because 7B pairs are large.
    """

    title: str
    words: list[str]
    reads: list[Path]
    out: Path
    spent: list[Path]


def jobs(work: Path, shape: str, kernels: str) -> Iterator[Job]:
    """List the commands for one shape; later ones use what earlier ones wrote."""
    base, finetuned = work / "base", work / "finetuned"
    pair, sides = [str(base), str(finetuned)], [base, finetuned]
    layers = "^model\\.layers\\.(" + "|".join(map(str, range(FEW[shape]))) + ")\\."
    loops, some = ["--kernels", kernels], f"{FEW[shape]} layers"
    names = ("edge", "retain", "forget", "contrastive", "svd", "mixed", "back")
    edge, retain, forget, contrastive, svd, mixed, back = (work / f"{name}-{kernels}" for name in names)
    yield Job("split svd, noise edge", ["split", *pair, "--noise-edge", *loops], sides, edge, [edge])
    words = ["curvature", str(finetuned), "--tensors", layers, "--dtype", "bfloat16", *loops, "--data"]
    title = f"curvature, {TOKENS[shape]:,} tokens, factors of {some}"
    yield Job(title, [*words, str(work / "retain.npy")], [finetuned], retain, [])
    half_way = ["--at", "0.5", "--reference", str(base), "--fisher", "empirical"]
    yield Job(f"{title}, half way", [*words, str(work / "forget.npy"), *half_way], sides, forget, [])
    words = ["split", *pair, "--method", "contrastive", "--strength", "0.1", "-i", layers, *loops]
    words += ["--retain", str(retain), "--forget", str(forget)]
    yield Job(f"split contrastive, {some}", words, [*sides, retain, forget], contrastive, [retain, forget, contrastive])
    rank = str(RANK[shape])
    yield Job(f"split svd, rank {rank}", ["split", *pair, "--rank", rank, *loops], sides, svd, [])
    yield Job("excise, β = 0.7", ["excise", str(svd), "--beta", "0.7"], [svd], mixed, [mixed])
    yield Job("excise, β = 1", ["excise", str(svd), "--beta", "1"], [svd], back, [svd, back])


def measure(folder: Path, shape: str, device: str) -> Iterator[str]:
    """Make the pair, run every command with both kinds of inner loops, and yield the lines of a table.

    Raises:
        SystemExit: when a command fails, or β = 1 does not give the fine-tuned files back.
    """
    work = folder / shape
    if not (work / "forget.npy").exists():
        make_pair(work, torch.bfloat16, device, **SHAPES[shape])
        draw = np.random.default_rng(0)
        for name in ("retain", "forget"):
            rows = TOKENS[shape] // 256
            np.save(work / f"{name}.npy", draw.integers(0, SHAPES[shape]["vocabulary"], (rows, 257)))
    yield "| job | inner loops | s | GB/s | peak GPU memory, GB |"
    yield "|---|---|---|---|---|"
    for kernels in ("torch", "triton"):
        for job in jobs(work, shape, kernels):
            found = _run(job, work / "figures.json", device)
            moved = sum(_nbytes(place) for place in [*job.reads, job.out])
            loops = "none" if job.words[0] == "excise" else kernels
            peak = f"{found['gpu_bytes'] / 1e9:.2f}" if found["gpu_bytes"] else "none"
            yield f"| {job.title} | {loops} | {found['seconds']:.1f} | {moved / found['seconds'] / 1e9:.2f} | {peak} |"
            if job.title == "excise, β = 1":
                for file in (work / "finetuned").glob("*.safetensors"):
                    if not filecmp.cmp(file, job.out / file.name, shallow=False):
                        raise SystemExit(f"{file.name}: β = 1 does not give it back")
            for place in job.spent:
                shutil.rmtree(place)


def _run(job: Job, figures: Path, device: str) -> dict[str, float]:
    where = [] if job.words[0] == "excise" else ["--device", device]
    command = [sys.executable, str(HERE / "gpu_run.py"), str(figures), *job.words, *where, "-q", "-o", str(job.out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job.title}: exit {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(figures.read_text())


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
