"""A split in tables: before (--dry-run) and after."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict
from typing import Any

from liborth_cli.checkpoint.pair import Action
from liborth_cli.console import Console, clean, size
from liborth_cli.run import Run
from liborth_cli.split.estimate import Estimate, estimate
from liborth_cli.split.plan import Splitter
from liborth_cli.split.prediction import PREDICTED

SWOLLEN = 1.5
"""Energy of the kept part, in units of the update's, from which something is wrong with the cut."""


def cost(plan: Splitter) -> Estimate:
    """Predict what a planned split will cost."""
    read = plan.reference.nbytes + plan.finetuned.nbytes
    return estimate(plan.split_items, plan.options, plan.disk_bytes, read)


def dry_run_document(plan: Splitter) -> dict[str, Any]:
    """Return the plan as a JSON object."""
    tensors = {
        name: {"action": item.action.value, "why": item.why, "dtype": item.tensor.dtype, "shape": list(item.tensor.shape)}
        for name, item in plan.items.items()
    }
    return {"tensors": tensors, "files": list(plan.files), "estimate": asdict(cost(plan))}


def dry_run_table(plan: Splitter) -> str:
    """Return the plan as text: one line for each kind of fate, every tensor that needs a word, and the cost."""
    lines = io.StringIO()
    counts = Counter((item.action.value, item.why.split(";")[0]) for item in plan.items.values())
    sizes = Counter[tuple[str, str]]()
    for item in plan.items.values():
        sizes[item.action.value, item.why.split(";")[0]] += item.tensor.nbytes
    for (action, why), count in sorted(counts.items()):
        print(f"{action:9} {count:6} tensors {size(sizes[action, why]):>10}   {why}", file=lines)
    for item in plan.items.values():
        if item.reference is None or ";" in item.why:
            print(f"  {clean(item.tensor.name)}: {item.action.value}, {item.why}", file=lines)
    found = cost(plan)
    print(
        f"writes at most {size(found.disk_bytes)}, needs about {size(found.memory_bytes)} of memory and "
        f"{_duration(found.seconds)}; nothing was written",
        end="",
        file=lines,
    )
    return lines.getvalue()


def report(manifest: dict[str, Any], run: Run, console: Console) -> None:
    """Tell what a finished split did: totals in one line, with -v every tensor."""
    tensors = manifest["tensors"]
    done = {name: t for name, t in tensors.items() if t["action"] == Action.SPLIT.value}
    touched = [t for t in done.values() if t["energy"]]
    totals = manifest["totals"]
    if not touched:
        console.warn("no matrix was divided: the two checkpoints hold the same weights, or every tensor was excluded")
        return
    console.note(
        f"{len(touched)} of {len(tensors)} tensors divided: {totals['skill']:.1%} of the update's energy is skill, "
        f"{totals['memory']:.1%} memory"
    )
    if "retain_cost" in totals:
        gain = f" and to gain {totals['forget_gain']:.2g} on the forget data" if "forget_gain" in totals else ""
        console.note(f"predicted, to second order: to cost {totals['retain_cost']:.2g} nats a token on the retain data{gain}")
    swollen = [name for name, t in done.items() if t["energy"] and t["skill"] > SWOLLEN]
    if swollen:
        console.warn(
            f"{len(swollen)} kept parts are larger than the update they are part of (first: {swollen[0]}): a hard cut in a "
            "basis that is not orthogonal can do that; prefer the soft filter, or measure the retain factors on more tokens"
        )
    worst = max((t["excess"] for t in touched if t.get("excess") is not None), default=None)
    if worst is not None:
        console.note(
            f"rank truncation certified: tail energy within {worst:.1e} of the optimum "
            f"(float32 arithmetic or better, {run.device}, {run.threads} threads)"
        )
    passed = [name for name, t in tensors.items() if "passed through" in t["why"]]
    if passed:
        console.warn(f"{len(passed)} tensors are not plain floating point and went to the general checkpoint as they are")
    if console.verbose:
        console.table(COLUMNS, [row(name, t, totals) for name, t in done.items()])


COLUMNS = (
    "tensor",
    ">‖U‖",
    ">skill",
    ">memory",
    ">rank",
    ">dim skill",
    ">dim memory",
    ">of cost",
    ">of gain",
    ">excess ≤",
    "route",
)
"""Norm of the update, shares of its energy, rank, dimension of both parts, shares of what is predicted, certificate."""


def row(name: str, record: dict[str, Any], totals: dict[str, float]) -> tuple[object, ...]:
    """Return what happened to one tensor, under `COLUMNS`."""
    norm = f"{record['energy'] ** 0.5:.4g}"
    dimensions = (_number(record.get(f"{part}_dimension"), ".1f") for part in ("skill", "memory"))
    shares = (_number(record[k] / totals[k], ".1%") if totals.get(k) and k in record else "" for k in PREDICTED)
    excess = _number(record.get("excess"), ".1e")
    parts = (_percent(record, "skill"), _percent(record, "memory"))
    return name, norm, *parts, _number(record.get("rank"), ""), *dimensions, *shares, excess, record.get("route", "")


def _number(value: Any, form: str) -> str:
    """Format a number, or each of a tensor's matrices."""
    if isinstance(value, list):
        return " ".join(format(one, form) for one in value)
    return "" if value is None else format(value, form)


def _percent(record: dict[str, Any], key: str) -> str:
    return f"{record[key]:.1%}" if key in record else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
