"""What is asked of an estimate, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli.machine import process_bytes

if TYPE_CHECKING:  # the command line reads this file for its options, and must not wait for torch
    from liborth_cli.curvature.selection import Factored
    from liborth_cli.stream.model import BlockModel

LEAST_BATCH = 4096
"""Positions computed at a time on a GPU, at least, rather than going through the model in groups."""
SCORES = 5
"""What a piece of logits takes with its loss and gradient, times its own size."""
MOST_WAITING = 12
"""Blocks of sums that may wait on a GPU to be written."""


class Fisher(StrEnum):
    """Which labels the curvature is taken of."""

    SAMPLED = "sampled"
    EMPIRICAL = "empirical"
    EXACT = "exact"


class Moments(StrEnum):
    """What the corrected eigenvalues of EK-FAC are made from."""

    NONE = "none"
    MARGINAL = "marginal"
    EXACT = "exact"


class Arithmetic(StrEnum):
    """What the model computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"


@dataclass(frozen=True)
class CurvatureOptions:
    """Everything that decides the numbers.

    Attributes:
        fisher: "sampled" labels from the model, "empirical" real ones, "exact" the sum over all.
        moments: "none", "marginal" or "exact": what EK-FAC's corrected eigenvalues are made from.
        diagonal: also the diagonal Fisher.
        per_token: of linear layers inputs and gradients of every single token in place of A and G.
        per_head: G for each attention head by itself.
        full_head: the whole G of the head in place of its diagonal.
        tensors: regular expressions on the names of matrices; none means all.
        at: t, where on the path between the reference (0) and the model (1).
        tokens: how many positions to read at most.
        seq_len: longest row.
        truncate: cut longer rows in place of refusing them.
        seed: of the sampled labels.
        eigen: store eigenbases.
        dtype: "float32" or "bfloat16" (or "float64", for tests) products with weights in the model.
        group_tokens: positions that go through the model together; None lets memory decide.
        exact_vocabulary: largest vocabulary for which all labels are summed over.
    """

    fisher: str = "sampled"
    moments: str = "none"
    diagonal: bool = False
    per_token: bool = False
    per_head: bool = False
    full_head: bool = False
    tensors: tuple[str, ...] = ()
    at: float = 1.0
    tokens: int | None = None
    seq_len: int | None = None
    truncate: bool = False
    seed: int = 0
    eigen: bool = False
    dtype: str = "float32"
    group_tokens: int | None = None
    exact_vocabulary: int = 512

    @property
    def passes(self) -> tuple[str, ...]:
        """The walks over the data that are needed."""
        return ("factors", "moments") if self.moments == "exact" else ("factors",)

    @property
    def is_private(self) -> bool:
        """Whether the set tells of single rows: it keeps tokens, or was taken on the path, where rows to forget are."""
        return self.per_token or self.at != 1.0

    @property
    def bases(self) -> bool:
        """Whether eigenbases are computed."""
        return self.eigen or self.moments == "exact"


@dataclass(frozen=True)
class Resources:
    """What may be used; never changes a result beyond rounding.

    Attributes:
        memory: bytes of host memory, this process included.
        scratch: directory for block inputs, or None to keep them in memory.
        weights: "auto", "stream" or "resident".
    """

    memory: int
    scratch: Path | None = None
    weights: str = "auto"


@dataclass(frozen=True)
class Plan:
    """How the work is cut up.

    Attributes:
        resident: whether all weights stay in memory; with `layers`, those of this rank's blocks.
        group_tokens: positions that go through the model together.
        batch_tokens: positions computed at a time.
        needed: bytes it takes at least, beside the process: with one row where rows wait in memory.
        blockwise: whether every batch goes through one block before any goes through the next. The way back computes each
            block once more, and a block's sums are complete while others are still to come.
        waiting: blocks whose sums may wait, on a GPU, to be written beside the work on the next ones; 0 writes at once.
        layers: whether blocks are dealt to ranks, and not rows.
    """

    resident: bool
    group_tokens: int
    batch_tokens: int
    needed: int
    blockwise: bool
    waiting: int = 0
    layers: bool = False


