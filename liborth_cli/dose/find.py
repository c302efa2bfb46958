"""From texts to a measured dose: the curvature passes that are needed, and the search for an amount that meets a target."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from liborth_cli.checkpoint.pair import grid
from liborth_cli.console import Console, Json, JsonObject, size
from liborth_cli.curvature.estimate import DTYPES
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.together import HeldPass, Together, held_bytes, whole_bytes
from liborth_cli.dose.frontier import Frontier
from liborth_cli.dose.measure import FEWEST, Measure
from liborth_cli.dose.passes import Pass, Passes, forget_options, retain_options
from liborth_cli.dose.remember import Lesson, learn
from liborth_cli.dose.steps import StepsJob, as_it_is
from liborth_cli.dose.student import StudentJob
from liborth_cli.dose.sweep import Candidate, Found, Sweep, Trials, best_sweep, half_the_room, search, sweeps, walk
from liborth_cli.dose.target import OPTION, Target
from liborth_cli.dose.texts import DataOptions, Texts, open_reader, read_texts
from liborth_cli.errors import BadInput, OutOfResources, Stopped, UsageError, VerificationFailed
from liborth_cli.machine import Run, slowed
from liborth_cli.methods import METHODS, NEEDS
from liborth_cli.methods.distill import Distill
from liborth_cli.split import SplitOptions
from liborth_cli.split.report import Measuring
from liborth_cli.split.split import Opened
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Point

AUTO = "auto"
FORGOTTEN = {name for name, need in NEEDS.items() if need.side == "forget"} - {"edit"}
"""What a method needs of the forget factors; everything else but steps is of the retain factors."""


@dataclass(frozen=True)
class DoseOptions:
    """What is asked of the dose.

    Attributes:
        data: the texts.
        method: a key of METHODS, or "auto".
        probe: measure, and write nothing.
        target: what the edit must reach, or None when the amount was given.
        hard: cut, where the method has a choice.
        factors: private directory for factor sets and decoys; None for a temporary one.
        keep: leave them there.
        teacher: a checkpoint that has forgotten, for the method that learns from one; None has it made.
        dtype: of products with weights while curvature is measured, and where steps of recall and students train; scores and
            what steps are made of are in float32.
        dry_run: only say what would be done.
    """

    data: DataOptions
    method: str
    probe: bool = False
    target: Target | None = None
    hard: bool = False
    factors: Path | None = None
    keep: bool = False
    teacher: Path | None = None
    dtype: str = "float32"
    dry_run: bool = False

    @property
    def measures(self) -> bool:
        """Whether candidates are measured at all."""
        return self.probe or self.target is not None


@dataclass
class Dose:
    """What was found.

    Attributes:
        options: the split, with the method, side and amount that were found.
        frontier: what was measured, or None.
        notes: what was done to find it, as sentences.
        done: the table was the result; there is nothing to write.
        text: what to print then.
        document: for --json, when `done`.
        together: the walk in which the factors are measured while the split divides by them; None when they are all there.
        measuring: what would be measured, of a dry run.
    """

    options: SplitOptions
    frontier: Frontier | None = None
    notes: list[str] = field(default_factory=list)
    done: bool = False
    text: str = ""
    document: JsonObject = field(default_factory=dict)
    together: Together | None = None
    measuring: Measuring | None = None


def find_dose(asked: DoseOptions, inputs: Opened, options: SplitOptions, run: Run, console: Console, stack: ExitStack) -> Dose:
    """Run the passes a split needs, and find its amount where it was not given.

    Args:
        asked: what is asked.
        inputs: what is divided; the factors that were measured are put in.
        options: the split, with the amount that was given, if any.
        run: device, threads, resume.
        console: where progress and tables go.
        stack: closes what is opened; factor sets are deleted there, unless they are kept or the run was stopped.

    Returns:
        What to go on with.

    Raises:
        VerificationFailed: when no method meets the target.
        LiborthError: the leaf says which.
    """
    if inputs.alone and asked.measures:
        raise UsageError("--probe and --target measure what fine-tuning taught: they need both checkpoints")
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-dose-")))
    folder = Path(run.world.broadcast(str((asked.factors or scratch).absolute())))
    passes = _open_passes(asked, inputs, run, console, folder, stack)
    model = passes.model
    reader = open_reader(model, inputs.finetuned, asked.data.truncate, console.detail)
    own = scratch if asked.dry_run or not run.world.first else folder
    texts = read_texts(asked.data, reader, own, inputs.retain is not None, console)
    tried = _sweeps(asked, inputs, options, console)
    needs = {need for sweep in tried for need in METHODS[sweep.method].needs}
    if asked.measures and texts.level is texts.fresh:
        # What the steps aim at is no measure of where they arrive.
        texts.level, texts.fresh = texts.fresh[::2], texts.fresh[1::2]
    steps = _maker(asked, inputs, options, texts) if "edit" in needs else None
    if steps and steps.caveat:
        console.note(steps.caveat)
    jobs = _jobs(set() if asked.teacher else needs - {"edit"}, asked, inputs, texts)
    walked = _walked(asked, passes, jobs, steps is not None)
    search = _Search(asked, inputs, options, passes, walked, stack)
    if asked.dry_run:
        return search.plan(jobs, steps)
    if steps:
        steps.check_memory(model)
    measure = None
    target = asked.target
    if not inputs.alone:
        points = Point(inputs.finetuned, inputs.reference, 0.0), Point(inputs.finetuned)
        measure = Measure(model, texts, *points, seed=asked.data.seed, world=run.world)
        measure.warn(console, target is not None)
        target = _check(asked, measure, console)
        if steps:
            steps.rows = replace(steps.rows, improved=measure.improved)
    _store(passes, [job for job in jobs if job not in walked], inputs, stack)
    notes = [steps.take(passes, inputs, stack, lasting=asked.factors is not None)] if steps else []
    if measure is None or not asked.measures:
        return Dose(options, notes=notes, together=_beside(passes, walked, inputs, stack))
    student = None
    if asked.method == AUTO and target is not None and target.has_goal and steps and texts.held_out:
        student = StudentJob.of(inputs, replace(options, method=Distill.name), texts, None)
        student.rows = replace(student.rows, improved=measure.improved)
    return replace(search, student=student).run(tried, measure, target, notes)


def _open_passes(asked: DoseOptions, inputs: Opened, run: Run, console: Console, folder: Path, stack: ExitStack) -> Passes:
    """Open the fine-tuned model and what measures it; what was written is deleted in the end, unless it is to stay."""
    model = BlockModel(Point(inputs.finetuned), torch.float32, run.device)
    stack.callback(model.close)
    measured = model
    if (dtype := DTYPES[asked.dtype]) != model.dtype:
        measured = BlockModel(model.weights, dtype, run.device)
        stack.callback(measured.close)
        if slow := slowed(dtype, run.device):
            console.warn(slow)
    passes = Passes(
        folder,
        reference=inputs.reference,
        finetuned=inputs.finetuned,
        sources=inputs.sources,
        model=model,
        measured=measured,
        run=run,
        console=console,
    )

    def leave(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Stopped) and asked.factors is not None:
            error.kept = error.kept or passes.left
        if not asked.keep:
            passes.discard(kind)

    if not asked.dry_run:
        stack.push(leave)
    return passes


@dataclass(frozen=True)
class _Search:
    """A search for a dose, when all rows are read; the other attributes are those of `find_dose`.

    Attributes:
        walked: passes whose factors are not stored.
        student: what is taught where nothing that edits W_f meets the target; None where that is not tried.
    """

    asked: DoseOptions
    inputs: Opened
    options: SplitOptions
    passes: Passes
    walked: Sequence[Pass]
    stack: ExitStack
    student: StudentJob | None = None

    def plan(self, jobs: Sequence[Pass], steps: StepsJob | StudentJob | None) -> Dose:
        """Say what would be measured and what that takes, and go on with the plan of the split: its tensors, and their cost."""
        asked, passes, dose = self.asked, self.passes, Dose(self.options)
        lines, told, beside = list[str](), dict[str, list[JsonObject]](), list[tuple[HeldPass, bool]]()
        for job in jobs:
            found, stored = passes.found(job), job not in self.walked
            plan = passes.plan(job, cached=found is not None)
            until = "" if asked.keep or passes.lasts(job) else ", until the end"
            where = f" (private, in {passes.folder}{until})" if stored or plan.cached else ""
            lines.append(f"{job.kind} {plan.words(stored)}{where}")
            told.setdefault(job.kind, []).append(asdict(plan))
            if found is not None:
                self.inputs.take(job.kind, self.stack.enter_context(FactorSet.open(found)))
            else:
                beside.append((passes.expected(job), stored))
                self.inputs.take(job.kind, beside[-1][0].set)
        seconds = math.fsum(one.job.seconds for one, _ in beside)
        needed = max((one.job.plan.needed for one, _ in beside), default=0)
        needed += sum(held_bytes(one) for one, stored in beside if not stored)
        document: dict[str, Json] = {"curvature": told}
        if steps is not None:
            document[steps.method.name], taken = steps.told(passes.model, passes.dtype)
            lines.append(f"{steps.method.name}: {document[steps.method.name]}")
            seconds, needed = seconds + taken, max(needed, steps.memory_bytes(passes.model))
        if asked.measures:
            lines.append("then doses are measured; each divides all matrices, and how many there will be is not known before")
        if steps is not None or asked.measures:  # what is divided, and how, is known when that is done
            dose.options = as_it_is(dose.options)
        scattered = any(not stored for _, stored in beside)
        dose.measuring = Measuring(
            lines, document, memory_bytes=needed, seconds=seconds, scattered=scattered, dtype=passes.dtype
        )
        return dose

    def run(self, tried: Sequence[Sweep], measure: Measure, target: Target | None, notes: Sequence[str]) -> Dose:
        """Try every sweep when both ends are measured, and choose; what is written then is measured in another walk."""
        console = self.passes.console
        frontier = Frontier(
            measure.before, measure.after, target=target, rows=measure.rows, no_attack=measure.no_attack, notes=[*notes]
        )
        every, together = self._sweeping(tried, measure)
        for trials in every:
            sweep = trials.sweep
            console.note(f"trying {sweep.title} on {measure.tokens:,} tokens a dose")
            found = search(trials, target) if target else walk(trials)
            frontier.found.append(found)
            like = found.best or _half_way(found, measure)
            if sweep.method != "scale" and like.removed <= 1:
                frontier.controls.append(trials.control(like))
        if target and self.student and not any(found.best for found in frontier.found):
            frontier.found += self._taught(self.student, measure, target, frontier.notes)
        dose = _choose(self.asked, frontier, self.options, console)
        if not dose.done:
            dose.together = together()
        return dose

    def _taught(self, student: StudentJob, measure: Measure, target: Target, notes: list[str]) -> list[Found]:
        """Teach a student and measure it; nothing, and said so, where two models do not fit into memory."""
        console, none = self.passes.console, "nothing that edits the fine-tuned model meets the target"
        try:
            student.check_memory(self.passes.model)
        except OutOfResources as why:
            console.note(f"{none}, and no student is taught: {why}")
            return []
        console.note(f"{none}: trying {student.told(self.passes.model, self.passes.dtype)[0]}")
        notes.append(student.take(self.passes, self.inputs, self.stack, lasting=self.asked.factors is not None))
        sweep = Sweep.of(Distill.name, None, 1)
        return [search(Trials(sweep, self.inputs, self.options, measure, self.passes.run, console), target)]

    def _sweeping(self, tried: Sequence[Sweep], measure: Measure) -> tuple[list[Trials], Callable[[], Together | None]]:
        """Return what divides by any dose, and what makes the walk that the dose which was found is written from.

        All factors stay in memory where they take less than half of what is free; else what doses need of them, and they are
        measured once more in the end; else they are stored.
        """
        run, console = self.passes.run, self.passes.console
        inputs = replace(self.inputs, forget=[*self.inputs.forget])

        def trials(inputs: Opened) -> list[Trials]:
            return [Trials(sweep, inputs, self.options, measure, run, console) for sweep in tried]

        together = _beside(self.passes, self.walked, inputs, self.stack)
        if together is None or sum(map(whole_bytes, together.passes)) <= half_the_room():
            if together is not None:
                run.all_threads()
                with console.progress("curvature", together.tokens, unit="tokens", per=together.steps) as progress:
                    together.measure(progress.advance)
            self.inputs.retain, self.inputs.forget = inputs.retain, inputs.forget
            return trials(inputs), lambda: together
        if _learn(every := trials(inputs), together, run, console):
            return every, lambda: _beside(self.passes, self.walked, self.inputs, self.stack)
        _store(self.passes, self.walked, self.inputs, self.stack)
        return trials(self.inputs), lambda: None


def _maker(asked: DoseOptions, inputs: Opened, options: SplitOptions, texts: Texts) -> StepsJob | StudentJob:
    """Return what makes the edit that a split divides by."""
    if options.method == Distill.name:
        return StudentJob.of(inputs, options, texts, asked.teacher)
    return StepsJob.of(inputs, options, texts)


def _of(jobs: Sequence[Pass], kind: str) -> list[Pass]:
    return [job for job in jobs if job.kind == kind]


def _store(passes: Passes, jobs: Sequence[Pass], inputs: Opened, stack: ExitStack) -> None:
    """Run passes, or find that they were run before, and put their sets into `inputs`."""
    for job in jobs:
        inputs.take(job.kind, stack.enter_context(FactorSet.open(passes.run_pass(job))))


def _beside(passes: Passes, jobs: Sequence[Pass], inputs: Opened, stack: ExitStack) -> Together | None:
    """Return a walk that measures block by block what was not measured before; its sets and those on disk go into `inputs`.

    None where all are on disk, also because the passes do not fit into memory side by side.
    """
    missing = [job for job in jobs if passes.found(job) is None]
    passes.model.unload()  # what was scored before needed all weights; the walk needs room for a block
    together = passes.together(missing, stack) if missing else None
    for one in together.passes if together else ():
        inputs.take(one.kind, one.set)
    _store(passes, [job for job in jobs if together is None or job not in missing], inputs, stack)
    return together


def _learn(every: Sequence[Trials], together: Together, run: Run, console: Console) -> bool:
    """Keep in memory what all sweeps need to divide by any dose, made in one walk; False, and nothing done, without room."""
    # What steps moved is stored, and so are the retain factors that they read.
    sweeping = [one for one in every if (needs := METHODS[one.sweep.method].needs) and "edit" not in needs]
    lessons: dict[str, Lesson] = {}
    for trials in sweeping:
        lessons.setdefault(trials.sweep.method, trials.lesson)
    tokens = sum(one.job.tokens for one in together.passes if one.kind == "forget")
    needed, room = sum(lesson.nbytes(tokens) for lesson in lessons.values()), half_the_room()
    if needed > room:
        console.note(f"a search would keep {size(needed)} of decompositions, and {size(room)} are free: the factors are stored")
        return False
    learn(list(lessons.values()), together, run, console)
    for trials in sweeping:
        trials.remember(lessons[trials.sweep.method])
    return True


def _choose(asked: DoseOptions, frontier: Frontier, options: SplitOptions, console: Console) -> Dose:
    """Show what was measured, and go on with the best, where a target was given."""
    dose, target = Dose(options, frontier), frontier.target
    best = None
    if target is not None:
        mine = [one for one in frontier.found if asked.method in (AUTO, one.sweep.method)]
        best = best_sweep(mine, target)
        frontier.judge(best, mine)
    failed = target is not None and frontier.chosen is None
    if asked.probe or failed:
        frontier.show(console, out=not console.as_json)
        dose.document, dose.done = {"dose": frontier.to_json()}, True
    if target is not None and failed:
        if console.as_json:
            console.result("", dose.document)
        reached = "no method meets" if asked.method == AUTO else f"{asked.method} does not meet"
        raise VerificationFailed(f"{reached} {OPTION} {target.text[:120]}; nothing was written (the frontier is above)")
    if best is not None and frontier.chosen is not None and not dose.done:
        frontier.show(console, out=False)
        dose.options = replace(options, method=best.sweep.method, amount=frontier.chosen.amount, memory_side=best.sweep.side)
    return dose


def _half_way(found: Found, measure: Measure) -> Candidate:
    """Return the weakest candidate whose secrets get half of the way to the never-trained level; the strongest if none does."""
    goal = (measure.after.fresh or measure.before.forget or 0.0) / 2
    reached = [one for one in found.candidates if one.reading.forget is not None and one.reading.forget >= goal]
    return reached[0] if reached else found.candidates[-1]


def _sweeps(asked: DoseOptions, inputs: Opened, options: SplitOptions, console: Console) -> list[Sweep]:
    """Decide what is tried: the method asked for, or all that the data allow, and always `scale`."""
    names = [asked.method]
    if asked.method == AUTO:
        there = _there("retain", [inputs.retain] if inputs.retain else [], bool(asked.data.retain))
        there += _there("forget", inputs.forget, bool(asked.data.forget or asked.data.patterns))
        if "edit" in there and (option := options.beside_steps):
            there.remove("edit")
            console.note(f"recall is not tried: it measures the model that it makes, and {option} would make another")
        names = [name for name, method in METHODS.items() if method.searched and set(method.needs) <= set(there)]
    if asked.measures and "scale" not in names:
        names.append("scale")
    shapes = (t for t in inputs.finetuned.tensors.values() if len(t.shape) > 1)
    largest = max((min(grid(t.name, t.shape)[1:]) for t in shapes), default=1)
    return sweeps(names, options.memory_side, largest, asked.hard)


def _there(side: str, sets: Sequence[FactorSet], texts: bool) -> list[str]:
    """Return what methods may need of the "retain" or "forget" data: what all sets hold, or all, where texts are given."""
    needs = [name for name, need in NEEDS.items() if need.side == side]
    if not sets:
        return needs if texts else []
    return [
        need
        for need in needs
        if need != "edit" and all(any(one.holds(NEEDS[need].held, name) for name in one.names) for one in sets)
    ]


def _jobs(needs: set[str], asked: DoseOptions, inputs: Opened, texts: Texts) -> list[Pass]:
    """Say which passes have to be run, and how."""
    jobs = []
    if needs - FORGOTTEN and inputs.retain is None:
        if not texts.retain:
            raise UsageError("this method needs the curvature of what to keep: --retain-data, or --retain with factors")
        how = retain_options(sorted(needs), asked.data.seed, asked.dtype)
        jobs.append(Pass("retain", texts.retain, texts.files["retain"], how))
    if needs & FORGOTTEN and not inputs.forget:
        if not texts.forget:
            raise UsageError("this method needs the curvature of what must go: --forget-data, --forget-pattern or --forget")
        ways = forget_options(needs, inputs.alone, asked.dtype)
        jobs += [Pass("forget", texts.forget, texts.files["forget"], how) for how in ways]
    return jobs


def _walked(asked: DoseOptions, passes: Passes, jobs: Sequence[Pass], steps: bool) -> list[Pass]:
    """Return the passes whose factors are not stored.

    Steps read the retain factors again and again, and ranks all of them; and the cache is for factors that are stored.
    """
    if asked.keep or (asked.measures and passes.run.world.size > 1):
        return []
    return [job for job in (_of(jobs, "forget") if steps else jobs) if not passes.lasts(job)]


def _check(asked: DoseOptions, measure: Measure, console: Console) -> Target | None:
    """Hold the target against what can be measured, and against the fine-tuned model itself."""
    target, after = asked.target, measure.after
    if asked.measures and after.general is None:
        raise UsageError("--probe and --target measure what is kept on --retain-data: it is missing")
    if target is None:
        return None
    names = target.names
    lacking = {
        "forget": (after.forget, "forgetting is measured on real secrets: give them with --forget-data"),
        "recited": (after.recited, "recited needs prompts: give prompt and completion, or --forget-pattern"),
        "fresh": (after.fresh, "fresh needs never-trained rows of the same form: --fresh, or --forget-pattern"),
        "spread": (after.spread, "spread needs two never-trained rows or more: --fresh, or --forget-pattern"),
        "leak": (after.leak, f"leak needs {FEWEST} secrets and {FEWEST} never-trained rows (--fresh, or --forget-pattern)"),
        "relearn": (None if measure.no_attack else 0.0, measure.no_attack),
        "retention": (after.retention, "no retain row shows the skill, so retention cannot be measured: add --skill-data"),
    }
    if names & {"forget", "recited", "leak", "relearn"} and after.forget is None:
        names.add("forget")
    for name, (value, words) in lacking.items():
        if name in names and value is None:
            raise UsageError(f"{OPTION}: {words}")
    if asked.method == AUTO and after.forget is None:
        raise UsageError("--method auto compares methods by what they forget, and needs --forget-data")
    if after.forget is not None and target.has_goal and not measure.memorised:
        raise BadInput(f"the forget data are not memorised ({after.forget:.3f} nats a token): there is no dose to look for")
    if "relearn" in names:
        after = measure.after = measure.attacked(measure.finetuned, after)
    if empty := target.empty(after):
        raise BadInput(
            f"{OPTION}: the fine-tuned checkpoint meets {' and '.join(empty)[:120]} already on these rows, so that would "
            "promise nothing; leave it out, or give rows that were memorised"
        )
    if after.fresh is None:
        console.note("no never-trained rows (--fresh, --forget-pattern): nothing tells when the secrets are overshot")
    return target.bounded(measure.before, after)
