"""How large the benchmark is: what two busy cores manage in some two hours, and what a GPU does in minutes."""

from __future__ import annotations

from dataclasses import dataclass

from liborth_cli.verify.attacks import QUICK, Grid


@dataclass(frozen=True)
class Tier:
    """How much of everything.

    Attributes:
        questions: of GSM8K that are trained on, once each.
        longest: characters of a question with its answer, at most; longer ones are left out everywhere.
        each: records of each of the four kinds.
        often: how many times one half of the records is trained on.
        rarely: how many times the other half is.
        rows: of one step of training.
        rate: the highest learning rate.
        retain: questions, and paragraphs of each general kind, among the retain texts.
        retain_tokens: of them that `split` reads, at most.
        scored: held-out questions, and paragraphs of each general kind, that a model is judged by.
        attack: what a model is put through; on the records seen often, beside as many fresh ones.
        recall: steps of `recall`.
        lessons: questions, and paragraphs of each general kind, that `distill` reads: first those that were trained on.
        distill: its epochs; its teacher is what `recall` made.
        level: steps of recall that its student takes.
    """

    questions: int
    longest: int
    each: int
    often: int
    rarely: int
    rows: int
    rate: float
    retain: tuple[int, int]
    retain_tokens: int
    scored: tuple[int, int]
    attack: Grid
    recall: int
    lessons: tuple[int, int]
    distill: int
    level: int


TIERS = {
    "cpu": Tier(
        questions=240, longest=560, each=8, often=30, rarely=3, rows=12, rate=5e-4, retain=(28, 10), retain_tokens=8192,
        scored=(24, 8), attack=Grid(QUICK, steps=8), recall=24, lessons=(720, 40), distill=2, level=12,
    ),
    "gpu": Tier(
        questions=2400, longest=2000, each=12, often=40, rarely=4, rows=16, rate=3e-4, retain=(400, 80), retain_tokens=65536,
        scored=(80, 20), attack=Grid(QUICK), recall=48, lessons=(2400, 200), distill=4, level=36,
    ),
}  # fmt: skip
