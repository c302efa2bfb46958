"""What is asked of `clean`. Imports nothing heavy: the command line takes its words from here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liborth_cli.clean.aside import Given


class Method(StrEnum):
    """Methods that remove what is named."""

    RECALL = "recall"
    DISTILL = "distill"
    TOKENWISE = "tokenwise"


@dataclass(frozen=True)
class Words:
    """What every command is told, as it is typed.

    Attributes:
        running: where, and how much is said.
        seed: of those that draw.
        kernels: of those that have a choice of them.
    """

    running: tuple[str, ...] = ()
    seed: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class CleanRequest:
    """What is asked.

    Attributes:
        base: checkpoint before fine-tuning, as it was named.
        finetuned: checkpoint after it.
        given: the texts.
        out: checkpoint to write.
        words: what every command is told.
        method: of the split; None: chosen by what fits.
        attacks: verify with every attack.
        listed_only: do not look for rows that are not listed.
        dry_run: say what would be typed.
    """

    base: str
    finetuned: str
    given: Given
    out: Path
    words: Words
    method: Method | None = None
    attacks: bool = False
    listed_only: bool = False
    dry_run: bool = False
