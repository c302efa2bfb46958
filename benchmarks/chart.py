"""Write the benchmarks' charts where the pages show them."""

from __future__ import annotations

from pathlib import Path

from liborth_cli.chart import Plot, standalone

FOLDER = Path(__file__).parents[1] / "docs" / "charts"


def write_chart(name: str, drawn: Plot) -> str:
    """Write docs/charts/NAME.svg, and return its place as seen from docs/."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.svg").write_text(standalone(drawn), encoding="utf-8")
    return f"charts/{name}.svg"
