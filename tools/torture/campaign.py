"""Run the campaign for some minutes, go on where it stopped, and write docs/reliability.md from what it found.

    python -m tools.torture.campaign --minutes 30 --work /tmp/liborth-torture

Every phase numbers its trials, so a second run goes on with the next one, as long as the code of liborth is the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.torture import dishonest, fuzz, system, trials
from tools.torture.field import Field, Missed
from tools.torture.inject import ERRORS, preload

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: written by `make torture` -->", "<!-- end of figures -->"
SHOWN = 5


@dataclass
class Phase:
    """One way of doing harm.

    Attributes:
        name: what is done, for the table.
        promise: what must hold.
        trial: does number n; returns what was wrong, or None; raises StopIteration when there is no such number, and Missed
            when nothing was disturbed after all.
        seconds: its share of a round, as long as it has something to do.
        worth: how many trials one call of it counts as.
    """

    name: str
    promise: str
    trial: Callable[[int], str | None]
    seconds: float
    worth: int = 1


@dataclass
class Tally:
    """What a phase has found so far; kept on disk between runs.

    Attributes:
        name: of the phase.
        promise: of the phase.
        place: of its row in the table.
        code: what was tortured, as `code` names it.
        next: number of the next trial.
        trials: how many counted.
        over: whether there are no more.
        wrong: what was wrong, by the number of the trial; tried again by the next run.
    """

    name: str
    promise: str
    place: int
    code: str
    next: int = 0
    trials: int = 0
    over: bool = False
    wrong: dict[str, str] = field(default_factory=dict)


def phases(field: Field, disk: Path) -> list[Phase]:
    """Return everything that is done.

    Args:
        field: inputs and undisturbed outputs.
        disk: an empty directory on a disk, for processes of their own.
    """
    whole = "OUT is absent, old or new; inputs untouched; a second run ends with the same bytes"
    coded = f"{whole}; a documented exit code"
    secret = "in no log, public output, leftover, core, process title or environment; nor are its tokens or a hash of it"
    bind = functools.partial
    names = f"{', '.join(ERRORS)}"
    done = [
        Phase("SIGKILL at every call, commits included", whole, field.faults(["kill"]), 10),
        Phase(f"every call fails, with one of {names}", coded, field.faults(ERRORS, once=True), 8),
        Phase("SIGKILL at a random instant", whole, field.moment, 5),
        Phase("every write is cut short", whole, field.faults(["short"]), 2.5),
        Phase("every call fails, with each of the others too", coded, field.faults(ERRORS, once=False), 0.5),
        Phase("SIGKILL by strace at a system call of a process of its own", whole, bind(system.kill, field, disk), 3),
        Phase("all system calls that change the disk", "each one was counted above", bind(system.census, field, disk), 1),
        Phase("one flipped bit in any file of an output", "`verify --integrity` finds it", bind(trials.rot, field), 4),
        Phase("foreign things where liborth works", "refused or left aside, never changed", bind(trials.hostile, field), 2),
        Phase("a secret in data, good and malformed", secret, bind(trials.secret, field), 4),
        Phase("a dishonest pass", "not passed, with the sentence that says why", bind(dishonest.trial, field.work), 3),
    ]
    parsed = [Phase(f"damaged {n}", "read, or refused in one line", t, 1.2, fuzz.BATCH) for n, t in fuzz.trials(field.work)]
    return [*done, *parsed]


def campaign(work: Path, minutes: float, workers: int, only: str = "") -> None:
    """Run all phases in turn until the time is over, and keep the tallies.

    Args:
        work: where to; what an earlier run counted there is continued.
        minutes: how long.
        workers: processes among which the phases are dealt out.
        only: a regular expression; phases of other names rest.
    """
    preload()
    end = time.monotonic() + 60 * minutes
    with fuzz.in_memory() as memory, tempfile.TemporaryDirectory(dir=work) as disk:
        field = Field(memory / "field")
        todo = [(place, phase) for place, phase in enumerate(phases(field, Path(disk))) if re.search(only, phase.name)]
        children = []
        for number, mine in enumerate(_deal(todo, workers)):
            if not (child := os.fork()):
                field.now = field.work / f"now-{number}"
                _work(mine, work, end)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


def _deal(todo: Sequence[tuple[int, Phase]], workers: int) -> list[list[tuple[int, Phase]]]:
    """Deal phases out so that every worker has about as much to do, the longest first."""
    hands: list[list[tuple[int, Phase]]] = [[] for _ in range(workers)]
    for one in sorted(todo, key=lambda one: -one[1].seconds):
        min(hands, key=lambda hand: sum(phase.seconds for _, phase in hand)).append(one)
    return hands


def _work(todo: Sequence[tuple[int, Phase]], work: Path, end: float) -> None:
    """Go round some phases until the time is over; what one of them takes beyond its share it lacks in the next rounds."""
    credit = [0.0] * len(todo)
    tallies = [_read(_file(work, place)) or Tally(phase.name, phase.promise, place, code()) for place, phase in todo]
    for (_, phase), tally in zip(todo, tallies, strict=True):
        for number in list(tally.wrong):
            if (wrong := _attempt(phase, int(number))[0]) is None:
                del tally.wrong[number]
            else:
                tally.wrong[number] = wrong
    while time.monotonic() < end and not all(tally.over for tally in tallies):
        for turn, ((place, phase), tally) in enumerate(zip(todo, tallies, strict=True)):
            credit[turn] += phase.seconds
            begun = time.monotonic()
            _slice(phase, tally, min(end, begun + credit[turn]))
            credit[turn] -= time.monotonic() - begun
            whole = _file(work, place)
            whole.with_suffix(".tmp").write_text(json.dumps(vars(tally), indent=1))
            whole.with_suffix(".tmp").replace(whole)


def _slice(phase: Phase, tally: Tally, end: float) -> None:
    """Do trials of one phase until a moment has come."""
    while not tally.over and time.monotonic() < end:
        wrong, worth = _attempt(phase, tally.next)
        if worth is None:
            tally.over = True
            break
        if wrong:
            tally.wrong[str(tally.next)] = wrong
            print(f"WRONG {phase.name}: {wrong}", flush=True)
        tally.next, tally.trials = tally.next + 1, tally.trials + worth


def _attempt(phase: Phase, number: int) -> tuple[str | None, int | None]:
    """Do one trial; return what was wrong and what it counts for: None when there is no such trial."""
    try:
        return phase.trial(number), phase.worth
    except StopIteration:
        return None, None
    except Missed:
        return None, 0


@functools.cache
def code() -> str:
    """Name the code that is tortured by git's hash of its directory, and by what was changed since."""
    git = ["git", "-C", str(ROOT)]
    known = subprocess.run([*git, "rev-parse", "--short=12", "HEAD:liborth_cli"], capture_output=True, text=True, check=False)
    same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "liborth_cli"], check=False).returncode == 0
    return (known.stdout.strip() or "unknown") + ("" if same else ", changed")


