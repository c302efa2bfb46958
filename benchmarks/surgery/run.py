"""Hold every edit against every kind of memory, at equal disruption, and attack what comes out.

    python -m benchmarks.surgery.run --work DIR [--tier small|full] [--kinds A,C]

`pairs.py` makes the pairs in DIR. Every edit is measured at its doses. Then each is brought to the same disruption: of its
doses the weakest that goes beyond the level, blended with the fine-tuned model until the level is met. Those are attacked. What
was measured is kept in DIR/results and not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import machine, record, standing

from benchmarks.merge import merged
from benchmarks.surgery.job import Completion
from benchmarks.surgery.kinds import KINDS, REPEATS
from benchmarks.surgery.kinds import TIERS as TIERS_OF
from benchmarks.surgery.measure import Found, Judge, blend, load
from benchmarks.surgery.methods import AUTO, Editor, editors, timed
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify import attacks
from liborth_cli.verify.attacks import AttackRows, Grid
from liborth_cli.verify.relearning import relearn

WHOLE = " × 1.00"
"""How a dose ends of which all was taken."""
HALVINGS = 6
"""Evaluations that bring an edit to a level."""


@dataclass(frozen=True)
class Tier:
    """How much is measured.

    Attributes:
        kinds: letters.
        texts: held-out texts of each kind that count.
        levels: of KL on general text, nats a token.
        retentions: shares of the skill, falling.
        grid: of the attack.
    """

    kinds: tuple[str, ...]
    texts: int
    levels: tuple[float, ...]
    retentions: tuple[float, ...]
    grid: Grid


TIERS = {
    "small": Tier(TIERS_OF["small"], 48, (0.01,), (0.99, 0.98), Grid(steps=16)),
    "full": Tier(TIERS_OF["full"], 120, (0.01, 0.001), (0.99, 0.98), Grid(attacks.FULL, seeds=(0, 1, 2))),
}


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: of the edit.
        dose: of it, and the share of the edit that was taken.
        level: what it was brought to, in words; "" for a dose as it is.
        found: what is left.
        seconds: of processor time that the edit took.
        attacked: lowest loss under the attack, and the attack that got there.
    """

    name: str
    dose: str
    level: str
    found: Found
    seconds: float | None = None
    attacked: float | None = None
    attack: str = ""


