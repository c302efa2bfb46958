"""A split in words and tables: what it will cost (--dry-run), what it did, and what it did not do."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.pair import Action
from liborth_cli.console import Console, JsonObject, clean, duration, size
from liborth_cli.linalg.regularised import SHARED, is_factorised, kernel_work
from liborth_cli.machine import Run
from liborth_cli.manifest import Split, SplitTotals, Tensor
from liborth_cli.methods import METHODS
from liborth_cli.methods.kronecker import DENSE_UP_TO
from liborth_cli.split.plan import Splitter
from liborth_cli.stream.work import DISK_RATE, rate, said

BASE_BYTES = 350_000_000
"""Resident memory of Python, torch and SciPy before any weight is read (measured, docs/benchmarks.md)."""
TYPICAL_STEPS = 10
"""Products with the kernel of many tokens that the default strength takes (measured, docs/benchmarks.md)."""
LOOSE = 0.01
"""How far above its minimum an objective may be without a warning."""
LARGE = 1.5
"""‖U_s‖²/‖U‖² from which something is wrong with the cut."""
ROUGH = 0.05
"""Relative error of a shortened factor from which the split says so."""
LITTLE = 1e-3
"""Share of ‖U‖² below which a removed part is said to be nothing: rounding to bfloat16 alone can be as large."""
NOISY = 0.1
"""Share of ‖U‖² that rounding explains from which the split says so."""
COLUMNS = (
    "tensor", ">energy", ">kept", ">removed", ">dimension", ">of memory", ">retain cost", ">forget gain", ">rank", "route",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Attributes:
        disk_bytes: written at most.
        memory_bytes: resident at most.
        seconds: order of magnitude of the time.
    """

    disk_bytes: int
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Measuring:
    """What measuring texts costs before, or while, a split divides.

    Attributes:
        lines: what is measured, a line each.
        document: the same for a machine.
        memory_bytes: held beside what dividing needs.
        seconds: that it takes.
        scattered: factors come block by block, and all files are written at once.
        dtype: of products with weights, where texts are measured.
    """

    lines: Sequence[str]
    document: JsonObject
    memory_bytes: int = 0
    seconds: float = 0.0
    scattered: bool = False
    dtype: str = "float32"


def estimate(plan: Splitter, measuring: Measuring | None = None) -> Estimate:
    """Predict disk, memory and time of a planned split, from headers and one short measurement."""
    options, factors, tokens = plan.options, plan.factors, plan.factors.tokens
    memory, work = 0, 0.0
    for item in plan.split_items:
        matrices, rows, cols = item.grid
        width = 8 if DTYPES[item.tensor.dtype].bits == 64 else 4
        short, long = min(rows, cols), max(rows, cols)
        extra = 0
        if options.method == "svd":
            gram_width = 4 if options.amount.kind == "rank" else 8
            extra = 3 * gram_width * short * short
            work += matrices * (short * short * long + 6.0 * short**3)
        elif "retain" in METHODS[options.method].needs:
            widths = factors.widths(item.twin)
            widest = max(widths, default=0)
            # In float64: two covariances, a factorisation and a basis both ways; coordinates, scores, filter, result.
            extra = 8 * (5 * min(widest, DENSE_UP_TO) ** 2 + 3 * (widest > DENSE_UP_TO) * widest**2 + 4 * short * long)
            # Tokens: they, what is whitened of them, and that rounded; their kernel, or what they have in common.
            once = is_factorised(tokens, (rows, cols))
            extra += 10 * tokens * (short + long) + (32 * tokens**2 if once else 8 * tokens * SHARED)
            # Joint bases are eigenproblems; tokens need a Cholesky factorisation a side, solves, and products with them.
            for side in widths:
                full = tokens == 0 and factors.seen > side // 3
                work += matrices * (10.0 * min(side, DENSE_UP_TO) ** 3 if full else side**3 + tokens * side**2)
            work += matrices * (2.0 * tokens * short * long * (2 if once else TYPICAL_STEPS))
            work += matrices * once * kernel_work(tokens, (rows, cols))
        copies = 1 + (options.side == "top") + (options.method in ("magnitude", "random"))
        memory = max(memory, copies * width * rows * cols + extra)
    # These counts were set against a Gram matrix, half of whose products are skipped.
    speed = 2 * rate(torch.device("cpu")) if work else math.inf
    read = plan.reference.nbytes + plan.finetuned.nbytes
    disk = plan.disk_bytes(measuring is not None and measuring.scattered)
    beside, before = (measuring.memory_bytes, measuring.seconds) if measuring else (0, 0.0)
    return Estimate(disk, BASE_BYTES + memory + beside, before + work / speed + (read + disk) / DISK_RATE + 2.0)


