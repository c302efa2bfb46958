"""Run one liborth command and write down its time and its peak of GPU memory: `gpu_run.py FIGURES.json split …`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the command line in this process; exit as it does."""
    figures = Path(sys.argv.pop(1))
    import torch

    from liborth_cli.cli.main import run

    sys.argv[0] = "liborth"
    start = time.perf_counter()
    try:
        run()
    finally:
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        figures.write_text(json.dumps({"seconds": seconds, "gpu_bytes": peak}))


if __name__ == "__main__":
    main()