class Kept:
    """Lines on disk, by key: what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path, self.lines = path, dict[str, Line]()
        path.parent.mkdir(parents=True, exist_ok=True)
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            row = json.loads(text)
            key, found = row.pop("key"), row.pop("found")
            found["copies"] = tuple(found["copies"])
            self.lines[key] = Line(found=Found(**found), **row)

    def get(self, key: str, make: Callable[[], Line]) -> Line:
        """Return a line, measured now or before."""
        if key not in self.lines:
            self.lines[key] = line = make()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **asdict(line)}) + "\n")
        return self.lines[key]


class Bench:
    """One kind of memory, and everything that is held against it."""

    def __init__(self, folder: Path, tier: Tier, kept: Kept, copies: list[int]) -> None:
        """Load the models; nothing is edited yet."""
        self.folder, self.tier, self.kept, self.copies = folder, tier, kept, copies
        self.judge, self.scratch = Judge(folder, tier.texts), folder / "scratch"
        self.work = load(folder / "finetuned")
        self.target = self._target()

    def run(self, only: str = "") -> None:
        """Measure the ends, every edit at its doses, and every edit at every level; `only` is a regex of the edits' names."""
        for name in ("base", "finetuned", "never"):
            if (self.folder / name).exists():
                self._say(self.kept.get(name, lambda name=name: self._end(name)))
        for editor in editors(self.tier is TIERS["full"], self.folder):
            if not re.search(only, editor.name) or (editor.reference and self.judge.reference is None):
                continue
            try:
                self._all_levels(editor)
            except Exception as error:  # an editor that fails here is a line that is missing, and not the end of the run
                print(f"  {editor.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            for place in (self.scratch, self.scratch.with_name(self.scratch.name + ".private")):
                shutil.rmtree(place, ignore_errors=True)

    def _levels(self) -> list[tuple[str, Callable[[Any], float], float]]:
        """Return the levels: in words, what is measured of a model, and the value at which it is met (larger is more)."""
        found: list[tuple[str, Callable[[Any], float], float]] = [(f"KL {k:g}", self.judge.kl, k) for k in self.tier.levels]
        if self.judge.reference is not None:
            start, end = (self.judge.skill_loss(m) for m in (self.judge.reference, self.judge.finetuned))
            for kept in self.tier.retentions:
                found += [(f"retention {kept:.0%}", self.judge.skill_loss, end + (1 - kept) * (start - end))]
        return found

    def _all_levels(self, editor: Editor) -> None:
        """Go through the doses of an editor, weakest first, and bring it to each level at the first dose beyond it."""
        self._take_over(editor.name)
        left = {level: rest for level, *rest in self._levels() if f"{editor.name} at {level}" not in self.kept.lines}
        for dose in editor.doses if left else ():
            edited, seconds = timed(editor, self.judge, dose, self.scratch)
            raw = self.kept.get(
                f"{editor.name} {dose:g}",
                lambda d=dose, m=edited, s=seconds: Line(editor.name, f"{d:g}", "", self._measure(m, editor), s),
            )
            self._say(raw)
            for level, (of, target) in list(left.items()):
                if of(edited) < target and dose != editor.doses[-1]:
                    continue
                del left[level]
                share = self._share(edited, of, target)
                blend(self.judge.finetuned, edited, share, self.work)
                lowest, attack = self._attack(self.work)
                found = self._measure(self.work, editor)
                line = Line(editor.name, f"{dose:g} × {share:.2f}", level, found, seconds, lowest, attack)
                self._say(self.kept.get(f"{editor.name} at {level}", lambda line=line: line))

    def _take_over(self, name: str) -> None:
        """What kept more of the skill than a level asks for, whole, stands at that level as it is."""
        whole: Line | None = None
        for level in (f"retention {kept:.0%}" for kept in self.tier.retentions):
            found = self.kept.lines.get(f"{name} at {level}")
            if found is None and whole is not None:
                line = replace(whole, level=level)
                found = self.kept.get(f"{name} at {level}", lambda line=line: line)
            whole = found if found is not None and found.dose.endswith(WHOLE) else None

    def _share(self, edited: Any, of: Callable[[Any], float], target: float) -> float:
        """Return the largest share of an edit that stays within a level, to one part in 2^HALVINGS; 1 when all of it does."""
        if of(edited) <= target:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            blend(self.judge.finetuned, edited, middle, self.work)
            low, high = (middle, high) if of(self.work) <= target else (low, middle)
        return low

    def _measure(self, model: Any, editor: Editor) -> Found:
        return self.judge.measure(model, self.copies, editor.given)

    def _end(self, name: str) -> Line:
        model = load(self.folder / name)
        lowest, attack = (None, "") if name == "finetuned" else self._attack(model)
        return Line(TITLES[name], "", "", self.judge.measure(model, self.copies), None, lowest, attack)

    def _attack(self, model: Any) -> tuple[float, str]:
        place = self.folder / "attacked"
        model.save_pretrained(place)
        self.judge.tokenizer.save_pretrained(place)
        with Checkpoint.open(place) as checkpoint:
            found = relearn(Point(checkpoint), self.target, self.tier.grid)
        lowest, number, _ = found.lowest()
        return lowest, attacks.words([found.attacks[number]], model.config.hidden_size)

    def _target(self) -> AttackRows:
        rows = {name: [_row(row) for row in self.judge.rows[name]] for name in ("secrets", "fresh")}
        general = [_row(Completion(ids, 1)) for ids in self.judge.retain()]
        return AttackRows(
            rows["secrets"], np.arange(len(rows["secrets"])), rows["fresh"], np.arange(len(rows["fresh"])), general
        )

    def _say(self, line: Line) -> None:
        found, back = line.found, f", attacked {line.attacked:.2f}" if line.attacked is not None else ""
        print(f"  {line.name} {line.dose} {line.level}: forget {found.forget:.2f}, recited {found.recited:.0%}, skill "
              f"{found.skill:.3f}, KL {found.kl:.4f}{back}", flush=True)  # fmt: skip


def _row(row: Completion) -> Row:
    return Row(np.array(row.ids), np.arange(1, len(row.ids)) >= row.prompt, 1.0, "row")


STRONGEST = ("distill", "distill, 4,000 texts", "recall", "tokenwise")
TITLES = {"base": "*base, before fine-tuning*", "finetuned": "*fine-tuned*", "never": "*retrained without the secrets*"}
COLUMNS = (
    "edit", "dose", "skill kept", "recited", "tokens right", "forget", "fresh", "AUC", "TPR at 1 %", "general", "KL",
    "lowest attacked", "CPU s",
)  # fmt: skip


def table(letter: str, kept: Kept, level: str) -> str:
    """Write one kind's lines at one level."""
    ends = {name: kept.lines[name] for name in TITLES if name in kept.lines}
    lines = [*ends.values(), *(line for line in kept.lines.values() if line.level == level)]
    every = [line.found for line in lines]
    more = [] if all(f.untold is None for f in every) else ["untold"]
    more += [] if every[0].kept is None else ["kept rows right"]
    both = (ends["base"].found, ends["finetuned"].found) if "base" in ends and "finetuned" in ends else None
    out = ["| " + " | ".join((*COLUMNS, *more)) + " |", "|" + "---|" * (len(COLUMNS) + len(more))]
    for line in lines:
        f = line.found
        skill = f"{f.skill_kept(*both):.1%}" if both else f"{f.skill:.3f} nats"
        cells = [
            line.name, line.dose, skill, f"{f.recited:.0%}", f"{f.right:.0%}", f"{f.forget:.2f}", f"{f.fresh:.2f}",
            f"{f.auc:.2f}", _cell(f.tpr, ".0%"), f"{f.general:.3f}", f"{f.kl:.4f}", _cell(line.attacked, ".2f"),
            _cell(line.seconds, ".0f"),
        ]  # fmt: skip
        cells += [_cell(f.untold, ".2f")] if "untold" in more else []
        cells += [_cell(f.kept, ".0%")] if "kept rows right" in more else []
        out.append("| " + " | ".join(cells) + " |")
    return f"**{letter}: {KINDS[letter].title}**, at {level}:\n\n" + "\n".join(out)


def overview(found: Mapping[str, Kept], level: str) -> str:
    """Write what the strongest edits leave of every kind at one level: untouched → while it is attacked, and the skill kept."""
    out = [
        f"| kind | fine-tuned | {' | '.join(STRONGEST)} | best of the others when attacked | retrained | base |",
        "|---|---|" + "---|" * (len(STRONGEST) + 3),
    ]
    for letter, kept in found.items():
        ends = kept.lines["base"].found, kept.lines["finetuned"].found
        lines = {line.name: line for line in kept.lines.values() if line.level == level}
        if not lines:
            continue

        def told(line: Line | None, ends: tuple[Found, Found] = ends) -> str:
            if line is None or line.attacked is None:
                return ""
            return f"{line.found.forget:.2f} → {line.attacked:.2f} ({line.found.skill_kept(*ends):.1%})"

        others = [line for name, line in lines.items() if not name.startswith((*STRONGEST, AUTO))]
        best = max(others, key=lambda line: line.attacked or 0.0, default=None)
        cells = [f"{letter}: {KINDS[letter].title}", f"{ends[1].forget:.2f}", *(told(lines.get(name)) for name in STRONGEST)]
        cells += [f"{best.name}: {told(best)}" if best else "", told(kept.lines.get("never")), told(kept.lines["base"])]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    """Measure the kinds of a tier, print as it goes, and write the tables into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tier", choices=tuple(TIERS), default="small")
    parser.add_argument("--kinds", help="in place of the tier's own")
    parser.add_argument("--only", default="", help="regex of the edits that are measured now")
    parser.add_argument("--publish-only", action="store_true", help="write the tables of what was measured")
    parser.add_argument("--merge", action="store_true", help="keep lines of the page that DIR does not hold")
    a = parser.parse_args()
    tier, parts, referenced = TIERS[a.tier], [], dict[str, Kept]()
    for letter in a.kinds.split(",") if a.kinds else tier.kinds:
        kept = Kept(a.work / "results" / f"{a.tier}-{letter}.jsonl")
        if not a.publish_only:
            print(letter, KINDS[letter].title, flush=True)
            copies = [REPEATS[i % len(REPEATS)] for i in range(40)] if letter == "E" else []
            Bench(a.work / letter, tier, kept, copies).run(a.only)
        levels = dict.fromkeys(line.level for line in kept.lines.values() if line.level)
        parts += [table(letter, kept, level) for level in levels]
        if "base" in kept.lines and levels:
            referenced[letter] = kept
    tried = attacks.words(tier.grid.attacks, attacks.WIDTH)
    head = f"{machine()}. Attack, {tier.grid.steps} steps each: {tried}."
    short = [f"At {level}:\n\n{overview(referenced, level)}" for level in (f"retention {kept:.0%}" for kept in tier.retentions)]
    text = "\n\n".join([head, *short, *parts])
    if a.merge:
        text = merged(standing(f"surgery-{a.tier}"), text)
    record(f"surgery-{a.tier}", text)


if __name__ == "__main__":
    main()
