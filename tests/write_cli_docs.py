"""Write docs/cli.md from the commands' own --help. `make docs` runs it, and a test holds the page against it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMMANDS = ("", "split", "excise", "inspect", "demo")


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


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
