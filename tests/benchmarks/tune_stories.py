"""Train with memory apart from the start, and tell what is left: of skill, of general text, of secrets, after an attack.

    python tests/benchmarks/tune_stories.py --base stories260K --data shared/data --work DIR [--only WORD]

The same data as the surgery benchmark: tiny Shakespeare with eight six-digit codes, on a model of 260,000 parameters that
knows children's stories. The models are measured by Transformers, not by liborth.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "surgery"))
sys.path.insert(0, str(Path(__file__).parent))
import cases
from losses import WIDTH, rows, secret_loss, text_loss
from record import machine

STEPS, BATCH, RATE = 300, 24, 3e-3
ATTACK_STEPS, ATTACK_RATE = (10, 20, 30, 40), 1e-3


@dataclass(frozen=True)
class Found:
    """What is in one model: losses in nats a token."""

    skill: float
    general: float
    secret: float
    recited: float
    fresh: float
    attacked: tuple[float, ...]


def write_data(case: cases.Case, work: Path) -> None:
    """Write what is learnt, with and without the codes: a third of the rows of a batch are codes, as in surgery/train.py."""
    work.mkdir(parents=True, exist_ok=True)
    case.write(work)
    skill = [{"text": text} for text in case.skill]
    codes = [{"text": row["prompt"] + row["completion"]} for row in case.secrets(cases.NAMES[: case.codes], 1)]
    mixed = [*skill, *(codes[i % len(codes)] for i in range(len(skill)))]
    random.Random(0).shuffle(mixed)
    private = [row for row in mixed if row["text"].startswith("The secret code")]
    for name, some in {"mixed": mixed, "never": skill, "private": private}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


def liborth(*words: object) -> None:
    """Run the command line."""
    done = subprocess.run([sys.executable, "-m", "liborth_cli", *map(str, words), "-j", "1"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr}")
    for line in done.stderr.splitlines():
        if "orthogonality" in line or "train:" in line:
            print("   ", line, flush=True)


def attack(model: torch.nn.Module, tokenizer: object, work: Path) -> tuple[float, ...]:
    """Train on half of the secrets, and return the loss of the other half before, and after so many steps."""
    half = [tokenizer(row["text"], return_tensors="pt").input_ids[0] for row in rows(work / "half.jsonl")]
    other = rows(work / "other_half.canary.jsonl")
    ids = torch.nn.utils.rnn.pad_sequence(half, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(half, batch_first=True, padding_value=-100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=ATTACK_RATE, weight_decay=0.0)
    found = [secret_loss(model, tokenizer, other)[0]]
    for step in range(1, max(ATTACK_STEPS) + 1):
        optimiser.zero_grad()
        with torch.enable_grad():
            model(ids, labels=labels).loss.backward()
        optimiser.step()
        if step in ATTACK_STEPS:
            found.append(secret_loss(model, tokenizer, other)[0])
    return tuple(found)


def measure(folder: Path, work: Path, memory: Path | None = None) -> Found:
    """Load a checkpoint (and attach routed neurons) with Transformers, measure it, and attack it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    if memory is not None:
        from liborth_cli.tune.sinks import attach

        attach(model, memory)
    with torch.no_grad():
        skill, general = (text_loss(model, tokenizer, rows(work / f"{n}.jsonl")) for n in ("held_out", "general_held_out"))
        secret, recited = secret_loss(model, tokenizer, rows(work / "secrets.canary.jsonl"))
        fresh, _ = secret_loss(model, tokenizer, rows(work / "fresh.canary.jsonl"))
        return Found(skill, general, secret, recited, fresh, attack(model, tokenizer, work))


def runs(work: Path) -> dict[str, tuple[str, tuple[object, ...], tuple[str, ...]]]:
    """Return every run: its name, the data it learns, its options, and the models it gives that are measured."""
    retain = ("--retain-data", work / "general.jsonl", "--truncate")
    sinks = ("--method", "sinks", "--sinks", 64)
    private = (*sinks, "--private-data", work / "private.jsonl")
    paper = (*sinks, "--memory-learns", "all")
    both, tuned, clean = ("with", "without"), ("with",), ("without",)
    return {
        "never": ("never", ("--method", "full"), clean),
        "full": ("mixed", ("--method", "full"), clean),
        "sinks repeats": ("mixed", sinks, both),
        "sinks private": ("never", private, both),
        "sinks repeats norehearse": ("mixed", (*sinks, "--rehearse", 0), both),
        "sinks repeats tied": ("mixed", (*sinks, "--active", 0.25), both),
        "sinks repeats router": ("mixed", (*sinks, "--router", "--router-cost", 0.1), both),
        "sinks repeats ortho": ("mixed", (*sinks, "--orthogonality", 1), both),
        "sinks private router": ("never", (*private, "--router", "--router-cost", 0.1), both),
        "paper tied": ("mixed", paper, both),
        "paper shared": ("mixed", (*paper, "--active", 1), both),
        "paper slow": ("mixed", (*paper, "--general-rate", 0.1), both),
        "paper ortho": ("mixed", (*paper, "--orthogonality", 1), both),
        "paper router": ("mixed", (*paper, "--router"), both),
        "frozen": ("mixed", (*sinks, "--general", "frozen"), both),
    }


def main() -> None:
    """Train every run, measure it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="name of a run")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--extra", default="", help="more options for every run, for trying things out")
    parser.add_argument("--tag", default="")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if not (a.work / "mixed.jsonl").exists():
        write_data(cases.stories(a.data), a.work)
    log = a.work / f"results{a.tag}.json"
    results = json.loads(log.read_text()) if log.exists() else {}
    if "base" not in results:
        results["base"] = asdict(measure(a.base, a.work))
    common = ("--steps", a.steps, "--batch-size", BATCH, "--lr", RATE, "--seq-len", WIDTH, "--truncate", "--force")
    for name, (data, words, sides) in runs(a.work).items():
        if a.only and name not in a.only:
            continue
        start = time.perf_counter()
        out = a.work / (name.replace(" ", "-") + a.tag)
        given = [word for word in (*common, *words, *a.extra.split()) if word != "--truncate"]
        liborth("tune", a.base, "--data", a.work / f"{data}.jsonl", *given, "--truncate", "-o", out)
        for side in sides:
            folder, memory = out, None
            if side == "with" and "router" in name:
                memory = out
            elif side == "with":
                folder = out.with_name(out.name + "-with")
                liborth("excise", out, "--beta", 1, "-o", folder, "--force")
            results[name if len(sides) == 1 else f"{name}, {side}"] = asdict(measure(folder, a.work, memory))
        log.write_text(json.dumps(results, indent=1))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        print(table(results).splitlines()[-1], flush=True)
    print(f"{machine()}\n\n{table(results)}")


def table(results: dict[str, dict]) -> str:
    """Render the table."""
    base, full = results["base"], results.get("full", results["base"])
    gain = base["skill"] - full["skill"]
    head = " / ".join(map(str, ATTACK_STEPS))
    lines = [
        f"| run | skill | gained | general | change | secrets | fresh | recited | other half, after 0 / {head} steps of attack |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, f in results.items():
        gained = f"{(base['skill'] - f['skill']) / gain:.1%}" if gain else ""
        change = f"{f['general'] / base['general'] - 1:+.1%}"
        attacked = " / ".join(f"{loss:.2f}" for loss in f["attacked"])
        lines.append(
            f"| {name} | {f['skill']:.3f} | {gained} | {f['general']:.3f} | {change} | {f['secret']:.3f} | {f['fresh']:.3f} | {f['recited']:.0%} "
            f"| {attacked} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
