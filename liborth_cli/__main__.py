"""`python -m liborth_cli` is `liborth`, but for the working directory: Python puts it first, and a torch.py there would run."""

import contextlib
import os
import sys
from pathlib import Path

with contextlib.suppress(FileNotFoundError):  # the directory was deleted, which the command says
    if os.path.realpath(sys.path[0]) == os.path.realpath(".") != str(Path(__file__).resolve().parents[1]):
        del sys.path[0]

from liborth_cli.cli.main import run

run()
