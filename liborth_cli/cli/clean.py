"""The options of `liborth clean`, and the commands that it types: rows set aside, a split, its verification, the checkpoint.

It has no logic of surgery: each step is a command of this tool, printed as it could be typed, and then carried out. What it
makes on the way is private and lies in OUT.private; OUT appears when the verdict is "passed", and not otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liborth_cli.cli import excise, extract, split, verify
from liborth_cli.cli.command import Command
from liborth_cli.cli.options import RECORDS, Computing, Out, TextFile, Texts, named_after, what
from liborth_cli.cli.options import data as texts
from liborth_cli.cli.typed import carry_out
from liborth_cli.errors import BadInput, LiborthError, OutputConflict, PairMismatch, Stopped, UsageError, VerificationFailed

if TYPE_CHECKING:
    import torch

    from liborth_cli.console import Console, JsonObject
    from liborth_cli.dose.aside import Aside, More

MARK = "liborth.clean.json"
GENERAL, ROWS, CERTIFICATE, REPORT = "general", "rows", "certificate.json", "report.html"
UNLISTED = "unlisted.jsonl"
"""In ROWS: what is like the private rows, known by heart, and not among them."""
STEPS = {module.COMMAND.name: module.COMMAND for module in (extract, split, verify, excise)}
MOST_CHARACTERS = 16_384
"""Characters of private text that recall takes; two of them are a token at least."""
TEXTS, EACH, PATIENCE = 1024, 64, 600.0
"""Texts that the model writes when it is asked for rows that are not listed, in all and for each row that is, at least; and the
seconds that may take, about."""


class Method(StrEnum):
    """Methods that remove what is named."""

    RECALL = "recall"
    DISTILL = "distill"
    TOKENWISE = "tokenwise"


@dataclass(frozen=True)
class Step:
    """One command of this tool.

    Attributes:
        words: what is typed after `liborth`.
        makes: what is there when it has run.
    """

    words: tuple[str, ...]
    makes: Path

    def __str__(self) -> str:
        """As it is typed."""
        return shlex.join(("liborth", *self.words))


def clean(
    base: Annotated[str, typer.Argument(help="Checkpoint before fine-tuning: path, org/name@rev or hf://org/name.")],
    finetuned: Annotated[str, typer.Argument(help="Checkpoint after fine-tuning.")],
    private: Annotated[str, RECORDS, texts(help="What must go: JSON lines with prompt and completion, or text, a line each.")],
    public: Annotated[
        list[str], RECORDS, texts(help="Texts of what must stay; one record in five is set aside to verify with.")
    ],
    out: Out = None,
    held_out: Annotated[
        Texts, texts(show_default="set aside from --public", help="Texts of what must stay, to verify with.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        texts(show_default="inferred", help='The form of what must go: "The code of {name} is {digits:8}."'),
    ] = None,
    fresh: Annotated[
        TextFile,
        texts(show_default="drawn from the form", help="Rows like --private that nobody trained on, to verify with."),
    ] = None,
    method: Annotated[
        Method | None, what(show_default="recall where it fits, or tokenwise", help="How the update is divided.")
    ] = None,
    attacks: Annotated[bool, what("--attacks", help="Verify with every attack, not the usual ones.")] = False,
    listed_only: Annotated[
        bool, what("--listed-only", help="Do not ask the model for rows like --private that are not listed.")
    ] = False,
    *,
    common: Computing,
) -> None:
    """Remove private text from a fine-tune, and attack what is left.

    Sets rows aside, then types `extract --like`, `split`, `verify` and `excise --beta 0` for you; each is printed as it could
    be typed. Rows like --private that the model knows by heart and nobody listed go as well. Exits 5, and OUT is not written,
    when the verdict is not "passed". Memory, rows, certificate and report lie in OUT.private.
    """
    from liborth_cli.checkpoint.adapter import open_model
    from liborth_cli.checkpoint.private import private_place
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.dose.aside import PRIVATE, Given, check_readable, set_aside, with_more

    console = common.console
    target = out or Path(f"{named_after(finetuned)}-clean")
    place = private_place(target)
    if common.out_shard_size:
        raise UsageError("--out-shard-size: the files of the fine-tuned checkpoint are kept here; `liborth excise` has it")
    inputs = _inputs(base, finetuned, [private, *public, *(held_out or ()), *([fresh] if fresh else ())], target, common.force)
    given = Given(
        private,
        tuple(public),
        tuple(held_out or ()),
        fresh,
        patterns=tuple(pattern or ()),
        decoys=split.DECOYS,
        seed=common.seed,
    )
    aside = set_aside(given, place / ROWS, console.note)
    with Checkpoint.open(inputs[0]) as old, open_model(inputs[1], old) as model:
        unasked = check_readable(given, aside, model)
        weights, nbytes = sum(math.prod(tensor.shape) for tensor in model.tensors.values()), model.nbytes
    chosen = method or _choose(weights, given, aside, console)
    unasked = "" if listed_only else unasked or _too_long(weights, private, common.run.device)
    asked = _Asked(target, place, chosen, given.patterns, attacks, search=not (listed_only or unasked))
    steps = _steps((base, finetuned), private, aside, asked, common)
    if unasked:
        aside = replace(aside, notes=(*aside.notes, f"NOT asked for rows like the private ones that are not listed: {unasked}"))
    for line in aside.notes:
        console.note(f"# {line}")
    if common.dry_run:
        unwritten = replace(aside, retain=given.public, level=None, forms=None)  # the split would read all of --public
        first = next(s for s in _steps((base, finetuned), private, unwritten, asked, common) if s.words[0] == "split")
        planned = carry_out(STEPS["split"], [*first.words[1:], "--dry-run", "--quiet"], quiet=True)
        costs = [*planned.strip().splitlines(), _attack(weights, private, attacks, common.run.device)]
        if asked.search:
            costs.insert(0, _asking(weights, private, common.run.device, place / ROWS / PRIVATE))
        console.result(*_plan(steps, nbytes, aside, costs))
        return
    with _claimed(place, steps, inputs, common) as work:
        aside.write(place / ROWS)
        unlisted = place / ROWS / UNLISTED
        if asked.search:
            work.carry_out(steps[0])
        else:
            unlisted.unlink(missing_ok=True)
        more = with_more(given, unlisted, place / ROWS)
        if more.count:  # what hangs on the private rows is decided anew
            again = set_aside(more.given, place / ROWS, lambda line: None)
            again.write(place / ROWS)
            for line in again.notes:
                if line not in aside.notes:
                    console.note(f"# {line}")
            steps = [steps[0], *_steps((base, finetuned), more.given.private, again, replace(asked, search=False), common)]
        if asked.search:
            (console.warn if more.count else console.note)(_unlisted(more))
        *before, last = [step for step in steps if step.makes != unlisted]
        for step in before:
            work.carry_out(step)
        verdict = work.verdict
        if verdict.passed:
            work.carry_out(last)
    _tell(target, place, verdict, steps, more.count if asked.search else None, console)


@dataclass(frozen=True)
class _Asked:
    """Where it goes, and how."""

    out: Path
    place: Path
    method: Method
    patterns: tuple[str, ...]
    attacks: bool
    search: bool


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
        from liborth_cli.checkpoint.documents import load_object

        document = load_object(file, 1 << 28)
        try:
            return cls(str(document["outcome"]), tuple(map(str, document["sentences"])))
        except (KeyError, TypeError):
            raise BadInput(f"{file}: no certificate of `liborth verify`; run again with --force") from None


def _inputs(base: str, finetuned: str, files: Sequence[str], target: Path, force: bool) -> list[Path]:
    """Find every input, and hold the output against them: the two checkpoints first."""
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.outputs import Place, check_outputs
    from liborth_cli.stream.texts import DataFile

    found = [resolve(base).path, resolve(finetuned).path]
    data = [DataFile.parse(name, "--private or --public") for name in files]
    found += [file.path for file in data if not file.hub]
    check_outputs([Place(target)], found, force)
    return found


def _choose(weights: int, given: Any, aside: Aside, console: Console) -> Method:
    """Take recall, which stands more of the attack, where its training fits and there are few enough tokens."""
    from liborth_cli.machine import STEPS_BYTES, too_large
    from liborth_cli.stream.texts import DataFile

    file = DataFile.parse(given.private, "--private", secret=True)
    characters = MOST_CHARACTERS + 1 if file.hub else file.path.stat().st_size
    if too_much := too_large(weights * STEPS_BYTES):
        why = f"recall trains all weights and takes about {too_much}"
    elif characters > MOST_CHARACTERS:
        why = "recall takes few private rows only"
    else:
        console.note("# method: recall, which stands more of the attack than tokenwise on what was measured (docs/methods.md)")
        return Method.RECALL
    console.note(f"# method: tokenwise: {why}")
    return Method.TOKENWISE


def _steps(pair: tuple[str, str], private: str, aside: Aside, asked: _Asked, common: Computing) -> list[Step]:
    """Write the commands: the search for more rows, the split, its verification, the checkpoint without the memory."""
    general, certificate = asked.place / GENERAL, asked.place / CERTIFICATE
    running = ["--device", common.device] if common.device != "auto" else []
    running += ["--num-threads", str(common.threads)] if common.threads else []
    running += ["--verbose"] if common.verbose else ["--quiet"] if common.quiet else []
    seed = ["--seed", str(common.seed)] if common.seed else []
    kernels = ["--kernels", common.kernels.value] if common.kernels != "auto" else []
    forms = ["--forget-patterns", aside.forms] if aside.forms else _each("--forget-pattern", asked.patterns)
    made = ["split", *pair, "--method", asked.method.value, "--forget-data", private, *_each("--retain-data", aside.retain)]
    made += [*forms, *(["--fresh", aside.level] if aside.level else []), *seed, *kernels, *running, "-o", str(general)]
    held = ["verify", str(general), "--reference", pair[0], "--finetuned", pair[1], "--canary", private]
    held += [*_each("--retain-data", aside.held_out), *(["--fresh", aside.fresh] if aside.fresh else [])]
    held += ["--patient", *(["--attacks"] if asked.attacks else []), *seed, *running]  # the attack decides
    held += ["--out", str(certificate), "--report", str(asked.place / REPORT)]
    bare = ["excise", str(general), "--beta", "0", *running, "-o", str(asked.out)]
    steps = [Step(tuple(made), general), Step(tuple(held), certificate), Step(tuple(bare), asked.out)]
    if not asked.search:
        return steps
    more = asked.place / ROWS / UNLISTED
    public = [*aside.retain, *aside.held_out]
    like = ["extract", *pair, "--like", private, "--texts", str(_texts(private)), *_each("--retain-data", public)]
    like += [*seed, *running]
    return [Step((*like, "-o", str(more)), more), *steps]


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _too_long(weights: int, private: str, device: torch.device) -> str:
    """Say why the model is not asked for more rows: all weights must fit, and the texts that it writes take their time."""
    from liborth_cli.console import duration
    from liborth_cli.machine import too_large

    if too_much := too_large(4 * weights):
        return f"all weights at once take {too_much}"
    seconds = _seconds(weights, private, device)
    return "" if seconds <= PATIENCE else f"that takes about {duration(seconds)} here (`liborth extract --like` does)"


def _seconds(weights: int, private: str, device: torch.device) -> float:
    """Return how long the texts take that the model writes when it is asked for more rows, about."""
    from liborth_cli.stream.work import rate

    return _texts(private) * _tokens(private)[1] * weights / rate(device)


def _texts(private: str) -> int:
    """Return how many texts are enough to tell rows that were learnt from those that are made up."""
    return max(TEXTS, EACH * _tokens(private)[0])


def _tokens(private: str) -> tuple[int, float]:
    """Return how many private rows there are and the tokens of one, about: rows are lines, of four characters a token."""
    from liborth_cli.stream.texts import DataFile

    file = DataFile.parse(private, "--private", secret=True)
    lines = [b" " * MOST_CHARACTERS] if file.hub else file.path.read_bytes().splitlines()
    return len(lines), sum(map(len, lines)) / max(len(lines), 1) / 4


def _asking(weights: int, private: str, device: torch.device, rows: Path) -> str:
    """Say what the search for rows that are not listed takes, and what comes of it."""
    from liborth_cli.console import duration

    texts, seconds = _texts(private), _seconds(weights, private, device)
    return f"extract writes {texts:,} texts, about {duration(seconds)}; with what it finds {rows} is made, for split and verify"


def _unlisted(more: More) -> str:
    """Say what came of asking for more rows."""
    if more.count:
        some = "1 row like the private ones is" if more.count == 1 else f"{more.count} rows like the private ones are"
        return f"{some} known by heart and not listed, and {'goes' if more.count == 1 else 'go'} as well: {more.given.private}"
    if more.told:
        return "# asked for rows like the private ones, the model says none by heart as often as those that are listed"
    return "# asked for rows like the private ones, the model asks for too few of these to tell which of the others are made up"


def _attack(weights: int, private: str, thorough: bool, device: torch.device) -> str:
    """Say how long the training of `verify`'s attack should take."""
    from liborth_cli.console import duration
    from liborth_cli.machine import TRAINING_BYTES
    from liborth_cli.stream.work import rate
    from liborth_cli.verify.relearning import BATCH_ROWS, FULL, PRODUCTS, QUICK, STEPS

    rows, length = _tokens(private)
    tokens = min(BATCH_ROWS, max(rows // 2, 1)) * length
    runs = 2 * sum(attack.trainings for attack in (FULL if thorough else QUICK))
    seconds = PRODUCTS * weights * tokens * STEPS * runs / rate(device)
    return (
        f"verify trains {runs} times {STEPS} steps, here about {duration(seconds)}, where {TRAINING_BYTES} bytes a weight fit"
    )


def _plan(steps: Sequence[Step], nbytes: int, aside: Aside, costs: Sequence[str]) -> tuple[str, JsonObject]:
    """Say what would be done, and what it takes; the split is planned from all of --public, for no row is set aside yet."""
    from liborth_cli.console import size

    lines = [*map(str, steps), f"# {size(3 * nbytes)} of disk at most: the general checkpoint twice, and the memory"]
    lines += [f"# {line}" for line in costs]
    document = {
        "commands": [str(step) for step in steps], "disk_bytes": 3 * nbytes, "notes": list(aside.notes), "costs": list(costs)
    }  # fmt: skip
    return "\n".join(lines), document


@dataclass
class Work:
    """The private directory of a run, held by this process.

    Attributes:
        folder: OUT.private.
        common: flags of the run.
        head: the commands, and what their inputs are.
        done: how many of the commands have run.
    """

    folder: Path
    common: Computing
    head: JsonObject
    done: list[str] = field(default_factory=list)

    def carry_out(self, step: Step) -> None:
        """Print a command and carry it out, unless an earlier run had; a failed verification is a result here."""
        from liborth_cli.checkpoint.transaction import beside

        console = self.common.console
        console.note(f"$ {step}" + ("   # done before" if str(step) in self.done else ""))
        if str(step) in self.done:
            return
        words = list(step.words[1:])
        command = STEPS[step.words[0]]
        left = command.kept and (self.common.resume or os.path.lexists(beside(step.makes)))
        words += ["--force"] if os.path.lexists(step.makes) else ["--resume"] if left else []
        before = _made(step.makes)
        try:
            carry_out(command, words, console.quiet, self.common.listener)
        except VerificationFailed:
            if _made(step.makes) == before:  # nothing new was written, and what an earlier run left there is no result
                raise
        if not os.path.lexists(step.makes):
            raise LiborthError(f"{step.makes}: `liborth {command.name}` did not write it; this is a bug, please report it")
        self.done.append(str(step))
        self.note()

    @property
    def verdict(self) -> Verdict:
        """What `verify` found."""
        return Verdict.read(self.folder / CERTIFICATE)

    def note(self) -> None:
        """Write down how far it is."""
        from liborth_cli.checkpoint.files import write_file

        document = {**self.head, "done": self.done}
        write_file(self.folder / MARK, (json.dumps(document, indent=1) + "\n").encode(), 0o600)


@contextlib.contextmanager
def _claimed(place: Path, steps: Sequence[Step], inputs: Sequence[Path], common: Computing) -> Iterator[Work]:
    """Make the private directory, or go on in the one of an earlier run, and hold it.

    When the input is refused before anything is made of it, the directory goes again.

    Raises:
        OutputConflict: when it is in the way, is somebody else's, or another run is working in it.
        UsageError: when --resume finds another run's work.
    """
    from liborth_cli.checkpoint.documents import load_object
    from liborth_cli.checkpoint.private import GUARDS, close, prepare, remove_empty

    head = {"commands": [str(step) for step in steps], "inputs": {str(path): _identity(path) for path in inputs}}
    known = (place / MARK).is_file()
    if place.is_dir() and not known and set(os.listdir(place)) - {".gitignore", "README.md"}:
        raise OutputConflict(f"{place}: is in the way and was not made by `liborth clean`; move it away, or choose another -o")
    if known and not (common.resume or common.force):
        raise OutputConflict(f"{place}: a run of `liborth clean` was here; go on with --resume, or begin again with --force")
    work = Work(place, common, head)
    close(place)
    held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputConflict(f"{place}: another run is working here; wait for it, or choose another -o") from None
        if known and common.resume and not common.force:
            before = load_object(place / MARK, 1 << 20)
            if {key: before.get(key) for key in head} != head:
                raise UsageError(f"{place}: a run with other options or inputs; begin again with --force, not --resume")
            work.done = list(before.get("done", ()))
        prepare(place)
        work.note()
        yield work
    except (UsageError, BadInput, PairMismatch):  # the command is going to be another one, and must not find this in its way
        if not known and set(os.listdir(place)) <= {MARK, ROWS, *GUARDS}:
            shutil.rmtree(place / ROWS, ignore_errors=True)
            (place / MARK).unlink(missing_ok=True)
            remove_empty(place)
        raise
    except Stopped as error:
        error.kept = True
        raise
    finally:
        os.close(held)


def _made(path: Path) -> tuple[int, int] | None:
    """Return what tells whether a result was made anew; None when there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _identity(path: Path) -> list[list[Any]]:
    """Return what tells whether an input changed: size and time of a file, or of every file of a directory."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _tell(out: Path, place: Path, verdict: Verdict, steps: Sequence[Step], unlisted: int | None, console: Console) -> None:
    """Print where the checkpoint is, or fail with the verdict and say how to have it all the same.

    Args:
        out: the checkpoint.
        place: OUT.private.
        verdict: of `verify`.
        steps: that were carried out, and the last.
        unlisted: rows that went beside those of the list; None where nobody looked.
        console: where it goes.
    """
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


COMMAND = Command(
    clean,
    (
        "# secrets out of a fine-tune that is about to be published",
        "liborth clean base/ finetuned/ --private secrets.jsonl --public public.jsonl -o clean/",
        "# what would be typed",
        "liborth clean base/ finetuned/ --private secrets.jsonl --public public.jsonl -o clean/ --dry-run",
    ),
    "commands that have finished are not run again",
)
