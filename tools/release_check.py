"""Install a wheel and a source archive each into a fresh environment, and run what was installed: `make release-check`.

    python tools/release_check.py dist

Dependencies come from the environment that runs this (a `.pth` file leads to them), so nothing is downloaded; what is tried is
that the archives hold all they should: entry point, data of the demo, manual page, type marker, kernels.

Then the wheel is given to pipx and to uvx, where these can be installed; pipx installs the dependencies too, as constraints.txt
has them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
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


def check_runners(wheel: Path, folder: Path) -> str:
    """Let pipx install a wheel and uvx run it, and say what was tried.

    Raises:
        CalledProcessError: when one of them cannot.
    """
    venv.create(folder, with_pip=True)
    tools = folder / "bin"
    if subprocess.run([tools / "python", "-m", "pip", "install", "-q", "pipx", "uv"]).returncode:
        return "pipx and uvx cannot be installed here, and were not tried"
    site = sysconfig.get_path("purelib")
    dropped = folder / "dropped.txt"  # uvx finds these on PYTHONPATH: another index than pip's may have another torch
    needs = [re.split("[<>=]", need)[0] for need in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in need]
    dropped.write_text("".join(f"{name} ; sys_platform == 'nowhere'\n" for name in needs))
    uvx = [tools / "uvx", "-q", "--offline", "--python", sys.executable, "--overrides", dropped, "--from", wheel, "liborth"]
    environment = {**os.environ, "UV_CACHE_DIR": str(folder / "uv"), "PYTHONPATH": site}
    said = {subprocess.run([*uvx, "--version"], env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()}
    place = {f"PIPX_{name}": str(folder / name) for name in ("HOME", "BIN_DIR", "MAN_DIR")}
    pinned = f"--pip-args=-c {Path(__file__).parents[1] / 'constraints.txt'}"
    install = [tools / "pipx", "install", "-q", "--python", sys.executable, pinned, wheel]
    subprocess.run(install, env={**os.environ, **place}, check=True, stdout=subprocess.DEVNULL)
    script = folder / "BIN_DIR" / "liborth"
    said.add(subprocess.run([script, "--version"], check=True, text=True, stdout=subprocess.PIPE).stdout.strip())
    assert (folder / "MAN_DIR" / "man1" / "liborth.1").exists() and said == {metadata(wheel)["Version"]}
    return "pipx installs it with its dependencies, uvx runs it"


def metadata(wheel: Path) -> Message:
    """Read what a wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def main(dist: Path) -> None:
    """Check the newest wheel and the newest source archive of a folder, and what runs a wheel."""
    for pattern in ("*.whl", "*.tar.gz"):
        archive = max(dist.glob(pattern), key=lambda file: file.stat().st_mtime)
        with tempfile.TemporaryDirectory() as folder:
            print(f"{archive.name}: liborth {check(archive.resolve(), Path(folder) / 'env')} installs and runs")
    wheel = max(dist.glob("*.whl"), key=lambda file: file.stat().st_mtime).resolve()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{wheel.name}: {check_runners(wheel, Path(folder) / 'env')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
