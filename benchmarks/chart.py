"""Draw the benchmarks' charts with the report's own pen, as files that a page can show."""

from __future__ import annotations

from pathlib import Path

from liborth_cli.verify.report import palette, plot
from liborth_cli.verify.report.markup import element, render
from liborth_cli.verify.result import Plot

FOLDER = Path(__file__).parents[1] / "docs" / "charts"
STYLE = Path(plot.__file__).with_name("style.css")
WIDTH, ROW, COLUMN = 520, 18, 260


def write_chart(name: str, drawn: Plot) -> str:
    """Write docs/charts/NAME.svg, with a legend under the axes, and return its place as seen from docs/."""
    FOLDER.mkdir(exist_ok=True)
    picture = plot.draw(drawn, labelled_by="title")
    top = int(float(str(picture.attributes["viewBox"]).split()[3]))
    names = []
    for number, series in enumerate(drawn.series):
        x, y = COLUMN * (number % 2), top + 16 + ROW * (number // 2)
        sample = [palette.line("M0 6H26", number), palette.mark(13, 6, number)]
        names.append(element("g", sample, transform=f"translate({x} {y})"))
        names.append(element("text", series.label, x=x + 34, y=y + 10.5, class_="tick"))
    height = top + 24 + ROW * -(-len(drawn.series) // 2)
    style = STYLE.read_text(encoding="utf-8").replace("]]>", "") + "text { font: 12px system-ui, sans-serif }"
    body = render(picture) + "".join(map(render, names))
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {WIDTH + 16} {height + 16}">'
        f'<title id="title">{drawn.alt}</title>'
        f'<style><![CDATA[{style}]]></style><rect x="-8" y="-8" width="100%" height="100%" fill="#fff"/>'
        f'<svg width="{WIDTH}" height="{top}" {body.strip()[5:]}</svg>\n'
    )
    (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
    return f"charts/{name}.svg"
