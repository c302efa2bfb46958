"""The command line: each command opens its inputs, calls the library once, and prints. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liborth_cli import __version__
from liborth_cli.choices import SIDES, Exactness, MethodName, Nonfinite, Part, Side
from liborth_cli.curvature_command import curvature
from liborth_cli.errors import LiborthError, UsageError
from liborth_cli.options import Common, Writing, spread
from liborth_cli.process import guard

if TYPE_CHECKING:
    from liborth_cli.methods import Amount

app = typer.Typer(
    name="liborth",
    help="Take skill and memorised text apart in the weights of a language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Out = Annotated[Path | None, typer.Option("-o", "--out", help="Directory to create.")]


@app.command()
@spread
def split(
    reference: Annotated[str, typer.Argument(help="Checkpoint before fine-tuning: path, org/name@rev or hf://org/name.")],
    finetuned: Annotated[str, typer.Argument(help="Checkpoint after fine-tuning.")],
    out: Out = None,
    method: Annotated[MethodName, typer.Option(help="How the update is divided.")] = MethodName.SVD,
    rank: Annotated[int | None, typer.Option(help="Keep K singular directions of each matrix.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of the squared norm.")] = None,
    noise_edge: Annotated[
        bool, typer.Option("--noise-edge", help="Keep what stands above the noise, matrix by matrix.")
    ] = False,
    density: Annotated[float | None, typer.Option(help="Keep this share of the elements.")] = None,
    scale: Annotated[float | None, typer.Option(help="Keep everything, times this.")] = None,
    mass: Annotated[float | None, typer.Option(help="Keep this share of the summed scores (curvature).")] = None,
    threshold: Annotated[float | None, typer.Option(help="Cut at this score.")] = None,
    strength: Annotated[float | None, typer.Option(help="contrastive: λ, how much forgetting is worth.")] = None,
    hard: Annotated[bool, typer.Option("--hard", help="contrastive: cut in place of the soft filter.")] = False,
    retain: Annotated[Path | None, typer.Option(help="Factors of data to keep good at, from `liborth curvature`.")] = None,
    forget: Annotated[Path | None, typer.Option(help="Factors of what to forget, measured at --at 0.5.")] = None,
    memory_side: Annotated[
        Side | None, typer.Option(help="Which end of the ranking is memory (low = tail, high = top); the method knows.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Factor on the skill part.")] = 1.0,
    include: Annotated[list[str] | None, typer.Option("-i", "--include-regex", help="Split only tensors that match.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("-e", "--exclude-regex", help="Leave tensors that match.")] = None,
    vectors: Annotated[Part, typer.Option(help="Where norms and biases go.")] = Part.SKILL,
    added: Annotated[Part, typer.Option(help="Where rows and tensors go that only the fine-tuned side has.")] = Part.SKILL,
    nonfinite: Annotated[Nonfinite, typer.Option(help="What to do with tensors that hold NaN or infinity.")] = Nonfinite.REFUSE,
    svd: Annotated[
        Exactness, typer.Option(help="Truncated SVD proven within 1e-4 of the best tail, or the full one.")
    ] = Exactness.CERTIFIED,
    *,
    common: Writing,
) -> None:
    """Divide a fine-tuned checkpoint into general and memory.

    Writes an ordinary checkpoint, memory.safetensors (private!), a manifest and a model card, and prints where.
    """
    amount = _amount(
        method, rank=rank, energy=energy, noise_edge=noise_edge or None, density=density, scale=scale, mass=mass,
        threshold=threshold, strength=strength,
    )  # fmt: skip
    if hard and strength is None:
        raise UsageError("--hard goes with --strength")
    amount = dataclasses.replace(amount, hard=hard)
    if not math.isfinite(alpha):
        raise UsageError("--alpha takes a finite number")
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.pair import Policy
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.checkpoint.transaction import check_output, check_space
    from liborth_cli.curvature.factors import FactorSet
    from liborth_cli.run import configure
    from liborth_cli.split import SplitOptions, Splitter
    from liborth_cli.split.table import dry_run_document, dry_run_table, report

    sources = (resolve(reference), resolve(finetuned))
    target = out or Path(
        f"{sources[1].path.resolve().name if not sources[1].repo else sources[1].repo.split('/')[1]}-{method.value}"
    )
    options = SplitOptions(
        method=method.value,
        amount=amount,
        memory_side=SIDES[memory_side] if memory_side else None,
        alpha=alpha,
        policy=Policy(tuple(include or ()), tuple(exclude or ()), vectors.value, added.value),
        nonfinite=nonfinite.value,
        tolerance=1e-4 if svd == Exactness.CERTIFIED else 0.0,
        seed=common.seed,
        out_shard_size=common.shard_bytes,
    )
    run = configure(common.device, common.threads, common.force, common.resume)
    with ExitStack() as stack:
        old, new = (stack.enter_context(Checkpoint.open(source.path)) for source in sources)
        factors = [stack.enter_context(FactorSet.open(path)) if path else None for path in (retain, forget)]
        plan = Splitter(old, new, options, *factors)
        if common.dry_run:
            common.console.result(dry_run_table(plan), dry_run_document(plan))
            return
        inputs = [*(s.path for s in sources), *filter(None, (retain, forget))]
        check_output(target, inputs, common.force)
        check_space(target, plan.disk_bytes)
        if "auto_map" in new.config:
            common.console.warn("config.json asks for the repository's own code (auto_map), which is not copied")
        manifest = plan.write(target, sources, run, common.console)
    report(manifest, run, common.console)
    common.console.result(str(target), {"output": str(target), "manifest": manifest})


@app.command()
@spread
def excise(
    model: Annotated[str, typer.Argument(help="Output of `liborth split`.")],
    beta: Annotated[
        float, typer.Option(help="How much memory: 0 none, 1 all of it (bit for bit), any number between or beyond.")
    ],
    out: Out = None,
    memory: Annotated[Path | None, typer.Option(help="Memory file or directory; MODEL's own when not given.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Factor on the skill part; needs --reference.")] = None,
    reference: Annotated[str | None, typer.Option(help="Checkpoint before fine-tuning, for --alpha.")] = None,
    *,
    common: Writing,
) -> None:
    """Write the checkpoint with as much memory as asked for.

    --beta 0 is the clean checkpoint without a memory file, --beta 1 the fine-tuned one bit for bit.
    """
    from liborth_cli.checkpoint.delta import Memory, exists
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.checkpoint.transaction import check_output, check_space
    from liborth_cli.console import size
    from liborth_cli.excise import ExciseOptions, Exciser

    source = resolve(model)
    target = out or Path(f"{source.path.resolve().name}-beta{beta:g}")
    place = memory or source.path
    with ExitStack() as stack:
        general = stack.enter_context(Checkpoint.open(source.path))
        delta = None
        if beta != 0.0 and (memory or exists(place)):
            delta = Memory(stack.enter_context(Checkpoint.open(place, stem="memory")))
        base = stack.enter_context(Checkpoint.open(resolve(reference).path)) if reference else None
        plan = Exciser(general, delta, ExciseOptions(beta, alpha, common.shard_bytes), base)
        if common.dry_run:
            files = sorted(plan.files)
            text = f"would write {len(files)} weight files, {size(plan.disk_bytes)} in all, to {target}"
            common.console.result(text, {"output": str(target), "files": files, "disk_bytes": plan.disk_bytes})
            return
        inputs = [path for path in (source.path, memory, base.path if base else None) if path]
        check_output(target, inputs, common.force)
        check_space(target, plan.disk_bytes)
        document = plan.write(target, common.console, common.force, common.resume, common.threads)
    common.console.result(str(target), {"output": str(target), "manifest": document})


app.command()(spread(curvature))


@app.command("inspect")
@spread
def inspect_command(
    path: Annotated[str, typer.Argument(help="Checkpoint, memory file, split output or manifest.")],
    finetuned: Annotated[str | None, typer.Argument(help="With it: the pair, tensor by tensor.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Read the weights: norms, ranks and noise edges.")] = False,
    *,
    common: Common,
) -> None:
    """Say what a path is: checkpoint, pair, memory or split.

    Reads headers only, unless --profile asks for norms and ranks. With -v every tensor is listed.
    """
    from liborth_cli.inspection import describe

    if profile:
        from liborth_cli.run import configure

        configure(common.device, common.threads)
    document, sections = describe(path, finetuned, profile, common.verbose)
    if common.as_json:
        common.console.result("", document)
        return
    for title, columns, rows in sections:
        common.console.table(columns, rows, title, out=True)


@app.command()
@spread
def demo(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the outputs in this directory.")] = None,
    *,
    common: Common,
) -> None:
    """Run the whole path on a real pair that ships with liborth.

    Splits it, excises at 0 and 1, and measures the loss of every model beside the controls.
    """
    from liborth_cli.demo import run_demo
    from liborth_cli.run import configure

    run = configure(common.device, common.threads)
    document = run_demo(out, run, common.console)
    if common.as_json:
        common.console.result("", document)
    if not document["bit_exact"]:
        raise LiborthError("the restored checkpoint differs from the fine-tuned one; this is a bug, please report it")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Take skill and memorised text apart in the weights of a language model."""
    if version:
        print(__version__)
        raise typer.Exit


def _amount(method: MethodName, **given: float | bool | None) -> Amount:
    """Pick the one amount that was given, and hold it against what the method understands."""
    from liborth_cli.methods import METHODS, Amount

    allowed = METHODS[method.value].amounts
    named = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise UsageError(f"{' and '.join('--' + n for n in named)} exclude each other: give one amount")
    for kind, value in named.items():
        if kind not in allowed:
            raise UsageError(f"--method {method.value} takes {' or '.join('--' + a for a in allowed)}, not --{kind}")
        return Amount(kind, None if value is True else float(value or 0))
    if allowed[0] == "noise-edge":
        return Amount("noise-edge")
    raise UsageError(f"--method {method.value} needs {' or '.join('--' + a for a in allowed)}")


def run() -> None:
    """Entry point: run the app, and turn every refusal into one line and its exit code."""
    guard(app)
