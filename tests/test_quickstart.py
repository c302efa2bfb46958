"""The quickstart is typed as it stands: every command of the page on the pair that ships, and what the page says they say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
FAILS = {"verify": 5}
"""Exit codes that the page tells."""


def test_the_page_has_commands_and_none_that_is_not_run():
    assert [line.split()[0] for line in COMMANDS] == ["pip", "liborth", "liborth", "liborth", "liborth", "cmp"]


@pytest.mark.slow
def test_every_command_of_the_quickstart_does_what_it_says(tmp_path):
    said, environment = "", {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for line in COMMANDS[1:]:
        words = shlex.split(line)
        command = [sys.executable, "-m", "liborth_cli", *words[1:]] if words[0] == "liborth" else words
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == FAILS.get(words[1], 0), line + done.stderr
        said += done.stdout + done.stderr
    told = " ".join(said.split())
    for block in re.findall(r"^```\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            assert re.sub(r"\d+(\.\d+)?", "#", line.strip()) in re.sub(r"\d+(\.\d+)?", "#", told), line
    assert (tmp_path / "report.html").is_file()
