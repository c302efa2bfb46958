"""What a check found, as data: the table, the JSON document and the report are three readings of the same object."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import cast

from liborth_cli.chart import Plot, Series
from liborth_cli.console import Json, JsonObject

__all__ = ["About", "Certificate", "Facts", "Figure", "Heatmap", "Metric", "Plot", "Requirement", "Result", "Series", "Table"]


@dataclass(frozen=True)
class Metric:
    """One number that a requirement can be held against.

    Attributes:
        value: the estimate.
        low: lower end of its 95 % interval; the value itself where it is exact.
        high: upper end.
        meaning: one sentence, with the unit.
        forgetting: it says how well something is forgotten, so a requirement on it needs a model that had not forgotten it.
        finetuned: the same number of the fine-tuned model on the same rows; None where that was not measured.
    """

    value: float
    low: float
    high: float
    meaning: str = ""
    forgetting: bool = False
    finetuned: float | None = None

    @classmethod
    def exact(cls, value: float, meaning: str = "") -> Metric:
        """Wrap a number that has no sampling error."""
        return cls(value, value, value, meaning)

    def beside(self, finetuned: Metric | float | None) -> Metric:
        """Return it as a number on forgetting, with that of the fine-tuned model beside it."""
        return replace(self, forgetting=True, finetuned=finetuned.value if isinstance(finetuned, Metric) else finetuned)

    @property
    def text(self) -> str:
        """The value, with its interval where it has one."""
        if self.low == self.high == self.value or math.isnan(self.value):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} (95 % interval {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Heatmap:
    """A number for each cell of a grid, such as layer × module.

    Attributes:
        title: heading.
        alt: what a reader who cannot see it has to know.
        rows: names of the rows.
        columns: names of the columns.
        values: one tuple a row; None where there is nothing.
        unit: what the numbers are.
    """

    title: str
    alt: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns whose name begins with ">" hold numbers.

    Attributes:
        title: heading.
        columns: names.
        rows: cells: text, numbers, or None.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


Figure = Plot | Heatmap | Table


class Why(enum.Enum):
    """Why something was not tried."""

    LACKING = "lacking"
    UNASKED = "unasked"
    COSTLY = "costly"
    BEYOND = "beyond"


@dataclass(frozen=True)
class Untried:
    """What was not tried, and why.

    Attributes:
        why: the kind of reason.
        words: what it would need or cost; of what is beyond all checks, what that is.
    """

    why: Why
    words: str


UNASKED = Untried(Why.UNASKED, "to be asked for")
BEYOND = "beyond the checks"
"""Where a certificate says, among what was not tried, what no check tries."""


Line = dict[str, str | float | None]
"""One line of a table, by the names of its columns."""


@dataclass
class Facts:
    """What a check found beside its numbers and figures, for the JSON document; each check derives its own from this.

    A fact that is None was not measured, and does not appear there.
    """

    def to_json(self) -> JsonObject:
        """Return a JSON object; numbers that are not finite become null."""
        return cast("JsonObject", _json(self))


@dataclass
class Result:
    """What one check found.

    Attributes:
        check: the check's name, as on the command line.
        verdict: whole sentences; the first names the worst number.
        passed: False when the check itself found something broken; None when it only measures.
        metrics: numbers by the name that `--require` uses.
        figures: what to show.
        facts: what else stands in the JSON document.
        recited: canaries that came out of the general model, word for word.
    """

    check: str
    verdict: str
    passed: bool | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)
    recited: int = 0

    @property
    def drawn(self) -> list[JsonObject]:
        """The figures, as JSON objects that say their kind."""
        return [_object({"kind": type(figure).__name__.lower(), **vars(figure)}) for figure in self.figures]

    def to_json(self) -> JsonObject:
        """Return a JSON object; numbers that are not finite become null."""
        return _object({**vars(self), "figures": self.drawn})


class Outcome(enum.StrEnum):
    """What `verify` decided."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "no decision"


@dataclass(frozen=True)
class Requirement:
    """One condition, decided.

    Attributes:
        text: as it was written, such as "retention>=0.99".
        check: the check that measures it.
        measured: what it was held against; NaN where nothing was measured.
        met: whether the whole interval is on the right side; None when the measurement cannot decide it.
        sentence: the verdict on it.
        default: it stands because nothing else was asked.
    """

    text: str
    check: str
    measured: Metric
    met: bool | None
    sentence: str
    default: bool = False