def _file(work: Path, place: int) -> Path:
    return work / f"tally-{place:02d}.json"


def _read(file: Path) -> Tally | None:
    """Return what was counted before, on this very code."""
    found = Tally(**json.loads(file.read_text())) if file.exists() else None
    return found if found and found.code == code() else None


def render(work: Path) -> str:
    """Return the figures of docs/reliability.md, from the tallies in a directory."""
    found = [Tally(**json.loads(file.read_text())) for file in sorted(work.glob("tally-*.json"))]
    rows = ["| what is done | what must hold | trials | all there are | broken |", "|---|---|---|---|---|"]
    for tally in found:
        every = "yes" if tally.over and tally.trials else "–"
        rows.append(f"| {tally.name} | {tally.promise} | {tally.trials:,} | {every} | {len(tally.wrong)} |")
    wrong = [f"- {tally.name}: {text}" for tally in found for text in list(tally.wrong.values())[:SHOWN]]
    codes = "; ".join(sorted({tally.code for tally in found}))
    where = f"`git rev-parse HEAD:liborth_cli`: {codes}. Python {platform.python_version()}, {platform.system()}."
    return "\n".join([*rows, "", where, *(["", "Broken (the first of each kind):", "", *wrong] if wrong else [])])


def main() -> None:
    """Parse the arguments, run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="0 only writes the page.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/liborth-torture"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="A regular expression: phases of other names rest.")
    parser.add_argument("--fresh", action="store_true", help="Forget what was counted before.")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.fresh:
        for file in asked.work.glob("tally-*.json"):
            file.unlink()
    if asked.minutes > 0:
        campaign(asked.work, asked.minutes, asked.workers, asked.only)
    figures = render(asked.work)
    print(figures)
    if PAGE.exists():
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{figures}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.exit("Broken (" in figures)


if __name__ == "__main__":
    main()
