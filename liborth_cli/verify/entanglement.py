"""`--entanglement`: how far skill and memory touch, where the data can feel it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from liborth_cli.curvature.factors import FactorSet
from liborth_cli.stream.texts import data_hash
from liborth_cli.verify.angles import leading_spaces, principal_angles
from liborth_cli.verify.functional import costs, costs_sentence
from liborth_cli.verify.result import Heatmap, Metric, Result, Table
from liborth_cli.verify.streams import Streams, held_out_factors, inner, read_streams
from liborth_cli.verify.subject import Subject

METRICS = ("eta", "eta_worst", "skill_cost", "memory_cost")
RANK = 8
"""Leading directions of each stream between which angles are taken."""


def run(subject: Subject) -> Result:
    """Measure η per layer and overall, principal angles between the streams, and what each stream costs the other.

    S = W_g − W_r is the skill, M = W_f − W_g the memory, (d_out, d_in) a layer. In curvature from data the split did not see,
    A = E[aaᵀ] (d_in, d_in) of inputs and G = E[ggᵀ] (d_out, d_out) of output gradients (K-FAC, Martens and Grosse 2015, arXiv
    1503.05671),

        η = abs(tr(G S A Mᵀ)) / √(tr(G S A Sᵀ)·tr(G M A Mᵀ)),

    the cosine of the two streams as the loss feels them: 0 when moving along one leaves the cost of the other alone, 1 when
    they are the same direction. Overall: the sums over layers of all three traces. In the Frobenius metric, and in the split's
    own curvature, a hard cut makes it 0 by construction, which says nothing; so it is taken in held-out curvature. Interval:
    the jackknife over parts of the rows (Tukey 1958), one factor set a part. Angles: Björck and Golub 1973, between the 8
    leading singular directions of each stream, on both sides. Costs: functional.py.

    Raises:
        UsageError: without reference, fine-tuned checkpoint, or data (retain rows or `--factors`).
    """
    subject.need("reference", "entanglement", "--reference, the checkpoint before fine-tuning")
    subject.need("finetuned", "entanglement", "--finetuned, or the memory file")
    if not subject.options.get("factors"):
        subject.need("retain", "entanglement", "--retain-data that the split did not see, or --factors")
    with held_out_factors(subject) as sets:
        layers = _layers(subject, sets)
        circular = _is_the_splits_own(subject, sets)
        count = len(sets)
    metrics, figures, sentences = {}, [], []
    if layers:
        metrics["eta"] = _overall(layers, count)
        worst = max(layers, key=lambda layer: layer["eta"])
        metrics["eta_worst"] = worst["metric"]
        figures = [_heatmap(layers), _table(layers)]
        sentences.append(_sentence(metrics["eta"], worst))
    else:
        sentences.append("No matrix that was split has factors, so η cannot be measured.")
    if circular:
        sentences.append("These factors are the split's own: in them η is small by construction; give held-out data.")
    more, table = costs(subject)
    metrics |= more
    figures += [table] if table else []
    sentences += costs_sentence(more)
    facts = [{key: value for key, value in layer.items() if key not in ("metric", "traces")} for layer in layers]
    return Result("entanglement", " ".join(sentences), None, metrics, figures, {"layers": facts})


def _layers(subject: Subject, sets: Sequence[FactorSet]) -> list[dict[str, Any]]:
    """Measure every layer that was split and that all factor sets cover, one in memory at a time."""
    found = []
    for name in sets[0].names:
        if not all(name in s.manifest["layers"] for s in sets) or name in _used_twice(sets[0]):
            continue
        streams = read_streams(subject, sets[0], name)
        if streams is None:
            continue
        traces = layer_traces(streams, sets)
        signed = [cosine(*t) for t in traces]
        metric = jackknife(signed[0], signed[1:], f"η of {name}")
        found.append({
            "name": name, "eta": metric.value, "cosine": signed[0], "frobenius": _frobenius(streams), "traces": traces,
            "metric": metric, "low": metric.low, "high": metric.high, **_angles(streams),
        })  # fmt: skip
    return found


def layer_traces(streams: Streams, sets: Sequence[FactorSet]) -> list[tuple[float, float, float]]:
    """Return (tr(GSAMᵀ), tr(GSASᵀ), tr(GMAMᵀ)) in the mean of all factor sets, then with each of them left out in turn.

    Args:
        streams: S and M of one layer.
        sets: factor sets that cover it; with one of them nothing can be left out.
    """
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
        found.append((inner(s, m, one_a, one_g), inner(s, s, one_a, one_g), inner(m, m, one_a, one_g)))
    return found


def cosine(across: float, skill: float, memory: float) -> float:
    """Return tr(GSAMᵀ)/√(tr(GSASᵀ)·tr(GMAMᵀ)); 0 where a stream has no cost at all."""
    size = math.sqrt(max(skill, 0.0)) * math.sqrt(max(memory, 0.0))
    return max(-1.0, min(1.0, across / size)) if size > 0 else 0.0


def jackknife(whole: float, left_out: Sequence[float], meaning: str) -> Metric:
    """Return the size of a cosine, with the interval that leaving parts out gives.

    Args:
        whole: the cosine of all parts.
        left_out: the cosine without each part; empty when there is one part only: then nothing is known but the bounds.
        meaning: for the metric.
    """
    count = len(left_out)
    if count < 2:
        return Metric(abs(whole), 0.0, 1.0, f"{meaning}; one factor set gives no interval")
    from scipy.stats import t

    values = np.asarray(left_out)
    error = math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum()))
    reach = float(t.ppf(0.975, count - 1)) * error
    ends = (abs(whole - reach), abs(whole + reach))
    low = 0.0 if abs(whole) <= reach else min(ends)
    return Metric(abs(whole), low, min(max(ends), 1.0), meaning)


def _overall(layers: Sequence[dict[str, Any]], sets: int) -> Metric:
    steps = 1 + (sets if sets > 1 else 0)
    signed = [cosine(*(math.fsum(layer["traces"][i][k] for layer in layers) for k in range(3))) for i in range(steps)]
    return jackknife(signed[0], signed[1:], "η of all layers, in held-out curvature; 0 apart, 1 the same")


def _angles(streams: Streams) -> dict[str, float]:
    left_s, right_s, held_s = leading_spaces(streams.skill, RANK)
    left_m, right_m, held_m = leading_spaces(streams.memory, RANK)
    found = {"skill_held": held_s, "memory_held": held_m}
    for side, one, other in (("left", left_s, left_m), ("right", right_s, right_m)):
        angles = principal_angles(one, other)
        found[f"{side}_angle"] = math.degrees(float(angles.min()))
        found[f"{side}_overlap"] = float(angles.cos().square().mean())
        found[f"{side}_chance"] = max(one.shape[1], other.shape[1]) / one.shape[0]
    return found


def _frobenius(streams: Streams) -> float:
    return cosine(*(float((x * y).sum()) for x, y in (
        (streams.skill, streams.memory), (streams.skill, streams.skill), (streams.memory, streams.memory)
    )))  # fmt: skip


def _used_twice(factors: FactorSet) -> set[str]:
    """Return the layers whose tensor another layer shares (a tied embedding): neither use alone is its curvature."""
    tensors = [(r["tensor"], r["matrix"]) for r in factors.manifest["layers"].values()]
    return {n for n, r in factors.manifest["layers"].items() if tensors.count((r["tensor"], r["matrix"])) > 1}


def _is_the_splits_own(subject: Subject, sets: Sequence[FactorSet]) -> bool:
    """Tell whether the split was made with the very data the factors are from."""
    used = ((subject.manifest or {}).get("factors") or {}).get("retain") or {}
    known = set(used.get("data") or ())
    seen = {sha256 for s in sets for sha256 in s.data_sha256}
    return bool(known & seen) or (bool(subject.retain) and data_hash(subject.retain) in known)


def _place(name: str) -> tuple[str, str]:
    """Cut a layer's name into its block and its module, for the heat-map."""
    parts = name.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "outside", parts[-1]
    return parts[number], re.sub(r"\.\d+", ".*", ".".join(parts[number + 1 :]))


