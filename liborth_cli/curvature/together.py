"""Factors that are never stored: several passes walk back side by side, and the factors of one block of all of them are there.

A factor set says what it will hold before anything is measured, so that a split is planned from it as from one on disk. Its
tensors come stage by stage, from the last block to the first, and go when whoever divides by them is done.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint, Shard
from liborth_cli.curvature import factors
from liborth_cli.curvature.collect import FactorCollector
from liborth_cli.curvature.estimate import Estimator, layer_of
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import (
    DIAGONAL,
    GRADIENT_COVARIANCE,
    GRADIENT_MOMENT,
    INPUT_COVARIANCE,
    INPUT_MOMENT,
    TOKEN_GRADIENTS,
    TOKEN_INPUTS,
    TOKEN_WEIGHTS,
    Sums,
)
from liborth_cli.curvature.passes import shared_inputs
from liborth_cli.curvature.plan import CurvatureOptions
from liborth_cli.curvature.selection import Factored
from liborth_cli.curvature.state import Found
from liborth_cli.heap import return_freed_memory
from liborth_cli.ranks import World
from liborth_cli.stream.tap import arithmetic
from liborth_cli.stream.trial import try_out
from liborth_cli.stream.walk import Course, Losses, walk_back


@dataclass(frozen=True)
class Expected:
    """A tensor that will be there for a while.

    Attributes:
        shape: its shape, or the largest that it can have.
        shard: the file it is in: none.
    """

    shape: tuple[int, ...]
    shard: str = ""


@dataclass
class Held:
    """The tensors of a factor set that is not stored.

    Attributes:
        tensors: all that there was, is or will be.
        shards: its files: none.
    """

    tensors: dict[str, Expected]
    shards: dict[str, Shard] = field(default_factory=dict)
    _values: Sums = field(default_factory=dict, repr=False)

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor that is there; nobody may change it."""
        return self._values[name]

    def put(self, values: Sums) -> None:
        """Take the tensors of one stage."""
        self._values |= values
        self.tensors |= {name: Expected(tuple(value.shape)) for name, value in values.items()}

    def drop(self, keep: Container[str]) -> None:
        """Forget the tensors of all layers but some."""
        self._values = {name: value for name, value in self._values.items() if name.partition("/")[2] in keep}

    def close(self) -> None:
        """Forget all."""
        self._values.clear()


