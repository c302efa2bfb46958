"""Forget some of TOFU's authors (Maini et al. 2024, arXiv 2401.06121), and judge beside a model that never saw them.

    python -m benchmarks.surgery.tofu --model BASE --data TOFU --work DIR --device cuda --minutes 4
    python -m benchmarks.surgery.tofu --results DIR --publish

The first fine-tunes BASE on all authors (6 epochs at 2e-4) and on all but the forget set, applies liborth's methods through
the command line and every rival, scores each with `verify --tofu`'s metrics, lets half of the questions be learnt again,
and prints as it goes. What is done is not done again; a part that fails stops no other. On a GPU the parts run side by side,
so an edit's seconds are an upper bound. The second writes docs/benchmarks.md from the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.record import record
from benchmarks.surgery.tofu.plan import Plan
from benchmarks.surgery.tofu.schedule import run_all, run_one, say
from benchmarks.surgery.tofu.stages import stages
from benchmarks.surgery.tofu.table import markdown, rows

ENDING = 25.0
"""Seconds of the time given in which no new part begins."""


def main() -> None:
    """Run, print the table; or publish it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint to fine-tune, in the Hugging Face layout")
    parser.add_argument("--data", type=Path, help="folder with TOFU's files, training and perturbed ones")
    parser.add_argument("--work", type=Path, help="where checkpoints go")
    parser.add_argument("--results", type=Path, help="where results go; WORK/results when not given")
    parser.add_argument("--forget", default="forget01", choices=("forget01", "forget05", "forget10"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="to end after; no limit when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a few rows and steps: to see that everything runs")
    parser.add_argument("--part", help="run this part alone")
    parser.add_argument("--parts", help="run only these, with commas")
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--publish", action="store_true", help="write docs/benchmarks.md from the results")
    a = parser.parse_args()
    results = a.results or (a.work / "results" if a.work else parser.error("--work or --results is missing"))
    if a.publish:
        publish(results)
        return
    from transformers.utils import logging

    if not (a.model and a.data and a.work):
        parser.error("--model, --data and --work are needed")
    until = a.until or (time.time() + 60 * a.minutes - ENDING if a.minutes else float("inf"))
    logging.disable_progress_bar()
    plan = Plan(a.model, a.data, a.work, results, a.forget, a.device, a.seed, a.tiny, until)
    every = stages(plan)
    if a.part:
        run_one(plan, next(stage for stage in every if stage.name == a.part))
        return
    if a.parts:
        every = [stage for stage in every if stage.name in a.parts.split(",")]
    a.work.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / "run.txt").write_text(describe(plan, a.minutes), encoding="utf-8")
    words = [word for word in sys.argv[1:] if word]
    run_all(plan, every, [*words, "--until", str(until)])
    best, doses = rows(results)
    say("all doses\n" + markdown(doses))
    say("chosen\n" + markdown(best))


def describe(plan: Plan, minutes: float) -> str:
    """Say what is run on what."""
    import torch

    place = torch.cuda.get_device_name() if plan.device != "cpu" else "CPU"
    config = json.loads((plan.model / "config.json").read_text(encoding="utf-8"))
    shape = f"{config['model_type']}, {config['num_hidden_layers']} layers, width {config['hidden_size']}"
    limit = f"{minutes:g} minutes in all" if minutes else "no time limit"
    return f"{shape}; {plan.forget}; seed {plan.seed}; {place}, torch {torch.__version__}; {limit}"


def publish(results: Path) -> None:
    """Write the tables of a run between their markers."""
    best, doses = rows(results)
    head = (results / "run.txt").read_text(encoding="utf-8").strip()
    text = f"{head}.\n\n{markdown(best)}\n\nAll doses that were tried:\n\n{markdown(doses)}\n"
    record(f"tofu-{head.split('; ')[1]}", text)


if __name__ == "__main__":
    main()
