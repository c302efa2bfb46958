"""The options of `liborth doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common


def doctor(*, common: Common) -> None:
    """Say what this machine has, and what each command could do here.

    Versions, device, kernels, memory, disk and threads, with advice. Reads no checkpoint and writes nothing.
    """
    from liborth_cli.doctor import examine
    from liborth_cli.machine import configure

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
