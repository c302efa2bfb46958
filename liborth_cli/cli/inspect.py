"""The options of `liborth inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, what


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint, memory, factor set, output of a command, or manifest.")],
    finetuned: Annotated[str | None, typer.Argument(help="With it: the pair, tensor by tensor.")] = None,
    profile: Annotated[bool, what("--profile", help="Read the weights: norms, ranks and noise edges.")] = False,
    *,
    common: Common,
) -> None:
    """Say what a path is: checkpoint, pair, memory or split.

    Reads headers only, unless --profile asks for norms and ranks. With -v every tensor is listed.
    """
    from liborth_cli.inspect import describe

    if profile:
        from liborth_cli.machine import configure

        configure(common.device, common.threads)
    document, tables = describe(path, finetuned, profile, common.verbose)
    if common.as_json:
        common.console.result("", document)
        return
    for table in tables:
        common.console.table(table.columns, table.rows, table.title, out=True)


COMMAND = Command(
    inspect,
    (
        "# what is this directory, and what was done to it?",
        "liborth inspect general/",
        "# how far apart are two checkpoints, matrix by matrix?",
        "liborth inspect base/ finetuned/ --profile",
    ),
)
