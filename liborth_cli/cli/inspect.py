"""The options of `liborth inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, what
from liborth_cli.errors import UsageError, VerificationFailed


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint, memory, factor set, output of a command, or manifest.")],
    finetuned: Annotated[str | None, typer.Argument(help="With it: the pair, tensor by tensor.")] = None,
    diff: Annotated[
        bool, what("--diff", help="Compare two checkpoints, tensor by tensor: exit code 0 when they are the same, else 5.")
    ] = False,
    profile: Annotated[bool, what("--profile", help="Read the weights: norms, ranks and noise edges.")] = False,
    *,
    common: Common,
) -> None:
    """Say what a path is: checkpoint, pair, memory or split.

    Reads headers only, unless --profile asks for norms and ranks, or --diff for what is not the same. With -v every tensor is
    listed.
    """
    from liborth_cli.inspect import describe

    if diff:
        _compare(path, finetuned, profile, common)
        return
    if profile:
        from liborth_cli.machine import configure

        configure(common.device, common.threads)
    document, tables = describe(path, finetuned, profile, common.verbose)
    if common.as_json:
        common.console.result("", document)
        return
    for table in tables:
        common.console.table(table.columns, table.rows, table.title, out=True)


def _compare(first: str, second: str | None, profile: bool, common: Common) -> None:
    """Print how two checkpoints differ, and exit with what was found."""
    if second is None or profile:
        raise UsageError(
            "--diff compares two checkpoints: liborth inspect --diff A B" + (", without --profile" if profile else "")
        )
    from liborth_cli.compare import describe

    same, document, tables = describe(first, second, common.verbose)
    if common.as_json:
        common.console.result("", document)
    for table in () if common.as_json else tables:
        common.console.table(table.columns, table.rows, table.title, out=True)
    if not same:
        raise typer.Exit(VerificationFailed.exit_code)


COMMAND = Command(
    inspect,
    (
        "# what is this directory, and what was done to it?",
        "liborth inspect general/",
        "# are these two the same, to the bit? And where not?",
        "liborth inspect --diff finetuned/ restored/",
        "# how far apart are two checkpoints, matrix by matrix?",
        "liborth inspect base/ finetuned/ --profile",
    ),
)
