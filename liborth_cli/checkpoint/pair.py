"""A reference and a fine-tuned checkpoint: what fits, what does not, and what will be done to each tensor.

Everything is decided from headers, before the first byte is written.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import PairMismatch, UsageError

SAMPLE = 4096
SCALE_SUFFIXES = ("_scale", "_scale_inv", ".scale", "_absmax", ".absmax")


class Action(StrEnum):
    """What happens to one tensor of the fine-tuned checkpoint."""

    SPLIT = "split"
    """Its update is decomposed; the general checkpoint gets the skill part."""
    SKILL = "skill"
    """It goes to the general checkpoint unchanged."""
    MEMORY = "memory"
    """The general checkpoint gets the reference's weight; the memory delta holds the way back."""
    WITHHELD = "withheld"
    """It exists only in the memory file."""


@dataclass(frozen=True)
class Policy:
    """The user's choices about which tensors take part.

    Attributes:
        include: regexes; a tensor must match one to be split (none given: all).
        exclude: regexes; a tensor that matches one is left with the skill.
        vectors: where norms and biases go: "skill" or "memory"; "split" leaves them to the method where it has factors.
        added: where rows and tensors that only the fine-tuned side has go, "skill" or "memory".
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    vectors: str = "skill"
    added: str = "skill"


@dataclass(frozen=True)
class Item:
    """One tensor of the fine-tuned checkpoint and its fate.

    Attributes:
        tensor: where the fine-tuned tensor lies.
        action: what will be done.
        why: in words, for the table and the manifest.
        rows: leading rows the reference also has; fewer than shape[0] when a vocabulary grew.
        twin: name of the tensor this one is tied to (itself when not tied): twins get the same treatment.
        reference: where W_r lies, or None when only the fine-tuned side has this tensor.
    """

    tensor: TensorInfo
    action: Action
    why: str
    rows: int
    twin: str
    reference: TensorInfo | None

    @property
    def grid(self) -> tuple[int, int, int]:
        """The tensor as (matrices, d_out, d_in), over the rows both sides have."""
        return grid(self.tensor.name, (self.rows, *self.tensor.shape[1:]))


def grid(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """View a tensor as a stack of matrices, (matrices, d_out, d_in).

    Three dimensions are a stack (fused experts), unless the name says convolution: a kernel (out, in, …) is the matrix
    (out, in·…) that multiplies its patches.
    """
    if len(shape) == 3 and "conv" not in name.lower():
        return (shape[0], shape[1], shape[2])
    return (1, shape[0], math.prod(shape[1:]))


def match(reference: Checkpoint, finetuned: Checkpoint, policy: Policy) -> list[Item]:
    """Decide the fate of every tensor, or say why the two do not belong together.

    Args:
        reference: W_r.
        finetuned: W_f.
        policy: the user's choices.

    Returns:
        One item per fine-tuned tensor, in the order of its data.

    Raises:
        PairMismatch: when tensors are missing from the fine-tuned side, or shapes or dtypes do not fit; names all of them.
        UsageError: when a regex is malformed or matches nothing.
    """
    problems = [
        f"{name} is missing from the fine-tuned side"
        for name in reference.tensors
        if name not in finetuned.tensors and not _is_spare_copy(reference, finetuned, name)
    ]
    problems += filter(None, (_misfit(t, reference.tensors.get(t.name)) for t in finetuned.tensors.values()))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise PairMismatch(f"the two checkpoints do not fit: {'; '.join(problems[:3])}{more}")
    chooser = _Chooser(policy, list(finetuned.tensors))
    twins = find_twins(reference, finetuned)
    return [_item(t, twins.get(t.name, t.name), chooser, reference, finetuned) for t in finetuned.tensors.values()]


def find_twins(reference: Checkpoint, finetuned: Checkpoint) -> dict[str, str]:
    """Find matrices stored twice (tied embeddings saved by a careless exporter).

    Two fine-tuned matrices are tied when they hold the same bits and the reference either ties them too, with an update
    that is not zero, or stores only one. A sample of each is compared first: the scan costs kilobytes a tensor.

    Args:
        reference: W_r.
        finetuned: W_f.

    Returns:
        Tied name → the name it is tied to, which the reference has.
    """
    groups: dict[object, list[TensorInfo]] = defaultdict(list)
    for t in finetuned.tensors.values():
        if len(t.shape) == 2 and t.nbytes:
            groups[t.dtype, t.shape].append(t)
    twins: dict[str, str] = {}
    for group in groups.values():
        group.sort(key=lambda t: t.name not in reference.tensors)
        seen: dict[bytes, TensorInfo] = {}
        for t in group if len(group) > 1 else []:
            sample = finetuned.read(t.name, 0, min(SAMPLE, t.nbytes)).tobytes()
            first = seen.setdefault(sample, t)
            if first is not t and first.name in reference.tensors and _tied(reference, finetuned, first, t):
                twins[t.name] = first.name
    return twins


class _Chooser:
    def __init__(self, policy: Policy, names: Sequence[str]) -> None:
        self.policy = policy
        self._include = [_compile(p, names, "-i/--include-regex") for p in policy.include]
        self._exclude = [_compile(p, names, "-e/--exclude-regex") for p in policy.exclude]

    def why_not(self, name: str) -> str | None:
        if self._include and not any(p.search(name) for p in self._include):
            return "not chosen by -i"
        return "excluded by -e" if any(p.search(name) for p in self._exclude) else None


def _compile(pattern: str, names: Sequence[str], flag: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from None
    if not any(compiled.search(name) for name in names):
        raise UsageError(f"{flag} {pattern!r} matches no tensor; `liborth inspect` lists the names")
    return compiled


def _misfit(new: TensorInfo, old: TensorInfo | None) -> str | None:
    if old is None:
        return None
    both_float = DTYPES[new.dtype].editable and DTYPES[old.dtype].editable
    if new.dtype != old.dtype and not both_float:
        return f"{new.name} is {old.dtype} in the reference and {new.dtype} in the fine-tuned"
    grown = len(new.shape) == 2 == len(old.shape) and new.shape[1] == old.shape[1] and new.shape[0] > old.shape[0]
    if new.shape != old.shape and not (grown and both_float):
        return f"{new.name} is {list(old.shape)} in the reference and {list(new.shape)} in the fine-tuned"
    return None


def _item(t: TensorInfo, twin: str, chooser: _Chooser, reference: Checkpoint, finetuned: Checkpoint) -> Item:
    policy, old = chooser.policy, reference.tensors.get(t.name) or reference.tensors.get(twin)
    rows = (old or t).shape[0] if t.shape else 1

    def fate(action: Action, why: str) -> Item:
        return Item(t, action, why, rows, twin, old)

    if old is None:
        return fate(Action.WITHHELD if policy.added == "memory" else Action.SKILL, "not in the reference")
    if not t.nbytes:
        return fate(Action.SKILL, "empty")
    if not DTYPES[t.dtype].editable:
        return fate(Action.SKILL, f"{t.dtype} is not plain floating point: passed through")
    if (DTYPES[t.dtype].bits == 8 and _has_scale(t.name, finetuned)) or _is_scale(t.name, finetuned):
        return fate(Action.SKILL, "quantised with a scale tensor: passed through")
    unchosen = chooser.why_not(twin)
    if unchosen:
        return fate(Action.SKILL, unchosen)
    if len(t.shape) < 2:
        return fate(Action.MEMORY if policy.vectors == "memory" else Action.SKILL, "norm or bias")
    grown = f"; {t.shape[0] - rows} added rows go to {policy.added}" if rows < t.shape[0] else ""
    tied = f"; tied to {twin}" if twin != t.name else ""
    return fate(Action.SPLIT, f"matrix{grown}{tied}")


def _has_scale(name: str, checkpoint: Checkpoint) -> bool:
    stem = name.removesuffix(".weight")
    return any(base + suffix in checkpoint.tensors for base in (name, stem) for suffix in SCALE_SUFFIXES)


def _is_scale(name: str, checkpoint: Checkpoint) -> bool:
    stems = [name.removesuffix(suffix) for suffix in SCALE_SUFFIXES if name.endswith(suffix)]
    bases = [checkpoint.tensors.get(base) for stem in stems for base in (stem, f"{stem}.weight")]
    return any(base is not None and DTYPES[base.dtype].bits <= 8 for base in bases)


def _is_spare_copy(reference: Checkpoint, finetuned: Checkpoint, name: str) -> bool:
    """Tell whether a reference-only matrix is a second copy of one that both sides have."""
    spare = reference.tensors[name]
    return len(spare.shape) == 2 and any(
        t.name in finetuned.tensors and (t.dtype, t.shape) == (spare.dtype, spare.shape) and _equal(reference, spare, t)
        for t in reference.tensors.values()
        if t.name != name
    )


def _tied(reference: Checkpoint, finetuned: Checkpoint, first: TensorInfo, second: TensorInfo) -> bool:
    if not _equal(finetuned, first, second):
        return False
    old_first, old_second = reference.tensors[first.name], reference.tensors.get(second.name)
    if old_second is None:
        return True
    same = (old_first.dtype, old_first.shape) == (old_second.dtype, old_second.shape)
    return same and _equal(reference, old_first, old_second) and not _unchanged(reference, finetuned, first)


def _equal(checkpoint: Checkpoint, a: TensorInfo, b: TensorInfo) -> bool:
    return all(
        np.array_equal(checkpoint.read(a.name, start, stop), checkpoint.read(b.name, start, stop))
        for start, stop in _pieces(a.nbytes)
    )


def _unchanged(reference: Checkpoint, finetuned: Checkpoint, t: TensorInfo) -> bool:
    return reference.tensors[t.name].nbytes == t.nbytes and all(
        np.array_equal(reference.read(t.name, start, stop), finetuned.read(t.name, start, stop))
        for start, stop in _pieces(t.nbytes)
    )


def _pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor into byte ranges, a small one first so that a difference shows early."""
    start = 0
    while start < nbytes:
        stop = min(max(2 * start, SAMPLE), start + (1 << 20), nbytes)
        yield start, stop
        start = stop
