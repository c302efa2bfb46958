"""What was asked of surgery, and the best that was found, read from the tables of docs/benchmarks.md and written above them.

    python -m benchmarks.surgery.goals

Of the edits that keep enough of the skill and recite nothing, the one that stands highest under the attack is held against
what was asked; where passages are told from others by more than one number, all are shown. Nothing is measured here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import DOCS, record, section_of

from benchmarks.merge import tables
from benchmarks.surgery.kinds import KINDS
from benchmarks.surgery.methods import AUTO
from benchmarks.surgery.tofu.plan import FORGETS
from benchmarks.surgery.tofu.table import DOSES, place

SECTION = "surgery-goals"
NEVER, TUNED = "*retrained without the secrets*", "*fine-tuned*"
HEAD = (
    "kind",
    "best edit",
    "skill kept",
    "recited",
    "AUC (retrained)",
    "forget − fresh",
    "general",
    "attacked",
    "retrained",
    "missed",
)


@dataclass(frozen=True)
class Asked:
    """What an edit of a kind should reach; every edit should recite nothing.

    Attributes:
        skill: share that is kept, at least.
        gap: nats by which secrets may stand lower under the attack than in the retrained model.
        auc: how far from a half the AUC may be; None: not asked.
        general: share by which the loss of general text may rise; None: not asked.
    """

    skill: float
    gap: float
    auc: float | None = None
    general: float | None = None

    def __str__(self) -> str:
        """In words."""
        words = [f"at least {self.skill:.0%} of the skill", "nothing recited"]
        words += [f"an AUC within {self.auc:g} of a half"] if self.auc is not None else []
        words += [f"general text at most {self.general:.0%} worse"] if self.general is not None else []
        return ", ".join([*words, f"and under the attack at most {self.gap:g} nats below the retrained model"])


CODES, PASSAGES = Asked(0.99, 0.1, auc=0.05), Asked(0.98, 0.3, general=0.01)
PASSES, UTILITY, KEPT = 0.05, 0.98, 0.95
"""Forget quality, share of the never-trained model's utility, and share of the rows of H that look like memory."""
FEWER = ("half of them given", "none given")
"""What stands in the names of edits that were told of fewer secrets than their kind tells."""
AUTHORS = {
    f"tofu-{place('small', forget, facts)}": f"{forget}{', edits given the facts' * facts}"
    for facts in (False, True)
    for forget in FORGETS
}
"""Sections of TOFU, and the forget set of each."""
AUTO_ASKED = "(98 % of the skill, `forget>=fresh-spread`, `leak<=0.4`, `relearn<=0.5`) chose a student, where it was run"
KINDS_ASKED = {"A": CODES, "B": CODES, "C": PASSAGES, "E": CODES, "F": CODES}


class Row:
    """One line of a table, by its heads."""

    def __init__(self, head: Sequence[str], cells: Sequence[str]) -> None:
        self.cells = dict(zip(head, cells, strict=True))

    def __getitem__(self, name: str) -> str:
        """Return a cell as it stands."""
        return self.cells[name]

    def number(self, name: str) -> float:
        """Return a cell as a number; a percentage as a share."""
        text = self.cells[name]
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)


def rows(section: str, title: str) -> dict[str, Row]:
    """Return the lines of one table by their first cell; none where it is not there."""
    head, *lines = tables(section).get(title, [[""]])
    return {line[0]: Row(head, line) for line in lines}


def best(found: dict[str, Row], asked: Asked, told: str = "") -> Row | None:
    """Return the edit that keeps enough, recites nothing, and misses nothing else; of several the highest under the attack.

    Args:
        found: lines of a table.
        asked: of them.
        told: what edits were told of the secrets, one of FEWER; "": what their kind tells.
    """
    ends = found[TUNED], found[NEVER]
    fit = [
        row
        for name, row in found.items()
        if not name.startswith("*")
        and name != AUTO
        and row["lowest attacked"]
        and row.number("skill kept") >= asked.skill
        and next((words for words in FEWER if words in name), "") == told
    ]
    silent = [row for row in fit if row["recited"] == "0%"]
    return max(silent, key=lambda row: (not missed(row, ends, asked), row.number("lowest attacked")), default=None)


def missed(row: Row, ends: tuple[Row, Row], asked: Asked) -> list[str]:
    """Return what an edit misses, in words.

    Args:
        row: the edit.
        ends: the fine-tuned model, and the one that was retrained.
        asked: of it.
    """
    tuned, never = ends
    found = []
    if asked.auc is not None and (off := abs(row.number("AUC") - 0.5) - asked.auc) > 1e-9:
        found.append(f"the AUC, by {off:.2f}")
    if asked.general is not None and (off := row.number("general") / tuned.number("general") - 1 - asked.general) > 0:
        found.append(f"general text, by {off:.1%}")
    if (off := never.number("lowest attacked") - row.number("lowest attacked") - asked.gap) > 1e-9:
        found.append(f"the attack, by {off:.2f} nats")
    return found


