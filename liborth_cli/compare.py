"""`inspect --diff`: two checkpoints of any layout, tensor by tensor; a piece of each at a time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.dtypes import DTYPES, as_tensor
from liborth_cli.checkpoint.hub import resolve
from liborth_cli.checkpoint.packed import SIGNED, UNSIGNED, places
from liborth_cli.checkpoint.pair import meet
from liborth_cli.checkpoint.reader import PIECE, Checkpoint, TensorInfo, pieces
from liborth_cli.console import Json, JsonObject, Table

SHOWN = 12
"""Changed tensors that are listed unless all are asked for, the most changed first."""


class Fate(StrEnum):
    """What two checkpoints have of one tensor."""

    SAME = "same"
    CHANGED = "changed"
    RESHAPED = "another shape"
    FIRST = "only in the first"
    SECOND = "only in the second"


@dataclass(frozen=True)
class Difference:
    """One tensor.

    Attributes:
        fate: what became of it.
        dtypes: on both sides; "" where it is not.
        shapes: likewise; () where it is not.
        relative: ‖B − A‖ / ‖A‖; None where no numbers can be subtracted, or A is zero.
        ulp: most steps between neighbouring numbers of the format that an element moved; None where the dtypes differ.
        elements: how many are not the same bits; None where the dtypes differ.
        other: its name in the second checkpoint, where that is another.
    """

    fate: Fate
    dtypes: tuple[str, str] = ("", "")
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    relative: float | None = None
    ulp: int | None = None
    elements: int | None = None
    other: str = ""


def compare(first: str, second: str) -> dict[str, Difference]:
    """Compare two checkpoints.

    Args:
        first: path or repository.
        second: the same; an adapter is laid over the first.

    Returns:
        Tensor name → what became of it, in the order of the first, then of the second.

    Raises:
        LiborthError: when one cannot be read.
    """
    with Checkpoint.open(resolve(first).path) as old, open_model(resolve(second).path, old) as new:
        partner = {ours: name for name, ours in meet(old.tensors, new.tensors).items()}
        found = {
            name: _difference(old, info, new, new.tensors[partner[name]])
            if name in partner
            else Difference(Fate.FIRST, (info.dtype, ""), (info.shape, ()))
            for name, info in old.tensors.items()
        }
        met = set(partner.values())
        found |= {
            name: Difference(Fate.SECOND, ("", info.dtype), ((), info.shape))
            for name, info in new.tensors.items()
            if name not in met
        }
        old.check_unchanged()
        new.check_unchanged()
    return found


def describe(first: str, second: str, every: bool) -> tuple[bool, JsonObject, Table]:
    """Compare two checkpoints for a person.

    Args:
        first: path or repository.
        second: the same.
        every: list every tensor, those that are the same too.

    Returns:
        Whether they are the same; a JSON object; a table.
    """
    found = compare(first, second)
    counts = {fate.value: sum(one.fate is fate for one in found.values()) for fate in Fate}
    same = counts[Fate.SAME] == len(found)
    document: dict[str, Json] = {
        "kind": "difference", "same": same, "counts": counts, "tensors": {name: _json(one) for name, one in found.items()},
    }  # fmt: skip
    title = ", ".join(f"{count:,} {fate}" for fate, count in counts.items() if count)
    listed = [(name, one) for name, one in found.items() if every or one.fate is not Fate.SAME]
    listed.sort(key=lambda pair: (pair[1].fate is not Fate.CHANGED, -(pair[1].relative or 0.0)) if not every else 0)
    rows = [_row(name, one) for name, one in (listed if every else listed[:SHOWN])]
    if len(rows) < len(listed):
        rows.append((f"… and {len(listed) - len(rows):,} more (-v lists all)", "", "", "", "", ""))
    if same:
        title = "the same, bit for bit" if found else "none, on either side"
    columns = ["tensor", "", ">relative norm", ">most ulp", ">elements", "dtype"]
    return same, document, Table(f"{len(found):,} tensors: {title}", columns, rows)


def _json(one: Difference) -> JsonObject:
    told = asdict(one) | {"fate": one.fate.value}
    return {key: value for key, value in told.items() if value not in (None, "")}


def _row(name: str, one: Difference) -> tuple[object, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    dtypes = " → ".join(dict.fromkeys(dtype for dtype in one.dtypes if dtype))
    title = f"{name} → {one.other}" if one.other else name
    return title, one.fate.value, number(one.relative, ".3e"), number(one.ulp, ","), number(one.elements, ","), dtypes


def _difference(old: Checkpoint, mine: TensorInfo, new: Checkpoint, theirs: TensorInfo) -> Difference:
    dtypes, shapes = (mine.dtype, theirs.dtype), (mine.shape, theirs.shape)
    other = theirs.name if theirs.name != mine.name else ""
    if mine.shape != theirs.shape:
        return Difference(Fate.RESHAPED, dtypes, shapes, other=other)
    numbers, alike = all(DTYPES[dtype].editable for dtype in dtypes), mine.dtype == theirs.dtype
    width = DTYPES[mine.dtype].bits // 8
    moved, size, ulp, elements = 0.0, 0.0, 0, 0
    for start, stop in pieces(0, math.prod(mine.shape), 4 * PIECE):
        a, b = old.read_elements(mine.name, start, stop), new.read_elements(theirs.name, start, stop)
        if alike and np.array_equal(a, b):
            if numbers:
                size += float(as_tensor(a, mine.dtype).double().square().sum())
            continue
        if numbers:
            before = as_tensor(a, mine.dtype).double()
            size += float(before.square().sum())
            moved += float((as_tensor(b, theirs.dtype).double() - before).square().sum())
        if alike:
            left, right = (bits.view(UNSIGNED[width]) if width in UNSIGNED else bits for bits in (a, b))
            elements += int((left != right).sum())
            if mine.dtype in SIGNED:
                there = places(left), places(right)
                ulp = max(ulp, int((np.maximum(*there) - np.minimum(*there)).max()))
    same = alike and not elements
    if same:
        return Difference(Fate.SAME, dtypes, shapes, other=other)
    return Difference(
        Fate.CHANGED, dtypes, shapes,
        relative=math.sqrt(moved / size) if numbers and size > 0 and math.isfinite(moved / size) else None,
        ulp=ulp if alike and mine.dtype in SIGNED else None, elements=elements if alike else None, other=other,
    )  # fmt: skip
