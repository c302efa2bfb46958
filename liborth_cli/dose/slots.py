"""The slots of a pattern: what `{name}` or `{digits:8}` stands for, and how to draw one from a seeded generator."""

from __future__ import annotations

import datetime
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from liborth_cli.dose.words import COMMON, FIRST_NAMES, LAST_NAMES, MAIL_HOSTS
from liborth_cli.errors import UsageError

KNOWN = "name, digits:N, letters:N, words:N, date, email, phone, a choice such as {red|blue}, a class such as {[A-Z0-9]:6}"
"""What an error tells the user, in one line."""
LONGEST = 256
"""Characters (or words) that one slot may ask for."""
FIRST_DAY, DAYS = datetime.date(1940, 1, 1), 30_000


@dataclass(frozen=True)
class Slot:
    """One slot of a pattern.

    Attributes:
        text: as it was written, without the braces.
        draw: makes one filling.
    """

    text: str
    draw: Callable[[random.Random], str]


def parse_slot(text: str, where: str) -> Slot:
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
    raise UsageError(f"{where}: there is no slot {{{text}}}; there are {KNOWN}")


def _count(argument: str, text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", argument) or not 1 <= int(argument) <= LONGEST:
        raise UsageError(f"{where}: {{{text}}} needs a number from 1 to {LONGEST}, such as {{{text.partition(':')[0]}:6}}")
    return int(argument)


def _character_class(text: str, where: str) -> Callable[[random.Random], str]:
    found = re.fullmatch(r"\[(.+)\](?::([^:]*))?", text)
    if not found:
        raise UsageError(f"{where}: {{{text}}} is not a class; write it as {{[A-Z0-9]:6}}")
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
                raise UsageError(f"{where}: {{{text}}}: the range {first}-{last} runs backwards")
            members |= {chr(code) for code in range(ord(first), ord(last) + 1)}
            position += 3
        else:
            members.add(inside[position])
            position += 1
    return members


def _date(form: str, text: str, where: str) -> Callable[[random.Random], str]:
    if "%" not in form:
        raise UsageError(f"{where}: {{{text}}}: a date takes a format such as {{date:%d.%m.%Y}}")
    return lambda draw: (FIRST_DAY + datetime.timedelta(days=draw.randrange(DAYS))).strftime(form)


def _email(draw: random.Random) -> str:
    joint = draw.choice((".", "_", ""))
    return f"{draw.choice(FIRST_NAMES)}{joint}{draw.choice(LAST_NAMES)}{draw.randrange(100)}@{draw.choice(MAIL_HOSTS)}".lower()


def _phone(draw: random.Random) -> str:
    return f"+{draw.randrange(1, 99)} {draw.randrange(100, 1000)} {draw.randrange(100, 1000)} {draw.randrange(10_000):04d}"
