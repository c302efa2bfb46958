"""Write a measured section into a page of docs/, between its markers, and nothing else."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def machine() -> str:
    """Describe this machine, how busy it is, and the versions that decide speed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", info)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "scipy", "numpy"))
    processor = found[1] if found else platform.processor()
    machine = f"{processor}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}"
    return f"{machine}; Python {platform.python_version()}, {libraries}"


def section_of(page: str, section: str) -> re.Match[str] | None:
    """Find what stands between `<!-- section -->` and `<!-- /section -->` of a page: its one group."""
    return re.search(rf"<!-- {section} -->\n(.*?)<!-- /{section} -->", page, re.DOTALL)


def standing(section: str, page: str = "benchmarks.md") -> str:
    """Return what stands between the markers of a section of a page of docs/ now; "" where there is no such section."""
    found = section_of((DOCS / page).read_text(encoding="utf-8"), section)
    return found[1] if found else ""


def record(section: str, text: str, page: str = "benchmarks.md") -> None:
    """Replace the text between `<!-- section -->` and `<!-- /section -->` of a page.

    Raises:
        SystemExit: when the page has no such section.
    """
    path = DOCS / page
    old = path.read_text(encoding="utf-8")
    found = section_of(old, section)
    if found is None:
        raise SystemExit(f"{path} has no section {section}")
    path.write_text(f"{old[: found.start(1)]}{text.rstrip()}\n{old[found.end(1) :]}", encoding="utf-8")
