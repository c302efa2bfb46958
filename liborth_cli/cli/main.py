"""The command line: each command opens its inputs, calls the library once, and prints. Nothing heavy is imported here.

A command's module is imported when the command is asked for: all of them take a tenth of a second of every start.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any

import typer

from liborth_cli import __version__
from liborth_cli.cli.command import Command
from liborth_cli.cli.options import spread
from liborth_cli.cli.process import guard
from liborth_cli.errors import UsageError
from liborth_cli.ranks import World

EVERY = {
    "clean": "Remove private text from a fine-tune, and attack what is left.",
    "split": "Divide a fine-tuned checkpoint into general and memory.",
    "excise": "Write the checkpoint with as much memory as asked for.",
    "curvature": "Estimate K-FAC factors of every linear layer, block by block.",
    "verify": "Measure a split beside its controls, attack it, and decide.",
    "extract": "Find memorised text that nobody listed.",
    "generate": "Write on from prompts, with or without the memory.",
    "tune": "Fine-tune so that what is private lies apart.",
    "export": "Write what other tools read: the skill or the memory by itself.",
    "push": "Upload a general checkpoint to the Hugging Face hub.",
    "inspect": "Say what a path is: checkpoint, pair, memory or split.",
    "replay": "Do the run of a manifest again, and hold the result against it.",
    "demo": "Remove eight secrets from a real model that ships with liborth.",
    "doctor": "Say what this machine has, and what each command could do here.",
}
"""Commands, each by the name of its module, and what `--help` says of it, as the module does."""


ALONE = (["--version"], ["--help"], ["-h"])
"""Words that are about no command; none at all may be a shell that asks how to complete some."""


class _Commands(Mapping[str, Command]):
    """Name → command, imported when it is looked up."""

    def __getitem__(self, name: str) -> Command:
        if name not in EVERY:
            raise KeyError(name)
        return import_module(f"liborth_cli.cli.{name}").COMMAND

    def __iter__(self) -> Iterator[str]:
        return iter(EVERY)

    def __len__(self) -> int:
        return len(EVERY)


COMMANDS: Mapping[str, Command] = _Commands()


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


def of_commands(names: Iterable[str], listed: Mapping[str, str] = MappingProxyType({})) -> typer.Typer:
    """Return an app of these commands, and of others that are listed in its help and no more."""
    made = typer.Typer(
        name="liborth",
        help=root.__doc__,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    made.callback(invoke_without_command=True)(root)
    for command in map(COMMANDS.__getitem__, names):
        made.command(cls=command.kind, epilog=command.epilog)(spread(command.function))
    for name, summary in listed.items():
        made.command(name, help=summary)(_nothing)
    return made


def _nothing() -> None:
    """Stand for a command that is not asked for."""


def __getattr__(name: str) -> typer.Typer:
    """Return `app`, all commands together, for programs that start them from Python."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = made = of_commands(EVERY)
    return made


@functools.cache
def group(names: tuple[str, ...] = tuple(EVERY)) -> Any:
    """Return commands as they are parsed, put together once; where there are none, all are listed."""
    return typer.main.get_command(of_commands(names, {} if names else EVERY))


def needed(words: Sequence[str]) -> tuple[str, ...]:
    """Return the commands that words can be about: the one they begin with, none where they are `ALONE`, otherwise all."""
    return () if [*words] in ALONE else (words[0],) if words and words[0] in EVERY else tuple(EVERY)


def run() -> None:
    """Entry point: run the app, and turn every refusal into one line and its exit code."""
    asked = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None

    def together() -> object:
        with World.join() as world:
            if world.size > 1 and asked and not asked.ranks:
                able = [name for name, command in COMMANDS.items() if command.ranks]
                raise UsageError(f"torchrun is for {', '.join(able[:-1])} and {able[-1]}: {asked.name} runs as one process")
            return group(needed(sys.argv[1:]))(prog_name="liborth", standalone_mode=False, obj=world)

    guard(together, asked)
