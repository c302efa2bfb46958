"""How many retain tokens are enough: what an edit keeps and removes when its retain curvature saw more or fewer of them.

    python benchmarks/retain_tokens.py --base BASE --work DIR [--name gsm8k] [--threads 1]

DIR is a kind's folder of `benchmarks/surgery/pairs.py`, such as A. Everything is measured by `liborth split --probe`: skill on
held-out rows that no curvature sees, the codes by what follows their prompts. Two seeds; each draws its own labels, the rows
stay the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from record import machine, record

COUNTS = (200, 500, 1000, 2000, 5000, 10_000, 20_000, 40_000)
STRENGTHS = ("strength 0.1", "strength 1")
LEVEL = 4.0
"""Nats at which the codes count as gone (docs/methods.md)."""
SEEDS = (0, 1)


def probe(base: Path, work: Path, tokens: int, seed: int, words: list[str]) -> dict[str, Any]:
    """Measure the frontier of `contrastive` with retain factors of so many tokens."""
    data = {
        "--retain-data": "retain", "--skill-data": "held_out", "--general-data": "general",
        "--forget-data": "secrets",
    }  # fmt: skip
    given = [word for option, name in data.items() for word in (option, str(work / f"{name}.jsonl"))]
    command = ["split", str(base), str(work / "finetuned"), "--method", "contrastive", "--probe", *given, *words]
    command += ["--retain-tokens", str(tokens), "--seed", str(seed), "--truncate", "--json", "-q"]
    found = subprocess.run([sys.executable, "-m", "liborth_cli", *command], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)["dose"]


def at_level(trials: list[dict[str, Any]]) -> float | None:
    """Return the skill kept where the codes reach LEVEL, on the straight line between two doses."""
    for one, other in pairwise(trials):
        if one["forget"] < LEVEL <= other["forget"]:
            share = (LEVEL - one["forget"]) / (other["forget"] - one["forget"])
            return one["retention"] + share * (other["retention"] - one["retention"])
    return None


def row(tokens: int, runs: list[dict[str, Any]]) -> tuple[str, float | None]:
    """Average the runs of one number of tokens into a line of the table."""
    cells = []
    frontiers = [[t for t in run["frontier"] if t["method"] == "contrastive"] for run in runs]
    for strength in STRENGTHS:
        some = [t for frontier in frontiers for t in frontier if t["amount"] == strength]
        kept, forget, general = (sum(t[key] for t in some) / len(some) for key in ("retention", "forget", "general"))
        cells.append(f"{kept:.2%} / {forget:.2f} / {general:.3f}")
    reached = [at_level(frontier) for frontier in frontiers]
    known = [kept for kept in reached if kept is not None]
    last = f"{sum(known) / len(known):.2%}" if len(known) == len(reached) else "not reached"
    return f"| {tokens:,} | {' | '.join(cells)} | {last} |", sum(known) / len(known) if len(known) == len(reached) else None


def main() -> None:
    """Measure the curve, print it and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="stories")
    parser.add_argument("--include", default="proj", help="regex of the tensors that take part: the linear layers")
    parser.add_argument("--threads", type=int, default=1, help="small models are slower on more")
    parser.add_argument("--dry-run", action="store_true", help="print, and write no page")
    a = parser.parse_args()
    base = a.base or a.work / "base"
    words = ["-i", a.include, "-j", str(a.threads)]
    head = "| retain tokens | " + " | ".join(f"λ {s.split()[1]}: skill / codes / general" for s in STRENGTHS)
    lines = [f"{head} | skill where the codes reach {LEVEL:g} nats |", "|---|---|---|---|"]
    kept: dict[int, float] = {}
    for tokens in COUNTS:
        line, reached = row(tokens, [probe(base, a.work, tokens, seed, words) for seed in SEEDS])
        lines.append(line)
        if reached is not None:
            kept[tokens] = reached
        print(line, flush=True)
    best = max(kept.values(), default=0.0)
    enough = min((tokens for tokens, share in kept.items() if share >= best - 0.001), default=None)
    verdict = f"From {enough:,} tokens the skill kept is within 0.1 points of the best." if enough else "None is enough."
    text = f"{machine()}. Mean of {len(SEEDS)} seeds. {verdict}\n\n" + "\n".join(lines) + "\n"
    if a.dry_run:
        print(text)
        return
    record(f"retain-tokens-{a.name}", text)


if __name__ == "__main__":
    main()
