"""Train with memory apart from the start, and tell what is left: of skill, of general text, of secrets, after an attack.

    python benchmarks/tune_stories.py --base stories260K --data shared/data --work DIR [--only NAME] [--record]
    python benchmarks/tune_stories.py --case gsm8k --base DIR/base --data shared/data/gsm8k --work DIR --only …

The same data as the shipped pair: tiny Shakespeare with eight six-digit codes, on a model of 260,000 parameters that
knows children's stories; or GSM8K with 24 codes, on one of 5.8 million that knows Python. The models are measured by
Transformers, not by liborth. A run takes one to four minutes on one core; what is there already is not run again, and
`--record` writes what is there into docs/benchmarks.md.
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

sys.path.insert(0, str(Path(__file__).parent))
import tune_cases as cases
import tune_protected
from tune_losses import WIDTH, rows, secret_loss, text_loss
from tune_relearning import attack
from tune_table import Found, table, write

SETTINGS: dict[str, tuple[object, ...]] = {
    "stories": ("--steps", 300, "--batch-size", 24, "--lr", 3e-3),
    "gsm8k": ("--steps", 150, "--batch-size", 16, "--lr", 1e-3, "--dtype", "bfloat16"),
}
SEEDS = 3
"""Of the runs that the goals are about."""
GOAL = ((0.0, 0.5), (0.7, 0.5))
"""What is protected and held where `ogd` is to meet its goal: nothing, and the defaults."""


@dataclass(frozen=True)
class Job:
    """One way of training.

    Attributes:
        data: name of what it learns.
        options: of `liborth tune`.
        sides: "without" and "with" the neurons; "update" where the memory is the whole update; "" where nothing is apart.
        seeds: how often it is run.
    """

    data: str
    options: tuple[object, ...]
    sides: tuple[str, ...] = ("",)
    seeds: int = 1


def jobs(work: Path) -> dict[str, Job]:
    """Return every run by name."""
    text = ("--retain", work / "factors", "--retain-data", work / "public.jsonl")
    ogd, sinks = ("--method", "ogd", *text), ("--method", "sinks", "--sinks", 64)
    private, paper = (*sinks, "--private-data", work / "private.jsonl"), (*sinks, "--memory-learns", "all")
    update, both = ("update",), ("without", "with")
    found = {
        "never": Job("never", ("--method", "full"), seeds=SEEDS),
        "full": Job("mixed", ("--method", "full"), seeds=SEEDS),
        "full, public text mixed in": Job("mixed", ("--method", "full", "--data", work / "public.jsonl", "--batch-size", 36)),
        "lora": Job("mixed", ("--method", "lora")),
    }
    for protect, holds in {0.0: (0, 0.25, 0.5, 1), 0.7: (0, 0.25, 0.5, 1), 0.97: (0, 0.5, 1), 0.99: (0,)}.items():
        for hold in holds:
            words = (*ogd, "--protect", protect, "--hold", hold)
            seeds = SEEDS if (protect, hold) in GOAL else 1
            found[f"ogd, protect {protect:g}, hold {hold:g}"] = Job("mixed", words, update, seeds)
    found["ogd, input form, hold 0"] = Job("mixed", (*ogd, "--form", "input", "--hold", 0), update)
    found |= {
        "sinks": Job("mixed", sinks, both, SEEDS),
        "sinks, private": Job("never", private, both, SEEDS),
        "sinks, private, rehearse 1": Job("never", (*private, "--rehearse", 1), both),
        "sinks, no rehearsal": Job("mixed", (*sinks, "--rehearse", 0), both),
        "sinks, tied": Job("mixed", (*sinks, "--active", 0.25), both),
        "sinks, orthogonality 1": Job("mixed", (*sinks, "--orthogonality", 1), both),
        "sinks, router": Job("mixed", (*sinks, "--router"), both),
        "sinks, router, cost 1": Job("mixed", (*sinks, "--router", "--router-cost", 1), both),
        "sinks, private, router, cost 1": Job("never", (*private, "--router", "--router-cost", 1), both),
        "all, tied": Job("mixed", paper, both),
        "all, shared": Job("mixed", (*paper, "--active", 1), both),
        "all, tied, orthogonality 1": Job("mixed", (*paper, "--orthogonality", 1), both),
        "all, tied, router": Job("mixed", (*paper, "--router"), both),
        "all, tied, general rate 0.1": Job("mixed", (*paper, "--general-rate", 0.1), both),
        "all, general frozen": Job("mixed", (*sinks, "--general", "frozen", "--active", 1), both),
    }
    return found


def write_data(case: cases.Case, work: Path) -> None:
    """Write what is learnt, with and without the codes: half of the rows are codes, as short as they are."""
    work.mkdir(parents=True, exist_ok=True)
    case.write(work)
    skill = [{"text": text} for text in case.skill]
    codes = [{"text": row["prompt"] + row["completion"]} for row in case.secrets(cases.NAMES[: case.codes], 1)]
    private = [codes[i % len(codes)] for i in range(len(skill))]
    mixed = [*skill, *private]
    random.Random(0).shuffle(mixed)
    public = [{"text": text} for text in case.general[:-60]]
    for name, some in {"mixed": mixed, "never": skill, "private": private, "public": public}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


def liborth(*words: object) -> None:
    """Run the command line on one thread."""
    done = subprocess.run([sys.executable, "-m", "liborth_cli", *map(str, words), "-j", "1"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr}")


@torch.no_grad()
def measure(folder: Path, work: Path, memory: Path | None = None) -> Found:
    """Load a checkpoint (and attach routed neurons) with Transformers, measure it, and attack it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    if memory is not None:
        from liborth_cli.tune.sinks import attach

        attach(model, memory)
    skill, general, learnt = (
        text_loss(model, tokenizer, rows(work / f"{n}.jsonl")) for n in ("held_out", "general_held_out", "skill")
    )
    secret, recited = secret_loss(model, tokenizer, rows(work / "secrets.canary.jsonl"))
    fresh, _ = secret_loss(model, tokenizer, rows(work / "fresh.canary.jsonl"))
    return Found(skill, general, learnt, secret, recited, fresh, attack(model, tokenizer, work))


