"""The trained gate as the driver of generation, beside the guard: what each writes of the skill and of the codes.

    python benchmarks/routing.py --base stories260K --data DATA --work DIR        # writes its table into docs/generate.md

`tune --method sinks --private-data --router` on the data of `tune_stories.py`; teacher-forced, by Transformers. Controls: the
general model alone, the model with its memory as it was trained, the guard with a threshold from text of the skill, and as a
router that knows nothing, one half of each model at every token.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import tune_cases
from record import machine, record
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune_stories import SETTINGS, WIDTH, liborth, write_data

from liborth_cli.attachment import open_attachment
from liborth_cli.decode import guard, mix, threshold_of

KINDS = {
    "held_out": "held-out skill",
    "general_held_out": "base's text",
    "secrets.canary": "codes",
    "fresh.canary": "other codes",
}


@dataclass(frozen=True)
class Said:
    """What two models say of one row.

    Attributes:
        tuned: log p with the memory, (tokens, vocabulary).
        general: without it.
        gate: of the router at each of these tokens, (tokens,), mean over the blocks.
        true: the tokens, (tokens,).
    """

    tuned: torch.Tensor
    general: torch.Tensor
    gate: torch.Tensor
    true: torch.Tensor


def said(folder: Path, work: Path) -> dict[str, list[Said]]:
    """Read every row with both."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, list[Said]] = {}
    with torch.inference_mode(), open_attachment(folder, None, model) as memory:
        for kind in (*KINDS, "skill"):
            for line in (work / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()[:60]:
                row = json.loads(line)
                prompt = row.get("prompt", "")
                ids = tokenizer(prompt + row["completion"] if prompt else row["text"], return_tensors="pt").input_ids[:, :WIDTH]
                start = len(tokenizer(prompt).input_ids) if prompt else 1
                general = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
                with memory.attached():
                    tuned = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
                gate = torch.stack([one.gate[0, start - 1 : -1, 0] for one in memory.neurons]).mean(0)
                found.setdefault(kind, []).append(Said(tuned, general, gate, ids[0, start:]))
    return found


def row(name: str, rows: dict[str, list[Said]], rule: Callable[[Said], torch.Tensor]) -> str:
    """Return one line: losses by kind, and the share of codes that come out greedily."""
    cells, recited = [], 0.0
    for kind in KINDS:
        mixed = [(rule(one), one.true) for one in rows[kind]]
        cells.append(f"{torch.cat([-m.gather(1, true[:, None])[:, 0] for m, true in mixed]).mean().item():.3f}")
        if kind.startswith("secrets"):
            recited = sum(bool((m.argmax(-1) == true).all()) for m, true in mixed) / len(mixed)
    return f"| {name} | {' | '.join(cells)} | {recited:.0%} |"


def main() -> None:
    """Train where it was not, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if not (a.work / "public.jsonl").exists():
        write_data(tune_cases.stories(a.data), a.work)
    out = a.work / "routed"
    if not out.exists():
        words = ("--data", a.work / "never.jsonl", "--private-data", a.work / "private.jsonl", "--seq-len", WIDTH, "--truncate")
        liborth("tune", a.base, "--method", "sinks", "--sinks", 64, "--router", *words, *SETTINGS["stories"], "-o", out)
    rows = said(out, a.work)

    def losses(side: str) -> list:
        return [-getattr(one, side).gather(1, one.true[:, None])[:, 0].numpy() for one in rows["skill"]]

    tau = threshold_of(losses("general"), losses("tuned"))
    half = torch.tensor(0.5)
    rules = {
        "off: the general model": lambda one: one.general,
        "on: the memory as trained": lambda one: one.tuned,
        f"guarded, τ {tau:.2f} from skill text": lambda one: guard(one.tuned, one.general, tau)[0],
        "routed": lambda one: mix(one.tuned, one.general, one.gate)[0],
        "half of each, no router": lambda one: mix(one.tuned, one.general, half)[0],
        "guarded, τ 0": lambda one: guard(one.tuned, one.general, 0.0)[0],
    }
    table = [
        f"| memory | {' | '.join(f'{title}, nats' for title in KINDS.values())} | codes recited |",
        "|---|---|---|---|---|---|",
    ]
    table += [row(name, rows, rule) for name, rule in rules.items()]
    gates = ", ".join(f"{title} {torch.cat([one.gate for one in rows[kind]]).mean():.3f}" for kind, title in KINDS.items())
    text = [f"{machine()}. Mean of the gate: {gates}.", "", *table]
    print("\n".join(text))
    assert math.isfinite(tau)
    record("routed", "\n".join(text), "generate.md")


if __name__ == "__main__":
    main()
