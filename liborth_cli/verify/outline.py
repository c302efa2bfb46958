"""`verify --dry-run`: which checks would run, what each reads and trains, and what that takes; no weight is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from liborth_cli.console import Console, JsonObject, duration, size
from liborth_cli.machine import available_bytes
from liborth_cli.stream import work
from liborth_cli.verify.check import Check, Options
from liborth_cli.verify.result import Untried
from liborth_cli.verify.subject import Subject

TRAINED = 3
"""Products with every weight at a position that is learnt from: forward, and back to activations and to weights."""


@dataclass(frozen=True)
class Planned:
    """What one check would do, at most.

    Attributes:
        check: its name.
        models: how many times a list of rows is scored that no check before it has scored.
        read: positions that are read forward.
        trained: positions that are learnt from.
        counted: whether these numbers are known.
    """

    check: str
    models: int = 0
    read: float = 0.0
    trained: float = 0.0
    counted: bool = True


@dataclass(frozen=True)
class Outline:
    """What a verification would do, at most.

    Attributes:
        checks: those that run, in order.
        left_out: check → why it does not.
        rows: list of rows → how many, and their positions.
        seconds: of what is counted, about.
        memory_bytes: of models, about.
        assumed: what the time assumes.
    """

    checks: list[Planned]
    left_out: Mapping[str, Untried]
    rows: Mapping[str, tuple[int, int]]
    seconds: float
    memory_bytes: int
    assumed: str

    @classmethod
    def of(
        cls, subject: Subject, checks: Mapping[str, Check], chosen: Mapping[str, Options], left_out: Mapping[str, Untried]
    ) -> Outline:
        """Count what checks would do.

        Args:
            subject: what is verified.
            checks: all, by name.
            chosen: check that runs → its options.
            left_out: check that does not → why.
        """
        scored, found, weight_bytes = set[tuple[str, str]](), list[Planned](), 0
        for name, options in chosen.items():
            one = checks[name].work(subject, options)
            if one is None:
                found.append(Planned(name, counted=False))
                continue
            weight_bytes = max(weight_bytes, one.weight_bytes if one.trained else 0)
            new = one.scored - scored
            scored |= new
            found.append(Planned(name, len(new), one.read + sum(_positions(subject, rows) for rows, _ in new), one.trained))
        seconds, memory = 0.0, 0
        if any(one.read or one.trained for one in found):
            model = subject.states.model("general")
            products = sum(one.read + TRAINED * one.trained for one in found) * work.multiplied(model)
            seconds = products / work.rate(model.device) + work.reading(model, len({state for _, state in scored}))
            resident = 2 * model.nbytes < available_bytes()
            memory = model.nbytes if resident else 2 * model.nbytes // (len(model.blocks) + 1)
            memory = max(memory, weight_bytes * model.elements)
        rows = {name: (len(some), _positions(subject, name)) for name, some in subject.data.items()}
        assumed = work.said(subject.run.device) if seconds else ""
        return cls(found, left_out, rows, seconds, memory, assumed)

    def __str__(self) -> str:
        """Say it in a sentence."""
        read, trained = sum(one.read for one in self.checks), sum(one.trained for one in self.checks)
        unknown = [one.check for one in self.checks if not one.counted]
        text = f"would run {len(self.checks)} checks, read {read:,.0f} tokens and train on {trained:,.0f}, all at most"
        if self.seconds:
            text += f"; about {duration(self.seconds)} and {size(self.memory_bytes)} of memory, {self.assumed}"
        return text + (f"; not counted: {', '.join(unknown)}" if unknown else "")

    def show(self, console: Console) -> None:
        """Print tables of what runs and what does not, and the sentence."""
        given = [f"{name}: {count:,} rows, {tokens:,} tokens" for name, (count, tokens) in self.rows.items()]
        cells = [
            (one.check, f"{one.models:,}", f"{one.read:,.0f}", f"{one.trained:,.0f}" if one.trained else "")
            if one.counted
            else (one.check, "not counted", "", "")
            for one in self.checks
        ]
        if not console.as_json:
            columns = ("check", ">scorings", ">tokens read", ">tokens trained on")
            console.table(columns, cells, "; ".join(given), out=True)
            console.table(("not run", "why"), [(name, one.words) for name, one in self.left_out.items()], out=True)
        console.result(str(self), self.to_json())

    def to_json(self) -> JsonObject:
        """Return a JSON object."""
        return {
            "checks": {
                one.check: {"scorings": one.models, "read": one.read, "trained": one.trained} if one.counted else None
                for one in self.checks
            },
            "not_run": {name: one.words for name, one in self.left_out.items()},
            "rows": {name: {"rows": count, "tokens": tokens} for name, (count, tokens) in self.rows.items()},
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
        }


def _positions(subject: Subject, rows: str) -> int:
    return sum(row.tokens for row in subject.states.data[rows].rows)
