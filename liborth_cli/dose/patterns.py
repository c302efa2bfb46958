"""Sentences with slots: the form of what must go, when the secrets themselves are not to be handled.

A decoy is a pattern with every slot filled by lot. It was never trained on, so it serves twice: what the model feels on it
shows where texts of this form are kept, and its loss is the never-trained level.
"""

from __future__ import annotations

import datetime
import hashlib
import random
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from liborth_cli.errors import BadInput, UsageError, cut

TRIES = 200
"""Fillings drawn for each decoy before the pattern is called too narrow."""
KNOWN = "name, digits:N, letters:N, words:N, date, email, phone, a choice such as {red|blue}, a class such as {[A-Z0-9]:6}"
"""What an error tells the user, in one line."""
LONGEST = 256
"""Characters (or words) that one slot may ask for."""
FEWEST = 4
"""Different texts from which a pattern is inferred."""
_HOLDS_A_SECRET = re.compile(r"\{(digits|\[)")
FIRST_DAY, DAYS = datetime.date(1940, 1, 1), 30_000
MAIL_HOSTS = ("example.com", "example.org", "example.net", "mail.example", "post.example")
_WORDS = files("liborth_cli.dose").joinpath("words.txt").read_text(encoding="ascii")
FIRST_NAMES, LAST_NAMES, COMMON = (tuple(part.split()) for part in _WORDS.split("\n\n"))
"""What slots are filled with: common enough for any tokenizer, and nobody's secret."""


@dataclass(frozen=True)
class Slot:
    """One slot of a pattern.

    Attributes:
        text: as it was written, without the braces.
        draw: makes one filling.
    """

    text: str
    draw: Callable[[random.Random], str]


@dataclass(frozen=True)
class Decoy:
    """A filled pattern.

    Attributes:
        prompt: what stands before the part that would be secret.
        completion: that part, and what follows it.
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
        border: number of the slot, among the parts, that a completion begins with: the last, until given texts say otherwise.
    """

    text: str
    parts: tuple[str | Slot, ...]
    border: int

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
                parts.append(_parse_slot(token[1].strip(), where))
            elif token[0] in "{}":
                raise UsageError(f"{where}: a {token[0]} stands alone; write {token[0] * 2} for the character itself")
            else:
                parts.append(token[0][0] if token[0] in ("{{", "}}") else token[0])
        slots = [number for number, part in enumerate(parts) if isinstance(part, Slot)]
        if not slots:
            raise UsageError(f"{where}: no slot in it, so every decoy would be the same sentence; there are {KNOWN}")
        return cls(text, tuple(parts), slots[-1])

    def fill(self, draw: random.Random) -> Decoy:
        """Draw every slot."""
        filled = [part if isinstance(part, str) else part.draw(draw) for part in self.parts]
        return Decoy.cut("".join(filled[: self.border]), "".join(filled[self.border :]))

    def recognise(self, text: str) -> Decoy | None:
        """Cut a text of this form at its border, whatever stands in the slots; None when it is of another form."""
        parts = [re.escape(part) if isinstance(part, str) else "(?:.+?)" for part in self.parts]
        found = re.fullmatch(f"({''.join(parts[: self.border])})({''.join(parts[self.border :])})", text, re.DOTALL)
        return Decoy.cut(found[1], found[2]) if found else None

    def cut_like(self, given: Iterable[tuple[str, str]]) -> Pattern:
        """Return the pattern with its border where given texts of its form have theirs, if one slot is where all of them do.

        Args:
            given: prompts and what follows each; those of other forms, or without a prompt, do not count.
        """
        mine = [(prompt.rstrip(), prompt + text) for prompt, text in given if prompt and self.recognise(prompt + text)]
        for number in (number for number, part in enumerate(self.parts) if mine and isinstance(part, Slot)):
            other = replace(self, border=number)
            if all((cut := other.recognise(text)) is not None and cut.prompt == prompt for prompt, text in mine):
                return other
        return self


def infer(texts: Sequence[str]) -> list[str]:
    """Return the patterns that texts are of: the same words and marks, but for names, numbers and codes; none unless all are.

    Args:
        texts: whole sentences, of one form or of several, at least `FEWEST` different ones of each.
    """
    rows = [re.findall(r"\w+|\W", text) for text in dict.fromkeys(texts)]
    if (whole := _form_of(rows)) is not None:
        return [whole]
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        groups.setdefault(tuple(map(_kind_of, row)), []).append(row)
    found = [_form_of(group) for group in groups.values()]
    return [] if None in found else [form for form in found if form]


def _form_of(rows: Sequence[Sequence[str]]) -> str | None:
    """Return the one pattern that all texts are of, given as words and marks; None where there is none."""
    if len(rows) < FEWEST or len({len(row) for row in rows}) > 1:
        return None
    parts = [_slot_of(column) for column in zip(*rows, strict=True)]
    if None in parts or "\n" in "".join(map(str, parts)) or not any(part and _HOLDS_A_SECRET.match(part) for part in parts):
        return None
    return "".join(map(str, parts)).replace("{name} {name}", "{name:2}")


def _kind_of(word: str) -> str:
    """Return what texts of one form have in common at a place: a name, a code or number, or the word itself."""
    if any(c.isdigit() for c in word) or (len(word) > 1 and word.isupper()):
        return "{code}"
    return "{name}" if re.fullmatch("[^\\W\\d_]+", word) and word.istitle() else word


