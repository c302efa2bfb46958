"""Time and peak memory of curvature against a plain forward+backward and other tools, interleaved, in fresh processes.

    make bench-curvature

The model is a random Llama: no trained weights are needed to measure arithmetic. Every round runs every job once, on one
core, and adds a line to --runs, so that rounds can be made one at a time on a machine that is not always free; the section
"curvature" of docs/benchmarks.md is written from all rounds of that file. A ratio is the median of the ratios within a round.
Wall seconds say nothing on a machine where others compute: processor seconds are beside them, and a goal counts as met only
when both are. Another tool's job that fails is a round's result too, and the section says why; one of ours ends the run.
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
from importlib.metadata import PackageNotFoundError, version
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
    "curvlinops": "curvlinops, K-FAC factors",
    "bergson": "bergson, covariances",
}
PEERS = {
    "kronfluence": "kronfluence",
    "kronfluence-ekfac": "kronfluence",
    "curvlinops": "curvlinops-for-pytorch",
    "bergson": "bergson",
}
"""Jobs of other tools → their distributions."""
Goal = tuple[str, Callable[[Round, str], float], str, float]


CLOCKS = ("wall", "processor")


def over(one: str, other: str) -> Callable[[Round, str], float]:
    """Divide what one job takes by what another does."""
    return lambda found, figure: found[one][figure] / found[other][figure]


def memory(one: str, other: str) -> Callable[[Round, str], float]:
    """Divide the peak of one job by another's."""
    return lambda found, _: found[one]["mib"] / found[other]["mib"]


def without_eigenbases(found: Round, clock: str) -> float:
    """Compare what both sides spend on the data alone."""
    parts = found["kronfluence-ekfac"]["parts"]
    which = CLOCKS.index(clock)
    return (parts["covariances"][which] + parts["lambdas"][which]) / found["marginal"][clock]


GOALS: list[Goal] = [
    ("resident ÷ plain", over("resident", "plain"), "≤", 1.10),
    ("streamed ÷ plain", over("streamed", "plain"), "≤", 1.40),
    ("kronfluence ÷ resident", over("kronfluence", "resident"), "≥", 1.5),
    ("kronfluence ÷ streamed", over("kronfluence", "streamed"), "≥", 1.0),
    ("streamed ÷ kronfluence, peak memory", memory("streamed", "kronfluence"), "≤", 0.65),
    ("resident ÷ bfloat16", over("resident", "bfloat16"), "≥", 1.5),
    ("kronfluence EK-FAC ÷ marginal", over("kronfluence-ekfac", "marginal"), "≥", 4.0),
    ("the same, eigenbases made on our side too", over("kronfluence-ekfac", "marginal-eigen"), "≥", 4.0),
    ("the same, eigenbases on neither side", without_eigenbases, "≥", 4.0),
    ("curvlinops ÷ resident", over("curvlinops", "resident"), "≥", 1.5),
    ("bergson ÷ resident", over("bergson", "resident"), "≥", 1.0),
]


def run(job: str, folder: Path) -> dict:
    """Run one job in a process of its own: return what it measured, or why it failed when it is not ours."""
    command = [sys.executable, str(Path(__file__).with_name("curvature_jobs.py")), job, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and job in PEERS:
        return {"failed": reason(result)}
    if result.returncode:
        sys.exit(f"{job}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().split("\n")[-1])


def reason(result: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of what a failed process wrote, or how it ended when a signal ended it or it wrote nothing."""
    lines = result.stderr.strip().splitlines()
    if result.returncode < 0:
        return f"ended by signal {-result.returncode}"
    return lines[-1].strip() if lines else f"exit status {result.returncode}"


def named(distribution: str) -> str:
    """Return a distribution's name and version, or the name alone when it is not installed."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def ran(rounds: list[Round], job: str) -> list[dict]:
    """Return what a job measured, in the rounds where it ran and did not fail."""
    return [found[job] for found in rounds if "wall" in found.get(job, {})]


def failures(rounds: list[Round]) -> list[str]:
    """Say which jobs of other tools failed when they were last tried, and why."""
    last = {job: found[job] for found in rounds for job in PEERS if job in found}
    return [f"{named(PEERS[job])} could not be run: {one['failed']}" for job, one in last.items() if "failed" in one]


def spread(values: list[float], digits: int) -> str:
    """Return median (smallest–largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(rounds: list[Round]) -> str:
    """Make the page's section."""
    lines = ["| job | wall s | processor s | peak MiB |", "|---|---|---|---|"]
    for job, title in TITLES.items():
        runs = ran(rounds, job)
        if runs:
            cells = [spread([run[clock] for run in runs], 1) for clock in CLOCKS]
            lines.append(f"| {title} | {' | '.join(cells)} | {max(run['mib'] for run in runs):.0f} |")
    lines += ["", "| ratio | goal | wall | processor | |", "|---|---|---|---|---|"]
    for title, ratio, sense, goal in GOALS:
        found: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
        for one in rounds:
            with suppress(KeyError):  # a round of some of the jobs
                for clock in CLOCKS:
                    found[clock].append(ratio(one, clock))
        if not found["wall"]:
            continue
        middle = [statistics.median(values) for values in found.values()]
        met = all(m <= goal if sense == "≤" else m >= goal for m in middle)
        cells = " | ".join(spread(values, 2) for values in found.values())
        lines.append(f"| {title} | {sense} {goal:g} | {cells} | {'met' if met else 'missed'} |")
    parts = [one["parts"] for one in ran(rounds, "kronfluence-ekfac")]
    if parts:
        each = ", ".join(f"{name} {statistics.median(p[name][1] for p in parts):.1f}" for name in parts[0])
        lines += ["", f"kronfluence's EK-FAC by parts, processor seconds: {each}."]
    for line in dict.fromkeys(failures(rounds)):
        lines += ["", line]
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
    if not (model / "tokens.npy").exists():
        asked.work.mkdir(parents=True, exist_ok=True)
        make(model, **SHAPE)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for _ in range(asked.rounds):
        found = {job: run(job, model) for job in asked.jobs}
        with open(runs, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print({job: one.get("failed") or [round(one[clock], 2) for clock in CLOCKS] for job, one in found.items()}, flush=True)
    rounds = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
    peers = dict.fromkeys(named(distribution) for job, distribution in PEERS.items() if ran(rounds, job))
    section = f"{', '.join([machine(), *peers])}; one core, {len(rounds)} rounds.\n\n{table(rounds)}\n"
    record("curvature", section)
    print(section)


if __name__ == "__main__":
    main()
