"""An estimate that is planned: which matrices get factors, how the work is cut up, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from liborth_cli.curvature.plan import CurvatureOptions, Plan, Resources, disk_bytes, plan, stage_bytes, sum_bytes
from liborth_cli.curvature.reduce import Reducer, Then, agreed, dealt_batches
from liborth_cli.curvature.selection import Factored, choose
from liborth_cli.errors import OutOfResources, UsageError
from liborth_cli.machine import Run, process_bytes
from liborth_cli.ranks import ALONE
from liborth_cli.stream import work
from liborth_cli.stream.batches import Batch, groups
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.relay import BLOCKS, Relay, Turns
from liborth_cli.stream.store import open_store
from liborth_cli.stream.tap import activation_dtype
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point


@dataclass(frozen=True)
class Outline:
    """What an estimate would do; see `Plan` for how."""

    rows: int
    tokens: int
    groups: int
    matrices: int
    disk_bytes: int
    state_bytes: int
    memory_bytes: int
    seconds: float
    plan: Plan
    left_out: dict[str, str]


class Planned:
    """A plan to estimate one model's curvature.

    Attributes:
        point: the weights.
        model: the model.
        rows: what it reads.
        options: what is computed.
        chosen: stage → sites and their targets.
        left_out: stored tensors without factors, with the reason.
        plan: how the work is cut up.
        turns: which rank has which blocks; None where rows are dealt.
    """

    def __init__(
        self, point: Point, model: BlockModel, rows: Sequence[Row], options: CurvatureOptions, resources: Resources, run: Run
    ) -> None:
        """Plan everything from shapes.

        Raises:
            OutOfResources: when the memory does not hold one block and one row, or the whole model where that is asked for.
            UsageError: when the options do not fit the model.
        """
        self.point, self.model, self.rows, self.options, self.run = point, model, rows, options, run
        self.chosen, self.left_out = choose(model, options.tensors, options.per_head, options.full_head)
        self.targets = {stage: [t for _, ts in sites for t in ts] for stage, sites in self.chosen.items()}
        self.resources = _checked(options, resources, run.parallel, model.vocabulary)
        lengths = [row.tokens for row in rows]
        planned = partial(plan, model, self.targets, options, self.resources, lengths)
        self.plan = agreed(run.world, planned, "data" if options.fisher == "exact" else run.parallel)
        self.turns = Turns(len(model.blocks), run.world.rank, run.world.size) if self.plan.layers else None
        if not self.plan.group_tokens:
            raise OutOfResources(self._refused(max(lengths)))
        self.groups = list(groups(rows, self.plan.group_tokens))

    def _refused(self, longest: int) -> str:
        """Say why nothing is planned."""
        needed = f"{self.plan.needed / 1e9:.2f} GB"
        if self.model.device.type != "cpu":
            return (
                f"{self.model.device}: one block and one row of {longest:,} tokens need about {needed} "
                "there, more than is free; choose fewer matrices with --tensors, or compute with --device cpu"
            )
        needed = f"{(self.plan.needed + process_bytes()) / 1e9:.2f} GB in all, more than allowed"
        if not self.plan.blockwise:
            instead = "" if self.options.fisher == "exact" else ", or leave --weights resident out"
            return f"--memory: all weights and all sums need about {needed}; raise it{instead}"
        scratch = "" if self.resources.scratch else ", keep block inputs on disk with --scratch"
        return (
            f"--memory: one block and one row of {longest:,} tokens need about {needed}; "
            f"raise it{scratch}, or choose fewer matrices with --tensors"
        )

    @property
    def tokens(self) -> int:
        """Positions that are read."""
        return sum(row.tokens for row in self.rows)

    def sum_bytes(self, positions: int) -> list[int]:
        """Return what the running sums of so many positions take, stage by stage."""
        return list(stage_bytes(self.targets, self.options, positions).values())

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what will be written, intermediate sums included."""
        sums = sum(self.sum_bytes(self.tokens)) if len(self.groups) > 1 else 0
        return disk_bytes(self.targets, self.options, self.tokens) + sums + (1 << 20)

    @property
    def state_bytes(self) -> int:
        """Upper bound of what is kept on the disk for --resume while a group is under way."""
        if self.run.world.size > 1:
            return 0
        return self.waiting_bytes if self.plan.blockwise else sum(self.sum_bytes(self._most))

    @property
    def waiting_bytes(self) -> int:
        """What the inputs of blocks take while they wait, on the rank that has most of them."""
        depth, ranks = len(self.model.blocks), self.run.world.size
        if self.plan.layers:
            tokens, slots = self._most, max(Turns(depth, rank, ranks).slots for rank in range(ranks))
        else:
            tokens, slots = -(-self._most // ranks), Turns(depth).slots
        return tokens * self.model.hidden * activation_dtype(self.model.dtype).itemsize * slots

    @property
    def _most(self) -> int:
        """Positions of the largest group."""
        return max(sum(row.tokens for row in group) for group in self.groups)

    @property
    def memory_bytes(self) -> int:
        """What a process needs, about."""
        waits = self.plan.blockwise and self.resources.scratch is None
        return process_bytes() + self.plan.needed + (self.waiting_bytes if waits else 0)

    @property
    def seconds(self) -> float:
        """How long it should take: products with weights, sums of a·aᵀ and g·gᵀ, and reading."""
        options = self.options
        walked = work.multiplied(self.model) * (1 + work.BACK + work.AGAIN * self.plan.blockwise) * len(options.passes)
        sums = 0.0
        for site, targets in (pair for pairs in self.chosen.values() for pair in pairs):
            square = site.d_in**2 + sum(t.d_out**2 for t in targets)
            whole = site.d_in * sum(t.d_out for t in targets)
            if site.kind == "linear" and not options.per_token:
                sums += square * (1 + (options.moments == "marginal")) / 2 + whole * options.diagonal
            if site.kind == "linear" and options.moments == "exact":
                sums += square + whole
        passes = len(self.options.passes) * (2 if self.plan.blockwise else 1)
        labels = self.model.vocabulary if options.fisher == "exact" else 1
        sums /= work.rate(self.run.device, "float64" if options.dtype == "float64" else "float32")
        return (
            self.tokens * (walked / work.rate(self.run.device, options.dtype) + sums) * labels / self.run.world.size
            + work.reading(self.model, passes * (len(self.groups) if self.plan.blockwise else 1))
            + self.disk_bytes / work.DISK_RATE
        )

    def reducer(self, then: Then) -> Reducer:
        """Say which rank gets the sums of which stage: they are as large as its factors, and bases take cubes."""

        def cost(target: Factored) -> float:
            bases = target.d_in**3 + target.d_out**3 if self.options.bases else 0
            return sum_bytes(target, self.options, 0) + bases / 100

        costs = {stage: sum(map(cost, self.targets[stage])) for stage in self.model.stages}
        return Reducer(self.run.world, costs, then, gather=self.run.gather, turns=self.turns)

    def relay(self, some: Sequence[Batch], scratch: Path | None, number: int = 0) -> Relay:
        """Return where the inputs of this rank's blocks wait; `number` tells walks apart that go side by side."""
        turns, world = self.turns or Turns(len(self.model.blocks)), self.run.world if self.turns else ALONE
        sizes = [batch.tokens * self.model.hidden * activation_dtype(self.model.dtype).itemsize for batch in some]
        return Relay(open_store(scratch, sizes, turns.slots), turns, world, BLOCKS + 2 * number)

    def dealt(self, group: int) -> list[Batch]:
        """Return the batches of a group of rows that go through this rank."""
        seed = self.options.seed if self.options.fisher == "sampled" else None
        return dealt_batches(self.run.world, self.groups[group], self.plan, seed, self.run.device)

    @property
    def outline(self) -> Outline:
        """What `write` would do."""
        return Outline(
            len(self.rows),
            tokens=self.tokens,
            groups=len(self.groups),
            matrices=sum(map(len, self.targets.values())),
            disk_bytes=self.disk_bytes,
            state_bytes=self.state_bytes,
            memory_bytes=self.memory_bytes,
            seconds=self.seconds,
            plan=self.plan,
            left_out=self.left_out,
        )


def _checked(options: CurvatureOptions, resources: Resources, parallel: str, vocabulary: int) -> Resources:
    """Hold options against each other and the model; return the resources that they need.

    Raises:
        UsageError: when they do not fit.
    """
    if options.per_token and options.fisher == "exact":
        raise UsageError("--per-token keeps one gradient a token, and --fisher exact has one for every label")
    if options.per_token and options.bases:
        raise UsageError("--per-token keeps tokens in place of covariances: leave out --eigen and --moments exact")
    if options.fisher != "exact":
        return resources
    if vocabulary > options.exact_vocabulary:
        raise UsageError(
            "--fisher exact runs one backward pass for each position and label, and this model has "
            f"{vocabulary:,} labels; --fisher sampled estimates the same, or allow it with --exact-vocabulary {vocabulary}"
        )
    if resources.weights == "stream" or parallel == "layers":
        raise UsageError("--fisher exact needs the whole model in memory: its many backward passes share one forward pass")
    return replace(resources, weights="resident")
