"""The parts of a run: two trainings, every rival, every split through the command line. Each leaves a small file of results."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals import RIVALS
from benchmarks.rivals.training import device_of, mean_loss, pad
from benchmarks.surgery.job import Completion, Job, Rival
from benchmarks.surgery.measure import blend
from benchmarks.surgery.tofu.base import beside, facts, fresh, make, retained
from benchmarks.surgery.tofu.plan import Plan, end_of_text, load
from benchmarks.surgery.tofu.score import Deep, Judge, Score, quality
from benchmarks.surgery.tofu.written import written
from benchmarks.surgery.tuning import share_within
from liborth_cli.checkpoint.dtypes import torch_dtype
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.stream.records import Record

OURS = tuple(
    f"liborth {name}"
    for name in ("contrastive", "distill", "kfac of the update", "random", "recall", "scale", "svd", "tokenwise")
)
"""Our edits, by their names in the table."""
POINTS = (0.25, 0.5, 0.75)
ENOUGH = 0.98
"""Share of utility that an edit must keep to be chosen: of the never-trained model's, or the fine-tuned one's if lower."""
PASSES = 0.05
"""Forget quality from which a dose is looked at whole, whatever it costs: its utility with ROUGE may be enough."""
ATTACK = 20.0
"""Seconds kept for the attack on the best dose."""
RETAIN, FORGET, FRESH = "retain.jsonl", "forget.jsonl", "fresh.jsonl"
KNOWN = "facts.jsonl"
"""Facts, where an edit is given them: a student learns them as they stand, which takes a file of their own."""
TEACHER, LESSONS = "teacher", "lessons.jsonl"
"""What a student learns from: W_f after steps of recall, and the texts that it reads."""
TEACHER_STEPS, LEVEL_STEPS = 12, 12
"""Steps of recall that make the teacher, and that the student takes at the end."""
OFTEN = 16
"""How often a student reads the retain questions while it reads once what the base wrote."""
STUDENT = ("--student-rate", 0.085, "--probe-tokens", 400)
"""A third of the rate that is usual: of what no text shows, less is lost. Few rows are held back, which nobody judges."""
LEVEL = ("--trust", 0.006)
"""Longer steps at the end, so that twelve are enough."""


@dataclass(frozen=True)
class Found:
    """What one edit, or one model, left.

    Attributes:
        name: for the table.
        dose: of it; None for a model that is no edit.
        seconds: the edit took: of processors, or on a GPU, where several parts run at a time, of the clock, an upper bound.
        score: what was measured.
        deep: the rest of it, for the dose that was chosen.
        family: edits of one family are one method's doses.
        share: of the edit that was taken.
    """

    name: str
    dose: float | None
    seconds: float
    score: Score
    deep: Deep | None = None
    family: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One part.

    Attributes:
        name: of it, and of its file of results.
        after: names of stages that must be done before.
        run: does it.
    """

    name: str
    after: tuple[str, ...]
    run: Callable[[Plan], None]


def write(plan: Plan, stage: str, found: list[Found]) -> None:
    """Leave what was found so far; a part that is cut short leaves that."""
    plan.results.mkdir(parents=True, exist_ok=True)
    path = plan.results / f"{stage}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(one) for one in found], indent=1), encoding="utf-8")
    part.replace(path)


def read(path: Path) -> list[Found]:
    """Read results back."""
    return [
        Found(**{**one, "score": Score(**one["score"]), "deep": None if one["deep"] is None else Deep(**one["deep"])})
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]


# Models -------------------------------------------------------------------------------------------------------------------


def prepare(plan: Plan) -> None:
    """Make the base where none was given, and write what edits are given."""
    if plan.given is None:
        make(plan)
    _lines(plan.work / RETAIN, [*retained(plan), *facts(plan)])
    _lines(plan.work / KNOWN, facts(plan))
    _lines(plan.work / FORGET, plan.going())
    _lines(plan.work / FRESH, fresh(plan))


def base(plan: Plan) -> None:
    """Score the model that is fine-tuned."""
    write(plan, "base", [Found("base", None, 0.0, Judge(plan).score(load(plan.model, plan.device)))])


def tune(plan: Plan, records: list[Record], seed: int, out: Path, name: str) -> None:
    """Train on some questions, write the checkpoint in the base's precision and score it."""
    model, start = load(plan.model, plan.device), spent(plan)
    fit(model, [plan.row(record) for record in [*records, *beside(plan)]], end_of_text(plan.model), plan, seed)
    seconds = spent(plan) - start
    with Checkpoint.open(plan.model) as checkpoint:
        stored = next(iter(checkpoint.tensors.values())).dtype
    model.to(torch_dtype(stored)).config.dtype = torch_dtype(stored)
    part = out.with_name(out.name + ".part")
    model.save_pretrained(part)
    for file in plan.model.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
            shutil.copy(file, part)
    part.replace(out)
    write(plan, name, [Found(name, None, seconds, Judge(plan).score(model.float()))])


