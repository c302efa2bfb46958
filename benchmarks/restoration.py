"""Through which blocks and tokens are the codes recalled? Corrupted prompts, beside the tracing of weights.

    python benchmarks/restoration.py --work DIR [--pairs FOLDER …]        # writes its table into docs/verify.md

On the fine-tuned model of each pair; its general model is the one before fine-tuning, so nothing was cut yet.
"""

from __future__ import annotations

import json
from pathlib import Path

from outcome import Pair, liborth, over_pairs


def checked(out: Path, pair: Pair, *words: object) -> dict:
    """Verify, and return what the check that is named first found."""
    told = ("--canary", pair.folder / "secrets.jsonl", "--no-require", "--json")
    results = json.loads(liborth("verify", out, *words, *told))["results"]
    return next(result for result in results if f"--{result['check']}" == words[0])


def lines(pair: Pair, work: Path) -> list[str]:
    """Trace one pair both ways; return its table."""
    out = work / "uncut"
    liborth("split", pair.folder / "base", pair.folder / "finetuned", "--method", "scale", "--scale", 0.001, "-o", out)
    found = checked(out, pair, "--restoration", "--restoration-draws", 10)
    figure = found["figures"][0]
    lost = checked(out, pair, "--tracing")["figures"][0]
    parts = lost["columns"]
    head = ["after", *figure["columns"], *(f"{part}: nats lost without its memory" for part in parts)]
    table = [f"**{pair.name}.** {found['verdict']}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, values in zip(figure["rows"], figure["values"], strict=True):
        place = lost["rows"].index(name) if name in lost["rows"] else None
        held = ["" if place is None else f"{lost['values'][place][i]:.2f}" for i in range(len(parts))]
        table.append(f"| {name} | {' | '.join('' if v is None else f'{v:.0%}' for v in values)} | {' | '.join(held)} |")
    print("\n".join(table), flush=True)
    return [*table, ""]


if __name__ == "__main__":
    over_pairs(__doc__, "restoration", "verify.md", lines)
