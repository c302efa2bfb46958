"""GSM8K and MMLU: how their files are read, how a question is put, and when an answer is right.

- **GSM8K** (Cobbe et al. 2021, arXiv 2110.14168): JSON lines with `question` and `answer`, whose last line is "#### number".
  The number of a written answer is the one after "####", else its last one; right is equal as a number.
- **MMLU** (Hendrycks et al. 2020, arXiv 2009.03300): csv files, either `question,choice0,…,choice3,answer` with a header, or
  the original six columns without one; in DIR, or DIR/test with five solved examples a subject from DIR/dev.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from liborth_cli.errors import BadInput
from liborth_cli.stream.files import read_json_lines

LETTERS = "ABCD"
NUMBER = re.compile(r"(?:(?<![\w)%])[-−])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?")
"""A minus after a digit is a dash: 15-20 are two numbers."""


@dataclass(frozen=True)
class Problem:
    """One problem of GSM8K.

    Attributes:
        question: its text.
        answer: the worked solution, with its "#### number".
        number: the number alone, without separators.
    """

    question: str
    answer: str
    number: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class Choice:
    """One question of MMLU.

    Attributes:
        question: its text.
        choices: four answers.
        answer: number of the right one.
        subject: what it is about, from the file's name.
        where: file and row.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    where: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.question, *lines, "Answer:"])


def extract(text: str) -> str | None:
    """Return the number a written answer gives: the one after "####", else its last; None where there is none."""
    text = re.split(r"\n\s*Question:|\n\n\n", text)[0]
    marked = re.search(r"####\s*\$?\s*(" + NUMBER.pattern + ")", text)
    numbers = [marked[1]] if marked else NUMBER.findall(text)
    return numbers[-1].replace(",", "").replace("−", "-") if numbers else None


def same_number(found: str | None, wanted: str) -> bool:
    """Compare two numbers as numbers: 18, 18.0 and 36/2 are the same."""
    try:
        return found is not None and Fraction(found) == Fraction(wanted)
    except (ValueError, ZeroDivisionError):
        return False


def read_problems(file: Path) -> list[Problem]:
    """Read GSM8K's JSON lines.

    Raises:
        BadInput: when the file is missing or a line is not of this format.
    """
    problems = []
    for where, fields in read_json_lines(file):
        question, answer = (fields.get(name) if isinstance(fields, dict) else None for name in ("question", "answer"))
        found = re.search(r"####\s*(-?[\d,]*\.?\d+)\s*$", answer) if isinstance(answer, str) else None
        if found is None or not isinstance(question, str) or not isinstance(answer, str):
            raise BadInput(f'{where}: needs a question, and an answer that ends in "#### number"')
        problems.append(Problem(question, answer, found[1].replace(",", "")))
    if not problems:
        raise BadInput(f"{file}: no problems in it")
    return problems


def read_choices(folder: Path) -> tuple[list[Choice], dict[str, list[Choice]]]:
    """Read MMLU's csv files.

    Args:
        folder: a directory with csv files, or with `test` and perhaps `dev` below it; or one csv file.

    Returns:
        The questions, subject by subject, and solved examples by subject.

    Raises:
        BadInput: when there are none, or a row is not of this format.
    """
    if folder.is_file():
        return _choices(folder), {}
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such file or directory; --mmlu takes MMLU's csv files")
    tests = folder / "test" if (folder / "test").is_dir() else folder
    questions = [choice for file in sorted(tests.glob("*.csv")) for choice in _choices(file)]
    if not questions:
        raise BadInput(f"{tests}: no csv files with questions here; --mmlu takes MMLU's")
    examples: dict[str, list[Choice]] = defaultdict(list)
    for file in sorted((folder / "dev").glob("*.csv")) if tests != folder else []:
        for choice in _choices(file):
            examples[choice.subject].append(choice)
    return questions, dict(examples)


def _choices(file: Path) -> list[Choice]:
    subject = re.sub(r"_(test|dev|val)$", "", file.stem)
    try:
        rows = list(csv.reader(io.StringIO(_text(file), newline=""), strict=True))
    except csv.Error:
        raise BadInput(f"{file}: not a table") from None
    if rows and [cell.strip().lower() for cell in rows[0]][:1] == ["question"]:
        rows, first = rows[1:], 2
    else:
        first = 1
    found = []
    for number, row in enumerate(rows, first):
        answer = row[5].strip() if len(row) == 6 else ""
        index = (
            LETTERS.find(answer) if len(answer) == 1 and answer in LETTERS else int(answer) if answer in list("0123") else -1
        )
        if index < 0:
            raise BadInput(f"{file}: row {number}: needs a question, four choices and the answer (0 to 3, or A to D)")
        found.append(Choice(row[0], tuple(row[1:5]), index, subject, f"{file}: row {number}"))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); --mmlu needs it") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 text (byte {error.start:,})") from None
