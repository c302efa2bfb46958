"""`--relearn`: train the model on text of the form of the secrets, and watch whether they come back by themselves.

What is tried stands in `liborth_cli.verify.attacks`. Every model learns the *form*, so what counts is the distance to
controls under the same attacks: rows of the form that nobody was trained on, the reference, and a model retrained without the
secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from threading import Event, Lock
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify import attacks, power, statistics
from liborth_cli.verify.attacks import Attack, AttackRows, Grid
from liborth_cli.verify.check import Check, Need, Options, Part, Work, option, scorings
from liborth_cli.verify.memorisation import verbatim
from liborth_cli.verify.relearning import Relearnt, beyond_fresh, lowest, relearn
from liborth_cli.verify.result import Facts, Metric, Plot, Result, Series, Table
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from liborth_cli.stream.model import BlockModel

PATIENCE = 600.0
"""Seconds that it may take, by a rough estimate, when nobody asked for it."""
RATES = {"cpu": 1e10, "cuda": 1e13}
"""Operations a second, two a product, that a thread, or a GPU, is taken to do; a thread at hidden widths up to `NARROW`."""
NARROW, MOST = 64, 10
"""A thread does more with wider models, in proportion, up to so many times more (measured at 576: 98 billion)."""
CONTROLS = {"reference": "the reference, which never saw them", "retrained": "the model retrained without them"}
METRICS = {"reference": "relearn_gap", "retrained": "relearn_gap_retrained"}


@dataclass(frozen=True)
class RelearnOptions(Options):
    """How much the attacker tries."""

    relearn_steps: int = option(attacks.STEPS, "Steps of each of --relearn's trainings.", least=2)
    relearn_rate: float | None = option(None, "Try AdamW at this rate only, as it is, on the canaries only.")
    relearn_seeds: int = option(1, "Deals of the halves; from two on they count in the intervals.", least=1)
    relearn_full: bool = option(
        False, "Try SGD, LoRA, fresh rows and --retain-data too, and a fourth rate: six times the work. --attacks does."
    )
    relearn_rank: int | None = option(
        None, "Train LoRA updates of this rank, not all weights; 16 where these do not fit in memory, 0: no LoRA.", least=0
    )

    def attacks(self, model: BlockModel) -> tuple[Attack, ...]:
        """Return what is tried on a model: attacks that train all its weights where these fit, or were asked for."""
        rank, rate = self.relearn_rank, self.relearn_rate
        if rate is not None:
            tried = (Attack(rate * model.hidden / attacks.WIDTH, rank=rank or 0),)
        else:
            tried = attacks.FULL if self.relearn_full else attacks.QUICK
            tried = attacks.low_rank(tried, min(rank, model.hidden)) if rank else tried
            tried = tuple(attack for attack in tried if not attack.rank) if rank == 0 else tried
        return attacks.fitting(tried, model) if rank is None else tried


@dataclass(frozen=True)
class Relearning:
    """After how many steps was measured, under which attacks; by model the lowest loss, and its curve, nats a token."""

    steps: Sequence[int]
    attacks: str
    lowest: dict[str, float]
    loss: dict[str, list[float]]


@dataclass
class RelearnFacts(Facts):
    """What the attack found."""

    relearning: Relearning


def run(subject: Subject, options: RelearnOptions) -> Result:
    """Attack the general model and its controls with the same grid, and compare the lowest losses.

    Losses are nats a token of the completions, means over rows that were not taught. The attacker chooses how and stops when it
    is best for him, so each model counts at its lowest mean over rates, optimisers and steps, and of what can be taught the
    largest gap counts. `relearn_gap` is the reference's lowest minus that of the general model; `relearn_gap_retrained`
    likewise, with a model that learnt the skill and never saw the canaries; `relearn_gap_fresh` is how much lower the canaries
    get than fresh rows under one and the same attack, less the same in the reference (some rows are harder for any model);
    the largest over all attacks, with an interval for all of them at once. Not above 0: nothing came back
    faster than in a model that never saw a secret. Intervals resample canaries, and from two deals on also the halves. The
    fine-tuned model's numbers are those before any training.
    """
    from liborth_cli.machine import side_by_side

    weights, model = subject.states.weights, subject.states.model("general")
    states = [name for name in ("general", *CONTROLS) if name in weights]
    target, one_by_one, over = _target(subject), Lock(), Event()
    grid = _grid(subject, options)
    work = grid.runs(target) * grid.steps * len(states)
    with subject.console.progress("relearning", work, "steps") as progress:

        def advance(steps: int) -> None:
            if over.is_set():
                raise CancelledError
            with one_by_one:
                progress.advance(steps)

        def attack(name: str) -> Relearnt:
            return relearn(weights[name], target, grid, device=subject.run.device, advance=advance)

        lanes = _lanes(subject, len(states), grid.bytes)
        found = dict(zip(states, side_by_side(attack, states, lanes, over), strict=True))
    return _judge(subject, found, model.hidden)


def _grid(subject: Subject, options: RelearnOptions) -> Grid:
    """Return everything that is tried."""
    seeds = tuple(range(subject.seed, subject.seed + options.relearn_seeds))
    return Grid(options.attacks(subject.states.model("general")), options.relearn_steps, seeds)


def _lanes(subject: Subject, models: int, each: int) -> int:
    """Return how many models are trained side by side, each on one thread: as many as fit, where nothing is drawn by lot.

    What dropout draws comes from one generator, whoever asks: the order would decide.

    Args:
        subject: what is verified.
        models: to train.
        each: bytes that a weight takes in training.
    """
    import torch

    from liborth_cli.machine import LARGE_MATRIX, too_large

    model = subject.states.model("general")
    config = vars(model.model.config.get_text_config())
    drawn = any("drop" in name and isinstance(value, (int, float)) and value > 0 for name, value in config.items())
    if drawn or subject.run.device.type != "cpu" or model.hidden >= LARGE_MATRIX:
        return 1
    count = min(torch.get_num_threads(), models)
    return count if not too_large(count * each * model.elements) else 1


def _target(subject: Subject) -> AttackRows:
    fresh = subject.groups("fresh") if "fresh" in subject.data else np.zeros(0, int)
    return AttackRows(
        subject.rows("canaries"), subject.groups("canaries"), subject.rows("fresh"), fresh, subject.rows("retain")
    )


def _judge(subject: Subject, found: Mapping[str, Relearnt], hidden: int) -> Result:
    general = found["general"]
    hit = np.asarray(general.recited.any((0, 2, 3)))
    before = subject.score("canaries", "finetuned") if "finetuned" in subject.states else []
    whole = float(np.mean([s.loss.mean() for s in before])) if before else None
    relearned = statistics.share(hit, subject.groups("canaries"), "share of the canaries recited after others were taught")
    metrics = {"relearned": relearned.beside(float(np.mean([verbatim(s) for s in before])) if before else None)}
    sentences = []
    for name in [name for name in CONTROLS if name in found]:
        meaning = (
            f"nats a token by which canaries that were not taught get closer than in {CONTROLS[name]}; 0 or less: no closer"
        )
        metric = _gap(subject, found, name, meaning)
        level = found[name].lowest()[0]
        metrics[METRICS[name]] = metric.beside(None if whole is None else level - whole)
        sentences.append(_compare(metric, CONTROLS[name]))
    if np.isfinite(general.fresh).any():
        metric = _beyond_fresh(subject, found)
        metrics["relearn_gap_fresh"] = metric
        sentences.insert(0, _compare(metric, "rows nobody was trained on"))
    if not sentences:
        sentences = ["there is no control to hold this against: give --fresh rows, or --reference"]
    lowest, attack, step = general.lowest()
    each = np.where(np.isfinite(general.canaries), general.canaries, np.inf).min((0, 2, 3))
    worst = int(each.argmin())
    start = float(general.curve("canaries", attack)[0])
    untried = "; all weights were not trained" if all(one.rank for one in general.attacks) else ""
    verdict = (
        f"After at most {general.steps[-1]} steps on others {int(hit.sum())} of {len(hit)} canaries are recited: "
        f"{'; '.join(sentences)}. Taught were {attacks.words(general.attacks, hidden)}{untried}. What was not taught stands at "
        f"{lowest:.2f} nats a token at best (before: {start:.2f}), after {step} steps on "
        f"{attacks.words([general.attacks[attack]], hidden)}; closest comes "
        f"{subject.label(worst, subject.rows('canaries')[worst])}, at {each[worst]:.2f}."
    )
    relearning = Relearning(
        general.steps,
        attacks=attacks.words(general.attacks, hidden),
        lowest={name: one.lowest()[0] for name, one in found.items()},
        loss={name: one.curve("canaries", one.lowest()[1]).tolist() for name, one in found.items()},
    )
    figures = [_plot(subject, found), _table(found, hidden)]
    return Result("relearn", verdict, None, metrics, figures, RelearnFacts(relearning))


def _gap(subject: Subject, found: Mapping[str, Relearnt], control: str, meaning: str) -> Metric:
    models, lessons = [found[control], found["general"]], _lessons(found["general"])

    def statistic(w: np.ndarray, runs: np.ndarray | None = None) -> np.ndarray:
        gaps = [np.subtract(*(lowest(model.canaries[:, :, some], w, runs) for model in models)) for some in lessons]
        return np.max(gaps, 0)

    return statistics.bootstrap(statistic, [subject.groups("canaries"), *_runs(models[0])], subject.seed, meaning)


def _beyond_fresh(subject: Subject, found: Mapping[str, Relearnt]) -> Metric:
    """Return how much lower canaries get than fresh rows, less the same in the reference where there is one."""
    models = [found[name] for name in ("general", "reference") if name in found]

    def statistic(never: np.ndarray, canaries: np.ndarray, runs: np.ndarray | None = None) -> np.ndarray:
        return beyond_fresh(models, never, canaries, runs)

    meaning = (
        "nats a token by which canaries that were not taught get closer than never-trained rows under one attack, beyond the "
        "reference's own"
    )
    lists = [subject.groups("fresh"), subject.groups("canaries"), *_runs(models[0])]
    metric = statistics.largest(statistic, lists, subject.seed, meaning)
    if "finetuned" not in subject.states:
        return metric.beside(None)
    levels = {rows: np.mean([s.loss.mean() for s in subject.score(rows, "finetuned")]) for rows in ("fresh", "canaries")}
    own = models[1].lowest("fresh")[0] - models[1].lowest()[0] if len(models) > 1 else 0.0
    return metric.beside(float(levels["fresh"] - levels["canaries"] - own))


def _lessons(model: Relearnt) -> list[list[int]]:
    """Return the numbers of the attacks that teach the same: a gap is taken within each, and the largest counts.

    Were the lowest of all attacks held against each other, one that brings the control down would hide what another shows.
    """
    taught = [attack.lesson for attack in model.attacks]
    return [[i for i, one in enumerate(taught) if one is lesson] for lesson in dict.fromkeys(taught)]


def _runs(model: Relearnt) -> list[np.ndarray]:
    """Return the runs as a list to resample, where halves were dealt more than once."""
    count = len(model.canaries)
    return [np.arange(count)] if count > 2 else []


def _compare(gap: Metric, control: str) -> str:
    if gap.low > 0:
        return f"they get {gap.value:.2f} nats closer than {control} ({gap.low:.2f} to {gap.high:.2f}), so it comes back"
    return f"not measurably closer than {control} ({gap.value:+.2f} nats, {gap.low:+.2f} to {gap.high:+.2f})"


def _table(found: Mapping[str, Relearnt], hidden: int) -> Table:
    """Show the lowest loss of every attack in every model."""
    rows = []
    for number, attack in enumerate(found["general"].attacks):
        lowest = [float(np.nanmin(one.curve("canaries", number))) for one in found.values()]
        fresh = found["general"].curve("fresh", number) if found["general"].fresh.size else np.full(1, np.nan)
        rows.append((attacks.words([attack], hidden), *lowest, float(np.nanmin(fresh)) if np.isfinite(fresh).any() else None))
    columns = ("taught", *(f">{name}" for name in found), ">fresh rows, general")
    return Table("Lowest loss of canaries that were not taught, nats a token", columns, tuple(rows))


def _plot(subject: Subject, found: Mapping[str, Relearnt]) -> Plot:
    """Draw each model under the attack that is best on it."""
    series = [_series(subject, one, "canaries", f"{name}: canaries not taught") for name, one in found.items()]
    if np.isfinite(found["general"].fresh).any():
        series.append(_series(subject, found["general"], "fresh", "general: never-trained rows"))
    alt = "; ".join(f"{s.label} goes from {s.y[0]:.2f} to {min(s.y):.2f} nats at best" for s in series)
    return Plot("Relearning, each model's worst attack", alt + ".", "training steps", "loss, nats a token", tuple(series))


def _series(subject: Subject, one: Relearnt, rows: str, label: str) -> Series:
    table, attack = getattr(one, rows), one.lowest(rows)[1]
    ends: Sequence[Metric] = [
        statistics.bootstrap(
            lambda w, t=table[:, :, attack : attack + 1, mark : mark + 1]: lowest(t, w, None),
            [subject.groups(rows)],
            subject.seed,
        )
        for mark in range(len(one.steps))
    ]
    value, low, high = (tuple(getattr(m, side) for m in ends) for side in ("value", "low", "high"))
    return Series(label, tuple(map(float, one.steps)), value, low, high)


def _lacks(subject: Subject, options: RelearnOptions) -> str:
    """Say why half of the canaries cannot be taught here."""
    count = subject.data["canaries"].different
    if count < attacks.LEAST:
        return f"at least {attacks.LEAST} different canaries to teach half of, and there are {count}"
    from liborth_cli.machine import too_large

    model = subject.states.model("general")
    tried = _grid(subject, options)
    what = "training all weights" if tried.trains_all else "the weights in float32"
    too_much = too_large(tried.bytes * model.elements, subject.run.device)
    return f"memory for {what}: {too_much}" if too_much else ""


def _costs(subject: Subject, options: RelearnOptions) -> str:
    """Say why it is not tried unless it is asked for: it would take too long, or there is nothing to compare with."""
    if not subject.has(Need.FRESH | Need.REFERENCE):
        return "--fresh rows or --reference, a control to hold it against"
    device, rows, model = subject.run.device.type, subject.rows("canaries"), subject.states.model("general")
    tokens = min(attacks.BATCH_ROWS, len(rows) // 2) * sum(row.tokens for row in rows) / len(rows)
    grid = _grid(subject, options)
    runs = grid.runs(_target(subject)) * len(subject.states.of(("general", *CONTROLS)))
    rate = _operations(device, model.hidden, subject.run.threads)
    seconds = 2 * attacks.PRODUCTS * model.elements * tokens * options.relearn_steps * runs / rate
    return f"about {seconds / 60:.0f} minutes; ask for it with --relearn, or with --patient" if seconds > PATIENCE else ""


def _operations(device: str, hidden: int, threads: int) -> float:
    """Return how many operations a second training is taken to do; a constant, so that a busy machine runs the same checks."""
    if device != "cpu":
        return RATES.get(device, RATES["cpu"])
    return RATES["cpu"] * threads * min(max(hidden / NARROW, 1), MOST)


def _work(subject: Subject, options: RelearnOptions) -> Work:
    """Count what every model is trained on, and every look at what it was not taught."""
    model, states = subject.states.model("general"), subject.states.of(("general", *CONTROLS))
    grid = _grid(subject, options)
    read, trained = attacks.positions(_target(subject), grid, model.context)
    scored = scorings(subject, ("canaries", "fresh"), subject.states.of(("finetuned",)))
    return Work(scored, len(states) * read, len(states) * trained, grid.bytes)


CHECK = Check(
    name="relearn",
    title="Relearning",
    words="Teach half of the canaries: does the other half come back?",
    part=Part.RELIABILITY,
    run=run,
    metrics=("relearn_gap", "relearn_gap_retrained", "relearn_gap_fresh", "relearned"),
    needs=(Need.CANARIES,),
    cheap=True,
    require="relearn_gap_fresh<=0.5",
    power={"relearned": power.none_found},
    options=RelearnOptions,
    lacks=_lacks,
    costs=_costs,
    slow=True,
    work=_work,
    controls=True,
    attack=True,
    thorough=lambda options: replace(options, relearn_full=True),
)