@dataclass
class HeldPass:
    """One pass whose factors are not stored.

    Attributes:
        kind: "retain" or "forget".
        job: what is measured; all of its rows go in one group.
        data: what was read.
        number: of this pass among those that walk side by side.
        sides: the checkpoints it is measured on, by what the manifest calls them.
        place: where its set would be stored: this names it.
        scratch: directory for block inputs, or None to keep them in memory.
    """

    kind: str
    job: Estimator
    data: manifest.Data
    sides: Mapping[str, tuple[Checkpoint, Source]]
    place: Path
    scratch: Path | None = None
    number: int = 0

    def __post_init__(self) -> None:
        """Make the set, empty; `owners` will say which rank has the factors of a layer."""
        targets = [target for group in self.job.targets.values() for target in group]
        shapes = {key: Expected(shape) for t in targets for key, shape in expected(t, self.job.options, self.job.tokens)}
        names = {target.name: target.name for target in targets}
        self._found = Found(stages={}, rows={}, tokens=dict.fromkeys(names, 0.0), shared=names, loss=0.0, loss_tokens=0)
        self._held, self._losses = Held(shapes), Losses()
        uses = Counter((target.tensor, target.matrix) for target in targets)
        # The factors of a matrix that is used in several places are added up: they go to one rank.
        self.owners = {target.name: 0 for target in targets if uses[target.tensor, target.matrix] > 1}
        self.set = FactorSet(self.place, self.job.describe(self._found, {}, self.data), self._held, stored=False)

    def stages(self, advance: Callable[[int], None], wanted: Container[str]) -> Iterator[str]:
        """Walk; at every stop the set holds the factors of the stage that is named, beside what it was not told to drop.

        Args:
            advance: told of the walk's tokens.
            wanted: stages that are looked at; through the others the walk only passes.
        """
        job, device = self.job, self.job.run.device
        chosen = {stage: sites for stage, sites in job.chosen.items() if stage in wanted}
        some, collector = job.dealt(0), FactorCollector(chosen, device, job.options)
        order, step = list(reversed(job.model.stages)), job.run.world.size if job.turns else 1
        walk = walk_back(job.model, some, collector, job.relay(some, self.scratch, self.number), Course(self._losses, advance))
        try:
            for start in range(0, len(order), step):  # where blocks are dealt, ranks go through a round of them at a time
                stages = order[start : start + step]
                if not job.turns or any(job.turns.mine(job.model.stages.index(stage) - 1) for stage in stages):
                    job.model.use(job.point)
                    with arithmetic(job.model.dtype, job.model.device):
                        next(walk)
                for stage in stages:
                    if stage in chosen:
                        self._take(stage, collector)
                    yield stage
            deque(walk, maxlen=0)  # until all is sent
        finally:
            walk.close()  # type: ignore[attr-defined]

    def describe(self, hashes: Mapping[Path, Written]) -> None:
        """Complete the set's manifest, when the walk is over and the checkpoints are hashed."""
        inputs = {name: manifest.Input.of(side, source, hashes) for name, (side, source) in self.sides.items()}
        self.set.manifest = self.job.describe(self._found, inputs, self.data)

    def drop(self, keep: Container[str]) -> None:
        """Forget the factors of all layers but some."""
        owners = {self.set.layers[name].input for name in self.set.layers if name in keep}
        self._held.drop({name for name in self.set.layers if name in keep} | owners)

    def _take(self, stage: str, collector: FactorCollector) -> None:
        world, targets = self.job.run.world, self.job.targets[stage]
        names = {target.name for target in targets}
        seen = {layer: count for layer, count in collector.tokens.items() if layer in names}
        shared = {layer: owner for layer, owner in collector.shared.items() if layer in names}
        parts = world.share([seen, shared, self._losses.total, self._losses.tokens])
        shared = shared_inputs(part[1] for part in parts)
        tokens = {layer: math.fsum(part[0].get(layer, 0.0) for part in parts) for layer in shared}
        losses = {"loss": sum(part[2] for part in parts), "loss_tokens": sum(part[3] for part in parts)}
        self._found = self._found.model_copy(update=losses)
        _dealt(targets, shared, self.owners, world)
        sums = collector.take(stage)
        for rank in range(world.size):
            part = {key: sums.pop(key) for key in list(sums) if self.owners[key.partition("/")[2]] == rank}
            whole = world.reduce_to(rank, part, factors.TOKENS)
            if rank == world.rank:
                self._held.put(factors.average(whole, tokens, bases=False))
        order = [target.name for one in self.job.model.stages for target in self.job.targets[one]]
        for target in targets:
            name, owner = target.name, shared.get(target.name)
            if owner is None:  # used in a way that is not understood, or by no token
                for found in (self._found.shared, self._found.tokens, self.set.layers):
                    found.pop(name, None)
                continue
            self._found.shared[name], self._found.tokens[name] = owner, tokens[name]
            self.set.layers[name] = layer_of(target, owner, tokens[name], order.index(name))


def _dealt(targets: Sequence[Factored], shared: Mapping[str, str], known: dict[str, int], world: World) -> None:
    """Deal the layers of a stage to ranks, those that share an input together; what is dealt already stays where it is."""
    groups: dict[str, list[Factored]] = {}
    for target in targets:
        if target.name in shared:
            groups.setdefault(shared[target.name], []).append(target)
    free = []
    for some in groups.values():
        rank = next((known[target.name] for target in some if target.name in known), None)
        if rank is None:
            free.append(some)
        else:
            known |= {target.name: rank for target in some}
    dealt = world.assign(free, lambda some: sum(float(t.d_in) * t.d_out * min(t.d_in, t.d_out) for t in some))
    known |= {target.name: rank for rank, part in enumerate(dealt) for some in part for target in some}


