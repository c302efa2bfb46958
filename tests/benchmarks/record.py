"""Write a measured section into docs/benchmarks.md, between its markers, and nothing else."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def machine() -> str:
    """Describe this machine, how busy it is, and the versions that decide speed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", info)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "scipy", "numpy"))
    processor = found[1] if found else platform.processor()
    machine = f"{processor}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}"
    return f"{machine}; Python {platform.python_version()}, {libraries}"


def record(section: str, text: str) -> None:
    """Replace the text between `<!-- section -->` and `<!-- /section -->`.

    Raises:
        SystemExit: when the page has no such section.
    """
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no section {section}")
    PAGE.write_text(pattern.sub(lambda m: m[1] + text.rstrip() + "\n" + m[2], page), encoding="utf-8")
