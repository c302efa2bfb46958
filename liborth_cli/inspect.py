"""`inspect`: say what a path is. Headers only, unless a profile is asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli import command_module, manifest
from liborth_cli.checkpoint import config
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.hub import resolve
from liborth_cli.checkpoint.pair import Action, Policy, grid, match
from liborth_cli.checkpoint.private import FILE as PRIVATE
from liborth_cli.checkpoint.private import find_memory, holds_memory
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.console import Json, JsonObject, Table, size

if TYPE_CHECKING:  # headers are read without it
    import torch

Described = tuple[JsonObject, list[Table]]
"""A JSON document, and the same for a person."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ of a matrix in a few numbers; of a stack of matrices, the mean over the stack.

    Attributes:
        norm: ‖·‖_F.
        top: σ₁.
        stable_rank: ‖·‖² / σ₁².
        effective_rank: exp of the entropy of σ².
        rank_90, rank_99: directions that hold 90 and 99 % of the energy.
        above_threshold: values above the threshold of Gavish and Donoho.
        above_bulk: values above the edge of Marchenko and Pastur.
    """

    norm: float
    top: float
    stable_rank: float
    effective_rank: float
    rank_90: float
    rank_99: float
    above_threshold: float
    above_bulk: float

    @classmethod
    def of(cls, u: torch.Tensor) -> Spectrum:
        """Summarise one matrix; NaN for one that holds NaN or infinity."""
        import torch

        from liborth_cli.linalg.eigen import singular_values
        from liborth_cli.linalg.noise import bulk_edge, effective_rank, optimal_threshold

        if not torch.isfinite(u).all():
            return cls(*[float("nan")] * 8)
        values = singular_values(u).double()
        share, shape = values.square().cumsum(0), (u.shape[0], u.shape[1])
        total, top = share[-1].item(), values[0].item()
        if total == 0:
            return cls(*[0.0] * 8)
        return cls(
            norm=total**0.5,
            top=top,
            stable_rank=total / top**2,
            effective_rank=effective_rank(values),
            rank_90=int((share < 0.9 * total).sum()) + 1,
            rank_99=int((share < 0.99 * total).sum()) + 1,
            above_threshold=int((values > optimal_threshold(values, shape)).sum()),
            above_bulk=int((values > bulk_edge(values, shape)).sum()),
        )


@dataclass(frozen=True)
class Kept:
    """Where the memory of a general checkpoint lies, and its size."""

    place: str
    bytes: int
    beside_the_model: bool


def describe(path: str, finetuned: str | None, profile: bool, every: bool) -> Described:
    """Describe a checkpoint, a pair, a memory, a factor set or the output of a command.

    Args:
        path: what to look at.
        finetuned: the other half of a pair, or None.
        profile: read the weights and compute norms and ranks of matrices (of updates, for a pair).
        every: list tensors one by one instead of by kind.

    Raises:
        BadInput: when there is nothing to describe.
    """
    place = resolve(path).path
    if finetuned is not None:
        with Checkpoint.open(place) as old, open_model(resolve(finetuned).path, old) as new:
            return _pair(old, new, profile, every)
    if place.name in (manifest.FILE, PRIVATE):
        return _with_history({"kind": "manifest"}, [], manifest.read(place, manifest.Manifest))
    file = next((place / name for name in (manifest.FILE, PRIVATE) if (place / name).is_file()), None)
    history = manifest.read(file, manifest.Manifest) if file else None
    if isinstance(history, manifest.Curvature):
        from liborth_cli.curvature.table import describe_factors

        document, sections = describe_factors(place, every)
        return document, [Table(*section) for section in sections]
    only_memory = place.is_dir() and holds_memory(place) and not _holds_model(place)
    with Checkpoint.open(place, stem="memory" if only_memory else "model") as checkpoint:
        document, tables = _checkpoint(checkpoint, profile, every)
    if history is not None and not only_memory:
        memory = _memory(place)
        document = {**document, "memory": asdict(memory) if memory else None}
        if memory:
            tables.append(Table("private", ["memory", ">size"], [(memory.place, size(memory.bytes))]))
    return _with_history(document, tables, history) if history else (document, tables)


def profile_matrix(
    tensor: TensorInfo, checkpoint: Checkpoint, old: TensorInfo | None = None, reference: Checkpoint | None = None
) -> Spectrum:
    """Summarise a stored matrix, or what it has moved by from `old` (rows that `old` lacks are left out)."""
    import torch
    from liborth_kernels.update import update

    matrices, rows, cols = grid(tensor.name, min((old or tensor).shape, tensor.shape))
    found = []
    for number in range(matrices):
        span = number * rows * cols, (number + 1) * rows * cols
        u = checkpoint.load_elements(tensor.name, *span).float()
        if old is not None and reference is not None:
            u = update(u, reference.load_elements(old.name, *span), torch.empty(rows * cols))
        found.append(astuple(Spectrum.of(u.view(rows, cols))))
    return Spectrum(*(sum(column) / matrices for column in zip(*found, strict=True)))


def _holds_model(folder: Path) -> bool:
    return any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def _memory(model: Path) -> Kept | None:
    """Say where the memory of a general checkpoint is, if it is anywhere that is looked at."""
    place = find_memory(model)
    if place is None:
        return None
    with Checkpoint.open(place, stem="memory") as memory:
        return Kept(str(place), memory.nbytes, place == model)


def _checkpoint(checkpoint: Checkpoint, profile: bool, every: bool) -> Described:
    tensors = list(checkpoint.tensors.values())
    marks = [shard.metadata for shard in checkpoint.shards.values() if "liborth" in shard.metadata]
    kind = "memory delta" if marks else "checkpoint"
    belongs = [mark.get("general", "") for mark in marks]
    document: dict[str, Json] = {
        "kind": kind,
        "files": {shard.name: shard.size for shard in checkpoint.shards.values()},
        "bytes": checkpoint.nbytes,
        "model_type": checkpoint.config.get("model_type"),
        "belongs_to": belongs,
        "tensors": {t.name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.shard} for t in tensors},
    }
    count = len(checkpoint.shards)
    title = f"{kind}: {len(tensors)} tensors, {size(checkpoint.nbytes)} in {count} file{'s' * (count != 1)}"
    if marks:
        title += f"; PRIVATE; belongs to {', '.join(belongs)}"
    empty = [t.name for t in tensors if not t.nbytes]
    if empty:
        title += f"; {len(empty)} TENSORS ARE EMPTY (first: {empty[0]}), as in a save without the weights of other processes"
    tables = [_listing(title, tensors, every)]
    if profile:
        matrices = [t for t in tensors if len(t.shape) >= 2 and t.nbytes and DTYPES[t.dtype].editable]
        found = {t.name: profile_matrix(t, checkpoint) for t in matrices}
        document["profile"] = {name: vars(one) for name, one in found.items()}
        tables.append(_spectra("spectra of the weights", found))
    return document, tables


def _pair(old: Checkpoint, new: Checkpoint, profile: bool, every: bool) -> Described:
    matched, differ = match(old, new, Policy()), config.warning(old, new)
    items, notes = matched.items, [*matched.notes, *([differ] if differ else [])]
    fates = {i.tensor.name: {"action": i.action.value, "why": i.why, "shape": list(i.tensor.shape)} for i in items}
    document: dict[str, Json] = {"kind": "pair", "tensors": fates, "notes": notes}
    title = f"pair: {len(items)} tensors fit; by default `split` would"
    if every:
        rows: list[tuple[object, ...]] = [(i.tensor.name, i.action.value, i.why) for i in items]
    else:
        kinds = Counter((i.action.value, i.why) for i in items)
        rows = [(count, *kind) for kind, count in sorted(kinds.items())]
    tables = [Table(title, ["tensor" if every else ">tensors", "action", "because"], rows)]
    if notes:
        tables.append(Table("how the two were brought together", ["note"], [[note] for note in notes]))
    if profile:
        found = {i.tensor.name: profile_matrix(i.tensor, new, i.reference, old) for i in items if i.action is Action.SPLIT}
        document["profile"] = {name: vars(one) for name, one in found.items()}
        tables.append(_spectra("spectra of the update", found))
    return document, tables


def _with_history(document: JsonObject, tables: list[Table], history: manifest.Manifest) -> Described:
    """Add what the manifest says: who made it, from what, with which parameters, and what that did."""
    told = history.document
    asked = told.get("parameters")
    facts = [(key, value) for key, value in sorted(asked.items()) if value is not None] if isinstance(asked, Mapping) else []
    facts += [(side, f"{entry.title} {entry.commit or ''}".strip()) for side, entry in sorted(history.inputs.items())]
    tables = [*tables, Table(f"made by liborth {history.liborth} {history.kind}", ["parameter", "value"], facts)]
    done = {name: t for name, t in history.tensors.items() if t.energy} if isinstance(history, manifest.Split) else {}
    if done and isinstance(history, manifest.Split):
        from liborth_cli.split.report import COLUMNS, row

        worst = {name: max(t.excess) if isinstance(t.excess, list) else t.excess for name, t in done.items()}
        rows = [
            (name, f"{(t.energy or 0.0) ** 0.5:.4g}", *row(t, history.totals)[1:], f"{worst[name]:.1e}" if worst[name] else "")
            for name, t in done.items()
        ]
        columns = ["tensor", ">norm of update", *COLUMNS[2:], ">excess ≤"]
        tables.append(Table("what was kept and removed of each update", columns, rows))
    return {**document, "manifest": told}, tables


def _spectra(title: str, found: dict[str, Spectrum]) -> Table:
    columns = [
        "tensor", ">norm", ">σ₁", ">stable rank", ">effective rank", ">rank 90 %", ">rank 99 %", ">above noise", ">above bulk"
    ]  # fmt: skip
    return Table(title, columns, [(name, *(f"{value:.4g}" for value in astuple(one))) for name, one in found.items()])


def _listing(title: str, tensors: list[TensorInfo], every: bool) -> Table:
    if every:
        rows = [(t.name, t.dtype, list(t.shape), size(t.nbytes)) for t in tensors]
        return Table(title, ["tensor", "dtype", "shape", ">size"], rows)
    kinds: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = {}
    for t in tensors:
        kinds.setdefault((re.sub(r"\d+", "*", t.name), t.dtype, t.shape), []).append(t)
    rows = [(name, len(g), dtype, list(shape), size(sum(t.nbytes for t in g))) for (name, dtype, shape), g in kinds.items()]
    return Table(title, ["tensors", ">count", "dtype", "shape", ">size"], rows)


command_module(__name__)
