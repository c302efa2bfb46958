"""A command carried out from its words, as if they had been typed: what commands do that are made of others."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import spread
from liborth_cli.console import Console


def carry_out(command: Command, words: Sequence[str], quiet: bool = False, listener: Console | None = None) -> str:
    """Carry a command out; what it prints goes to stderr, for stdout is the result of the whole.

    Args:
        command: which.
        words: what is typed after its name.
        quiet: let nothing be heard of what it prints.
        listener: who is told in place of the terminal.

    Returns:
        What it printed, where nobody heard it.

    Raises:
        LiborthError: as the command.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(command.name, cls=command.kind, epilog=command.epilog)(spread(command.function))
    run = typer.main.get_command(app)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed if quiet else sys.stderr):
        run(list(words), prog_name=f"liborth {command.name}", standalone_mode=False, obj=listener)
    return printed.getvalue()
