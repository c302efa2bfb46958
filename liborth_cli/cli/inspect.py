"""The options of `liborth inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, what
from liborth_cli.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from liborth_cli.console import Console, JsonObject, Table


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
    if diff:
        _compare(path, finetuned, profile, common)
        return
    from liborth_cli.inspect import describe

    if profile:
        from liborth_cli.machine import configure

        configure(common.device, common.threads)
    _print(*describe(path, finetuned, profile, common.verbose), common.console)


def _compare(first: str, second: str | None, profile: bool, common: Common) -> None:
    """Print how two checkpoints differ, and exit with what was found."""
    if second is None or profile:
        raise UsageError(
            "--diff compares two checkpoints: liborth inspect --diff A B" + (", without --profile" if profile else "")
        )
    from liborth_cli.compare import describe

    same, document, table = describe(first, second, common.verbose)
    _print(document, [table], common.console)
    if not same:
        raise typer.Exit(VerificationFailed.exit_code)


def _print(document: JsonObject, tables: Sequence[Table], console: Console) -> None:
    if console.as_json:
        console.result("", document)
        return
    for table in tables:
        console.table(table.columns, table.rows, table.title, out=True)


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
