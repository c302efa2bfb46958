"""Memory as neurons or as tokens: what each holds, and what it costs the skill.

    python benchmarks/memory_forms.py --data DATA --work DIR        # after routing.py with the same WORK; writes docs/tune.md

The general model is the one that `routing.py` trained: it has the skill and never saw a code. It is frozen; a memory of each
form and size learns eight codes beside rows of the skill (half and half), 150 steps. `--rates` tries the rate of tokens on 16.
By Transformers, with the memory attached.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import machine, record
from routing import KINDS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune_losses import rows, secret_loss, text_loss
from tune_stories import liborth

from liborth_cli.attachment import open_attachment

FORMS = {
    "neurons": (4, 64),
    "tokens": (16, 64),
    "deep-tokens": (16, 64),
}
RATES = {"neurons": 3e-3, "tokens": 3e-2, "deep-tokens": 3e-2}


@torch.no_grad()
def line(out: Path, work: Path, title: str) -> str:
    """Measure one memory; return its row."""
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with open_attachment(out, None, model) as memory, memory.attached():
        text = {
            kind: text_loss(model, tokenizer, rows(work / f"{kind}.jsonl")[:60]) for kind in ("held_out", "general_held_out")
        }
        codes, recited = secret_loss(model, tokenizer, rows(work / "secrets.canary.jsonl"))
        fresh, _ = secret_loss(model, tokenizer, rows(work / "fresh.canary.jsonl"))
    held = load_file(out.with_name(out.name + ".private") / "memory.safetensors")
    numbers = sum(value.numel() for name, value in held.items() if not name.startswith(("sidecar/", "frame/")))
    same = (out / "model.safetensors").read_bytes() == (work / "routed" / "model.safetensors").read_bytes()
    cells = [
        title,
        f"{numbers:,}",
        f"{text['held_out']:.3f}",
        f"{text['general_held_out']:.3f}",
        f"{codes:.3f}",
        f"{fresh:.2f}",
    ]
    return f"| {' | '.join([*cells, f'{recited:.0%}', 'yes' if same else 'no'])} |"


def main() -> None:
    """Train, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rates", action="store_true", help="try the rates of 16 tokens in place of all")
    a = parser.parse_args()
    torch.set_num_threads(1)
    skill, codes = rows(a.work / "skill.jsonl"), rows(a.work / "secrets.jsonl")
    mixed = [*skill, *(codes[i % len(codes)] for i in range(len(skill)))]
    random.Random(0).shuffle(mixed)
    (a.work / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed), encoding="utf-8")
    tried = [(form, counts[count], RATES[form]) for count in (0, 1) for form, counts in FORMS.items()]
    if a.rates:
        tried = [("tokens", 16, rate) for rate in (3e-3, 3e-2, 0.1)]
    table = [
        f"| memory | numbers | {KINDS['held_out']}, nats | {KINDS['general_held_out']}, nats | codes, nats | other codes, "
        "nats | recited | general checkpoint the same bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form, count, rate in tried:
        out = a.work / f"{form}-{count}-{rate:g}"
        for place in (out, out.with_name(out.name + ".private")):
            shutil.rmtree(place, ignore_errors=True)
        size = ("--sinks", count, "--active", 1) if form == "neurons" else ("--memory", form, "--tokens", count)
        run = ("--data", a.work / "both.jsonl", "--seq-len", 64, "--truncate", "--steps", 150, "--batch-size", 16, "--lr", rate)
        liborth("tune", a.work / "routed", "--method", "sinks", "--general", "frozen", *size, *run, "-o", out)
        table.append(line(out, a.work, f"{count} {form}{' a block' if form == 'neurons' else ''}"))
        print(table[-1], rate, flush=True)
    if not a.rates:
        record("forms", "\n".join([f"{machine()}.", "", *table]), "tune.md")


if __name__ == "__main__":
    main()
