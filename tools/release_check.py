"""Install a wheel and a source archive each into a fresh environment, and run what was installed: `make release-check`.

    python tools/release_check.py dist

Dependencies come from the environment that runs this (a `.pth` file leads to them), so nothing is downloaded; what is tried is
that the archives hold all they should: entry point, data of the demo, manual page, type marker, kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

TRY = """
import importlib.resources, liborth_cli, liborth_kernels, sys
assert liborth_cli.__file__.startswith(sys.prefix), liborth_cli.__file__
root = importlib.resources.files("liborth_cli")
for name in ("py.typed", "demo/stories/base/model.safetensors", "verify/report/page.html", "chart/chart.css"):
    assert root.joinpath(name).is_file(), name
print(liborth_cli.__version__)
"""


def check(archive: Path, folder: Path) -> str:
    """Install one archive and run it; return the version it says.

    Raises:
        CalledProcessError: when anything of it fails.
    """
    venv.create(folder, with_pip=True)
    python, site = folder / "bin" / "python", next((folder / "lib").iterdir()) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--force-reinstall", archive]

    def run(*words: object) -> str:
        return subprocess.run(
            [*map(str, words)], check=True, text=True, stdout=subprocess.PIPE, env=environment, cwd=folder
        ).stdout

    run(*install)
    version = run(python, "-I", "-c", TRY).strip()
    liborth, stories = folder / "bin" / "liborth", site / "liborth_cli" / "demo" / "stories"
    assert run(liborth, "--version").strip() == version
    run(liborth, "split", stories / "base", stories / "finetuned", "--method", "svd", "--rank", 8, "-o", "general", "-q")
    run(liborth, "excise", "general", "--beta", 1, "-o", "restored", "-q")
    restored = (folder / "restored" / "model.safetensors").read_bytes()
    assert restored == (stories / "finetuned" / "model.safetensors").read_bytes(), "beta 1 is not the fine-tuned file"
    assert (folder / "share" / "man" / "man1" / "liborth.1").is_file()
    return version


def main(dist: Path) -> None:
    """Check the newest wheel and the newest source archive of a folder."""
    for pattern in ("*.whl", "*.tar.gz"):
        archive = max(dist.glob(pattern), key=lambda file: file.stat().st_mtime)
        with tempfile.TemporaryDirectory() as folder:
            print(f"{archive.name}: liborth {check(archive.resolve(), Path(folder) / 'env')} installs and runs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
