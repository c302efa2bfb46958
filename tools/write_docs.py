"""Write docs/cli.md from the commands' own --help, and the demo's table into the README. `make docs` runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
README = ROOT / "README.md"
COMMANDS = ("", "split", "excise", "curvature", "verify", "tune", "inspect", "demo")


def render() -> str:
    """Return the page."""
    parts = ["# Command line\n\nWritten by `make docs` from the commands' own help.\n"]
    for command in COMMANDS:
        words = [command] if command else []
        environment = {**os.environ, "COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1"}
        help_text = subprocess.run(
            [sys.executable, "-m", "liborth_cli", *words, "--help"], capture_output=True, text=True, check=True, env=environment
        ).stdout
        text = "\n".join(line.rstrip() for line in help_text.splitlines()).strip()
        parts.append(f"## liborth {command}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(parts).replace("python -m liborth_cli", "liborth")


def demo_table() -> str:
    """Run the demo and return what it prints."""
    command = [sys.executable, "-m", "liborth_cli", "demo", "-q"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in shown.splitlines()).strip()


if __name__ == "__main__":
    block = f"<!-- demo -->\n```\n{demo_table()}\n```\n<!-- /demo -->"
    page = re.sub(r"<!-- demo -->.*<!-- /demo -->", lambda _: block, README.read_text(encoding="utf-8"), flags=re.DOTALL)
    README.write_text(page, encoding="utf-8")
    PAGE.write_text(render(), encoding="utf-8")
