"""What the site has beyond docs/: the pages of the root, one page a command, and links that lead out of docs/ made plain.

MkDocs calls these functions (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"README.md": "readme.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LIST = re.compile(r"^(?! *(?:[-*]|\d+\.) | {2,}|$|#|\|)(.+)\n(?=(?:[-*]|\d+\.) )", re.MULTILINE)
"""A line of text right above a list: GitHub begins a list there, Markdown wants an empty line."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    for source, name in FROM_ROOT.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for command, text in commands().items():
        files.append(File.generated(config, f"commands/{command}.md", content=f"# liborth {command}\n{text}"))
    return files


def commands() -> dict[str, str]:
    """Return the section of every command in docs/cli.md."""
    sections = re.split(r"^## liborth ?", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    cut = [section.partition("\n") for section in sections]
    return {name.strip(): text for name, _, text in cut if name.strip()}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to pages of the site where there are some, and leave the name alone where there is none."""
    here = page.file.src_uri
    if here == "cli.md":
        markdown = re.sub(
            r"^(## liborth (\w+))\n", r"\1\n\n[On a page of its own](commands/\2.md)\n", markdown, flags=re.MULTILINE
        )
    folder = ROOT if here in FROM_ROOT.values() else (ROOT / "docs" / here).parent
    markdown = LINK.sub(lambda found: _link(found, folder, here.count("/")), markdown)
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LIST.sub(r"\1\n\n", markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LIST.sub(r"\1\n\n", markdown[last:])])


def _link(found: re.Match[str], folder: Path, depth: int) -> str:
    text, target, anchor = found[1], found[2], found[3] or ""
    if "://" in target:
        return found[0]
    path = (folder / target).resolve()
    if path.parent == ROOT and path.name in FROM_ROOT:
        return f"[{text}]({'../' * depth}{FROM_ROOT[path.name]}{anchor})"
    docs = ROOT / "docs"
    if path.is_relative_to(docs) and path.is_file() and path.suffix in (".md", ".svg"):
        return f"[{text}]({'../' * depth}{path.relative_to(docs).as_posix()}{anchor})"
    if not path.exists():
        return found[0]
    return text
