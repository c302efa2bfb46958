"""`inspect`: say what a path is. Headers only, unless a profile is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liborth_cli import manifest
from liborth_cli.checkpoint import delta
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.hub import resolve
from liborth_cli.checkpoint.pair import Policy, match
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.console import size

Section = tuple[str, Sequence[str], Sequence[Sequence[object]]]


def describe(path: str, finetuned: str | None, profile: bool, every: bool) -> tuple[dict[str, Any], list[Section]]:
    """Describe a checkpoint, a pair, a memory file or the output of a split.

    Args:
        path: what to look at.
        finetuned: the other half of a pair, or None.
        profile: read the weights and compute norms and ranks of matrices (of updates, for a pair).
        every: list tensors one by one instead of by kind.

    Returns:
        A JSON document and the same as tables: (title, columns, rows).

    Raises:
        BadInput: when there is nothing to describe.
    """
    source = resolve(path)
    if finetuned is not None:
        with Checkpoint.open(source.path) as old, open_model(resolve(finetuned).path, old) as new:
            return _pair(old, new, profile, every)
    if source.path.name == manifest.FILE:
        return _history(manifest.load(source.path), [])
    if (source.path / manifest.FILE).is_file() and manifest.load(source.path)["kind"] == "curvature":
        from liborth_cli.curvature.table import describe_factors

        return describe_factors(source.path, every)
    only_memory = source.path.is_dir() and delta.exists(source.path) and not _has_model(source.path)
    with Checkpoint.open(source.path, stem="memory" if only_memory else "model") as checkpoint:
        document, sections = _checkpoint(checkpoint, profile, every)
        if (source.path / manifest.FILE).is_file():
            return _history(manifest.load(source.path), sections, document)
        return document, sections


def _has_model(folder: Path) -> bool:
    return any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def _checkpoint(checkpoint: Checkpoint, profile: bool, every: bool) -> tuple[dict[str, Any], list[Section]]:
    tensors = list(checkpoint.tensors.values())
    marks = [shard.metadata for shard in checkpoint.shards.values() if "liborth" in shard.metadata]
    kind = "memory delta" if marks else "checkpoint"
    document: dict[str, Any] = {
        "kind": kind,
        "files": {shard.name: shard.size for shard in checkpoint.shards.values()},
        "bytes": checkpoint.nbytes,
        "model_type": checkpoint.config.get("model_type"),
        "belongs_to": [mark["general"] for mark in marks],
        "tensors": {t.name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.shard} for t in tensors},
    }
    title = f"{kind}: {len(tensors)} tensors, {size(checkpoint.nbytes)} in {len(checkpoint.shards)} files"
    if marks:
        title += f"; PRIVATE; belongs to {', '.join(document['belongs_to'])}"
    sections: list[Section] = [_listing(title, tensors, every)]
    if profile:
        from liborth_cli.profile import profile_matrix

        rows, document["profile"] = [], {}
        for t in tensors:
            if len(t.shape) >= 2 and t.nbytes and DTYPES[t.dtype].editable:
                found = profile_matrix(t, checkpoint)
                document["profile"][t.name] = found
                rows.append(_profile_row(t.name, found))
        sections.append(("spectra of the weights", PROFILE_COLUMNS, rows))
    return document, sections


PROFILE_COLUMNS = (
    "tensor", ">norm", ">σ₁", ">stable rank", ">effective rank", ">rank 90 %", ">rank 99 %", ">above noise", ">above bulk"
)  # fmt: skip


def _profile_row(name: str, found: dict[str, float]) -> list[object]:
    numbers = (f"{found[key]:.4g}" for key in ("norm", "top", "stable_rank", "effective_rank"))
    return [name, *numbers, *(found[key] for key in ("rank_90", "rank_99", "above_threshold", "above_bulk"))]


def _pair(old: Checkpoint, new: Checkpoint, profile: bool, every: bool) -> tuple[dict[str, Any], list[Section]]:
    found = match(old, new, Policy())
    items = found.items
    document: dict[str, Any] = {
        "kind": "pair",
        "tensors": {i.tensor.name: {"action": i.action.value, "why": i.why, "shape": list(i.tensor.shape)} for i in items},
        "notes": list(found.notes),
    }
    title = f"pair: {len(items)} tensors fit; by default `split` would"
    rows = [(i.tensor.name, i.action.value, i.why) for i in items]
    if not every:
        kinds = sorted({(i.action.value, i.why) for i in items})
        rows = [(sum((i.action.value, i.why) == kind for i in items), *kind) for kind in kinds]
    sections: list[Section] = [(title, ["tensor" if every else ">tensors", "action", "because"], rows)]
    if found.notes:
        sections.append(("how the two were brought together", ["note"], [[note] for note in found.notes]))
    if profile:
        from liborth_cli.profile import profile_matrix

        profiles = {i.tensor.name: profile_matrix(i.tensor, new, i.reference, old) for i in items if i.action == "split"}
        document["profile"] = profiles
        sections.append(("spectra of the update", PROFILE_COLUMNS, [_profile_row(n, f) for n, f in profiles.items()]))
    return document, sections


def _history(
    document: dict[str, Any], sections: list[Section], checkpoint: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[Section]]:
    facts = [(key, value) for key, value in sorted(document["parameters"].items()) if value is not None]
    facts += [(f"{side}", f"{i.get('title', '')} {i.get('commit') or ''}") for side, i in sorted(document["inputs"].items())]
    sections = [*sections, (f"made by liborth {document['liborth']} {document['kind']}", ["parameter", "value"], facts)]
    done = {name: t for name, t in document.get("tensors", {}).items() if t.get("energy")}
    if done:
        from liborth_cli.split.table import COLUMNS, row

        rows = [(n, f"{t['energy'] ** 0.5:.4g}", *row(t, document["totals"])[1:], _excess(t)) for n, t in done.items()]
        columns = ["tensor", ">norm of update", *COLUMNS[2:], ">excess ≤"]
        sections.append(("energy of the two parts", columns, rows))
    return {**(checkpoint or {"kind": "manifest"}), "manifest": document}, sections


def _excess(record: dict[str, Any]) -> str:
    return f"{record['excess']:.1e}" if "excess" in record else ""


def _listing(title: str, tensors: list[TensorInfo], every: bool) -> Section:
    if every:
        return title, ["tensor", "dtype", "shape", ">size"], [(t.name, t.dtype, list(t.shape), size(t.nbytes)) for t in tensors]
    kinds: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = {}
    for t in tensors:
        kinds.setdefault((re.sub(r"\d+", "*", t.name), t.dtype, t.shape), []).append(t)
    rows = [(name, len(g), dtype, list(shape), size(sum(t.nbytes for t in g))) for (name, dtype, shape), g in kinds.items()]
    return title, ["tensors", ">count", "dtype", "shape", ">size"], rows
