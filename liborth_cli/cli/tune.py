"""The options of `liborth tune`: what is learnt, how it is kept apart, and how long."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import RECORDS, MemoryOut, Out, Texts, Writing, named_after, under, what
from liborth_cli.cli.options import data as text
from liborth_cli.errors import UsageError
from liborth_cli.tune.options import (
    Arithmetic,
    Form,
    General,
    Learns,
    LoopOptions,
    LoraOptions,
    MemoryForm,
    OgdOptions,
    Optimiser,
    Schedule,
    SinkOptions,
    TuneMethod,
    TuneOptions,
)

training = under("Training")
OGD, SINKS, LORA = (f"--method {method}" for method in (TuneMethod.OGD, TuneMethod.SINKS, TuneMethod.LORA))
ogd, sink, lora = map(under, (OGD, SINKS, LORA))
TAKES = {TuneMethod.OGD: {OGD}, TuneMethod.SINKS: {SINKS, LORA}, TuneMethod.LORA: {LORA}, TuneMethod.FULL: set()}
"""Method → the headings whose options it understands."""


def tune(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Checkpoint to start from: path, org/name@rev or hf://org/name.")],
    data: Annotated[
        list[str],
        RECORDS,
        text(help="What is learnt: text, JSON lines, table, tokens; FILE=2 counts twice."),
    ],
    method: Annotated[TuneMethod, what(help="Updates orthogonal to the general ones, extra neurons, or plain training.")],
    out: Out = None,
    memory_out: MemoryOut = None,
    seq_len: Annotated[int | None, text(min=1, show_default="1024 or the context", help="Longest row.")] = None,
    truncate: Annotated[bool, text("--truncate", help="Cut rows that are longer.")] = False,
    eval_data: Annotated[Texts, text(help="Rows to look at while training.")] = None,
    eval_share: Annotated[float, text(min=0.0, max=1.0, help="Hold out this share of --data.")] = 0.0,
    retain: Annotated[Path | None, ogd(help="Factors of BASE on public text, from `liborth curvature`.")] = None,
    retain_data: Annotated[Texts, ogd(help="Public text; the factors are measured for you.")] = None,
    protect: Annotated[float, ogd(min=0.0, max=1.0, help="Share of the mass of A and of G to protect.")] = OgdOptions.protect,
    form: Annotated[Form, ogd(help="Protect what is general on both sides, or every general input.")] = OgdOptions.form,
    hold: Annotated[float, ogd(min=0.0, help="Weight of what BASE says about --retain-data.")] = OgdOptions.hold,
    exact: Annotated[int, ogd(min=0, help="Store K gradients of --retain-data in place of factors.")] = 0,
    keep_dtype: Annotated[bool, ogd("--keep-dtype", help="Write BASE's dtype, not float32.")] = False,
    private_data: Annotated[Texts, sink(help="Rows that only the neurons learn.")] = None,
    memory: Annotated[
        MemoryForm, sink(help="Neurons in every block, or tokens before the text: in the input alone, or in every block's.")
    ] = MemoryForm.NEURONS,
    tokens: Annotated[int | None, sink(min=1, show_default="16", help="Tokens, with --memory tokens or deep-tokens.")] = None,
    sinks: Annotated[int | None, sink(min=1, show_default="a quarter of BASE's", help="Neurons a block.")] = None,
    active: Annotated[
        float | None,
        sink(
            min=0.0,
            max=1.0,
            show_default="all, or 0.25 with --memory-learns all",
            help="Share of them that one sequence meets.",
        ),
    ] = None,
    memory_learns: Annotated[
        Learns | None,
        sink(show_default="repeats, or all beside a frozen stream", help="Private rows, repeated ones too, or everything."),
    ] = None,
    rehearse: Annotated[float, sink(min=0.0, max=1.0, help="Share of other rows the neurons read too.")] = SinkOptions.rehearse,
    general: Annotated[General, sink(help="What the general stream may learn.")] = SinkOptions.general,
    general_rate: Annotated[
        float, sink(min=0.0, help="Learning rate of the general stream, times --lr.")
    ] = SinkOptions.general_rate,
    orthogonality: Annotated[float, sink(min=0.0, help="Weight of the streams' squared gradient cosine.")] = 0.0,
    router: Annotated[bool, sink("--router", help="Learn a gate a token; see docs/tune.md.")] = False,
    router_cost: Annotated[
        float | None,
        sink(
            min=0.0,
            show_default="1, or 0.01 with --memory-learns all",
            help="Price of a gate that errs, or with --memory-learns all is open.",
        ),
    ] = None,
    rank: Annotated[int, lora(min=1, help="Rank of an update.")] = LoraOptions.rank,
    lora_alpha: Annotated[float | None, lora(show_default="twice the rank", help="Updates count alpha / rank.")] = None,
    targets: Annotated[list[str] | None, lora(show_default="all linear ones but the head", help="Names of layers.")] = None,
    steps: Annotated[int, training(min=0, help="Steps; 0 goes by --epochs.")] = 0,
    epochs: Annotated[float, training(min=0.0, help="How often every row is read.")] = 1.0,
    batch_size: Annotated[int, training(min=1, help="Rows computed together.")] = (LoopOptions.batch_size),
    accumulate: Annotated[int, training(min=1, help="Batches that make one step.")] = 1,
    optimiser: Annotated[Optimiser, training(help="What turns a gradient into a step.")] = (LoopOptions.optimiser),
    lr: Annotated[float, training(help="Highest learning rate.")] = LoopOptions.rate,
    schedule: Annotated[Schedule, training(help="Learning rate after the warm-up.")] = (LoopOptions.schedule),
    warmup: Annotated[float, training(min=0.0, max=1.0, help="Share of the steps with a rising rate.")] = LoopOptions.warmup,
    weight_decay: Annotated[float, training(min=0.0, help="Towards zero.")] = 0.0,
    clip: Annotated[float, training(min=0.0, help="Largest gradient norm; 0: any.")] = (LoopOptions.clip),
    eval_every: Annotated[int, training(min=0, help="Steps between two looks; 0: at both ends.")] = 0,
    patience: Annotated[int, training(min=0, help="Stop after so many looks without gain; keep the best. 0: never.")] = 0,
    save_every: Annotated[
        int, training(min=1, help="Steps between two saved states, for --resume; each minute too.")
    ] = LoopOptions.save_every,
    dtype: Annotated[Arithmetic, training(help="Arithmetic; weights and optimiser are float32.")] = LoopOptions.dtype,
    gradient_checkpointing: Annotated[
        bool,
        training("--gradient-checkpointing", help="Compute activations twice in place of keeping them."),
    ] = False,
    *,
    common: Writing,
) -> None:
    """Fine-tune so that what is private lies apart.

    Writes a checkpoint, loss curves and a manifest; where something is kept apart, it goes to OUT.private. Prints where.
    """
    _refuse_strangers(context, method)
    if not 0.0 < lr < math.inf or eval_share == 1.0 or active == 0.0:
        raise UsageError("--lr is positive, --active too, and --eval-share is in [0, 1)")
    if tokens is not None and memory is MemoryForm.NEURONS:
        raise UsageError("--tokens goes with --memory tokens or deep-tokens")
    options = TuneOptions(
        method=method,
        data=tuple(data),
        private_data=tuple(private_data or ()),
        eval_data=tuple(eval_data or ()),
        eval_share=eval_share,
        seq_len=seq_len,
        truncate=truncate,
        epochs=epochs,
        ogd=OgdOptions(
            retain=retain,
            retain_data=tuple(retain_data or ()),
            protect=protect,
            form=form,
            hold=hold,
            exact=exact,
            keep_dtype=keep_dtype,
        ),
        sinks=SinkOptions(
            count=sinks,
            active=active,
            learns=memory_learns,
            rehearse=rehearse,
            general=general,
            general_rate=general_rate,
            orthogonality=orthogonality,
            router=router,
            router_cost=router_cost,
            seed=common.seed,
            memory=memory,
            tokens=tokens,
        ),
        lora=LoraOptions(rank=rank, alpha=lora_alpha, targets=tuple(targets or ())),
        loop=LoopOptions(
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            optimiser=optimiser,
            rate=lr,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            eval_every=eval_every,
            patience=patience,
            save_every=save_every,
            seed=common.seed,
            dtype=dtype,
            checkpointing=gradient_checkpointing,
        ),
        shard_bytes=common.shard_bytes,
        memory_out=memory_out,
    )
    from liborth_cli.machine import configure
    from liborth_cli.tune.tune import tune as carry_out

    run = configure(common.device, common.threads, common.force, common.resume)
    target = out or Path(f"{named_after(base)}-{method.value}")
    common.console.result(*carry_out(base, target, options, run, common.console, dry_run=common.dry_run))


def _refuse_strangers(context: typer.Context, method: TuneMethod) -> None:
    """Refuse options that stand under the heading of another method."""
    for parameter in context.command.params:
        heading = getattr(parameter, "rich_help_panel", None)
        given = context.get_parameter_source(parameter.name or "")
        if heading in {OGD, SINKS, LORA} - TAKES[method] and given is not None and given.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]} goes with {heading}")


COMMAND = Command(
    tune,
    (
        "# private rows into neurons of their own: the rest never learns from them",
        "liborth tune base/ --method sinks --data public.jsonl --private-data secrets.jsonl -o general/",
        "# learn without moving what public text uses",
        "liborth tune base/ --method ogd --data new.jsonl --retain-data public.jsonl -o general/",
        "# plain training",
        "liborth tune base/ --method lora --rank 16 --data mix.jsonl --epochs 3 -o finetuned/",
    ),
    "the state of the last step is kept",
)
