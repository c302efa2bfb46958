"""The options of `liborth tune`: what is learnt, how it is kept apart, and how long."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.options import Out, Writing
from liborth_cli.errors import UsageError

HOLD, REHEARSE = 0.5, 0.25
"""What --hold and --rehearse are when they are not given (decisions 0030 and 0031)."""


class TuneMethod(StrEnum):
    """How the two are kept apart."""

    OGD = "ogd"
    SINKS = "sinks"
    FULL = "full"
    LORA = "lora"


class Form(StrEnum):
    """Which projection."""

    KRONECKER = "kronecker"
    INPUT = "input"


class Learns(StrEnum):
    """What the memory learns."""

    REPEATS = "repeats"
    PRIVATE = "private"
    ALL = "all"


class General(StrEnum):
    """What the general stream may learn."""

    TRAIN = "train"
    LORA = "lora"
    FROZEN = "frozen"


class Schedule(StrEnum):
    """How the learning rate goes after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Arithmetic(StrEnum):
    """What the model computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def tune(
    base: Annotated[str, typer.Argument(help="Checkpoint to start from: path, org/name@rev or hf://org/name.")],
    data: Annotated[list[str], typer.Option(help="What is learnt: text, JSON lines, table, tokens; FILE=2 counts twice.")],
    method: Annotated[
        TuneMethod, typer.Option(help="Updates orthogonal to the general ones, extra neurons, or plain training.")
    ],
    out: Out = None,
    retain: Annotated[Path | None, typer.Option(help="ogd: factors of BASE on public text, from `liborth curvature`.")] = None,
    retain_data: Annotated[list[str] | None, typer.Option(help="ogd: public text; the factors are measured for you.")] = None,
    protect: Annotated[float, typer.Option(min=0.0, max=1.0, help="ogd: share of the mass of A and of G to protect.")] = 0.7,
    form: Annotated[Form, typer.Option(help="ogd: protect what is general on both sides, or every general input.")] = (
        Form.KRONECKER
    ),
    hold: Annotated[float | None, typer.Option(help="ogd: weight of what BASE says about --retain-data; 0.5.")] = None,
    exact: Annotated[int, typer.Option(min=0, help="ogd: store K gradients of --retain-data in place of factors.")] = 0,
    keep_dtype: Annotated[bool, typer.Option("--keep-dtype", help="ogd: write BASE's dtype, not float32.")] = False,
    sinks: Annotated[int | None, typer.Option(min=1, help="sinks: neurons a block; a quarter of BASE's.")] = None,
    active: Annotated[float | None, typer.Option(help="sinks: share of them that one sequence meets.")] = None,
    private_data: Annotated[list[str] | None, typer.Option(help="sinks: rows that only the neurons learn.")] = None,
    memory_learns: Annotated[Learns | None, typer.Option(help="sinks: private rows, repeated ones too, or everything.")] = None,
    rehearse: Annotated[float | None, typer.Option(help="sinks: share of other rows the neurons read too; 0.25.")] = None,
    general: Annotated[General, typer.Option(help="sinks: what the general stream may learn.")] = General.TRAIN,
    general_rate: Annotated[float, typer.Option(min=0.0, help="sinks: learning rate of the general stream, times --lr.")] = 1.0,
    orthogonality: Annotated[float, typer.Option(min=0.0, help="sinks: weight of the streams' squared gradient cosine.")] = 0.0,
    router: Annotated[bool, typer.Option("--router", help="sinks: learn a gate a token; see docs/tune.md.")] = False,
    router_cost: Annotated[
        float | None,
        typer.Option(min=0.0, help="sinks: price of a gate that errs (1), or with --memory-learns all is open (0.01)."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="lora: rank.")] = 8,
    lora_alpha: Annotated[float | None, typer.Option(help="lora: updates count alpha / rank; twice the rank.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="lora: names of layers; all linear ones but the head.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps; 0 goes by --epochs.")] = 0,
    epochs: Annotated[float, typer.Option(min=0.0, help="How often every row is read.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows computed together.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches that make one step.")] = 1,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4,
    schedule: Annotated[Schedule, typer.Option(help="Learning rate after the warm-up.")] = Schedule.COSINE,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps with a rising rate.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of AdamW, towards zero.")] = 0.0,
    clip: Annotated[float, typer.Option(min=0.0, help="Largest gradient norm; 0: any.")] = 1.0,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Longest row; 1024 or the context.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut rows that are longer.")] = False,
    eval_data: Annotated[list[str] | None, typer.Option(help="Rows to look at while training.")] = None,
    eval_share: Annotated[float, typer.Option(min=0.0, help="Hold out this share of --data.")] = 0.0,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between two looks; 0: at both ends.")] = 0,
    patience: Annotated[int, typer.Option(min=0, help="Stop after so many looks without gain; keep the best. 0: never.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two saved states, for --resume.")] = 200,
    dtype: Annotated[Arithmetic, typer.Option(help="Arithmetic; weights and optimiser are float32.")] = Arithmetic.FLOAT32,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice in place of keeping them.")
    ] = False,
    *,
    common: Writing,
) -> None:
    """Fine-tune so that what is private lies apart from what is general.

    Writes a checkpoint, a memory file (private!) where something is kept apart, loss curves and a manifest; prints where.
    """
    _refuse_strangers(method.value, {
        "ogd": {"--retain": retain, "--retain-data": retain_data, "--exact": exact, "--keep-dtype": keep_dtype, "--hold": hold},
        "sinks": {
            "--private-data": private_data, "--memory-learns": memory_learns, "--active": active, "--sinks": sinks,
            "--rehearse": rehearse, "--orthogonality": orthogonality, "--router": router,
            "--router-cost": router_cost,
        },
        "lora": {"--lora-alpha": lora_alpha, "--targets": targets},
    })  # fmt: skip
    hold, rehearse = HOLD if hold is None else hold, REHEARSE if rehearse is None else rehearse
    if not 0.0 < (1.0 if active is None else active) <= 1.0 or not 0.0 <= rehearse <= 1.0:
        raise UsageError("--active is in (0, 1], and --rehearse in [0, 1]")
    if not 0.0 < lr < float("inf") or not 0.0 <= eval_share < 1.0 or not 0.0 <= hold < float("inf"):
        raise UsageError("--lr is positive, --hold is not negative, --eval-share is in [0, 1)")
    from liborth_cli.machine import configure
    from liborth_cli.tune import command
    from liborth_cli.tune.dual import SinkOptions
    from liborth_cli.tune.loop import LoopOptions
    from liborth_cli.tune.lora import LoraOptions

    run = configure(common.device, common.threads, common.force, common.resume)
    target = out or Path(f"{base.rstrip('/').rpartition('/')[2]}-{method.value}")
    asked = command.Request(
        base, tuple(data), target, method.value, tuple(private_data or ()), tuple(eval_data or ()), eval_share, seq_len,
        truncate, epochs, retain, tuple(retain_data or ()), protect, form.value, hold, exact, keep_dtype,
        SinkOptions(
            sinks, active, memory_learns and memory_learns.value, rehearse, general.value, general_rate, orthogonality,
            router, router_cost, common.seed,
        ),
        LoraOptions(rank, lora_alpha, tuple(targets or ())), common.shard_bytes, common.dry_run,
    )  # fmt: skip
    loop = LoopOptions(
        steps, batch_size, accumulate, lr, schedule.value, warmup, weight_decay, clip, eval_every, patience, save_every,
        common.seed, dtype.value, gradient_checkpointing,
    )  # fmt: skip
    command.tune(asked, loop, run, common.console)


def _refuse_strangers(method: str, options: dict[str, dict[str, object]]) -> None:
    """Refuse options of another method than the one that was chosen."""
    for owner, given in options.items():
        for name, value in given.items():
            if value not in (None, False, 0, []) and owner != method and not (owner == "lora" and method == "sinks"):
                raise UsageError(f"{name} goes with --method {owner}")
