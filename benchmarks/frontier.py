"""The charts of docs/methods.md: what edits keep of the skill, and how far they put the secrets; from tables that stand there.

    python benchmarks/frontier.py

Reads the README's table of the pair that ships and that of SmolLM2-135M in docs/benchmarks.md, measures nothing, and writes
docs/charts/frontier-demo.svg and frontier-real.svg.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.chart import write_chart  # noqa: E402
from benchmarks.record import section_of  # noqa: E402
from liborth_cli.chart import Plot, Series  # noqa: E402

FINETUNED = "fine-tuned"
KINDS = {FINETUNED: (FINETUNED,), "controls": ("svd", "scale", "random", "magnitude")}
ROW = re.compile(r"^ +(\S.*?) {2,}[\d.]+ +(-?[\d.]+)% +([\d.]+) +\d+ of \d+ +([\d.]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Edit:
    """One model of a table.

    Attributes:
        name: what was done.
        kept: share of the skill, percent.
        secrets: loss of the secrets, nats a token.
        fresh: loss of rows that nobody trained on.
    """

    name: str
    kept: float
    secrets: float
    fresh: float

    @property
    def title(self) -> str:
        """Its name without what the table says of its place."""
        return re.sub(r"^(general|control|beside it): |,? ?\(.*?\)|, same size of edit", "", self.name).replace(" given", "")

    @property
    def kind(self) -> str:
        """The series that it stands in."""
        return next((kind for kind, names in KINDS.items() if self.title.startswith(names)), "methods")


def of_demo(page: str) -> list[Edit]:
    """Read the README's table; what was restored is the fine-tuned model again."""
    rows = [Edit(name, *map(float, numbers)) for name, *numbers in ROW.findall(section_of(page, "demo")[1])]
    return [row for row in rows if not row.name.startswith("restored")]


def of_real(page: str) -> list[Edit]:
    """Read the first table of the section; records seen thirty times are the secrets."""
    found = []
    for line in section_of(page, "real-cpu")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[2].endswith("%"):
            found.append(Edit(cells[0], float(cells[2].rstrip("%")), float(cells[3]), float(cells[8])))
    return found


def drawn(title: str, rows: list[Edit], secrets: str) -> Plot:
    """Draw them; the levels are the base, and rows that nobody trained on in the fine-tuned model."""
    base, *edits = rows
    tuned = next(row for row in edits if row.title == FINETUNED)
    series = []
    for kind in (FINETUNED, "methods", "controls"):
        mine = [row for row in edits if row.kind == kind]
        values = tuple(row.kept for row in mine), tuple(row.secrets for row in mine)
        series.append(Series(kind, *values, marks=tuple(row.title for row in mine), line=False))
    said = "; ".join(f"{row.title} keeps {row.kept:.0f} % of the skill, {secrets} at {row.secrets:.2f} nats" for row in edits)
    levels = {"before fine-tuning": base.secrets, "never trained on": tuned.fresh}
    alt = f"{said}. Before fine-tuning they stand at {base.secrets:.2f}, rows never trained on at {tuned.fresh:.2f}."
    return Plot(title, alt, "skill kept, %", f"{secrets}, nats a token", tuple(series), levels=levels)


def plots() -> dict[str, Plot]:
    """Return both charts, by the name of their file, as the tables stand now."""
    demo = of_demo((ROOT / "README.md").read_text(encoding="utf-8"))
    real = of_real((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    return {
        "frontier-demo": drawn("The pair that ships: eight codes, 0.26 M weights", demo, "secret codes"),
        "frontier-real": drawn("SmolLM2-135M: 16 records seen 30 times", real, "records"),
    }


if __name__ == "__main__":
    for name, plot in plots().items():
        write_chart(name, plot)
