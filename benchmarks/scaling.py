"""What many ranks would take on models of 70B and 405B: planned and dealt by the real code from headers, timed by assumptions.

    python benchmarks/scaling.py            # prints the table of docs/scaling.md
    python benchmarks/scaling.py --write    # puts it there

Nothing here was run on such machines. Bytes, multiplications and reductions are counted from shapes; the rates are assumed, and
stand beside the table.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llama_shapes import KEYS, LLAMA_70B, LLAMA_405B, Llama, headers_only
from record import record

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.methods import Amount
from liborth_cli.ranks import deal
from liborth_cli.split import SplitOptions, Splitter

TOKENS = 1_000_000


def sums_of(model: Llama) -> int:
    """Return the bytes of the float32 sums of all blocks: A, which q, k, v and gate, up share, and G."""
    h, m = model.hidden, model.intermediate
    return 4 * model.layers * (3 * h * h + m * m + 3 * h * h + 2 * KEYS * KEYS + 2 * m * m)


@dataclass(frozen=True)
class Machine:
    """Assumed rates of one node of 8 GPUs, a second."""

    file_system: float = 5e9
    network: float = 25e9
    hashing: float = 1.5e9
    decompositions: float = 5e12
    products: float = 300e12
    host_to_gpu: float = 20e9
    gpus: int = 8


@dataclass(frozen=True)
class Dealt:
    """A split, planned and dealt.

    Attributes:
        files: how many.
        seconds: processor time of opening, planning and dealing.
        peak: resident bytes at most.
        shares: ranks → bytes of the fine-tuned files of the rank that has most, and multiplications of that rank.
    """

    files: int
    seconds: float
    peak: int
    shares: dict[int, tuple[float, float]]


def plan_and_deal(base: Path, finetuned: Path, sizes: tuple[int, ...]) -> Dealt:
    """Open a pair, plan a split and deal its files, from headers."""
    start = time.process_time()
    with Checkpoint.open(base) as old, Checkpoint.open(finetuned) as new:
        plan = Splitter(old, new, SplitOptions("svd", Amount("rank", 64)))
        shares = {}
        for size in sizes:
            bins = deal(list(plan.files), plan.cost, size)
            most = max(bins, key=lambda some: sum(map(plan.cost, some)))
            mine = [plan.items[tensor.name] for file in most for tensor in plan.files[file]]
            work = 0.0
            for item in mine:
                matrices, rows, cols = item.grid if item.action.value == "split" else (0, 1, 1)
                short, long = min(rows, cols), max(rows, cols)
                work += matrices * (short * short * long + 6.0 * short**3)
            shares[size] = float(sum(item.tensor.nbytes for item in mine)), work
        files = len(plan.files)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Dealt(files, time.process_time() - start, peak, shares)


def times(model: Llama, dealt: Dealt, ranks: int, m: Machine) -> tuple[float, float, float, float]:
    """Return seconds of a split, of curvature on a million tokens, and the bytes and seconds of its reductions."""
    here, nodes = min(ranks, m.gpus), max(ranks // m.gpus, 1)
    nbytes, work = dealt.shares[ranks]
    disk = nbytes * 4 * here / m.file_system  # both sides in, general and memory out, here ranks at a time
    split = max(disk, nbytes * 4 / m.hashing, work / m.decompositions)
    weights = sum(_size(shape) for _, shape in model.tensors)
    flops = 6.0 * weights * TOKENS + 2.0 * (sums_of(model) / 4) * TOKENS
    stream = 2 * 2 * weights * here / min(m.file_system * 4, m.host_to_gpu * here)  # forward and back, from the page cache
    walk = max(flops / ranks / m.products, stream)
    sent = sums_of(model) * (ranks - 1) / ranks if ranks > 1 else 0.0
    reduce = sent * here / m.network if nodes > 1 else sent * here / (4 * m.network)
    return split, max(walk, reduce), sent, reduce


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def table(folder: Path) -> str:
    """Render what is counted and what is predicted."""
    m, sizes = Machine(), (1, 8, 128)
    lines = [
        "| model | ranks | files of the busiest rank | split, svd rank 64 | curvature, 1 M tokens | sums a rank sends | "
        "their time |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    notes = []
    for model in (LLAMA_70B, LLAMA_405B):
        base, finetuned = (headers_only(folder / f"{model.name}-{side}", model) for side in ("base", "finetuned"))
        dealt = plan_and_deal(base, finetuned, sizes)
        for ranks in sizes:
            split, walk, sent, reduce = times(model, dealt, ranks, m)
            lines.append(
                f"| {model.name} | {ranks} | {dealt.shares[ranks][0] / 1e9:.0f} GB | {split / 60:.1f} min "
                f"| {walk / 60:.1f} min | {sent / 1e9:,.0f} GB | {reduce / 60:.1f} min |"
            )
        notes.append(
            f"{model.name}: {dealt.files} files planned and dealt in {dealt.seconds:.1f} s of processor time, peak "
            f"{dealt.peak / 2**30:.2f} GiB."
        )
    return "\n".join([*lines, "", " ".join(notes)])


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = table(Path(folder))
    print(text)
    if a.write:
        record("scaling", text, "scaling.md")


if __name__ == "__main__":
    main()
