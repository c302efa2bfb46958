"""`--for 'REGEX=WHAT'`: another amount, or none at all, for some tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from liborth_cli.errors import UsageError
from liborth_cli.methods import AMOUNTS, Amount

FATES = {"skip": "left as it is by --for", "drop": "its whole update goes to memory by --for"}


@dataclass(frozen=True)
class Override:
    """What a user wants of the tensors whose name matches.

    Attributes:
        pattern: regular expression, found anywhere in the name.
        what: the words after the last "=": an amount and its number ("strength:1"), "skip" or "drop".
        amount: the amount, or None for "skip" and "drop".
    """

    pattern: str
    what: str
    amount: Amount | None = None

    def __str__(self) -> str:
        """Render as on the command line."""
        return f"{self.pattern}={self.what}"

    def matches(self, name: str) -> bool:
        """Tell whether it speaks of a tensor."""
        return re.search(self.pattern, name) is not None

    @classmethod
    def parse(cls, text: str, amounts: Sequence[str]) -> Override:
        """Read one --for.

        Args:
            text: as typed.
            amounts: the kinds the method understands.

        Raises:
            UsageError: when it cannot be understood; says what can.
        """
        pattern, equals, what = text.rpartition("=")
        known = [a if AMOUNTS[a].low is None else f"{a}:NUMBER" for a in amounts]
        allowed = " or ".join([*known, *FATES])
        if not equals or not pattern:
            raise UsageError(f"--for {text!r}: write REGEX=WHAT, where WHAT is {allowed}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--for {text!r}: {pattern!r} is not a regular expression: {error}") from None
        if what in FATES:
            return cls(pattern, what)
        kind, _, number = what.partition(":")
        if kind not in amounts:
            raise UsageError(f"--for {text!r}: {what!r} is none of {allowed}")
        try:
            amount = Amount(kind, float(number) if number else None)
        except ValueError:
            raise UsageError(f"--for {text!r}: {number!r} is not a number") from None
        if AMOUNTS[kind].low is None and number:
            raise UsageError(f"--for {text!r}: {kind} takes no number")
        amount.check()
        return cls(pattern, what, amount)


def last_match(overrides: Sequence[Override], name: str) -> Override | None:
    """Return the last override that speaks of a tensor: later ones win."""
    return next((o for o in reversed(overrides) if o.matches(name)), None)


def check_used(overrides: Sequence[Override], names: Iterable[str]) -> None:
    """Raise UsageError when an override matches none of the tensors that are divided."""
    names = list(names)
    for override in overrides:
        if not any(override.matches(name) for name in names):
            raise UsageError(f"--for {str(override)!r} matches no tensor that is divided; `liborth inspect -v` lists the names")