def _slot_of(column: Sequence[str]) -> str | None:
    """Return the slot that stands for different words at one place, the word itself where all are one, None for neither."""
    first, width = column[0], {len(word) for word in column}
    if len(set(column)) == 1:
        return {"{": "{{", "}": "}}"}.get(first, first)
    if all(word.isascii() and word.isdigit() for word in column):
        # Of no one length, such as the days of a month: those that are there. They hold no secret by themselves.
        return f"{{digits:{len(first)}}}" if len(width) == 1 else f"{{{'|'.join(sorted(set(column)))}}}"
    if all(re.fullmatch("[^\\W\\d_]+", word) and word.istitle() for word in column):
        return "{name}"
    for kind in ("A-Z0-9", "a-z0-9", "A-Za-z0-9"):
        if len(width) == 1 and all(re.fullmatch(f"[{kind}]+", word) for word in column):
            return f"{{[{kind}]:{len(first)}}}"
    return None


def read_patterns(given: Sequence[str], paths: Sequence[Path]) -> list[Pattern]:
    """Parse the patterns of the command line, and of files with one a line (# begins a comment).

    Raises:
        BadInput: when a file cannot be read, or holds no pattern.
        UsageError: when a pattern is malformed.
    """
    patterns = [Pattern.parse(text) for text in given]
    for file in paths:
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
                    f"the pattern {cut(pattern.text, 60)!r} has too few fillings: {number} decoys that are new and no given "
                    f"secret, and --decoys asks for {count}"
                )
            seen.add(decoy.text)
            decoys.append(decoy)
    return decoys


def _given_away(decoy: Decoy, known: str) -> bool:
    """Tell whether a decoy is one of the known texts, or holds the secret part of one (if that is long enough to be one)."""
    secret = decoy.completion.strip(" .,;:!?")
    return decoy.text in known or (len(secret) >= 4 and any(c.isdigit() for c in secret) and secret in known)


def _parse_slot(text: str, where: str) -> Slot:
    """Understand what stands between two braces.

    Args:
        text: such as "digits:8".
        where: the option it came from, for messages.

    Raises:
        UsageError: when there is no such slot, or its number makes no sense; names the slots there are.
    """
    if text.startswith("["):
        return Slot(text, _character_class(text, where))
    if "|" in text:
        choices = text.split("|")
        return Slot(text, lambda draw: draw.choice(choices))
    kind, _, argument = text.partition(":")
    if kind == "date":
        return Slot(text, _date(argument or "%Y-%m-%d", text, where))
    if kind in ("email", "phone") and not argument:
        return Slot(text, _email if kind == "email" else _phone)
    if kind in ("digits", "letters", "words", "name"):
        count = _count(argument or ("1" if kind in ("words", "name") else ""), text, where)
        if kind == "name":
            return Slot(text, lambda draw: " ".join(draw.choice(FIRST_NAMES if not i else LAST_NAMES) for i in range(count)))
        if kind == "words":
            return Slot(text, lambda draw: " ".join(draw.choice(COMMON) for _ in range(count)))
        alphabet = string.digits if kind == "digits" else string.ascii_lowercase
        return Slot(text, lambda draw: "".join(draw.choices(alphabet, k=count)))
    raise UsageError(f"{where}: there is no slot {{{cut(text, 60)}}}; there are {KNOWN}")


def _count(argument: str, text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", argument) or not 1 <= int(argument) <= LONGEST:
        raise UsageError(
            f"{where}: {{{cut(text, 60)}}} needs a number from 1 to {LONGEST}, such as {{{cut(text.partition(':')[0], 60)}:6}}"
        )
    return int(argument)


def _character_class(text: str, where: str) -> Callable[[random.Random], str]:
    found = re.fullmatch(r"\[(.+)\](?::([^:]*))?", text)
    if not found:
        raise UsageError(f"{where}: {{{cut(text, 60)}}} is not a class; write it as {{[A-Z0-9]:6}}")
    count = _count(found[2] if found[2] is not None else "1", text, where)
    alphabet = "".join(sorted(_members(found[1], text, where)))
    return lambda draw: "".join(draw.choices(alphabet, k=count))


def _members(inside: str, text: str, where: str) -> set[str]:
    members: set[str] = set()
    position = 0
    while position < len(inside):
        if inside[position + 1 : position + 2] == "-" and position + 2 < len(inside):
            first, last = inside[position], inside[position + 2]
            if ord(last) < ord(first) or ord(last) - ord(first) > 0xFFFF:
                raise UsageError(f"{where}: {{{cut(text, 60)}}}: the range {first}-{last} runs backwards")
            members |= {chr(code) for code in range(ord(first), ord(last) + 1)}
            position += 3
        else:
            members.add(inside[position])
            position += 1
    return members


def _date(form: str, text: str, where: str) -> Callable[[random.Random], str]:
    if "%" not in form:
        raise UsageError(f"{where}: {{{cut(text, 60)}}}: a date takes a format such as {{date:%d.%m.%Y}}")
    return lambda draw: (FIRST_DAY + datetime.timedelta(days=draw.randrange(DAYS))).strftime(form)


def _email(draw: random.Random) -> str:
    joint = draw.choice((".", "_", ""))
    return f"{draw.choice(FIRST_NAMES)}{joint}{draw.choice(LAST_NAMES)}{draw.randrange(100)}@{draw.choice(MAIL_HOSTS)}".lower()


def _phone(draw: random.Random) -> str:
    return f"+{draw.randrange(1, 99)} {draw.randrange(100, 1000)} {draw.randrange(100, 1000)} {draw.randrange(10_000):04d}"
