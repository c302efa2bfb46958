"""What does the founding document's version remove, and what does it destroy?

    python benchmarks/founding.py --work DIR [--pairs FOLDER …]      # the shipped pair, and pairs of the surgery benchmark

`impact` is its score, U²/H_jj by a diagonal Hessian of retain text, with one threshold τ for all matrices: τ is set so that a
given share of all their elements reaches it. Beside it: the same share matrix by matrix; the other end of the ranking;
`diagonal`, U²·H, at both ends; as many elements at random, and the largest; the update scaled down; `tokenwise`. Linear layers
are edited. The last columns compare at equal forgetting. Writes the tables of docs/origins.md.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from outcome import Left, Pair, liborth, over_pairs

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.methods import METHODS, Amount, Layer

SHARES = (0.03, 0.1, 0.2, 0.3, 0.5)
SHOWN, LEVELS = 0.1, (0.5, 1.0, 2.0)
"""The share of elements whose figures are shown; the codes' losses at which skill is compared, nats."""
WHERE = re.compile(r"\.(\d+)\.(self_attn|mlp)\.")


@dataclass(frozen=True)
class Point:
    """One edit: the share of ‖U‖² that went, the skill kept, and what is left of the pair."""

    removed: float
    kept: float
    left: Left


def scores(pair: Pair, factors: Path) -> dict[str, torch.Tensor]:
    """Return the impact of every element of every linear layer."""
    found, rule = {}, METHODS["impact"]
    with (
        FactorSet.open(factors) as held,
        Checkpoint.open(pair.folder / "base") as base,
        Checkpoint.open(pair.folder / "finetuned") as tuned,
    ):
        for name in (name for name in held.names if "proj" in name and held.holds("diagonal", name)):
            stored = held.layers[name].tensor
            update = tuned.load(stored).float() - base.load(stored).float()
            layer = Layer(stored, update, float(update.square().sum()), torch.Generator(), diagonal=held.diagonal(name))
            found[stored] = rule.score(rule.basis(layer, Amount("density", 0.1)), layer)
    return found


def cut_at(found: dict[str, torch.Tensor], share: float) -> float:
    """Return the threshold that this share of all elements reaches."""
    every = torch.cat([one.flatten() for one in found.values()])
    return float(every.kthvalue(max(int((1 - share) * len(every)), 1)).values)


def edits(found: dict[str, torch.Tensor], factors: Path, share: float) -> list[tuple[str, tuple[object, ...]]]:
    """Return the edits that take this share of all elements, as words of the command line."""
    retain, high, low = ("--retain", factors), ("--memory-side", "high"), ("--memory-side", "low")
    tau, below = cut_at(found, share), cut_at(found, 1 - share)
    return [
        ("impact ≥ τ, one τ: the founding version", ("--method", "impact", "--threshold", tau, *retain, *high)),
        ("impact, a τ for each matrix", ("--method", "impact", "--density", share, *retain, *high)),
        ("impact < τ, one τ: the other end", ("--method", "impact", "--threshold", below, *retain, *low)),
        ("diagonal: U²·H high", ("--method", "diagonal", "--density", share, *retain, *high)),
        ("diagonal: U²·H low", ("--method", "diagonal", "--density", 1 - share, *retain, *low)),
        ("the largest elements", ("--method", "magnitude", "--density", share, *high)),
        ("elements at random", ("--method", "random", "--density", 1 - share)),
    ]


def where(found: dict[str, torch.Tensor], share: float) -> str:
    """Say which share of each part's elements one threshold takes."""
    tau = cut_at(found, share)
    taken: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    for name, values in found.items():
        place = WHERE.search(name)
        if place:
            taken[f"block {place[1]}, {place[2]}"].append((values >= tau).flatten())
    return "; ".join(f"{part} {float(torch.cat(some).float().mean()):.0%}" for part, some in taken.items())


def at_level(points: list[Point], codes: float) -> str:
    """Return the skill kept where the codes' loss first reaches a level, on the straight line between two doses."""
    before = (0.0, 1.0)
    for point in points:
        here = (point.left.codes, point.kept)
        if here[0] >= codes:
            share = (codes - before[0]) / (here[0] - before[0])
            return f"{before[1] + share * (here[1] - before[1]):.1%}"
        before = here
    return "not reached"


def measured(pair: Pair, out: Path, words: tuple[object, ...]) -> Point:
    """Split, and measure what is left."""
    for place in (out, out.with_name("out.private")):
        shutil.rmtree(place, ignore_errors=True)
    liborth("split", pair.folder / "base", pair.folder / "finetuned", *words, "-i", "proj", "-o", out)
    totals = json.loads((out / "liborth.manifest.json").read_text(encoding="utf-8"))["totals"]
    left = pair.left(out)
    return Point(totals["removed"], pair.kept(left), left)


def lines(pair: Pair, work: Path) -> list[str]:
    """Measure every edit on one pair; return its table."""
    retain, factors, out = pair.folder / "retain.jsonl", work / "retain", work / "out"
    liborth("curvature", pair.folder / "finetuned", "--data", retain, "--truncate", "--diagonal", "-o", factors)
    impact, shown = scores(pair, factors), dict[str, Point]()
    found: defaultdict[str, list[Point]] = defaultdict(list)

    def measure(name: str, dose: float, words: tuple[object, ...]) -> None:
        found[name].append(measured(pair, out, words))
        print(name, dose, found[name][-1], flush=True)
        if dose == SHOWN:
            shown[name] = found[name][-1]

    for share in SHARES:
        for name, words in edits(impact, factors, share):
            measure(name, share, words)
    for scale in (0.9, 0.7, 0.5, 0.3):
        measure("the update scaled down", 0.0, ("--method", "scale", "--scale", scale))
    texts = ("--retain-data", retain, "--forget-data", pair.folder / "secrets.jsonl", "--truncate")
    for strength in (0.001, 0.01, 0.1):
        measure("tokenwise, told of the codes", 0.0, ("--method", "tokenwise", "--strength", strength, *texts))
    before, after = pair.ends
    head = (
        f"**{pair.name}** (held-out skill and codes, nats: before {before.skill:.3f} and {before.codes:.2f}, fine-tuned "
        f"{after.skill:.3f} and {after.codes:.2f}). Where the elements of highest impact lie, the first {SHOWN:.0%} of all "
        f"under one τ: {where(impact, SHOWN)}."
    )
    columns = [f"{SHOWN:.0%} of elements: of ‖U‖²", "skill kept", "codes, nats", "recited", "base's text, nats"]
    columns += [f"skill kept at {level:g} nats" for level in LEVELS]
    table = [f"| what goes to memory | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, points in found.items():
        cells = [""] * 5
        if point := shown.get(name):
            general = "" if point.left.general is None else f"{point.left.general:.2f}"
            cells = [
                f"{point.removed:.1%}",
                f"{point.kept:.1%}",
                f"{point.left.codes:.2f}",
                f"{point.left.recited:.0%}",
                general,
            ]
        table.append(f"| {name} | {' | '.join([*cells, *(at_level(points, level) for level in LEVELS)])} |")
    return [head, "", *table, ""]


if __name__ == "__main__":
    over_pairs(__doc__, "founding", "origins.md", lines)