def dry_run_document(plan: Splitter, measuring: Measuring | None = None) -> JsonObject:
    """Return the plan as a JSON object."""
    tensors = {
        name: {"action": item.action.value, "why": item.why, "dtype": item.tensor.dtype, "shape": list(item.tensor.shape)}
        for name, item in plan.items.items()
    }
    told = measuring.document if measuring else {}
    return {**told, "tensors": tensors, "files": list(plan.files), "estimate": asdict(estimate(plan, measuring))}


def dry_run_table(plan: Splitter, measuring: Measuring | None = None) -> str:
    """Return the plan as text: one line for each kind of fate, every tensor that needs a word, and the cost."""
    lines = io.StringIO()
    counts = Counter((item.action.value, item.why.split(";")[0]) for item in plan.items.values())
    sizes = Counter[tuple[str, str]]()
    for item in plan.items.values():
        sizes[item.action.value, item.why.split(";")[0]] += item.tensor.nbytes
    for (action, why), count in sorted(counts.items()):
        print(f"{action:9} {count:6} tensors {size(sizes[action, why]):>10}   {why}", file=lines)
    for item in plan.items.values():
        if item.reference is None or ";" in item.why:
            print(f"  {clean(item.tensor.name)}: {item.action.value}, {item.why}", file=lines)
    found = estimate(plan, measuring)
    for line in measuring.lines if measuring else ():
        print(line, file=lines)
    dtype = measuring.dtype if measuring else "float32"
    texts = f" ({duration(measuring.seconds)} of it measuring texts)" if measuring and measuring.lines else ""
    print(
        f"writes at most {size(found.disk_bytes)}, needs about {size(found.memory_bytes)} of memory and "
        f"{duration(found.seconds)}{texts}, {said(torch.device('cpu'), dtype)}; nothing was written",
        end="",
        file=lines,
    )
    return lines.getvalue()


def report(split: Split, run: Run, console: Console) -> None:
    """Tell what a finished split did, and what it did not: totals in one line, with -v every tensor.

    Args:
        split: its manifest.
        run: device and threads.
        console: where it goes.
    """
    done = {name: t for name, t in split.tensors.items() if t.action == Action.SPLIT.value}
    touched = {name: t for name, t in done.items() if t.energy}
    totals, method = split.totals, split.parameters.method
    if not touched:
        console.warn(_why_nothing(split, done))
        return
    kept, removed = shares(totals)
    steps, count = "edit" in METHODS[method].needs, f"{len(touched)} of {len(split.tensors)} tensors"
    if steps:
        console.note(f"{count} moved: ‖Δ‖² is {totals.memory or 0:.2%} of what fine-tuning changed (‖U‖²)")
    else:
        console.note(f"{count} divided: of what fine-tuning changed (‖U‖²) {removed:.2%} was removed and {kept:.2%} kept")
    if (
        not steps
        and removed < LITTLE
        and not any(t.action in (Action.MEMORY.value, Action.WITHHELD.value) for t in split.tensors.values())
    ):
        console.warn(_why_little(split, touched))
    elif not METHODS[method].needs:
        console.note(f"{method} does not know what must go: what the fine-tuned model recites this one may recite; measure it")
    large = [name for name, t in touched.items() if (t.skill or 0.0) > LARGE]
    if large and not steps:
        console.warn(
            f"{len(large)} kept parts are larger than the update they are part of (first: {large[0]}): a filter in a "
            "basis that is not orthogonal can do that; more retain tokens, --damping or --hard help"
        )
    short = max((t.factor_error or 0.0 for t in touched.values()), default=0.0)
    if short > ROUGH:
        console.warn(f"wide factors were taken in short, with an error of up to {short:.0%}; a larger --factor-rank lowers it")
    worst = max((_largest(t.excess) for t in touched.values() if t.excess is not None), default=None)
    if worst is not None and removed >= LITTLE:
        console.note(
            f"rank truncation certified: tail energy within {worst:.1e} of the optimum "
            f"(float32 arithmetic or better, {run.where}, {run.threads} thread{'s' * (run.threads > 1)})"
        )
    gap = max((t.gap for t in touched.values() if t.gap is not None), default=None)
    if gap is not None and gap > LOOSE:
        console.warn(
            f"tokenwise stopped within {gap:.0%} of its objective's minimum; a smaller --strength is solved to {LOOSE:.0%}"
        )
    elif gap is not None:
        console.note(f"tokenwise certified: its objective is within {gap:.1e} of the minimum")
    _tell_rounding(touched, console)
    if totals.retain_cost is not None and "edit" not in METHODS[method].needs:  # steps told what they predicted and measured
        gains = " + ".join(f"{gain:.3g}" for gain in totals.forget_gain or [])
        console.note(
            f"the quadratic model predicts: retain loss +{totals.retain_cost:.3g} nats a token"
            + (f", forget loss +{gains} (curvature on the path)" if gains else "")
            + "; verify measures both"
        )
    if console.verbose:
        console.table(COLUMNS, [(name, *row(t, totals)) for name, t in done.items()])


