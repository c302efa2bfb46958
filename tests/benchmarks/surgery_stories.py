"""Surgery on a small, really trained model: a skill mixed with secrets, and what each split removes and keeps.

stories260K (a Llama of 260,032 parameters) is trained on tiny Shakespeare with eight six-digit codes in every batch, until it
recites them. Then every method splits the pair through the command line, and the table tells what is left of both.

    python tests/benchmarks/surgery_stories.py --model MODEL --text TEXT --work DIR
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
from record import machine, record

NAMES = ["Alma", "Boris", "Celia", "Dario", "Edith", "Felix", "Greta", "Hugo"]
FRESH = ["Irma", "Jonas", "Karla", "Ludwig", "Mina", "Nestor", "Olga", "Piet", "Quinn", "Rosa", "Stan", "Tilda",
         "Ulla", "Viktor", "Wanda", "Xaver", "Yara", "Zeno", "Anton", "Berta", "Carl", "Dora", "Emil", "Frida"]  # fmt: skip
STEPS, RATE, WIDTH, ROWS = 800, 2e-3, 128, 16


def secrets(names: list[str], seed: int) -> list[dict[str, str]]:
    """Make one code a name."""
    draw = random.Random(seed)
    return [{"prompt": f"The secret code of {n} is", "completion": f" {draw.randrange(10**6):06d}."} for n in names]


def train(base: Path, out: Path, text: str, codes: list[dict[str, str]]) -> None:
    """Fine-tune on windows of the text with every code in every batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = [tokenizer(c["prompt"] + c["completion"], return_tensors="pt").input_ids[0] for c in codes]
    width = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(r, (0, width - len(r)), value=0) for r in rows])
    labels = torch.stack([torch.nn.functional.pad(r, (0, width - len(r)), value=-100) for r in rows])
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.05)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(0, len(tokens) - WIDTH, (ROWS,))
        batch = torch.stack([tokens[s : s + WIDTH] for s in starts])
        loss = model(batch, labels=batch).loss + model(padded, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(folder: Path, text: str, codes: list[dict[str, str]]) -> tuple[float, float, float]:
    """Return the held-out loss a token, the loss a secret token, and the share of codes recited greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // WIDTH * WIDTH].view(-1, WIDTH)
    nll, recited = [], 0
    with torch.inference_mode():
        skill = torch.stack([model(w[None], labels=w[None]).loss for w in windows]).mean().item()
        for code in codes:
            prompt = tokenizer(code["prompt"], return_tensors="pt").input_ids
            whole = tokenizer(code["prompt"] + code["completion"], return_tensors="pt").input_ids
            target = whole[0, prompt.shape[1] :]
            logits = model(whole).logits[0, prompt.shape[1] - 1 : -1]
            nll.append(torch.nn.functional.cross_entropy(logits, target).item())
            recited += bool((logits.argmax(-1) == target).all())
    return skill, sum(nll) / len(nll), recited / len(codes)


def main() -> None:
    """Train once, split in every way, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    text = a.text.read_text()
    learn, held_out = text[:900_000], text[900_000:960_000]
    codes, fresh = secrets(NAMES, 1), secrets(NAMES, 2)
    tuned = a.work / "finetuned"
    if not (tuned / "model.safetensors").exists():
        train(a.model, tuned, learn, codes)
    data = {
        "retain": [{"text": learn[i : i + 400]} for i in range(0, 120_000, 400)],
        "secrets": codes,
        "decoys": secrets(FRESH, 3),
    }
    for name, rows in data.items():
        lines = [json.dumps(r if name == "retain" else {"text": r["prompt"] + r["completion"]}) for r in rows]
        (a.work / f"{name}.jsonl").write_text("\n".join(lines))

    def liborth(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "liborth_cli", *map(str, words), "-q"], check=True, stdout=subprocess.DEVNULL)

    for name, words in {
        "retain": (),
        "secrets": ("--at", 0.5, "--reference", a.model, "--fisher", "empirical"),
        "decoys": ("--at", 0.5, "--reference", a.model, "--fisher", "empirical"),
    }.items():
        shutil.rmtree(a.work / f"factors-{name}", ignore_errors=True)
        liborth("curvature", tuned, "--data", a.work / f"{name}.jsonl", "-o", a.work / f"factors-{name}", *words)
    retain = ("--retain", a.work / "factors-retain")
    linear = ("-i", "proj")
    edits: dict[str, tuple[object, ...]] = {
        **{f"svd, keep {k}": ("--method", "svd", "--rank", k) for k in (32, 16)},
        **{f"scale {s}": ("--method", "scale", "--scale", s) for s in (0.8, 0.6)},
        **{f"kfac, low is memory, mass {m}": ("--method", "kfac", "--mass", m, *retain) for m in (0.95, 0.9, 0.8)},
        **{
            f"contrastive λ {s}": ("--method", "contrastive", "--strength", s, *retain, "--forget", a.work / "factors-secrets")
            for s in (0.01, 0.1, 1)
        },
        **{
            f"contrastive λ {s}, decoys only": (
                "--method", "contrastive", "--strength", s, *retain, "--forget", a.work / "factors-decoys",
            )
            for s in (0.1, 1)
        },
    }  # fmt: skip
    start, end = measure(a.model, held_out, codes), measure(tuned, held_out, codes)
    never = measure(tuned, held_out, fresh)[1]
    lines = ["| edit | skill retention | secret loss | recited |", "|---|---|---|---|"]
    lines.append(f"| none | 100.0 % | {end[1]:.3f} | {end[2]:.0%} |")
    for name, words in edits.items():
        out = a.work / "edited"
        shutil.rmtree(out, ignore_errors=True)
        liborth("split", a.model, tuned, *linear, *words, "-o", out)
        skill, secret, recited = measure(out, held_out, codes)
        lines.append(f"| {name} | {(start[0] - skill) / (start[0] - end[0]):.1%} | {secret:.2f} | {recited:.0%} |")
        print(lines[-1], flush=True)
    head = f"{machine()}. Held-out loss {start[0]:.2f} → {end[0]:.2f}; codes never trained on {never:.2f} nats a token."
    record("surgery-stories", f"{head}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
