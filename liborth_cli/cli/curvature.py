"""The options of `liborth curvature`: there are many, and they are its alone."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.options import Computing, Out, Weights
from liborth_cli.errors import UsageError


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


def curvature(
    model: Annotated[
        list[str], typer.Argument(help="Checkpoint: path, org/name@rev or hf://org/name. With --merge: factor sets.")
    ],
    out: Out = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSON lines, table or token file; FILE=2 counts it twice; hub:org/name."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Read so many tokens at most.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Longest row; 1024 or the context.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut rows that are longer.")] = False,
    fisher: Annotated[Fisher, typer.Option(help="Labels: drawn from the model, the real ones, or all.")] = Fisher.SAMPLED,
    moments: Annotated[
        Moments, typer.Option(help="Corrected eigenvalues: in the same pass, or exactly in a second.")
    ] = Moments.NONE,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Also the diagonal Fisher.")] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Inputs and gradients of every token in place of A and G, for tokenwise.")
    ] = False,
    eigen: Annotated[bool, typer.Option("--eigen", help="Also the eigenbases.")] = False,
    at: Annotated[float, typer.Option(help="Point on the path from --reference (0) to MODEL (1).")] = 1.0,
    reference: Annotated[str | None, typer.Option(help="Checkpoint before fine-tuning, for --at.")] = None,
    tensors: Annotated[list[str] | None, typer.Option(help="Only matrices whose name matches this regex.")] = None,
    per_head: Annotated[
        bool,
        typer.Option(
            "--per-head", help="G of q, k and v for each attention head by itself, not of q and k through their product."
        ),
    ] = False,
    full_head: Annotated[bool, typer.Option("--full-head", help="All of the head's G, vocabulary squared.")] = False,
    exact_vocabulary: Annotated[int, typer.Option(min=2, help="Largest vocabulary --fisher exact accepts.")] = 512,
    dtype: Annotated[Arithmetic, typer.Option(help="Of products with weights; sums, and all between, are float32.")] = (
        Arithmetic.FLOAT32
    ),
    memory: Annotated[str | None, typer.Option(help="For example 8GiB; half of what is free.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Keep block inputs in a file in this directory.")] = None,
    weights: Annotated[Weights, typer.Option(help="One block at a time, or all.")] = Weights.AUTO,
    group_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that go through the model together.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add factor sets up in place of estimating.")] = False,
    *,
    common: Computing,
) -> None:
    """Estimate K-FAC factors of every linear layer, with one block of weights in memory at a time.

    Writes A = E[aaᵀ] and G = E[ggᵀ] of every matrix, with a manifest, and prints where.
    """
    from liborth_cli.checkpoint.layout import parse_size
    from liborth_cli.curvature import command
    from liborth_cli.curvature.plan import CurvatureOptions, Resources
    from liborth_cli.machine import available_bytes, configure

    run = configure(common.device, common.threads, common.force, common.resume, common.kernels.value)
    if run.note:
        common.console.note(run.note)
    if merge:
        command.merge_sets(model, out or Path("merged-factors"), eigen, run, common.console)
        return
    if len(model) > 1:
        raise UsageError("one MODEL at a time; to add factor sets up, say --merge")
    if not data:
        raise UsageError("--data is missing: which texts is the curvature taken on?")
    options = CurvatureOptions(
        fisher.value, moments.value, diagonal, per_token, per_head, full_head, tuple(tensors or ()), at, tokens, seq_len,
        truncate, common.seed, eigen, dtype.value, group_tokens, exact_vocabulary,
    )  # fmt: skip
    limit = parse_size(memory) if memory else available_bytes()
    target = out or Path(f"{model[0].rstrip('/').rpartition('/')[2]}-factors")
    resources = Resources(limit, scratch, weights.value)
    request = command.Request(model[0], tuple(data), reference, target, common.dry_run)
    command.curvature(request, options, resources, run, common.console)
