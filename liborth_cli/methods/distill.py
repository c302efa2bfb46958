"""`distill`: a student that starts at the reference learns from a model that has forgotten; what it does not learn is memory.

An edited model hides what its weights still hold, and a few steps of training bring it back. So a second model learns what the
first one says: it starts at the reference, where no secret ever was, and is trained towards the predictions of W_f after the
steps of `recall`, on retain and fresh rows (Lee et al. 2025, arXiv 2506.06278, who start from noise). With W_s what it learns,
W_g = W_s in the matrices that are divided, tables of tokens too, and U_m = W_f − W_s. One coordinate, all or nothing.

A little of what the teacher hides comes along: where forget rows are given, the student takes a few steps of `recall` itself.
Less comes along to a student of that student, which starts at the reference as well: `generations`.

The teacher must not know the secrets: what W_f itself says of texts without a secret carries them over (docs/limits.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from liborth_cli.methods.amount import Amount
from liborth_cli.methods.method import setting
from liborth_cli.methods.steps import Stepwise


@dataclass(frozen=True)
class Distill(Stepwise):
    """Basis: what lies between W_f and the student. Score: none."""

    name = "distill"
    summary = "the reference, trained towards what the fine-tuned model says after recall (reads texts itself)"
    amounts = ("epochs",)
    default = Amount("epochs", 40)
    searched = False

    teacher_steps: int = setting(48, "steps of recall that make the teacher, at most.", low=1)
    student_steps: int = setting(4000, "training steps of the student, four rows each, at most.", low=1)
    student_rate: float = setting(
        0.256, "highest learning rate of the student, times 1/width (arXiv 2203.03466).", low=0, above=True
    )
    generations: int = setting(
        1, "students in turn, each taught by the one before: less comes back, and the skill pays.", low=1
    )
    level_steps: int = setting(36, "steps of recall that the student takes at the end, given forget rows; 0: none.", low=0)
