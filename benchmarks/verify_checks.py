"""What each check of `verify --all` costs: processor seconds and passes forward, a check at a time, in one process.

    python benchmarks/verify_checks.py PAIR --work DIR [--checks relearn,lmc] [--profile]

PAIR is one of the surgery benchmark: base, finetuned, held_out.jsonl, retain.jsonl, secrets.jsonl, fresh.jsonl. It is split
once by tokenwise at λ 0.1, into DIR. A pass is as many tokens through as many blocks as one scoring of the held-out rows is;
training and products with the curvature are not counted. The rows add up to the command, but for Python's start. With
--profile the functions that took longest are printed under every check.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import LIBORTH
from record import machine, record

from liborth_cli.console import SILENT
from liborth_cli.machine import configure
from liborth_cli.stream.runner import Runner
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.opening import Inputs
from liborth_cli.verify.subject import Subject
from liborth_cli.verify.verify import VerifyOptions, certify


@dataclass(frozen=True)
class Cost:
    """Processor seconds, seconds, and passes of the held-out rows."""

    cpu: float
    wall: float
    passes: float

    @property
    def words(self) -> str:
        """Say it."""
        return f"{self.cpu:.1f} processor s, {self.wall:.1f} s, {self.passes:.1f} passes"


SHOWN = 12
"""Functions under every check."""


class Passes:
    """Counts the tokens that go through blocks.

    Attributes:
        tokens: times blocks, so far.
    """

    def __init__(self) -> None:
        """Watch every runner from now on; what asks for gradients is training, or curvature."""
        self.tokens, through, block = 0, Runner.through, Runner.block

        def whole(runner: Runner, ids: torch.Tensor, *given: Any) -> torch.Tensor:
            self.tokens += ids.numel() * len(runner.blocks)
            return through(runner, ids, *given)

        def single(runner: Runner, index: int, hidden: torch.Tensor, *given: Any) -> torch.Tensor:
            self.tokens += hidden.shape[:-1].numel()
            return block(runner, index, hidden, *given)

        Runner.through, Runner.block = whole, single


def timed(name: str, run: Callable[..., Any], found: dict[str, Cost], passes: Passes, profile: bool) -> Callable[..., Any]:
    """Return a check's function with a clock around it."""

    def timing(subject: Subject, *given: Any) -> Any:
        profiler = cProfile.Profile()
        start = time.process_time(), time.perf_counter(), passes.tokens
        if profile:
            profiler.enable()
        try:
            return run(subject, *given)
        finally:
            profiler.disable()
            one = sum(row.tokens for row in subject.rows("retain")) * len(subject.states.model("general").blocks)
            found[name] = Cost(
                time.process_time() - start[0], time.perf_counter() - start[1], (passes.tokens - start[2]) / max(one, 1)
            )
            print(f"{name}: {found[name].words}", flush=True)
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
    found, passes = dict[str, Cost](), Passes()
    for name, check in list(CHECKS.items()):
        CHECKS[name] = replace(check, run=timed(name, check.run, found, passes, a.profile))
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
    lines = ["| check | passes | processor s | s |", "|---|---:|---:|---:|"]
    dear = sorted(found.items(), key=lambda one: -one[1].cpu)
    lines += [f"| {name} | {one.passes:.1f} | {one.cpu:.1f} | {one.wall:.1f} |" for name, one in dear]
    rest = [whole[i] - sum(times) for i, times in enumerate(zip(*((c.cpu, c.wall) for c in found.values()), strict=True))]
    lines.append(f"| opening, hashing, writing | | {rest[0]:.1f} | {rest[1]:.1f} |")
    lines.append(f"| together | {sum(c.passes for c in found.values()):.1f} | {whole[0]:.1f} | {whole[1]:.1f} |")
    print("\n".join(lines))
    if a.record:
        record("verify-checks", f"{machine()}; {a.threads} threads, one run.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
