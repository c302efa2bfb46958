"""Draw the benchmarks' charts with the report's own pen, as files that a page can show."""

from __future__ import annotations

from pathlib import Path

from liborth_cli.verify.report import markup, plot
from liborth_cli.verify.result import Plot

FOLDER = Path(__file__).parents[2] / "docs" / "charts"
STYLE = Path(plot.__file__).with_name("style.css")


def write_chart(name: str, drawn: Plot) -> str:
    """Write docs/charts/NAME.svg and return its place as seen from docs/."""
    FOLDER.mkdir(exist_ok=True)
    picture = markup.render(plot.draw(drawn, labelled_by="title"))
    style = STYLE.read_text(encoding="utf-8").replace("]]>", "")
    head, rest = picture.split(">", 1)
    if "xmlns" not in head:
        head += ' xmlns="http://www.w3.org/2000/svg"'
    text = f"{head}><title id='title'>{drawn.alt}</title><style><![CDATA[{style}]]></style>{rest}\n"
    (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
    return f"charts/{name}.svg"
