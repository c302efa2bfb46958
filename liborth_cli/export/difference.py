"""The two ends of what is exported: general − reference is the skill, fine-tuned − general the memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.hashing import check_belongs
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.pair import meet
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.views import Reattached
from liborth_cli.errors import BadInput, PairMismatch
from liborth_cli.export.request import ExportRequest, Part
from liborth_cli.verify.locate import locate


@dataclass(frozen=True)
class Difference:
    """What is subtracted from what.

    Attributes:
        old: the checkpoint that the export is attached to.
        new: what both together are.
        general: where the general checkpoint came from.
        base: where `old` came from.
        private: whether the difference is private.
        partner: tensor of `new` → tensor of `old`.
    """

    old: Checkpoint
    new: Checkpoint
    general: Source
    base: Source
    private: bool
    partner: dict[str, TensorInfo]

    def update(self, name: str) -> torch.Tensor:
        """Return new − old of one tensor, in its shape, float64."""
        info, old = self.new.tensors[name], self.partner[name]
        return (self.new.load(name).double() - self.old.load(old.name).double()).view(info.shape)

    def same(self, name: str) -> bool:
        """Tell whether both ends hold the same bits of one tensor."""
        return bool((self.new.read(name) == self.old.read(self.partner[name].name)).all())


def open_difference(request: ExportRequest, stack: ExitStack) -> Difference:
    """Open both ends, and hold them against each other.

    Args:
        request: what is asked.
        stack: closes what was opened.

    Raises:
        BadInput: when the reference or the memory is not found, or no split made the model.
        PairMismatch: when one end has tensors that the other lacks; names the first.
    """
    source = resolve(request.model)
    document = manifest.read(source.path, manifest.Split)
    general = stack.enter_context(Checkpoint.open(source.path))
    if request.part is Part.MEMORY:
        place = find_memory(source.path, request.memory)
        if place is None:
            raise BadInput(f"{source.path}: no memory beside it, and only the memory is asked for; name it with --memory")
        memory = stack.enter_context(Memory.open(place))
        check_belongs(memory, general)
        old, new, base = general, Reattached(general, memory), source
    else:
        if document.parameters.one_checkpoint:
            raise BadInput(f"{source.path}: split without a reference, so its skill is the model itself; use it as it is")
        found = locate("reference", document, request.reference, source)
        if found.source is None:
            raise BadInput(f"{source.path}: the checkpoint before fine-tuning is not here: {found.why}")
        old, new, base = stack.enter_context(Checkpoint.open(found.source.path)), general, found.source
    return Difference(old, new, source, base, request.part is Part.MEMORY, _partners(old, new))


def _partners(old: Checkpoint, new: Checkpoint) -> dict[str, TensorInfo]:
    met = meet(old.tensors, new.tensors)
    for name, info in new.tensors.items():
        if name not in met or old.tensors[met[name]].shape != info.shape:
            raise PairMismatch(f"{new.path}: {name!r} has no tensor of its shape in {old.path}, so no difference says it")
        if DTYPES[info.dtype].editable != DTYPES[old.tensors[met[name]].dtype].editable:
            raise PairMismatch(f"{new.path}: {name!r} is {info.dtype} here and not plain numbers in {old.path}")
    return {name: old.tensors[met[name]] for name in new.tensors}
