"""The options of `liborth doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, what


def doctor(
    empty_cache: Annotated[
        bool, what("--empty-cache", help="Empty LIBORTH_CACHE: finished checks, factors of retain texts.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Say what this machine has, and what each command could do here.

    Versions, device, kernels, memory, disk, cache and threads, with advice. Reads no checkpoint and writes nothing.
    """
    from liborth_cli.checkpoint import cache
    from liborth_cli.console import size
    from liborth_cli.doctor import examine
    from liborth_cli.machine import configure

    if empty_cache:
        common.console.note(f"{cache.place()}: {size(cache.empty())} removed")
    found = examine(Path(), configure(common.device, common.threads))
    if common.as_json:
        common.console.result("", {**asdict(found), "advice": found.advice})
        return
    common.console.table(["", "found here"], [(fact.name, fact.value) for fact in found.facts], out=True)
    able = [(ability.command, ability.says) for ability in found.abilities]
    common.console.table(["command", "what it could do here"], able, out=True)
    for sentence in found.advice:
        common.console.result(sentence, {})


COMMAND = Command(doctor, ("liborth doctor", "# for a report of a problem", "liborth doctor --json"))
