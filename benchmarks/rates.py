"""Our own commands against each other and against the floor: one core, both cores, svd, contrastive, tokenwise, excise.

    python benchmarks/rates.py --pair PAIR --work DIR

Factor sets are made once, from random tokens: how long a split takes does not depend on what they say. Where others use the
machine, processor seconds are the ones to read, and --one-core leaves out what they cannot tell. The floor of the svd
split is what no program of this kind avoids: the exact Gram matrices and the low-rank products at the rate of the best
matrix product measured in the same run, importing torch, and reading and writing from and to memory.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from make_pair import SHAPES
from measure import LIBORTH, Measured, clear, divide, median, pair_parser, run
from record import machine, record

BOTH, ONE = "", "0"
GRAM, REBUILD = 316e9, 39e9
"""Operations of the exact Gram matrices, half by symmetry, and of the low-rank products, of the pair's linear layers."""
COPYING = 0.3
"""Seconds to read and write the pair in memory."""
RETAIN, FORGET = (4, 512), (24, 10)
"""Rows and tokens a row of the two sets."""


def factors(pair: Path, work: Path) -> tuple[Path, Path]:
    """Measure the two factor sets, unless an earlier run has."""
    draw, sets = np.random.default_rng(0), []
    forget = ("--fisher", "empirical", "--per-token", "--at", "0.5", "--reference", str(pair / "base"))
    for name, shape, more in (("retain", RETAIN, ()), ("forget", FORGET, forget)):
        sets.append(work / name)
        if not sets[-1].exists():
            np.save(work / f"{name}.npy", draw.integers(3, SHAPES["370m"]["vocabulary"], shape))
            words = ("curvature", str(pair / "finetuned"), "--data", str(work / f"{name}.npy"), *more, "-o", str(sets[-1]))
            subprocess.run([LIBORTH, *words, "-q"], check=True, stdout=subprocess.DEVNULL)
    return sets[0], sets[1]


def multiply_rate() -> float:
    """Return the float32 operations a second of the best matrix product seen, on one core."""
    code = (
        "import torch, time; torch.set_num_threads(1); a = torch.randn(1024, 1024); best = 9.0\n"
        "for _ in range(60): t = time.process_time(); a @ a; best = min(best, time.process_time() - t)\n"
        "print(2 * 1024**3 / best)"
    )
    return float(subprocess.run(["taskset", "-c", ONE, sys.executable, "-c", code], capture_output=True, check=True).stdout)


def import_seconds() -> float:
    """Return the processor seconds that importing torch takes."""
    return statistics.median(run([sys.executable, "-c", "import torch"], ONE).cpu_seconds for _ in range(3))


def _range(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"


def main() -> None:
    """Measure, print and record, goals met or not."""
    parser = pair_parser(__doc__)
    parser.add_argument("--one-core", action="store_true", help="nothing on both cores")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    out, divided = a.work / "out", a.work / "divided"
    retain, forget = factors(a.pair, a.work)
    split = [LIBORTH, "split", str(a.pair / "base"), str(a.pair / "finetuned"), "-q", "-o", str(out)]
    on = ["--retain", str(retain), "--forget", str(forget), "--strength", "0.1"]
    if not divided.exists():
        divide(a.pair, divided)
    mix = [LIBORTH, "excise", str(divided), "--beta", "0.7", "-q"]
    jobs = {
        "`split --method svd --rank 64`": [*split, "--rank", "64"],
        "`split --method contrastive`": [*split, "--method", "contrastive", *on],
        "`split --method tokenwise`": [*split, "--method", "tokenwise", *on],
        "`excise --beta 0.7`": [*mix, "-o", str(out)],
        "`excise --beta 0.7 --dry-run`": [*mix, "--dry-run"],
    }
    runs: dict[tuple[str, str], list[Measured]] = {
        (job, cores): [] for job in jobs for cores in ((ONE,) if a.one_core else (ONE, BOTH))
    }
    rates, imports = [], []
    for _ in range(a.repeat):
        rates.append(multiply_rate())
        imports.append(import_seconds())
        for (job, cores), found in runs.items():
            clear(out)
            found.append(run(jobs[job], cores))
            print(job, cores or "both", found[-1], flush=True)
    middle = {key: median(found) for key, found in runs.items()}
    lines = ["| job | one core: wall s (min–max) | processor s (min–max) |", "|---|---|---|"]
    if not a.one_core:
        lines = [f"{lines[0]} both cores: wall s (min–max) | faster by | anonymous MiB, both |", f"{lines[1]}---|---|---|"]
    for job in jobs:
        cells = [_range([one.seconds for one in runs[job, ONE]]), _range([one.cpu_seconds for one in runs[job, ONE]])]
        if not a.one_core:
            gain = middle[job, ONE].seconds / middle[job, BOTH].seconds
            cells += [
                _range([one.seconds for one in runs[job, BOTH]]),
                f"{gain:.2f} ×",
                f"{middle[job, BOTH].anonymous_mib:.0f}",
            ]
        lines.append(f"| {job} | {' | '.join(cells)} |")
    rate = statistics.median(rates)
    floor = (GRAM + REBUILD) / rate + statistics.median(imports) + COPYING
    weights = sum(file.stat().st_size for file in divided.glob("model-*.safetensors"))
    moved = 3 * weights / 1e9
    clocks = ([one.seconds, one.cpu_seconds] for one in (middle[job, ONE] for job in jobs))
    svd, contrastive, tokenwise, excise, planned = clocks
    goals = [
        ("svd split on one core over its floor", "≤", 1.6, [one / floor for one in svd]),
        ("contrastive over svd, one core", "≤", 2.5, [one / other for one, other in zip(contrastive, svd, strict=True)]),
        ("tokenwise over svd, one core", "≤", 2.0, [one / other for one, other in zip(tokenwise, svd, strict=True)]),
        (
            "excise on one core, GB/s read and written, imports taken off",
            "≥",
            2.5,
            [moved / (one - other) for one, other in zip(excise, planned, strict=True)],
        ),
    ]
    if not a.one_core:
        both = middle[next(iter(jobs)), BOTH].seconds
        goals.insert(0, ("both cores over one, svd split", "≥", 1.8, [svd[0] / both]))
    lines += ["", "| ratio | goal | wall | processor | |", "|---|---|---|---|---|"]
    for title, sense, goal, values in goals:
        met = all(value <= goal if sense == "≤" else value >= goal for value in values)
        told = [f"{value:.2f}" for value in values] + [""] * (2 - len(values))
        lines.append(f"| {title} | {sense} {goal:g} | {' | '.join(told)} | {'met' if met else 'missed'} |")
    head = (
        f"{machine()}; medians of {a.repeat} interleaved rounds. Floor: {floor:.1f} s, of it {statistics.median(imports):.1f} "
        f"importing torch, at {rate / 1e9:.0f} GFLOP/s."
    )
    text = f"{head}\n\n" + "\n".join(lines)
    print(text)
    record("rates", text)


if __name__ == "__main__":
    main()
