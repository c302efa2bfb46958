"""What each check of `verify --all` costs: processor seconds, a check at a time, in one process.

    python benchmarks/verify_checks.py PAIR --work DIR [--checks relearn,lmc] [--profile]

PAIR is one of the surgery benchmark: base, finetuned, held_out.jsonl, retain.jsonl, secrets.jsonl, fresh.jsonl. It is split
once by tokenwise at λ 0.1, into DIR. With --profile the functions that took longest are printed under every check.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import LIBORTH
from record import machine, record

from liborth_cli.console import SILENT
from liborth_cli.machine import configure
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.opening import Inputs
from liborth_cli.verify.verify import VerifyOptions, certify

SHOWN = 12
"""Functions under every check."""


def timed(name: str, run: Callable[..., Any], found: dict[str, tuple[float, float]], profile: bool) -> Callable[..., Any]:
    """Return a check's function with a clock around it."""

    def timing(*given: Any) -> Any:
        profiler = cProfile.Profile()
        start = time.process_time(), time.perf_counter()
        if profile:
            profiler.enable()
        try:
            return run(*given)
        finally:
            profiler.disable()
            found[name] = time.process_time() - start[0], time.perf_counter() - start[1]
            print(f"{name}: {found[name][0]:.1f} processor s, {found[name][1]:.1f} s", flush=True)
            if profile:
                pstats.Stats(profiler).sort_stats("cumulative").print_stats(SHOWN)

    return timing


def main() -> None:
    """Split once, verify, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checks", help="names; all when not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--record", action="store_true")
    a = parser.parse_args()
    general = a.work / "general"
    if not general.exists():
        texts = ["--retain-data", str(a.pair / "retain.jsonl"), "--forget-data", str(a.pair / "secrets.jsonl")]
        pair = [str(a.pair / side) for side in ("base", "finetuned")]
        command = [LIBORTH, "split", *pair, *texts, "--method", "tokenwise", "--strength", "0.1", "-o", str(general)]
        subprocess.run([*command, "-j", str(a.threads), "-q"], check=True)
    found: dict[str, tuple[float, float]] = {}
    for name, check in list(CHECKS.items()):
        CHECKS[name] = replace(check, run=timed(name, check.run, found, a.profile))
    inputs = Inputs(
        model=str(general), reference=str(a.pair / "base"), finetuned=str(a.pair / "finetuned"),
        retain=(str(a.pair / "held_out.jsonl"),), canary=str(a.pair / "secrets.jsonl"), fresh=str(a.pair / "fresh.jsonl"),
    )  # fmt: skip
    named = tuple(a.checks.split(",")) if a.checks else ()
    start = time.process_time(), time.perf_counter()
    certify(
        VerifyOptions(inputs, named=named, everything=not named, no_require=True),
        configure("cpu", a.threads),
        SILENT,
    )
    whole = time.process_time() - start[0], time.perf_counter() - start[1]
    lines = ["| check | processor s | s |", "|---|---:|---:|"]
    lines += [f"| {name} | {cpu:.1f} | {wall:.1f} |" for name, (cpu, wall) in sorted(found.items(), key=lambda one: -one[1][0])]
    lines.append(f"| all, with opening and hashing | {whole[0]:.1f} | {whole[1]:.1f} |")
    print("\n".join(lines))
    if a.record:
        record("verify-checks", f"{machine()}; {a.threads} threads, one run.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
