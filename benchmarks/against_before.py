"""The commands of this tree against those of an older one: same machine, same run, interleaved, on one core.

    make bench-before OLD=DIR          # DIR: a worktree of the older commit, such as `git worktree add --detach DIR COMMIT`

Both trees run in one environment, so that only liborth differs. Each measures its own factor sets and reads its own splits;
options are those that both have. A job counts as slower when the median over the rounds, of processor seconds now over before,
is above `SLOWER`. Jobs that are done within two seconds run five times in a round, those that take a minute in the first only.
What a run that was stopped has measured is kept in --work, which needs 12 GB.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
from measure import Measured, clear, median, pair_parser, run
from record import machine, record

SLOWER = 1.05
SHORT, AGAIN, LONG = 2.0, 5, 60.0
"""Processor seconds under which a job runs so often in a round, and those over which it runs once."""
RETAIN, FORGET = (4, 512), (24, 10)
"""Rows and tokens a row of the two sets."""
STORIES = Path(__file__).resolve().parents[1] / "liborth_cli" / "demo" / "stories"


class Tree:
    """One source tree, and a folder for what its commands write.

    Attributes:
        work: that folder.
    """

    def __init__(self, source: Path, work: Path, cores: str) -> None:
        """Compile the tree, so that no run pays for it."""
        self.work, self._env, self._cores = work, {"PYTHONPATH": str(source.resolve())}, cores
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(source / "liborth_cli")], check=True)
        self._neutral = "--no-require" if any("--no-require" in f.read_text() for f in source.rglob("cli/verify.py")) else ""

    def measure(self, words: str) -> Measured:
        """Run a command; {work} in it is the folder, whose outputs of earlier runs are removed.

        {neutral} is the option without which newer trees end with an error where nothing was required.
        """
        clear(self.work / "out")
        given = words.format(work=self.work, neutral=self._neutral).split()
        return run([sys.executable, "-P", "-m", "liborth_cli", *given], self._cores, self._env)

    def keep(self, words: str, name: str) -> None:
        """Run a command whose output later ones read, unmeasured, and give it a name; not if an earlier run has."""
        if (self.work / name).exists():
            return
        self.measure(words)
        for ending in ("", ".private"):
            if (written := self.work / f"out{ending}").exists():
                written.rename(self.work / f"{name}{ending}")


def prepared(pair: Path, rows: Path) -> dict[str, str]:
    """Return name → command of what the jobs read."""
    half = f"--fisher empirical --at 0.5 --reference {pair}/base --data {rows}/forget.npy"
    return {
        "retain": f"curvature {pair}/finetuned --data {rows}/retain.npy --diagonal -o {{work}}/out -q",
        "forget": f"curvature {pair}/finetuned {half} -o {{work}}/out -q",
        "tokens": f"curvature {pair}/finetuned {half} --per-token -o {{work}}/out -q",
        "divided": f"split {pair}/base {pair}/finetuned --rank 64 -o {{work}}/out -q",
        "stories": f"split {STORIES}/base {STORIES}/finetuned --rank 8 -o {{work}}/out -q",
    }


def commands(pair: Path, rows: Path) -> dict[str, str]:
    """Return job → command."""
    out = "-o {work}/out -q"
    split = f"split {pair}/base {pair}/finetuned {out} --method"
    small = f"{STORIES}/base {STORIES}/finetuned"
    codes, texts, held = f"{STORIES}/secrets.jsonl", f"{STORIES}/retain.jsonl", f"{STORIES}/held_out.jsonl"
    six = "-i layers.[0-5][.]"
    some = f"{six} --retain {{work}}/retain"
    return {
        "`--version`": "--version",
        "`--help`": "--help",
        "`split --help`": "split --help",
        "`inspect`, one side": f"inspect {pair}/finetuned",
        "`inspect`, both": f"inspect {pair}/base {pair}/finetuned",
        "`split --method svd --dry-run`": f"{split} svd --rank 64 --dry-run",
        "`split --method svd --rank 64`": f"{split} svd --rank 64",
        "`split --method scale --scale 0.7`": f"{split} scale --scale 0.7",
        "`split --method random --energy 0.5`, 6 blocks of 24": f"{split} random --energy 0.5 {six}",
        "`split --method magnitude --density 0.1`, 6 blocks": f"{split} magnitude --density 0.1 {six}",
        "`split --method diagonal --mass 0.9`, 6 blocks": f"{split} diagonal --mass 0.9 {some}",
        "`split --method kfac --mass 0.9`, 6 blocks": f"{split} kfac --mass 0.9 {some}",
        "`split --method contrastive`, 6 blocks": f"{split} contrastive --strength 0.1 {some} --forget {{work}}/forget",
        "`split --method tokenwise`, 6 blocks": f"{split} tokenwise --strength 0.1 {some} --forget {{work}}/tokens",
        "`excise --beta 0`": f"excise {{work}}/divided --beta 0 {out}",
        "`excise --beta 0.7`": f"excise {{work}}/divided --beta 0.7 {out}",
        "`excise --beta 1`": f"excise {{work}}/divided --beta 1 {out}",
        "`verify --integrity`": "verify {work}/divided --integrity -q",
        "`curvature`, 512 tokens": f"curvature {pair}/finetuned --data {rows}/retain.npy --tokens 511 {out}",
        "shipped pair: `curvature`, 10,000 tokens": f"curvature {STORIES}/finetuned --data {texts} --tokens 10000 {out}",
        "shipped pair: `split --method tokenwise` of texts": f"split {small} --method tokenwise --strength 0.1 "
        f"--retain-data {texts} --retain-tokens 2000 --forget-data {codes} {out}",
        "shipped pair: `verify --sweep`": "verify {work}/stories {neutral} "
        f"--canary {codes} --retain-data {held} --sweep -q",
        "shipped pair: `tune --method ogd --steps 10`": f"tune {STORIES}/base --method ogd --data {held} --retain-data {texts} "
        f"--steps 10 --batch-size 4 --seq-len 128 --truncate {out}",
    }  # fmt: skip


def _wanted(found: list[list[Measured]], rounds: int) -> int:
    """Return how often a job has run after so many rounds; the first run says how long it takes."""
    first = found[0][0].cpu_seconds if found else LONG
    return 1 if first >= LONG else rounds * (AGAIN if first < SHORT else 1)


def _seconds(runs: list[Measured]) -> str:
    spent = [one.cpu_seconds for one in runs]
    return f"{statistics.median(spent):.2f} ({min(spent):.2f}–{max(spent):.2f})"


def main() -> None:
    """Measure, print and record."""
    parser = pair_parser(__doc__)
    parser.add_argument("--old", type=Path, required=True, help="the older source tree")
    parser.add_argument("--cores", default="0", help="processors to pin both to")
    parser.add_argument("--only", default="", help="jobs whose name holds this: measured and kept in --work, not recorded")
    a = parser.parse_args()
    before, now = (
        Tree(source, a.work / name, a.cores) for source, name in ((a.old, "before"), (Path(__file__).parents[1], "now"))
    )
    draw, tokens = np.random.default_rng(0), json.loads((a.pair / "base" / "config.json").read_text())["vocab_size"]
    for name, shape in (("retain", RETAIN), ("forget", FORGET)):
        np.save(a.work / f"{name}.npy", draw.integers(3, tokens, shape))
    for tree in (before, now):
        for name, command in prepared(a.pair, a.work).items():
            tree.keep(command, name)
    jobs = {job: command for job, command in commands(a.pair, a.work).items() if a.only in job}
    kept = a.work / "runs.jsonl"
    runs: dict[str, list[list[Measured]]] = {job: [] for job in jobs}
    for job, *both in map(json.loads, kept.read_text().splitlines() if kept.exists() else ()):
        runs.setdefault(job, []).append([Measured(*one) for one in both])
    for number in range(1, a.repeat + 1):
        for job, command in jobs.items():
            found = runs[job]
            while len(found) < _wanted(found, number):
                found.append([before.measure(command), now.measure(command)])
                with kept.open("a") as file:
                    file.write(json.dumps([job, *map(astuple, found[-1])]) + "\n")
                print(job, *found[-1], flush=True)
    lines = [
        "| job | runs | before: processor s (min–max) | now | now ÷ before (min–max) | peak MiB, anonymous, before | now |",
        "|---|---:|---|---|---|---|---|",
    ]
    slower = []
    for job in jobs:
        found = runs[job]
        ratios = [new.cpu_seconds / old.cpu_seconds for old, new in found]
        ratio = statistics.median(ratios)
        if ratio > SLOWER:
            slower.append(job)
        old, new = ([pair[side] for pair in found] for side in (0, 1))
        cells = (job, len(found), _seconds(old), _seconds(new), f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        peaks = (f"{median(one).anonymous_mib:.0f}" for one in (old, new))
        lines.append(f"| {' | '.join(map(str, (*cells, *peaks)))} |")
    told = subprocess.run(
        ["git", "-C", str(a.old), "log", "-1", "--format=%h of %cs"], capture_output=True, text=True, check=True
    )
    verdict = (
        f"Slower by more than a twentieth: {'; '.join(slower)}." if slower else "Nothing is slower by more than a twentieth."
    )
    head = f"{machine()}; pinned to processor {a.cores}; interleaved. Before: commit {told.stdout.strip()}."
    text = f"{head}\n\n" + "\n".join(lines) + f"\n\n{verdict}"
    print(text)
    if not a.only:
        record("before", text)


if __name__ == "__main__":
    main()
