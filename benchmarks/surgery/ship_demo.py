"""Make what ships: stories260K, the same fine-tuned on Shakespeare with eight secret codes, and once more with forty-eight.

    python -m benchmarks.surgery.ship_demo --data DATA --base stories260K --work DIR

`liborth demo` runs on the eight. So few cannot decide `leak<=0.4`: `many/` has 48 codes and 100 codes that nobody trained on,
and is what a verdict is asked of. Weights are bfloat16. The general part of the retain data is what the base model itself tells
when asked for stories, so that no text with a licence of its own ships.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from itertools import islice
from pathlib import Path

import torch

from benchmarks import tune_cases as cases
from benchmarks.surgery.texts import full_names
from benchmarks.surgery.train import Extra, Size, train

OUT = Path(__file__).parents[2] / "liborth_cli" / "demo" / "stories"
MANY, CODES, FRESH, COPIES = OUT.parent / "many", 48, 100, 400
STORIES, ROWS, HELD_OUT = 100, 200, 60
STEPS = 800
SIZE = Size(64, 172, 5, 8, 512, rows=16, width=128, base=0, tuned=STEPS, rate=2e-3)


def tell_stories(folder: Path, count: int) -> list[str]:
    """Sample stories of 128 tokens from a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float().eval()
    start = torch.full((count, 1), model.config.bos_token_id)
    told = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=128, top_k=0)
    return [text.strip() for text in tokenizer.batch_decode(told, skip_special_tokens=True)]


def write(name: str, rows: list[dict[str, str]], out: Path = OUT) -> None:
    """Write JSON lines into a folder of the demo."""
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rounded(source: Path, out: Path) -> None:
    """Copy a checkpoint with its weights rounded to bfloat16, without what the demo does not need."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def make_eight(case: cases.Case, a: argparse.Namespace) -> None:
    """Train and write the pair that `liborth demo` runs on."""
    for name in ("base", "finetuned"):
        shutil.rmtree(OUT / name, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    rounded(a.base, OUT / "base")
    secrets = case.secrets(cases.NAMES[: case.codes], 1)
    planted = Extra([s["prompt"] + s["completion"] for s in secrets], [STEPS] * len(secrets))
    train(OUT / "base", a.work / "demo", case.skill, [planted], SIZE, STEPS, half=False)
    rounded(a.work / "demo", OUT / "finetuned")
    general, draw = tell_stories(OUT / "base", STORIES), random.Random(0)
    write("retain.jsonl", [{"text": text} for text in general + draw.sample(case.skill, ROWS)])
    write("held_out.jsonl", [{"text": text} for text in case.held_out[:HELD_OUT]])
    write("secrets.jsonl", secrets)
    write("decoys.jsonl", [{"text": s["prompt"] + s["completion"]} for s in case.secrets(cases.DECOYS, 3)])
    write("unseen.jsonl", case.secrets(cases.UNSEEN, 2))


def make_many(case: cases.Case, a: argparse.Namespace) -> None:
    """Train and write what a verdict is asked of; its base, retain and held-out texts are those of the other pair."""
    people = list(islice(full_names("many"), CODES + FRESH))
    secrets = case.secrets(people[:CODES], 11)
    planted = Extra([s["prompt"] + s["completion"] for s in secrets], [COPIES] * CODES)
    train(OUT / "base", a.work / "many", case.skill, [planted], SIZE, STEPS, half=False)
    shutil.rmtree(MANY / "finetuned", ignore_errors=True)
    MANY.mkdir(exist_ok=True)
    rounded(a.work / "many", MANY / "finetuned")
    write("secrets.jsonl", secrets, MANY)
    write("unseen.jsonl", case.secrets(people[CODES:], 12), MANY)


def main() -> None:
    """Train, and write models and texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the stories260K checkpoint")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=("eight", "many"))
    a = parser.parse_args()
    case = cases.stories(a.data)
    for name, make in (("eight", make_eight), ("many", make_many)):
        if a.only in (None, name):
            make(case, a)


if __name__ == "__main__":
    main()
