"""What is verified: the models a check may look at, and the data it may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.errors import UsageError
from liborth_cli.evaluate.scores import Evaluator
from liborth_cli.run import Run
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights


@dataclass
class Subject:
    """Everything `verify` knows. A check takes what it needs and says clearly what is missing.

    Attributes:
        source: the directory that is verified.
        general: its weights, W_g.
        memory: its memory file, or None.
        reference: W_r, or None.
        finetuned: W_f, or None: then `general` and `memory` together stand for it.
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
            raise UsageError(f"--{check} needs {how}")
        return value
