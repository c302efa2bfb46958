"""The options of `liborth demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, output
from liborth_cli.errors import LiborthError


def demo(
    out: Annotated[Path | None, output("-o", "--out", help="Keep the outputs in this directory.")] = None,
    *,
    common: Common,
) -> None:
    """Remove eight secrets from a real model that ships with liborth.

    Takes the curvature, splits, excises at 0 and 1, and measures skill and secrets beside the controls.
    """
    from liborth_cli.demo import run_demo
    from liborth_cli.machine import configure

    run = configure(common.device, common.threads or 1)  # a model this small is faster on one thread
    if not run_demo(out, run, common.console).bit_exact:
        raise LiborthError("the restored checkpoint differs from the fine-tuned one; this is a bug, please report it")


COMMAND = Command(
    demo,
    ("# half a minute, on one core", "liborth demo", "# keep what it makes", "liborth demo -o demo/"),
    stopped="what it has made so far is in the directory of -o; run it again into another",
)
