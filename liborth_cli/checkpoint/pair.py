"""A reference and a fine-tuned checkpoint: what fits, what does not, and what will be done to each tensor.

Everything is decided from headers, before the first byte is written.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from liborth_cli.checkpoint.blockscaled import decoded
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.quantised import is_buffer, quantised, scheme
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import BadInput, PairMismatch, UsageError, shown

SAMPLE = 4096
HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|cls\.predictions\.decoder)\.weight$|^(transformer\.)?output(_layer)?\.weight$"
)
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|embeddings?|embed)\.weight$")
UNMERGED = re.compile(r"\.lora_(embedding_)?[AB]\b|\.lora_magnitude_vector\b")
PREDICTS_MORE = re.compile(r"(^|\.)mtp\.")
SWAPS = (("model.language_model.", "language_model.model."), ("model.language_model.", "model."))
"""Prefixes (newer, older) of models that read more than text; all others differ by a prefix that one side lacks."""


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


class Reason(StrEnum):
    """Why a tensor has the fate it has, before a method is known."""

    MATRIX = "matrix"
    VECTOR = "vector"
    ADDED = "added"
    EMPTY = "empty"
    EXCLUDED = "excluded"
    OPAQUE = "opaque"
    """Integers and what else arithmetic cannot be done on."""
    QUANTISED = "quantised"
    BUFFER = "buffer"
    SCALE = "scale"
    """Scales of a layer whose numbers are decoded."""


@dataclass(frozen=True)
class Policy:
    """The user's choices about which tensors take part.

    Attributes:
        include: regexes; a tensor must match one to be split (none given: all).
        exclude: regexes; a tensor that matches one is left with the skill.
        vectors: where norms and biases go: "skill" or "memory"; "split" leaves them to the method where it has factors.
        added: where rows and tensors that only the fine-tuned side has go, "skill" or "memory".
        skip: regexes of tensors that may be left out where they do not fit (`--for REGEX=skip`).
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    vectors: str = "skill"
    added: str = "skill"
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One tensor of the fine-tuned checkpoint and its fate.

    Attributes:
        tensor: where the fine-tuned tensor lies.
        action: what will be done.
        reason: why.
        why: the same in words, for the table and the manifest.
        rows: leading rows that both have; fewer than shape[0] when a vocabulary grew.
        twin: name of the tensor this one is tied to (itself when not tied): twins get the same treatment.
        reference: where W_r lies, maybe under another name, or None when only the fine-tuned side has this tensor.
    """

    tensor: TensorInfo
    action: Action
    reason: Reason
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


@dataclass(frozen=True)
class Match:
    """A pair that fits.

    Attributes:
        items: one for each fine-tuned tensor, in the order of its data.
        notes: what a user should know of how the two were brought together, in sentences.
        left: names of tensors, of either side, that do not fit and were left out as asked.
    """

    items: list[Item]
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def match(reference: Checkpoint, finetuned: Checkpoint, policy: Policy) -> Match:
    """Decide the fate of every tensor, or say why the two do not belong together.

    Args:
        reference: W_r.
        finetuned: W_f.
        policy: the user's choices.

    Raises:
        PairMismatch: when tensors are missing from the fine-tuned side, or shapes or dtypes do not fit; names the first.
        UsageError: when a regex is malformed or matches nothing.
    """
    return _Matcher(reference, finetuned, policy).match()


def meet(reference: Iterable[str], finetuned: Iterable[str]) -> dict[str, str]:
    """Find which names mean the same tensor: equal ones, then those that differ by a prefix of the architecture.

    A checkpoint of a bare model, as it lies on the hub, lacks the prefix ("transformer.") that `save_pretrained` of the model
    with a head writes. A name is paired once, and where several could be meant, the renaming that pairs the most wins.

    Returns:
        Fine-tuned name → reference name.
    """
    old, new = list(reference), list(finetuned)
    met = {name: name for name in set(old) & set(new)}
    spare, wanted = [name for name in old if name not in met], [name for name in new if name not in met]
    by_tail: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in spare:
        for prefix, tail in _cuts(name):
            by_tail[tail].append((name, prefix))
    claims: dict[str, list[tuple[tuple[str, str], str]]] = defaultdict(list)
    for name in wanted:
        for mine, tail in _cuts(name):
            for other, its in by_tail.get(tail, ()):
                if not (mine and its) or (mine, its) in SWAPS or (its, mine) in SWAPS:
                    claims[other].append(((mine, its), name))
    votes = Counter(swap for found in claims.values() for swap, _ in found)
    for other, found in claims.items():
        best = max(votes[swap] for swap, _ in found)
        chosen = [name for swap, name in found if votes[swap] == best]
        if len(chosen) == 1 and chosen[0] not in met:
            met[chosen[0]] = other
    return met


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to take a name apart into a prefix of up to three parts, maybe none, and the rest."""
    parts = name.split(".")
    for cut in range(min(len(parts), 4)):
        yield "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])


