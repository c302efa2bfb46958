"""`--tracing`: where canaries are stored, by putting the memory back, or taking it out, one part of one block at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.errors import UsageError
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, option
from liborth_cli.verify.result import Facts, Heatmap, Metric, Result, Table

if TYPE_CHECKING:
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.verify.subject import Subject

PART = re.compile(r"\.(\d+)\.(\w+)\.")
"""Block and part of it in a parameter's name: layers.3.self_attn.q_proj."""
SHOWN = 8
"""Parts that the table lists."""


@dataclass(frozen=True)
class TracingOptions(Options):
    """How rules for a split are proposed."""

    trace_rules: float | None = option(
        None, "Print `split --for` rules that leave out the parts that together hold less than this share of the canaries."
    )


@dataclass(frozen=True)
class Cell:
    """One part of one block, and what it holds.

    Attributes:
        block: its number.
        part: its name in the model: self_attn, mlp.
        tensors: stored tensors in it.
        returned: nats a token by which the canaries' loss falls in the general model when only this part has its memory.
        lost: nats a token by which it rises in the fine-tuned model when only this part has none.
        skill: nats a token by which the loss of retain rows rises then; NaN without them.
    """

    block: int
    part: str
    tensors: frozenset[str]
    returned: float = 0.0
    lost: float = 0.0
    skill: float = float("nan")


@dataclass
class TracingFacts(Facts):
    """Rules for `split --for` that keep the parts that hold little, where they were asked for."""

    rules: list[str] | None


def run(subject: Subject, options: TracingOptions) -> Result:
    """Trace the canaries through the delta: W_g with one part of W_f, and W_f with one part of W_g, for every part.

    Causal tracing (Meng et al. 2022, arXiv 2202.05262) restores activations of a corrupted prompt. The split's memory is a
    difference of weights, so here weights are restored: no noise is drawn, and what is measured is what a split can cut. A part
    is what a block calls one: self_attn, mlp. The two columns differ where parts work together: `returned` is what a part
    brings alone, `lost` what cannot be had without it. What retain rows lose is for a picture, and is that of a sample of them.

    Raises:
        UsageError: when --trace-rules is no share.
    """
    from liborth_cli.stream.weights import Patched

    if options.trace_rules is not None and not 0 < options.trace_rules < 1:
        raise UsageError(f"--trace-rules takes a share between 0 and 1, not {options.trace_rules:g}")
    states = subject.states
    weights = {name: states.weights[name] for name in ("general", "finetuned")}
    empty = cells(states.model("general"))
    kinds = ["canaries", *([subject.sample.name] if "retain" in subject.data else [])]

    def losses(rows: str, base: str, other: str) -> list[np.ndarray]:
        """Return the losses with each part in turn from the other model; what comes before its block is computed once."""
        patches = [(cell.block, Patched(weights[base], weights[other], cell.tensors.__contains__)) for cell in empty]
        found = []
        for scores in states.score_from(rows, weights[base], patches):
            found.append(statistics.totals(scores)[0])
            progress.advance(1)
        return found

    general, tokens = statistics.totals(subject.score("canaries", "general"))
    start = {rows: statistics.totals(subject.score(rows, "finetuned")) for rows in kinds}
    found, count = list[Cell](), tokens.sum()
    with subject.console.progress("tracing", (len(kinds) + 1) * len(empty), "models") as progress:
        returned = [general - some for some in losses("canaries", "general", "finetuned")]
        lost = {rows: [some - start[rows][0] for some in losses(rows, "finetuned", "general")] for rows in kinds}
    for number, cell in enumerate(empty):
        sums = float(returned[number].sum() / count), float(lost["canaries"][number].sum() / count)
        skill = [float(lost[rows][number].sum() / start[rows][1].sum()) for rows in kinds[1:]]
        found.append(Cell(cell.block, cell.part, cell.tensors, *sums, *skill))
    order = sorted(range(len(found)), key=lambda i: -found[i].lost)
    top = found[order[0]]
    metrics = {
        "largest": _interval(
            lost["canaries"][order[0]],
            tokens,
            subject,
            "rise of the canaries' loss without the heaviest part's memory",
        ),
        "half": Metric.exact(_half([cell.lost for cell in found]), "share of the parts that hold half of what the parts hold"),
    }
    where = f"block {top.block}, {top.part}"
    alone = max(cell.returned for cell in found)
    on = f", on {subject.sample.words}" if kinds[1:] else ""
    verdict = (
        f"Taking one part's memory out of the fine-tuned model costs the canaries at most {top.lost:.3f} nats a token "
        f"({where}); putting one part's memory into the general model brings back at most {alone:.3f}. Half of what single "
        f"parts hold lies in {metrics['half'].value:.0%} of them."
    )
    figures = [
        _map(found, "Canaries: nats lost without a part's memory", lambda cell: cell.lost, verdict),
        _map(found, "Canaries: nats brought back by a part's memory alone", lambda cell: cell.returned, verdict),
        _table([found[i] for i in order[:SHOWN]], on),
    ]
    if on:
        figures.insert(1, _map(found, f"Skill: nats lost without a part's memory{on}", lambda cell: cell.skill, verdict))
    told = rules(found, options.trace_rules) if options.trace_rules is not None else None
    for rule in told or ():
        subject.console.note(f"--for '{rule}'")
    return Result("tracing", verdict, None, metrics, figures, TracingFacts(told))


