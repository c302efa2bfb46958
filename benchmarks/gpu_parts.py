"""The parts of `make bench-gpu`, one after the other in one process; gpu.py starts it and keeps what it finds.

Commands run inside this process, so that their seconds are without the import of torch and the start of CUDA: those are a part
of their own. What Triton compiles the first time is in the first run of a command.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LIMITS = {"startup": 90, "kernels": 120, "curvature": 100, "split": 80, "texts": 120, "verify": 60, "large": 300}
"""Part → seconds it may take."""
PARTS = tuple(LIMITS)


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    Attributes:
        work: scratch directory.
        device: "cuda", or "cpu" in a dry run.
        brief: kernels at fewer sizes.
        profile: also say where the time goes.
        dry_run: tiny sizes.
    """

    work: Path
    device: str
    brief: bool
    profile: bool
    dry_run: bool

    def words(self, parts: list[str], seconds: float) -> list[str]:
        """Say it as a command line."""
        flags = [f"--{name}" for name in ("brief", "profile", "dry-run") if getattr(self, name.replace("-", "_"))]
        return [str(self.work), self.device, ",".join(parts), f"{seconds:.0f}", *flags]


class TooLate(BaseException):
    """A part's time is over. No Exception: nothing between may take it for one of its own."""


def main() -> None:
    """Run parts, print what they find line by line, and leave their sections in WORK/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("device")
    parser.add_argument("parts")
    parser.add_argument("seconds", type=float)
    for flag in ("brief", "profile", "dry-run"):
        parser.add_argument(f"--{flag}", action="store_true")
    a = parser.parse_args()
    asked, end = Asked(a.work, a.device, a.brief, a.profile, a.dry_run), time.monotonic() + a.seconds
    signal.signal(signal.SIGALRM, _late)
    for part in a.parts.split(","):
        limit = min(LIMITS[part], end - time.monotonic())
        if limit < 3:
            sys.exit(f"== {part}: no time left")
        _run(part, asked, limit)


def _run(part: str, asked: Asked, limit: float) -> None:
    results, start = asked.work / "results", time.perf_counter()
    (results / "now").write_text(f"{part} {time.time() + limit}")
    print(f"== {part}, {limit:.0f} s at most", flush=True)
    sofar = results / f"{part}.cut"
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        for line in _found(part, asked):
            with sofar.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(line, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sofar.rename(results / f"{part}.md")
    except TooLate:
        print(f"== {part}: not done in {limit:.0f} s", flush=True)
        (results / f"{part}.failed").write_text("too late")
    except (Exception, SystemExit):
        signal.setitimer(signal.ITIMER_REAL, 0)
        traceback.print_exc(limit=-12, file=sys.stdout)
        print(f"== {part}: failed", flush=True)
        (results / f"{part}.failed").write_text("failed")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"== {part}: {time.perf_counter() - start:.1f} s in all", flush=True)
        _forget()


def _found(part: str, asked: Asked) -> Iterator[str]:
    """Import what a part needs, and begin it."""
    import gpu_jobs
    import gpu_kernels
    import gpu_startup

    parts: dict[str, Callable[[Asked], Iterator[str]]] = {
        "startup": gpu_startup.measure,
        "kernels": gpu_kernels.measure,
        "curvature": gpu_jobs.curvature,
        "split": gpu_jobs.split,
        "texts": gpu_jobs.texts,
        "verify": gpu_jobs.verify,
        "large": gpu_jobs.large,
    }
    return parts[part](asked)


def _forget() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _late(_number: int, _frame: FrameType | None) -> None:
    raise TooLate


if __name__ == "__main__":
    main()
