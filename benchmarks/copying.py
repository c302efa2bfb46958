"""`excise` at β = 0 and β = 1 against copying the same files: what naming every byte by its hash costs.

    python benchmarks/copying.py --pair PAIR --work DIR

β = 0 is a copy, made inside the kernel, flushed, and hashed once. β = 1 is no copy: general and memory are read, combined bit
by bit, and all three are hashed. The floor is `cp` and `sync`; beside it stands SHA-256 of as much, on one thread.
"""

from __future__ import annotations

import shutil
import sys

from measure import LIBORTH, Measured, clear, divide, median, pair_parser, run
from record import machine, record

HASH = 'import sys, hashlib; [hashlib.file_digest(open(f, "rb"), "sha256") for f in sys.argv[1:]]'
"""Python's, which uses the processor's instructions for it; coreutils' may not."""


def main() -> None:
    """Measure, print and record."""
    a = pair_parser(__doc__, repeat=5).parse_args()
    shutil.rmtree(a.work, ignore_errors=True)
    a.work.mkdir(parents=True)
    split, out = a.work / "split", a.work / "out"
    divide(a.pair, split)
    general, memory = f"{split}/model-*.safetensors", f"{split}/memory-*.safetensors"
    jobs = {
        "`excise --beta 0`": [LIBORTH, "excise", str(split), "--beta", "0", "-o", str(out)],
        "`excise --beta 1`": [LIBORTH, "excise", str(split), "--beta", "1", "-o", str(out)],
        "`liborth --version`": [LIBORTH, "--version"],
        "cp and sync": ["sh", "-c", f"mkdir {out} && cp {general} {out} && sync {out}/*"],
        "SHA-256 of one": ["sh", "-c", f"{sys.executable} -c '{HASH}' {general}"],
        "SHA-256 of three": ["sh", "-c", f"{sys.executable} -c '{HASH}' {general} {general} {memory}"],
    }
    runs: dict[str, list[Measured]] = {job: [] for job in jobs}
    for _ in range(a.repeat):
        for job, command in jobs.items():
            clear(out)
            runs[job].append(run(command))
            print(job, runs[job][-1], flush=True)
    copying = median(runs["cp and sync"]).seconds
    size = sum(file.stat().st_size for file in split.glob("model-*.safetensors"))
    lines = ["| job | wall s (min–max) | of cp and sync |", "|---|---|---|"]
    for job, found in runs.items():
        times = [one.seconds for one in found]
        middle = median(found).seconds
        lines.append(f"| {job} | {middle:.2f} ({min(times):.2f}–{max(times):.2f}) | {middle / copying:.1f} × |")
    head = f"{machine()}; {size / 1e6:.0f} MB in {len(list(split.glob('model-*.safetensors')))} files, warm cache; "
    text = f"{head}median of {a.repeat} interleaved runs.\n\n" + "\n".join(lines)
    print(text)
    record("copying", text)


if __name__ == "__main__":
    main()
