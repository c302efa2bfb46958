"""Forget some of TOFU's authors (Maini et al. 2024, arXiv 2401.06121), and judge beside a model that never saw them.

    python -m benchmarks.surgery.tofu --tier small --data TOFU --stories FILE --forget forget05 --work DIR
    python -m benchmarks.surgery.tofu --model BASE --data TOFU --work DIR --device cuda --minutes 4
    python -m benchmarks.surgery.tofu --work DIR --publish

The small tier trains a base of its own on stories and on authors of its own, and takes some of the authors; the full one
fine-tunes BASE on all of them. Both are fine-tuned a second time without the forget set. Then liborth's methods go through the
command line, and every rival; each is scored with `verify --tofu`'s metrics, half of the questions are learnt again, and it
prints as it goes. What is done is not done again; a part that fails stops no other. The last line writes docs/benchmarks.md
from the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.merge import merged, tables
from benchmarks.record import machine, record, standing
from benchmarks.surgery.tofu.plan import FORGETS, Plan
from benchmarks.surgery.tofu.schedule import is_done, run_all, run_one, say
from benchmarks.surgery.tofu.stages import stages
from benchmarks.surgery.tofu.table import BEST, DOSES, markdown, open_edits, place, rows
from benchmarks.surgery.tofu.tiers import AN_AUTHOR, TIERS

ENDING = 25.0
"""Seconds of the time given in which no new part begins."""


def main() -> None:
    """Run, print the table; or publish it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="full", choices=tuple(TIERS))
    parser.add_argument("--model", type=Path, help="checkpoint to fine-tune, in the Hugging Face layout; not of the small tier")
    parser.add_argument("--data", type=Path, help="folder with TOFU's files, training and perturbed ones")
    parser.add_argument("--stories", type=Path, help="file of stories, for the small tier")
    parser.add_argument("--work", type=Path, help="where checkpoints go")
    parser.add_argument("--results", type=Path, help="where results go; WORK/results when not given")
    parser.add_argument("--forget", default="forget01", choices=FORGETS)
    parser.add_argument("--facts", action="store_true", help="give edits real authors and facts too; of the small tier")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="to end after; no limit when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, help="parts at a time; as many as cores when not given, 8 on a GPU")
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

    tier, base = TIERS[a.tier], "model" if TIERS[a.tier].base is None else "stories"
    if not (a.data and a.work and getattr(a, base)):
        parser.error(f"--{base}, --data and --work are needed")
    until = a.until or (time.time() + 60 * a.minutes - ENDING if a.minutes else float("inf"))
    logging.disable_progress_bar()
    if a.facts and tier.base is None:
        parser.error("--facts: of a base that is given nobody knows which facts it has read")
    given = a.model if tier.base is None else None
    plan = Plan(tier, given, a.data, a.stories, a.work, results, a.forget, a.device, a.seed, until, a.facts)
    every = stages(plan)
    if a.part:
        run_one(plan, next(stage for stage in every if stage.name == a.part))
        return
    if a.parts:
        every = [stage for stage in every if stage.name in a.parts.split(",")]
    a.work.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    together = a.together or (len(os.sched_getaffinity(0)) if a.device == "cpu" else 8)
    run_all(plan, every, [*sys.argv[1:], "--until", str(until)], together)
    left = [stage.name for stage in stages(plan) if not is_done(plan, stage.name)]
    head = describe(plan, a.minutes, together)
    (results / "run.txt").write_text(f"{place(a.tier, a.forget, a.facts)}\n{head}\n", encoding="utf-8")
    say(f"{head} Not done to the end: {', '.join(left) or 'nothing'}.")
    best, doses = rows(results)
    say("all doses\n" + markdown(doses))
    say("chosen\n" + markdown(best))


def describe(plan: Plan, minutes: float, together: int) -> str:
    """Say what is run on what."""
    import torch

    place = f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if plan.device != "cpu" else machine()
    config = json.loads((plan.model / "config.json").read_text(encoding="utf-8"))
    shape = f"{config['model_type']}, {config['num_hidden_layers']} layers, width {config['hidden_size']}"
    limit = f"{minutes:g} minutes in all" if minutes else "no time limit"
    authors = f"{len(plan.going()) // AN_AUTHOR} authors of {plan.forget} go, {len(plan.staying()) // AN_AUTHOR} stay"
    authors += ", edits are given the facts" if plan.facts else ""
    return f"{shape}; {authors}; seed {plan.seed}; {place}; {together} parts at a time; {limit}."


def publish(results: Path, page: str = "benchmarks.md") -> None:
    """Write the tables of a run between their markers; edits of the page that it did not run stay."""
    where, head = (results / "run.txt").read_text(encoding="utf-8").strip().split("\n")
    best, doses = rows(results)
    new = f"{head}\n\n{BEST}\n\n{markdown(best)}" + (f"\n\n{DOSES}\n\n{markdown(doses)}" if doses else "")
    whole = merged(standing(f"tofu-{where}", page), new, cells=False)
    if left := open_edits(tables(whole)[BEST]):
        whole = whole.replace(head, f"{head} Not done to the end: {'; '.join(left)}.", 1)
    record(f"tofu-{where}", whole, page)


if __name__ == "__main__":
    main()