class _Matcher:
    """Holds what is found out about a pair while it is matched."""

    def __init__(self, reference: Checkpoint, finetuned: Checkpoint, policy: Policy) -> None:
        self.reference, self.finetuned, self.policy = reference, finetuned, policy
        names = [*finetuned.tensors, *(name for name in reference.tensors if name not in finetuned.tensors)]
        self._include = [_matching(p, names, "-i/--include-regex") for p in policy.include]
        self._exclude = [_matching(p, names, "-e/--exclude-regex") for p in policy.exclude]
        self._skip = [re.compile(p) for p in policy.skip]
        met = meet(reference.tensors, finetuned.tensors)
        self.olds = {name: reference.tensors[old] for name, old in met.items()}
        self.twins = find_twins(reference, finetuned, self.olds)
        self.quantised, self._quantised_old = quantised(finetuned), quantised(reference)
        self.notes: list[str] = []
        renamed = [(name, old) for name, old in met.items() if name != old]
        if renamed:
            self.notes.append(
                f"{len(renamed)} tensors are named differently on the two sides (first: {' and '.join(renamed[0])})"
            )
        self._adopt_heads()
        self.left: list[str] = []

    def match(self) -> Match:
        """Return the fate of every tensor."""
        problems = [*self._missing(), *self._misfits()]
        known = set(self.reference.tensors)
        unmerged = next((name for name in self.finetuned.tensors if UNMERGED.search(name) and name not in known), "")
        if unmerged:
            raise BadInput(
                f"{self.finetuned.path}: holds {shown(unmerged)}, a LoRA that was not merged; merge it first (peft: "
                "merge_and_unload, then save_pretrained)"
            )
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise PairMismatch(f"the two checkpoints do not fit: {'; '.join(problems[:3])}{more}{self._hint()}")
        items = [self._item(t) for t in self.finetuned.tensors.values()]
        layers = {self.quantised[i.tensor.name] for i in items if i.tensor.name in self.quantised}
        if layers:
            how = f" ({name})" if (name := scheme(self.finetuned)) else ""
            more = "; --requantise divides those that are fp8 with block scales" if decoded(self.finetuned).scales else ""
            self.notes.append(f"{len(layers)} quantised layers{how} pass through whole: nothing in them is divided{more}")
        opaque = [i.tensor.name for i in items if i.reason == Reason.OPAQUE]
        if opaque:
            self.notes.append(
                f"{len(opaque)} tensors are not plain floating point and go to the general checkpoint as they are "
                f"(first: {opaque[0]})"
            )
        return Match(items, tuple(self.notes), tuple(self.left))

    def _adopt_heads(self) -> None:
        """Pair a head of its own with the reference's embedding: a model that ties its head stores it once."""
        for name, head in self.finetuned.tensors.items():
            if name in self.olds or name in self.twins or not HEAD.search(name) or len(head.shape) != 2:
                continue
            for other, embedding in self.finetuned.tensors.items():
                if EMBEDDING.search(other) and embedding.shape == head.shape and other in self.olds:
                    self.olds[name] = self.olds[other]
                    self.notes.append(
                        f"{name} is a head of its own, and the reference ties its head to {self.olds[other].name}: "
                        "its update is taken from there"
                    )
                    break

    def _missing(self) -> Iterator[str]:
        """Name tensors that only the reference has, but for those that nothing in the fine-tuned model needs."""
        found = {old.name for old in self.olds.values()}
        only = [t for t in self.reference.tensors.values() if t.name not in found]
        buffers = [t for t in only if is_buffer(t)]
        more = [t for t in only if PREDICTS_MORE.search(t.name) or self._beyond_layers(t.name)]
        for group, what in ((buffers, "buffers that models compute anew"), (more, "tensors that predict more than one token")):
            if group:
                self.notes.append(f"{len(group)} {what} are in the reference only (first: {group[0].name}) and are left out")
        known = {*(t.name for t in (*buffers, *more)), *self.reference.scales.values()}
        for t in only:
            if t.name in known or self._is_spare_copy(t):
                continue
            if self._may_leave(t.name):
                self.left.append(t.name)
            else:
                yield f"{shown(t.name)} is missing from the fine-tuned side"

    def _beyond_layers(self, name: str) -> bool:
        """Tell whether a tensor is of a layer behind the last one that the configurations count.

        A layer that the reference counts and the fine-tuned does not was pruned: which of the others is which, no name says.
        """
        own, layers = (side.config.get("num_hidden_layers") for side in (self.reference, self.finetuned))
        found = re.search(r"(^|\.)layers\.(\d{1,6})\.", name)
        counted = max(layers, own if type(own) is int else 0) if type(layers) is int else 0
        return found is not None and int(found[2]) >= counted > 0

    def _misfits(self) -> Iterator[str]:
        resized = {
            (self.olds[t.name].shape[0], t.shape[0])
            for t in self.finetuned.tensors.values()
            if t.name in self.olds and len(t.shape) == 2 == len(self.olds[t.name].shape)
        }
        for name, old in list(self.olds.items()):
            problem = _misfit(self.finetuned.tensors[name], old, resized)
            if problem and self._may_leave(name):
                self.left.append(name)
                del self.olds[name]
            elif problem:
                yield problem

    def _hint(self) -> str:
        sides = [bool(found) for found in (self.quantised, self._quantised_old)]
        if sides[0] == sides[1]:
            return "; -e leaves out what need not fit"
        which, other = ("fine-tuned", "reference") if sides[0] else ("reference", "fine-tuned")
        return f"; the {which} side is quantised and the {other} is not: give both before or both after quantisation"

    def _may_leave(self, name: str) -> bool:
        return any(p.search(name) for p in (*self._exclude, *self._skip))

    def _unchosen(self, name: str) -> str | None:
        if self._include and not any(p.search(name) for p in self._include):
            return "not chosen by -i"
        return "excluded by -e" if any(p.search(name) for p in self._exclude) else None

    def _item(self, t: TensorInfo) -> Item:
        policy, twin = self.policy, self.twins.get(t.name, t.name)
        old = self.olds.get(t.name) or self.olds.get(twin)
        rows = min((old or t).shape[0], t.shape[0]) if t.shape else 1
        untouched = self._untouched(t, old, twin)
        if untouched:
            return Item(t, Action.SKILL, *untouched, rows, twin, old)
        if old is None:
            action = Action.WITHHELD if policy.added == "memory" else Action.SKILL
            return Item(t, action=action, reason=Reason.ADDED, why="not in the reference", rows=rows, twin=twin, reference=old)
        if len(t.shape) < 2:
            action = Action.MEMORY if policy.vectors == "memory" else Action.SKILL
            return Item(t, action=action, reason=Reason.VECTOR, why="norm or bias", rows=rows, twin=twin, reference=old)
        grown = f"; {t.shape[0] - rows} added rows go to {policy.added}" if rows < t.shape[0] else ""
        shrunk = f"; {old.shape[0] - rows} rows of the reference are gone" if rows < old.shape[0] else ""
        tied = f"; tied to {twin}" if twin != t.name else ""
        return Item(
            t,
            action=Action.SPLIT,
            reason=Reason.MATRIX,
            why=f"matrix{grown}{shrunk}{tied}",
            rows=rows,
            twin=twin,
            reference=old,
        )

    def _untouched(self, t: TensorInfo, old: TensorInfo | None, twin: str) -> tuple[Reason, str] | None:
        """Say why a tensor goes to the general checkpoint as it is, whatever the method; None when it does not."""
        if t.name in self.left:
            return Reason.EXCLUDED, "does not fit, and was left out"
        if t.name in self.finetuned.scales.values():
            return Reason.SCALE, "scales of fp8 blocks: kept, and what is edited is rounded under them"
        if is_buffer(t):
            return Reason.BUFFER, "a buffer that models compute anew"
        if t.name in self.quantised or (old is not None and old.name in self._quantised_old):
            return Reason.QUANTISED, "part of a quantised layer: passed through"
        if old is None:
            return None
        if not t.nbytes:
            return Reason.EMPTY, "empty"
        if not DTYPES[t.dtype].editable:
            return Reason.OPAQUE, f"{t.dtype} is not plain floating point: passed through"
        unchosen = self._unchosen(twin)
        return (Reason.EXCLUDED, unchosen) if unchosen else None

    def _is_spare_copy(self, spare: TensorInfo) -> bool:
        """Tell whether a reference-only matrix is a second copy of one that both sides have."""
        return len(spare.shape) == 2 and any(
            (t.dtype, t.shape) == (spare.dtype, spare.shape) and _equal(self.reference, spare, t)
            for t in {t.name: t for t in self.olds.values()}.values()
        )


