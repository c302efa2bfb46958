"""Run a command and measure it from outside: wall seconds and peak resident anonymous memory of its process tree.

Anonymous memory is what a process really claims; file-backed pages (libraries, mapped weights) can be dropped by the kernel.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Measured:
    """One run: wall seconds, peak RssAnon in MiB."""

    seconds: float
    peak_mib: float


def run(command: Sequence[str], cores: str | None = None, env: dict[str, str] | None = None) -> Measured:
    """Run `command`, optionally pinned to processors.

    Args:
        command: program and arguments.
        cores: a list for taskset, such as "0".
        env: variables to add.

    Raises:
        RuntimeError: when the command fails; with the end of its output.
    """
    pinned = [*(["taskset", "-c", cores] if cores else []), *command]
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(pinned, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(_anonymous_kib, _tree(process.pid))))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(pinned)} exited {process.returncode}:\n{log.read()[-4000:]}")
    return Measured(seconds, peak / 1024)


def median(runs: Sequence[Measured]) -> Measured:
    """Return the median time and the median peak."""
    return Measured(statistics.median(r.seconds for r in runs), statistics.median(r.peak_mib for r in runs))


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in _tree(int(child)))]


def _anonymous_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
