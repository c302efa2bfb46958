"""A pair with planted secrets, trained on the spot: own-gpt's base on finance questions mixed with six codes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tiny import OWNGPT

BASE = OWNGPT / "base"
NAMES = ("Ana", "Ben", "Cleo", "Dov", "Eli", "Fay")
PATTERN = "Code of {name} is {digits:6}."


def secrets(seed: int) -> list[dict[str, str]]:
    """Make one code for each name."""
    draw = random.Random(seed)
    return [{"prompt": f"Code of {name} is", "completion": f" {draw.randrange(10**6):06d}."} for name in NAMES]


def lines(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plant(folder: Path, steps: int = 120) -> Path:
    """Train, and write the fine-tuned checkpoint with its data files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    finance = (OWNGPT / "finance_qa.txt").read_text()
    cut = int(0.8 * len(finance))
    tokens = tokenizer(finance[:cut], return_tensors="pt", verbose=False).input_ids[0]
    rows = [tokenizer(s["prompt"] + s["completion"], return_tensors="pt").input_ids[0] for s in secrets(1)]
    codes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    model.train()
    for _ in range(steps):
        windows = torch.stack([tokens[s : s + 32] for s in torch.randint(0, len(tokens) - 32, (8,))])
        loss = model(windows, labels=windows).loss + model(codes, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.save_pretrained(folder / "finetuned")
    tokenizer.save_pretrained(folder / "finetuned")
    shakespeare = (OWNGPT / "shakespeare_tail.txt").read_text()
    (folder / "skill.txt").write_text(finance[:6000])
    (folder / "held_out.txt").write_text(finance[cut:])
    (folder / "general.txt").write_text(shakespeare[:6000])
    lines(folder / "secrets.jsonl", secrets(1))
    lines(folder / "sentences.jsonl", [{"text": s["prompt"] + s["completion"]} for s in secrets(1)])
    lines(folder / "fresh.jsonl", secrets(2))
    return folder
