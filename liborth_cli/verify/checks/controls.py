"""`--controls`: how much skill is kept, and what the simplest edits do at the same price."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.console import Progress
from liborth_cli.manifest import Split
from liborth_cli.measure.retention import retention
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, scorings
from liborth_cli.verify.memorisation import recited
from liborth_cli.verify.result import Facts, Line, Metric, Plot, Result, Series, Table
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    import torch

    from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
    from liborth_cli.measure.unwritten import Unwritten
    from liborth_cli.methods import Amount

STEPS = 10
"""Evaluations spent at most on finding an amount that matches."""
TRIES = 3
"""Amounts found on a sample of the rows that are tried on all of them, at most."""
CLOSE = 0.005
"""Share of the skill gain within which two retain losses count as matched."""
PATHS = {
    "scale": ("the update scaled down", "scale", (0.25, 0.5, 0.75, 1.0)),
    "svd": ("its leading singular directions", "energy", (0.5, 0.8, 0.95, 1.0)),
}
"""Controls that are drawn as a line: what they are called, the kind of their amount, and the amounts, which is where a match is
looked for first."""


@dataclass(frozen=True)
class Control:
    """One model beside the one that is verified.

    Attributes:
        state: its name among the subject's states.
        title: for the table.
        matched: whether its retain loss is that of the general checkpoint, None where that was not the aim.
    """

    state: str
    title: str
    matched: bool | None = None


@dataclass
class ControlsFacts(Facts):
    """The model and what stands beside it."""

    controls: list[Line]


def run(subject: Subject, options: Options) -> Result:
    """Measure retention, and the same numbers for five controls, none of which is written to disk.

    Retention is (L_r − L_g)/(L_r − L_f), L the mean loss a token on the retain data of reference, general and fine-tuned: the
    share of what fine-tuning gained that is kept; above 1 when cutting memory out helps. Interval: rows resampled jointly.

    The controls edit the tensors the split edited (any shape) and no others: the reference; the fine-tuned checkpoint; `scale`,
    W_r + s·U with s found so that its retain loss is the general one's (WiSE-FT, arXiv 2109.01903); `svd`, the
    leading singular directions with their energy found likewise; and a random edit that takes from each matrix the energy that
    the split took. `advantage` is the canaries' loss at the general checkpoint minus that at the matched scale, nats a token:
    what the method forgets beyond shrinking the update, for the same skill. Amounts are looked for on a sample of the retain
    rows and matched on all of them; the lines of the figure are of the sample.

    A memory of neurons is no edit of tensors: retention is measured, with the neurons in as the fine-tuned model, and of the
    controls only the reference has a meaning.
    """
    losses = {name: statistics.totals(subject.score("retain", name))[0] for name in ("reference", "general", "finetuned")}
    groups, seed = subject.groups("retain"), subject.seed
    kept = statistics.bootstrap(
        lambda w: retention(*(w @ some for some in losses.values())), [groups], seed,
        "share of the loss gained by fine-tuning that is kept",
    )  # fmt: skip
    loss = statistics.mean_loss(subject.score("retain", "general"), groups, seed, "on the retain data, nats a token")
    metrics = {"retention": kept, "retain_loss": loss}
    controls = [Control("reference", "reference"), Control("finetuned", "with its neurons" if subject.grown else "fine-tuned")]
    made, paths = _build(subject)
    controls += [Control("general", "general"), *made]
    if "canaries" in subject.data and "scale" in subject.states:
        metrics["advantage"] = _advantage(subject)
    verdict = _verdict(metrics, controls)
    table, facts = _table(subject, controls)
    figures = [table, *([_frontier(subject, controls, paths)] if "canaries" in subject.data else [])]
    return Result("controls", verdict, None, metrics, figures, ControlsFacts(facts))


def match_level(
    loss: Callable[[float], float], target: float, tolerance: float, first: float, marks: Sequence[float]
) -> tuple[float, bool]:
    """Find the least amount in [0, 1] at which a loss comes down to a target.

    It is looked at the marks first, which the figure needs anyway; between the two around the target by false position, where
    an end that stays twice counts half (the Illinois algorithm, Dowell and Jarratt 1971).

    Args:
        loss: of an amount; it need not be monotone.
        target: what it should be.
        tolerance: how close is close enough.
        first: the loss at 0, about.
        marks: ascending; they count among the `STEPS` evaluations there are.

    Returns:
        The amount, and whether it reached the target within the tolerance; the best one seen when it did not.
    """
    if first <= target + tolerance:
        return 0.0, first >= target - tolerance
    seen = {mark: loss(mark) for mark in marks}
    high = next((mark for mark in marks if seen[mark] <= target + tolerance), None)
    if high is not None:
        losses = {0.0: first, **seen}
        low = max(amount for amount in losses if amount < high)
        above, below, side = losses[low] - target, seen[high] - target, 0
        off = below
        while abs(off) > tolerance and len(seen) < STEPS:
            middle = low + (high - low) * (above / (above - below) if above > 0 else 0.5)
            seen[middle] = loss(middle)
            off = seen[middle] - target
            if off > 0:
                low, above, below, side = middle, off, below / (2 if side > 0 else 1), 1
            else:
                high, below, above, side = middle, off, above / (2 if side < 0 else 1), -1
    best = min(seen, key=lambda amount: abs(seen[amount] - target))
    return best, abs(seen[best] - target) <= tolerance


def match_by_sample(
    about: Callable[[float], float],
    loss: Callable[[float], float],
    target: float,
    tolerance: float,
    first: float,
    marks: Sequence[float],
) -> tuple[float, bool]:
    """Find an amount as `match_level` does, where a loss near the true one costs less; the true one says whether it matches.

    Where it does not, what the two differ by there is taken off, and another amount is looked for.

    Args:
        about: near the loss of an amount.
        loss: of an amount.
        target: as in `match_level`.
        tolerance: likewise.
        first: likewise.
        marks: likewise.
    """
    seen, off = dict[float, float](), 0.0
    for _ in range(TRIES):
        amount, _ = match_level(lambda some: about(some) + off, target, tolerance, first, marks)  # noqa: B023
        if amount in seen:
            break
        seen[amount] = loss(amount)
        if abs(seen[amount] - target) <= tolerance:
            break
        off = seen[amount] - about(amount)
    best = min(seen, key=lambda amount: abs(seen[amount] - target))
    return best, abs(seen[best] - target) <= tolerance


def _build(subject: Subject) -> tuple[list[Control], dict[str, list[str]]]:
    """Return the controls that are edits, and for each path the states at its marks."""
    from liborth_cli.methods import Amount

    edits = {} if subject.grown else measure_edits(subject)
    if not edits:
        return [], {}
    target = subject.loss("retain", "general")
    gain = subject.loss("retain", "reference") - subject.loss("retain", "finetuned")
    made, paths, weights = [], dict[str, list[str]](), subject.states.weights
    for method, (_, kind, marks) in PATHS.items():
        split = alternative(subject, edits, method, Amount(kind, 1.0))
        with subject.console.progress(f"control {method}", STEPS, "models", brief=True) as progress:
            about, loss = (_by_amount(subject, split, kind, one, progress) for one in (_about, _loss))
            close, first = max(CLOSE * abs(gain), 1e-6), subject.loss("retain", "reference")
            amount, matched = match_by_sample(about, loss, target, close, first, marks)
        subject.states.rename(_state(subject, split, Amount(kind, amount)), method)
        paths[method] = [_state(subject, split, Amount(kind, mark)) for mark in marks]
        how = "" if matched else ", as near as it gets"
        title = f"scale {amount:.3g}" if method == kind else f"svd, {kind} {amount:.3g}"
        made.append(Control(method, f"{title}: same retain loss{how}", matched))
    random = alternative(subject, edits, "random", Amount("energy", 1.0))
    weights["random"] = NormMatched(random, edits)
    too_large = any(edit.share > 1.0 for edit in edits.values())
    made.append(Control("random", f"random edit of the same size{' (at most the whole update)' if too_large else ''}"))
    return made, paths


def _by_amount(
    subject: Subject, split: Unwritten, kind: str, loss: Callable[[Subject, str], float], progress: Progress
) -> Callable[[float], float]:
    from liborth_cli.methods import Amount

    def found(amount: float) -> float:
        value = loss(subject, _state(subject, split, Amount(kind, amount)))
        progress.advance(1)
        return value

    return found


def _loss(subject: Subject, state: str) -> float:
    return subject.loss("retain", state)


def _about(subject: Subject, state: str) -> float:
    """Return about that: from a sample of the rows, beside the general model."""
    if state in STATES:
        return _loss(subject, state)
    return subject.about(state, statistics.totals(subject.score("retain", "general"))[0])


def _state(subject: Subject, split: Unwritten, amount: Amount) -> str:
    """Name a control at one amount among the states: each is scored once. The whole update is the fine-tuned model."""
    from liborth_cli.checkpoint.pair import Action

    if amount.value == 1.0 and not any(item.action == Action.MEMORY for item in split.plan.items.values()):
        return "finetuned"
    name = f"{split.plan.options.method} {amount.value!r}"
    subject.states.weights.setdefault(name, split.with_amount(amount))
    return name


def _advantage(subject: Subject) -> Metric:
    general, scale, finetuned = (
        statistics.totals(subject.score("canaries", name))[0] for name in ("general", "scale", "finetuned")
    )
    tokens = statistics.totals(subject.score("canaries", "general"))[1]
    meaning = "canary loss beyond that of scaling the update down at the same retain loss, nats a token"
    gap = [(some - scale) for some in (general, finetuned)]
    found = [
        statistics.bootstrap(lambda w, g=g: (w @ g) / (w @ tokens), [subject.groups("canaries")], subject.seed, meaning)
        for g in gap
    ]
    return found[0].beside(found[1])


def _table(subject: Subject, controls: Sequence[Control]) -> tuple[Table, list[Line]]:
    lists = [name for name in ("canaries", "fresh") if name in subject.data]
    rows, facts = [], list[Line]()
    for control in controls:
        loss, kept = subject.loss("retain", control.state), _kept(subject, control.state)
        others = [subject.loss(name, control.state) for name in lists]
        hits = [recited(subject.score("canaries", control.state))] if "canaries" in lists else []
        rows.append((control.title, loss, kept if math.isfinite(kept) else None, *others, *hits))
        facts.append({"state": control.state, "title": control.title, "retain_loss": loss, "retention": kept,
                      **dict(zip(lists, others, strict=True))})  # fmt: skip
    names = {"canaries": ">canary loss", "fresh": ">fresh loss"}
    columns = ("model", ">retain loss", ">retention", *(names[name] for name in lists))
    columns += (">recited",) if "canaries" in lists else ()
    return Table("The model and its controls, nats a token", columns, tuple(rows)), facts


def _kept(subject: Subject, state: str, loss: Callable[[Subject, str], float] = _loss) -> float:
    return retention(_loss(subject, "reference"), loss(subject, state), _loss(subject, "finetuned"))


def _frontier(subject: Subject, controls: Sequence[Control], paths: Mapping[str, Sequence[str]]) -> Plot:
    points = [control for control in controls if control.state not in PATHS]
    marks = [Series(one.title, *_place(subject, one.state), marks=(one.title,), line=False) for one in points]
    levels = {"never trained on": subject.loss("fresh", "general")} if "fresh" in subject.data else {}
    axes = ("share of the skill kept", "canary loss, nats a token")
    alt = (
        "Each model as a point: the share of the skill that is kept across, the loss of what must be gone upwards. "
        "Best is on the right, at the height of rows never trained on"
    )
    lines = [_path(subject, method, states) for method, states in paths.items()]
    alt += f"; a line is a control at several amounts, up to the whole update, on {subject.sample.words}." if lines else "."
    return Plot("Skill against secrets", alt, *axes, (*marks, *lines), levels=levels)


def _path(subject: Subject, method: str, states: Sequence[str]) -> Series:
    """Draw a control at several amounts: the one that matches the general model may be the fine-tuned model itself."""
    label, kind, amounts = PATHS[method]
    places = [_place(subject, state, _about) for state in states]
    marks = tuple(f"{kind} {amount:g}" for amount in amounts)
    return Series(label, tuple(x for (x,), _ in places), tuple(y for _, (y,) in places), marks=marks)


def _place(subject: Subject, state: str, loss: Callable[[Subject, str], float] = _loss) -> tuple[tuple[float], tuple[float]]:
    kept = _kept(subject, state, loss)
    return (kept if math.isfinite(kept) else 0.0,), (subject.loss("canaries", state),)


def _verdict(metrics: dict[str, Metric], controls: Sequence[Control]) -> str:
    kept = metrics["retention"]
    if not math.isfinite(kept.value):
        return "Fine-tuning gained nothing on the retain data, so there is no skill to keep: is this the right text?"
    text = f"{kept.value:.1%} of the skill is kept"
    if math.isfinite(kept.low):
        text += f" (95 % interval {kept.low:.1%} to {kept.high:.1%})"
    if "advantage" not in metrics:
        return f"{text}."
    gap = metrics["advantage"]
    scale = next(c for c in controls if c.state == "scale")
    beside = "at the same retain loss" if scale.matched else "at the nearest retain loss it reaches"
    if gap.low > 0:
        return f"{text}; the canaries' loss is {gap.value:.3f} nats above that of merely scaling the update down {beside}."
    if gap.high < 0:
        return f"{text}; merely scaling the update down forgets MORE {beside}, by {-gap.value:.3f} nats a canary token."
    return f"{text}; the canaries' loss cannot be told from that of merely scaling the update down {beside}."


@dataclass(frozen=True)
class Removed:
    """How much of one tensor's update was taken out.

    Attributes:
        update: ‖W_f − W_r‖².
        memory: ‖W_f − W_g‖².
    """

    update: float
    memory: float

    @property
    def share(self) -> float:
        """‖W_f − W_g‖² / ‖W_f − W_r‖²; more than 1 when the edit went beyond the reference."""
        return self.memory / self.update if self.update else 0.0


def measure_edits(subject: Subject) -> dict[str, Removed]:
    """Return what was done to every tensor whose update is divided, by name.

    A split's manifest tells the energies; without one they are measured, in pieces, from the three checkpoints.
    """
    if isinstance(subject.manifest, Split):
        records = subject.manifest.tensors.items()
        return {n: Removed(r.energy, r.energy * (r.memory or 0.0)) for n, r in records if r.action == "split" and r.energy}
    from liborth_cli.methods import Amount
    from liborth_cli.split import SplitOptions, Splitter

    plan = Splitter(*_pair(subject), SplitOptions("scale", Amount("scale", 0.5)))
    found = {item.tensor.name: _measure(subject, plan.reference, item.reference, item.tensor) for item in plan.split_items}
    return {name: edit for name, edit in found.items() if edit.memory > 0.0}


def alternative(subject: Subject, edits: dict[str, Removed], method: str, amount: Amount) -> Unwritten:
    """Plan another split of the tensors that were split, and of no others; nothing is written.

    Args:
        subject: with a reference and a fine-tuned checkpoint.
        edits: the tensors that were split.
        method: a key of `METHODS`.
        amount: how much it keeps.
    """
    from liborth_cli.checkpoint.pair import Action, Policy
    from liborth_cli.machine import spare_bytes
    from liborth_cli.measure.decomposed import Decomposed
    from liborth_cli.measure.unwritten import Unwritten
    from liborth_cli.split import SplitOptions, Splitter

    policy, actions = Policy(), dict[str, str]()
    if isinstance(subject.manifest, Split):
        recorded = subject.manifest.parameters.policy
        policy = Policy(vectors=recorded.vectors, added=recorded.added)
        actions = {name: record.action for name, record in subject.manifest.tensors.items()}
    options = SplitOptions(method, amount, policy=policy, nonfinite="passthrough", seed=subject.seed)
    plan = Splitter(*_pair(subject), options)
    for name, item in plan.items.items():
        action = Action(actions[name]) if name in actions else item.action
        if action == Action.SPLIT and name not in edits:
            action = Action.SKILL
        if action != item.action and (action != Action.SPLIT or item.reference is not None):
            plan.items[name] = dataclasses.replace(item, action=action, why="as in the split")
    kept = Decomposed(spare_bytes() // 2) if method == "svd" else None
    return Unwritten(plan, subject.run.device, kept)


class NormMatched:
    """A random edit: elements of the update dropped by lot until each tensor has lost the energy that the split took out of it.

    The placebo: where it does as well, the split's choice of directions did nothing.

    Attributes:
        split: another split of the same tensors, whose amount is set tensor by tensor.
        edits: what to match.
    """

    def __init__(self, split: Unwritten, edits: dict[str, Removed]) -> None:
        """Take the plan of a `random` split and the energies to match."""
        self.split, self.edits = split, edits

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration."""
        return self.split.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`; an edit larger than the update drops all of it."""
        edit = self.edits.get(info.name)
        if edit is None:
            self.split.read_into(out, info)
            return
        from liborth_cli.methods import Amount

        amount = Amount("energy", max(1.0 - edit.share, 0.0))
        self.split.with_amount(amount).read_into(out, info)


def _pair(subject: Subject) -> tuple[Checkpoint, Checkpoint]:
    assert subject.reference is not None and subject.finetuned is not None
    return subject.reference, subject.finetuned


def _measure(subject: Subject, reference: Checkpoint, old: TensorInfo | None, tensor: TensorInfo) -> Removed:
    from liborth_cli.checkpoint.reader import pieces
    from liborth_cli.linalg.truncated import energy

    assert subject.finetuned is not None and old is not None
    update, memory, general = 0.0, 0.0, subject.general.tensors[tensor.name]
    for start, stop in pieces(0, min(math.prod(old.shape), math.prod(tensor.shape))):
        finetuned = subject.finetuned.load_elements(tensor.name, start, stop).double()
        update += energy(finetuned - reference.load_elements(old.name, start, stop).double())
        memory += energy(finetuned - subject.general.load_elements(general.name, start, stop).double())
    return Removed(update, memory)


def _work(subject: Subject, options: Options) -> Work:
    """Count every evaluation that a match may take, what it ends at, and what is drawn beside it."""
    known, made = subject.states.of(("reference", "general", "finetuned")), list[str]()
    sampled = not subject.grown and not subject.sample.whole
    steps = 0 if subject.grown else (STEPS - 1) * (TRIES if sampled else 1)
    looked = [f"{method}, step {i}" for method in PATHS for i in range(steps)]
    tried = [f"{method}, try {i}" for method in PATHS for i in range(TRIES if sampled else 0)]
    if not subject.grown:  # the last mark of a path is the fine-tuned model
        made = ["random", *(f"{method}, matched" for method in PATHS)]
    marks = [f"{method}, mark {i}" for method, (*_, some) in PATHS.items() for i in range(len(some) - 1) if made]
    scored = scorings(subject, ("retain",), [*known, *tried, "random"] if made else known)
    scored |= scorings(subject, (subject.sample.name,), looked)
    scored |= scorings(subject, ("canaries",), [*known, *made, *marks])
    return Work(scored | scorings(subject, ("fresh",), [*known, *made]))


CHECK = Check(
    name="controls",
    title="Controls",
    words="Retention, beside scale, svd and a random edit.",
    part=Part.FRESH,
    run=run,
    metrics=("retention", "retain_loss", "advantage"),
    needs=(Need.REFERENCE, Need.WHOLE, Need.RETAIN),
    cheap=True,
    work=_work,
    require="retention>=0.9",
)
