"""Run the commands of a source tree on the pairs that ship with liborth and print a hash of everything they write.

Two trees that print the same lines compute the same: `python tools/hash_outputs.py --tree OLD > old.txt`, the same for NEW, and
`diff`. Every tensor of every file is hashed by name, whatever file it lies in (the memory has moved between versions);
verify's numbers are printed to six digits. Everything runs in forks of one process that has imported torch, on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORIES, OWNGPT = ROOT / "liborth_cli" / "demo" / "stories", ROOT / "tests" / "data" / "owngpt"
PAIR, CODES = f"{STORIES}/base {STORIES}/finetuned", f"{STORIES}/secrets.jsonl"
FORGET = f"curvature {STORIES}/finetuned --reference {STORIES}/base --at 0.5 --fisher empirical --data {CODES}"
RETAIN = f"curvature {STORIES}/finetuned --data {STORIES}/retain.jsonl --tokens 2000"
BOTH = "--retain retain --forget forget"
SHORT = f"--data {STORIES}/held_out.jsonl --steps 2 --batch-size 2 --seq-len 64 --truncate"

STEPS = {
    # curvature, in every form a method asks for
    "retain": f"{RETAIN} --moments exact --diagonal",
    "marginal": f"{RETAIN} --moments marginal --eigen",
    "forget": FORGET,
    "forget-start": FORGET.replace("--at 0.5", "--at 0.25"),
    "tokens": f"{FORGET} --per-token",
    "marginal-2": f"{RETAIN} --moments marginal".replace("retain.jsonl", "held_out.jsonl"),
    "merged": "curvature marginal marginal-2 --merge",
    "owngpt-retain": f"curvature {OWNGPT}/finetuned --data {OWNGPT}/shakespeare_tail.txt --tokens 2000 --moments marginal",
    # split, every method and every kind of amount
    "svd-rank": f"split {PAIR} --method svd --rank 8",
    "svd-rank-top": f"split {PAIR} --method svd --rank 2 --memory-side top",
    "svd-exact": f"split {PAIR} --method svd --rank 8 --svd exact",
    "svd-edge": f"split {PAIR} --method svd --noise-edge",
    "svd-energy": f"split {PAIR} --method svd --energy 0.9 --alpha 1.5",
    "magnitude": f"split {PAIR} --method magnitude --density 0.3",
    "random": f"split {PAIR} --method random --energy 0.5 --seed 3",
    "scale": f"split {PAIR} --method scale --scale 0.7 --vectors memory",
    "diagonal": f"split {PAIR} --method diagonal --mass 0.9 --retain retain",
    "kfac": f"split {PAIR} --method kfac --mass 0.9 --retain retain --out-shard-size 200KB",
    "ekfac": f"split {PAIR} --method ekfac --mass 0.9 --retain retain",
    "ekfac-marginal": f"split {PAIR} --method ekfac --threshold 1e-6 --retain marginal",
    "contrastive": f"split {PAIR} --method contrastive --strength 0.1 {BOTH} --vectors split",
    "contrastive-two": f"split {PAIR} --method contrastive --strength 0.1 {BOTH} --forget forget-start --damping 1e-3",
    "contrastive-hard": f"split {PAIR} --method contrastive --strength 0.1 --hard {BOTH} --sides input",
    "contrastive-rank": f"split {PAIR} --method contrastive --strength 0.1 {BOTH} --factor-rank 16",
    "tokenwise": f"split {PAIR} --method tokenwise --strength 0.1 --retain retain --forget tokens",
    "overrides": f"split {PAIR} --method svd --rank 8 --for down=rank:2 --for up=skip --for gate=drop -e embed --added memory",
    "alone": f"split {STORIES}/finetuned {{ONE}} --method kfac --mass 0.9 --retain retain",
    "from-texts": f"split {PAIR} --method tokenwise --strength 0.1 --retain-data {STORIES}/retain.jsonl --retain-tokens 1000 "
    f"--forget-data {CODES}",
    "owngpt-svd": f"split {OWNGPT}/base {OWNGPT}/finetuned --method svd --rank 4",
    "owngpt-kfac": f"split {OWNGPT}/base {OWNGPT}/finetuned --method kfac --mass 0.8 --retain owngpt-retain --vectors split",
    # excise
    "clean": "excise tokenwise --beta 0",
    "restored": "excise tokenwise --beta 1",
    "half": "excise kfac --beta 0.5",
    "skill-half": f"excise svd-rank --beta 0.5 --alpha 0.5 --reference {STORIES}/base",
    # tune
    "tune-full": f"tune {STORIES}/base --method full {SHORT}",
    "tune-lora": f"tune {STORIES}/base --method lora {SHORT}",
    "tune-ogd": f"tune {STORIES}/base --method ogd {SHORT} --retain-data {STORIES}/retain.jsonl",
    "tune-sinks": f"tune {STORIES}/base --method sinks {SHORT} --sinks 8 --private-data {CODES}",
    # verify
    "verify": f"verify tokenwise --reference {STORIES}/base --finetuned {STORIES}/finetuned --canary {CODES} "
    f"--fresh {STORIES}/unseen.jsonl --retain-data {STORIES}/held_out.jsonl --lmc --sweep --controls --entanglement "
    "{NEUTRAL} --json",
}
NEWER = {"{ONE}": "--one-checkpoint", "{NEUTRAL}": "--no-require"}
"""Options that trees have had to be given since some version; left out where a tree does not know them."""


def main() -> None:
    """Run the steps that were asked for, each in a fork."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="source tree whose commands run")
    parser.add_argument("--work", type=Path, help="keep the outputs here")
    parser.add_argument("--only", default="", help="regex of steps; what they need must be in --work already")
    asked = parser.parse_args()
    tree = asked.tree.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    import torch  # noqa: F401  (once, before the forks)

    known = (tree / "docs" / "cli.md").read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        folder = asked.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-hashes-")))
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        for name, words in STEPS.items():
            if re.search(asked.only, name):
                report(name, _fork(name, [NEWER.get(w, w) for w in words.split() if NEWER.get(w, known) in known]))


