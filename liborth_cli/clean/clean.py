"""A run of `clean`: rows are set aside, more of them looked for, then split, verified and written as one asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.documents import load_object
from liborth_cli.checkpoint.hub import resolve
from liborth_cli.checkpoint.outputs import Place, check_apart, check_outputs
from liborth_cli.checkpoint.private import private_place
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.clean.aside import Public, check_readable, set_aside
from liborth_cli.clean.commands import CERTIFICATE, REPORT, ROWS, Step, Task, Typist
from liborth_cli.clean.costs import Costs
from liborth_cli.clean.more import PRIVATE, with_more
from liborth_cli.clean.request import CleanRequest
from liborth_cli.clean.work import claimed
from liborth_cli.console import Console, JsonObject, size
from liborth_cli.errors import BadInput, VerificationFailed
from liborth_cli.machine import Run
from liborth_cli.stream.texts import DataFile


@dataclass(frozen=True)
class Verdict:
    """What `verify` said."""

    outcome: str
    sentences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it held."""
        return self.outcome == "passed"

    @classmethod
    def read(cls, file: Path) -> Verdict:
        """Read a certificate.

        Raises:
            BadInput: when it is none.
        """
        document = load_object(file, 1 << 28)
        try:
            return cls(str(document["outcome"]), tuple(map(str, document["sentences"])))
        except (KeyError, TypeError):
            raise BadInput(f"{file}: no certificate of `liborth verify`; run again with --force") from None


def clean(request: CleanRequest, typist: Typist, run: Run, console: Console) -> None:
    """Remove private text from a fine-tune, and attack what is left.

    Args:
        request: what is read, how, and where the result goes.
        typist: carries the commands out.
        run: device, resume and force.
        console: where the commands and the result are printed.

    Raises:
        VerificationFailed: when the verdict is not "passed"; the output is not written then.
        LiborthError: of what was refused.
    """
    given, place = request.given, private_place(request.out)
    rows, inputs = place / ROWS, _inputs(request, run.force)
    aside = set_aside(given, rows, console.note)
    with Checkpoint.open(inputs[0]) as old, open_model(inputs[1], old) as model:
        unasked = check_readable(given, aside, model)
        costs = Costs.of(model, given.private, run.device)
    method, why = (request.method, "") if request.method else costs.method()
    unasked = "" if request.listed_only else unasked or costs.unsearched()
    notes = [*([f"method: {why}"] if why else []), *aside.public.notes, *aside.notes]
    notes += [f"NOT asked for rows like the private ones that are not listed: {unasked}"] if unasked else []
    for line in notes:
        console.note(f"# {line}")
    task = Task(request, place, method, costs.attack_rank)
    search = None if request.listed_only or unasked else task.search(given.private, aside, costs.texts)
    first, steps = [search] if search else [], task.steps(given.private, aside)
    if request.dry_run:
        # the rows are not set aside, so a split is planned that reads all of --public
        unwritten = task.split(given.private, replace(aside, public=Public(given.public, ()), level=None, forms=None))
        planned = typist.plan([*unwritten.words, "--dry-run", "--quiet"])
        told = [costs.search(rows / PRIVATE)] if search else []
        told += [*planned.strip().splitlines(), costs.attack(request.attacks)]
        console.result(*_plan([*first, *steps], costs.nbytes, notes, told))
        return
    unlisted = None
    with claimed(place, [*first, *steps], inputs, typist, run, console) as work:
        aside.write(rows)
        if search:
            work.carry_out(search)
        else:
            task.unlisted.unlink(missing_ok=True)
        more = with_more(given, task.unlisted, rows)
        if more.count:  # what hangs on the private rows is decided anew
            found = set_aside(more.given, rows, lambda line: None, aside.public)
            found.write(rows)
            for line in found.notes:
                if line not in aside.notes:
                    console.note(f"# {line}")
            steps = task.steps(more.given.private, found)
        if search:
            unlisted = more.count
            (console.warn if more.count else console.note)(str(more))
        *before, last = steps
        for step in before:
            work.carry_out(step)
        verdict = Verdict.read(place / CERTIFICATE)
        if verdict.passed:
            work.carry_out(last)
    _tell(task, verdict, [*first, *steps], unlisted, console)


def _inputs(request: CleanRequest, force: bool) -> list[Path]:
    """Find every input, and hold the output against them: the two checkpoints first."""
    given = request.given
    found = [resolve(request.base).path, resolve(request.finetuned).path]
    public, held_out, fresh = given.public, given.held_out, (given.fresh,) if given.fresh else ()
    named = {"--private": (given.private,), "--public": public, "--held-out": held_out, "--fresh": fresh}
    data = [DataFile.parse(name, option) for option, names in named.items() for name in names]
    found += [file.path for file in data if not file.hub]
    check_outputs([Place(request.out)], found, force)
    check_apart(Place(private_place(request.out)), found)
    return found


def _plan(steps: Sequence[Step], nbytes: int, notes: Sequence[str], costs: Sequence[str]) -> tuple[str, JsonObject]:
    """Say what would be done, and what it takes."""
    lines = [*map(str, steps), f"# {size(3 * nbytes)} of disk at most: the general checkpoint twice, and the memory"]
    lines += [f"# {line}" for line in costs]
    document = {
        "commands": [str(step) for step in steps], "disk_bytes": 3 * nbytes, "notes": list(notes), "costs": list(costs)
    }  # fmt: skip
    return "\n".join(lines), document


def _tell(task: Task, verdict: Verdict, steps: Sequence[Step], unlisted: int | None, console: Console) -> None:
    """Print where the checkpoint is, or fail with the verdict and say how to have it all the same.

    Args:
        task: what the commands were made of.
        verdict: of `verify`.
        steps: that were carried out, and the last.
        unlisted: rows that went beside those of the list; None where nobody looked.
        console: where it goes.
    """
    out, place = task.request.out, task.place
    document = {
        "output": str(out) if verdict.passed else None, "outcome": verdict.outcome, "sentences": list(verdict.sentences),
        "report": str(place / REPORT), "certificate": str(place / CERTIFICATE), "commands": [str(step) for step in steps],
        "unlisted": unlisted,
    }  # fmt: skip
    console.note(f"report: {place / REPORT}; {place} is PRIVATE: it holds the memory and the rows, publish it nowhere")
    if verdict.passed:
        console.result(str(out), document)
        return
    if console.as_json:
        console.result("", document)
    console.note(f"{out} was not written; to have the checkpoint all the same: {steps[-1]}")
    raise VerificationFailed(verdict.sentences[0][:280])
