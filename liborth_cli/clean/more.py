"""A list that is made whole: rows like the private ones that the model knows by heart and nobody listed go as well."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from liborth_cli.checkpoint.documents import json_lines
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import FILE_MODE
from liborth_cli.clean.aside import Given, weighed
from liborth_cli.errors import BadInput
from liborth_cli.stream.texts import DataFile

PRIVATE = "private.jsonl"
"""In the rows of OUT.private: those of the list, and those that were found."""


@dataclass(frozen=True)
class More:
    """What was found beside the private rows.

    Attributes:
        count: how many rows.
        told: whether rows that were learnt could be told from those that are made up.
        given: the texts, with the file of all private rows in place of the one that was named.
    """

    count: int
    told: bool
    given: Given

    def __str__(self) -> str:
        """What came of asking."""
        if self.count:
            some = "1 row like the private ones is" if self.count == 1 else f"{self.count} rows like the private ones are"
            goes = "goes" if self.count == 1 else "go"
            return f"{some} known by heart and not listed, and {goes} as well: {self.given.private}"
        few = "asks for too few of these to tell which of the others are made up"
        answer = "says none by heart as often as those that are listed" if self.told else few
        return f"# asked for rows like the private ones, the model {answer}"


def with_more(given: Given, found: Path, folder: Path) -> More:
    """Write the private rows, and those that the model asks for as often as for learnt ones, into one file.

    Args:
        given: the texts as they were named.
        found: what `liborth extract --like` wrote of them; no such file where nobody looked.
        folder: private.

    Raises:
        BadInput: when a fresh row is among those that were found.
    """
    lines = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()] if found.is_file() else []
    often, told = [line for line in lines if line.get("often")], all("often" in line for line in lines)
    (folder / PRIVATE).unlink(missing_ok=True)
    if not often:
        return More(0, told, given)
    rows = [{"prompt": line["prompt"], "completion": line["completion"]} for line in often]
    said = {row["prompt"] + row["completion"] for row in rows}
    for record in DataFile.parse(given.fresh, "--fresh", secret=True).records(_untold) if given.fresh else ():
        if record.prompt + record.text in said:
            raise BadInput(
                f"--fresh: {record.where}: the fine-tuned model knows it by heart, so it was trained on: take it out"
            )
    listed = weighed(DataFile.parse(given.private, "--private", secret=True), _untold)
    write_file(folder / PRIVATE, json_lines([*(record.fields() for record in listed), *rows]), FILE_MODE)
    return More(len(rows), told, replace(given, private=str(folder / PRIVATE)))


def _untold(line: str) -> None:
    """Hear what a file holds for the second time."""
