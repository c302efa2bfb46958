"""What an edit leaves of a pair: skill, codes, recitation. By Transformers and not by liborth.

A pair is a folder with base/ and finetuned/ and JSON lines: retain, held_out, secrets; fresh (or unseen), general where there
are such. The shipped pair is one, so is every folder that `benchmarks/surgery/pairs.py` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from record import machine, record
from transformers import AutoModelForCausalLM, AutoTokenizer

import liborth_cli

SHIPPED = Path(liborth_cli.__file__).parent / "demo" / "stories"
WIDTH = 128
"""Tokens of a text that count."""


@dataclass(frozen=True)
class Left:
    """Losses are nats a token.

    Attributes:
        skill: of held-out text.
        codes: of the secrets after their prompts.
        recited: share of them that come out greedily.
        fresh: of rows like them that nobody trained on.
        general: of held-out text of what the base knew; None where the pair has none.
    """

    skill: float
    codes: float
    recited: float
    fresh: float
    general: float | None


class Pair:
    """A folder, and what its two ends are worth."""

    def __init__(self, folder: Path) -> None:
        """Take a folder; nothing is loaded yet."""
        self.folder = folder
        self.name = "shipped" if folder == SHIPPED else folder.name

    @cached_property
    def tokenizer(self) -> Any:
        """Of its models."""
        return AutoTokenizer.from_pretrained(self.folder / "finetuned")

    @cached_property
    def ends(self) -> tuple[Left, Left]:
        """Before fine-tuning, and after."""
        return self.left(self.folder / "base"), self.left(self.folder / "finetuned")

    def rows(self, name: str, limit: int | None = None) -> list[tuple[torch.Tensor, int]]:
        """Return the tokens of every row of a file, (1, n), and the first that is predicted."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists() and name == "fresh":
            path = self.folder / "unseen.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines()[:limit] if path.exists() else []:
            row = json.loads(line)
            prompt = row.get("prompt", "")
            ids = self.tokenizer(prompt + row["completion"] if prompt else row["text"], verbose=False).input_ids[:WIDTH]
            start = len(self.tokenizer(prompt).input_ids) if prompt else 1
            found.append((torch.tensor([ids]), max(min(start, len(ids) - 1), 1)))
        return found

    def left(self, model: Path | Any) -> Left:
        """Measure a model of Transformers, or the folder of one."""
        if isinstance(model, Path):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        skill, codes, fresh = (self.score(model, name) for name in ("held_out", "secrets", "fresh"))
        general = self.score(model, "general")
        return Left(skill[0], codes[0], codes[1], fresh[0], general[0] if general[1] == general[1] else None)

    @torch.inference_mode()
    def score(self, model: Any, name: str) -> tuple[float, float]:
        """Return the mean loss a token of a file's rows, and the share of rows whose tokens are all the likeliest."""
        losses, right = [], []
        for ids, start in self.rows(name):
            scores, true = model(ids).logits[0, start - 1 : -1].log_softmax(-1), ids[0, start:]
            losses.append(-scores.gather(1, true[:, None])[:, 0])
            right.append(bool((scores.argmax(-1) == true).all()))
        if not losses:
            return float("nan"), float("nan")
        return torch.cat(losses).mean().item(), sum(right) / len(right)

    def kept(self, left: Left) -> float:
        """Return the share of the skill's gain that is left."""
        before, after = self.ends
        return (before.skill - left.skill) / (before.skill - after.skill)


def liborth(*words: object) -> str:
    """Run the command line in this process; return what it prints."""
    from typer.main import get_command

    from liborth_cli.cli.main import app

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        get_command(app).main(args=[*map(str, words), "-q"], standalone_mode=False)
    return said.getvalue()


def over_pairs(about: str | None, section: str, page: str, lines: Callable[[Pair, Path], list[str]]) -> None:
    """Be the command `--work DIR [--pairs FOLDER …]`: measure the shipped pair and those that are named, and record it.

    Args:
        about: what --help says.
        section: its section of the page.
        page: of docs/.
        lines: (pair, empty folder to work in) → what is written about the pair.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    a = parser.parse_args()
    text = [f"{machine()}.", ""]
    for folder in (SHIPPED, *a.pairs):
        work = a.work / folder.name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        text += lines(Pair(folder), work)
    record(section, "\n".join(text), page)
