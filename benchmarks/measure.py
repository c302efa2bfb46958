"""Run a command and measure it from outside: wall seconds and peak memory of its process tree.

Two figures: all resident memory, and its anonymous part. Anonymous memory is what a process really claims; file-backed pages
(libraries, mapped weights) can be dropped by the kernel.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

POLL_SECONDS = 0.01
LIBORTH = str(Path(sys.executable).with_name("liborth"))
"""The command of the environment that a benchmark runs in."""


@dataclass(frozen=True)
class Measured:
    """One run: wall seconds, peak resident memory and peak anonymous resident memory in MiB, processor seconds."""

    seconds: float
    resident_mib: float
    anonymous_mib: float
    cpu_seconds: float


class Stopped(RuntimeError):
    """A command that was stopped because its time was over.

    Attributes:
        spent: until then.
    """

    def __init__(self, spent: Measured) -> None:
        super().__init__(f"stopped after {spent.seconds:.0f} s")
        self.spent = spent


def run(
    command: Sequence[str],
    cores: str | None = None,
    env: dict[str, str] | None = None,
    limit: float = math.inf,
    ends: Collection[int] = (0,),
) -> Measured:
    """Run `command`, optionally pinned to processors.

    Args:
        command: program and arguments.
        cores: a list for taskset, such as "0".
        env: variables to add.
        limit: wall seconds after which it is stopped.
        ends: exit codes with which it has done its work.

    Raises:
        RuntimeError: when the command fails; with the end of its output.
        Stopped: when it took longer than `limit`.
    """
    pinned = [*(["taskset", "-c", cores] if cores else []), *command]
    with tempfile.TemporaryFile("w+") as log:
        used, start = _children_seconds(), time.perf_counter()
        process = subprocess.Popen(pinned, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        resident = anonymous = 0
        while process.poll() is None:
            found = [_memory_kib(pid) for pid in _tree(process.pid)]
            resident = max(resident, sum(r for r, _ in found))
            anonymous = max(anonymous, sum(a for _, a in found))
            if time.perf_counter() - start > limit:
                process.kill()
                process.wait()
                raise Stopped(_measured(start, resident, anonymous, used))
            time.sleep(POLL_SECONDS)
        if process.returncode not in ends:
            log.seek(0)
            raise RuntimeError(f"{' '.join(pinned)} exited {process.returncode}:\n{log.read()[-4000:]}")
        return _measured(start, resident, anonymous, used)


def _measured(start: float, resident: int, anonymous: int, used: float) -> Measured:
    return Measured(time.perf_counter() - start, resident / 1024, anonymous / 1024, _children_seconds() - used)


def pair_parser(doc: str | None, repeat: int = 3) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark on the pair of make_pair.py is told: --pair, --work and --repeat."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="from make_pair.py")
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--repeat", type=int, default=repeat, help="runs of each command")
    return parser


def divide(pair: Path, out: Path) -> None:
    """Split the benchmark pair at rank 64, for what comes after a split."""
    words = ("split", pair / "base", pair / "finetuned", "--rank", "64", "-o", out, "-q")
    subprocess.run([LIBORTH, *words], check=True, stdout=subprocess.DEVNULL)


def clear(*outputs: Path) -> None:
    """Remove outputs of an earlier run, with what lies beside them."""
    for out in outputs:
        for folder in (out, out.with_name(f"{out.name}.private"), out.with_name(f"{out.name}.factors")):
            shutil.rmtree(folder, ignore_errors=True)


def median(runs: Sequence[Measured]) -> Measured:
    """Return the median of each figure."""
    return Measured(*(statistics.median(column) for column in zip(*map(astuple, runs), strict=True)))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in _tree(int(child)))]


def _memory_kib(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "RssAnon:"))}
    return found.get("VmRSS", 0), found.get("RssAnon", 0)
