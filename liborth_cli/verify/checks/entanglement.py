"""`--entanglement`: how far skill and memory touch, where the data can feel it."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli.manifest import Split
from liborth_cli.measure.retention import retention
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, option
from liborth_cli.verify.held_out import estimate
from liborth_cli.verify.result import Facts, Heatmap, Line, Metric, Result, Table
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    import torch

    from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
    from liborth_cli.curvature.factor_set import FactorSet

RANK = 8
"""Leading directions of each stream between which angles are taken."""
PARTS = 5
"""Parts of the rows whose factors are taken apart, so that leaving each out gives an interval."""
STATES = (("reference", "neither"), ("general", "skill only"), ("memory", "memory only"), ("finetuned", "both"))
SIDES = ("left", "right")


@dataclass(frozen=True)
class EntanglementOptions(Options):
    """In which curvature it is measured."""

    factors: list[Path] = option((), "--entanglement in this curvature (several: an interval).")


@dataclass(frozen=True)
class Streams:
    """One matrix's update, W_f − W_r = S + M, in the orientation y = Wx.

    Attributes:
        name: the layer's name in the factor sets.
        skill: S = W_g − W_r, (d_out, d_in), float64.
        memory: M = W_f − W_g, (d_out, d_in), float64.
    """

    name: str
    skill: torch.Tensor
    memory: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """What was measured of one matrix.

    Attributes:
        name: the layer's.
        eta: η with its interval.
        cosine: signed.
        traces: tr(GSAMᵀ), tr(GSASᵀ), tr(GMAMᵀ) in all factor sets, then with each left out.
        frobenius: the cosine without curvature.
        angles: smallest principal angle of the leading directions in degrees, by side.
        overlaps: mean squared cosine of those angles, by side.
        chances: what the overlap of random directions would be, by side.
        held: share of each stream's energy that its leading directions hold: skill, memory.
    """

    name: str
    eta: Metric
    cosine: float
    traces: tuple[tuple[float, float, float], ...]
    frobenius: float
    angles: tuple[float, float]
    overlaps: tuple[float, float]
    chances: tuple[float, float]
    held: tuple[float, float]

    @property
    def line(self) -> Line:
        """Its numbers by name."""
        found: Line = {
            "name": self.name, "eta": self.eta.value, "low": self.eta.low, "high": self.eta.high, "cosine": self.cosine,
            "frobenius": self.frobenius, "skill_held": self.held[0], "memory_held": self.held[1],
        }  # fmt: skip
        for number, side in enumerate(SIDES):
            found |= {f"{side}_angle": self.angles[number], f"{side}_overlap": self.overlaps[number]}
            found[f"{side}_chance"] = self.chances[number]
        return found


@dataclass
class EntanglementFacts(Facts):
    """Every matrix that was split."""

    layers: list[Line]


def run(subject: Subject, options: EntanglementOptions) -> Result:
    """Measure η per layer and overall, principal angles between the streams, and what each stream costs the other.

    S = W_g − W_r is the skill, M = W_f − W_g the memory, (d_out, d_in) a layer. In curvature from data the split did not see,
    A = E[aaᵀ] (d_in, d_in) of inputs and G = E[ggᵀ] (d_out, d_out) of output gradients (K-FAC, Martens and Grosse 2015, arXiv
    1503.05671),

        η = abs(tr(G S A Mᵀ)) / √(tr(G S A Sᵀ)·tr(G M A Mᵀ)),

    the cosine of the two streams as the loss feels them: 0 when moving along one leaves the cost of the other alone, 1 when
    they are the same direction. Overall: the sums over layers of all three traces. In the Frobenius metric, and in the split's
    own curvature, a hard cut makes it 0 by construction, which says nothing; so it is taken in held-out curvature. Interval:
    the jackknife over parts of the rows, one factor set a part. Angles: Björck and Golub 1973, between the 8 leading singular
    directions of each stream, on both sides.
    """
    with held_out_factors(subject, options.factors) as sets:
        layers = _layers(subject, sets)
        circular = _is_the_splits_own(subject, sets)
        count = len(sets)
    metrics, figures, sentences = {}, [], []
    if layers:
        worst = max(layers, key=lambda layer: layer.eta.value)
        metrics = {"eta": _overall(layers, count), "eta_worst": worst.eta}
        figures = [_heatmap(layers), _table(layers)]
        sentences.append(_sentence(metrics["eta"], worst))
    else:
        sentences.append("No matrix that was split has factors, so η cannot be measured.")
    if circular:
        sentences.append("These factors are the split's own: in them η is small by construction; give held-out data.")
    more, table = costs(subject)
    metrics |= more
    figures += [table] if table else []
    for name, first, second in (("skill_cost", "memory", "skill"), ("memory_cost", "skill", "memory")):
        if name in more and math.isfinite(more[name].value):
            sentences.append(f"Taking the {first} out costs {more[name].value:.1%} of the {second}.")
    facts = EntanglementFacts([layer.line for layer in layers])
    return Result("entanglement", " ".join(sentences), None, metrics, figures, facts)


def _layers(subject: Subject, sets: Sequence[FactorSet]) -> list[Layer]:
    """Measure every layer that was split and that all factor sets cover, one in memory at a time."""
    found, twice = [], _used_twice(sets[0])
    with subject.console.progress("entanglement", len(sets[0].names), "matrices", brief=True) as progress:
        for name in sets[0].names:
            usable = all(name in s.layers for s in sets) and name not in twice
            streams = read_streams(subject, sets[0], name) if usable else None
            if streams is not None:
                found.append(_layer(streams, sets))
            progress.advance(1)
    return found


def _layer(streams: Streams, sets: Sequence[FactorSet]) -> Layer:
    from liborth_cli.linalg.angles import leading_spaces, principal_angles

    traces = layer_traces(streams, sets)
    signed = [cosine(*t) for t in traces]
    skill, memory = (leading_spaces(matrix, RANK) for matrix in (streams.skill, streams.memory))
    sides = [(skill[0], memory[0]), (skill[1], memory[1])]
    angles = [principal_angles(*side) for side in sides]
    plain = [float((x * y).sum()) for x, y in (
        (streams.skill, streams.memory), (streams.skill, streams.skill), (streams.memory, streams.memory)
    )]  # fmt: skip
    return Layer(
        name=streams.name,
        eta=statistics.jackknife(signed[0], signed[1:], f"η of {streams.name}"),
        cosine=signed[0],
        traces=tuple(traces),
        frobenius=cosine(*plain),
        angles=_both(math.degrees(float(a.min())) for a in angles),
        overlaps=_both(float(a.cos().square().mean()) for a in angles),
        chances=_both(max(one.shape[1], other.shape[1]) / one.shape[0] for one, other in sides),
        held=(skill[2], memory[2]),
    )


def _both(values: Iterator[float]) -> tuple[float, float]:
    left, right = values
    return left, right


def read_streams(subject: Subject, factors: FactorSet, name: str) -> Streams | None:
    """Form S and M of one layer; None when the split did not touch it, or the reference does not have it."""
    record = factors.layers[name]
    general, finetuned, reference = subject.general, subject.finetuned, subject.reference
    assert finetuned is not None and reference is not None
    sides = [side.tensors.get(record.tensor) for side in (reference, general, finetuned)]
    if any(info is None or info.shape != sides[1].shape for info in sides if sides[1] is not None) or None in sides:
        return None
    w_r, w_g, w_f = (
        _matrix(side, info, record.matrix or 0)
        for side, info in zip((reference, general, finetuned), sides, strict=True)
        if info is not None
    )
    skill, memory = w_g - w_r, w_f - w_g
    if not (skill.any() and memory.any()):
        return None
    return Streams(name, skill.T, memory.T) if record.transposed else Streams(name, skill, memory)


def felt(matrix: torch.Tensor, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return G X A: its sum of products with Y is tr(G X A Yᵀ), the inner product of X and Y in a Kronecker-factored curvature.

    Args:
        matrix: X, (d_out, d_in).
        a: A, (d_in, d_in), or its diagonal (d_in,).
        g: G, (d_out, d_out), or its diagonal (d_out,), or (heads, d, d) blocks.
    """
    import torch

    x = matrix * a if a.dim() == 1 else matrix @ a
    if g.dim() == 1:
        return g[:, None] * x
    return g @ x if g.dim() == 2 else torch.bmm(g, x.reshape(len(g), -1, x.shape[1])).reshape(x.shape)


