"""What a 1B, a 7B and a 70B cost: planned by the real code from headers over holes, timed with this machine's own rates.

    python benchmarks/costs.py            # prints the table of docs/scaling.md
    python benchmarks/costs.py --write    # puts it there

Nothing here was run on such models. Bytes and multiply-adds are counted as `--dry-run` counts them; how many of them one core
does a second is measured in processor time, so that a busy machine says the same as a free one.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llama_shapes import LLAMA_70B, Llama, headers_only
from record import machine, record

from liborth_cli.api import split
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import duration, size
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.plan import Resources
from liborth_cli.dose import passes
from liborth_cli.dose.passes import retain_options
from liborth_cli.machine import TRAINING_BYTES, configure
from liborth_cli.split import report
from liborth_cli.split.report import BASE_BYTES
from liborth_cli.stream import work
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify.attacks import BATCH_ROWS, PRODUCTS, QUICK, STEPS

MODELS = (Llama("1B", 2048, 8192, 16, 1), Llama("7B", 4096, 11008, 32, 3), LLAMA_70B)
RETAIN, FORGET, LENGTH = 50_000, 2_000, 500
"""Tokens to keep good at, which is the default, and to forget; and of a row."""
PLENTY, EXCISE = 1 << 44, 39 << 20
"""Memory that is no limit here; and what excise takes at any size (docs/benchmarks.md)."""
TAUGHT, STATES = 30, 5
"""Tokens of a canary; models that rows are scored in."""


@dataclass(frozen=True)
class Cost:
    """What one command takes on one core."""

    command: str
    seconds: float
    memory: float
    disk: float


def one_core() -> float:
    """Return multiply-adds a second of processor time."""
    torch.set_num_threads(1)
    a, best = torch.ones(1024, 1024), 1e9
    for _ in range(5):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 1024**3 / best


def texts(file: Path, tokens: int) -> Path:
    """Write rows of tokens that are only counted."""
    np.save(file, np.random.default_rng(0).integers(0, 1000, (tokens // LENGTH, LENGTH + 1)))
    return file


def costs(base: Path, finetuned: Path, llama: Llama) -> list[Cost]:
    """Plan every command on a pair of headers."""
    run, folder = configure("cpu", 1), base.parent
    retain, forget = texts(folder / "retain.npy", 5 * RETAIN // 4), texts(folder / "forget.npy", FORGET)
    planned = split(base, finetuned, folder / "out", method="svd", rank=32, dry_run=True)
    measured = split(base, finetuned, folder / "out", method="tokenwise", retain_data=retain, forget_data=forget, dry_run=True)
    svd, tokenwise = (one.document["estimate"] for one in (planned, measured))
    with Checkpoint.open(finetuned) as new, contextlib.closing(BlockModel(Point(new), torch.float32, run.device)) as model:
        rows = [Row(ids, np.ones(LENGTH, bool), 1.0, "") for ids in np.load(retain)[: RETAIN // LENGTH]]
        walk = Estimator(Point(new), model, rows, retain_options((), 0, "float32"), Resources(PLENTY, weights="stream"), run)
        runs = 2 * sum(attack.trainings for attack in QUICK)
        trained = PRODUCTS * work.multiplied(model) * BATCH_ROWS * TAUGHT * STEPS * runs
        scored = STATES * (RETAIN // 5 + FORGET) * work.multiplied(model)
        watched = (trained + scored) / work.rate(run.device) + 4 * new.nbytes / work.DISK_RATE
        waiting, read = walk.state_bytes, 3 * new.nbytes / work.DISK_RATE
        return [
            Cost("`split --method svd --rank 32`", svd["seconds"], svd["memory_bytes"], svd["disk_bytes"]),
            Cost("`split --retain-data --forget-data`", tokenwise["seconds"], tokenwise["memory_bytes"] - waiting,
                 tokenwise["disk_bytes"] + waiting),
            Cost("`excise --beta 1`", read, EXCISE, new.nbytes),
            Cost("`curvature`", walk.seconds, walk.memory_bytes - waiting, walk.disk_bytes + 2 * waiting),
            Cost("`verify`, with its attack", watched, BASE_BYTES + TRAINING_BYTES * model.elements, 0),
        ]  # fmt: skip


def table(folder: Path) -> str:
    """Render what every command costs on every model."""
    speed = one_core()
    work.rate = report.rate = lambda device, dtype="float32": speed  # type: ignore[assignment]
    passes.available_bytes = lambda: PLENTY  # what fits here is another question
    lines = ["| model | command | one core | memory | disk |", "|---|---|---:|---:|---:|"]
    for model in MODELS:
        pair = [headers_only(folder / f"{model.name}-{side}", model) for side in ("base", "finetuned")]
        for cost in costs(*pair, model):
            disk = size(cost.disk) if cost.disk else "–"
            lines.append(f"| {model.name} | {cost.command} | {duration(cost.seconds)} | {size(cost.memory)} | {disk} |")
    disk = f"{work.DISK_RATE / 1e9:.0f} GB/s of disk, assumed"
    rates = f"{speed / 1e9:.0f} billion multiply-adds a second of one core in float32, measured; {disk}"
    return f"{machine()}. {rates}.\n\n" + "\n".join(lines)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = table(Path(folder))
    print(text)
    if a.write:
        record("costs", text, "scaling.md")


if __name__ == "__main__":
    main()
