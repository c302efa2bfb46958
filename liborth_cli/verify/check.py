"""What a check is: a value, as a method is. A new one is one file in checks/ and its line in `CHECKS`.

What the command line offers, which checks run, what `--require` can ask of, the report's titles and what is said of checks
that did not run are all read off these values. So that `--help` answers at once, a check's file imports nothing at its top that
imports torch, SciPy or Transformers; a function that needs one imports it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from liborth_cli.machine import TRAINING_BYTES
from liborth_cli.verify.power import Chance
from liborth_cli.verify.result import Result
from liborth_cli.verify.subject import Need, Subject


class Part(enum.Enum):
    """The parts of a report, with the question that the checks of each answer."""

    RELIABILITY = (
        "Reliability",
        "Are the files sound, and does what must be gone stay gone, however it is asked or trained for?",
    )
    FRESH = (
        "Fresh content",
        "Beside text that nobody was trained on: is anything still remembered, and is the skill still there?",
    )
    MECHANISM = "Mechanism", "Where do skill and memory lie, and how far do they touch each other?"
    TRANSFER = "Transfer", "Does it hold beyond these rows, on tasks and benchmarks of others?"

    @property
    def title(self) -> str:
        """Its heading."""
        return self.value[0]

    @property
    def question(self) -> str:
        """What its checks answer."""
        return self.value[1]


@dataclass(frozen=True)
class Options:
    """Options of one check: fields made by `option`. The command line offers them and hands the object to the check."""


def option(default: Any, words: str, least: int | None = None) -> Any:
    """Declare an option; its name on the command line is that of the field, its type the field's annotation.

    Args:
        default: when it is not given.
        words: for --help.
        least: smallest number allowed.
    """
    return field(default=default, metadata={"help": words, "min": least})


@dataclass(frozen=True)
class Work:
    """What a check does with models, at most.

    Attributes:
        scored: (rows, state) of what `States.score` is asked for: scored once, whichever checks ask.
        read: positions that are read forward beside those.
        trained: positions of rows that are learnt from, forward and back.
        weight_bytes: what every weight takes while it is learnt from.
    """

    scored: frozenset[tuple[str, str]] = frozenset()
    read: float = 0.0
    trained: float = 0.0
    weight_bytes: int = TRAINING_BYTES


def scorings(subject: Subject, lists: Sequence[str], states: Sequence[str]) -> frozenset[tuple[str, str]]:
    """Return every list of rows that is there, at every state."""
    return frozenset((rows, state) for rows in lists if rows in subject.states.data for state in states)


O = TypeVar("O", bound=Options)  # noqa: E741
"""A check's own options."""


def _as_it_is(options: Any) -> Any:
    return options


def _nothing(subject: Subject, options: Any) -> str:
    return ""


def _unknown(subject: Subject, options: Any) -> Work | None:
    return None


@dataclass(frozen=True)
class Check(Generic[O]):
    """One check.

    Attributes:
        name: on the command line, in `--require check.metric`, in the documents.
        title: for people.
        words: what its flag does, for --help.
        part: of the report.
        run: does it; everything it needs is there.
        metrics: what it can measure, for `--require`.
        needs: what it cannot do without; all of them.
        cheap: it runs when no check is named.
        require: what must hold when nothing else is asked, in the grammar of `--require`.
        power: metric → how often a condition on it is met when nothing is left, where the numbers of rows alone tell that.
        options: a dataclass of its own options.
        lacks: says in words what else is missing, or "": what `needs` cannot say.
        costs: says in words why it is left out unless it is asked for, or "".
        slow: what it costs is time.
        work: what it does with models, for --dry-run; None where that is not counted.
        controls: its numbers mean little without the check "controls" beside them.
        files: it judges files, not what a model does.
        attack: it tries to get the canaries back.
        thorough: what its options become under `--attacks`.
    """

    name: str
    title: str
    words: str
    part: Part
    run: Callable[[Subject, O], Result]
    metrics: tuple[str, ...]
    needs: tuple[Need, ...] = ()
    cheap: bool = False
    require: str = ""
    power: Mapping[str, Chance] = field(default_factory=dict)
    options: type[O] = Options  # type: ignore[assignment]
    lacks: Callable[[Subject, O], str] = _nothing
    costs: Callable[[Subject, O], str] = _nothing
    slow: bool = False
    work: Callable[[Subject, O], Work | None] = _unknown
    controls: bool = False
    files: bool = False
    attack: bool = False
    thorough: Callable[[O], O] = _as_it_is

    def missing(self, subject: Subject, options: O) -> str:
        """Say in words what it would need that was not given; "" when it can run."""
        return self.not_given(subject) or self.lacks(subject, options)

    def not_given(self, subject: Subject) -> str:
        """Say which of its needs were not given."""
        return " and ".join(f"{need.words}{subject.why(need)}" for need in self.needs if not subject.has(need))