@dataclass
class Together:
    """Passes over one model that walk back side by side.

    Attributes:
        passes: what is measured; all with one model, which is used with the weights of one after the other.
        measured: all factors are in memory: nobody walks any more.
    """

    passes: Sequence[HeldPass]
    measured: bool = False

    def __post_init__(self) -> None:
        """Let all passes send the factors of a layer to the same rank."""
        for number, one in enumerate(self.passes):
            one.owners, one.number = self.passes[0].owners, number

    @property
    def steps(self) -> int:
        """How often whoever is told of progress is told of each token."""
        return 2 * len(self.passes[0].job.model.blocks)

    @property
    def tokens(self) -> int:
        """How many tokens all passes tell of together."""
        return self.steps * sum(one.job.tokens for one in self.passes)

    def stage_of(self) -> dict[str, str]:
        """Return layer → the stage in which its factors come."""
        return {t.name: stage for one in self.passes for stage, group in one.job.targets.items() for t in group}

    def stages(self, advance: Callable[[int], None], wanted: Container[str]) -> Iterator[str]:
        """Yield every stage, when all passes have its factors if it is wanted.

        Args:
            advance: told of the walk's tokens.
            wanted: stages that somebody waits for.
        """
        first = self.passes[0].job
        first.model.use(first.point)
        with arithmetic(first.model.dtype, first.model.device):
            try_out(first.model, resident=False)
        walks = [one.stages(advance, wanted) for one in self.passes]
        try:
            for found in zip(*walks, strict=True):
                if any(one.job.options.per_token for one in self.passes):
                    return_freed_memory()  # tokens came piece by piece, and what is made of them is mapped by itself
                yield found[0]
        finally:
            for walk in walks:
                walk.close()  # type: ignore[attr-defined]

    def measure(self, advance: Callable[[int], None]) -> None:
        """Walk, and keep all factors."""
        for _ in self.stages(advance, set(self.stage_of().values())):
            pass
        self.measured = True

    def ready(self, needed: Mapping[str, set[str]], advance: Callable[[int], None]) -> Iterator[list[str]]:
        """Walk as far as somebody waits, and yield names as soon as all factors they wait for are there.

        Args:
            needed: name → layers; those that no pass measures are not waited for.
            advance: told of the walk's tokens.

        Yields:
            First those that wait for nothing. Until the next are asked for, their factors stay.
        """
        if self.measured:
            advance(self.tokens)
            yield list(needed)
            return
        stage_of, done = self.stage_of(), set[str]()
        waiting = {name: {stage_of[layer] for layer in layers if layer in stage_of} for name, layers in needed.items()}
        yield [name for name, stages in waiting.items() if not stages]
        waiting = {name: stages for name, stages in waiting.items() if stages}
        for stage in self.stages(advance, {stage for stages in waiting.values() for stage in stages}) if waiting else ():
            done.add(stage)
            yield [name for name, stages in waiting.items() if stages <= done]
            waiting = {name: stages for name, stages in waiting.items() if not stages <= done}
            if not waiting:
                break
            self.drop({layer for name in waiting for layer in needed[name]})

    def owner(self, layer: str) -> int | None:
        """Return the rank that has the factors of a layer; None before they are measured, and where there are none."""
        return self.passes[0].owners.get(layer)

    def drop(self, keep: Container[str]) -> None:
        """Forget the factors of all layers but some, in every set."""
        for one in self.passes:
            one.drop(keep)

    def describe(self, hashes: Mapping[Path, Written]) -> None:
        """Complete the manifests of all sets."""
        for one in self.passes:
            one.describe(hashes)


def expected(target: Factored, options: CurvatureOptions, positions: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of what a collector makes of one matrix; tokens are as many as there can be."""
    single = options.per_token and target.kind == "linear"
    if single:
        yield TOKEN_INPUTS + target.name, (positions, target.d_in)
        yield TOKEN_WEIGHTS + target.name, (positions,)
        yield TOKEN_GRADIENTS + target.name, (positions, target.d_out)
    else:
        yield INPUT_COVARIANCE + target.name, target.input_shape
    if not single or target.heads:
        yield GRADIENT_COVARIANCE + target.name, target.gradient_shape
    if target.kind == "linear" and options.moments == "marginal":
        yield INPUT_MOMENT + target.name, target.input_shape
        yield GRADIENT_MOMENT + target.name, target.gradient_shape
    if target.kind == "linear" and options.diagonal:
        yield DIAGONAL + target.name, (target.d_out, target.d_in)


def whole_bytes(one: HeldPass) -> int:
    """Return the bytes that all factors of a pass take."""
    return sum(one.job.sum_bytes(one.job.tokens))


def held_bytes(one: HeldPass) -> int:
    """Return the bytes that a pass holds at a time: the factors of its largest stage, and block inputs that are in memory."""
    job = one.job
    sums = max(job.sum_bytes(job.tokens), default=0)
    waiting = 0 if one.scratch is not None else job.tokens * (len(job.model.blocks) + 2) * job.model.hidden * 4
    return 2 * sums + waiting
