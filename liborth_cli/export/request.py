"""What is asked of an export. Nothing heavy is imported here: the command line reads this file for its options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Form(StrEnum):
    """What is written."""

    PEFT = "peft"
    TASK_VECTOR = "task-vector"
    MERGEKIT = "mergekit"
    GGUF = "gguf-lora"


class Part(StrEnum):
    """Which part of the update."""

    SKILL = "skill"
    MEMORY = "memory"


@dataclass(frozen=True)
class ExportRequest:
    """An export as it is asked for.

    Attributes:
        model: output of a split.
        form: what is written.
        out: directory to create.
        part: the skill (general − reference) or the memory (fine-tuned − general, private).
        reference: checkpoint before fine-tuning; None looks where the manifest says.
        memory: memory directory or file; None looks beside the model.
        rank: of an adapter; None takes the smallest that holds the update.
        whole: let an adapter carry norms and tables whole.
        lossy: write an adapter also where it cannot stand for the checkpoint.
        seed: of the tokens of the self-test.
    """

    model: str
    form: Form
    out: Path
    part: Part = Part.SKILL
    reference: str | None = None
    memory: Path | None = None
    rank: int | None = None
    whole: bool = False
    lossy: bool = False
    seed: int = 0
