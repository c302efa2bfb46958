"""`--target`: what an edit must reach, as a few conditions on what is measured.

    forget>=fresh, retention>=0.995, general<=+1%

Conditions are joined by commas. `forget` is a loss in nats, a multiple of `fresh` or `fresh` with an offset: `fresh` is the
fine-tuned checkpoint's loss on rows it never saw, `spread` its standard deviation between rows. `recited` and `retention` are
shares. `general` is a change against the fine-tuned checkpoint when it has a sign or a %, a loss in nats when it has neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from liborth_cli.dose.gauge import Reading
from liborth_cli.errors import UsageError

GRAMMAR = "write it like forget>=fresh,retention>=0.995,general<=+1%"
DIRECTION = {"forget": None, "recited": "<=", "retention": ">=", "general": "<="}
"""What can be asked of, and which way round; None both ways."""
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
CONDITION = re.compile(r"\s*([a-z]+)\s*(>=|<=|=>|=<|>|<|=)\s*(.*?)\s*")
LEVEL = re.compile(rf"(?:({NUMBER})\s*\*\s*)?fresh(?:\s*([+-])\s*(?:(\d*\.?\d*)\s*\*?\s*(spread)|(\d+\.?\d*|\.\d+)))?")
PLAIN = re.compile(rf"({NUMBER})\s*(%)?")
MOST = 1.5
"""A share above this was meant as a percentage."""


@dataclass(frozen=True)
class Level:
    """A value a measurement is held against: number + factor·fresh + spreads·spread.

    Attributes:
        number: in nats, or a share.
        factor: of the never-trained level.
        spreads: of its standard deviation between rows.
    """

    number: float = 0.0
    factor: float = 0.0
    spreads: float = 0.0

    def value(self, reading: Reading) -> float:
        """Return the level for one candidate."""
        return self.number + self.factor * (reading.level or 0.0) + self.spreads * (reading.level_spread or 0.0)


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        name: what is measured: "forget", "recited", "retention", "general".
        at_least: which way round.
        level: what it is held against.
        text: as the user wrote it.
        change: `general` relative to the fine-tuned checkpoint.
    """

    name: str
    at_least: bool
    level: Level
    text: str
    change: bool = False

    def met(self, reading: Reading) -> bool:
        """Tell whether a reading meets it; what was not measured meets nothing."""
        value = getattr(reading, "general_change" if self.change else self.name)
        if value is None:
            return False
        wanted = self.level.value(reading)
        return value >= wanted - 1e-12 if self.at_least else value <= wanted + 1e-12

    @property
    def grows(self) -> bool:
        """Whether a larger dose helps: it wants the secrets gone, where the others want the rest kept."""
        return self.name == "recited" or (self.name == "forget" and self.at_least)


