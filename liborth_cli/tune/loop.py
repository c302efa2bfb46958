"""The one training loop. Everything a step does depends on the step's number and the saved state alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.console import Console, Progress
from liborth_cli.errors import OutOfResources, VerificationFailed
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import Batch, alike, batch_rows
from liborth_cli.tune.method import LOSS, Method
from liborth_cli.tune.route import Example
from liborth_cli.tune.schedule import factor
from liborth_cli.tune.state import Keeper, State

SMOOTH = 0.9
"""Weight of the past in the running mean of the loss."""
RUNAWAY = 1.5
"""Running mean, in units of the first loss, from which (and one nat more) training is given up."""


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast.

    Attributes:
        steps: of the optimiser.
        batch_size: rows that are computed together.
        accumulate: batches that make one step.
        rate: highest learning rate.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        warmup: share of the steps in which the rate rises.
        weight_decay: of AdamW, towards zero.
        clip: largest norm of the gradient; 0 leaves it alone.
        eval_every: steps between two looks at the held-out rows; 0 looks at the beginning and the end only.
        patience: looks without a better loss after which training stops, and the best weights are kept; 0 never.
        save_every: steps between two saved states.
        seed: of the order, and of everything random in the model.
        dtype: "float32" or "bfloat16" arithmetic; weights and optimiser are float32.
        checkpointing: compute activations twice in place of keeping them.
    """

    steps: int
    batch_size: int = 8
    accumulate: int = 1
    rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 0
    patience: int = 0
    save_every: int = 200
    seed: int = 0
    dtype: str = "float32"
    checkpointing: bool = False


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        state: the last state.
        kept: the step whose weights were kept.
        diverged: the step at which the loss ran away, or None.
        keeper: holds the saved state until the output is written.
    """

    state: State
    kept: int
    diverged: int | None
    keeper: Keeper


def train(
    method: Method,
    rows: Sequence[Example],
    held: Sequence[Row],
    options: LoopOptions,
    transaction: Transaction,
    console: Console,
) -> Outcome:
    """Train until the steps are done, patience is over, or the loss runs away.

    Args:
        method: what is trained, and how.
        rows: to learn from.
        held: to look at.
        options: how long and how fast.
        transaction: where states are kept; one that has a state goes on from there.
        console: where progress goes.

    Returns:
        How it ended. The network holds the weights that were kept.

    Raises:
        VerificationFailed: when the loss ran away before a good state was saved.
        OutOfResources: when memory ran out; says what to lower.
    """
    model, parameters = method.network.model, method.parameters()
    torch.manual_seed(options.seed)
    groups = [{"params": [p], "factor": method.rate_factor(name)} for name, p in parameters.items()]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, weight_decay=options.weight_decay)
    keeper = Keeper(transaction, parameters, optimiser)
    state = keeper.load() if keeper.saved else State()
    resumed = state.step
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    warmup, diverged = round(options.warmup * options.steps), None
    model.train()
    with console.progress("train", options.steps, "steps") as progress, _memory(options):
        progress.skip(state.step)
        if state.step == 0:
            _look(method, held, options, state)
        while state.step < options.steps and not _over(state, options):
            rate = options.rate * factor(options.schedule, state.step, options.steps, warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            random = torch.get_rng_state()
            entry = _gradient(method, rows, options, state.step)
            recent = _running_mean(state, entry)
            if entry is None or recent > RUNAWAY * state.first_loss + 1.0:
                diverged = state.step + 1
                break
            if state.step and state.step % options.save_every == 0 and state.step != resumed:
                keeper.save(state, random)  # now that these weights are known to give a sound loss
            optimiser.step()
            optimiser.zero_grad()
            method.after_step()
            state.curve.steps.append({"step": state.step, "rate": rate, **entry})
            state.step, state.recent_loss = state.step + 1, recent
            _tell(progress, console, state, options)
            if options.eval_every and state.step % options.eval_every == 0 and state.step < options.steps:
                _look(method, held, options, state)
        if diverged is not None:
            if not keeper.saved:
                raise VerificationFailed(
                    f"the loss ran away at step {diverged}, before a state was saved; nothing was written. "
                    "Lower --lr, or raise --warmup"
                )
            state = keeper.load()
        elif not _over(state, options):
            _look(method, held, options, state)
    kept = state.step
    if state.best_values:
        for name, value in state.best_values.items():
            parameters[name].data.copy_(value)
        kept = state.best_step
    model.eval()
    return Outcome(state, kept, diverged, keeper)


def _gradient(method: Method, rows: Sequence[Example], options: LoopOptions, step: int) -> dict[str, float] | None:
    """Compute the gradient of one step; return its losses, or None when they or the gradient are not finite."""
    device = next(iter(method.parameters().values())).device
    numbers = range(step * options.accumulate, (step + 1) * options.accumulate)
    lessons = [
        lesson
        for number in numbers
        for lesson in method.lessons(batch_rows(rows, number, options.batch_size, options.seed), number)
    ]
    batches = [(lesson, Batch.of(group, device)) for lesson in lessons for group in alike(lesson.rows)]
    tokens = {lesson.name: sum(b.tokens for other, b in batches if other.name == lesson.name) for lesson in lessons}
    own = sum(batch.tokens for lesson, batch in batches if lesson.own)
    sums = {LOSS: 0.0}
    for lesson, batch in batches:
        with _arithmetic(options, device):
            loss, penalties = method.loss(batch, lesson)
        share = batch.tokens / tokens[lesson.name]
        total = lesson.weight * loss / tokens[lesson.name]
        for penalty in penalties.values():
            total = total + penalty * share
        total.backward(inputs=list(lesson.learners.values()))
        mean = float(loss.detach()) / batch.tokens
        sums[LOSS] += mean * batch.tokens / own if lesson.own else 0.0
        seen = {name: float(value.detach()) for name, value in penalties.items()}
        for name, value in (seen if lesson.name == LOSS else {lesson.name: mean, **seen}).items():
            sums[name] = sums.get(name, 0.0) + value * share
    method.before_step()
    norms = []
    for group in method.clipped():
        learnt = [p for p in group.values() if p.grad is not None]
        norms.append(float(torch.nn.utils.clip_grad_norm_(learnt, options.clip or math.inf)))
    if not all(map(math.isfinite, (*norms, *sums.values()))):
        return None
    return sums


@torch.no_grad()
def _look(method: Method, held: Sequence[Row], options: LoopOptions, state: State) -> None:
    """Measure the held-out loss and what the method promises; remember the weights when they are the best so far."""
    entry: dict[str, float] = {"step": state.step, **method.measure()}
    if held:
        method.network.model.eval()
        device = next(iter(method.parameters().values())).device
        ordered = sorted(held, key=lambda row: row.tokens)
        total = tokens = 0.0
        for start in range(0, len(ordered), options.batch_size):
            batch = Batch.of(ordered[start : start + options.batch_size], device)
            with _arithmetic(options, device):
                total += float(method.loss(batch)[0])
            tokens += batch.tokens
        method.network.model.train()
        entry["loss"] = total / tokens
        if entry["loss"] < state.best:
            state.best, state.best_step = entry["loss"], state.step
            if options.patience:
                state.best_values = {name: p.detach().clone() for name, p in method.parameters().items()}
    state.curve.evaluations.append(entry)


def _over(state: State, options: LoopOptions) -> bool:
    """Tell whether patience has run out."""
    since = sum(1 for look in state.curve.evaluations if look["step"] > state.best_step)
    return bool(options.patience) and since >= options.patience


def _running_mean(state: State, entry: dict[str, float] | None) -> float:
    """Return the running mean of the loss with one step more; notes the first."""
    if entry is None:
        return state.recent_loss
    if state.step == 0:
        state.first_loss = state.recent_loss = entry["loss"]
    return SMOOTH * state.recent_loss + (1 - SMOOTH) * entry["loss"]


def _tell(progress: Progress, console: Console, state: State, options: LoopOptions) -> None:
    progress.say = f"loss {state.recent_loss:.3f}"
    progress.advance(1)
    every = max(options.steps // 10, 1)
    if state.step % every == 0 and state.step < options.steps:
        left = progress.seconds_left(options.steps)
        look = state.curve.evaluations[-1].get("loss") if state.curve.evaluations else None
        held = f", held out {look:.3f}" if look is not None else ""
        console.note(f"step {state.step} of {options.steps}: loss {state.recent_loss:.3f}{held}, about {left:.0f} s left")


@contextmanager
def _arithmetic(options: LoopOptions, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        yield


@contextmanager
def _memory(options: LoopOptions) -> Iterator[None]:
    """Turn an allocator's refusal into advice."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not ("alloc" in str(error) and "memory" in str(error)):
            raise
        advice = [f"--batch-size {max(options.batch_size // 2, 1)} --accumulate {options.accumulate * 2}"]
        advice += [] if options.checkpointing else ["--gradient-checkpointing"]
        advice += ["--dtype bfloat16"] if options.dtype == "float32" else []
        raise OutOfResources(f"out of memory while training; try {', '.join(advice)}, or a smaller --seq-len") from None