def report(name: str, code: int) -> None:
    """Print what a step left behind."""
    log = Path(f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print(f"{name}: exit {code}" + (f" ({log[-1][:200]})" if code and log else ""))
    for line in (
        _numbers(json.loads(Path(f"{name}.out").read_text())["results"]) if name == "verify" and not code else _tensors(name)
    ):
        print(f"  {line}")
    sys.stdout.flush()


def _fork(name: str, words: list[str]) -> int:
    out = [] if words[0] == "verify" else ["-o", name]
    for left in (name, f"{name}.private"):
        shutil.rmtree(left, ignore_errors=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for stream, file in ((1, f"{name}.out"), (2, f"{name}.log")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["liborth", *words, *out, *([] if words[0] == "tune" else ["-j", "1"])]
        runpy.run_module("liborth_cli", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tensors(name: str) -> Iterator[str]:
    """Yield `tensor dtype shape hash` for every tensor of an output and of the private directory beside it, by name."""
    lines = []
    for folder in (Path(name), Path(f"{name}.private")):
        for file in sorted(f for f in folder.rglob("*") if f.is_file() and ".safetensors" in f.name and f.suffix != ".json"):
            inner = file.relative_to(folder).parts[:-1]
            raw = file.read_bytes()
            start = 8 + int.from_bytes(raw[:8], "little")
            for tensor, entry in json.loads(raw[8:start]).items():
                if tensor != "__metadata__" and "factors" not in inner:
                    first, last = (start + offset for offset in entry["data_offsets"])
                    digest = hashlib.sha256(raw[first:last]).hexdigest()[:16]
                    lines.append(f"{'/'.join((*inner, tensor))} {entry['dtype']} {entry['shape']} {digest}")
    yield from sorted(lines)


def _numbers(value: object, path: str = "") -> Iterator[str]:
    """Yield every number and truth of a JSON document by its path; what a figure draws is left out."""
    if isinstance(value, dict):
        for key in sorted(set(value) - {"figures"}):
            yield from _numbers(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            named = isinstance(entry, dict) and entry.get("check")
            yield from _numbers(entry, f"{path}[{named or number}]")
    elif isinstance(value, float):
        yield f"{path} = {value:.6g}" if math.isfinite(value) else f"{path} = {value}"
    elif isinstance(value, bool | int):
        yield f"{path} = {value}"


if __name__ == "__main__":
    main()
