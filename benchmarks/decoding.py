"""Guarded decoding on the shipped pair: what stays of the skill, what the codes do, and what a token costs.

    python benchmarks/decoding.py --work DIR        # writes the table of docs/generate.md

Teacher-forced, by Transformers: the guarded distribution at every token of held-out text, of the codes and of other codes.
Controls: the general model alone (τ = −∞), the fine-tuned one alone (τ = ∞), the published rule min(p, q)/Σ, and as the general
model an edit that keeps the skill, one that keeps less of it, and the model before fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from record import machine, record
from transformers import AutoModelForCausalLM, AutoTokenizer

import liborth_cli
from liborth_cli.attachment import Attachment, open_attachment
from liborth_cli.decode import guard, threshold_of

PAIR = Path(liborth_cli.__file__).parent / "demo" / "stories"
WIDTH = 128
SPLITS = {
    "contrastive λ 0.1": ("--method", "contrastive", "--strength", 0.1),
    "svd, rank 8": ("--method", "svd", "--rank", 8),
    "the model before fine-tuning": ("--method", "scale", "--scale", 0.001),
}
Scores = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""For each row: log p with the memory and without, (tokens, vocabulary), and the true tokens, (tokens,)."""


def encoded(tokenizer: object, file: str) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the tokens of every row of a file of the pair, (1, n), and the first that is predicted."""
    for line in (PAIR / file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = row.get("prompt", "")
        ids = tokenizer(prompt + row.get("completion", row.get("text", "")), return_tensors="pt").input_ids[:, :WIDTH]
        yield ids, len(tokenizer(prompt).input_ids) if prompt else 1


def scores(model: torch.nn.Module, memory: Attachment, tokenizer: object, file: str) -> Scores:
    """Score every row of a file of the pair with both models."""
    found = []
    for ids, start in encoded(tokenizer, file):
        general = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        with memory.attached():
            tuned = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        found.append((tuned, general, ids[0, start:]))
    return found


def losses(rows: Scores, rule: object) -> tuple[float, float]:
    """Return the mean loss a token under a rule, and the share of rows that it recites greedily."""
    mixed = [(rule(tuned, general), true) for tuned, general, true in rows]
    each = torch.cat([-m.gather(1, true[:, None])[:, 0] for m, true in mixed])
    return each.mean().item(), float(np.mean([bool((m.argmax(-1) == true).all()) for m, true in mixed]))


def published(tuned: torch.Tensor, general: torch.Tensor) -> torch.Tensor:
    """The rule of near access-freeness: min(p, q), divided by its sum."""
    return torch.minimum(tuned, general).log_softmax(-1)


def level(rows: Scores) -> float:
    """Return the threshold that these rows set."""
    picked = [[side.gather(1, true[:, None])[:, 0].numpy() for side in (general, tuned)] for tuned, general, true in rows]
    return threshold_of([-general for general, _ in picked], [-tuned for _, tuned in picked])


def lines(work: Path, name: str, words: tuple[object, ...]) -> list[str]:
    """Split, score, and return the rows of the table for one general model."""
    out = work / "general"
    for place in (out, work / "general.private"):
        shutil.rmtree(place, ignore_errors=True)
    if "contrastive" in words:
        words = (*words, "--retain-data", PAIR / "retain.jsonl", "--forget-data", PAIR / "secrets.jsonl")
    command = ["split", PAIR / "base", PAIR / "finetuned", *words, "-o", out, "-q"]
    subprocess.run([sys.executable, "-m", "liborth_cli", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode(), open_attachment(out, None, model) as memory:
        files = ("held_out.jsonl", "secrets.jsonl", "unseen.jsonl")
        skill, secrets, fresh = (scores(model, memory, tokenizer, file) for file in files)
        retain = scores(model, memory, tokenizer, "retain.jsonl")
        taus = {
            "general alone": -math.inf,
            "τ 0": 0.0,
            f"τ {level(retain):.2f}, from retain text": level(retain),
            f"τ {level(fresh):.2f}, from other codes": level(fresh),
            "fine-tuned alone": math.inf,
        }
        rules = {title: lambda t, g, tau=tau: guard(t, g, tau)[0] for title, tau in taus.items()} | {"min(p, q)/Σ": published}
        table = []
        for title, rule in rules.items():
            (kept, _), (lost, recited), (other, _) = (losses(rows, rule) for rows in (skill, secrets, fresh))
            table.append(f"| {name} | {title} | {kept:.3f} | {lost:.2f} | {recited:.0%} | {other:.2f} |")
    return table


def cost(work: Path) -> str:
    """Time the command with and without the guard on the last split, on its prompts; medians of three."""
    taken = {}
    for mode in ("off", "on", "guarded"):
        words = ["generate", work / "general", "--prompts", PAIR / "unseen.jsonl", "--max-new-tokens", 64, "--memory", mode]
        words += ["--threshold", 1] if mode == "guarded" else []
        found = []
        for _ in range(3):
            command = [sys.executable, "-m", "liborth_cli", *map(str, words), "--json", "-q"]
            answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found.append(answer["seconds"] / max(answer["tokens"], 1))
        taken[mode] = sorted(found)[1]
    return ", ".join(f"{mode} {1e3 * seconds:.2f}" for mode, seconds in taken.items())


def main() -> None:
    """Print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    table = [
        "| general model | rule | held-out skill, nats | codes, nats | recited | other codes, nats |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in SPLITS.items():
        table += lines(a.work, name, words)
        print("\n".join(table[-6:]), flush=True)
    text = f"{machine()}. Milliseconds a token, 24 prompts at a time: {cost(a.work)}."
    print(text, f"{time.perf_counter() - started:.0f} s")
    record("guarded", "\n".join([text, "", *table]), "generate.md")


if __name__ == "__main__":
    main()
