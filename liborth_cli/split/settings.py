"""Do the options of a split go together?"""

from __future__ import annotations

from liborth_cli.errors import UsageError
from liborth_cli.methods import METHODS
from liborth_cli.split.matrix import SplitOptions


def check_settings(options: SplitOptions, alone: bool) -> None:
    """Hold the settings against the method, and against there being a reference.

    Args:
        options: the split.
        alone: whether there is no reference.

    Raises:
        UsageError: when one of them says nothing, or something impossible.
    """
    method = METHODS[options.method]
    for name, value in options.settings.items():
        if name not in method.settings:
            owners = [other.name for other in METHODS.values() if name in other.settings]
            raise UsageError(f"--{name.replace('_', '-')} goes with --method {' or '.join(owners)}, not {options.method}")
        method.settings[name].check(value)
    if options.amount.hard and not method.cuts:
        able = [other.name for other in METHODS.values() if other.cuts]
        raise UsageError(f"--hard goes with --method {' or '.join(able)}, not {options.method}")
    if alone and options.policy.vectors == "memory":
        raise UsageError("--vectors memory needs a reference: without one it would set norms and biases to zero")
    if alone and options.policy.added == "memory":
        raise UsageError("--added memory needs a reference: without one nothing was added")
