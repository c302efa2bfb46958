"""Ranks without torchrun: the processes and the environment that it makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ZYGOTE = Path(__file__).with_name("zygote.py")


@dataclass
class Done:
    """What became of the ranks of one command, each by its number."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: list[float]
    wall: float


class Ranks:
    """Starts ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "LIBORTH_RANK_TIMEOUT": "20"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        environment["PYTHONPATH"] = os.pathsep.join([str(ZYGOTE.parents[2]), str(ZYGOTE.parents[2] / "kernels")])
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, str(ZYGOTE)], stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        assert self._from.readline() == "ready\n"

    def start(self, size: int, folder: Path, *words: object, **more: object) -> list[int]:
        """Start a command on so many ranks; return their process ids."""
        job = {"size": size, "folder": str(folder), "words": [str(word) for word in words], **more}
        self._to.write(json.dumps(job) + "\n")
        self._to.flush()
        return json.loads(self._from.readline())

    def wait(self) -> Done:
        """Wait for all ranks that were started last."""
        return Done(**json.loads(self._from.readline()))

    def __call__(self, size: int, folder: Path, *words: object, **more: object) -> Done:
        """Run a command on so many ranks."""
        self.start(size, folder, *words, **more)
        return self.wait()

    def close(self) -> None:
        self._to.close()
        self._process.wait()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.close()
