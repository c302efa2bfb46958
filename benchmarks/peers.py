"""liborth against mergekit on the ~370 M-parameter pair: same machine, same run, interleaved.

    make bench-mergekit                         # sets up the peers' environment and runs this

Rank-64 decomposition against mergekit-extract-lora, streaming arithmetic at β = 0.7 against mergekit's task_arithmetic.
Speed is a ratio of wall seconds; with one processor in --cores it is one of processor seconds, which others do not add to.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from chart import write_chart
from measure import LIBORTH, Measured, clear, divide, median, pair_parser, run
from record import machine, record

from liborth_cli.verify.result import Plot, Series

GOALS = {
    "all": {"rank 64": (6.0, 1 / 3), "arithmetic": (4.0, 1 / 3)},
    "one": {"rank 64": (9.0, 1 / 5), "arithmetic": (5.0, 1 / 4)},
}
"""On all processors and on one: job → times as fast, and share of the memory."""


def commands(peers: Path, pair: Path, work: Path) -> dict[str, dict[str, list[str]]]:
    """Return job → side → command."""
    base, finetuned = str(pair / "base"), str(pair / "finetuned")
    recipe = work / "task_arithmetic.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: bfloat16\n"
        f"models:\n  - model: {finetuned}\n    parameters:\n      weight: 0.7\n"
    )
    extract = [str(peers / "mergekit-extract-lora"), "--model", finetuned, "--base-model", base, "--max-rank", "64"]
    return {
        "rank 64": {
            "ours": [LIBORTH, "split", base, finetuned, "--method", "svd", "--rank", "64", "-o", str(work / "ours")],
            "mergekit-extract-lora": [*extract, "--out-path", str(work / "peer")],
        },
        "arithmetic": {
            "ours": [LIBORTH, "excise", str(work / "split"), "--beta", "0.7", "-o", str(work / "ours")],
            "mergekit task_arithmetic, 100 MB shards": [
                str(peers / "mergekit-yaml"), str(recipe), str(work / "peer"), "--out-shard-size", "100M",
            ],
        },
    }  # fmt: skip


def picture(runs: dict[str, list[Measured]]) -> Plot:
    """Draw time and memory of every run of every command; towards the lower left is better."""
    series = tuple(
        Series(name.partition(",")[0], tuple(r.seconds for r in found), tuple(r.resident_mib for r in found), line=False)
        for name, found in runs.items()
    )
    said = "; ".join(
        f"{name} {median(found).seconds:.1f} s, {median(found).resident_mib:.0f} MiB" for name, found in runs.items()
    )
    return Plot("Time and memory", said, "wall seconds", "peak MiB", series, x_log=True, y_log=True)


def main() -> None:
    """Measure, print and record, goals met or not."""
    parser = pair_parser(__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="bin directory of the environment with mergekit")
    parser.add_argument("--cores", default="", help="processors to pin both sides to, such as 0")
    a = parser.parse_args()
    shutil.rmtree(a.work, ignore_errors=True)
    a.work.mkdir(parents=True)
    divide(a.pair, a.work / "split")
    lines = [
        "| job | command | wall s (min–max) | CPU s | peak MiB | of it anonymous | speed | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missed, every, alone = [], {}, a.cores.isdigit()
    for job, sides in commands(a.peers, a.pair, a.work).items():
        runs: dict[str, list[Measured]] = {side: [] for side in sides}
        for _ in range(a.repeat):
            for side, command in sides.items():
                clear(a.work / "ours", a.work / "peer")
                runs[side].append(run(command, a.cores))
                print(job, side, runs[side][-1], flush=True)
        middle = {side: median(found) for side, found in runs.items()}
        every |= {f"{job}: {side}": found for side, found in runs.items()}
        ours, theirs = middle.values()
        clock = "cpu_seconds" if alone else "seconds"
        speed, memory = getattr(theirs, clock) / getattr(ours, clock), ours.resident_mib / theirs.resident_mib
        for side, found in middle.items():
            times = [r.seconds for r in runs[side]]
            wall = f"{found.seconds:.1f} ({min(times):.1f}–{max(times):.1f})"
            ratios = f"{speed:.1f} × | {memory:.2f} ×" if side == "ours" else "1 | 1"
            memory_mib = f"{found.resident_mib:.0f} | {found.anonymous_mib:.0f}"
            lines.append(f"| {job} | {side} | {wall} | {found.cpu_seconds:.1f} | {memory_mib} | {ratios} |")
        least, most = GOALS["one" if alone else "all"][job]
        if speed < least or memory > most:
            missed.append(f"{job}: {speed:.1f} × as fast (goal {least:g}), {memory:.2f} of the memory (goal {most:.2f})")
    shown = subprocess.run([a.peers / "python", "-m", "pip", "show", "mergekit"], capture_output=True, text=True, check=True)
    peer = "mergekit " + shown.stdout.split("Version: ")[1].split()[0]
    pinned = f"pinned to processor{'s' * (not alone)} {a.cores}" if a.cores else "not pinned"
    head = f"{machine()}; {peer}; {pinned}; median of {a.repeat} interleaved runs."
    verdict = f"Goals missed: {'; '.join(missed)}." if missed else "Both goals are met."
    table = "\n".join(lines)
    section = f"peers{'-' + a.cores if a.cores else ''}"
    chart = write_chart(section, picture(every))
    record(section, f"{head}\n\n{table}\n\n![time and memory of every run]({chart})\n\n{verdict}\n")
    print(table, verdict, sep="\n")


if __name__ == "__main__":
    main()
