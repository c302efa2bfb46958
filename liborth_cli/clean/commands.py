"""The commands that `clean` types, who carries them out, and where each leaves what it makes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli.clean.request import CleanRequest, Method

if TYPE_CHECKING:
    from liborth_cli.clean.aside import Aside

GENERAL, ROWS, CERTIFICATE, REPORT = "general", "rows", "certificate.json", "report.html"
"""In OUT.private."""
UNLISTED = "unlisted.jsonl"
"""In ROWS: what is like the private rows, known by heart, and not among them."""


@dataclass(frozen=True)
class Typist:
    """Who carries commands out: the command line.

    Attributes:
        carry_out: does what the words behind `liborth` say.
        plan: returns what such words print, and lets nothing be heard of it.
        kept: commands that go on with --resume.
    """

    carry_out: Callable[[Sequence[str]], None]
    plan: Callable[[Sequence[str]], str]
    kept: frozenset[str]


@dataclass(frozen=True)
class Step:
    """One command of this tool.

    Attributes:
        words: what is typed after `liborth`.
        makes: what is there when it has run.
        decisive: those of the words that decide what that is: not where it runs, and how much it says.
    """

    words: tuple[str, ...]
    makes: Path
    decisive: tuple[str, ...]

    @property
    def command(self) -> str:
        """Its name."""
        return self.words[0]

    def __str__(self) -> str:
        """As it is typed."""
        return shlex.join(("liborth", *self.words))


@dataclass(frozen=True)
class Task:
    """What the commands are made of.

    Attributes:
        request: what is asked.
        place: OUT.private.
        method: of the split.
        attack_rank: of the updates that recall's attack inside trains; 0: all weights.
    """

    request: CleanRequest
    place: Path
    method: Method
    attack_rank: int = 0

    @property
    def pair(self) -> tuple[str, str]:
        """Checkpoints before fine-tuning and after it, as they were named."""
        return self.request.base, self.request.finetuned

    @property
    def unlisted(self) -> Path:
        """Where the search leaves what it finds."""
        return self.place / ROWS / UNLISTED

    def search(self, private: str, aside: Aside, texts: int) -> Step:
        """Write the search for rows like the private ones that are not listed.

        Args:
            private: file of those that are.
            aside: the rows of the others.
            texts: that the model writes.
        """
        public = _each("--retain-data", (*aside.retain, *aside.held_out))
        like = ["extract", *self.pair, "--like", private, "--texts", str(texts), *public, *self.request.words.seed]
        return self._step(like, ["-o", str(self.unlisted)], self.unlisted)

    def split(self, private: str, aside: Aside) -> Step:
        """Write the split."""
        out, words = self.place / GENERAL, self.request.words
        forms = ["--forget-patterns", aside.forms] if aside.forms else _each("--forget-pattern", self.request.given.patterns)
        made = ["split", *self.pair, "--method", self.method.value, "--forget-data", private]
        made += [*_each("--retain-data", aside.retain), *forms, *(["--fresh", aside.level] if aside.level else [])]
        made += ["--attack-rank", str(self.attack_rank)] if self.attack_rank and self.method is Method.RECALL else []
        return self._step([*made, *words.seed, *words.kernels], ["-o", str(out)], out)

    def verify(self, private: str, aside: Aside) -> Step:
        """Write the verification; what decides is the attack, so it is made however long it takes."""
        out, words, (base, finetuned) = self.place / CERTIFICATE, self.request.words, self.pair
        held = ["verify", str(self.place / GENERAL), "--reference", base, "--finetuned", finetuned, "--canary", private]
        held += [*_each("--retain-data", aside.held_out), *(["--fresh", aside.fresh] if aside.fresh else []), "--patient"]
        held += [*(["--attacks"] if self.request.attacks else []), *words.seed]
        return self._step(held, ["--out", str(out), "--report", str(self.place / REPORT)], out)

    def excise(self) -> Step:
        """Write the last command: the checkpoint without the memory."""
        out = self.request.out
        return self._step(["excise", str(self.place / GENERAL), "--beta", "0"], ["-o", str(out)], out)

    def steps(self, private: str, aside: Aside) -> list[Step]:
        """Write all that follow the search: the split, its verification, the checkpoint."""
        return [self.split(private, aside), self.verify(private, aside), self.excise()]

    def _step(self, words: Sequence[str], end: Sequence[str], makes: Path) -> Step:
        """Put together what is typed; how it runs stands before its outputs."""
        return Step((*words, *self.request.words.running, *end), makes, (*words, *end))


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]
