"""What is installed: the same bytes from the same sources, and no code from the directory one happens to stand in."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from liborth_cli import __version__
from tools.release_check import metadata

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))


@pytest.mark.parametrize("start", [["-m", "liborth_cli"], ["-c", "from liborth_cli.cli.main import run; run()"]])
def test_nothing_is_imported_from_the_working_directory(tmp_path, start):
    for name in ("torch", "numpy", "yaml", "safetensors", "typer", "json5", "liborth_kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    safe = {} if start[0] == "-m" else {"PYTHONSAFEPATH": "1"}  # an installed script has its own directory first, not this one
    result = subprocess.run(
        [sys.executable, *start, "inspect", ROOT / "tests" / "data" / "owngpt" / "base"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS, **safe},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_wheel_has_the_same_bytes_twice(tmp_path):
    pytest.importorskip("hatchling")
    made = []
    for name in ("one", "two"):
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1580601600"}
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / name]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
        (wheel,) = (tmp_path / name).iterdir()
        made.append(wheel.read_bytes())
    assert made[0] == made[1]
    told = metadata(wheel)  # what pip, pipx and uvx go by
    assert (
        told["Version"] == __version__ and told["Requires-Python"] == ">=3.11" and "torch>=2.4" in told.get_all("Requires-Dist")
    )
    with zipfile.ZipFile(wheel) as archive:
        (scripts,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert archive.read(scripts).decode().split() == ["[console_scripts]", "liborth", "=", "liborth_cli.cli.main:run"]