def _misfit(new: TensorInfo, old: TensorInfo, resized: set[tuple[int, int]]) -> str | None:
    """Say why two tensors do not fit, or return None.

    Rows may be more or fewer, as those of a vocabulary are; elements of a vector only when a matrix of the pair changed alike.
    """
    both_float = DTYPES[new.dtype].editable and DTYPES[old.dtype].editable
    if new.dtype != old.dtype and not both_float:
        return f"{shown(new.name)} is {old.dtype} in the reference and {new.dtype} in the fine-tuned"
    if new.shape == old.shape:
        return None
    alike = len(new.shape) == len(old.shape) and new.shape[1:] == old.shape[1:] and both_float
    if alike and (len(new.shape) == 2 or (len(new.shape) == 1 and (*old.shape, *new.shape) in resized)):
        return None
    return f"{shown(new.name)} is {list(old.shape)} in the reference and {list(new.shape)} in the fine-tuned"


def has_own_head(checkpoint: Checkpoint) -> bool:
    """Tell whether a head is stored that differs from the embedding, whatever config.json says of tying the two."""
    heads = [t for t in checkpoint.tensors.values() if HEAD.search(t.name) and len(t.shape) == 2]
    tables = [t for t in checkpoint.tensors.values() if EMBEDDING.search(t.name) and t.shape in [h.shape for h in heads]]
    return any(
        not any((head.dtype, head.shape) == (t.dtype, t.shape) and _equal(checkpoint, head, t) for t in tables)
        for head in heads
    )


