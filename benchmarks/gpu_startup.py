"""What a command costs before it does anything: imports, and the start of CUDA. A part of `make bench-gpu`.

python benchmarks/gpu_startup.py        # without a GPU; writes its own section of docs/benchmarks.md
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_parts import Asked

PLAIN = "Python"
WAYS = {
    PLAIN: "pass",
    "torch": "import torch",
    "torch and CUDA": "import torch; torch.zeros(1, device='cuda').item()",
    "transformers' Llama": "from transformers.models.llama import modeling_llama",
    "all that `split` imports": "import liborth_cli.split.split, liborth_cli.cli.split",
    "all that `curvature` imports": "import liborth_cli.curvature.estimate, liborth_cli.cli.curvature",
    "all that `verify` imports": "import liborth_cli.verify.verify, liborth_cli.cli.verify",
}
"""What is imported → how; every command's help comes after these."""


def measure(asked: Asked) -> Iterator[str]:
    """Time fresh processes; the second run of each finds its files in memory."""
    ways = {PLAIN: WAYS[PLAIN]} if asked.dry_run else WAYS | helps()
    yield from table(ways, 1 if asked.brief else 2)


def table(ways: dict[str, str], times: int) -> Iterator[str]:
    """Time each of some programs in a process of its own, and write the lines of a table."""
    yield f"| a process that does nothing but import | s |{' again, s |' * (times > 1)}"
    yield "|---|" + "---|" * min(times, 2)
    for name, code in ways.items():
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        shown = seconds if times < 2 else (seconds[0], min(seconds[1:]))
        yield f"| {name} | {' | '.join(f'{each:.2f}' for each in shown)} |"


def helps() -> dict[str, str]:
    """Return what prints the help of every command, by its name."""
    from liborth_cli.cli.main import COMMANDS

    code = "import sys; sys.argv = ['liborth', *{words!r}]; from liborth_cli.cli.main import run; run()"
    every = {"": ["--help"], **{name: [name, "--help"] for name in COMMANDS}}
    return {f"`{' '.join(['liborth', *words])}`": code.format(words=words) for words in every.values()}


def main() -> None:
    """Print and record what this machine's processor takes; the best of four runs after the first."""
    from record import machine, record

    ways = {name: code for name, code in WAYS.items() if "cuda" not in code} | helps()
    text = f"{machine()}.\n\n" + "\n".join(table(ways, 5))
    print(text)
    record("startup", text)


if __name__ == "__main__":
    main()
