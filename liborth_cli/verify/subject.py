"""What is verified: the models a check may look at, and the data it may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.views import Grown
from liborth_cli.console import Console
from liborth_cli.errors import UsageError
from liborth_cli.machine import Run
from liborth_cli.measure.scores import Evaluator, RowScore
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point, Weights, between


@dataclass
class Subject:
    """Everything `verify` knows. A check takes what it needs and says clearly what is missing.

    Attributes:
        source: the directory that is verified.
        general: its weights, W_g.
        memory: its memory file, or None.
        reference: W_r, or None.
        finetuned: W_f: its files, or `general` and `memory` laid over each other; None when neither is there.
        manifest: of the split, or None.
        retain: rows of the skill that must be kept (`--retain-data`).
        canaries: rows of what must be gone (`--canary`), prompt and completion.
        fresh: rows of the same form that were never trained on (`--fresh`): the never-trained level.
        evaluators: one for each list of rows, by name ("retain", "canaries", "fresh"), sharing one model.
        states: weights by name: "reference", "finetuned", "general", and the controls beside them.
        seed: for everything random.
        show_text: whether texts may be printed; hashes stand for them otherwise.
        run: device and threads.
        console: where progress goes.
        options: what the checks were asked for, by option name.
        missing: attribute → why it is not there, when the manifest tells more than that it was not given.
        titles: rows by name ("retain", …) → the names of the files they were read from.
        grown: the model with the neurons that its memory holds, or None: wider than `general`, so it has a network of its own.
        wide: evaluators of the same rows on that network.
        network: builds the model on first use; for checks that bring rows of their own.
        encoder: the tokenizer beside the weights, or None.
    """

    source: Source
    general: Checkpoint
    memory: Memory | None
    reference: Checkpoint | None
    finetuned: Checkpoint | None
    manifest: dict[str, Any] | None
    retain: list[Row]
    canaries: list[Row]
    fresh: list[Row]
    evaluators: dict[str, Evaluator]
    states: dict[str, Weights]
    seed: int
    show_text: bool
    run: Run
    console: Console
    options: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    titles: dict[str, list[str]] = field(default_factory=dict)
    grown: Grown | None = None
    wide: dict[str, Evaluator] = field(default_factory=dict)
    network: Callable[[], BlockModel] | None = None
    encoder: TextEncoder | None = None
    _scores: dict[tuple[str, str], list[RowScore]] = field(default_factory=dict, repr=False)

    def need(self, attribute: str, check: str, how: str) -> Any:
        """Return an attribute, or refuse.

        Args:
            attribute: its name.
            check: who needs it.
            how: what the user has to give.

        Raises:
            UsageError: when it is missing or empty.
        """
        value = getattr(self, attribute)
        if not value:
            why = f"; {self.missing[attribute]}" if attribute in self.missing else ""
            raise UsageError(f"--{check} needs {how}{why}")
        return value

    def score(self, rows: str, state: str) -> list[RowScore]:
        """Score one list of rows at one of the states, once: every check after the first gets the same numbers.

        Args:
            rows: a key of `evaluators`.
            state: a key of `states`.

        Returns:
            One score a row, in the order of the rows.
        """
        if (rows, state) not in self._scores:
            weights = self.states[state]
            evaluators = self.wide if isinstance(weights.checkpoint, Grown) else self.evaluators
            self._scores[rows, state] = evaluators[rows].score(weights)
        return self._scores[rows, state]

    def point(self, start: str, end: str, t: float) -> str:
        """Name the point (1 − t)·start + t·end of two states, and add it to the states; the ends keep their names."""
        if t in (0.0, 1.0):
            return end if t else start
        name = f"{start} → {end} {t:g}"
        self.states.setdefault(name, between(self.states[start], self.states[end], t))
        return name

    def restored(self, beta: float) -> str:
        """Name the general checkpoint with a share β of its memory, and add it to the states.

        Where the memory is neurons, β multiplies what they write; elsewhere it blends the weights, and β = 1 is W_f.
        """
        if self.grown is None or beta == 0.0:
            return self.point("general", "finetuned", beta)
        name = f"neurons {beta:g}"
        self.states.setdefault(name, Point(self.grown.at(beta)))
        return name

    def label(self, number: int, row: Row) -> str:
        """Name a row where anybody may read it: its line in its file, never what it says (docs/decisions/0023).

        Args:
            number: of the row, from 0.
            row: the row.
        """
        place = row.where.rpartition(": ")[2]
        text = place if place != row.where else f"row {number + 1}"
        if self.show_text and self.encoder is not None:
            text += f": {self.encoder.decode(row.ids)}"
        return text
