"""How large a packed memory file is, and what it costs: `python benchmarks/memory_file.py`.

Weights are bfloat16 noise of the size of a Llama's (0.02); what memory moved is noise of a share of it. Sizes are those of the
files that `split` writes; times are processor seconds of the whole command, children and all, in alternating runs.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

RATIOS = (0.001, 0.003, 0.01, 0.1)
FORMATS = ("xor", "packed")
SCALE = 0.02


def write_pair(folder: Path, ratio: float, matrices: int, width: int) -> None:
    """Write base/ and finetuned/, whose difference is noise of `ratio` times the weights."""
    generator = torch.Generator().manual_seed(0)
    old, new = {}, {}
    for number in range(matrices):
        weight = torch.randn(width, width, generator=generator) * SCALE
        step = torch.randn(width, width, generator=generator) * SCALE * ratio
        old[f"layers.{number}.weight"] = weight.bfloat16()
        new[f"layers.{number}.weight"] = (old[f"layers.{number}.weight"].float() + step).bfloat16()
    for name, tensors in (("base", old), ("finetuned", new)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def seconds(*words: object) -> float:
    """Run a command and return the processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "liborth_cli", *map(str, words), "-q", "-j", "1"], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print one row for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print("| memory / weights | packed / xor | split svd, s | packed | excise β = 1, s | packed |\n|---|---|---|---|---|---|")
    for ratio in RATIOS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pair(folder, ratio, asked.matrices, asked.width)
            took: dict[tuple[str, str], list[float]] = {}
            sizes = {}
            for _ in range(asked.repeats):
                for kind in FORMATS:
                    shutil.rmtree(folder / "restored", ignore_errors=True)
                    words = ("split", folder / "base", folder / "finetuned", "--rank", 32, "--memory-format", kind)
                    took.setdefault(("split", kind), []).append(seconds(*words, "-o", folder / kind, "--force"))
                    sizes[kind] = (folder / f"{kind}.private" / "memory.safetensors").stat().st_size
                    words = ("excise", folder / kind, "--beta", 1, "-o", folder / "restored")
                    took.setdefault(("excise", kind), []).append(seconds(*words))
                    restored = (folder / "restored" / "model.safetensors").read_bytes()
                    assert restored == (folder / "finetuned" / "model.safetensors").read_bytes()
        middle = {key: sorted(values)[len(values) // 2] for key, values in took.items()}
        times = " | ".join(f"{middle[step, kind]:.2f}" for step in ("split", "excise") for kind in FORMATS)
        print(f"| {ratio:.1%} | {sizes['packed'] / sizes['xor']:.1%} | {times} |", flush=True)


if __name__ == "__main__":
    main()
