"""What many ranks would take on models of 70B and 405B: planned and dealt by the real code from headers, timed by assumptions.

    python benchmarks/scaling.py            # prints the table of docs/scaling.md
    python benchmarks/scaling.py --write    # puts it there
    python benchmarks/scaling.py --check    # counts of the model against a small Llama that is really run, on 1 and 2 ranks

Nothing here was run on such machines. Bytes, multiplications and reductions are counted from shapes; the rates are assumed, and
stand beside the table. `--check` holds the counts, not the rates, against a run: they do not depend on how busy a machine is.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llama_shapes import LLAMA_70B, LLAMA_405B, Llama, headers_only
from record import record

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.methods import Amount
from liborth_cli.ranks import deal
from liborth_cli.split import SplitOptions, Splitter

TOKENS = 1_000_000


def sums_of(model: Llama) -> int:
    """Return the bytes of the float32 sums of all blocks: A, which q, k, v and gate, up share, and G."""
    h, m = model.hidden, model.intermediate
    return 4 * model.layers * (3 * h * h + m * m + 3 * h * h + 2 * model.keys**2 + 2 * m * m)


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


def walk_flops(model: Llama, tokens: int, sums: bool = True) -> float:
    """Return the operations of a walk: forward, once more on the way back, and the gradients; and A and G."""
    weights = sum(_size(shape) for _, shape in model.tensors)
    return 6.0 * weights * tokens + (2.0 * (sums_of(model) / 4) * tokens if sums else 0.0)


def passed_on(model: Llama, tokens: int) -> float:
    """Return the bytes that all ranks send together where blocks are dealt: float32 states forward, and gradients back."""
    return 4.0 * model.hidden * tokens * (2 * model.layers + 1)


def split_bytes(nbytes: float) -> float:
    """Return the bytes read and written of a split of so many: both sides in, general and memory out."""
    return 4 * nbytes


def times(model: Llama, dealt: Dealt, ranks: int, m: Machine) -> tuple[float, float, float, float, float]:
    """Return seconds of a split; of curvature on a million tokens, rows dealt; bytes and seconds of its sums; and by blocks."""
    here, nodes = min(ranks, m.gpus), max(ranks // m.gpus, 1)
    nbytes, work = dealt.shares[ranks]
    disk = split_bytes(nbytes) * here / m.file_system  # here ranks at a time
    split = max(disk, split_bytes(nbytes) / m.hashing, work / m.decompositions)
    weights = sum(_size(shape) for _, shape in model.tensors)
    flops = walk_flops(model, TOKENS)
    stream = 2 * 2 * weights * here / min(m.file_system * 4, m.host_to_gpu * here)  # forward and back, from the page cache
    walk = max(flops / ranks / m.products, stream)
    sent = sums_of(model) * (ranks - 1) / ranks if ranks > 1 else 0.0
    reduce = sent * here / m.network if nodes > 1 else sent * here / (4 * m.network)
    busy = min(ranks, model.layers + 2)
    own = max(2 * 2 * weights * here / ranks / (m.file_system * 4), flops / busy / m.products)  # its own blocks alone
    passed = (
        passed_on(model, TOKENS) / busy * min(busy, m.gpus) / (m.network if nodes > 1 else 4 * m.network) if ranks > 1 else 0
    )
    return split, max(walk, reduce), sent, reduce, max(own, passed)


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def table(folder: Path) -> str:
    """Render what is counted and what is predicted."""
    m, sizes = Machine(), (1, 8, 128)
    lines = [
        "| model | ranks | files of the busiest rank | split, svd rank 64 | curvature, 1 M tokens | sums a rank sends | "
        "their time | by layers |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    notes = []
    for model in (LLAMA_70B, LLAMA_405B):
        base, finetuned = (headers_only(folder / f"{model.name}-{side}", model) for side in ("base", "finetuned"))
        dealt = plan_and_deal(base, finetuned, sizes)
        for ranks in sizes:
            split, walk, sent, reduce, blocks = times(model, dealt, ranks, m)
            lines.append(
                f"| {model.name} | {ranks} | {dealt.shares[ranks][0] / 1e9:.0f} GB | {split / 60:.1f} min "
                f"| {walk / 60:.1f} min | {sent / 1e9:,.0f} GB | {reduce / 60:.1f} min "
                f"| {blocks / 60:.1f} min |"
            )
        notes.append(
            f"{model.name}: {dealt.files} files planned and dealt in {dealt.seconds:.1f} s of processor time, peak "
            f"{dealt.peak / 2**30:.2f} GiB."
        )
    return "\n".join([*lines, "", " ".join(notes)])


COUNTED = """
import json, os, sys, types
from torch.utils.flop_counter import FlopCounterMode
from liborth_cli import line, messages
from liborth_cli.cli import main

