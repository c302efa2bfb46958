"""The command line: each command opens its inputs, calls the library once, and prints. Nothing heavy is imported here."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli import __version__
from liborth_cli.cli.curvature import curvature
from liborth_cli.cli.demo import demo
from liborth_cli.cli.inspect import inspect
from liborth_cli.cli.options import Grouped, Out, Writing, spread
from liborth_cli.cli.process import guard
from liborth_cli.cli.split import split
from liborth_cli.cli.tune import tune
from liborth_cli.cli.verify import verify

app = typer.Typer(
    name="liborth",
    help="Take skill and memorised text apart in the weights of a language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
    from liborth_cli.checkpoint.reader import Checkpoint
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
        check_outputs([Place(target)], [source.path, memory, base.path if base else None], common.force)
        check_space(target, plan.disk_bytes)
        document = plan.write(target, common.console, common.force, common.resume, common.threads)
    common.console.result(str(target), {"output": str(target), "manifest": document})


for function in (split, excise, curvature, verify, tune, inspect, demo):
    app.command(cls=Grouped)(spread(function))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Take skill and memorised text apart in the weights of a language model."""
    if version:
        print(__version__)
        raise typer.Exit


def run() -> None:
    """Entry point: run the app, and turn every refusal into one line and its exit code."""
    guard(app)
