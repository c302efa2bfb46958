"""What a 70B costs, without having one: headers of Llama-3-70B's shapes over sparse files, and one real layer of them.

    python benchmarks/seventy.py --work DIR [--layer]
    python benchmarks/seventy.py --work DIR --sets
    python benchmarks/seventy.py --work DIR --walk

`inspect` and `split --dry-run` only read headers, so they are timed on the whole pair (282 GB that take up a few megabytes).
With --layer one decoder layer is made for real and split, and its time and memory are taken to the model's eighty. With --sets
`curvature --dry-run` says how large a factor set is, and what of 24 GiB a layer of it takes; nothing is computed. With --walk
`curvature` is run on real layers, or on what of them fits into 14 GiB, and what that takes stands beside what was planned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_shapes import LLAMA_7B, LLAMA_70B, Llama, headers_only
from make_pair import tensor_pair
from measure import LIBORTH, Measured, clear, median, run
from record import machine, record
from safetensors.torch import save_file

ROW = 512
"""Tokens of a row of a factor set."""
WALKED = (
    ("one layer of the 70B, up and down, bfloat16", Llama("one", 8192, 28672, 1, 1, vocabulary=1024),
     ["--dtype", "bfloat16", "--tensors", "up_proj|down_proj"]),
    ("two layers of half those widths, all matrices", Llama("two", 4096, 14336, 2, 1, vocabulary=1024), []),
)  # fmt: skip
"""Layers whose curvature is measured."""


def real_pairs(folder: Path) -> dict[str, Path]:
    """Write a pair of one real decoder layer, and a pair of each of its matrix shapes; return what each is."""
    made = {name: tensor_pair(shape, torch.bfloat16, seed) for seed, (name, shape) in enumerate(LLAMA_70B.layer(0))}
    shapes = {shape: name for name, shape in reversed(LLAMA_70B.layer(0)) if len(shape) == 2}
    pairs = {"one layer": made} | {" × ".join(map(str, shape)): {name: made[name]} for shape, name in shapes.items()}
    for number, tensors in enumerate(pairs.values()):
        for side, place in enumerate(("base", "finetuned")):
            out = folder / str(number) / place
            out.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: both[side] for name, both in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
            )
            (out / "config.json").write_text(json.dumps(LLAMA_70B.config))
    return {title: folder / str(number) for number, title in enumerate(pairs)}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory; with --layer it needs 9 GB")
    parser.add_argument("--layer", action="store_true", help="split one real layer, which takes minutes")
    parser.add_argument("--sets", action="store_true", help="only what factor sets take, by dry runs")
    parser.add_argument("--walk", action="store_true", help="only what curvature takes on real layers, in 2.5 GB of scratch")
    a = parser.parse_args()
    if a.sets or a.walk:
        (sets if a.sets else walks)(a.work)
        return
    sides = [a.work / side for side in ("reference", "finetuned")]
    for side in sides:
        headers_only(side, LLAMA_70B)
    dry = [LIBORTH, "split", *map(str, sides), "--rank", "64", "-o", str(a.work / "out"), "--dry-run", "--json"]
    rows: list[tuple[str, Measured]] = []
    for title, command in {
        "`liborth --help`": [LIBORTH, "--help"],
        "`inspect`, 723 tensors in 30 files": [LIBORTH, "inspect", str(sides[1])],
        "`split --dry-run`, both sides": dry,
    }.items():
        rows.append((title, median([run(command) for _ in range(5)])))
    if a.layer:
        for title, pair in real_pairs(a.work / "layer").items():
            command = [LIBORTH, "split", str(pair / "base"), str(pair / "finetuned"), "--rank", "64", "-o", str(a.work / "one")]
            rows.append((f"`split --rank 64`, {title}", run(command)))
            clear(a.work / "one")
            report(rows)
    report(rows)


def sets(work: Path) -> None:
    """Record what a factor set of a 7B and of a 70B takes on disk, and what it takes to be measured in 24 GiB."""
    lines = ["| model | set on disk, at most, GB | memory, of 24 GiB (25.8 GB) |", "|---|---|---|"]
    for model in (LLAMA_7B, LLAMA_70B):
        folder = headers_only(work / f"sets-{model.name}", model)
        found = planned(folder, rows_in(work, 8), work, ["--memory", "24GiB"])
        told = f"{found['memory_bytes'] / 1e9:.1f} GB, one block at a time" if "error" not in found else found["error"]
        disk = f"{found['disk_bytes'] / 1e9:.1f}" if "error" not in found else "not told"
        lines.append(f"| Llama {model.name} | {disk} | {told} |")
        print(lines[-1], flush=True)
    head = f"By shapes; rows of {ROW} tokens. What q, k and v share, and gate and up, is counted with each."
    record("seventy-sets", f"{head}\n\n" + "\n".join(lines))


def walks(work: Path) -> None:
    """Record what `curvature` takes of real layers, beside what it planned."""
    lines = ["| layers | planned GB | peak GB | of it anonymous | CPU s |", "|---|---|---|---|---|"]
    for title, model, words in WALKED:
        folder = headers_only(work / f"walk-{model.name}", model)
        file = next(folder.glob("*.safetensors"))
        draw = torch.Generator().manual_seed(0)
        tensors = {n: 0.02 * torch.randn(s, generator=draw).bfloat16() if len(s) > 1 else torch.ones(s).bfloat16()
                   for n, s in model.tensors}  # fmt: skip
        save_file(tensors, file, metadata={"format": "pt"})
        del tensors
        data, more = rows_in(work, 2), [*words, "--weights", "stream", "--memory", "14GiB"]
        plan = planned(folder, data, work, more)
        took = run(_curvature(folder, data, work, more))
        each = [plan["memory_bytes"] / 1e9, took.resident_mib * 2**20 / 1e9, took.anonymous_mib * 2**20 / 1e9]
        lines.append(f"| {title} | {' | '.join(f'{one:.1f}' for one in each)} | {took.cpu_seconds:.0f} |")
        print(lines[-1], flush=True)
        clear(work / "set", folder)
    head = f"{machine()}. Two rows of {ROW} tokens, block inputs in a file."
    record("seventy-walks", f"{head}\n\n" + "\n".join(lines))


def rows_in(work: Path, count: int) -> Path:
    """Write so many rows of tokens."""
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "rows.npy", np.random.default_rng(0).integers(3, 1000, (count, ROW + 1)))
    return work / "rows.npy"


def planned(folder: Path, data: Path, work: Path, more: Sequence[str]) -> dict[str, Any]:
    """Return what a dry run says, or the "error" that it ends with."""
    command = [*_curvature(folder, data, work, more), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()}


def _curvature(folder: Path, data: Path, work: Path, more: Sequence[str]) -> list[str]:
    return [LIBORTH, "curvature", str(folder), "--data", str(data), "--scratch", str(work), "-o", str(work / "set"), *more]


def report(rows: list[tuple[str, Measured]]) -> None:
    """Print and record what has been measured so far."""
    lines = ["| job | wall s | CPU s | peak MiB | of it anonymous |", "|---|---|---|---|---|"]
    for title, m in rows:
        lines.append(f"| {title} | {m.seconds:.2f} | {m.cpu_seconds:.2f} | {m.resident_mib:.0f} | {m.anonymous_mib:.0f} |")
    text = f"{machine()}. Medians of five runs; real weights once.\n\n" + "\n".join(lines) + "\n"
    for title, m in rows:
        if title.endswith("one layer"):
            hours = LLAMA_70B.layers * m.cpu_seconds / 3600
            text += f"\nEighty layers at that rate: {hours:.1f} hours of one processor, in the same memory."
    print(text, flush=True)
    record("seventy", text)


if __name__ == "__main__":
    main()
