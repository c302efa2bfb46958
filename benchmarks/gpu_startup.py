"""What a command costs before it does anything: imports, and the start of CUDA. A part of `make bench-gpu`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_parts import Asked

CUDA = "import torch; torch.zeros(1, device='cuda').item()"
WAYS = {
    "Python": "pass",
    "torch": "import torch",
    "torch and CUDA": CUDA,
    "transformers' Llama": "from transformers.models.llama import modeling_llama",
    "`liborth --help`": "import sys; sys.argv = ['liborth', '--help']; from liborth_cli.cli.main import run; run()",
    "all that `split` imports": "import liborth_cli.split.split, liborth_cli.cli.split",
    "all that `curvature` imports": "import liborth_cli.curvature.estimate, liborth_cli.cli.curvature",
    "all that `verify` imports": "import liborth_cli.verify.verify, liborth_cli.cli.verify",
}


def measure(asked: Asked) -> Iterator[str]:
    """Time fresh processes; the second run of each finds its files in memory."""
    yield "| a process that does nothing but import | s |" + (" again, s |" if not asked.brief else "")
    yield "|---|---|" + ("---|" if not asked.brief else "")
    for name, code in WAYS.items():
        if asked.dry_run and name != "Python":
            continue
        seconds = []
        for _ in range(1 if asked.brief else 2):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        yield f"| {name} | {' | '.join(f'{each:.2f}' for each in seconds)} |"