def layer_traces(streams: Streams, sets: Sequence[FactorSet]) -> list[tuple[float, float, float]]:
    """Return (tr(GSAMᵀ), tr(GSASᵀ), tr(GMAMᵀ)) in the mean of all factor sets, then with each of them left out in turn.

    Args:
        streams: S and M of one layer.
        sets: factor sets that cover it; with one of them nothing can be left out.
    """
    import torch

    factors = [s.layer(streams.name) for s in sets]
    weights = [f.tokens for f in factors]
    a = [f.input_covariance.double() * w for f, w in zip(factors, weights, strict=True)]
    g = [f.gradient_covariance.double() * w for f, w in zip(factors, weights, strict=True)]
    whole_a, whole_g, tokens = sum(a), sum(g), sum(weights)
    assert isinstance(whole_a, torch.Tensor) and isinstance(whole_g, torch.Tensor)
    s, m, found = streams.skill, streams.memory, []
    for left_out in [None, *(range(len(sets)) if len(sets) > 1 else ())]:
        rest = tokens - (weights[left_out] if left_out is not None else 0.0)
        one_a = (whole_a - a[left_out] if left_out is not None else whole_a) / rest
        one_g = (whole_g - g[left_out] if left_out is not None else whole_g) / rest
        skill, memory = felt(s, one_a, one_g), felt(m, one_a, one_g)
        found.append((float((skill * m).sum()), float((skill * s).sum()), float((memory * m).sum())))
    return found