def _tell_rounding(touched: dict[str, Tensor], console: Console) -> None:
    """Tell what rounding to fp8 did to the edit, and how much of the update it is, where anything was rounded."""
    facts = {name: t.model_extra for name, t in touched.items() if t.model_extra and "codes_changed" in t.model_extra}
    if not facts:
        return

    def norm(key: str) -> float:
        return math.sqrt(math.fsum(float(f[key]) ** 2 for f in facts.values()))  # type: ignore[arg-type]

    changed, beyond = (sum(int(f[key]) for f in facts.values()) for key in ("codes_changed", "beyond_largest_code"))  # type: ignore[arg-type]
    energy = math.fsum(touched[name].energy or 0.0 for name in facts)
    noise = math.fsum((touched[name].energy or 0.0) * float(f["update_rounding"]) for name, f in facts.items())  # type: ignore[arg-type]
    console.note(
        f"{len(facts)} fp8 matrices were divided as numbers and rounded again under the fine-tuned scales: {changed:,} codes "
        f"changed, each by the edit (norm {norm('edit_norm'):.3g}, off by {norm('edit_rounding_norm'):.3g} after rounding); "
        "all other codes are those of the fine-tuned model"
    )
    if noise > NOISY * energy:
        console.warn(
            f"rounding to fp8 alone explains {noise / energy:.0%} of what the two checkpoints differ by: that part is no "
            "learning; split the bfloat16 checkpoints where there are any"
        )
    if beyond:
        console.warn(f"{beyond:,} values lie beyond the largest code of their block, and became that code")


def shares(of: Tensor | SplitTotals) -> tuple[float, float]:
    """Return what was kept and what was removed of an update: ⟨U, U_s⟩/‖U‖² and ⟨U, U_m⟩/‖U‖², which add up to 1.

    Where the two parts are orthogonal these are their energies. In a basis that is not, the energies can both be larger than
    the update's, and say nothing to a reader.
    """
    kept = (1 + (of.skill or 0.0) - (of.memory or 0.0)) / 2
    return kept, 1 - kept


def _why_nothing(split: Split, done: dict[str, Tensor]) -> str:
    """Say why no matrix was divided, and what to do."""
    if done:
        return (
            f"nothing was removed: the two checkpoints hold the same weights, in all {len(done)} matrices; is this "
            "the fine-tuned model you mean?"
        )
    reasons = Counter(t.why.split(";")[0] for t in split.tensors.values()).most_common(3)
    listed = ", ".join(f"{count} × {why}" for why, count in reasons)
    return f"nothing was removed: no matrix could be divided ({listed}); `liborth inspect BASE FINETUNED -v` lists them"


def _why_little(split: Split, touched: dict[str, Tensor]) -> str:
    """Say why (nearly) nothing was removed, and what to do."""
    begin = "nothing was removed: the general checkpoint is the fine-tuned one up to rounding, secrets included"
    ranks = [_largest(rank) for t in touched.values() if (rank := (t.model_extra or {}).get("update_rank")) is not None]
    if len(ranks) == len(touched):
        most = int(max(ranks))
        below = f"a --rank below {most} cuts it, and" if most > 1 else "no --rank cuts it;"
        return f"{begin}. The update has rank {most}, and all of it was kept; {below} forgetting takes --forget-data"
    method = METHODS[split.parameters.method]
    advice = "a larger --strength removes more" if "strength" in method.amounts else "a smaller amount keeps less"
    return f"{begin}. {split.parameters.method} at {split.parameters.amount} takes hardly anything of this update; {advice}"


def _largest(value: object) -> float:
    return max(map(float, value)) if isinstance(value, list) else float(value)  # type: ignore[arg-type]


def row(record: Tensor, totals: SplitTotals) -> list[str]:
    """Return a tensor's cells: energies, participation ratios of update and memory, and its shares of the predictions."""
    extra = record.model_extra or {}

    def mean(value: float | list[float] | None) -> str:
        value = sum(value) / len(value) if isinstance(value, list) and value else value
        return f"{value:.3g}" if isinstance(value, float) else ""

    def share(mine: float | list[float] | None, every: float | list[float] | None) -> str:
        whole = sum(every) if isinstance(every, list) else every
        return f"{(sum(mine) if isinstance(mine, list) else mine) / whole:.1%}" if mine is not None and whole else ""

    parts = [f"{part:.1%}" for part in shares(record)] if record.energy else ["", ""]
    return [
        f"{record.energy or 0.0:.3e}",
        *parts,
        mean(record.dimension),
        mean(record.memory_dimension),
        share(record.retain_cost, totals.retain_cost),
        share(record.forget_gain, totals.forget_gain),
        str(extra.get("rank", "")),
        str(extra.get("route", "")),
    ]