@dataclass(frozen=True)
class Origin:
    """What was verified: a name fit for publishing, and its commit on the hub."""

    title: str
    commit: str | None


@dataclass
class RowsSeen(Facts):
    """Rows that were used: files, how many, how many of them different, tokens that carry loss; no hash of a secret."""

    files: list[str]
    rows: int
    different: int
    loss_tokens: int
    sha256: str | None = None


@dataclass
class Provenance(Facts):
    """What was verified with what; so much of it as is known.

    Attributes:
        kind: of document: "verify".
        schema_version: of its form.
        liborth: version.
        libraries: name → version.
        seed: of everything random.
        model: what was verified.
        inputs: side → file → sha256.
        split: what its manifest says of how it was made.
        data: the rows, by name.
        checks: that ran.
        require: the conditions.
        retrained: the model that never saw the canaries, as the user named it.
        signed_by: whose word the manifest is.
    """

    kind: str
    schema_version: int
    liborth: str
    libraries: dict[str, str]
    seed: int
    model: Origin
    inputs: dict[str, dict[str, str]]
    split: JsonObject | None
    data: dict[str, RowsSeen]
    checks: list[str] = field(default_factory=list)
    require: list[str] = field(default_factory=list)
    retrained: str | None = None
    signed_by: str | None = None


@dataclass(frozen=True)
class Edit:
    """What was done to make the checkpoint.

    Attributes:
        method: of the split.
        amount: how much it was asked for, in words.
        divided: tensors whose update was divided.
        tensors: all there are.
        removed: share of the update's ‖U‖² that was taken out; None where that has no meaning.
    """

    method: str
    amount: str
    divided: int
    tensors: int
    removed: float | None = None


@dataclass(frozen=True)
class About:
    """What a certificate is about, whose it is, and of which day.

    Attributes:
        name: of the model, as people know it; "" when nobody said.
        owner: who answers for it; likewise.
        date: the day it was measured, UTC, as 2026-11-26; "" where unknown.
        finetuned: what the fine-tuned checkpoint was called when it was split; "" without a manifest.
        reference: likewise, the checkpoint before fine-tuning.
        weights: files of weights whose SHA-256 stands in the manifest.
        edit: what was done, or None without the manifest of a split.
    """

    name: str = ""
    owner: str = ""
    date: str = ""
    finetuned: str = ""
    reference: str = ""
    weights: int = 0
    edit: Edit | None = None


@dataclass
class Certificate:
    """Everything `verify` found about one checkpoint; the table, the JSON document and the report are made from it.

    Attributes:
        subject: the checkpoint, as the user named it.
        outcome: passed, failed, or no decision.
        sentences: the verdict, the main finding first.
        requirements: in the order they were given.
        results: one a check, in the order they ran.
        not_tried: what was not done → why.
        provenance: versions, inputs with hashes, data with hashes, seed.
        about: the model, its owner, the day.
    """

    subject: str
    outcome: Outcome
    sentences: list[str]
    requirements: list[Requirement]
    results: list[Result]
    not_tried: dict[str, Untried] = field(default_factory=dict)
    provenance: Provenance | None = None
    about: About = About()

    @property
    def passed(self) -> bool:
        """Whether nothing is broken and every requirement is met."""
        return self.outcome == Outcome.PASSED

    @property
    def left_out(self) -> str:
        """The checks that did not run, in a sentence."""
        return f"Not tried: {', '.join(name for name, one in self.not_tried.items() if one.why is not Why.BEYOND)}."

    def to_json(self) -> JsonObject:
        """Return a JSON object; numbers that are not finite become null."""
        untried = {name: one.words for name, one in self.not_tried.items()}
        results = [result.to_json() for result in self.results]
        return _object({**vars(self), "passed": self.passed, "results": results, "not_tried": untried})


def _object(content: dict[str, object]) -> JsonObject:
    return cast("JsonObject", _json(content))


def _json(value: object) -> Json:
    """Make plain JSON of records, tuples and numbers."""
    if is_dataclass(value):
        found = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return {name: _json(v) for name, v in found.items() if v is not None or not isinstance(value, Facts)}
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else cast("Json", value)