def cosine(across: float, skill: float, memory: float) -> float:
    """Return tr(GSAMᵀ)/√(tr(GSASᵀ)·tr(GMAMᵀ)); 0 where a stream has no cost at all."""
    size = math.sqrt(max(skill, 0.0)) * math.sqrt(max(memory, 0.0))
    return max(-1.0, min(1.0, across / size)) if size > 0 else 0.0


def _overall(layers: Sequence[Layer], sets: int) -> Metric:
    steps = 1 + (sets if sets > 1 else 0)
    signed = [cosine(*(math.fsum(layer.traces[i][k] for layer in layers) for k in range(3))) for i in range(steps)]
    return statistics.jackknife(signed[0], signed[1:], "η of all layers, in held-out curvature; 0 apart, 1 the same")


def _used_twice(factors: FactorSet) -> set[str]:
    """Return the layers whose tensor another layer shares (a tied embedding): neither use alone is its curvature."""
    tensors = [(r.tensor, r.matrix) for r in factors.layers.values()]
    return {n for n, r in factors.layers.items() if tensors.count((r.tensor, r.matrix)) > 1}


def _is_the_splits_own(subject: Subject, sets: Sequence[FactorSet]) -> bool:
    """Tell whether the split was made with the very data the factors are from."""
    from liborth_cli.stream.texts import data_hash

    used = subject.manifest.factors.retain if isinstance(subject.manifest, Split) else None
    known = set(used.data or ()) if used else set()
    seen = {sha256 for s in sets for sha256 in s.data}
    return bool(known & seen) or ("retain" in subject.data and data_hash(subject.rows("retain")) in known)


def _place(name: str) -> tuple[str, str]:
    """Cut a layer's name into its block and its module, for the heat-map."""
    parts = name.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "outside", parts[-1]
    return parts[number], re.sub(r"\.\d+", ".*", ".".join(parts[number + 1 :]))


def _heatmap(layers: Sequence[Layer]) -> Heatmap:
    cells: dict[tuple[str, str], float] = {}
    for layer in layers:
        place = _place(layer.name)
        cells[place] = max(cells.get(place, 0.0), layer.eta.value)
    rows, columns = (tuple(dict.fromkeys(place[side] for place in cells)) for side in (0, 1))
    worst = max(cells, key=lambda place: cells[place])
    alt = f"η of every layer and module; the highest is {cells[worst]:.2f}, {worst[1]} of layer {worst[0]}."
    values = tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)
    return Heatmap("Entanglement η by layer and module", alt, rows, columns, values, "η, 0 to 1")


def _table(layers: Sequence[Layer]) -> Table:
    columns = (
        "layer", ">η", ">η, low", ">η, high", ">cosine, Frobenius", ">smallest angle, outputs", ">… inputs, degrees",
        ">overlap, outputs", ">by chance", ">overlap, inputs", ">by chance ",
    )  # fmt: skip
    rows = tuple(
        (
            layer.name, layer.eta.value, layer.eta.low, layer.eta.high, layer.frobenius, *layer.angles,
            layer.overlaps[0], layer.chances[0], layer.overlaps[1], layer.chances[1],
        )
        for layer in sorted(layers, key=lambda layer: -layer.eta.value)
    )  # fmt: skip
    return Table(f"Skill and memory, layer by layer; angles between {RANK} leading directions", columns, rows)


