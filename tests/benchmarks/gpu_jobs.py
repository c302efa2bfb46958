"""Whole commands on generated pairs of real shapes: split, curvature and excise, with torch's inner loops and with Triton's.

Called by gpu.py. Seconds are without the imports; bytes are those of the inputs and the output, each once.
"""

from __future__ import annotations

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
    """A command, what it reads, and where it writes."""

    title: str
    words: list[str]
    reads: list[Path]
    out: Path


def jobs(work: Path, shape: str, kernels: str) -> Iterator[Job]:
    """List the commands for one shape; later ones use what earlier ones wrote."""
    base, finetuned = work / "base", work / "finetuned"
    pair, sides = [str(base), str(finetuned)], [base, finetuned]
    layers = "^model\\.layers\\.([0-9]|1[0-5])\\." if FEW[shape] == 16 else f"^model\\.layers\\.[0-{FEW[shape] - 1}]\\."
    loops, seen = ["--kernels", kernels], f"{FEW[shape]} layers"
    out = {name: work / f"{name}-{kernels}" for name in ("svd", "edge", "retain", "forget", "contrastive", "mixed", "back")}
    yield Job(f"split svd, rank {RANK[shape]}", ["split", *pair, "--rank", str(RANK[shape]), *loops], sides, out["svd"])
    yield Job("split svd, noise edge", ["split", *pair, "--noise-edge", *loops], sides, out["edge"])
    for name, more in {"retain": [], "forget": ["--at", "0.5", "--reference", str(base), "--fisher", "empirical"]}.items():
        words = ["curvature", str(finetuned), "--data", str(work / f"{name}.npy"), "--tensors", layers, "--dtype", "bfloat16"]
        title = f"curvature, {TOKENS[shape]:,} tokens, factors of {seen}{', half way' if more else ''}"
        yield Job(title, [*words, *more, *loops], sides if more else [finetuned], out[name])
    factors = ["--retain", str(out["retain"]), "--forget", str(out["forget"])]
    words = ["split", *pair, "--method", "contrastive", "--strength", "0.1", *factors, "-i", layers, *loops]
    yield Job(f"split contrastive, {seen}", words, [*sides, out["retain"], out["forget"]], out["contrastive"])
    yield Job("excise, β = 0.7", ["excise", str(out["svd"]), "--beta", "0.7"], [out["svd"]], out["mixed"])
    yield Job("excise, β = 1", ["excise", str(out["svd"]), "--beta", "1"], [out["svd"]], out["back"])


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
        made = []
        for job in jobs(work, shape, kernels):
            where = ["--device", device] if job.words[0] != "excise" else []
            figures = work / "figures.json"
            command = [sys.executable, str(HERE / "gpu_run.py"), str(figures), *job.words, *where, "-q", "-o", str(job.out)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{job.title}: exit {done.returncode}: {done.stderr[-2000:]}")
            found = json.loads(figures.read_text())
            moved = sum(_nbytes(place) for place in [*job.reads, job.out])
            loops = kernels if job.words[0] != "excise" else "none"
            peak = f"{found['gpu_bytes'] / 1e9:.2f}" if found["gpu_bytes"] else "none"
            yield f"| {job.title} | {loops} | {found['seconds']:.1f} | {moved / found['seconds'] / 1e9:.2f} | {peak} |"
            made.append(job.out)
        for file in (work / "finetuned").glob("*.safetensors"):
            if file.read_bytes() != (made[-1] / file.name).read_bytes():
                raise SystemExit(f"{file.name}: β = 1 does not give it back")
        for place in made:
            shutil.rmtree(place)


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
