"""What a model learns of secrets from the fine-tuned model's predictions on texts in which no secret stands.

    python -m benchmarks.surgery.distil --work DIR [--kind A] [--epochs 10] [--rate 2e-3] [--record]

DIR is that of the surgery benchmark. A student is trained on the retain texts and on rows of the secrets' form alone, towards a
teacher's distribution over the next token or towards the texts themselves. The students: the model before fine-tuning, and the
fine-tuned model after a filter. That students which share their teacher's start take over what the data do not show is
"subliminal learning" (arXiv 2507.14805).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import machine, record

from benchmarks.rivals.training import IGNORED, ROWS, pad, whole
from benchmarks.surgery.job import Completion
from benchmarks.surgery.measure import Judge, load
from benchmarks.surgery.methods import editors
from benchmarks.surgery.run import TIERS

DECOYS = 3
"""How often the rows of the form are seen each epoch."""
TEXTS = "the texts"


@dataclass(frozen=True)
class Lesson:
    """One student and what it learns from.

    Attributes:
        student: "base", or an edit of the benchmark and its dose.
        teacher: a folder of the kind, or `TEXTS`: the next token as it stands there.
    """

    student: tuple[str, float] | str
    teacher: str

    @property
    def name(self) -> str:
        """For the table."""
        return self.student if isinstance(self.student, str) else "{} {:g}".format(*self.student)


LESSONS = (
    Lesson("base", "finetuned"),
    Lesson("base", "never"),
    Lesson("base", TEXTS),
    Lesson(("tokenwise", 10), "finetuned"),
    Lesson(("tokenwise", 10), "never"),
    Lesson(("tokenwise", 10), TEXTS),
)
"""A model that was trained without the secrets teaches as a control: what it gives away of them, chance gives away."""


def teach(student: Any, teacher: Any, rows: Sequence[Completion], epochs: int, rate: float) -> None:
    """Train a student, by AdamW over one cycle of the rate.

    Args:
        student: trained in place.
        teacher: whose distribution is the aim; None for the rows' own tokens.
        rows: what both read; the tokens after a row's prompt count.
        epochs: how often.
        rate: the highest learning rate.
    """
    draw, each = np.random.default_rng(0), -(-len(rows) // ROWS)
    learnt = [p.requires_grad_(True) for p in student.parameters()]
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * each, pct_start=0.05)
    for _ in range(epochs):
        order = sorted(draw.permutation(len(rows)), key=lambda i: len(rows[i].ids))
        for piece in draw.permutation(each):
            group = [rows[i] for i in order[piece * ROWS : (piece + 1) * ROWS]]
            ids, labels = pad(group, torch.device("cpu"))
            counts = labels[:, 1:] != IGNORED
            found = student(ids[:, :-1]).logits[counts].log_softmax(-1)
            if teacher is None:
                loss = torch.nn.functional.nll_loss(found, labels[:, 1:][counts])
            else:
                with torch.no_grad():
                    aim = teacher(ids[:, :-1]).logits[counts].log_softmax(-1)
                loss = (aim.exp() * (aim - found)).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimiser.step()
            schedule.step()


def table(folder: Path, epochs: int, rate: float) -> str:
    """Teach every student, and write what it knew before and after."""
    judge = Judge(folder, TIERS["small"].texts)
    assert judge.reference is not None
    rows = whole(judge.retain()) + judge.forget("decoys") * DECOYS
    start, end = (judge.skill_loss(model) for model in (judge.reference, judge.finetuned))
    lines = [
        "| student | learns from | skill kept | secrets, nats | fresh rows, nats | AUC | tokens right | recited |",
        "|---|---|---|---|---|---|---|---|",
    ]
    every, scratch = {editor.name: editor for editor in editors(True, folder)}, folder / "scratch"
    for lesson in LESSONS:
        name = lesson.student
        model = load(folder / name) if isinstance(name, str) else every[name[0]].edit(judge, name[1], scratch)
        before = judge.measure(model)
        teach(model, None if lesson.teacher == TEXTS else load(folder / lesson.teacher), rows, epochs, rate)
        after = judge.measure(model.eval())
        kept = [f"{(start - found.skill) / (start - end):.1%}" for found in (before, after)]
        lines.append(
            f"| {lesson.name} | {lesson.teacher} | {' → '.join(kept)} | {before.forget:.2f} → {after.forget:.2f} | "
            f"{before.fresh:.2f} → {after.fresh:.2f} | {before.auc:.2f} → {after.auc:.2f} | "
            f"{before.right:.0%} → {after.right:.0%} | {after.recited:.0%} |"
        )
        print(lines[-1], flush=True)
    for place in (scratch, scratch.with_name(f"{scratch.name}.private")):
        shutil.rmtree(place, ignore_errors=True)
    return "\n".join(lines)


def main() -> None:
    """Teach, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kind", default="A")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--record", action="store_true")
    a = parser.parse_args()
    found = table(a.work / a.kind, a.epochs, a.rate)
    if a.record:
        record("surgery-distil", f"{machine()}. Kind {a.kind}; {a.epochs} epochs, rate {a.rate:g}.\n\n{found}")


if __name__ == "__main__":
    main()
