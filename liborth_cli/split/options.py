"""What is asked of a split: method, amount and tensors, and whether these go together. Nothing here reads a file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from liborth_cli.checkpoint.pair import Policy
from liborth_cli.errors import UsageError
from liborth_cli.methods import AMOUNTS, METHODS, Amount, Method
from liborth_cli.methods.method import Value

MOST_ALPHA = 1e6
"""Beyond this the sums of what was kept no longer fit a number, and no update means anything."""
SKIP, DROP = "skip", "drop"
FATES = {SKIP: "left as it is by --for", DROP: "its whole update goes to memory by --for"}


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
        if AMOUNTS[kind].low is None and number:
            raise UsageError(f"--for {text!r}: {kind} takes no number")
        try:
            amount = Amount(kind, float(number) if number else None)
        except ValueError:
            raise UsageError(f"--for {text!r}: {number!r} is not a number") from None
        amount.check()
        return cls(pattern, what, amount)


def last_match(overrides: Sequence[Override], name: str) -> Override | None:
    """Return the last override that speaks of a tensor: later ones win."""
    return next((o for o in reversed(overrides) if o.matches(name)), None)


def check_used(overrides: Iterable[Override], names: Sequence[str]) -> None:
    """Raise UsageError when an override matches none of the tensors that are divided or left out."""
    for override in overrides:
        if not any(override.matches(name) for name in names):
            raise UsageError(f"--for {str(override)!r} matches no tensor that is divided; `liborth inspect -v` lists the names")


@dataclass(frozen=True)
class SplitOptions:
    """What to do, apart from where.

    Attributes:
        method: a key of `METHODS`.
        amount: how much the leading part keeps.
        memory_side: "tail" when the leading part is skill, "top" when it is memory; None leaves it to the method.
        alpha: factor on the skill part in the general checkpoint.
        policy: which tensors take part.
        nonfinite: "refuse" or "passthrough" for tensors with NaN or infinite values.
        tolerance: excess tail energy a truncated SVD may have; 0 for the full SVD.
        seed: for everything random.
        out_shard_size: bytes; None keeps the fine-tuned checkpoint's layout.
        settings: of the method, by name; the others have their defaults.
        overrides: what some tensors get instead.
        memory_format: "xor", or "packed": smaller, and slower to write and to read.
        requantise: divide fp8 layers with block scales too, and round what comes of it under the fine-tuned scales.
    """

    method: str
    amount: Amount
    memory_side: str | None = None
    alpha: float = 1.0
    policy: Policy = field(default_factory=Policy)
    nonfinite: str = "refuse"
    tolerance: float = 1e-4
    seed: int = 0
    out_shard_size: int | None = None
    settings: Mapping[str, Value] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    requantise: bool = False
    memory_format: str = "xor"

    @property
    def side(self) -> str:
        """Which end of the ranking is memory."""
        return self.memory_side or METHODS[self.method].memory_side

    @property
    def rule(self) -> Method:
        """The method, with those of the settings that it has: a control beside it has others."""
        method = METHODS[self.method]
        return method.having({name: value for name, value in self.settings.items() if name in method.settings})

    def of(self, name: str) -> SplitOptions:
        """Return the options for one tensor: with its own amount, when --for gives it one."""
        found = last_match(self.overrides, name)
        return dataclasses.replace(self, amount=found.amount) if found and found.amount else self

    @property
    def beside_steps(self) -> str:
        """The first option that would make another model of one that steps measured, as typed; "" when there is none.

        Steps measure the model that they make: all of what they moved goes to memory, and nothing else does.
        """
        others = [
            ("--alpha", self.alpha != 1.0),
            ("--memory-side", (self.memory_side or "top") != "top"),
            (f"--vectors {self.policy.vectors}", self.policy.vectors != "skill"),
            (f"--added {self.policy.added}", self.policy.added != "skill"),
            *((f"--for {str(one)!r}", one.what != SKIP) for one in self.overrides),
        ]
        return next((option for option, differs in others if differs), "")

    def check_steps(self) -> None:
        """Raise UsageError when an option would make another model than the one that steps measure."""
        if option := self.beside_steps:
            instead = f" (REGEX={SKIP} leaves tensors as they are)" if option.startswith("--for") else ""
            raise UsageError(
                f"{self.method} measures the model that it makes: {option} would make another; leave it out{instead}"
            )

    def check(self, alone: bool) -> None:
        """Hold the options against the method, and against there being a reference.

        Args:
            alone: whether there is no reference.

        Raises:
            UsageError: when one of them says nothing, or something impossible.
        """
        method = METHODS[self.method]
        self.amount.check()
        if "edit" in method.needs:
            self.check_steps()
        if not abs(self.alpha) <= MOST_ALPHA:
            raise UsageError(f"--alpha takes a finite number, {MOST_ALPHA:g} at most")
        for name in self.settings:
            if name not in method.settings:
                owners = [other.name for other in METHODS.values() if name in other.settings]
                raise UsageError(f"--{name.replace('_', '-')} goes with --method {' or '.join(owners)}, not {self.method}")
        method.having(self.settings)
        if self.amount.hard and not method.cuts:
            able = [other.name for other in METHODS.values() if other.cuts]
            raise UsageError(f"--hard goes with --method {' or '.join(able)}, not {self.method}")
        if self.amount.hard and self.amount.kind == "threshold":
            raise UsageError("--threshold cuts already: leave out --hard, which goes with --strength")
        if alone and self.policy.vectors == "memory":
            raise UsageError("--vectors memory needs a reference: without one it would set norms and biases to zero")
        if alone and self.policy.added == "memory":
            raise UsageError("--added memory needs a reference: without one nothing was added")