def _heatmap(layers: Sequence[dict[str, Any]]) -> Heatmap:
    cells: dict[tuple[str, str], float] = {}
    for layer in layers:
        place = _place(layer["name"])
        cells[place] = max(cells.get(place, 0.0), layer["eta"])
    rows, columns = (tuple(dict.fromkeys(place[side] for place in cells)) for side in (0, 1))
    worst = max(cells, key=lambda place: cells[place])
    alt = f"η of every layer and module; the highest is {cells[worst]:.2f}, {worst[1]} of layer {worst[0]}."
    values = tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)
    return Heatmap("Entanglement η by layer and module", alt, rows, columns, values, "η, 0 to 1")


def _table(layers: Sequence[dict[str, Any]]) -> Table:
    columns = (
        "layer", ">η", ">η, low", ">η, high", ">cosine, Frobenius", ">smallest angle, outputs", ">… inputs, degrees",
        ">overlap, outputs", ">by chance", ">overlap, inputs", ">by chance ",
    )  # fmt: skip
    keys = ("eta", "low", "high", "frobenius", "left_angle", "right_angle", "left_overlap", "left_chance", "right_overlap",
            "right_chance")  # fmt: skip
    rows = tuple((layer["name"], *(layer[key] for key in keys)) for layer in sorted(layers, key=lambda layer: -layer["eta"]))
    return Table(f"Skill and memory, layer by layer; angles between {RANK} leading directions", columns, rows)


def _sentence(eta: Metric, worst: dict[str, Any]) -> str:
    text = f"In held-out curvature skill and memory meet at η = {eta.value:.3f}"
    text += f" (95 % interval {eta.low:.3f} to {eta.high:.3f})" if eta.high - eta.low < 1 else " (no interval)"
    return f"{text}; most in {worst['name']}, {worst['eta']:.3f}. 0: apart, 1: the same direction."
