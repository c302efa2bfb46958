"""Relearning by low-rank updates beside relearning by all weights: the lowest loss of what is not taught, at every rate.

    python -m benchmarks.low_rank_attack SECRETS FRESH MODEL…

SECRETS and FRESH hold JSON lines with prompt and completion; half of the secrets are taught for 32 steps, each half in turn.
Prints a line for every model and way to train, and its best rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.texts import DataFile, RowReader
from liborth_cli.stream.weights import Point
from liborth_cli.verify.attacks import LOW_RANK_RATES, RATES, Attack, AttackRows, Grid
from liborth_cli.verify.relearning import relearn

RANKS = (0, 4, 16)
VOCABULARY, LONGEST = 1 << 20, 1 << 14
"""More than the rows of any model have."""


def main() -> None:
    """Attack, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("secrets")
    parser.add_argument("fresh")
    parser.add_argument("models", nargs="+", type=Path)
    a = parser.parse_args()
    print("| model | trained | best rate | lowest | fresh rows, lowest | gap |\n|---|---|---|---|---|---|")
    for folder in a.models:
        reader = RowReader(TextEncoder(folder), VOCABULARY, LONGEST)
        canaries, fresh = (reader.read([DataFile.parse(path, path, secret=True)]) for path in (a.secrets, a.fresh))
        target = AttackRows(canaries, np.arange(len(canaries)), fresh, np.arange(len(fresh)))
        for rank in RANKS:
            tried = tuple(Attack(rate, rank=rank) for rate in (LOW_RANK_RATES if rank else RATES))
            with Checkpoint.open(folder) as checkpoint:
                found = relearn(Point(checkpoint), target, Grid(tried))
            ends = [(np.nanmin(found.curve("canaries", n)), np.nanmin(found.curve("fresh", n))) for n in range(len(tried))]
            lowest, number, _ = found.lowest()
            cells = f"{lowest:.2f} | {ends[number][1]:.2f} | {max(never - own for own, never in ends):+.2f}"
            print(f"| {folder.name} | {tried[0].way} | {tried[number].rate:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