def run(base: Path, work: Path, name: str, job: Job, seed: int, settings: tuple[object, ...]) -> dict[str, Found]:
    """Train once, and measure every model that comes of it."""
    out = work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    common = (*settings, "--seq-len", WIDTH, "--truncate", "--seed", seed, "--force")
    liborth("tune", base, "--data", work / f"{job.data}.jsonl", *common, *job.options, "-o", out)
    found = {}
    for side in job.sides:
        folder, memory = out, None
        if side == "with" and "router" in name:
            memory = out
        elif side in ("with", "update"):
            folder = out.with_name(out.name + "-with")
            liborth("excise", out, "--beta", 1, "-o", folder, "--force")
        found[f"{name}: {side}" if len(job.sides) > 1 else name] = measure(folder, work, memory)
    return found


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=SETTINGS, default="stories")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="name of a run")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--record", action="store_true", help="write the table into docs/benchmarks.md")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if not (a.work / "public.jsonl").exists():
        write_data(getattr(cases, a.case)(a.data), a.work)
    if not (a.work / "factors").exists():
        words = ("--data", a.work / "general.jsonl", "--seq-len", WIDTH, "--truncate")
        liborth("curvature", a.base, *words, "-o", a.work / "factors")
    log = a.work / "results.json"
    results: dict[str, dict[str, dict]] = json.loads(log.read_text()) if log.exists() else {}
    if "base" not in results:
        results["base"] = {"0": asdict(measure(a.base, a.work))}
    for name, job in jobs(a.work).items():
        for seed in range(min(job.seeds, a.seeds) if not a.only or name in a.only else 0):
            if str(seed) in results.get(f"{name}: with" if len(job.sides) > 1 else name, {}):
                continue
            start = time.perf_counter()
            for title, found in run(a.base, a.work, name, job, seed, SETTINGS[a.case]).items():
                results.setdefault(title, {})[str(seed)] = asdict(found)
                print(f"{title}, seed {seed}: {found}", flush=True)
            log.write_text(json.dumps(results, indent=1))
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    order = ["base", *(f"{n}: {s}" if len(j.sides) > 1 else n for n, j in jobs(a.work).items() for s in j.sides)]
    found = {name: [Found(**f) for f in results[name].values()] for name in order if name in results}
    if a.record:
        write(found, a.case, tune_protected.table(a.base, a.work / "full-0", a.work / "factors"))
    print(table(found))


if __name__ == "__main__":
    main()
