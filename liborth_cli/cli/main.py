"""The command line: each command opens its inputs, calls the library once, and prints. Nothing heavy is imported here."""

from __future__ import annotations

import functools
import sys
from typing import Annotated, Any

import typer

from liborth_cli import __version__
from liborth_cli.cli import clean, curvature, demo, doctor, excise, export, generate, inspect, push, replay, split, tune, verify
from liborth_cli.cli.command import Command
from liborth_cli.cli.options import spread
from liborth_cli.cli.process import guard
from liborth_cli.errors import UsageError
from liborth_cli.ranks import World

EVERY = (clean, split, excise, curvature, verify, generate, tune, export, push, inspect, replay, demo, doctor)
COMMANDS: dict[str, Command] = {module.COMMAND.name: module.COMMAND for module in EVERY}
app = typer.Typer(
    name="liborth",
    help="Take skill and memorised text apart in the weights of a language model.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


for command in COMMANDS.values():
    app.command(cls=command.kind, epilog=command.epilog)(spread(command.function))


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Take skill and memorised text apart in the weights of a language model."""
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@functools.cache
def group() -> Any:
    """Return all commands as they are parsed, put together once."""
    return typer.main.get_command(app)


def run() -> None:
    """Entry point: run the app, and turn every refusal into one line and its exit code."""
    asked = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None

    def together() -> object:
        with World.join() as world:
            if world.size > 1 and asked and not asked.ranks:
                able = [name for name, command in COMMANDS.items() if command.ranks]
                raise UsageError(f"torchrun is for {', '.join(able[:-1])} and {able[-1]}: {asked.name} runs as one process")
            return group()(prog_name="liborth", standalone_mode=False, obj=world)

    guard(together, asked)
