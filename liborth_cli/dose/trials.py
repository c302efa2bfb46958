"""Candidates that nobody writes: each is read through its filters, and measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.curvature.factors import FactorSet
from liborth_cli.dose.courses import Course
from liborth_cli.dose.gauge import Gauge, Reading
from liborth_cli.dose.remembered import Remembered
from liborth_cli.machine import Run, available_bytes, process_bytes
from liborth_cli.measure.unwritten import Unwritten
from liborth_cli.methods import Amount
from liborth_cli.split import SplitOptions, Splitter


@dataclass(frozen=True)
class Trial:
    """One candidate, measured.

    Attributes:
        title: what is turned, for tables.
        method: a key of METHODS.
        side: which end is memory.
        amount: how much leads.
        dose: on the course's own scale; more removes more, but for ranks.
        removed: share of the update's energy in the memory part.
        reading: what was measured.
    """

    title: str
    method: str
    side: str
    amount: Amount
    dose: float
    removed: float
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "method": self.method,
            "memory_side": self.side,
            "amount": str(self.amount),
            "removed": self.removed,
            "title": self.title,
            **self.reading.to_json(),
        }


class Filtered(Unwritten):
    """The general checkpoint a split would write, its decompositions remembered."""

    def __init__(self, plan: Splitter, run: Run, remembered: Remembered) -> None:
        """Put the memory between the plan and its arithmetic."""
        super().__init__(plan, run.device)
        self._divider = replace(self._divider, split=remembered)


@dataclass
class Laboratory:
    """Tries doses of one pair.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        options: the split, but for method, side and amount.
        retain: factors of the retain data, or None.
        forget: factors of the forget data, one for each set.
        gauge: what is measured.
        run: device and threads.
        console: where progress goes.
    """

    reference: Checkpoint
    finetuned: Checkpoint
    options: SplitOptions
    retain: FactorSet | None
    forget: Sequence[FactorSet]
    gauge: Gauge
    run: Run
    console: Console
    tried: int = 0

    @contextmanager
    def on(self, course: Course) -> Iterator[Bench]:
        """Get ready for one course; its decompositions are forgotten at the end."""
        options = replace(self.options, method=course.method, amount=course.amount(course.grid[-1]), memory_side=course.side)
        plan = Splitter(self.reference, self.finetuned, options, self.retain, self.forget)
        budget = max(available_bytes() - process_bytes(), 0) // 2
        yield Bench(self, course, plan, Remembered(budget, rank=int(max(course.grid)) if course.kind == "rank" else 1))


@dataclass
class Bench:
    """One course, ready to be tried.

    Attributes:
        laboratory: the pair and the gauge.
        course: what is turned.
        plan: the split at some dose.
        remembered: its decompositions.
    """

    laboratory: Laboratory
    course: Course
    plan: Splitter
    remembered: Remembered

    def measure(self, dose: float) -> Trial:
        """Measure one dose."""
        amount = self.course.amount(dose)
        return self._measure(amount, dose, self.course.title, self.course.method, self.course.side)

    def like(self, trial: Trial) -> Trial:
        """Measure a random edit that takes as much energy from every matrix as a trial did.

        Args:
            trial: of this course; it is divided again to know its sizes when it was not the last one.
        """
        self.remembered.match = None
        self.measure(trial.dose)
        self.remembered.match = {key: min(max(1 - r.memory, 0.0), 1.0) for key, r in self.remembered.shares.items()}
        try:
            # The amount shown is that of the edit it is as large as.
            return self._measure(trial.amount, trial.dose, f"random, sized as {trial.title}", "random", "tail")
        finally:
            self.remembered.match = None

    def _measure(self, amount: Amount, dose: float, title: str, method: str, side: str) -> Trial:
        plan = copy.copy(self.plan)
        plan.options = replace(plan.options, amount=self.course.amount(dose))
        self.remembered.shares.clear()
        reading = self.laboratory.gauge.read(Filtered(plan, self.laboratory.run, self.remembered))
        self.laboratory.tried += 1
        trial = Trial(title, method, side, amount, dose, self.remembered.removed, reading)
        self.laboratory.console.detail(f"{trial.title} {trial.amount}: {trial.reading}")
        return trial
