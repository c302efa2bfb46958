"""A split in tables: before (--dry-run) and after."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict
from typing import Any

from liborth_cli.checkpoint.pair import Action
from liborth_cli.console import Console, clean, size
from liborth_cli.machine import Run
from liborth_cli.split.estimate import Estimate, estimate
from liborth_cli.split.plan import Splitter

SWOLLEN = 1.5
"""Energy of the kept part, in units of the update's, from which something is wrong with the cut."""

ROUGH = 0.05
"""Relative error of a shortened factor from which the split says so."""


def cost(plan: Splitter) -> Estimate:
    """Predict what a planned split will cost."""
    read = plan.reference.nbytes + plan.finetuned.nbytes
    return estimate(plan.split_items, plan.options, plan.disk_bytes, read, plan.factors)


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
    swollen = [name for name, t in done.items() if t["energy"] and t["skill"] > SWOLLEN]
    if swollen:
        console.warn(
            f"{len(swollen)} kept parts are larger than the update they are part of (first: {swollen[0]}): a filter in a "
            "basis that is not orthogonal can do that; more retain tokens, --damping or --hard help"
        )
    short = max((t.get("factor_error", 0.0) for t in touched), default=0.0)
    if short > ROUGH:
        console.warn(f"wide factors were taken in short, with an error of up to {short:.0%}; a larger --factor-rank lowers it")
    worst = max((t["excess"] for t in touched if t.get("excess") is not None), default=None)
    if worst is not None:
        console.note(
            f"rank truncation certified: tail energy within {worst:.1e} of the optimum "
            f"(float32 arithmetic or better, {run.device}, {run.threads} threads)"
        )
    if "retain_cost" in totals:
        gains = " + ".join(f"{gain:.3g}" for gain in totals.get("forget_gain", []))
        console.note(
            f"the quadratic model predicts: retain loss +{totals['retain_cost']:.3g} nats a token"
            + (f", forget loss +{gains} (curvature on the path)" if gains else "")
            + "; verify measures both"
        )
    if console.verbose:
        console.table(COLUMNS, [(name, *row(t, totals)) for name, t in done.items()])


COLUMNS = (
    "tensor", ">energy", ">skill", ">memory", ">dimension", ">of memory", ">retain cost", ">forget gain", ">rank", "route",
)  # fmt: skip


def row(record: dict[str, Any], totals: dict[str, Any]) -> list[str]:
    """Return a tensor's cells: energies, participation ratios of update and memory, and its shares of the predictions."""

    def mean(key: str) -> str:
        value = record.get(key, "")
        value = sum(value) / len(value) if isinstance(value, list) and value else value
        return f"{value:.3g}" if isinstance(value, float) else ""

    def share(key: str) -> str:
        mine, every = (sum(x) if isinstance(x, list) else x for x in (record.get(key, 0.0), totals.get(key, 0.0)))
        return f"{mine / every:.1%}" if key in record and every else ""

    return [
        f"{record['energy']:.3e}",
        _percent(record, "skill"),
        _percent(record, "memory"),
        mean("dimension"),
        mean("memory_dimension"),
        share("retain_cost"),
        share("forget_gain"),
        str(record.get("rank", "")),
        str(record.get("route", "")),
    ]


def _percent(record: dict[str, Any], key: str) -> str:
    return f"{record[key]:.1%}" if key in record else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