def plan(
    model: BlockModel,
    targets: Mapping[str, Sequence[Factored]],
    options: CurvatureOptions,
    resources: Resources,
    rows: Sequence[int],
    ranks: int = 1,
) -> Plan:
    """Fit the work into memory.

    Args:
        model: the model, on the meta device.
        targets: stage → what gets factors.
        options: what is computed.
        resources: what may be used.
        rows: tokens of every row.
        ranks: that the blocks are dealt to.

    Returns:
        The plan, of the rank that has most; `group_tokens` is 0 when the memory does not hold what it needs at least.
    """
    from liborth_cli.stream.relay import Turns
    from liborth_cli.stream.sizes import batch_tokens, free_bytes, logit_rows
    from liborth_cli.stream.walk import stage_of

    longest, positions = max(rows), sum(rows)
    width = {"float64": 8, "float32": 4}.get(options.dtype, 2)
    weights = {stage: model.stage_elements(stage) * width for stage in model.stages}
    sums = stage_bytes(targets, options, positions)
    # A block is differentiated whole, whatever gets factors in it; scores are made a few at a time.
    products = ([site for site in sites if site.kind == "linear"] for sites in model.planned_sites().values())
    outputs = max(sum(site.d_out + site.d_in for site in sites) for sites in products)
    usual = batch_tokens(model.device)
    batch = min(usual, max(longest, options.group_tokens or usual))
    per_token = 4 * (4 * outputs + 16 * model.hidden)
    depth, layers = len(model.blocks), ranks > 1
    turns = [Turns(depth, rank, ranks) for rank in range(ranks)]
    held = max(sum(weights[stage_of(level, depth)] for level in one.levels) for one in turns)
    waits = max(one.slots for one in turns) + 1
    each = waits * model.hidden * max(width, 4)  # hidden states are never narrower than float32
    if model.device.type != "cpu":
        wide = max(sum(t.d_out + t.d_in for t in group if t.kind == "linear") for group in targets.values())
        work = _Work(weights, held, sums=sums, computed=16 * (wide + 4 * model.hidden + model.heads * longest), kept=each)
        return replace(_on_device(work, options, resources, batch, rows, free_bytes(model.device)), layers=layers)
    scores = SCORES * 4 * model.vocabulary * min(logit_rows(model.vocabulary, model.device), positions)
    free, most = resources.memory - process_bytes(), options.group_tokens or 1 << 62
    # A stage is finished when none of its activations is left: the larger of the two counts, and not both.
    finish = max((_finishing(group, options) for group in targets.values()), default=0)
    computed = min(max(batch, longest), positions) * per_token * depth // 2
    whole = sum(weights.values()) * (not model.resident) + sum(sums.values()) + max(computed, finish) + scores
    if not layers and (resources.weights == "resident" or (resources.weights == "auto" and whole <= free)):
        return Plan(True, most if whole <= free else 0, batch, whole, blockwise=False)
    # Tokens kept one by one are those of a group; the groups' files are joined on disk.
    single = 2 * max((rows_bytes(group, options) for group in targets.values()), default=0)
    sums = max(stage_bytes(targets, options, 0).values(), default=0)
    each = single + (each if resources.scratch is None else 0)
    # The next block's weights are read ahead.
    read, least = 2 * max(weights.values()), sums + max(longest * per_token, finish) + scores
    resident = layers and resources.weights != "stream" and held + least + longest * each <= free
    if resources.weights == "resident" or resident:
        read, resident = held, True
    while batch > longest and read + sums + min(batch, positions) * per_token > free // 2:
        batch //= 2
    batch = max(batch, longest)
    fixed = read + sums + max(min(batch, positions) * per_token, finish) + scores
    needed = fixed + longest * each
    group = 0 if needed > free else min(most, (free - fixed) // each) if each else most
    return Plan(resident, group, batch, needed, blockwise=True, layers=layers)


def _finishing(targets: Sequence[Factored], options: CurvatureOptions) -> int:
    """Return the bytes that turning a stage's sums into what is stored takes beside them.

    That is the triangle of the largest; with bases the vectors of all, and the largest eigenproblem in float64: the matrix, its
    vectors as LAPACK leaves them and as we do, and what is rounded. Exact moments are counted with the sums, and come after.
    """
    kept = {t.name: (t.input_shape, t.gradient_shape) for t in targets}
    if options.per_token:
        kept |= {t.name: (t.gradient_shape,) if t.heads else () for t in targets if t.kind == "linear"}
    squares = [shape for shapes in kept.values() for shape in shapes if len(shape) > 1]
    if not options.bases:
        return 2 * max((math.prod(shape) + math.prod(shape[:-1]) for shape in squares), default=0)
    later = sum(t.d_out * t.d_in for t in targets if t.kind == "linear") if options.moments == "exact" else 0
    return max(4 * (sum(map(math.prod, squares)) - later) + 32 * max((shape[-1] ** 2 for shape in squares), default=0), 0)


@dataclass(frozen=True)
class _Work:
    """What an estimate takes, in bytes.

    Attributes:
        weights: of every stage.
        held: of all stages that a rank has.
        sums: of every stage.
        computed: for a position that is computed; attention keeps its scores.
        kept: for a position that waits between two blocks.
    """

    weights: Mapping[str, int]
    held: int
    sums: Mapping[str, int]
    computed: int
    kept: int


def _on_device(
    work: _Work, options: CurvatureOptions, resources: Resources, batch: int, rows: Sequence[int], free: int
) -> Plan:
    """Fit the work into a GPU's memory: block by block, with all weights there when they take less than half of it."""
    longest, positions, most = max(rows), sum(rows), max(work.sums.values(), default=0)
    whole = work.held
    resident = resources.weights == "resident" or (resources.weights == "auto" and whole <= free // 2)
    if options.fisher == "exact":
        return Plan(True, options.group_tokens or 1 << 62, batch, whole, blockwise=False)
    held = (whole if resident else 2 * max(work.weights.values())) + most
    kept = 0 if resources.scratch is not None else min(positions, options.group_tokens or positions) * work.kept
    for least, waits in ((LEAST_BATCH, kept), (1, min(kept, longest * work.kept))):
        while batch // 2 >= max(longest, least) and held + most + batch * work.computed + waits > free:
            batch //= 2
    batch = max(batch, longest)
    fixed = held + batch * work.computed
    waiting = min(max((free - fixed - kept) // max(2 * most, 1), 1), MOST_WAITING)
    fit = positions if kept == 0 else max(free - fixed - most, 0) // work.kept
    group = min(options.group_tokens or 1 << 62, 1 << 62 if fit >= positions else fit) if fit >= longest else 0
    return Plan(resident, group, batch, fixed + longest * work.kept, blockwise=True, waiting=waiting)


def rows_bytes(targets: Sequence[Factored], options: CurvatureOptions) -> int:
    """Return the bytes of one position of a stage, where positions are kept one by one."""
    return 4 * sum(t.d_out + t.d_in + 1 for t in targets if t.kind == "linear") if options.per_token else 0


def sum_bytes(target: Factored, options: CurvatureOptions, positions: int, packed: bool = False) -> int:
    """Return the bytes of one matrix's running sums; what is shared is counted with every matrix that shares it.

    Args:
        target: the matrix.
        options: what is computed.
        positions: how many are read; kept one by one when `per_token`.
        packed: symmetric sums as their upper triangles, as they are stored.
    """

    def of(size: int) -> int:
        return size * (size + 1) // 2 if packed else size**2

    square = of(target.d_in) if target.kind != "embedding" else target.d_in
    gradient = of(target.d_out) if target.kind != "head" else target.d_out
    if target.heads:
        gradient = target.heads * of(target.d_out // target.heads)
    total = square + gradient
    if target.kind == "linear":
        total += (square + gradient) * (options.moments == "marginal")
        total += target.d_out * target.d_in * (options.diagonal + (options.moments == "exact"))
        if options.per_token:
            total += (target.d_out + target.d_in + 1) * positions - square - (0 if target.heads else gradient)
    return 4 * total


def stage_bytes(targets: Mapping[str, Sequence[Factored]], options: CurvatureOptions, positions: int) -> dict[str, int]:
    """Return stage → the bytes of its running sums; see `sum_bytes`."""
    return {stage: sum(sum_bytes(t, options, positions) for t in group) for stage, group in targets.items()}


def disk_bytes(targets: Mapping[str, Sequence[Factored]], options: CurvatureOptions, positions: int) -> int:
    """Return an upper bound of what a factor set takes on disk: what matrices share is counted with every one of them."""
    once = sum(sum_bytes(t, options, positions, packed=True) for group in targets.values() for t in group)
    return once + (sum(stage_bytes(targets, options, positions).values()) if options.bases else 0)
