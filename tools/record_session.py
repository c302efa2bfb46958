"""Record a terminal session for the README: real commands, what they really print, as an SVG that needs nothing else.

python tools/record_session.py docs/charts/session.svg
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

DEMO = Path(__file__).parents[1] / "liborth_cli" / "demo" / "stories"
WIDTH, LONGEST = 118, 14
SESSION = (
    "liborth split base/ finetuned/ --retain-data retain.jsonl --forget-data secrets.jsonl -o general/",
    "liborth verify general/ --retain-data held_out.jsonl --canary secrets.jsonl --fresh unseen.jsonl --relearn",
    "liborth excise general/ --beta 1 -o restored/",
    "cmp finetuned/model.safetensors restored/model.safetensors && echo the same, byte for byte",
)


def record(out: Path) -> None:
    """Run the session on copies of the demo's files and draw it."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": str(WIDTH)}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["cp", "-r", f"{DEMO}/.", folder], check=True)
        for line in SESSION:
            console.print(Text("$ ", style="bold green") + Text(line, style="bold"))
            words = line.replace("liborth ", f"{sys.executable} -m liborth_cli ", 1) if line.startswith("liborth") else line
            done = subprocess.run(words, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
            shown = [text for text in [*done.stdout.splitlines(), *done.stderr.splitlines()] if text.strip()]
            shown = shown if len(shown) <= LONGEST else [*shown[: LONGEST // 2], "  …", *shown[-(LONGEST // 2) :]]
            for text in shown:
                style = "red" if text.startswith("error:") else "default"
                console.print(Text(text, style=style), overflow="ellipsis", no_wrap=True)
            if done.returncode:
                console.print(Text(f"(exit code {done.returncode})", style="dim"))
    svg = console.export_svg(title="liborth", theme=DIMMED_MONOKAI, unique_id="session")
    out.write_text(_self_contained(svg), encoding="utf-8")


def _self_contained(svg: str) -> str:
    """Take out the fonts that rich would load from elsewhere; the browser's own fixed pitch stands in."""
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
