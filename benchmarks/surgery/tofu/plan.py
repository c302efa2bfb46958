"""What a run of TOFU is given, where its parts lie, and the rows it reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from benchmarks.surgery.job import Completion
from benchmarks.surgery.tofu.tiers import Tier
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.files import read_json_lines
from liborth_cli.stream.records import Record
from liborth_cli.verify.checks.tofu import FORGET, RETAIN, Item, TofuOptions, read_sets
from liborth_cli.verify.rows import evenly

FORGETS = ("forget01", "forget05", "forget10")
"""Sets of authors that may go."""
RETAIN_ROWS = 900
"""Questions of authors that stay which an edit is given."""


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        tier: how much is done.
        given: checkpoint that is fine-tuned; None where the tier makes one.
        data: folder of TOFU's files.
        stories: file of stories, which a base that is made reads; None where one is given.
        work: where checkpoints lie.
        results: where what was measured lies, a small file for each thing.
        forget: name of the forget set, one of FORGETS.
        device: cpu or cuda.
        seed: of everything random.
        deadline: seconds since the epoch after which no new part begins.
        facts: edits are given real authors and world facts too, so all that the never-trained model is trained on.
    """

    tier: Tier
    given: Path | None
    data: Path
    stories: Path | None
    work: Path
    results: Path
    forget: str
    device: str
    seed: int
    deadline: float
    facts: bool = False

    @property
    def model(self) -> Path:
        """Where the model that is fine-tuned lies."""
        return self.given or self.work / "base"

    @property
    def finetuned(self) -> Path:
        """Where the model trained on all authors lies."""
        return self.work / "finetuned"

    def never(self, number: int = 0) -> Path:
        """Return where a model trained without the forget set lies; the second one differs by its seed."""
        return self.work / f"never-{self.forget}{'-again' * number}"

    @cached_property
    def encoder(self) -> TextEncoder:
        """The model's tokenizer."""
        return TextEncoder(self.model)

    def others(self) -> list[Record]:
        """Return the questions of all authors outside the forget set."""
        return self._records(f"retain{100 - int(self.forget.removeprefix('forget')):02d}")

    def going(self) -> list[Record]:
        """Return the questions of the authors that must go."""
        return self._records(self.forget)[: self.tier.going]

    def staying(self) -> list[Record]:
        """Return those of the authors that stay."""
        return self.others()[: self.tier.staying]

    def given_records(self) -> list[Record]:
        """Return what an edit is given of the authors that stay, evenly from all of them."""
        every = self.staying()
        return every[:: -(-len(every) // RETAIN_ROWS)]

    def row(self, record: Record) -> Completion:
        """Turn one into tokens."""
        ids, keep = self.encoder.encode(record)
        return Completion([int(i) for i in ids], int(keep.argmax()))

    def sets(self) -> dict[str, list[Item]]:
        """Return TOFU's four sets of questions with wrong answers: of the authors that were trained on, evenly."""
        found = read_sets(TofuOptions(self.data, self.forget))[1]
        found[FORGET], found[RETAIN] = found[FORGET][: self.tier.going], found[RETAIN][: self.tier.staying]
        return {name: evenly(items, self.tier.most) for name, items in found.items()}

    def _records(self, name: str) -> list[Record]:
        return [
            Record(name, text=fields["answer"], prompt=f"Question: {fields['question']}\nAnswer: ")
            for _, fields in read_json_lines(self.data / f"{name}.json")
        ]


@cache
def end_of_text(model: Path) -> int | None:
    """Return the id of the token that ends an answer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).eos_token_id


def load(folder: Path, device: str) -> Any:
    """Load a checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
