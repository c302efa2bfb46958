"""Peak memory and disk of a split with texts: factors used block by block as they are measured, against stored sets.

    python benchmarks/one_walk.py --work DIR
    python benchmarks/one_walk.py --work DIR --search PAIR … [--target forget>=1]

Both ways divide the same pair by the same rows, at two depths of one width; the outputs must be the same bytes. Disk is what a
directory of factors held at most, looked at twenty times a second. With --search the dose is looked for: PAIR holds base,
finetuned, retain.jsonl and secrets.jsonl.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from make_pair import make_pair
from measure import LIBORTH, Measured, run
from record import machine, record

DEPTHS = (2, 6)
SHAPE = {"hidden": 512, "intermediate": 1408, "vocabulary": 2000, "keys": 512, "shards": 2}
RETAIN, FORGET = (4, 256), (12, 10)
"""Rows and tokens a row."""
LOOK_SECONDS = 0.05


class Watch:
    """Notes how many bytes a directory holds at most.

    Attributes:
        most: the largest sum of its files' sizes.
    """

    def __init__(self, folder: Path) -> None:
        """Begin with nothing seen."""
        self.most, self._folder, self._done = 0, folder, threading.Event()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look while the work is done."""
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _look(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            with suppress(OSError):  # what goes away while it is looked at
                self.most = max(self.most, sum(f.stat().st_size for f in self._folder.rglob("*") if f.is_file()))


def make(work: Path, layers: int) -> Path:
    """Make a pair and the rows, unless an earlier run has."""
    pair = work / f"pair{layers}"
    if not (pair / "forget.npy").exists():
        make_pair(pair, torch.bfloat16, "cpu", layers=layers, **SHAPE)
        draw = np.random.default_rng(0)
        for name, shape in (("retain", RETAIN), ("forget", FORGET)):
            np.save(pair / f"{name}.npy", draw.integers(3, SHAPE["vocabulary"], shape))
    return pair


def measure(pair: Path, method: str, out: Path, keep: bool, asked: Sequence[str], texts: Sequence[str]) -> tuple[Measured, int]:
    """Split once; return what it took, and the most bytes that lay in the directory of factors."""
    retain, forget = (str(pair / name) for name in texts)
    words = [LIBORTH, "split", str(pair / "base"), str(pair / "finetuned"), "--method", method, *asked]
    words += ["--retain-data", retain, "--forget-data", forget, "-j", "1", "-q"]
    watch = Watch(out.with_name(f"{out.name}.private") / "factors")
    with watch.looking():
        found = run([*words, *(["--keep-factors"] if keep else []), "-o", str(out)])
    return found, watch.most


def main() -> None:
    """Measure, print and record.

    Raises:
        SystemExit: when the two ways do not give the same bytes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--methods", nargs="+", default=["contrastive", "tokenwise"])
    parser.add_argument("--search", type=Path, nargs="+", default=[], help="pairs of which a dose is looked for")
    parser.add_argument("--target", default="forget>=1")
    a = parser.parse_args()
    lines = [
        f"| method | {'pair' if a.search else 'layers'} | factors | processor s | peak anonymous MiB | factors on disk, MB |",
        "|---|---|---|---|---|---|",
    ]
    if a.search:
        asked, texts = ["--target", a.target], ("retain.jsonl", "secrets.jsonl")
        pairs = {pair.name: pair for pair in a.search}
    else:
        asked, texts = ["--strength", "0.1"], ("retain.npy", "forget.npy")
        pairs = {str(layers): make(a.work, layers) for layers in DEPTHS}
    for method in a.methods:
        for name, pair in pairs.items():
            outs = [a.work / "walked", a.work / "stored"]
            for out, keep in zip(outs, (False, True), strict=True):
                found, most = measure(pair, method, out, keep, asked, texts)
                how = "stored" if keep else "block by block"
                lines.append(
                    f"| {method} | {name} | {how} | {found.cpu_seconds:.1f} | {found.anonymous_mib:.0f} | {most / 1e6:.0f} |"
                )
                print(lines[-1], flush=True)
            names = sorted(file.name for file in outs[0].glob("*.safetensors"))
            if filecmp.cmpfiles(outs[0], outs[1], names, shallow=False)[0] != names:
                raise SystemExit(f"{method}, {name}: the two ways differ")
            for out in outs:
                shutil.rmtree(out)
                shutil.rmtree(out.with_name(f"{out.name}.private"))
    if a.search:
        head = f"{machine()}; one thread, one run; {a.target}. Both ways gave the same bytes."
        record("one-search", f"{head}\n\n" + "\n".join(lines))
        return
    tokens = [rows * length for rows, length in (RETAIN, FORGET)]
    head = (
        f"{machine()}; {tokens[0]:,} retain and {tokens[1]} forget tokens, one thread, one run. Both ways gave the same bytes."
    )
    record("one-walk", f"{head}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
