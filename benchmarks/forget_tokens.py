"""What `tokenwise` costs as the forget tokens grow: processor time, memory and disk of their pass, and of the split.

    python benchmarks/forget_tokens.py PAIR --retain TEXTS --forget TEXTS [--tokens 6000 20000] [--tensors REGEX]

PAIR holds `base` and `finetuned`. Forget tokens are taken half way. Retain factors are measured once, on 20,000 tokens.
`--tensors` takes a part of the matrices, whose split is then a part of the cost; the pass still computes the whole model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from measure import LIBORTH, Measured, run
from record import machine, record

RETAIN_TOKENS = 20_000


def main() -> None:
    """Measure every number of tokens; print the table, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--retain", type=Path, required=True)
    parser.add_argument("--forget", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[6_000, 20_000, 50_000, 100_000])
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--memory", default="8G")
    parser.add_argument("--tensors", default="proj", help="regex of the matrices that take part")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--record", help="section of docs/benchmarks.md to write")
    a = parser.parse_args()
    base, tuned = a.pair / "base", a.pair / "finetuned"
    lines = [
        "| forget tokens | pass: CPU s | wall s | MiB | set on disk, MB | split: CPU s | wall s | MiB | CPU ms a token | steps "
        "| largest gap |",
        "|" + "---:|" * 11,
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="liborth-bench-") as folder:
        work = Path(folder)
        common = ("--seq-len", str(a.seq_len), "--truncate", "--tensors", a.tensors, "-j", a.threads, "-q")

        def curvature(name: str, data: Path, tokens: int, *words: str) -> Measured:
            given = ("curvature", str(tuned), "--data", str(data), "--tokens", str(tokens), *words, "-o", str(work / name))
            return run([LIBORTH, *given, *common])

        curvature("retain", a.retain, RETAIN_TOKENS)
        for tokens in a.tokens:
            single = ("--per-token", "--at", "0.5", "--reference", str(base), "--fisher", "empirical", "--memory", a.memory)
            taken = curvature("forget", a.forget, tokens, *single)
            disk = sum(file.stat().st_size for file in (work / "forget").iterdir())
            sets = ("--retain", str(work / "retain"), "--forget", str(work / "forget"))
            how = ("--method", "tokenwise", "--strength", str(a.strength), *sets, "-j", a.threads, "-q")
            split = run([LIBORTH, "split", str(base), str(tuned), *how, "-o", str(work / "out")])
            done = json.loads((work / "out" / "liborth.manifest.json").read_text())["tensors"].values()
            steps = [t["steps"] for t in done if "steps" in t]
            gap = max((t["gap"] for t in done if "gap" in t), default=0.0)
            seen = max((t["tokens"] for t in done if "tokens" in t), default=0)
            each = 1000 * (taken.cpu_seconds + split.cpu_seconds) / max(seen, 1)
            lines.append(
                f"| {seen:,} | {taken.cpu_seconds:.1f} | {taken.seconds:.1f} | {taken.resident_mib:.0f} | {disk / 1e6:,.0f} | "
                f"{split.cpu_seconds:.1f} | {split.seconds:.1f} | {split.resident_mib:.0f} | {each:.2f} | "
                f"{min(steps, default=0)}–{max(steps, default=0)} | {gap:.1e} |"
            )
            print(lines[-1], flush=True)
            for name in ("forget", "out", "out.private"):
                shutil.rmtree(work / name, ignore_errors=True)
    if a.record:
        head = f"{machine()}. λ {a.strength:g}, matrices `{a.tensors}`, {a.threads} threads, `--memory {a.memory}`."
        record(a.record, f"{head}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
