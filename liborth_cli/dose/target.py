"""`--target`: what an edit must reach, as conditions on what is measured of one candidate.

    forget>=fresh-spread, retention>=0.995, general<=+1%, leak<=0.3, relearn<=0.5

The grammar is that of conditions.py. `fresh` is the candidate's own loss on never-trained rows, `spread` its standard deviation
between them: an edit that makes all text of a form harder has forgotten nothing by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from liborth_cli.conditions import DOWNWARDS, UPWARDS, Condition, Quantity, parse
from liborth_cli.dose.measure import Reading
from liborth_cli.errors import UsageError

OPTION = "--target"
QUANTITIES = {
    "forget": Quantity((">=", "<=", ">", "<"), percent=False, levels=("fresh", "spread")),
    "retention": Quantity(UPWARDS, share=True),
    "general": Quantity(("<=", "<")),
    "recited": Quantity(DOWNWARDS, share=True),
    "leak": Quantity(DOWNWARDS, share=True),
    "relearn": Quantity(("<=", "<"), percent=False),
}
NOT_PROMISED = {
    "recited": "that nothing is recited",
    "leak": "that the secrets cannot be told from never-trained text",
    "relearn": "that a few steps of training do not bring them back",
}
"""What holds only where it was asked for."""
CEILING, FLOOR = (parse(text, OPTION, QUANTITIES)[0] for text in ("forget<=fresh+spread", "retention>=0"))
"""Always there where they can be measured: secrets that are too hard stand out, and a broken model has forgotten nothing."""


@dataclass(frozen=True)
class Target:
    """All conditions.

    Attributes:
        text: as the user wrote it.
        conditions: in the order of the text, then those that always hold.
    """

    text: str
    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target.

        Raises:
            UsageError: when it is empty or malformed, or two conditions contradict each other.
        """
        conditions = parse(text, OPTION, QUANTITIES)
        for one in conditions:
            if one.name == "general" and one.bound.signed and "%" not in one.text and abs(one.bound.number) > 1:
                raise UsageError(f"{OPTION}: {one.text}: the change is a share of the loss, such as +1% or +0.01")
        return cls(text, conditions)

    def bounded(self, before: Reading, after: Reading) -> Target:
        """Return it with the conditions that always hold: CEILING, where there are fresh rows, and FLOOR.

        Where no row shows the skill, the general loss must not rise by a tenth above that of either end in place of FLOOR.

        Args:
            before: of the reference.
            after: of the fine-tuned model.

        Raises:
            UsageError: when a condition asks for more than the ceiling.
        """
        always = []
        if after.fresh is not None and after.spread is not None and after.forget is not None:
            for one in self.conditions:
                factors = one.bound.levels
                fresh, spreads = factors.get("fresh", 0.0), factors.get("spread", 0.0)
                if _upwards(one) and (fresh > 1 or (fresh == 1 and (spreads > 1 or (spreads == 1 and one.bound.number > 0)))):
                    raise UsageError(
                        f"{OPTION}: {one.text} contradicts the ceiling {CEILING.text}: secrets that are harder than "
                        "never-trained rows stand out, and that marks them"
                    )
            always.append(CEILING)
        if after.retention is not None and "retention" not in self.names:
            always.append(FLOOR)
        if after.retention is None and "general" not in self.names and before.general and after.general:
            most = 1.1 * max(before.general, after.general)
            always += parse(f"general<={most:.4g}", OPTION, QUANTITIES)
        return Target(self.text, (*self.conditions, *always))

    @property
    def names(self) -> set[str]:
        """What has to be measured; "fresh" and "spread" when a bound refers to them."""
        return {c.name for c in self.conditions} | {level for c in self.conditions for level in c.bound.levels}

    @property
    def has_goal(self) -> bool:
        """Whether anything is asked that needs a dose at all."""
        return any(_grows(condition) for condition in self.conditions)

    def met(self, reading: Reading) -> bool:
        """Tell whether everything is met."""
        return not self.missed(reading)

    def gone(self, reading: Reading, attacked: bool = True) -> bool:
        """Tell whether a candidate is past what is asked of forgetting: met, or overshot.

        Args:
            reading: of the candidate.
            attacked: hold it also against what relearning showed.
        """
        return all(
            _met(c, reading) or (c.name == "leak" and (reading.forget or 0.0) > (reading.fresh or 0.0))
            for c in self.conditions
            if _grows(c) and (attacked or c.name != "relearn")
        )

    def kept(self, reading: Reading) -> bool:
        """Tell whether the conditions that more dose harms are met."""
        return all(_met(condition, reading) for condition in self.conditions if not _grows(condition))

    def missed(self, reading: Reading, only: Callable[[Condition], bool] = lambda condition: True) -> list[str]:
        """Return the texts of the conditions that are not met."""
        return [condition.text for condition in self.conditions if only(condition) and not _met(condition, reading)]

    def empty(self, after: Reading) -> list[str]:
        """Return the conditions on forgetting that the fine-tuned model meets already, so that they promise nothing."""
        return [c.text for c in self.conditions if _grows(c) and _met(c, after)]

    def limits(self) -> str:
        """Say what the target promises, and what it does not."""
        left = [words for name, words in NOT_PROMISED.items() if name not in self.names]
        text = f"the target promises {', '.join(c.text for c in self.conditions)}, on the rows that were measured"
        return (
            text + (f"; it does not promise {', nor '.join(left)}" if left else "") + ": hold the result against liborth verify"
        )


def _met(condition: Condition, reading: Reading) -> bool:
    change = condition.name == "general" and condition.bound.signed
    value = getattr(reading, "general_change" if change else condition.name)
    return condition.met(value, levels={"fresh": reading.fresh, "spread": reading.spread})


def _upwards(condition: Condition) -> bool:
    return condition.name == "forget" and condition.comparison in UPWARDS


def _grows(condition: Condition) -> bool:
    """Tell whether a larger dose helps: it wants the secrets gone, where the others want the rest kept."""
    return condition.name in ("recited", "leak", "relearn") or _upwards(condition)
