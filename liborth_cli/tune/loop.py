"""The one training loop: of every method of `tune`, and in `verify` of the relearning attack and of a bend between models.

Everything a step does depends on the step's number, the weights and the optimiser's moments alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from liborth_cli.errors import OutOfResources
from liborth_cli.machine import is_out_of_memory
from liborth_cli.tune.data import Example, PaddedBatch, alike, batch_rows
from liborth_cli.tune.full import LOSS, Full
from liborth_cli.tune.options import Arithmetic, LoopOptions, Optimiser, Schedule

Losses = dict[str, float]
"""Of one step, by name: means in nats a token; `LOSS` is what the run is to learn."""


class Watch:
    """Looks at a run step by step, and may end it."""

    def before(self, step: int, rate: float, losses: Losses | None) -> bool:
        """See a step's gradient before the weights move.

        Args:
            step: its number, from 0.
            rate: of learning.
            losses: of the rows it read; None when they or the gradient are not finite.

        Returns:
            Whether to go on; False leaves the weights as they are.
        """
        return losses is not None

    def after(self, done: int) -> bool:
        """See the weights after `done` steps; False ends the run."""
        return True


def train(
    method: Full,
    rows: Sequence[Example],
    options: LoopOptions,
    watch: Watch | None = None,
    *,
    optimiser: torch.optim.Optimizer | None = None,
    begin: int = 0,
) -> int:
    """Train until the steps are done or the watch says that it is enough.

    Args:
        method: what is trained, and how a batch becomes a gradient.
        rows: to learn from; read in the order that the seed decides, another one every epoch.
        options: how long and how fast.
        watch: measures on the way.
        optimiser: over the method's parameters, with moments of an earlier part of the run; a new one when None.
        begin: steps that were done before.

    Returns:
        How many steps are done.

    Raises:
        OutOfResources: when memory ran out; says what to lower.
    """
    watch, optimiser = watch or Watch(), optimiser or optimiser_of(method, options)
    if options.checkpointing:
        method.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method.model.train()
    with _advice(options):
        for step in range(begin, options.steps):
            rate = options.rate * share_of_rate(options, step)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            losses = gradient(method, rows, options, step)
            if not watch.before(step, rate, losses):
                return step
            optimiser.step()
            optimiser.zero_grad()
            method.after_step()
            if not watch.after(step + 1):
                return step + 1
    return max(begin, options.steps)


def optimiser_of(method: Full, options: LoopOptions, fused: bool | None = None) -> torch.optim.Optimizer:
    """Make the optimiser of a method's parameters; each has its own share of the rate.

    Args:
        method: what is trained.
        options: which optimiser, and its settings.
        fused: one pass over memory a step, a quarter of the time, rounded otherwise; None: as torch thinks best.
    """
    groups = [{"params": [p], "factor": method.rate_factor(name)} for name, p in method.parameters.items()]
    kind = torch.optim.AdamW if options.optimiser is Optimiser.ADAMW else torch.optim.SGD
    return kind(groups, lr=options.rate, weight_decay=options.weight_decay, fused=fused)


def share_of_rate(options: LoopOptions, step: int) -> float:
    """Return the learning rate of one step (from 0) as a share of the highest."""
    warmup = round(options.warmup * options.steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule is Schedule.CONSTANT:
        return 1.0
    left = (step - warmup) / max(options.steps - warmup, 1)
    return 1.0 - left if options.schedule is Schedule.LINEAR else 0.5 * (1.0 + math.cos(math.pi * left))


def gradient(method: Full, rows: Sequence[Example], options: LoopOptions, step: int) -> Losses | None:
    """Compute the clipped gradient of one step; return its losses, or None when they or the gradient are not finite."""
    numbers = range(step * options.accumulate, (step + 1) * options.accumulate)
    lessons = [
        lesson
        for number in numbers
        for lesson in method.lessons(batch_rows(rows, number, options.batch_size, options.seed), number)
    ]
    batches = [(lesson, PaddedBatch.of(group, method.device)) for lesson in lessons for group in alike(lesson.rows)]
    tokens = {lesson.name: sum(b.tokens for other, b in batches if other.name == lesson.name) for lesson in lessons}
    own = sum(batch.tokens for lesson, batch in batches if lesson.own)
    sums = {LOSS: 0.0}
    for lesson, batch in batches:
        with arithmetic(options, method.device):
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
    return sums if all(map(math.isfinite, (*norms, *sums.values()))) else None


@contextmanager
def arithmetic(options: LoopOptions, device: torch.device) -> Iterator[None]:
    """Compute in the dtype that was asked for."""
    with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype is Arithmetic.BFLOAT16):
        yield


@contextmanager
def _advice(options: LoopOptions) -> Iterator[None]:
    """Turn an allocator's refusal into advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = [f"--batch-size {max(options.batch_size // 2, 1)} --accumulate {options.accumulate * 2}"]
        advice += [] if options.checkpointing else ["--gradient-checkpointing"]
        advice += ["--dtype bfloat16"] if options.dtype is Arithmetic.FLOAT32 else []
        raise OutOfResources(f"out of memory while training; try {', '.join(advice)}, or a smaller --seq-len") from None