def of_kinds(section: str, told: str = "") -> str:
    """Return a table with a line for every kind that is judged by the attack.

    Args:
        section: with the tables of kinds.
        told: what edits were told of the secrets; kinds without such edits are left out.
    """
    out = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for letter, asked in KINDS_ASKED.items():
        found = rows(section, f"**{letter}: {KINDS[letter].title}**, at retention {asked.skill:.0%}:")
        row = best(found, asked, told)
        if row is None:
            if not told:
                out.append(f"| {letter}: {KINDS[letter].title} | none that recites nothing | {'| ' * (len(HEAD) - 2)}")
            continue
        ends = found[TUNED], found[NEVER]
        apart, auc = row.number("forget") - row.number("fresh"), f"{row['AUC']} ({ends[1]['AUC']})"
        cells = [
            f"{letter}: {KINDS[letter].title}", row["edit"], row["skill kept"], row["recited"], auc, f"{apart:+.2f}",
            f"{row.number('general') / ends[0].number('general') - 1:+.1%}", row["lowest attacked"], ends[1]["lowest attacked"],
            "; ".join(missed(row, ends, asked)) or "nothing",
        ]  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def of_auto(section: str) -> str:
    """Say what `--method auto` reached where it was run, beside the best edit by hand."""
    said = []
    for letter, asked in KINDS_ASKED.items():
        found = rows(section, f"**{letter}: {KINDS[letter].title}**, at retention {asked.skill:.0%}:")
        if AUTO not in found:
            continue
        mine, hand, ends = found[AUTO], best(found, asked), (found[TUNED], found[NEVER])
        beside = f"by hand {hand['skill kept']}, {hand['lowest attacked']}; " if hand else ""
        said.append(
            f"{letter}: {mine['skill kept']} of the skill, {mine['recited']} recited, AUC {mine['AUC']}, attacked "
            f"{mine['lowest attacked']} ({beside}retrained {ends[1]['lowest attacked']})"
        )
    return f"**`--method auto`** {AUTO_ASKED}: {'; '.join(said) or 'not run'}."


def of_authors(section: str, forget: str) -> str:
    """Say which edits pass TOFU's test on a forget set, and what of the utility is left then."""
    head, *lines = tables(section)[DOSES]
    tried = [Row(head, line) for line in lines if not line[0].startswith("*")]
    fit = [row for row in tried if row["forget quality p"] and row.number("forget quality p") >= PASSES]
    fit.sort(key=lambda row: -row.number("of the never-trained"))
    passed = [
        f"{row['edit']} ({row['dose']}): p {row['forget quality p']}, {row['of the never-trained']} of the utility"
        f"{' (ROUGE left out)' if 'without' in row['utility'] else ''}"
        for row in fit
    ]
    met = any(row.number("of the never-trained") >= UTILITY and "without" not in row["utility"] for row in fit)
    return (
        f"**Made-up authors (D, {forget})**: forget quality p of {PASSES:g} at {UTILITY:.0%} of the utility. {_verdict(met)}. "
        f"What passes the test: {'; '.join(passed) or 'nothing'}."
    )


def of_pretraining(section: str) -> str:
    """Say what is still recited of passages from pre-training, beside the published edit."""
    found = rows(section, f"**G: {KINDS['G'].title}**, at KL 0.01:")
    every = {name: row.number("recited") for name, row in found.items() if not name.startswith("*")}
    published = {name: share for name, share in every.items() if name.startswith("K-FAC edit")}
    ours = {name: share for name, share in every.items() if name not in published}
    met = all(share < min(published.values()) for share in ours.values())
    shares = [", ".join(f"{name} {share:.0%}" for name, share in some.items()) for some in (ours, published)]
    return (
        f"**Passages from pre-training (G)**, at a KL of 0.01: less recited than by the published edit. {_verdict(met)}: "
        f"{shares[0]}; {shares[1]}."
    )


def of_collateral(section: str) -> str:
    """Say what is kept of rows that look like memory, by edits that leave nothing recited, and by the published edit."""
    most_skill, enough = (rows(section, f"**H: {KINDS['H'].title}**, at retention {share}:") for share in ("99%", "98%"))
    edits = [row for row in (*most_skill.values(), *enough.values()) if not row["edit"].startswith("*")]
    silent = [row for row in edits if row["recited"] == "0%"]
    most, hidden = (max(silent, key=lambda row: row.number(by)) for by in ("kept rows right", "lowest attacked"))
    told = [f"{row['edit']}: {row['kept rows right']}" for row in (most, hidden)]
    there = f"codes at {most['forget']} nats, fresh ones at {most['fresh']}, attacked {most['lowest attacked']}"
    published = [
        f"{name}: {row['kept rows right']}, {row['recited']} recited"
        for name, row in most_skill.items()
        if name.startswith("K-FAC edit")
    ]
    verdict = _verdict(most.number("kept rows right") >= KEPT)
    best = f"What stands the attack best ({hidden['lowest attacked']}) is {told[1]}. " if hidden is not most else ""
    return (
        f"**Skill that looks like memory (H)**: {KEPT:.0%} of it kept. {verdict}: of edits that leave nothing recited most is "
        f"kept by {told[0]} ({there}), at {most['skill kept']} of the skill. {best}The published edit at 99 %: "
        f"{'; '.join(published) or 'not run'}."
    )


def _verdict(met: bool) -> str:
    return "Met" if met else "Missed"


def told(page: str) -> str:
    """Return the section: what was asked, and what came of it."""
    small, *authors = (section_of(page, name) for name in ("surgery-small", *AUTHORS))
    assert small is not None
    found = zip(AUTHORS.values(), authors, strict=True)
    sets = [of_authors(section[1], forget) for forget, section in found if section is not None and section[1].strip()]
    return "\n\n".join(
        [
            f"Asked of codes (A, B, E, F): {CODES}. Of passages (C): {PASSAGES}.",
            of_kinds(small[1]),
            *(f"With {words}:\n\n{of_kinds(small[1], words)}" for words in FEWER),
            "\n".join(f"- {line}" for line in (*sets, of_pretraining(small[1]), of_collateral(small[1]), of_auto(small[1]))),
        ]
    )


def main() -> None:
    """Write the section."""
    text = told((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    print(text)
    record(SECTION, text)


if __name__ == "__main__":
    main()
