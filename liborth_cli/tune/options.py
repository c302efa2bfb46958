"""What can be asked of `liborth tune`. Imports nothing heavy: the command line takes its words and defaults from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class TuneMethod(StrEnum):
    """How what is private is kept apart from what is general."""

    OGD = "ogd"
    SINKS = "sinks"
    FULL = "full"
    LORA = "lora"


class Form(StrEnum):
    """Which projection of `ogd`: what is general on both sides, or every general input."""

    KRONECKER = "kronecker"
    INPUT = "input"


class Learns(StrEnum):
    """What the memory of `sinks` learns: `--memory-learns`."""

    REPEATS = "repeats"
    PRIVATE = "private"
    ALL = "all"


class MemoryForm(StrEnum):
    """What the memory of `sinks` is made of: `--memory`."""

    NEURONS = "neurons"
    TOKENS = "tokens"
    DEEP_TOKENS = "deep-tokens"


class General(StrEnum):
    """What the general stream of `sinks` may learn."""

    TRAIN = "train"
    LORA = "lora"
    FROZEN = "frozen"


class Schedule(StrEnum):
    """How the learning rate goes after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Optimiser(StrEnum):
    """What turns a gradient into a step."""

    ADAMW = "adamw"
    SGD = "sgd"


class Arithmetic(StrEnum):
    """What the model computes in; weights and optimiser are float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast.

    Attributes:
        steps: of the optimiser; 0 goes by `TuneOptions.epochs`.
        batch_size: rows that are computed together.
        accumulate: batches that make one step.
        optimiser: AdamW, or SGD without momentum.
        rate: highest learning rate.
        schedule: of the rate, after the warm-up.
        warmup: share of the steps in which the rate rises.
        weight_decay: towards zero.
        clip: largest norm of the gradient; 0 leaves it alone.
        eval_every: steps between two looks at the held-out rows; 0 looks at the beginning and the end only.
        patience: looks without a better loss after which training stops, and the best weights are kept; 0 never.
        save_every: steps between two saved states.
        seed: of the order, and of everything random in the model.
        dtype: arithmetic.
        checkpointing: compute activations twice in place of keeping them.
    """

    steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    optimiser: Optimiser = Optimiser.ADAMW
    rate: float = 1e-4
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 0
    patience: int = 0
    save_every: int = 200
    seed: int = 0
    dtype: Arithmetic = Arithmetic.FLOAT32
    checkpointing: bool = False


@dataclass(frozen=True)
class OgdOptions:
    """What `ogd` protects.

    Attributes:
        retain: a factor set of the base on public text, or None.
        retain_data: public text, as --retain-data gives it: measured in its place, held, or stored row by row.
        protect: share of the trace of A and of G to protect.
        form: which projection.
        hold: weight of the divergence from the base on `retain_data`.
        exact: gradients of `retain_data` to store in place of factors, or 0.
        keep_dtype: write the base's dtype even where that cannot hold the orthogonality.
    """

    retain: Path | None = None
    retain_data: tuple[str, ...] = ()
    protect: float = 0.7
    form: Form = Form.KRONECKER
    hold: float = 0.5
    exact: int = 0
    keep_dtype: bool = False


@dataclass(frozen=True)
class SinkOptions:
    """What the memory stream of `sinks` is.

    Attributes:
        count: neurons a block; None takes a quarter of the base's.
        active: share of them that a sequence meets; 1 shares all of them between all sequences. None takes a quarter where
            every row trains both streams, and all where rows are divided between the two.
        learns: what the memory learns. None takes repeats, and everything beside a frozen stream.
        rehearse: share of the general stream's rows that the neurons read too, so that they know what to leave alone.
        general: what the general stream may learn.
        general_rate: what the learning rate is multiplied by in the general stream.
        orthogonality: weight of the squared cosine between the streams' gradients.
        router: learn a gate for each token and block.
        router_cost: price in nats a token of a gate that is open, or, where rows are divided, of one that errs. None takes 0.01
            for the first and 1 for the second: at a hundredth gates hardly learn what is private (docs/log.md).
        seed: of the subsets and the first weights.
        memory: neurons, or tokens before the text.
        tokens: how many; None takes 16.
    """

    count: int | None = None
    active: float | None = None
    learns: Learns | None = None
    rehearse: float = 0.25
    general: General = General.TRAIN
    general_rate: float = 1.0
    orthogonality: float = 0.0
    router: bool = False
    router_cost: float | None = None
    seed: int = 0
    memory: MemoryForm = MemoryForm.NEURONS
    tokens: int | None = None

    @property
    def learnt(self) -> Learns:
        """What the memory learns, with the default filled in."""
        return self.learns or (Learns.ALL if self.general is General.FROZEN else Learns.REPEATS)

    @property
    def gate_price(self) -> float:
        """What a gate costs, with the default filled in."""
        return (0.01 if self.learnt is Learns.ALL else 1.0) if self.router_cost is None else self.router_cost


ATTACK_RANK = 16
"""Of the low-rank updates that an attack trains where all weights do not fit."""


@dataclass(frozen=True)
class LoraOptions:
    """Shape of a low-rank update.

    Attributes:
        rank: of each update.
        alpha: the update is multiplied by alpha / rank; None takes twice the rank.
        targets: ends of the names of modules; none means every linear layer but the head.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuneOptions:
    """Everything that decides what a run writes. Data are given as on the command line: FILE, FILE=WEIGHT or hub:org/name.

    Attributes:
        method: how what is private is kept apart.
        data: what is learnt.
        private_data: rows that only the memory may learn.
        eval_data: rows to look at while training.
        eval_share: share of `data` to hold out.
        seq_len: longest row, or None.
        truncate: cut longer rows.
        epochs: how often every row is read, where `loop.steps` is 0.
        ogd, sinks, lora: of the methods.
        loop: how long and how fast.
        shard_bytes: size of an output file, or None.
        memory_out: directory for what is private; None takes OUT.private.
    """

    method: TuneMethod
    data: tuple[str, ...]
    private_data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    eval_share: float = 0.0
    seq_len: int | None = None
    truncate: bool = False
    epochs: float = 1.0
    ogd: OgdOptions = field(default_factory=OgdOptions)
    sinks: SinkOptions = field(default_factory=SinkOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    shard_bytes: int | None = None
    memory_out: Path | None = None
