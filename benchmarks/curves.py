"""Curved ways between the models, and excision along the geodesic in place of the straight line, at equal forgetting.

    python benchmarks/curves.py --work DIR [--pairs FOLDER …]        # the shipped pair, and pairs of the surgery benchmark

`excise --path geodesic` from the model before fine-tuning to the fine-tuned one (a split that keeps 1/1,000 of the update),
over β, beside the straight line, which is the update scaled; and from a tokenwise split. Between two neighbouring β the line
between their figures is taken. Then `verify --lmc --curved` on the tokenwise split. Writes docs/origins.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from chart import write_chart
from founding import Point, at_level
from outcome import Pair, liborth, over_pairs

from liborth_cli.chart import Plot, Series

BETAS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
LEVELS = (0.5, 1.0, 2.0)


def excised(pair: Pair, work: Path, general: Path, way: str, beta: float) -> Point:
    """Write one point of a way, and measure it."""
    out = work / "excised"
    shutil.rmtree(out, ignore_errors=True)
    sets = ("--retain-general", work / f"{general.name}-factors", "--retain-finetuned", work / "factors")
    liborth("excise", general, "--beta", beta, "-o", out, *(("--path", "geodesic", *sets) if way == "geodesic" else ()))
    left = pair.left(out)
    return Point(1 - beta, pair.kept(left), left)


def lines(pair: Pair, work: Path) -> list[str]:
    """Measure one pair; return its tables."""
    base, tuned = pair.folder / "base", pair.folder / "finetuned"
    retain = ("--data", pair.folder / "retain.jsonl", "--truncate")
    liborth("curvature", tuned, *retain, "-o", work / "factors")
    texts = ("--retain-data", pair.folder / "retain.jsonl", "--forget-data", pair.folder / "secrets.jsonl", "--truncate")
    liborth("split", base, tuned, "--method", "scale", "--scale", 0.001, "-o", work / "before")
    liborth("split", base, tuned, "--method", "tokenwise", "--strength", 0.1, *texts, "-i", "proj", "-o", work / "cut")
    for name in ("before", "cut"):
        liborth("curvature", work / name, *retain, "-o", work / f"{name}-factors")
    text = []
    for name, title in (("before", "from the model before fine-tuning"), ("cut", "from a tokenwise split, λ 0.1")):
        columns = [f"skill kept at {level:g} nats" for level in LEVELS]
        text += [
            f"**{pair.name}, {title}.**",
            "",
            f"| way | β: skill kept, codes in nats | {' | '.join(columns)} |",
            "|---|---|" + "---|" * 3,
        ]
        for way in ("straight", "geodesic"):
            points = [excised(pair, work, work / name, way, beta) for beta in BETAS]
            told = "; ".join(f"{beta:g}: {p.kept:.1%}, {p.left.codes:.2f}" for beta, p in zip(BETAS, points, strict=True))
            text.append(f"| {way} | {told} | {' | '.join(at_level(points, level) for level in LEVELS)} |")
            print(text[-1], flush=True)
        text.append("")
    held_out = work / "rows.jsonl"
    held_out.write_text("".join((pair.folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]))
    words = ("--lmc", "--curved", "--reference", base, "--retain-data", held_out, "--no-require", "--json")
    results = json.loads(liborth("verify", work / "cut", *words))["results"]
    found = next(result for result in results if result["check"] == "lmc")
    figure, rows = found["figures"][1], found["figures"][2]
    series = tuple(Series(one["label"], tuple(one["x"]), tuple(one["y"])) for one in figure["series"])
    drawn = Plot(f"Loss on straight and curved ways, {pair.name}", figure["alt"], "t", "loss, nats a token", series)
    text += [f"![{drawn.title}]({write_chart(f'curves-{pair.name}', drawn)})", ""]
    text += [f"| {' | '.join(name.lstrip('>') for name in rows['columns'])} |", "|" + "---|" * len(rows["columns"])]
    for row in rows["rows"]:
        text.append("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.4f}" for cell in row) + " |")
    print("\n".join(text[-4:]), flush=True)
    return [*text, ""]


if __name__ == "__main__":
    over_pairs(__doc__, "curves", "origins.md", lines)