@dataclass(frozen=True)
class Target:
    """All conditions.

    Attributes:
        text: as the user wrote it.
        conditions: in the order of the text, then the ceiling that is always there.
    """

    text: str
    conditions: tuple[Condition, ...] = field(default=())

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target.

        Raises:
            UsageError: when it is malformed, or two conditions contradict each other.
        """
        conditions = tuple(_condition(part) for part in text.split(","))
        for number, one in enumerate(conditions):
            for other in conditions[:number]:
                _check_two(other, one)
        return cls(text, conditions)

    def with_ceiling(self) -> Target:
        """Return it with the condition that the secrets must not stand out by being harder than never-trained rows.

        Raises:
            UsageError: when a condition asks for more than that.
        """
        for one in self.conditions:
            beyond = one.level.factor > 1 or (one.level.factor == 1 and one.level.spreads >= 1 and one.level.number >= 0)
            if one.name == "forget" and one.at_least and beyond and one.level != CEILING.level:
                raise UsageError(
                    f"--target: {one.text} contradicts the ceiling fresh+spread: secrets that are harder than never-trained "
                    "rows stand out, and that marks them"
                )
        return Target(self.text, (*self.conditions, CEILING))

    def met(self, reading: Reading) -> bool:
        """Tell whether everything is met."""
        return all(condition.met(reading) for condition in self.conditions)

    def gone(self, reading: Reading) -> bool:
        """Tell whether the conditions that more dose helps are met."""
        return all(condition.met(reading) for condition in self.conditions if condition.grows)

    def kept(self, reading: Reading) -> bool:
        """Tell whether the conditions that more dose harms are met."""
        return all(condition.met(reading) for condition in self.conditions if not condition.grows)

    @property
    def has_goal(self) -> bool:
        """Whether anything is asked that needs a dose at all."""
        return any(condition.grows for condition in self.conditions)

    def names(self) -> set[str]:
        """Return what has to be measured; "fresh" when a level refers to it."""
        fresh = {"fresh" for c in self.conditions if c.level.factor or c.level.spreads}
        return {condition.name for condition in self.conditions} | fresh

    def missed(self, reading: Reading) -> list[str]:
        """Return the texts of the conditions that are not met."""
        return [condition.text for condition in self.conditions if not condition.met(reading)]


CEILING = Condition("forget", False, Level(factor=1.0, spreads=1.0), "forget<=fresh+spread")


def _condition(part: str) -> Condition:
    found = CONDITION.fullmatch(part)
    if not found or found[1] not in DIRECTION:
        what = found[1] if found else part.strip()
        raise UsageError(f"--target: {what!r} is none of {', '.join(DIRECTION)} with >= or <=; {GRAMMAR}")
    name, sign, value = found.groups()
    if sign not in (">=", "<=") or (DIRECTION[name] or sign) != sign:
        raise UsageError(f"--target: {part.strip()!r}: {name} takes {DIRECTION[name] or '>= or <='}; {GRAMMAR}")
    text = f"{name}{sign}{value}"
    level = LEVEL.fullmatch(value)
    if level and name == "forget":
        return Condition(name, sign == ">=", _fresh(level), text)
    plain = PLAIN.fullmatch(value)
    if not plain or (plain[2] and name == "forget"):
        raise UsageError(f"--target: {text}: {value!r} is no {'loss or fresh' if name == 'forget' else 'number'}; {GRAMMAR}")
    number = float(plain[1]) / (100 if plain[2] else 1)
    change = name == "general" and (bool(plain[2]) or plain[1][0] in "+-")
    if name in ("recited", "retention") and not 0 <= number <= MOST:
        raise UsageError(f"--target: {text}: {name} is a share, such as 0.995 or 99.5%")
    if change and not plain[2] and abs(number) > 1:
        raise UsageError(f"--target: {text}: the change is a share of the loss, such as +1% or +0.01")
    return Condition(name, sign == ">=", Level(number), text, change)


def _fresh(found: re.Match[str]) -> Level:
    factor, sign, spreads, spread, number = found.groups()
    direction = -1.0 if sign == "-" else 1.0
    try:
        count = float(spreads) if spreads else 1.0
    except ValueError:
        raise UsageError(f"--target: {found[0]!r} is no level; {GRAMMAR}") from None
    return Level(direction * float(number or 0), float(factor) if factor else 1.0, direction * count if spread else 0.0)


def _check_two(first: Condition, second: Condition) -> None:
    if first.name != second.name or first.change != second.change:
        return
    if first.at_least == second.at_least:
        raise UsageError(f"--target: {first.text} and {second.text}: give one of them")
    low, high = (first, second) if first.at_least else (second, first)
    a, b = low.level, high.level
    if (a.factor, a.spreads) == (b.factor, b.spreads) and a.number > b.number:
        raise UsageError(f"--target: {low.text} and {high.text} contradict each other")
    if a.factor and (a.factor, a.number) == (b.factor, b.number) and a.spreads > b.spreads:
        raise UsageError(f"--target: {low.text} and {high.text} contradict each other")