sent, begin = {}, line.Line.__init__
def begin_counting(self, *args):
    begin(self, *args)
    plain = self._dist
    def send(tensor, to, tag=0):
        sent[tag] = sent.get(tag, 0) + (tensor.nbytes if tensor.nbytes != messages.HEAD else 0)
        plain.send(tensor, to, tag=tag)
    self._dist = types.SimpleNamespace(**{**vars(plain), "send": send})
line.Line.__init__ = begin_counting
sys.argv = ["liborth", *WORDS]
def moved():
    lines = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(lines["rchar"]) + int(lines["wchar"])
before, flops = moved(), FlopCounterMode(display=False)
try:
    with flops:
        main.run()
except SystemExit as stop:
    assert not stop.code, stop.code
json.dump([flops.get_total_flops(), moved() - before, sent], open(f"counted{rank}", "w"))
"""


def check(folder: Path) -> str:
    """Run a small Llama, and render what was counted beside what the model says."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
    from tests.ranks.conftest import Ranks

    model, length = Llama("small", 256, 704, 6, 1, keys=128, vocabulary=512), 64
    words = {"num_key_value_heads": 2, "num_attention_heads": 4, "max_position_embeddings": length, "head_dim": 64}
    config = LlamaConfig(**{**model.config, **words, "dtype": "float32"})
    for seed, side in enumerate(("base", "finetuned")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / side, max_shard_size="4MB")
    rows = np.random.default_rng(0).integers(0, 512, (16, length + 1))
    np.save(folder / "data.npy", rows)
    tokens = 16 * length
    ranks = Ranks()

    def run(size: int, *command: str) -> list[tuple[float, float, dict[str, int]]]:
        done = ranks(size, folder, script=COUNTED.replace("WORDS", repr([*command, "-j", "1"])))
        assert done.codes == [0] * size, done
        return [json.loads((folder / f"counted{rank}").read_text()) for rank in range(size)]

    walk = ("curvature", "finetuned", "--data", "data.npy", "--weights", "stream", "--tensors", "layers", "-o", "f", "--force")
    one, two, blocks = run(1, *walk), run(2, *walk, "--parallel", "data"), run(2, *walk, "--parallel", "layers")
    files = sum(file.stat().st_size for file in (folder / "finetuned").glob("*.safetensors"))
    cut = ("split", "base", "finetuned", "--rank", "8", "--method", "svd", "-o", "s", "--force")
    # What is read to start with, modules for the most part, is not the split's.
    asked = [sum(s[1] for s in run(size, *cut)) - sum(s[1] for s in run(size, *cut, "--dry-run")) for size in (1, 2)]
    ranks.close()
    products = walk_flops(model, tokens, sums=False)  # torch's counter does not see BLAS's SYRK, which makes A and G
    sent = [float(sum(sum(one[2].values()) for one in some)) for some in (two, blocks)]
    found = [
        ("products with weights, one rank", products, one[0][0]),
        ("products with weights, the busier of two, rows dealt", products / 2, max(some[0] for some in two)),
        ("products with weights, the busier of two, blocks dealt", products / 2, max(some[0] for some in blocks)),
        ("bytes of sums that two ranks send, rows dealt", float(sums_of(model)), sent[0]),
        ("bytes that two ranks pass on, blocks dealt", passed_on(model, tokens), sent[1]),
        ("bytes that a split asks the kernel for, one rank", split_bytes(files), asked[0]),
        ("the same, two ranks together", split_bytes(files), asked[1]),
    ]
    lines = ["| counted | by the model | by a run | ratio |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {says:.3g} | {was:.3g} | {was / says:.2f} |" for name, says, was in found)])


def main() -> None:
    """Print a table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = check(Path(folder)) if a.check else table(Path(folder))
    print(text)
    if a.write:
        record("scaling-check" if a.check else "scaling", text, "scaling.md")


if __name__ == "__main__":
    main()
