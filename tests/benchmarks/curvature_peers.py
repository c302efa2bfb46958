"""Time and peak memory of curvature against a plain forward+backward and kronfluence, interleaved, in fresh processes.

    make bench-curvature

The model is a random Llama: no trained weights are needed to measure arithmetic. Every round runs every job once, on one
core, and adds a line to --runs, so that rounds can be made one at a time on a machine that is not always free; the section
"curvature" of docs/benchmarks.md is written from all rounds of that file. A ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from curvature_jobs import JOBS, make
from record import machine, record

Round = dict[str, dict]
SHAPE = {"layers": 6, "width": 512, "inner": 1408, "vocabulary": 32000, "tokens": 4096, "length": 512}
TITLES = {
    "plain": "plain forward + backward, with weight gradients",
    "resident": "liborth",
    "streamed": "liborth, streamed, block inputs in a scratch file",
    "bfloat16": "liborth, `--dtype bfloat16`",
    "marginal": "liborth, `--moments marginal`",
    "marginal-eigen": "liborth, `--moments marginal --eigen`",
    "kronfluence": "kronfluence, covariances",
    "kronfluence-ekfac": "kronfluence, covariances, eigenbases, lambdas",
}
Goal = tuple[str, Callable[[Round], float], str, float]


def over(one: str, other: str, figure: str = "seconds") -> Callable[[Round], float]:
    """Divide a figure of one job by another's."""
    return lambda found: found[one][figure] / found[other][figure]


def without_eigenbases(found: Round) -> float:
    """Compare what both sides spend on the data alone."""
    parts = found["kronfluence-ekfac"]["parts"]
    return (parts["covariances"] + parts["lambdas"]) / found["marginal"]["seconds"]


GOALS: list[Goal] = [
    ("resident ÷ plain", over("resident", "plain"), "≤", 1.10),
    ("streamed ÷ plain", over("streamed", "plain"), "≤", 1.40),
    ("kronfluence ÷ resident", over("kronfluence", "resident"), "≥", 1.5),
    ("kronfluence ÷ streamed", over("kronfluence", "streamed"), "≥", 1.0),
    ("streamed ÷ kronfluence, peak memory", over("streamed", "kronfluence", "mib"), "≤", 0.65),
    ("resident ÷ bfloat16", over("resident", "bfloat16"), "≥", 1.5),
    ("kronfluence EK-FAC ÷ marginal", over("kronfluence-ekfac", "marginal"), "≥", 4.0),
    ("the same, eigenbases made on our side too", over("kronfluence-ekfac", "marginal-eigen"), "≥", 4.0),
    ("the same, eigenbases on neither side", without_eigenbases, "≥", 4.0),
]


def run(job: str, folder: Path) -> dict:
    """Run one job in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("curvature_jobs.py")), job, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{job}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().split("\n")[-1])


def table(rounds: list[Round]) -> str:
    """Make the page's section."""
    lines = ["| job | median s (min–max) | ÷ plain | peak MiB |", "|---|---|---|---|"]
    for job, title in TITLES.items():
        seconds = [found[job]["seconds"] for found in rounds if job in found]
        if not seconds:
            continue
        ratio = statistics.median(found[job]["seconds"] / found["plain"]["seconds"] for found in rounds if job in found)
        peak = max(found[job]["mib"] for found in rounds if job in found)
        lines.append(
            f"| {title} | {statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f}) | {ratio:.2f} | {peak:.0f} |"
        )
    lines += ["", "| ratio | goal | median (min–max) | |", "|---|---|---|---|"]
    for title, ratio, sense, goal in GOALS:
        found = []
        for one in rounds:
            with suppress(KeyError):  # a round of some of the jobs
                found.append(ratio(one))
        if not found:
            continue
        middle = statistics.median(found)
        met = middle <= goal if sense == "≤" else middle >= goal
        verdict = "met" if met else "missed"
        lines.append(f"| {title} | {sense} {goal:.2f} | {middle:.2f} ({min(found):.2f}–{max(found):.2f}) | {verdict} |")
    parts = [found["kronfluence-ekfac"]["parts"] for found in rounds if "kronfluence-ekfac" in found]
    if parts:
        each = ", ".join(f"{name} {statistics.median(p[name] for p in parts):.1f} s" for name in parts[0])
        lines += ["", f"kronfluence's EK-FAC: {each}."]
    return "\n".join(lines)


def main() -> None:
    """Run rounds, keep them, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--runs", type=Path, help="file of rounds to add to; WORK/rounds.jsonl when not given")
    asked = parser.parse_args()
    model, runs = asked.work / "model", asked.runs or asked.work / "rounds.jsonl"
    if not model.exists():
        asked.work.mkdir(parents=True, exist_ok=True)
        make(model, **SHAPE)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for _ in range(asked.rounds):
        found = {job: run(job, model) for job in asked.jobs}
        with open(runs, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print({job: round(one["seconds"], 2) for job, one in found.items()}, flush=True)
    rounds = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
    section = f"{machine()}, kronfluence {version('kronfluence')}; one core, {len(rounds)} rounds.\n\n{table(rounds)}\n"
    record("curvature", section)
    print(section)


if __name__ == "__main__":
    main()
