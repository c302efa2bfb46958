"""What the demo measures: the skill on held-out text, and the secrets, at weights that may not exist on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, Row, read_rows
from liborth_cli.stream.weights import Point, Weights


@dataclass(frozen=True)
class Measured:
    """One line of the table; losses are means in nats a token.

    Attributes:
        skill: loss of held-out Shakespeare.
        secret: loss of the digits of the planted codes.
        recited: how many codes greedy decoding gives back.
        unseen: loss of the digits of codes nobody trained on.
    """

    skill: float
    secret: float
    recited: int
    unseen: float


class Measures:
    """Measures any weights of the demo's model."""

    def __init__(self, data: Path, checkpoint: Checkpoint) -> None:
        """Read the texts that nobody trained on, and the codes.

        Args:
            data: the demo's folder.
            checkpoint: one of its checkpoints.
        """
        model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
        self._skill, self._secrets, self._unseen = (
            Evaluator(model, rows(data / f"{name}.jsonl", checkpoint)) for name in ("held_out", "secrets", "unseen")
        )
        self.codes = len(self._secrets.rows)

    def of(self, weights: Weights) -> Measured:
        """Measure one model."""
        secrets = self._secrets.score(weights)
        return Measured(
            mean_loss(self._skill.score()),
            mean_loss(secrets),
            sum(bool(score.hit.all()) for score in secrets),
            mean_loss(self._unseen.score()),
        )


def rows(file: Path, checkpoint: Checkpoint, whole: bool = False, length: int = 128) -> list[Row]:
    """Read one of the demo's files.

    Args:
        file: JSON lines.
        checkpoint: whose tokenizer and vocabulary count.
        whole: whether prompts carry loss too, not only completions.
        length: longest row.
    """
    vocabulary = checkpoint.config["vocab_size"]
    found = read_rows([DataFile(file)], TextEncoder(checkpoint.path), vocabulary, length, truncate=True)
    return [replace(row, keep=np.ones_like(row.keep)) for row in found] if whole else found
