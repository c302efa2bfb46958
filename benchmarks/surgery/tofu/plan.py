"""What a run of TOFU is given, where its parts lie, and the rows it reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from benchmarks.surgery.job import Completion
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.files import read_json_lines
from liborth_cli.stream.records import Record
from liborth_cli.verify.checks.tofu import Item, TofuOptions, read_sets

RETAIN_ROWS = 900
"""Questions of authors that stay which an edit is given."""


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        model: checkpoint that is fine-tuned.
        data: folder of TOFU's files.
        work: where checkpoints lie.
        results: where what was measured lies, a small file for each thing.
        forget: name of the forget set: forget01, forget05 or forget10.
        device: cpu or cuda.
        seed: of everything random.
        tiny: a few rows and steps, to see that every part runs.
        deadline: seconds since the epoch after which no new part begins.
    """

    model: Path
    data: Path
    work: Path
    results: Path
    forget: str
    device: str
    seed: int
    tiny: bool
    deadline: float

    @property
    def retained(self) -> str:
        """Name of the set of all other authors."""
        return f"retain{100 - int(self.forget.removeprefix('forget')):02d}"

    @property
    def finetuned(self) -> Path:
        """Where the model trained on all authors lies."""
        return self.work / "finetuned"

    @property
    def never(self) -> Path:
        """Where the model trained without the forget set lies."""
        return self.work / f"never-{self.forget}"

    @cached_property
    def encoder(self) -> TextEncoder:
        """The model's tokenizer."""
        return TextEncoder(self.model)

    def questions(self, name: str) -> list[tuple[str, str]]:
        """Return the questions and answers of one of TOFU's training files."""
        found = [(fields["question"], fields["answer"]) for _, fields in read_json_lines(self.data / f"{name}.json")]
        return found[:8] if self.tiny else found

    def records(self, name: str) -> list[Record]:
        """Return them as liborth reads them."""
        return [
            Record(name, text=answer, prompt=f"Question: {question}\nAnswer: ") for question, answer in self.questions(name)
        ]

    def row(self, record: Record) -> Completion:
        """Turn one into tokens."""
        ids, keep = self.encoder.encode(record)
        return Completion([int(i) for i in ids], int(keep.argmax()))

    def rows(self, name: str) -> list[Completion]:
        """Return the rows of a training file."""
        return [self.row(record) for record in self.records(name)]

    def given_records(self) -> list[Record]:
        """Return what an edit is given of the authors that stay, evenly from all of them."""
        every = self.records(self.retained)
        return every[:: -(-len(every) // RETAIN_ROWS)]

    def sets(self) -> dict[str, list[Item]]:
        """Return TOFU's four sets of questions with wrong answers."""
        return read_sets(TofuOptions(self.data, self.forget, limit=4 if self.tiny else 100))[1]


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