def cells(model: BlockModel) -> list[Cell]:
    """List the parts of every block that hold matrices, in the order of the model."""
    parts: dict[tuple[int, str], set[str]] = {}
    for stage, sites in model.planned_sites().items():
        for site in sites:
            named = PART.search(site.parameter)
            if stage.isdigit() and named is not None:
                parts.setdefault((int(stage), named[2]), set()).update(piece.tensor.name for piece in site.pieces)
    return [Cell(block, part, frozenset(tensors)) for (block, part), tensors in parts.items()]


def rules(found: list[Cell], share: float) -> list[str]:
    """Return `--for` rules that leave out the lightest parts, which together hold at most this share of the canaries."""
    total = sum(max(cell.lost, 0.0) for cell in found)
    left, rest = [], share * total
    for cell in sorted(found, key=lambda cell: cell.lost):
        rest -= max(cell.lost, 0.0)
        if rest < 0:
            break
        left.append(cell)
    left.sort(key=lambda cell: (cell.block, cell.part))
    return [rf"\.{cell.block}\.{re.escape(cell.part)}\.=skip" for cell in left]


def _half(values: list[float]) -> float:
    heavy = np.sort(np.clip(values, 0.0, None))[::-1]
    return float((np.searchsorted(heavy.cumsum(), heavy.sum() / 2) + 1) / len(heavy)) if heavy.sum() > 0 else 1.0


def _interval(loss: np.ndarray, tokens: np.ndarray, subject: Subject, meaning: str) -> Metric:
    def statistic(weights: np.ndarray) -> np.ndarray:
        return (weights @ loss) / (weights @ tokens)

    groups = subject.groups("canaries")
    return statistics.bootstrap(statistic, [groups], subject.seed, f"{meaning}, nats a token", statistics.LOSS)


def _map(found: list[Cell], title: str, value: Callable[[Cell], float], alt: str) -> Heatmap:
    blocks, parts = sorted({cell.block for cell in found}), list(dict.fromkeys(cell.part for cell in found))
    at = {(cell.block, cell.part): value(cell) for cell in found}
    values = tuple(tuple(at.get((block, part)) for part in parts) for block in blocks)
    return Heatmap(title, alt, tuple(f"block {block}" for block in blocks), tuple(parts), values, "nats a token")


def _table(heavy: list[Cell], on: str) -> Table:
    columns = ("part", ">lost without it", ">brought back alone", f">skill lost without it{on}")
    rows = tuple((f"block {c.block}, {c.part}", c.lost, c.returned, None if c.skill != c.skill else c.skill) for c in heavy)
    return Table("The parts that hold most", columns, rows)


CHECK = Check(
    name="tracing",
    title="Where canaries are stored",
    words="Put the memory back, or take it out, one part of a block at a time.",
    part=Part.MECHANISM,
    run=run,
    metrics=("largest", "half"),
    needs=(Need.FINETUNED, Need.CANARIES),
    options=TracingOptions,
)
