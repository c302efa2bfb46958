"""Published edits on the real model: one dose of one of them, brought to the share of the skill that ours keep.

    python -m benchmarks.real.rivals --data DATA --work DIR --rival NPO --dose 3e-5 --out FOLDER

`benchmarks.real.run --parts rivals` does this for every rival. DIR is its folder: what it prepared is edited, with every
text that `distill` reads as what must stay and the records as what must go. Where an edit costs more than `KEPT` of the
skill, it is scaled down, W_f + s·(W − W_f), to the largest share s that does not.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from benchmarks.real.left import Judge
from benchmarks.real.model import load, load_tokenizer
from benchmarks.real.tiers import TIERS, Tier
from benchmarks.rivals import RIVALS
from benchmarks.surgery.job import Job, Rival
from benchmarks.surgery.measure import blend, read_pairs, read_texts
from benchmarks.surgery.tuning import share_within

KEPT = 0.97
"""Share of the skill: what the student of ours on the same texts keeps (docs/benchmarks.md)."""
SHARE = "share.txt"
"""Beside the weights: how much of the edit was taken."""


def title(rival: Rival, dose: float, folder: Path | None = None) -> str:
    """Name an edit for the table.

    Args:
        rival: that edits.
        dose: of it.
        folder: of its checkpoint, which knows how much of the edit was taken; while it is not made, none.
    """
    taken = f" × {float((folder / SHARE).read_text(encoding='utf-8')):.2f}" if folder is not None else ""
    return f"{rival.name} ({rival.source}), {dose:g}{taken}"


def is_title(name: str) -> bool:
    """Tell whether a name of the table, or of a command, is that of a published edit."""
    return name.startswith(tuple(f"{rival.name} ({rival.source})" for rival in RIVALS))


def edit(rival: Rival, dose: float, work: Path, judge: Judge, out: Path) -> float:
    """Edit the fine-tuned model, scale the edit down to its share, and write a bfloat16 checkpoint.

    Args:
        rival: that edits.
        dose: of it.
        work: the benchmark's folder.
        judge: that measures the skill.
        out: where the checkpoint goes.

    Returns:
        The share of the edit that was taken.
    """
    tuned, tokenizer = load(work / "finetuned").to(judge.device).eval(), load_tokenizer(work / "finetuned")
    base = load(work / "base").to(judge.device).eval()
    start, end = judge.skill_loss(base), judge.skill_loss(tuned)
    retain, forget = (work / "texts" / f"{name}.jsonl" for name in ("lessons", "secrets"))
    edited = copy.deepcopy(tuned)
    rival.run(Job(edited, base, read_texts(retain, tokenizer), read_pairs(forget, tokenizer), dose, 0))
    del base
    part = copy.deepcopy(tuned)

    def within(share: float) -> bool:
        blend(tuned, edited, share, part)
        return (start - judge.skill_loss(part)) / (start - end) >= KEPT

    share = share_within(within)
    blend(tuned, edited, share, part)
    part.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / SHARE).write_text(f"{share}\n", encoding="utf-8")
    return share


def words(rival: Rival, dose: float, out: Path) -> tuple[object, ...]:
    """Return the words of the command that makes one edit, behind those of every edit."""
    return "--rival", rival.name, "--dose", dose, "--out", out


def main() -> None:
    """Make one edit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=TIERS, default="cpu")
    parser.add_argument("--rival", choices=[rival.name for rival in RIVALS], required=True)
    parser.add_argument("--dose", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    (rival,) = (rival for rival in RIVALS if rival.name == a.rival)
    tier: Tier = TIERS[a.size]
    judge = Judge(a.data, a.work / "base", tier, torch.device(a.device))
    print(f"share {edit(rival, a.dose, a.work, judge, a.out):.3f}")


if __name__ == "__main__":
    main()
