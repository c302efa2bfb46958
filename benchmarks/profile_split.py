"""Where a rank-64 split of the benchmark pair spends its processor time, step by step, on one thread.

    taskset -c 0 python benchmarks/profile_split.py --pair PAIR --work DIR

Steps are timed by the clock of the thread they run in, without the steps inside them.
"""

from __future__ import annotations

import time

STARTED = time.process_time()

import argparse  # noqa: E402
import functools  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from record import machine, record  # noqa: E402

from liborth_cli.checkpoint import delta, hashing, reader, writer  # noqa: E402
from liborth_cli.checkpoint.hub import resolve  # noqa: E402
from liborth_cli.checkpoint.reader import Checkpoint  # noqa: E402
from liborth_cli.console import Console  # noqa: E402
from liborth_cli.linalg import rows, tridiagonal, truncated  # noqa: E402
from liborth_cli.machine import configure  # noqa: E402
from liborth_cli.methods import Amount  # noqa: E402
from liborth_cli.split import SplitOptions, Splitter, divide, shard, write_split  # noqa: E402
from liborth_cli.split.write import Destination  # noqa: E402

STEPS: dict[str, list[tuple[Any, str]]] = {
    "tridiagonalisation": [(tridiagonal._Reduction, "reach"), (tridiagonal._Reduction, "finish")],
    "bounds: Ritz values, Cholesky": [(tridiagonal._Reduction, "bound"), (tridiagonal._Reduction, "ritz_values")],
    "vectors: inverse iteration, reflectors": [(tridiagonal._Reduction, "pairs")],
    "Gram matrices": [(truncated, "gram_of")],
    "coordinates": [(truncated, "along")],
    "forming updates": [(divide.UpdateRows, "_fill")],
    "their energies": [(divide, "energy"), (truncated, "energy")],
    "reading": [(reader.Checkpoint, "read")],
    "low-rank products": [(rows.ThinProduct, "__getitem__")],
    "adding, rounding, XOR": [(shard, "rebuild_delta"), (delta, "xor")],
    "the rest of a piece: norms, comparisons": [(shard.WrittenShard, "_write_general")],
    "writing": [(writer.ShardWriter, "write"), (writer.ShardWriter, "__init__")],
    "flushing": [(writer.ShardWriter, "finish")],
    "hashing outputs": [(writer, "hash_open")],
    "hashing inputs": [(hashing.BackgroundHasher, "_work")],
}


class Clock:
    """Adds up, for each step, the seconds that its thread computed in it and in no step inside it."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self._inner, self._lock = threading.local(), threading.Lock()

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that belongs to a step."""

        @functools.wraps(function)
        def run(*given: Any, **named: Any) -> Any:
            outer, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            start = time.thread_time()
            try:
                return function(*given, **named)
            finally:
                whole = time.thread_time() - start
                with self._lock:
                    self.seconds[step] += whole - self._inner.seconds
                self._inner.seconds = outer + whole

        return run


def main() -> None:
    """Split, print and record."""
    imports = time.process_time() - STARTED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="from make_pair.py")
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    a = parser.parse_args()
    shutil.rmtree(a.work, ignore_errors=True)
    clock = Clock()
    for step, places in STEPS.items():
        for owner, name in places:
            setattr(owner, name, clock.timed(step, getattr(owner, name)))
    run = configure("cpu", 1)
    sources = tuple(resolve(str(a.pair / side)) for side in ("base", "finetuned"))
    with Checkpoint.open(sources[0].path) as reference, Checkpoint.open(sources[1].path) as finetuned:
        plan = Splitter(reference, finetuned, SplitOptions("svd", Amount("rank", 64)))
        write_split(plan, Destination(a.work / "out", sources), run, Console(True, False, False))
    whole = time.process_time() - STARTED
    shutil.rmtree(a.work)
    found = {**clock.seconds, "imports": imports}
    found["everything else"] = whole - sum(found.values())
    lines = ["| step | CPU s | share |", "|---|---|---|"]
    lines += [f"| {step} | {s:.1f} | {s / whole:.0%} |" for step, s in sorted(found.items(), key=lambda i: -i[1])]
    text = f"{machine()}; one thread, {whole:.1f} s of processor time.\n\n" + "\n".join(lines)
    print(text, file=sys.stderr)
    record("split-profile", text)


if __name__ == "__main__":
    main()
