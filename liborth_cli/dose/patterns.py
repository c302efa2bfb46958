"""Sentences with slots: the form of what must go, when the secrets themselves are not to be handled.

A decoy is a pattern with every slot filled by lot. It was never trained on, so it serves twice: what the model feels on it
shows where texts of this form are kept, and its loss is the never-trained level.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liborth_cli.dose.slots import KNOWN, Slot, parse_slot
from liborth_cli.errors import BadInput, UsageError

TRIES = 200
"""Fillings drawn for each decoy before the pattern is called too narrow."""


@dataclass(frozen=True)
class Decoy:
    """A filled pattern.

    Attributes:
        prompt: what stands before the last slot.
        completion: the last slot and what follows it: the part that would be secret.
    """

    prompt: str
    completion: str

    @classmethod
    def cut(cls, prompt: str, completion: str) -> Decoy:
        """Put the two together; the space before the secret belongs to it, for tokenizers read " 123" unlike "123"."""
        bare = prompt.rstrip(" ")
        return cls(bare, prompt[len(bare) :] + completion)

    @property
    def text(self) -> str:
        """The whole sentence."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Pattern:
    """A sentence with slots.

    Attributes:
        text: as it was written.
        parts: literal texts and slots, in order.
    """

    text: str
    parts: tuple[str | Slot, ...]

    @classmethod
    def parse(cls, text: str, where: str = "--forget-pattern") -> Pattern:
        """Read a pattern; `{{` and `}}` stand for braces.

        Args:
            text: such as "The secret code of {name} is {digits:8}."
            where: the option or file and line, for messages.

        Raises:
            UsageError: when a slot is unknown, a brace is open, or there is no slot at all.
        """
        parts: list[str | Slot] = []
        for token in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+", text):
            if token[1] is not None:
                parts.append(parse_slot(token[1].strip(), where))
            elif token[0] in "{}":
                raise UsageError(f"{where}: a {token[0]} stands alone; write {token[0] * 2} for the character itself")
            else:
                parts.append(token[0][0] if token[0] in ("{{", "}}") else token[0])
        if not any(isinstance(part, Slot) for part in parts):
            raise UsageError(f"{where}: no slot in it, so every decoy would be the same sentence; there are {KNOWN}")
        return cls(text, tuple(parts))

    def fill(self, draw: random.Random) -> Decoy:
        """Draw every slot."""
        filled = [part if isinstance(part, str) else part.draw(draw) for part in self.parts]
        return Decoy.cut("".join(filled[: self._last]), "".join(filled[self._last :]))

    def recognise(self, text: str) -> Decoy | None:
        """Cut a text of this form before its last slot, whatever stands in the slots; None when it is of another form."""
        parts = [re.escape(part) if isinstance(part, str) else "(?:.+?)" for part in self.parts]
        found = re.fullmatch(f"({''.join(parts[: self._last])})({''.join(parts[self._last :])})", text, re.DOTALL)
        return Decoy.cut(found[1], found[2]) if found else None

    @property
    def _last(self) -> int:
        return max(i for i, part in enumerate(self.parts) if isinstance(part, Slot))


def read_patterns(given: Sequence[str], files: Sequence[Path]) -> list[Pattern]:
    """Parse the patterns of the command line, and of files with one a line (# begins a comment).

    Raises:
        BadInput: when a file cannot be read, or holds no pattern.
        UsageError: when a pattern is malformed.
    """
    patterns = [Pattern.parse(text) for text in given]
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise BadInput(f"--forget-patterns {file}: cannot be read ({reason})") from None
        numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
        if not numbered:
            raise BadInput(f"--forget-patterns {file}: no pattern in it; write one a line")
        patterns += [Pattern.parse(line, f"{file}: line {number}") for number, line in numbered]
    return patterns


def make_decoys(patterns: Sequence[Pattern], count: int, seed: int, avoid: Sequence[str], use: str) -> list[Decoy]:
    """Fill every pattern `count` times, never twice the same way.

    Args:
        patterns: the forms.
        count: decoys of each.
        seed: of the run.
        avoid: texts that no decoy may equal or give away: the secrets, and the decoys of another use.
        use: what they are for; other uses of the same seed get other decoys.

    Returns:
        The decoys, pattern by pattern.

    Raises:
        UsageError: when a pattern has too few fillings.
    """
    known = "\n".join(avoid)
    seen: set[str] = set()
    decoys = []
    for pattern in patterns:
        draw = random.Random(hashlib.sha256(f"{seed}\0{use}\0{pattern.text}".encode()).digest())  # noqa: S311
        for number in range(count):
            for _ in range(TRIES):
                decoy = pattern.fill(draw)
                if decoy.text not in seen and not _given_away(decoy, known):
                    break
            else:
                raise UsageError(
                    f"the pattern {pattern.text!r} gave {number} decoys that are new and no given secret, and --decoys asks "
                    f"for {count}: it has too few fillings"
                )
            seen.add(decoy.text)
            decoys.append(decoy)
    return decoys


def _given_away(decoy: Decoy, known: str) -> bool:
    """Tell whether a decoy is one of the known texts, or holds the secret part of one (if that is long enough to be one)."""
    secret = decoy.completion.strip(" .,;:!?")
    return decoy.text in known or (len(secret) >= 4 and any(c.isdigit() for c in secret) and secret in known)
