"""What `tokenwise` costs as the forget tokens grow: processor time, memory and disk of their pass, and of the split.

    python benchmarks/forget_tokens.py PAIR --retain TEXTS --forget TEXTS [--tokens 6000 20000] [--tensors REGEX]
    python benchmarks/forget_tokens.py PAIR --retain TEXTS --forget TEXTS --walk [--tokens 100000]

PAIR holds `base` and `finetuned`. Forget tokens are taken half way. Retain factors are measured once, on 20,000 tokens.
`--tensors` takes a part of the matrices, whose split is then a part of the cost; the pass still computes the whole model.
With --walk one `split` measures its own texts and divides, nothing is stored: of the forget texts, JSONL, the first lines are
taken, and as `split` does by itself at three points of the path, so that a matrix sees every token three times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import LIBORTH, Measured, run
from record import machine, record
from tokenizers import Tokenizer

RETAIN_TOKENS = 20_000
WALKED = "| forget tokens | of a matrix, at all points | CPU s | wall s | MiB | of it anonymous | steps | largest gap |"


@dataclass(frozen=True)
class Solved:
    """What a split's manifest tells of its matrices: the most tokens, the fewest and most steps, and the largest gap."""

    tokens: int
    steps: str
    gap: float

    @classmethod
    def of(cls, out: Path) -> Solved:
        """Read the manifest of a finished split."""
        done = json.loads((out / "liborth.manifest.json").read_text())["tensors"].values()
        steps = [t["steps"] for t in done if "steps" in t]
        return cls(
            max((t["tokens"] for t in done if "tokens" in t), default=0),
            steps=f"{min(steps, default=0)}–{max(steps, default=0)}",
            gap=max((t["gap"] for t in done if "gap" in t), default=0.0),
        )


def first_lines(texts: Path, tokens: int, tokenizer: Tokenizer, out: Path) -> int:
    """Write the first lines of a JSONL file, as many as have so many tokens to predict; return how many these are."""
    counted = 0
    with out.open("w", encoding="utf-8") as file:
        for line in texts.read_text(encoding="utf-8").splitlines(keepends=True):
            counted += len(tokenizer.encode(json.loads(line)["text"]).ids) - 1
            file.write(line)
            if counted >= tokens:
                return counted
    raise SystemExit(f"{texts} has {counted:,} tokens, not {tokens:,}")


def walk(a: argparse.Namespace) -> None:
    """Measure one split from texts to checkpoint for every number of tokens; print, and record."""
    lines, tokenizer = [WALKED, "|" + "---:|" * 8], Tokenizer.from_file(str(a.pair / "base" / "tokenizer.json"))
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="liborth-bench-") as folder:
        some, out = Path(folder) / "forget.jsonl", Path(folder) / "out"
        for tokens in a.tokens:
            taken = first_lines(a.forget, tokens, tokenizer, some)
            texts = ("--retain-data", str(a.retain), "--retain-tokens", str(RETAIN_TOKENS), "--forget-data", str(some))
            what = ("--method", "tokenwise", "--strength", str(a.strength), "-i", a.tensors)
            how = ("--truncate", "--dtype", a.dtype, "-j", a.threads, "-q")
            done = run(
                [LIBORTH, "split", *(str(a.pair / side) for side in ("base", "finetuned")), *what, *texts, *how, "-o", str(out)]
            )
            found = Solved.of(out)
            lines.append(
                f"| {taken:,} | {found.tokens:,} | {done.cpu_seconds:.0f} | {done.seconds:.0f} | {done.resident_mib:.0f} | "
                f"{done.anonymous_mib:.0f} | {found.steps} | {found.gap:.1e} |"
            )
            print(lines[-1], flush=True)
            for name in (out, out.with_name("out.private")):
                shutil.rmtree(name)
    if a.record:
        how = f"λ {a.strength:g}, matrices `{a.tensors}`, {a.threads} threads, passes in {a.dtype}"
        head = f"{machine()}. {how}, factors measured block by block."
        record(a.record, f"{head}\n\n" + "\n".join(lines))


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
    parser.add_argument("--dtype", default="float32", help="of products with weights in the passes of --walk")
    parser.add_argument("--record", help="section of docs/benchmarks.md to write")
    parser.add_argument("--walk", action="store_true", help="one split that measures its own texts")
    a = parser.parse_args()
    if a.walk:
        walk(a)
        return
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
            found = Solved.of(work / "out")
            each = 1000 * (taken.cpu_seconds + split.cpu_seconds) / max(found.tokens, 1)
            lines.append(
                f"| {found.tokens:,} | {taken.cpu_seconds:.1f} | {taken.seconds:.1f} | {taken.resident_mib:.0f} | "
                f"{disk / 1e6:,.0f} | {split.cpu_seconds:.1f} | {split.seconds:.1f} | {split.resident_mib:.0f} | {each:.2f} | "
                f"{found.steps} | {found.gap:.1e} |"
            )
            print(lines[-1], flush=True)
            for name in ("forget", "out", "out.private"):
                shutil.rmtree(work / name, ignore_errors=True)
    if a.record:
        head = f"{machine()}. λ {a.strength:g}, matrices `{a.tensors}`, {a.threads} threads, `--memory {a.memory}`."
        record(a.record, f"{head}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
