"""Record a terminal session as docs/session.svg: `make session`. Every command is typed, and its answer is what it said.

    python tools/record_session.py docs/session.svg

The pair that ships lies in the directory where the session begins, as `liborth demo -o` lays it out. The terminal is a dumb
one, which has no colours and cannot go back in a line, so progress is told in lines.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

COLUMNS, ROWS = 118, 50
PROMPT = 'liborth generate {model} --max-new-tokens 8 --prompt "The secret code of Alma is"'
SESSION = (
    "# eight people's codes went into the fine-tune: it recites them",
    PROMPT.format(model="finetuned"),
    "# take out what the codes left in the weights, and keep what public text needs",
    "liborth split base finetuned --forget-data secrets.jsonl --retain-data retain.jsonl --strength 0.1 -o general",
    PROMPT.format(model="general"),
    "# the memory lies beside it, and gives the fine-tuned file back",
    "liborth excise general --beta 1 -o restored",
    'cmp restored/model.safetensors finetuned/model.safetensors && echo "the same, every byte"',
    "# not recited is not forgotten: next, liborth verify attacks it",
)
WITHOUT_FONTS = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""A picture that asks no other machine for fonts."""


def typed(line: str, folder: Path, environment: dict[str, str]) -> str:
    """Type a line into a terminal of its own and return what stands there then.

    Raises:
        CalledProcessError: when the command does not end with 0.
    """
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(["sh", "-c", line], cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(mine, 1 << 16):
            said += piece
    except OSError:  # what a terminal says when nobody has it open any more
        pass
    os.close(mine)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, line, said)
    return said.decode().replace("\r\n", "\n").rstrip("\n")


def record(lines: tuple[str, ...] = SESSION) -> Console:
    """Type every line and return a console that has the session on it."""
    from liborth_cli.demo import DATA

    screen = Console(record=True, width=COLUMNS, file=StringIO(), highlight=False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "demo"
        shutil.copytree(DATA, folder)
        (folder / "bin").mkdir()
        (folder / "bin" / "liborth").write_text(f'#!/bin/sh\nexec {sys.executable} -m liborth_cli "$@"\n')
        (folder / "bin" / "liborth").chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        for line in lines:
            screen.print(Text.assemble(("$ ", "bold green"), (line, "bright_black" if line.startswith("#") else "bold")))
            if not line.startswith("#"):
                screen.print(Text(typed(line, folder, environment)))
    return screen


if __name__ == "__main__":
    target = Path(sys.argv[1])
    picture = record().export_svg(title="liborth", code_format=WITHOUT_FONTS, unique_id="session")
    target.write_text("\n".join(line.rstrip() for line in picture.splitlines()).strip() + "\n", encoding="utf-8")
    print(target)
