"""Ranks on one machine: what is left when one is killed at a random moment, and how much faster two are than one.

    python benchmarks/ranks.py kill --runs 50
    python benchmarks/ranks.py speed --rounds 5

`kill`: a split on 2–4 ranks, one of them killed at a random moment; then the output must be absent or whole, and --resume on
another number of ranks must end with the bytes of a run that nobody disturbed. `speed`: the same split on one process with one
thread and on two, alternating; elapsed time tells only on a quiet machine, so the processor time of the busiest rank stands
beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from tests.ranks.conftest import Ranks  # noqa: E402
from tests.tiny import files, matrices  # noqa: E402

SPLIT = ("split", "base", "finetuned", "-j", "1")


def kill(ranks: Ranks, folder: Path, runs: int, seed: int) -> None:
    """Kill a rank at a random moment of each run, and go on."""
    matrices(folder, [(320, 320)] * 24, shards=12)
    words = (*SPLIT, "--energy", "0.5")
    ranks(1, folder, *words, "-o", "whole")
    whole = files(folder / "whole"), files(folder / "whole.private")
    draw, counts, damaged = random.Random(seed), dict.fromkeys(("before the first file", "with files kept", "after"), 0), 0
    for number in range(runs):
        size, out = draw.randint(2, 4), f"out{number}"
        victim, wanted, delay = draw.randrange(size), draw.randint(0, 11), draw.uniform(0.0, 0.5)
        pids = ranks.start(size, folder, *words, "-o", out, env={"LIBORTH_RANK_TIMEOUT": "5"})
        journal, end = folder / f"{out}.liborth-partial" / "journal.jsonl", time.monotonic() + 20
        while time.monotonic() < end and not (folder / out).exists() and _kept(journal) < wanted:
            time.sleep(0.002)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGKILL)
        done = ranks.wait()
        there, kept = (folder / out).exists(), _kept(journal)
        counts["after" if there else "with files kept" if kept else "before the first file"] += 1
        again = (
            None if there else ranks(draw.choice([n for n in (1, 2, 3, 4) if n != size]), folder, *words, "-o", out, "--resume")
        )
        same = (files(folder / out), files(folder / f"{out}.private")) == whole if (folder / out).exists() else False
        damaged += not same
        spoken = [text for text in done.err if "error: " in text]
        print(
            f"{number}: {size} ranks, rank {victim} {delay:.2f} s after file {wanted}, {kept} files kept, codes {done.codes}",
            flush=True,
        )
        if not same or len(spoken) > 1 or any("Traceback" in text for text in done.err) or (again and any(again.codes)):
            print("   ", done.err, again, flush=True)
    print(f"{runs} runs: {counts}; {damaged} whose output differs after --resume")


def _kept(journal: Path) -> int:
    with contextlib.suppress(OSError):
        return journal.read_text().count('"unit"')
    return 0


def speed(ranks: Ranks, folder: Path, rounds: int, count: int) -> None:
    """Compare one process on one core with two on two."""
    matrices(folder, [(1200, 1200)] * count, shards=8)
    wall, busiest = {1: [], 2: []}, {1: [], 2: []}
    for _ in range(rounds):
        for size in (1, 2):
            done = ranks(size, folder, *SPLIT, "--method", "svd", "--rank", "64", "--svd", "exact", "-o", "out", "--force")
            assert done.codes == [0] * size, done
            wall[size].append(done.wall)
            busiest[size].append(max(done.seconds))
            print(f"{size} ranks: {done.wall:.2f} s elapsed, processor {[round(s, 2) for s in done.seconds]} s", flush=True)
    for name, found in (("elapsed", wall), ("processor time of the busiest rank", busiest)):
        one, two = (statistics.median(found[size]) for size in (1, 2))
        print(f"{name}: {one:.2f} s on one, {two:.2f} s on two: {one / two:.2f} ×")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("kill", "speed"))
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrices", type=int, default=16, help="of a split that is timed: more of them, less of starting")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as folder:
        if a.what == "kill":
            kill(ranks, Path(folder), a.runs, a.seed)
        else:
            speed(ranks, Path(folder), a.rounds, a.matrices)
    ranks.close()


if __name__ == "__main__":
    main()
