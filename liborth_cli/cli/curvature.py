"""`liborth curvature`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Computing, Out, Residency, Texts, named_after, running, under
from liborth_cli.cli.options import data as text
from liborth_cli.curvature.plan import Arithmetic, CurvatureOptions, Fisher, Moments, Resources
from liborth_cli.errors import UsageError

measured = under("What is measured")

if TYPE_CHECKING:
    import torch

    from liborth_cli.console import Console
    from liborth_cli.curvature.planned import Outline
    from liborth_cli.manifest import Curvature


def curvature(
    model: Annotated[
        list[str], typer.Argument(help="Checkpoint: path, org/name@rev or hf://org/name. With --merge: factor sets.")
    ],
    out: Out = None,
    data: Annotated[
        Texts,
        text(help="Text, JSON lines, table or token file; FILE=2 counts it twice; hub:org/name."),
    ] = None,
    private: Annotated[
        bool, text("--private", help="The data is to be forgotten: a line of a text is a row; no hash of it is kept.")
    ] = False,
    tokens: Annotated[int | None, text(min=1, show_default="all", help="Read so many tokens at most.")] = None,
    seq_len: Annotated[int | None, text(min=1, show_default="1024 or the context", help="Longest row.")] = None,
    truncate: Annotated[bool, text("--truncate", help="Cut rows that are longer.")] = False,
    fisher: Annotated[Fisher, measured(help="Labels: drawn from the model, the real ones, or all.")] = Fisher.SAMPLED,
    moments: Annotated[
        Moments, measured(help="Corrected eigenvalues: in the same pass, or exactly in a second.")
    ] = Moments.NONE,
    diagonal: Annotated[bool, measured("--diagonal", help="Also the diagonal Fisher.")] = False,
    per_token: Annotated[
        bool, measured("--per-token", help="Inputs and gradients of every token in place of A and G, for tokenwise.")
    ] = False,
    eigen: Annotated[bool, measured("--eigen", help="Also the eigenbases.")] = False,
    at: Annotated[float, measured(help="Point on the path from --reference (0) to MODEL (1).")] = 1.0,
    reference: Annotated[str | None, measured(help="Checkpoint before fine-tuning, for --at.")] = None,
    tensors: Annotated[
        list[str] | None, measured(show_default="all", help="Only matrices whose name matches this regex.")
    ] = None,
    per_head: Annotated[
        bool,
        measured("--per-head", help="G of q, k and v for each attention head by itself, not of q and k through their product."),
    ] = False,
    full_head: Annotated[bool, measured("--full-head", help="All of the head's G, vocabulary squared.")] = False,
    exact_vocabulary: Annotated[int, measured(min=2, help="Largest vocabulary --fisher exact accepts.")] = 512,
    dtype: Annotated[Arithmetic, running(help="Of products with weights; sums, and all between, are float32.")] = (
        Arithmetic.FLOAT32
    ),
    memory: Annotated[str | None, running(show_default="half of what is free", help="For example 8GiB.")] = None,
    scratch: Annotated[
        Path | None, running(show_default="in memory", help="Keep block inputs in a file in this directory.")
    ] = None,
    weights: Annotated[Residency, running(help="One block at a time, or all.")] = Residency.AUTO,
    group_tokens: Annotated[
        int | None, running(min=1, show_default="what fits", help="Tokens that go through the model together.")
    ] = None,
    merge: Annotated[bool, measured("--merge", help="Add factor sets up in place of estimating.")] = False,
    *,
    common: Computing,
) -> None:
    """Estimate K-FAC factors of every linear layer, block by block.

    Writes A = E[aaᵀ] and G = E[ggᵀ] of every matrix, with a manifest, and prints where.
    """
    from liborth_cli.checkpoint.layout import parse_size
    from liborth_cli.curvature.estimate import CurvatureRequest, estimate
    from liborth_cli.curvature.planned import Outline
    from liborth_cli.machine import available_bytes

    console = common.console
    run = common.run
    if run.note:
        console.note(run.note)
    if merge:
        from liborth_cli.curvature.merge import merge as merged

        target = out or Path("merged-factors")
        _report(target, merged([Path(path).expanduser() for path in model], target, eigen, run, console), console)
        return
    if len(model) > 1:
        raise UsageError("one MODEL at a time; to add factor sets up, say --merge")
    if not data:
        raise UsageError("--data is missing: which texts is the curvature taken on?")
    options = CurvatureOptions(
        fisher=fisher.value, moments=moments.value, diagonal=diagonal, per_token=per_token, per_head=per_head,
        full_head=full_head, tensors=tuple(tensors or ()), at=at, tokens=tokens, seq_len=seq_len, truncate=truncate,
        seed=common.seed, eigen=eigen, dtype=dtype.value, group_tokens=group_tokens, exact_vocabulary=exact_vocabulary,
    )  # fmt: skip
    resources = Resources(parse_size(memory) if memory else available_bytes() // common.world.siblings, scratch, weights.value)
    target = out or Path(f"{named_after(model[0])}-factors")
    request = CurvatureRequest(
        model=model[0], data=tuple(data), out=target, options=options, resources=resources, reference=reference,
        secret=private, dry_run=common.dry_run,
    )  # fmt: skip
    found = estimate(request, run, console)
    if isinstance(found, Outline):
        console.result(*_plan(found, run.device, options.dtype))
    elif found is not None:
        _report(target, found, console)


def _plan(found: Outline, device: torch.device, dtype: str) -> tuple[str, dict[str, Any]]:
    from dataclasses import asdict

    from liborth_cli.console import duration, size
    from liborth_cli.stream.work import said

    how = "with all weights in memory" if found.plan.resident else "one block of weights at a time"
    state = f"; for --resume at most {size(found.state_bytes)} more while it runs, where the disk has room"
    text = (
        f"would read {found.rows:,} rows with {found.tokens:,} tokens in {found.groups} groups, {how}, "
        f"and write factors of {found.matrices} matrices, at most {size(found.disk_bytes)}"
        f"{state * (found.state_bytes > 0)}; it needs about {size(found.memory_bytes)} of memory "
        f"and {duration(found.seconds)}, {said(device, dtype)}"
    )
    return text, asdict(found)


def _report(out: Path, found: Curvature, console: Console) -> None:
    """Say what was computed and what was left out, and print where it is."""
    totals = found.totals
    console.note(
        f"{len(found.layers)} matrices, {totals.tokens:,.0f} tokens, mean loss {totals.loss or 0.0:.3f} nats over "
        f"{totals.loss_tokens:,.0f} predictions"
    )
    for name, layer in found.layers.items():
        if layer.kind == "embedding":
            console.note(f"{name}: an embedding; A is the diagonal of token frequencies")
        elif layer.kind == "head":
            console.note(f"{name}: the head; only the diagonal of G is kept (--full-head keeps all of it)")
    reasons: dict[str, list[str]] = {}
    for name, why in found.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in sorted(reasons.items()):
        console.note(f"left out, {why}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")
    if found.private:
        console.note(f"{out} is PRIVATE: it tells of single rows; only you can read it, keep it so and publish it nowhere")
    console.result(str(out), {"output": str(out), "manifest": found.document})


COMMAND = Command(
    curvature,
    (
        "# what must stay, at the fine-tuned model",
        "liborth curvature finetuned/ --data public.jsonl -o retain/",
        "# what must go, half way between the two checkpoints",
        "liborth curvature finetuned/ --reference base/ --at 0.5 --fisher empirical --per-token --private \\",
        "    --data secrets.jsonl -o forget/",
        "liborth split base/ finetuned/ --retain retain/ --forget forget/ -o general/",
        "# how long, and how much memory",
        "liborth curvature finetuned/ --data public.jsonl --dry-run",
    ),
    "the state of the walk is kept",
    ranks=True,
)
