"""The command line: each command opens its inputs, calls the library once, and prints. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated

import typer

from liborth_cli import __version__
from liborth_cli.cli.curvature import curvature
from liborth_cli.cli.demo import demo
from liborth_cli.cli.excise import excise
from liborth_cli.cli.inspect import inspect
from liborth_cli.cli.options import Grouped, spread
from liborth_cli.cli.process import guard
from liborth_cli.cli.split import split
from liborth_cli.cli.tune import tune
from liborth_cli.cli.verify import VerifyCommand, verify

app = typer.Typer(
    name="liborth",
    help="Take skill and memorised text apart in the weights of a language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


for function in (split, excise, curvature, verify, tune, inspect, demo):
    app.command(cls=VerifyCommand if function is verify else Grouped)(spread(function))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Take skill and memorised text apart in the weights of a language model."""
    if version:
        print(__version__)
        raise typer.Exit


def run() -> None:
    """Entry point: run the app, and turn every refusal into one line and its exit code."""
    guard(app)
