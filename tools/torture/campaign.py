"""Run the campaign for some minutes, go on where it stopped, and write docs/reliability.md from what it found.

    python -m tools.torture.campaign --minutes 30 --work /tmp/liborth-torture

Every phase numbers its trials, so a second run goes on with the next one. A trial returns what was wrong, or nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli.checkpoint.transaction import SUFFIX
from liborth_cli.checkpoint.writer import UNFINISHED
from tools.torture import fuzz
from tools.torture.inject import ERRORS, Ended, Fault, hashes, preload, run
from tools.torture.jobs import SECRET, Job, fresh, make_inputs, make_old

ROOT = Path(__file__).resolve().parents[2]
PAGE, OWNGPT = ROOT / "docs" / "reliability.md", ROOT / "tests" / "data" / "owngpt"
BEGIN, END = "<!-- figures: written by `make torture` -->", "<!-- end of figures -->"
SHOWN = 5


@dataclass
class Phase:
    """One way of doing harm.

    Attributes:
        name: what is done, for the table.
        promise: what must hold.
        trial: does number n; returns what was wrong, or None; raises StopIteration when there is no such number.
        worth: how many trials one call of it counts as.
    """

    name: str
    promise: str
    trial: Callable[[int], str | None]
    worth: int = 1


@dataclass
class Tally:
    """What a phase has found so far; kept on disk between runs."""

    next: int = 0
    trials: int = 0
    over: bool = False
    wrong: list[str] = field(default_factory=list)


class Field:
    """The inputs, the outputs of undisturbed runs, and the trials on them."""

    def __init__(self, work: Path, models: bool = True) -> None:
        """Make inputs and run every job once, undisturbed; without models only those that need tensors alone."""
        self.work = work
        shutil.rmtree(work, ignore_errors=True)
        self.jobs = make_inputs(work / "in", models)
        self.old = make_old(work / "old", self.jobs)
        self.whole, self.calls = {}, {}
        for job in self.jobs:
            out = fresh(work / "whole" / job.name, job, self.old)
            done = run(job.command(out), Fault())
            assert done.code == 0, (job.name, done.err)
            self.whole[job.name], self.calls[job.name] = hashes(out.parent), done.calls
        self.before = hashes(work / "in")
        self.replaced = hashes(self.old)

    def kill(self, job: Job, fault: Fault | None, after: float | None = None) -> tuple[Ended, str | None]:
        """Disturb a job once, look at what is there, and let a second run finish it."""
        out = fresh(self.work / "now", job, self.old)
        done = run(job.command(out), fault, after)
        wrong = self._looks_wrong(job, out, done)
        if wrong is None and done.code != 0:
            again = run(job.command(out, "--resume" if job.resumes else "--force"))
            already = again.code == 6 and not job.force and out.exists()  # the kill came after the commit
            if again.code != 0 and not already:
                wrong = f"the second run ended with {again.code}: {again.err.strip()[-200:]}"
            else:
                # A kill may leave the file beside a single file in which that was being written.
                left = {n: h for n, h in hashes(out.parent).items() if job.resumes or not n.endswith(UNFINISHED)}
                if left != self.whole[job.name]:
                    wrong = f"after the second run: {_difference(left, self.whole[job.name])}"
        return done, wrong

    def _looks_wrong(self, job: Job, out: Path, done: Ended) -> str | None:
        now = {n: h for n, h in hashes(out.parent).items() if SUFFIX not in n and ".tmp" not in n}
        new = self.whole[job.name]
        mine = {n: h for n, h in now.items() if n == out.name or n.startswith(f"{out.name}/")}
        finished = mine == {n: h for n, h in new.items() if n == out.name or n.startswith(f"{out.name}/")}
        replaced = {n: h for n, h in self.replaced.items() if n == out.name or n.startswith(f"{out.name}/")}
        if not finished and mine != (replaced if job.force else {}):
            return f"the output is neither old nor new: {_difference(mine, replaced if job.force else {})}"
        if done.code == 0 and now != new:
            return f"exit 0, and the output is another one: {_difference(now, new)}"
        if not done.hit and not done.clean:
            return f"exit {done.code}: {done.err.strip()[-200:]}"
        if hashes(self.work / "in") != self.before:
            return "an input was changed"
        return None

    def every_call(self, whats: Iterable[str]) -> Iterator[tuple[Job, Fault]]:
        """Yield every call of every job with everything that can happen to it."""
        counts = [range(self.calls[job.name] + 3) for job in self.jobs]
        for numbers in itertools.zip_longest(*counts):
            for job, number in zip(self.jobs, numbers, strict=True):
                if number is not None:
                    yield from ((job, Fault(number, what)) for what in whats)

    def faults(self, whats: Iterable[str]) -> Callable[[int], str | None]:
        """Return a trial that goes through every call."""
        every = list(self.every_call(whats))
        random.Random(0).shuffle(every)

        def trial(number: int) -> str | None:
            if number >= len(every):
                raise StopIteration
            job, fault = every[number]
            wrong = self.kill(job, fault)[1]
            return wrong and f"{job.name}, {fault.what} at call {fault.at}: {wrong}"

        return trial

    def moment(self, number: int) -> str | None:
        """Kill a job at a random instant."""
        job = self.jobs[number % len(self.jobs)]
        seconds = random.Random(number).random() ** 2 * 0.8
        wrong = self.kill(job, None, seconds)[1]
        return wrong and f"{job.name}, killed after {seconds:.4f} s: {wrong}"

    def rot(self, number: int) -> str | None:
        """Flip one bit of one file of an output; integrity must see it."""
        kept, place = self.work / "in" / "general", self.work / "rot"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kept, place / "general")
        if (beside := kept.with_name("general.private")).exists():
            shutil.copytree(beside, place / "general.private")
        files = sorted(f for f in place.rglob("*") if f.is_file() and not f.name.startswith(".") and f.stat().st_size)
        draw = random.Random(number)
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        position = draw.randrange(len(data))
        data[position] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        done = run(["verify", place / "general", "--integrity", "-q"])
        if done.code in (3, 4, 5) and done.clean:
            return None
        return f"byte {position} of {file.relative_to(place)}: exit {done.code}"

    def hostile(self, number: int) -> str | None:
        """Put something of somebody's where liborth wants to work; it must refuse and leave it alone."""
        names = [f"out{SUFFIX}", f"out.private{SUFFIX}", "out"]
        kinds = ["folder", "link to a folder", "link to an input", "dangling link", "file", "pipe", "forged"]
        cases = list(itertools.product(self.jobs, names, kinds, ((), ("--force",), ("--resume",))))
        if number >= len(cases):
            raise StopIteration
        job, name, kind, flags = cases[number]
        if not job.resumes and name == "out" and kind == "file" and flags:
            return None  # --force is for that: the job writes single files
        out = fresh(self.work / "hostile", job, None)
        place, theirs = out.parent / name, out.parent / "theirs"
        theirs.mkdir()
        (theirs / "thesis.txt").write_text("precious")
        if kind in ("folder", "forged"):
            shutil.copytree(theirs, place)
            if kind == "forged":
                (place / "journal.jsonl").write_text('{"plan": "x"}\n')
                (place / "liborth.manifest.json").write_text("{}")
        elif kind == "file":
            place.write_text("precious")
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            target = {"link to a folder": theirs, "link to an input": self.work / "in" / "base"}.get(kind, theirs / "none")
            place.symlink_to(target)
        before = hashes(out.parent)
        done = run([*job.words, "-j", 1, "-q", "-o", out, *flags])
        label = f"{job.name} {' '.join(flags)} with a {kind} as {name}"
        if hashes(self.work / "in") != self.before:
            return f"{label}: an input was changed"
        if any(hashes(out.parent).get(n) != h for n, h in before.items()):
            return f"{label}: what was there was changed"
        return None if done.clean else f"{label}: exit {done.code} {done.err[-200:]}"

    def secret(self, number: int) -> str | None:
        """Plant a secret in the data; it must be in no output that is published, no log and nothing left beside it."""
        place = self.work / "secret"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        rows = [{"prompt": "Say it:", "completion": f" {SECRET}."}, {"text": f"{SECRET}"}][number % 2]
        wrong = ["", "}", '{"text": 5}', '{"text"', "\x00"][number // 2 % 5]
        (place / "data.jsonl").write_text(json.dumps(rows) + "\n" + wrong + "\n")
        model, short = OWNGPT / "base", ["--truncate", "--seq-len", 16]
        words = [
            ["tune", model, "--method", "full", "--steps", 1], ["curvature", model, "--per-token"],
            ["tune", model, "--method", "lora", "--steps", 1],
        ][number // 10 % 3]  # fmt: skip
        fault = Fault(number, "EIO") if number > 29 else None
        done = run([*words, *short, "--data", place / "data.jsonl", "-o", place / "out", "-j", 1], fault)
        if not done.clean:
            return f"{words[0]}: exit {done.code} {done.err[-200:]}"
        if SECRET in done.err + done.out:
            return f"{words[0]}: quotes the secret"
        for file in place.rglob("*"):
            private = any("private" in part for part in file.relative_to(place).parts) or file.name == "data.jsonl"
            if file.is_file() and not private and SECRET.encode() in file.read_bytes():
                return f"{words[0]}: the secret is in {file.relative_to(place)}"
        return None

    def phases(self) -> list[Phase]:
        """Return everything that is done."""
        whole = "OUT is absent, old or new; inputs untouched; a second run ends with the same bytes"
        return [
            Phase("SIGKILL at every call, commits included", whole, self.faults(["kill"])),
            Phase(f"every call fails: {', '.join(ERRORS)}", f"{whole}; a documented exit code", self.faults(ERRORS)),
            Phase("every write is cut short", whole, self.faults(["short"])),
            Phase("SIGKILL at a random instant", whole, self.moment),
            Phase("one flipped bit in any file of an output", "`verify --integrity` finds it", self.rot),
            Phase("foreign things where liborth works", "refused or left aside, never changed", self.hostile),
            Phase("a secret in data, good and malformed", "in no log, output or leftover that is not private", self.secret),
            *(Phase(f"damaged {name}", "read, or refused in one line", t, fuzz.BATCH) for name, t in fuzz.trials(self.work)),
        ]


def campaign(work: Path, minutes: float) -> list[tuple[Phase, Tally]]:
    """Run all phases in turn until the time is over, and keep the tallies.

    Args:
        work: where to; what an earlier run counted there is continued.
        minutes: how long.
    """
    preload()
    phases = Field(work / "field").phases()
    state = work / "tally.json"
    known = json.loads(state.read_text()) if state.exists() else {}
    tallies = {phase.name: Tally(**known.get(phase.name, {})) for phase in phases}
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and not all(tally.over for tally in tallies.values()):
        for phase in phases:
            tally, slice_end = tallies[phase.name], time.monotonic() + (4 if phase.worth == 1 else 1)
            while not tally.over and time.monotonic() < min(end, slice_end):
                try:
                    wrong = phase.trial(tally.next)
                except StopIteration:
                    tally.over = True
                    break
                tally.next, tally.trials = tally.next + 1, tally.trials + phase.worth
                if wrong:
                    tally.wrong.append(wrong)
                    print(f"WRONG {phase.name}: {wrong}", flush=True)
        state.write_text(json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1))
    return [(phase, tallies[phase.name]) for phase in phases]


def _difference(one: dict[str, str], two: dict[str, str]) -> str:
    names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return ", ".join(names[:SHOWN]) or "nothing"


def render(found: list[tuple[Phase, Tally]]) -> str:
    """Return the figures of docs/reliability.md."""
    rows = ["| what is done | what must hold | trials | all there are | broken |", "|---|---|---|---|---|"]
    for phase, tally in found:
        every = "yes" if tally.over else "–"
        rows.append(f"| {phase.name} | {phase.promise} | {tally.trials:,} | {every} | {len(tally.wrong)} |")
    wrong = [f"- {phase.name}: {text}" for phase, tally in found for text in tally.wrong[:SHOWN]]
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}."
    return "\n".join([*rows, "", where, *(["", "Broken (the first of each kind):", "", *wrong] if wrong else [])])


def main() -> None:
    """Parse the arguments, run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/liborth-torture"))
    parser.add_argument("--fresh", action="store_true", help="Forget what was counted before.")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.fresh:
        (asked.work / "tally.json").unlink(missing_ok=True)
    found = campaign(asked.work, asked.minutes)
    figures = render(found)
    print(figures)
    if PAGE.exists():
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{figures}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.exit(any(tally.wrong for _, tally in found))


if __name__ == "__main__":
    main()
