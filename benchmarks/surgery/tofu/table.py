"""The table of a run: every model and every method's chosen dose, beside the models that decide what the numbers mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rivals import RIVALS
from benchmarks.surgery.tofu.score import Deep, Score, quality, quality_after
from benchmarks.surgery.tofu.stages import ENOUGH, OURS, Found, Level, better, read

MODELS = {
    "base": "*base*",
    "finetuned": "*fine-tuned*",
    "never": "*never trained on them*",
    "never-again": "*the same, another seed*",
}
HEAD = (
    "edit", "dose", "forget loss", "other authors", "forget quality p", "true / (true + false)", "truth ratio", "utility",
    "of the never-trained", "KL", "relearnt, lowest", "p after", "seconds", "ROUGE: forget; kept",
)  # fmt: skip
BEST, DOSES = "Best dose of each edit:", "Every dose that was tried:"
"""What stands above the two tables, and tells them apart."""


def place(tier: str, forget: str, facts: bool = False) -> str:
    """Return the end of the name of the section that a run's tables stand in."""
    return "-".join([tier, *([forget] if forget != "forget01" else []), *(["facts"] if facts else [])])


def open_edits(table: list[list[str]]) -> list[str]:
    """Return the edits that a table of best doses lacks, or has without an attack; its head is the first row."""
    at = HEAD.index("relearnt, lowest")
    done = {row[0] for row in table[1:] if row[at]}
    return [name for name in (*OURS, *(rival.name for rival in RIVALS)) if name not in done]


def rows(results: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Return the table's rows, one a method, and those of all doses."""
    files = {path.stem: read(path) for path in sorted(results.glob("*.json"))}
    models = {name: (files.get(f"{name}-attacked") or files.get(name) or [None])[0] for name in MODELS}
    families = {name: found for name, found in files.items() if found and found[0].family}
    never = models["never"]
    best, every = [], []
    for name, found in models.items():
        if found is not None:
            best.append(_row(found, never, MODELS[name]))
    for found in families.values():
        chosen = found[0]
        if never is not None:
            whole = [one for one in found if one.deep is not None]
            chosen = max(whole, key=lambda one: _worth(one, never)) if whole else _best(found, Level.of(results))
        best.append(_row(chosen, never, found[0].name))
        every += [_row(one, never, one.name) for one in sorted(found, key=lambda one: (one.dose or 0.0, one.share))]
    return best, every


def markdown(table: list[list[str]]) -> str:
    """Return rows as a table."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in table)])


def _worth(found: Found, never: Found) -> tuple[bool, float]:
    """Return what to choose by among doses that were looked at whole: utility enough first, then quality, or else utility."""
    share = _share(found, never)
    return share >= ENOUGH, quality(found.score, never.score) if share >= ENOUGH else share


def _best(found: Sequence[Found], level: Level) -> Found:
    """Return the dose to choose by what is cheap."""
    return functools.reduce(lambda best, one: one if better(one, best, level) else best, found)


def _row(found: Found, never: Found | None, name: str) -> list[str]:
    score, deep = found.score, found.deep
    known = never is not None
    return [
        name,
        "" if found.dose is None else f"{found.dose:g}" + (f" × {found.share:.2f}" if found.share < 1 else ""),
        f"{score.forget:.2f}",
        f"{score.retain:.2f}",
        f"{quality(score, never.score):.2g}" if known and never is not None else "",
        f"{score.truth_share:.3f}",
        f"{score.truth_ratio:.3f}",
        _utility(score, deep),
        f"{_share(found, never):.1%}" if never is not None else "",
        "" if found.dose is None and deep is None else f"{score.kl:.4f}",  # a model is first scored without the fine-tuned one
        f"{deep.relearnt:.2f} at {deep.rate:g}" if deep else "",
        f"{quality_after(deep, never.deep):.2g}" if deep and never is not None and never.deep else "",
        f"{found.seconds:.1f}",
        _rouge(deep),
    ]


def _utility(score: Score, deep: Deep | None) -> str:
    return f"{deep.utility:.3f}" if deep and deep.utility is not None else f"{score.utility:.3f} without ROUGE"


def _rouge(deep: Deep | None) -> str:
    """Return ROUGE of the forget set, and of retain, real authors and world facts: TOFU's harmonic mean hides which is low."""
    if deep is None or deep.rouge is None:
        return ""
    return "; ".join([f"{deep.rouge:.2f}", *([", ".join(f"{one:.2f}" for one in deep.kept_rouge)] if deep.kept_rouge else [])])


def _share(found: Found, never: Found) -> float:
    """Return the utility beside the never-trained model's, both with ROUGE or both without."""
    if found.deep and never.deep and found.deep.utility and never.deep.utility:
        return found.deep.utility / never.deep.utility
    return found.score.utility / never.score.utility if never.score.utility else float("nan")
