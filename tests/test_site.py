"""The documentation builds as a site, strictly: every page, every link, every anchor; one page a command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_and_no_link_leads_nowhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", ROOT / "mkdocs.yml", "-d", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"quickstart.html", "readme.html", "commands/split.html", "commands/push.html"} <= pages
    for name in pages - {"404.html"}:
        for target in re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="([^"]+)"', (tmp_path / name).read_text()):
            assert not target.startswith(("http:", "https:", "//")) or "canonical" in target, (name, target)


def test_every_page_is_in_the_navigation_or_said_to_be_left_out():
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    there = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert there <= listed
    assert listed - there == {"readme.md", "changelog.md", "security.md"}