def _sentence(eta: Metric, worst: Layer) -> str:
    text = f"In held-out curvature skill and memory meet at η = {eta.value:.3f}"
    text += f" (95 % interval {eta.low:.3f} to {eta.high:.3f})" if eta.high - eta.low < 1 else " (no interval)"
    return f"{text}; most in {worst.name}, {worst.eta.value:.3f}. 0: apart, 1: the same direction."


@contextmanager
def held_out_factors(subject: Subject, given: Sequence[Path] = ()) -> Iterator[list[FactorSet]]:
    """Open factor sets to measure in: those the user gave, or fresh ones of parts of the retain rows, gone afterwards.

    Fresh ones are taken at the fine-tuned weights, where skill and memory stand together, with labels drawn from the model.
    """
    from liborth_cli.curvature.factor_set import FactorSet

    with ExitStack() as stack:
        if given:
            sets = [stack.enter_context(FactorSet.open(path)) for path in given]
            for found in sets:
                found.check_belongs(subject.finetuned or subject.general)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-verify-")))
            rows = subject.rows("retain")
            count = max(min(PARTS, len(rows)), 1)
            sets = [
                stack.enter_context(FactorSet.open(estimate(subject, "finetuned", rows[part::count], folder / str(part))))
                for part in range(count)
            ]
        yield sets


def costs(subject: Subject) -> tuple[dict[str, Metric], Table | None]:
    """Score W_r, W_r + S, W_r + M and W_r + S + M, and compare.

    With L the loss on retain data and C that of the canaries, both mean nats a token:

    - skill cost (L(W_r + S) − L(W_f)) / (L(W_r) − L(W_f)): the share of the skill that goes with the memory; 1 − retention;
    - memory cost (C(W_r + M) − C(W_f)) / (C(W_r) − C(W_f)): the share of the memory that goes with the skill.

    Both are 0 when the streams do not need each other. Intervals: rows resampled. W_r + M is formed while it is read.

    Returns:
        "skill_cost" where there is retain data, "memory_cost" where there are canaries; and the four models' losses.
    """
    from liborth_cli.stream.weights import Moved

    lists = [name for name in ("retain", "canaries") if name in subject.data]
    if not lists:
        return {}, None
    weights = subject.states.weights
    weights.setdefault("memory", Moved(weights["reference"], 1.0, weights["finetuned"], weights["general"]))
    metrics = {}
    for rows, without, name, meaning in (
        ("retain", "general", "skill_cost", "share of the skill that goes when the memory is taken out"),
        ("canaries", "memory", "memory_cost", "share of the memory that goes when the skill is taken out"),
    ):
        if rows in lists:
            sums = [statistics.totals(subject.score(rows, state))[0] for state in ("reference", without, "finetuned")]
            metrics[name] = statistics.bootstrap(
                lambda w, s=sums: 1 - retention(*(w @ some for some in s)), [subject.groups(rows)], subject.seed, meaning
            )
    cells = tuple((title, *(subject.loss(rows, state) for rows in lists)) for state, title in STATES)
    names = {"retain": ">loss, retain data", "canaries": ">loss, canaries"}
    return metrics, Table("Four models: which stream needs which", ("streams", *(names[rows] for rows in lists)), cells)


def _matrix(side: Checkpoint, info: TensorInfo, number: int) -> torch.Tensor:
    rows, cols = info.shape[-2:]
    first = number * rows * cols
    return side.load_elements(info.name, first, first + rows * cols).double().view(rows, cols)


CHECK = Check(
    name="entanglement",
    title="Entanglement",
    words="How far skill and memory touch each other.",
    part=Part.MECHANISM,
    run=run,
    metrics=("eta", "eta_worst", "skill_cost", "memory_cost"),
    needs=(Need.REFERENCE, Need.FINETUNED),
    cheap=True,
    options=EntanglementOptions,
    lacks=lambda subject, options: (
        "" if options.factors or subject.has(Need.RETAIN) else "--retain-data that the split did not see, or --factors"
    ),
    controls=True,
)
