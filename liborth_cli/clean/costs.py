"""What a run of `clean` costs, before anything is read but the sizes of files; and what it leaves out for being too long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.clean.request import Method
from liborth_cli.console import duration
from liborth_cli.machine import LOW_RANK_BYTES, STEPS_BYTES, TRAINING_BYTES, too_large
from liborth_cli.methods import METHODS
from liborth_cli.methods.recall import Recall
from liborth_cli.recall.steps import ROUND
from liborth_cli.stream.texts import DataFile
from liborth_cli.stream.work import rate
from liborth_cli.tune.options import ATTACK_RANK
from liborth_cli.verify.attacks import BATCH_ROWS, FULL, PRODUCTS, QUICK, STEPS

MOST_CHARACTERS = 16_384
"""Characters of private text that recall takes; two of them are a token at least."""
WALKS = 6
"""Products with every weight that a step takes of a row, and of one beside it that nobody trained on, the attack left out."""
LONGEST = 6 * 3600.0
"""Seconds that recall may take on a model that is too large for the usual attack inside."""
TEXTS, EACH, PATIENCE = 1024, 64, 600.0
"""Texts that the model writes when it is asked for rows that are not listed, in all and for each row that is, at least; and the
seconds that may take, about."""


@dataclass(frozen=True)
class Costs:
    """What decides how long a run takes.

    Attributes:
        weights: numbers of the model.
        nbytes: of its files.
        rows: private ones; lines of their file.
        length: tokens of such a row, about: four characters each.
        characters: of the file.
        device: where the commands compute.
    """

    weights: int
    nbytes: int
    rows: int
    length: float
    characters: int
    device: torch.device

    @classmethod
    def of(cls, model: Checkpoint, private: str, device: torch.device) -> Costs:
        """Look at a model and a file of private rows; a dataset of the hub counts as one that is too long for recall."""
        file = DataFile.parse(private, "--private", secret=True)
        lines = [b" " * MOST_CHARACTERS] if file.hub else file.path.read_bytes().splitlines()
        characters = MOST_CHARACTERS + 1 if file.hub else file.path.stat().st_size
        length = sum(map(len, lines)) / max(len(lines), 1) / 4
        weights = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
        return cls(weights, model.nbytes, len(lines), length, characters, device)

    def method(self) -> tuple[Method, str]:
        """Take recall, which stands more of the attack, where its training fits and there are few enough tokens; say why."""
        if too_much := too_large(self.weights * LOW_RANK_BYTES, self.device):
            return Method.TOKENWISE, f"tokenwise: recall takes about {too_much}"
        if self.characters > MOST_CHARACTERS:
            return Method.TOKENWISE, "tokenwise: recall takes few private rows only"
        best = "recall, which stands more of the attack than tokenwise on what was measured (docs/methods.md)"
        if not self.attack_rank:
            return Method.RECALL, best
        if self.recalling > LONGEST:
            return Method.TOKENWISE, f"tokenwise: recall takes about {duration(self.recalling)} here"
        return Method.RECALL, f"{best}; its attack inside trains low-rank updates, as all weights do not fit"

    @property
    def attack_rank(self) -> int:
        """Rank of the updates that recall's attack inside trains where all weights do not fit; 0 where they do."""
        gpu = self.device.type == "cuda"  # what was moved lies beside the training, but not on a GPU
        too_much = too_large(self.weights * (TRAINING_BYTES if gpu else STEPS_BYTES), self.device)
        return ATTACK_RANK if too_much else 0

    @property
    def recalling(self) -> float:
        """Seconds that recall's usual steps take, about: two of three train first, and each walks through all rows and back."""
        recall = METHODS["recall"]
        assert isinstance(recall, Recall) and recall.default is not None
        lesson = recall.attack_steps * min(BATCH_ROWS, max(self.rows // 2, 1)) * PRODUCTS
        tokens = (lesson * (ROUND - 1) / ROUND + WALKS * self.rows) * self.length
        return float(recall.default.value or 0) * tokens * self.weights / rate(self.device)

    @property
    def texts(self) -> int:
        """Texts that are enough to tell rows that were learnt from those that are made up."""
        return max(TEXTS, EACH * self.rows)

    @property
    def searching(self) -> float:
        """Seconds that these texts take, about."""
        return self.texts * self.length * self.weights / rate(self.device)

    def unsearched(self) -> str:
        """Say why the model is not asked for more rows: all weights must fit, and the texts take their time; "" if it is."""
        if too_much := too_large(4 * self.weights):
            return f"all weights at once take {too_much}"
        if self.searching <= PATIENCE:
            return ""
        return f"that takes about {duration(self.searching)} here (`liborth extract --like` does)"

    def search(self, rows: Path) -> str:
        """Say what the search takes, and what comes of it.

        Args:
            rows: file that is made with what it finds.
        """
        about = duration(self.searching)
        return f"extract writes {self.texts:,} texts, about {about}; with what it finds {rows} is made, for split and verify"

    def attack(self, thorough: bool) -> str:
        """Say how long the training of `verify`'s attack should take.

        Args:
            thorough: all attacks, not the usual ones.
        """
        tokens = min(BATCH_ROWS, max(self.rows // 2, 1)) * self.length
        runs = 2 * sum(attack.trainings for attack in (FULL if thorough else QUICK))
        about = duration(PRODUCTS * self.weights * tokens * STEPS * runs / rate(self.device))
        low = ", of low-rank updates: all weights do not fit" if too_large(TRAINING_BYTES * self.weights, self.device) else ""
        return f"verify trains {runs} times {STEPS} steps, here about {about}{low}"
