"""The table of `tune_stories.py`, and its place in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from record import machine, record
from tune_relearning import STEPS


@dataclass(frozen=True)
class Found:
    """What is in one model: losses in nats a token.

    Attributes:
        skill: on held-out text of the skill (Shakespeare, GSM8K).
        general: on held-out text of what the base knew (stories, Python).
        learnt: on 200 rows of the skill that were trained on.
        secret: on the codes.
        recited: share of the codes that greedy decoding gives back.
        fresh: on codes for other names that nobody trained on, in the same model.
        attacked: of half of the codes while the other half is learnt again: before, and after each of `STEPS`.
    """

    skill: float
    general: float
    learnt: float
    secret: float
    recited: float
    fresh: float
    attacked: list[float] | tuple[float, ...]

    @property
    def after(self) -> float:
        """Mean loss during the attack."""
        return sum(self.attacked[1:]) / len(self.attacked[1:])


def table(results: dict[str, list[Found]]) -> str:
    """Render every run: the mean of its seeds, and ± half the range where there are several."""
    base, full, never = (results.get(name, results["base"]) for name in ("base", "full", "never"))
    before, gain = base[0].skill, base[0].skill - mean(full, lambda f: f.skill)
    head = " / ".join(map(str, STEPS))
    lines = [
        f"| run | seeds | skill | gained | train | general | change | secrets | fresh | recited | attacked: 0 / {head} | gap |",
        "|" + "---|" * 12,
    ]
    for name, found in results.items():
        cells = [
            name,
            str(len(found)),
            spread(found, lambda f: f.skill),
            spread(found, lambda f: (before - f.skill) / gain * 100, 1) + " %" if gain else "",
            spread(found, lambda f: f.learnt),
            spread(found, lambda f: f.general),
            spread(found, lambda f: (f.general / base[0].general - 1) * 100, 1) + " %",
            spread(found, lambda f: f.secret, 3),
            spread(found, lambda f: f.fresh),
            f"{mean(found, lambda f: f.recited):.0%}",
            " / ".join(f"{mean(found, lambda f, i=i: f.attacked[i]):.2f}" for i in range(len(found[0].attacked))),
            "" if name in ("base", "never") else _gap(never, found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(results: dict[str, list[Found]], case: str, protected: str) -> None:
    """Put the table on the page, and what protecting takes away below it."""
    record(f"tune-{case}", f"{machine()}\n\n{table(results)}\n\n{protected}")


def mean(found: list[Found], value: Callable[[Found], float]) -> float:
    """Average over seeds."""
    return sum(map(value, found)) / len(found)


def spread(found: list[Found], value: Callable[[Found], float], digits: int = 2) -> str:
    """Say the mean, and ± half the range when there are several seeds."""
    values = [value(f) for f in found]
    text = f"{sum(values) / len(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _gap(never: list[Found], found: list[Found]) -> str:
    """Mean loss of the never-trained control during the attack minus this model's, seed by seed where both have it."""
    gaps = [control.after - model.after for control, model in zip(never, found, strict=False)]
    text = f"{sum(gaps) / len(gaps):.2f}"
    return text if len(gaps) == 1 else f"{text} ± {(max(gaps) - min(gaps)) / 2:.2f}"
