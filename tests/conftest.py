"""What every test may ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", str(os.cpu_count())
)  # the default goes by how busy the machine is, and manifests say it
os.environ.pop("COLUMNS", None)  # workers have the 80 that readline sets; tables are as in a pipe
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whoever does it
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what outlives a command out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("LIBORTH_CACHE", None)


@pytest.fixture
def liborth(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line in its own process, in `tmp_path`."""

    def run(*words: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "liborth_cli", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, **options)
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)} exited {result.returncode}: {result.stderr}")
        return result

    return run


@pytest.fixture(scope="session")
def once() -> Callable[..., None]:
    """Run the command line in this process for what a module makes once; it has to end with exit code 0."""
    from typer.testing import CliRunner

    from liborth_cli.cli.main import app

    def run(*words: object) -> None:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exit_code:
            raise AssertionError(f"{' '.join(map(str, words))} exited {done.exit_code}: {done.exception!r} {done.output}")

    return run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process (no import cost); return exit code, stdout and stderr."""
    from liborth_cli.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["liborth", *map(str, words)])
        code = 0
        try:
            main.run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        out, err = capsys.readouterr()
        return code, out, err

    return run
