"""Does cutting only where tracing points beat cutting everywhere, at equal forgetting? On the shipped pair.

    python benchmarks/tracing.py --work DIR        # writes its table into docs/verify.md

Tracing runs before any cutting (the general model is the one before fine-tuning). Its rules leave out the parts that together
hold less than a share of the codes; tokenwise divides the rest, over a grid of strengths. Controls: no rules, and rules that
leave out as many parts drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from decoding import PAIR, encoded
from record import machine, record
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARES = (0.1, 0.3, 0.5)
STRENGTHS = (0.03, 0.1, 0.3, 1)
POINTS = (0.25, 0.5, 0.75)


def liborth(*words: object) -> str:
    """Run the command line; return what it prints."""
    command = [sys.executable, "-m", "liborth_cli", *map(str, words), "-q"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@torch.inference_mode()
def left(folder: Path) -> tuple[float, float, float]:
    """Return the loss of held-out text, the loss of the codes, and the share recited, by Transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def rows(file: str) -> list[tuple[torch.Tensor, bool]]:
        found = []
        for ids, start in encoded(tokenizer, file):
            scores, true = model(ids).logits[0, start - 1 : -1].log_softmax(-1), ids[0, start:]
            found.append((-scores.gather(1, true[:, None])[:, 0], bool((scores.argmax(-1) == true).all())))
        return found

    skill, codes = rows("held_out.jsonl"), rows("secrets.jsonl")
    mean = [torch.cat([loss for loss, _ in some]).mean().item() for some in (skill, codes)]
    return mean[0], mean[1], sum(said for _, said in codes) / len(codes)


def traced(work: Path) -> dict[str, list[str]]:
    """Trace the codes in the uncut pair; return the rules of every share, and as many at random."""
    uncut = work / "uncut"
    liborth("split", PAIR / "base", PAIR / "finetuned", "--method", "scale", "--scale", 0.001, "-o", uncut)
    rules: dict[str, list[str]] = {"everywhere": []}
    for share in SHARES:
        words = ("--tracing", "--trace-rules", share, "--canary", PAIR / "secrets.jsonl", "--no-require", "--json")
        document = json.loads(liborth("verify", uncut, *words))
        found = next(result for result in document["results"] if result["check"] == "tracing")
        rules[f"without the parts that hold {share:.0%}"] = found["facts"]["rules"]
    parts = [rf"\.{block}\.{part}\.=skip" for block in range(5) for part in ("self_attn", "mlp")]
    most = rules[f"without the parts that hold {SHARES[-1]:.0%}"]
    rules[f"without {len(most)} parts at random"] = random.Random(0).sample(parts, len(most))
    return rules


def main() -> None:
    """Trace, take curvature once, split with every set of rules at every strength, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    shutil.rmtree(a.work, ignore_errors=True)
    a.work.mkdir(parents=True)
    rules = traced(a.work)
    liborth("curvature", PAIR / "finetuned", "--data", PAIR / "retain.jsonl", "-o", a.work / "retain")
    felt = ("--reference", PAIR / "base", "--fisher", "empirical", "--per-token", "--data", PAIR / "secrets.jsonl")
    for t in POINTS:
        liborth("curvature", PAIR / "finetuned", *felt, "--at", t, "-o", a.work / f"forget-{t}")
    factors = ("--retain", a.work / "retain", *(word for t in POINTS for word in ("--forget", a.work / f"forget-{t}")))
    base, tuned = left(PAIR / "base"), left(PAIR / "finetuned")
    table = ["| cut | parts left out | λ | skill kept | codes, nats | recited |", "|---|---|---|---|---|---|"]
    for name, skipped in rules.items():
        for strength in STRENGTHS:
            words = ["--method", "tokenwise", "--strength", strength, *factors, "-o", a.work / "out", "--force"]
            words += [word for rule in skipped for word in ("--for", rule)]
            liborth("split", PAIR / "base", PAIR / "finetuned", *words)
            skill, codes, recited = left(a.work / "out")
            kept = (base[0] - skill) / (base[0] - tuned[0])
            table.append(f"| {name} | {len(skipped)} of 10 | {strength:g} | {kept:.2%} | {codes:.2f} | {recited:.0%} |")
            print(table[-1], flush=True)
    record("tracing", "\n".join([f"{machine()}.", "", *table]), "verify.md")


if __name__ == "__main__":
    main()
