"""Inputs, the outputs of undisturbed runs, and one disturbed run after another held against them."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from liborth_cli.checkpoint.files import UNFINISHED
from liborth_cli.checkpoint.private import FACTORS, GUARDS, KEY, private_place
from liborth_cli.checkpoint.private import SUFFIX as PRIVATE
from liborth_cli.checkpoint.transaction import SUFFIX
from tools.torture.inject import SHORTENED, Ended, Fault, hashes, run
from tools.torture.jobs import Job, fresh, make_inputs, make_old

SHOWN = 5
BEYOND = 3
"""Calls after the last one at which a fault is tried too: the count of a run may differ by the luck of its threads."""


class Missed(Exception):
    """The fault never came about, because the run was over; such a trial counts for nothing."""


class Field:
    """What is disturbed, and what must come out of it."""

    def __init__(self, work: Path, models: bool = True) -> None:
        """Make inputs and run every job once, undisturbed; without models only those that need tensors alone."""
        self.work, self.now = work, work / "now"
        shutil.rmtree(work, ignore_errors=True)
        self.jobs = make_inputs(work / "in", models)
        self.old = make_old(work / "old", self.jobs)
        self.whole, self.calls, self.seconds = {}, {}, {}
        for job in self.jobs:
            out = fresh(work / "whole" / job.name, job, self.old)
            begun = time.monotonic()
            done = run(job.command(out), Fault())
            self.seconds[job.name] = time.monotonic() - begun
            assert done.code == 0, (job.name, done.err)
            self.whole[job.name], self.calls[job.name] = _told(out), done.calls
        self.before = hashes(work / "in")
        self.replaced = {job.name: hashes(self.old / job.name) for job in self.jobs if job.force}

    def disturb(self, job: Job, fault: Fault | None, after: float | None = None) -> tuple[Ended, str | None]:
        """Disturb a job once, look at what is there, and let a second run finish it."""
        out = fresh(self.now, job, self.old)
        done = run(job.command(out), fault, after)
        return done, self.judge(job, out, done)

    def judge(self, job: Job, out: Path, done: Ended) -> str | None:
        """Look at what a disturbed run left, let a second one finish, and say what is wrong.

        Args:
            job: what ran.
            out: its output.
            done: how it ended.
        """
        wrong = self._looks_wrong(job, out, done)
        if wrong is not None or done.code == 0:
            return wrong
        again = run(job.command(out, "--resume" if job.resumes else "--force"))
        already = again.code == 6 and not job.force and out.exists()  # the kill came after the commit
        if again.code != 0 and not already:
            return f"the second run ended with {again.code}: {again.err.strip()[-200:]}"
        # A kill may leave the file beside a single file in which that was being written.
        left = {n: h for n, h in _told(out).items() if job.resumes or not n.endswith(UNFINISHED)}
        if left != self.whole[job.name]:
            return f"after the second run: {_difference(left, self.whole[job.name])}"
        return None

    def _looks_wrong(self, job: Job, out: Path, done: Ended) -> str | None:
        now = {n: h for n, h in _told(out).items() if SUFFIX not in n and ".tmp" not in n}
        new = self.whole[job.name]
        for name in {out.name, private_place(out).name, *(name for _, name in job.beside)}:
            mine, finished, replaced = (_part(files, name) for files in (now, new, self.replaced.get(job.name, {})))
            if mine not in (finished, replaced):
                return f"{name} is neither old nor new: {_difference(mine, replaced)}"
        if done.code == 0 and now != new:
            return f"exit 0, and the output is another one: {_difference(now, new)}"
        if not done.hit and not done.clean:
            return f"exit {done.code}: {done.err.strip()[-200:]}"
        if hashes(self.work / "in") != self.before:
            return "an input was changed"
        return None

    def every_call(self, what: Callable[[int], str], names: Iterable[str] | None = None) -> Iterator[tuple[Job, Fault]]:
        """Yield every call of every job, and a few numbers beyond the last.

        Args:
            what: number of a call → what happens to it.
            names: only calls of these names; all when None.
        """
        for job in self.jobs:
            calls = self.calls[job.name]
            for number in range(len(calls) + BEYOND):
                if names is None or (number < len(calls) and calls[number] in names):
                    yield job, Fault(number, what(number))

    def faults(self, whats: Iterable[str], once: bool | None = None) -> Callable[[int], str | None]:
        """Return a trial that goes through every call in a random order; half a write needs a write.

        Args:
            whats: what happens to a call: the first call meets the first of them, the next one the next.
            once: True ends there, False goes through the others alone, None through all.
        """
        kinds = list(whats)
        names = SHORTENED if kinds == ["short"] else None
        turns = range(len(kinds)) if once is None else range(1) if once else range(1, len(kinds))
        passes = [list(self.every_call(lambda n, turn=turn: kinds[(n + turn) % len(kinds)], names)) for turn in turns]
        for one in passes:
            random.Random(0).shuffle(one)
        every = list(itertools.chain.from_iterable(passes))

        def trial(number: int) -> str | None:
            if number >= len(every):
                raise StopIteration
            job, fault = every[number]
            done, wrong = self.disturb(job, fault)
            if wrong is None and len(done.calls) <= fault.at:
                raise Missed
            return wrong and f"{job.name}, {fault.what} at call {fault.at}: {wrong}"

        return trial

    def moment(self, number: int) -> str | None:
        """Kill a job at a random instant."""
        job = self.jobs[number % len(self.jobs)]
        seconds = random.Random(number).random() * self.seconds[job.name]
        done, wrong = self.disturb(job, None, seconds)
        if wrong is None and not done.hit:
            raise Missed
        return wrong and f"{job.name}, killed after {seconds:.4f} s: {wrong}"


def _told(out: Path) -> dict[str, str]:
    """Return what lies there, but for a directory of kept factors without any.

    What ends a run between the last step of its commit and the end leaves that, in the private directory; the key in it names
    nothing any more.
    """
    kept = private_place(out) / FACTORS
    bare = kept.is_dir() and set(os.listdir(kept)) <= {KEY}
    return {n: h for n, h in hashes(out.parent).items() if not (bare and (out.parent / n).is_relative_to(kept))}


def _part(files: dict[str, str], name: str) -> dict[str, str]:
    """Return one output's files; what is made before a private directory's memory, and outlives it, is not looked at."""
    early = tuple(f"{name}/{lasting}" for lasting in (FACTORS, *GUARDS)) if name.endswith(PRIVATE) else ()
    inside = {n: h for n, h in files.items() if n == name or n.startswith(f"{name}/")}
    return {n: h for n, h in inside.items() if not (early and (n == name or n.startswith(early)))}


def _difference(one: dict[str, str], two: dict[str, str]) -> str:
    names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return ", ".join(names[:SHOWN]) or "nothing"
