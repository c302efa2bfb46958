"""What the pages name exists: links, files of this repository, commands, flags, targets of make."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liborth_cli.cli.main import app, group

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")])
FOLDERS = [ROOT / folder for folder in ("", "liborth_cli", "kernels", "docs")]
"""Where a path in backticks may begin."""


def flags_of(*command: str) -> set[str]:
    """Return the flags that a command's help lists."""
    shown = CliRunner().invoke(app, [*command, "--help"]).output
    columns = re.findall(r"^  (-[^\s,]+(?:, -[^\s,]+)*)", shown, flags=re.MULTILINE)
    return {flag for one in columns for flag in one.split(", ")}


COMMANDS = {name: flags_of(name) for name in group().commands}
ROOT_FLAGS = flags_of()
PLACEHOLDER = re.compile(r"\bNAME\b|\bOP(_|\b)|\b(OUT|MODEL|BASE|DIR|FILE)\b")


@cache
def names() -> set[str]:
    """Return the name of every file of the repository that a page may speak of."""
    folders = ("liborth_cli", "kernels", "tests", "benchmarks", "tools", "docs")
    return {path.name for folder in folders for path in (ROOT / folder).rglob("*")} | {path.name for path in ROOT.iterdir()}


def spans(text: str) -> list[str]:
    """Return what stands in single backticks, outside fences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def blocks(text: str) -> list[str]:
    """Return the command lines of indented and fenced blocks, whole: continued lines joined, comments gone."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    indented = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    joined = re.sub(r"\\\n\s*", "", f"{fenced}\n{indented}")
    return [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]


def command_lines(text: str) -> list[str]:
    """Return every `liborth …` that a page shows, without the brackets around what may be left out; a pipe is two of them."""
    shown = [part.strip() for line in [*blocks(text), *spans(text)] for part in line.split(" | ")]
    return [line.replace("[", "").replace("]", "") for line in shown if line.startswith("liborth ")]


def unknown(line: str) -> list[str]:
    """Return what a command line has that the command line has not: the name of the command, or its flags."""
    _, *words = shlex.split(line)
    if words[0].startswith("-"):
        return [word for word in words if word not in ROOT_FLAGS]
    if words[0] not in COMMANDS:
        return words[:1]
    given = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    return [flag for flag in given if flag not in COMMANDS[words[0]]]


def is_ours(span: str) -> bool:
    """Say whether a span names a file or a folder of this repository."""
    if PLACEHOLDER.search(span) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]*)*", span):
        return False
    return span.startswith(("liborth_cli/", "kernels/", "tests/", "benchmarks/", "tools/", "docs/")) or bool(
        re.search(r"\w\.(py|md|html|css|js)$", span)
    )


def anchors(page: Path) -> set[str]:
    """Return what links to the headings of a page end in."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    for target, heading in [
        (page.parent / target if target else page, heading) for target, heading in links if "://" not in target
    ]:
        assert target.exists(), target
        assert not heading or heading in anchors(target), f"{target.name}#{heading}"


@every_page
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    bare = re.findall(r"(?<![\w/`.])(?:tests|liborth_cli|benchmarks|tools)/[\w./-]*\w", text)
    for path in [*filter(is_ours, spans(text)), *bare]:
        assert path in names() if "/" not in path else any((folder / path).exists() for folder in FOLDERS), path


@every_page
def test_commands_flags_and_targets_of_make_exist(page):
    if page.name == "cli.md":
        pytest.skip("it is written from the commands")
    text = page.read_text(encoding="utf-8")
    for line in command_lines(text):
        assert not unknown(line), line
    words = [word for span in spans(text) if span.startswith("--") for word in span.split()]
    flags = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
    assert flags <= ROOT_FLAGS.union(*COMMANDS.values())
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = [re.match(r"(?:\w+=\S+ )?make ([a-z0-9-]+)", line) for line in [*blocks(text), *spans(text)]]
    assert {found[1] for found in shown if found} <= set(targets)


@every_page
def test_no_section_stands_twice(page):
    sections = re.findall(r"^## .+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    marks = re.findall(r"^<!-- [\w-]+ -->$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert len(marks) == len(set(marks)), "a table that a command writes has one place"


def test_the_page_of_the_command_line_knows_every_command_and_flag():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, flags in COMMANDS.items():
        section = text.partition(f"\n## liborth {name}\n")[2].partition("\n## ")[0]
        assert section, name
        assert not {flag for flag in flags if flag.startswith("--") and flag not in section}, f"liborth {name}: run `make docs`"


def test_what_does_not_exist_is_found():
    assert unknown("liborth split base/ ft/ --no-such-flag 3") == ["--no-such-flag"]
    assert unknown("liborth verify-deep out/") == ["verify-deep"]
    assert command_lines("    liborth split a b \\\n        --bad x  # why\n") == ["liborth split a b --bad x"]
    assert is_ours("liborth_cli/nowhere.py") and not is_ours("OUT.private/") and not is_ours("liborth_cli/cli/NAME.py")


def test_every_decision_has_a_number_of_its_own():
    files = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    numbers = [file.name[:4] for file in files]
    assert len(numbers) == len(set(numbers)), "two branches took the same number"
    assert all(file.read_text().startswith(f"# {file.name[:4]} ") for file in files)
