"""Write docs/cli.md and docs/liborth.1 from the commands' --help, and the demo's table into the README: `make docs`."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from liborth_cli import __version__, errors
from liborth_cli.cli.main import COMMANDS, app

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
MANUAL = ROOT / "docs" / "liborth.1"
README = ROOT / "README.md"


def help_texts(columns: int) -> dict[str, str]:
    """Return what --help says: of all together under "", of each command under its name."""
    found = {}
    for name in ("", *COMMANDS):
        words = [*([name] if name else []), "--help"]
        shown = CliRunner().invoke(app, words, prog_name="liborth", terminal_width=columns - 2, catch_exceptions=False)
        found[name] = "\n".join(line.rstrip() for line in shown.stdout.splitlines()).strip()
    return found


def render(columns: int = 110) -> str:
    """Return the page."""
    parts = ["# Command line\n\nWritten by `make docs` from the commands' own help.\n"]
    parts += [f"## liborth {name}".rstrip() + f"\n\n```\n{text}\n```\n" for name, text in help_texts(columns).items()]
    return "\n".join(parts)


def manual(columns: int = 76) -> str:
    """Return the manual page, in man(7)."""
    kinds = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.LiborthError)]
    codes = [(kind.exit_code, kind.__doc__ or "") for kind in kinds if kind is not errors.Stopped]
    lines = [f'.TH LIBORTH 1 "" "liborth {__version__}"', ".SH NAME", f"liborth \\- {_roff(app.info.help or '').lower()}"]
    for name, text in help_texts(columns).items():
        lines += [f".SH {'SYNOPSIS' if not name else f'LIBORTH {name.upper()}'}", ".nf", _roff(text), ".fi"]
    lines += [".SH EXIT STATUS", ".TP", "0", "done"]
    for code, meaning in sorted(codes):
        lines += [".TP", str(code), _roff(meaning.split("\n")[0])]
    lines += [".TP", "130, 143", "stopped by Ctrl-C or SIGTERM"]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in escaped.splitlines())


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
    MANUAL.write_text(manual(), encoding="utf-8")
