"""The steps that `--method recall` divides by, taken by the split itself; what they moved lies where private data do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from liborth_cli import manifest
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.pair import is_unchanged
from liborth_cli.checkpoint.private import identity, prepare_factors
from liborth_cli.console import duration
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import FILE_MODE
from liborth_cli.dose.passes import Passes
from liborth_cli.dose.texts import Texts
from liborth_cli.errors import OutOfResources, UsageError
from liborth_cli.machine import LOW_RANK_BYTES, TRAINING_BYTES, too_large
from liborth_cli.methods import METHODS, Amount
from liborth_cli.methods.recall import Recall
from liborth_cli.recall.attack import ATTACKS, BATCH_ROWS
from liborth_cli.recall.course import Course
from liborth_cli.recall.kernel import Metric
from liborth_cli.recall.moves import Moves, Stepped
from liborth_cli.recall.retain import SLOPE_TOKENS
from liborth_cli.recall.state import Keeper, clear
from liborth_cli.recall.steps import ROUND, Rows, Steps, linear_sites, memory_bytes, taken_at_once
from liborth_cli.split import SplitOptions, Splitter
from liborth_cli.split.edits import EditSet
from liborth_cli.split.split import Opened
from liborth_cli.stream import work
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import data_hash
from liborth_cli.stream.weights import Point
from liborth_cli.tune.options import ATTACK_RANK

KIND, COURSE = "edit", "course.json"
TRAINED = 3
"""Products with every weight of a training step: forward, and back to activations and to weights."""


@dataclass(frozen=True)
class Start:
    """Where steps begin that do not begin at the fine-tuned model.

    Attributes:
        moved: what lies between that and there; what the steps move is added.
        known: identifies it.
        retain: measures the factors of the retain data there.
    """

    moved: Moves
    known: str
    retain: Callable[[], FactorSet]


@dataclass
class StepsJob:
    """Steps that a split needs.

    Attributes:
        method: with its settings.
        most: steps at most.
        rows: what they read.
        names: stored tensors that may be moved.
        seed: of the attack inside.
    """

    method: Recall
    most: int
    rows: Rows
    names: list[str]
    seed: int

    @classmethod
    def of(cls, inputs: Opened, options: SplitOptions, texts: Texts) -> StepsJob:
        """Plan the steps of a split.

        Args:
            inputs: what is divided.
            options: the split; its amount counts where it is one of steps.
            texts: the rows.

        Raises:
            UsageError: when a row it needs is missing, or an option does not go with steps.
        """
        default = METHODS["recall"]
        mine = options.method == "recall"
        method = options.rule if mine else default
        assert isinstance(method, Recall)
        amount = options.amount if mine and options.amount.kind == "steps" else default.default
        assert amount is not None
        if not texts.marked:
            raise UsageError("recall moves what was memorised, not its form: it needs --forget-data")
        if not texts.held_out:
            raise UsageError("recall measures what its steps cost on --retain-data: it is missing")
        options.check_steps()
        if inputs.alone and not texts.level:
            raise UsageError(
                "recall aims at the loss of rows never seen, and one checkpoint does not tell it: give --fresh rows or "
                "--forget-pattern, or the checkpoint before fine-tuning"
            )
        if any(row.keep.all() for row in texts.level) and not any(row.keep.all() for row in texts.marked):
            raise UsageError("recall compares what follows a prompt: give --fresh rows prompts, as the forget rows have them")
        if not (names := tensors(inputs, options)) and not inputs.alone:
            raise UsageError("recall moves what fine-tuning changed: of the tensors that are divided it changed none")
        rows = Rows(texts.marked, texts.level, texts.retain, texts.held_out, small=texts.small)
        return cls(method, int(amount.value or 1), rows, names, options.seed)

    def __str__(self) -> str:
        """In words."""
        rows = self.rows
        most = "1 step" if self.most == 1 else f"{self.most} steps"
        tokens, taken = sum(int(row.keep.sum()) for row in (*rows.forget, *rows.fresh)), taken_at_once(rows)
        drawn = f", of which a step takes {taken:,} at most" if taken < tokens else ""
        return f"{most} at most on {len(rows.forget):,} forget and {len(rows.fresh):,} fresh rows, {tokens:,} tokens{drawn}"

    def seconds(self, model: BlockModel, dtype: str = "float32") -> tuple[float, float]:
        """Return how long what is measured before the first step should take, and one step.

        A step scores and walks the forget and fresh rows, walks some retain rows of each kind, and scores what is held
        back until it is cheap enough. Two of three train first, and the reference is trained once for each attack. Triangular
        solves run at half the speed of products. Training and walks multiply in `dtype`, all else in float32.
        """
        rows, walked, sites = self.rows, 1 + work.BACK + work.AGAIN, linear_sites(model)
        mine, held = [sum(row.tokens for row in some) for some in ((*rows.forget, *rows.fresh), rows.held_out)]
        weights, moved = work.multiplied(model), sum(site.d_out * site.d_in for site in sites)
        attacked = self.most * (ROUND - 1) // ROUND if self.method.attack_steps else 0
        lesson = min(BATCH_ROWS, len(rows.forget)) * sum(row.tokens for row in rows.forget) / len(rows.forget)
        lessons = (attacked + min(attacked, ATTACKS)) * self.method.attack_steps
        passes = (mine + held) * weights + rows.kinds * SLOPE_TOKENS * moved
        narrow = (mine + rows.kinds * SLOPE_TOKENS) * walked * weights + lessons * lesson * TRAINED * weights / self.most
        taken = taken_at_once(rows)
        solved = sum((taken + (rows.kinds + 1) * site.d_out) * site.d_in**2 for site in sites)
        solved += sum((taken + (rows.kinds + 1) * site.d_in) * site.d_out**2 for site in sites)
        alike = taken**2 * sum(site.d_out + site.d_in for site in sites) / 2 + taken**3 / 6
        before = (2 * (sum(row.tokens for row in rows.retain) + mine) + held) * weights
        step, wide = passes + solved + alike + 3 * taken * moved, work.rate(model.device)
        each = step / wide + narrow / work.rate(model.device, dtype) + work.updating(model, lessons / self.most)
        return before / wide, each

    def told(self, model: BlockModel, dtype: str = "float32") -> tuple[str, float]:
        """Return what would be done and how long that takes, in words, and the seconds; see `seconds`."""
        before, each = self.seconds(model, dtype)
        return f"{self}; {duration(before)} before the first, {duration(each)} a step", before + self.most * each

    def check_memory(self, model: BlockModel) -> None:
        """Refuse what does not fit, before anything is measured.

        Raises:
            OutOfResources: when the attack inside does not fit into memory.
        """
        training, method = self._training * model.elements, self.method
        elsewhere = method.attack_rank or model.device.type == "cuda"  # moves lie in files where they do not fit beside it
        needed = training if elsewhere else self.memory_bytes(model)
        if method.attack_steps and (too_much := too_large(needed, model.device)):
            what, less = "all weights", f"--attack-rank {ATTACK_RANK} trains low-rank updates: 4 bytes a weight, and "
            if method.attack_rank:
                what, less = "low-rank updates", ""
            raise OutOfResources(
                f"recall, whose attack inside trains {what}, takes about {too_much}; {less}--attack-steps 0 goes without it, "
                "and what is hidden then comes back faster"
            )

    def memory_bytes(self, model: BlockModel) -> int:
        """Return what they take of memory, about."""
        return memory_bytes(model, taken_at_once(self.rows), self._training, self.rows.kinds)

    @property
    def _training(self) -> int:
        """Bytes that a weight takes in the attack inside; 0 without one."""
        if not self.method.attack_steps:
            return 0
        return LOW_RANK_BYTES if self.method.attack_rank else TRAINING_BYTES

    @property
    def caveat(self) -> str:
        """What to know of the aim before the steps are taken; "" when never-trained rows tell it."""
        if self.rows.fresh:
            return ""
        return (
            "recall: without --fresh rows or --forget-pattern the aim is the reference's own loss on the forget rows, which "
            "may be too high: fine-tuning taught their form too"
        )

    def take(self, passes: Passes, inputs: Opened, stack: ExitStack, lasting: bool, start: Start | None = None) -> str:
        """Take the steps, or find that they were taken before, and put into `inputs` how their end differs from W_f.

        Args:
            passes: with the folder where private data lie.
            inputs: what is divided.
            stack: closes what is opened.
            lasting: the folder is there for a later run, and a state is worth keeping.
            start: where they begin; None: at W_f.

        Returns:
            What became of them, as a sentence.

        Raises:
            LiborthError: the leaf says which.
        """
        console = passes.console
        prepare_factors(passes.folder)
        how = [asdict(self.method), self.most, self.names, self.seed]
        known = [start.known] if start else _factors(inputs).checkpoint_hashes()
        place = edit_folder(passes, "recall", known, self.rows, how)
        if (place / COURSE).is_file():
            console.note(f"steps: reusing {place}")
        else:
            if not passes.run.resume:
                shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700, exist_ok=True)
            console.note(f"recall: {self} (private, in {place})")
            self._run(place, passes, inputs, Keeper(place, console) if lasting else None, start)
        inputs.edit = stack.enter_context(EditSet.open(place))
        course = Course(**json.loads((place / COURSE).read_text(encoding="ascii")))
        console.note(str(course))
        if course.doubt and start is None:  # elsewhere little may be left to forget
            console.warn(course.doubt)
        return str(course)

    def _run(self, place: Path, passes: Passes, inputs: Opened, keeper: Keeper | None, start: Start | None) -> None:
        finetuned = Point(inputs.finetuned)
        reference = None if inputs.alone else Point(inputs.finetuned, inputs.reference, 0.0)
        retain, begin = (start.retain(), Stepped(finetuned, start.moved)) if start else (_factors(inputs), finetuned)
        passes.model.use(begin)
        metric = Metric(retain, self.method.damping, passes.run.device)
        rows = replace(self.rows, taught=start is None)
        steps = Steps(passes.model, (begin, reference), rows, metric, set(self.names), place)
        course, moved = steps.run(self.method, self.most, self.seed, passes.console, keeper, dtype=passes.training)
        if start:
            start.moved.add(moved)
            moved = start.moved
        EditSet.write(place, moved.tensors)
        write_file(place / COURSE, json.dumps(asdict(course)).encode(), FILE_MODE)
        clear(place)


def _factors(inputs: Opened) -> FactorSet:
    """Return the retain factors at W_f, which a split by steps measures before."""
    assert inputs.retain is not None
    return inputs.retain


ALGORITHM = 8
"""Counts what steps and students have been: what an earlier one left is not taken for its like."""


def edit_folder(passes: Passes, kind: str, known: Sequence[object], rows: Rows, how: Sequence[object]) -> Path:
    """Return the private folder of an edit, named by a keyed hash of all that decides it, and count it as used.

    Args:
        passes: with the pair, the device and the folder it lies in.
        kind: what makes the edit.
        known: identifies what else is read: factors, or a teacher.
        rows: texts that are read.
        how: the settings.
    """
    sides = [[s.identity for s in side.shards.values()] for side in (passes.finetuned, passes.reference)]
    few = [row for row in (*rows.retain, *rows.held_out) if row.file in rows.small]
    read = [data_hash(some) for some in (rows.forget, rows.fresh, rows.retain, rows.held_out, few) if some]
    seen = [ALGORITHM, sides, known, read, [*how, passes.dtype, str(passes.run.device)], manifest.Maker(kind=kind).model_dump()]
    place = passes.folder / f"{KIND}-{identity(passes.folder, json.dumps(seen, sort_keys=True).encode())[:12]}"
    passes.used.append(place)
    return place


def tensors(inputs: Opened, options: SplitOptions) -> list[str]:
    """Return the stored tensors of W_f that a split divides and that fine-tuning changed: the others stay as they are."""
    items = Splitter(inputs.reference, inputs.finetuned, as_it_is(options)).split_items
    changed = [i for i in items if inputs.alone or not is_unchanged(inputs.reference, inputs.finetuned, i)]
    return [item.twin for item in changed]


def as_it_is(options: SplitOptions) -> SplitOptions:
    """Return a split of the same tensors that needs no text and takes nothing out: it tells which there are to divide."""
    overrides = tuple(override for override in options.overrides if override.amount is None)
    return replace(options, method="scale", amount=Amount("scale", 1.0), settings={}, overrides=overrides)
