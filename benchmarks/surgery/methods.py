"""Every edit of the surgery benchmark: ours through the command line, and the rivals."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import clear
from benchmarks.rivals import RIVALS
from benchmarks.surgery.job import Job, Rival
from benchmarks.surgery.measure import Judge, load
from benchmarks.surgery.tuning import Trials


@dataclass(frozen=True)
class Editor:
    """A way to edit, at several doses.

    Attributes:
        name: for the table.
        doses: weakest first.
        edit: the model at a dose.
        reference: whether it needs the model before fine-tuning.
        given: the file of the rows that it is told of, or would be if it took any; "": it was to find them.
    """

    name: str
    doses: tuple[float, ...]
    edit: Callable[[Judge, float, Path], Any]
    reference: bool = True
    given: str = "given"


def liborth(*words: object) -> None:
    """Run a command, quietly."""
    from typer.main import get_command

    from liborth_cli.cli.main import app

    with contextlib.redirect_stdout(io.StringIO()):
        get_command(app).main(args=[*map(str, words), "-q"], standalone_mode=False)


AUTO = "auto"
"""The name of the editor that leaves the choice to `--method auto`: what it writes is one of the others."""
LIKE = "like"
"""The name of the file of what the fine-tuned model answers when it is asked for more rows like those that are named."""


def _ours(
    name: str,
    doses: tuple[float, ...],
    words: tuple[str, str],
    told: str = "",
    fresh: str = "",
    alone: bool = False,
    tables: bool = False,
    lessons: bool = False,
    found: bool = False,
    facts: tuple[str, ...] = (),
    more: tuple[object, ...] = (),
) -> Editor:
    """Make an editor of one of our methods.

    Args:
        name: for the table.
        doses: weakest first.
        words: the method of `liborth split`, and the option that takes the dose.
        told: the rows to forget that it is given; "" for methods that take none.
        fresh: the rows it is given as never trained on; "" for methods that take none.
        alone: it can edit the weights themselves, where there is no reference.
        tables: it divides tables of tokens too, and not only what lies inside the blocks.
        lessons: it is given more texts of what should stay.
        found: it is also given what the fine-tuned model writes by heart, and nobody named.
        facts: files of rows that should stay and look like memory, which no other file has then.
        more: words of the command.
    """
    method, amount = words

    def edit(judge: Judge, dose: float, scratch: Path) -> Any:
        clear(scratch)
        public = "plain" if facts else "retain"
        texts = ("--retain-data", judge.folder / f"{public}.jsonl", "--truncate") if method not in BLIND else ()
        texts += ("--retain-data", judge.folder / "lessons.jsonl") if lessons else ()
        if LIKE in facts:
            _alike(judge)
        texts += tuple(word for name in facts for word in ("--retain-data", judge.folder / f"{name}.jsonl"))
        texts += ("--forget-data", judge.folder / f"{told}.jsonl") if told else ()
        texts += ("--forget-data", _extracted(judge)) if found else ()
        texts += ("--fresh", judge.folder / f"{fresh}.jsonl") if fresh else ()
        single = (judge.folder / "finetuned", "--one-checkpoint")
        pair = (judge.folder / "base", judge.folder / "finetuned") if judge.reference is not None else single
        inside = () if tables else ("-i", "proj")
        liborth("split", *pair, "--method", method, amount, dose, *inside, *texts, *more, "-o", scratch)
        return load(scratch)

    return Editor(name, doses, edit, reference=not alone, given="given" if told == "decoys" or not (told or found) else told)


def _extracted(judge: Judge) -> Path:
    """Return the file of what the fine-tuned model writes by heart, beside the texts that should stay."""
    out, pair = judge.folder / "extracted.jsonl", (judge.folder / "base", judge.folder / "finetuned")
    texts = [word for name in ("retain", "lessons") for word in ("--retain-data", judge.folder / f"{name}.jsonl")]
    liborth("extract", *pair, *texts, "--texts", 16384, "--max-new-tokens", 32, "-o", out, "--force")
    return out


def _alike(judge: Judge) -> None:
    """Ask the fine-tuned model for more rows like the facts that are named."""
    out, pair = judge.folder / f"{LIKE}.jsonl", (judge.folder / "base", judge.folder / "finetuned")
    liborth("extract", *pair, "--like", judge.folder / "named.jsonl", "-o", out, "--force")


def _auto(doses: tuple[float, ...]) -> Editor:
    """Make the editor that leaves method and amount to `--method auto`; a dose is the share of the skill that is asked for."""

    def edit(judge: Judge, dose: float, scratch: Path) -> Any:
        clear(scratch)
        texts = ("--retain-data", judge.folder / "retain.jsonl", "--retain-data", judge.folder / "lessons.jsonl", "--truncate")
        told = ("--forget-data", judge.folder / "given.jsonl", "--fresh", judge.folder / "decoys.jsonl")
        target = f"forget>=fresh-spread,leak<=0.4,relearn<=0.5,retention>={dose}"
        pair = (judge.folder / "base", judge.folder / "finetuned")
        liborth("split", *pair, "--method", AUTO, "--target", target, *texts, *told, "-o", scratch)
        return load(scratch)

    return Editor(AUTO, doses, edit)


def _geodesic(doses: tuple[float, ...]) -> Editor:
    """Make the editor that scales the update along the geodesic of the retain curvature, in place of the straight line."""

    def edit(judge: Judge, dose: float, scratch: Path) -> Any:
        whole, sets = scratch.with_name("before"), [scratch.with_name(f"at-{end}") for end in ("general", "finetuned")]
        clear(scratch, whole, *sets)
        pair = (judge.folder / "base", judge.folder / "finetuned")
        liborth("split", *pair, "--method", "scale", "--scale", 0.001, "-i", "proj", "-o", whole)
        for model, out in zip((whole, pair[1]), sets, strict=True):
            liborth("curvature", model, "--data", judge.folder / "retain.jsonl", "--truncate", "-o", out)
        ends = ("--retain-general", sets[0], "--retain-finetuned", sets[1])
        liborth("excise", whole, "--beta", dose, "--path", "geodesic", *ends, "-o", scratch)
        return load(scratch)

    return Editor("scale along the geodesic", doses, edit)


@dataclass(frozen=True)
class Student:
    """How a student is levelled, and what it is told.

    Attributes:
        level: steps of recall that it takes.
        given: the file of secrets; "": none.
        found: whether it is also told what `extract` finds.
        facts: files of rows that should stay and look like memory.
    """

    level: int
    given: str = "given"
    found: bool = False
    facts: tuple[str, ...] = ()


LEVELLED = {
    "distill, 4,000 texts": Student(12),
    "distill, 4,000 texts, 36 level steps": Student(36),
    "distill, 4,000 texts, 48 level steps": Student(48),
    "distill, 4,000 texts, 72 level steps": Student(72),
    "distill, 4,000 texts, 36 level steps, told what extract finds": Student(36, found=True),
    "distill, 4,000 texts, 72 level steps, told what extract finds": Student(72, found=True),
    "distill, 4,000 texts, 36 level steps, half of them given": Student(36, "half"),
    "distill, 4,000 texts, 36 level steps, none given, told what extract finds": Student(36, "", found=True),
    "distill, 4,000 texts, 36 level steps, half of the facts named": Student(36, facts=("named",)),
    "distill, 4,000 texts, 36 level steps, half of the facts named, the rest asked for": Student(36, facts=("named", LIKE)),
}
"""Students that read more texts."""
STUDENT = ("--student-rate", 0.512)
"""The rate that decision 0052 found best at this size."""
BLIND = ("scale", "random", "svd")
"""Methods that read no texts."""


def _rival(rival: Rival, doses: tuple[float, ...]) -> Editor:
    def edit(judge: Judge, dose: float, scratch: Path) -> Any:
        model = load(judge.folder / "finetuned")
        rival.run(Job(model, judge.reference, judge.retain(), judge.forget(), dose, 0))
        return model.eval()

    return Editor(f"{rival.name} ({rival.source})", doses, edit, reference=rival.name in REFERENCED)


REFERENCED = ("task-vector negation",)
"""Rivals that need the model before fine-tuning."""


def editors(full: bool, folder: Path) -> list[Editor]:
    """Return every editor, with all doses, or with those that usually disturb enough to be matched.

    Args:
        full: all doses.
        folder: of the kind; where `tuning.py` has tried a rival on it, that rival's one dose is the best one at KL 0.01.
    """
    trials = Trials(folder / "tuning.jsonl")

    def of(usual: tuple[float, ...], *every: float) -> tuple[float, ...]:
        return every if full else usual

    ours = [
        _ours("scale", of((0.6,), 0.9, 0.8, 0.6), ("scale", "--scale")),
        _geodesic(of((0.6,), 0.9, 0.8, 0.6)),
        _ours("random", of((0.7,), 0.95, 0.9, 0.7), ("random", "--energy"), alone=True),
        _ours("svd", of((16,), 64, 32, 16), ("svd", "--rank"), alone=True),
        _ours("diagonal", of((0.9,), 0.97, 0.9), ("diagonal", "--mass")),
        _ours("impact", of((0.1,), 0.03, 0.1, 0.3), ("impact", "--density")),
        _ours("kfac", of((0.9,), 0.95, 0.9, 0.8), ("kfac", "--mass"), alone=True),
        _ours("ekfac", of((0.9,), 0.95, 0.9, 0.8), ("ekfac", "--mass"), alone=True),
        _ours("contrastive", of((0.1, 1), 0.03, 0.1, 0.3, 1, 10), ("contrastive", "--strength"), "given"),
        _ours("contrastive, form only", of((0.3,), 0.03, 0.1, 0.3, 1, 10), ("contrastive", "--strength"), "decoys"),
        _ours("tokenwise", of((0.1, 1), 0.03, 0.1, 0.3, 1, 10), ("tokenwise", "--strength"), "given"),
        _ours("tokenwise, form only", of((0.3,), 0.03, 0.1, 0.3, 1, 10), ("tokenwise", "--strength"), "decoys"),
        _ours("recall", of((48,), 12, 24, 48), ("recall", "--steps"), "given", fresh="decoys", alone=True),
        _ours(
            "distill",
            of((40,), 10, 20, 40),
            ("distill", "--epochs"),
            "given",
            fresh="decoys",
            tables=True,
            more=STUDENT,
        ),
        *(
            _ours(
                name,
                (4,),
                ("distill", "--epochs"),
                student.given,
                fresh="decoys",
                tables=True,
                lessons=True,
                found=student.found,
                facts=student.facts,
                more=(*STUDENT, "--trust", 0.006, "--level-steps", student.level),
            )
            for name, student in LEVELLED.items()
            if not student.facts or (folder / "named.jsonl").exists()
        ),
        _auto((0.98,)),
    ]

    def usual(rival: Rival) -> tuple[float, ...]:
        best = trials.best(rival.name, "KL 0.01")
        return (rival.usual if best is None else best.dose,)

    return ours + [_rival(rival, rival.doses if full else usual(rival)) for rival in RIVALS]


def timed(editor: Editor, judge: Judge, dose: float, scratch: Path) -> tuple[Any, float]:
    """Edit, and return the model and the seconds of processor time."""
    start = time.process_time()
    model = editor.edit(judge, dose, scratch)
    return model, time.process_time() - start