def find_twins(reference: Checkpoint, finetuned: Checkpoint, olds: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Find matrices stored twice (tied embeddings saved by a careless exporter).

    Two fine-tuned matrices are tied when they hold the same bits and the reference either ties them too, with an update
    that is not zero, or stores only one. A sample of each is compared first: the scan costs kilobytes a tensor.

    Args:
        reference: W_r.
        finetuned: W_f.
        olds: fine-tuned name → the reference's tensor of that name.

    Returns:
        Tied name → the name it is tied to, which the reference has.
    """
    groups: dict[object, list[TensorInfo]] = defaultdict(list)
    for t in finetuned.tensors.values():
        if len(t.shape) == 2 and t.nbytes:
            groups[t.dtype, t.shape].append(t)
    twins: dict[str, str] = {}
    for group in groups.values():
        group.sort(key=lambda t: t.name not in olds)
        seen: dict[bytes, TensorInfo] = {}
        for t in group if len(group) > 1 else []:
            sample = finetuned.read(t.name, 0, min(SAMPLE, t.nbytes)).tobytes()
            first = seen.setdefault(sample, t)
            if first is not t and first.name in olds and _equal(finetuned, first, t):
                mine, other = olds[first.name], olds.get(t.name)
                if other is None or _tied(reference, finetuned, mine, other, first):
                    twins[t.name] = first.name
    return twins


def _tied(reference: Checkpoint, finetuned: Checkpoint, one: TensorInfo, two: TensorInfo, new: TensorInfo) -> bool:
    """Tell whether two reference matrices are equal and differ from the fine-tuned one."""
    same = (one.dtype, one.shape) == (two.dtype, two.shape) and _equal(reference, one, two)
    return same and not (one.nbytes == new.nbytes and _equal(reference, one, new, finetuned))


def is_unchanged(reference: Checkpoint, finetuned: Checkpoint, item: Item) -> bool:
    """Tell whether fine-tuning left a tensor as it was, to the bit; of what it changed only the beginning is read."""
    old, new = item.reference, item.tensor
    return old is not None and (old.dtype, old.shape) == (new.dtype, new.shape) and _equal(reference, old, new, finetuned)


def regex(pattern: str, flag: str) -> re.Pattern[str]:
    """Compile what a user gave with a flag.

    Raises:
        UsageError: when it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from None


def _matching(pattern: str, names: Sequence[str], flag: str) -> re.Pattern[str]:
    compiled = regex(pattern, flag)
    if not any(compiled.search(name) for name in names):
        raise UsageError(f"{flag} {pattern!r} matches no tensor; `liborth inspect` lists the names")
    return compiled


def _equal(checkpoint: Checkpoint, a: TensorInfo, b: TensorInfo, other: Checkpoint | None = None) -> bool:
    """Compare two tensors of a size to the bit, a small piece first so that a difference shows early."""
    start = 0
    while start < a.nbytes:
        stop = min(max(2 * start, SAMPLE), start + (1 << 20), a.nbytes)
        if not np.array_equal(checkpoint.read(a.name, start, stop), (other or checkpoint).read(b.name, start, stop)):
            return False
        start = stop
    return True
