"""Pictures of the documentation: the charts are what the tables say, and the session asks for nothing from elsewhere."""

import re
from xml.etree import ElementTree

from test_docs import ROOT

from benchmarks.frontier import of_demo, of_real, plots
from liborth_cli.chart import standalone
from tools.record_session import SESSION, record

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_charts_are_what_the_tables_say():
    demo = of_demo(README)
    assert [row.title for row in demo][:2] == ["base", "fine-tuned"] and len(demo) == 8
    assert {row.title.split(",")[0] for row in demo if row.kind == "controls"} == {"svd", "scale", "random"}
    real = of_real((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    assert real[1].title == "fine-tuned" and real[1].kept == 100 and {row.kind for row in real[2:]} >= {"methods", "controls"}
    for name, plot in plots().items():
        drawn = (ROOT / "docs" / "charts" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == standalone(plot), "run `make docs`"


def test_the_session_shows_what_would_be_typed_and_loads_nothing():
    picture = (ROOT / "docs" / "session.svg").read_text(encoding="utf-8")
    shown = "".join(ElementTree.fromstring(picture).itertext()).replace("\xa0", " ")
    assert all(line in shown for line in SESSION) and "280939." in shown and "the same, every byte" in shown
    assert not re.search(r"@import|url\((?!#)|(?:src|href)=\"(?!#)", picture) and len(picture) < 30_000


def test_a_session_is_typed_into_a_terminal():
    said = record(("test -t 1 && echo a terminal", "# not run")).export_text()
    assert said == "$ test -t 1 && echo a terminal\na terminal\n$ # not run\n"
