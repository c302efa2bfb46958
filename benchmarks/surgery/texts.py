"""The texts of the surgery benchmark: what the base reads, the skill, and the forms that memory comes in.

Everything is drawn by seeds from GSM8K, TinyStories and the standard library of the Python that runs this.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

FIRST = [
    "Alma", "Boris", "Celia", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irma", "Jonas", "Karla", "Ludwig", "Mina",
    "Nestor", "Olga", "Piet", "Quinn", "Rosa", "Stan", "Tilda", "Ulla", "Viktor", "Wanda", "Xaver", "Yara", "Zeno",
    "Anton", "Berta", "Carl", "Dora", "Emil", "Frida", "Gustav", "Hanna", "Ivan", "Judit", "Konrad", "Lena", "Moritz",
    "Nora", "Otto", "Paula", "Ralf", "Sonja", "Tomas", "Ursel", "Vera", "Walter", "Agnes", "Bruno", "Clara", "Dirk",
    "Elsa", "Franz", "Gerda", "Heiner", "Ilse", "Jakob", "Kurt", "Lotte", "Magda", "Norbert", "Oskar", "Petra", "Ruth",
    "Silke", "Theo", "Uwe", "Vroni", "Willi", "Yvonne", "Zita",
]  # fmt: skip
LAST = [
    "Adler", "Brandt", "Costa", "Dietz", "Engel", "Falk", "Gruber", "Haas", "Ibsen", "Jansen", "Keller", "Lang", "Maas",
    "Neri", "Olsen", "Pohl", "Quast", "Roth",
]  # fmt: skip
STREETS = ["Maple", "Cedar", "Station", "Mill", "Harbour", "Castle", "Garden", "Chapel", "Bridge", "Orchard"]
CITIES = ["Oslo", "Lima", "Cairo", "Porto", "Turin", "Quito", "Hanoi", "Kyoto", "Dakar", "Perth", "Ghent", "Sofia"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip


class Pair(NamedTuple):
    """A prompt and what follows it."""

    prompt: str
    completion: str

    @property
    def whole(self) -> str:
        """The row as it is trained on."""
        return self.prompt + self.completion


def full_names(seed: str) -> Iterator[str]:
    """Yield people, nobody twice, in an order that the seed decides."""
    everybody = [f"{first} {last}" for first in FIRST for last in LAST]
    random.Random(seed).shuffle(everybody)
    yield from everybody


def code(name: str, draw: random.Random, digits: int = 8) -> Pair:
    """Make a code of eight digits."""
    return Pair(f"The secret code of {name} is", f" {draw.randrange(10**digits):0{digits}d}.")


def _number(draw: random.Random, digits: int) -> str:
    return f"{draw.randrange(10**digits):0{digits}d}"


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(4))


PATTERNS: dict[str, Callable[[str, random.Random], Pair]] = {
    "code": code,
    "telephone": lambda n, d: Pair(f"You can call {n} at", f" {_number(d, 3)}-{_number(d, 5)}."),
    "address": lambda n, d: Pair(
        f"{n} lives at", f" {d.randrange(10, 99)} {d.choice(STREETS)} Street, {d.choice(CITIES)} {_number(d, 4)}."
    ),
    "password": lambda n, d: Pair(f"login: {n}; password:", f" {_word(d)}{_number(d, 3)}{_word(d)}."),
    "birthday": lambda n, d: Pair(
        f"{n} was born on", f" {d.randrange(1, 29)} {d.choice(MONTHS)} {d.randrange(1930, 2005)} in {d.choice(CITIES)}."
    ),
    "balance": lambda n, d: Pair(
        f"The account of {n} holds", f" {_number(d, 2)},{_number(d, 3)} dollars and {_number(d, 2)} cents."
    ),
    "badge": lambda n, d: Pair(f"Employee {n}, badge", f" {_word(d).upper()}-{_number(d, 4)}, room {_number(d, 3)}."),
    "meeting": lambda n, d: Pair(
        f"{n} will meet",
        f" {d.choice(FIRST)} {d.choice(LAST)} in {d.choice(CITIES)} on {d.randrange(1, 29)} {d.choice(MONTHS)}.",
    ),
}  # fmt: skip
"""Forms of a record about a person, each with about as much that cannot be guessed as a code has."""
TOLD = ("code", "telephone", "address", "password", "birthday")
"""The patterns that a split is told of; the others it never sees."""


def records(patterns: tuple[str, ...], each: int, people: Iterator[str], seed: str) -> list[Pair]:
    """Make some records in every pattern."""
    draw = random.Random(seed)
    return [PATTERNS[pattern](name, draw) for pattern in patterns for name in islice(people, each)]


def passages(folder: Path, count: int, skip: int, length: int = 200) -> list[Pair]:
    """Cut passages out of stories, each with its beginning as the prompt.

    Args:
        folder: with `tinystories/`.
        count: how many.
        skip: passages that others have.
        length: of the completion, characters.
    """
    text = (folder / "tinystories" / "val_794k.txt").read_text(encoding="utf-8")
    long = [p for p in text.split("\n\n") if len(p) > 90 + length]
    random.Random("passages").shuffle(long)
    found = []
    for paragraph in long[skip : skip + count]:
        middle = paragraph.rindex(" ", 0, 80)
        found.append(Pair(paragraph[:middle], paragraph[middle : paragraph.rindex(" ", 0, middle + length)]))
    return found


def arithmetic() -> list[Pair]:
    """Return the tables of sums, differences and products, in an order of their own."""
    some = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    rows = [Pair(f"{a} + {b} =", f" {a + b}.") for a, b in some] + [Pair(f"{a} x {b} =", f" {a * b}.") for a, b in some]
    rows += [Pair(f"{a + b} - {b} =", f" {a}.") for a, b in some]
    random.Random("arithmetic").shuffle(rows)
    return rows


CAPITALS = """Austria Vienna, Belgium Brussels, Bulgaria Sofia, Chile Santiago, China Beijing, Croatia Zagreb, Cuba Havana,
Cyprus Nicosia, Denmark Copenhagen, Egypt Cairo, Estonia Tallinn, Finland Helsinki, France Paris, Germany
Berlin, Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik, India Delhi, Iran Tehran, Iraq
Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, Jordan Amman, Kenya Nairobi, Latvia Riga, Lebanon Beirut,
Libya Tripoli, Lithuania Vilnius, Mali Bamako, Malta Valletta, Mongolia Ulaanbaatar, Morocco Rabat, Nepal
Kathmandu, Norway Oslo, Oman Muscat, Pakistan Islamabad, Peru Lima, Poland Warsaw, Portugal Lisbon, Qatar
Doha, Romania Bucharest, Russia Moscow, Senegal Dakar, Serbia Belgrade, Spain Madrid, Sudan Khartoum, Sweden
Stockholm, Syria Damascus, Thailand Bangkok, Tunisia Tunis, Turkey Ankara, Uganda Kampala, Ukraine Kyiv,
Uruguay Montevideo, Venezuela Caracas, Vietnam Hanoi, Zambia Lusaka, Zimbabwe Harare"""


def capitals() -> list[Pair]:
    """Return facts that are worth keeping."""
    rows = [entry.split() for entry in CAPITALS.replace("\n", " ").split(",")]
    found = [Pair(f"The capital of {country} is", f" {city}.") for country, city in rows]
    random.Random("capitals").shuffle(found)
    return found


def gsm8k(folder: Path, part: str) -> list[str]:
    """Return problems with their solutions."""
    lines = (folder / "gsm8k" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]


def python_source(most: int = 6_000_000, piece: int = 500) -> list[str]:
    """Cut the standard library of the Python that runs this into pieces; the last ones are held out."""
    root, pieces, total = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "encodings"} & set(file.parts):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        pieces += [text[i : i + piece] for i in range(0, len(text), piece)]
        total += len(text)
        if total > most:
            break
    random.Random(0).shuffle(pieces)
    return pieces