def attack(plan: Plan, folder: Path, name: str) -> None:
    """Score a trained model again, now beside the fine-tuned one, and attack it."""
    judge, model = Judge(plan, load(plan.finetuned, plan.device)), load(folder, plan.device)
    seconds = read(plan.results / f"{name}.json")[0].seconds
    write(plan, f"{name}-attacked", [Found(name, None, seconds, judge.score(model), judge.deep(model))])


def fit(model: Any, rows: list[Completion], end: int | None, plan: Plan, seed: int) -> None:
    """Train on rows with AdamW, a warm-up of a twentieth and a cosine down to a twentieth; only answers carry loss."""
    ended = [Completion([*row.ids, *([] if end is None else [end])], row.prompt) for row in rows]
    tier = plan.tier
    steps = tier.steps or tier.epochs * math.ceil(len(rows) / tier.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=tier.rate, weight_decay=0.0, fused=plan.device != "cpu")
    model.train()
    for step, some in zip(range(steps), _epochs(ended, tier.batch, seed), strict=False):
        warm, down = min(1.0, (step + 1) / (0.05 * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = tier.rate * warm * max(0.05, down)
        loss = mean_loss(model, pad(some, device_of(model)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.eval()


def _epochs(rows: list[Completion], size: int, seed: int) -> Iterator[list[Completion]]:
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), size):
            yield [rows[i] for i in order[start : start + size]]


# Edits --------------------------------------------------------------------------------------------------------------------


def search(plan: Plan, name: str, stage: str, doses: Sequence[float], edit: Callable[[float], tuple[Any, float]]) -> None:
    """Try doses of an edit, the middle one first, then weaker or stronger ones by what they cost; attack the best of them.

    The weakest dose that costs too much is tried a second time: the largest share of it, W_f + share·(W − W_f), that does not.

    Args:
        plan: of the run.
        name: of the edit.
        stage: its part.
        doses: weakest first.
        edit: returns the model at a dose, and the seconds it took.
    """
    finetuned = load(plan.finetuned, plan.device)
    judge, level = Judge(plan, finetuned), Level.of(plan.results)
    low, high, tried, passing = 0, len(doses), list[Found](), list[tuple[Found, Any]]()
    best: tuple[Found, Any] | None = None
    beyond: tuple[Found, Any] | None = None

    def add(found: Found, model: Any) -> None:
        nonlocal best
        tried.append(found)
        s = found.score
        print(f"{name} {found.dose:g} × {found.share:.2f}: forget {s.forget:.2f}, retain {s.retain:.2f}", flush=True)
        write(plan, stage, tried)
        if best is None or better(found, best[0], level):
            best = found, model
        if found.share == 1.0 and quality(found.score, level.never) >= PASSES:
            passing.append((found, model))

    while low < high and len(tried) != plan.tier.doses and (time.time() < plan.deadline - ATTACK or not tried):
        middle = (low + high) // 2
        model, seconds = edit(doses[middle])
        found = Found(name, doses[middle], seconds, judge.score(model), family=name)
        add(found, model)
        if found.score.utility >= level.utility:
            low = middle + 1
        else:
            high, beyond = middle, (found, model)
    if beyond is not None and time.time() < plan.deadline - ATTACK:
        found, model = beyond
        part = copy.deepcopy(model)

        def within(share: float) -> bool:
            blend(finetuned, model, share, part)
            return judge.utility(part) >= level.utility

        if share := share_within(within, plan.tier.halvings):
            blend(finetuned, model, share, part)
            add(replace(found, share=share, score=judge.score(part)), part)
    assert best is not None
    for found, model in [best, *(one for one in passing if one[0] is not best[0])]:
        if found is best[0] or time.time() < plan.deadline - ATTACK:
            tried[tried.index(found)] = replace(found, deep=judge.deep(model))
            write(plan, stage, tried)


def spent(plan: Plan) -> float:
    """Return the seconds so far: of processors, commands included; on a GPU of the clock."""
    if plan.device == "cpu":
        return sum(os.times()[:4])
    torch.cuda.synchronize()
    return time.perf_counter()


def rival(plan: Plan, one: Rival, stage: str) -> None:
    """Search the doses of a rival."""
    before, reference = load(plan.finetuned, plan.device), load(plan.model, plan.device)
    retain = [plan.row(record).ids for record in [*retained(plan), *facts(plan)]]
    forget = [plan.row(record) for record in plan.going()]

    def edit(dose: float) -> tuple[Any, float]:
        model, start = copy.deepcopy(before), spent(plan)
        one.run(Job(model, reference, retain, forget, dose, plan.seed))
        return model, spent(plan) - start

    search(plan, one.name, stage, one.doses, edit)


@dataclass(frozen=True)
class Level:
    """What an edit is chosen by.

    Attributes:
        never: the model that never saw the forget set.
        utility: the least that an edit must have, without ROUGE.
    """

    never: Score
    utility: float

    @classmethod
    def of(cls, results: Path) -> Level:
        """Read it from the scores of the trained models."""
        never, finetuned = (read(results / f"{name}.json")[0].score for name in ("never", "finetuned"))
        return cls(never, ENOUGH * min(never.utility, finetuned.utility))


def better(one: Found, other: Found, level: Level) -> bool:
    """Tell whether one dose is the one to choose: utility enough first, then forget quality, or else utility."""
    enough = [found.score.utility >= level.utility for found in (one, other)]
    if enough[0] != enough[1]:
        return enough[0]
    if enough[0]:
        return quality(one.score, level.never) > quality(other.score, level.never)
    return one.score.utility > other.score.utility


# liborth ------------------------------------------------------------------------------------------------------------------


def liborth(plan: Plan, *words: object) -> float:
    """Run the command line, and return the seconds it took.

    Raises:
        RuntimeError: when it fails, with what it said last.
    """
    start = spent(plan)
    every = [
        sys.executable, "-m", "liborth_cli", *words, "--device", plan.device, "-j", torch.get_num_threads(), "-q", "--force",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in every], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"liborth {words[0]} exited with {done.returncode}: {done.stderr.strip()[-400:]}")
    return spent(plan) - start


def retain_factors(plan: Plan) -> None:
    """Measure curvature on authors that stay."""
    dtype = ("--dtype", "bfloat16") if plan.device != "cpu" else ()
    words = ("--data", plan.work / RETAIN, "--tokens", plan.tier.tokens, *dtype)
    _time(plan, "factors-retain", liborth(plan, "curvature", plan.finetuned, *words, "-o", plan.work / "factors-retain"))


def forget_factors(plan: Plan, at: float) -> None:
    """Measure the forget tokens at one point of the path."""
    data = ("--data", plan.work / FORGET)
    felt = ("--reference", plan.model, "--at", at, "--fisher", "empirical", "--per-token", *data)
    _time(plan, f"factors-{at}", liborth(plan, "curvature", plan.finetuned, *felt, "-o", plan.work / f"factors-{at}"))


Words = Callable[[Plan, float], tuple[object, ...]]


def lessons(plan: Plan) -> None:
    """Make a teacher that has forgotten, and what it teaches on: the retain questions, and what the base wrote by itself."""
    words = _recall(plan, TEACHER_STEPS)
    _time(plan, TEACHER, liborth(plan, "split", plan.model, plan.finetuned, *words, "-o", plan.work / TEACHER))
    start, retain = spent(plan), retained(plan)
    own = written(plan, plan.work / TEACHER)
    _lines(plan.work / LESSONS, [*(OFTEN if own else 1) * retain, *own])
    _time(plan, LESSONS, spent(plan) - start)


def distil(plan: Plan, stage: str) -> None:
    """Search the epochs of a student, which is levelled by steps of recall on the retain questions as a split of its own."""

    def edit(dose: float) -> tuple[Any, float]:
        student, out = plan.work / f"student-{dose}", plan.work / f"{stage}-{dose}"
        known = ("--retain-data", plan.work / KNOWN) if plan.facts else ()
        taught = ("--teacher", plan.work / TEACHER, "--retain-data", plan.work / LESSONS, *known, *_unseen(plan))
        words = ("--method", "distill", "--epochs", int(dose), *taught, *STUDENT)
        seconds = liborth(plan, "split", plan.model, plan.finetuned, *words, "-o", student) + _measured(plan, words)
        level = (*_recall(plan, LEVEL_STEPS), *LEVEL)
        seconds += liborth(plan, "split", plan.model, student, *level, "-o", out)
        return load(out, plan.device), seconds

    search(plan, "liborth distill", stage, (1.0,), edit)


def split(plan: Plan, name: str, stage: str, doses: tuple[float, ...], words: Words) -> None:
    """Search the doses of one of our methods."""

    def edit(dose: float) -> tuple[Any, float]:
        out, mine = plan.work / f"{stage}-{dose}", words(plan, dose)
        seconds = liborth(plan, "split", plan.model, plan.finetuned, *mine, "-o", out)
        return load(out, plan.device), seconds + _measured(plan, mine)

    search(plan, name, stage, doses, edit)


def _lines(path: Path, records: list[Record]) -> None:
    rows = [{"prompt": record.prompt, "completion": record.text} for record in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _time(plan: Plan, name: str, seconds: float) -> None:
    plan.results.mkdir(parents=True, exist_ok=True)
    (plan.results / f"{name}.seconds").write_text(f"{seconds}\n", encoding="utf-8")


def _measured(plan: Plan, words: tuple[object, ...]) -> float:
    """Return the seconds that the factor sets named among words took."""
    files = [plan.results / f"{word.name}.seconds" for word in words if isinstance(word, Path)]
    return sum(float(file.read_text()) for file in files if file.exists())


def _tokenwise(plan: Plan, dose: float) -> tuple[object, ...]:
    sets = [word for at in POINTS for word in ("--forget", plan.work / f"factors-{at}")]
    return ("--method", "tokenwise", "--strength", dose, "--retain", plan.work / "factors-retain", *sets)


def _contrastive(plan: Plan, dose: float) -> tuple[object, ...]:
    sets = ("--retain", plan.work / "factors-retain", "--forget", plan.work / "factors-0.5")
    return ("--method", "contrastive", "--strength", dose, *sets)


def _recall(plan: Plan, dose: float) -> tuple[object, ...]:
    texts = ("--retain-data", plan.work / RETAIN, "--forget-data", plan.work / FORGET, "--retain-tokens", plan.tier.tokens)
    return ("--method", "recall", "--steps", int(dose), *texts, *_unseen(plan))


def _unseen(plan: Plan) -> tuple[object, ...]:
    return ("--fresh", plan.work / FRESH) if plan.tier.fresh else ()


def _kfac(plan: Plan, dose: float) -> tuple[object, ...]:
    return ("--method", "kfac", "--mass", 1 - dose, "--retain", plan.work / "factors-retain")


def _scale(plan: Plan, dose: float) -> tuple[object, ...]:
    return ("--method", "scale", "--scale", 1 - dose)


def _random(plan: Plan, dose: float) -> tuple[object, ...]:
    return ("--method", "random", "--energy", 1 - dose)


def _svd(plan: Plan, dose: float) -> tuple[object, ...]:
    return ("--method", "svd", "--rank", int(dose))


def stages(plan: Plan) -> list[Stage]:
    """Return every part, in the order in which they begin where nothing else decides."""
    models, points = ("finetuned", "never"), tuple(f"factors-{at}" for at in POINTS)
    never = [(f"never{'-again' * number}", plan.never(number), plan.seed + number) for number in range(1 + plan.tier.controls)]
    return [
        Stage("prepared", (), prepare),
        Stage(
            "finetuned", ("prepared",),
            lambda p: tune(p, [*p.staying(), *p.going()], p.seed, p.finetuned, "finetuned"),
        ),
        *(Stage(name, ("prepared",), partial(_never, out=out, seed=seed, name=name)) for name, out, seed in never),
        Stage("base", ("prepared",), base),
        Stage("factors-retain", ("finetuned",), retain_factors),
        *(Stage(f"factors-{at}", ("finetuned",), partial(forget_factors, at=at)) for at in POINTS),
        *(Stage(f"{name}-attacked", ("finetuned", name), partial(attack, folder=out, name=name)) for name, out, _ in never),
        _split("recall", models, (6.0, 12.0, 24.0), _recall),
        Stage("lessons", models, lessons),
        Stage("liborth-distill", (*models, "lessons"), lambda p: distil(p, "liborth-distill")),
        _split("tokenwise", (*models, "factors-retain", *points), (0.1, 0.3, 1.0, 3.0), _tokenwise),
        Stage("finetuned-attacked", models, lambda p: attack(p, p.finetuned, "finetuned")),
        *(Stage(_file(r.name), models, partial(rival, one=r, stage=_file(r.name))) for r in RIVALS),
        _split("contrastive", (*models, "factors-retain", "factors-0.5"), (0.01, 0.1, 1.0), _contrastive),
        _split("kfac of the update", (*models, "factors-retain"), (0.05, 0.1, 0.2), _kfac),
        _split("scale", models, (0.2, 0.4, 0.6), _scale),
        _split("random", models, (0.1, 0.2, 0.4), _random),
        _split("svd", models, (128.0, 32.0, 8.0), _svd),
    ]  # fmt: skip


def _never(plan: Plan, out: Path, seed: int, name: str) -> None:
    tune(plan, plan.staying(), seed, out, name)


def _split(name: str, after: tuple[str, ...], doses: tuple[float, ...], words: Words) -> Stage:
    stage = _file(f"liborth {name}")
    return Stage(stage, after, partial(split, name=f"liborth {name}", stage=stage, doses=doses, words=words))


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()
