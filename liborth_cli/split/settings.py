"""Do the options of a split go together?"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from liborth_cli.errors import UsageError
from liborth_cli.methods import METHODS
from liborth_cli.split.matrix import SETTINGS, SplitOptions

DEFAULTS = {f.name: f.default for f in fields(SplitOptions) if f.name in SETTINGS}


def check_settings(options: SplitOptions, alone: bool) -> None:
    """Hold the settings against the method, and against there being a reference.

    Args:
        options: the split.
        alone: whether there is no reference.

    Raises:
        UsageError: when one of them says nothing, or something impossible.
    """
    method: Any = METHODS[options.method]
    known = {f.name for f in fields(method)}
    for name, default in DEFAULTS.items():
        if getattr(options, name) != default and name not in known:
            owners = [m for m, other in METHODS.items() if name in {f.name for f in fields(other)}]  # type: ignore[arg-type]
            raise UsageError(f"--{name.replace('_', '-')} goes with --method {' or '.join(owners)}, not {options.method}")
    if options.amount.hard and "threshold" not in method.amounts:
        able = [name for name, other in METHODS.items() if "threshold" in other.amounts and "strength" in other.amounts]
        raise UsageError(f"--hard goes with --method {' or '.join(able)}, not {options.method}")
    if not (math.isfinite(options.damping) and options.damping >= 0):
        raise UsageError(f"--damping takes a number from 0, not {options.damping}")
    if alone and options.policy.vectors == "memory":
        raise UsageError("--vectors memory needs a reference: without one it would set norms and biases to zero")
    if alone and options.policy.added == "memory":
        raise UsageError("--added memory needs a reference: without one nothing was added")
