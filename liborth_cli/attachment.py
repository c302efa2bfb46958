"""A memory put into a general model that is held in memory, and taken out again, for as long as a forward pass takes.

The general weights lie in memory once. What is beside them depends on what the memory is: the tensors that a split changed, or
what `tune --method sinks` trained: neurons, with their router where there is one, or tokens before the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.delta import TOKENS, Memory, holds
from liborth_cli.checkpoint.hashing import BackgroundHasher, check_belongs
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.views import Reattached
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.stream.build import assemble, match_names, places, standing_in
from liborth_cli.stream.weights import Point
from liborth_cli.tune.sinks import attach
from liborth_cli.tune.tokens import attach_tokens


class Attachment(Protocol):
    """A memory that a model can compute with or without."""

    @property
    def routed(self) -> bool:
        """Whether a router was trained with it."""
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Have the model compute with the memory."""
        ...

    def gate(self) -> torch.Tensor:
        """Return how far the router opened at the last token of the last attached pass, (rows,), mean over the blocks."""
        ...


class ChangedTensors:
    """The tensors that a memory changes, ready to stand in for those of the general model; everything else is shared.

    Attributes:
        tensors: parameter → its values with the memory, in the model's dtype, on its device.
    """

    routed = False

    def __init__(self, model: torch.nn.Module, general: Checkpoint, memory: Memory) -> None:
        """Read the changed tensors, one at a time.

        Args:
            model: a Transformers model that holds the general weights; its parameters are replaced while `attached`.
            general: the checkpoint they are from.
            memory: what gives the fine-tuned weights back.

        Raises:
            PairMismatch: when the memory was made for another checkpoint.
            UsageError: when it holds tensors that the general model does not have.
        """
        tuned = Point(Reattached(general, memory))
        self._places = places(model)
        changed = memory.changes
        self.tensors: dict[str, torch.Tensor] = {}
        for name, parts in match_names(model, general)[0].items():
            if name not in self._places or not any(part.tensor.name in changed for part in parts):
                continue  # a tied weight stands in all of its places under its first name
            _, module, attribute = self._places[name][0]
            self.tensors[name] = torch.empty_like(getattr(module, attribute), requires_grad=False)
            assemble(self.tensors[name], parts, tuned)

    def attached(self) -> AbstractContextManager[None]:
        """Have the model compute with the memory."""
        return standing_in(self._places, self.tensors)

    def gate(self) -> torch.Tensor:
        """Refuse: a difference of weights has no router."""
        raise AssertionError


class AddedNeurons:
    """The neurons that a memory adds to every block; asleep but while `attached`. Their router, if any, acts as it was trained.

    Attributes:
        neurons: of every block.
    """

    def __init__(self, model: torch.nn.Module, memory: Path) -> None:
        """Put the neurons of a memory file into a model of Transformers, see `liborth_cli.tune.sinks.attach`."""
        self.neurons = attach(model, memory)
        self.routed = self.neurons[0].router is not None
        for sinks in self.neurons:
            sinks.awake = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the model compute with the memory."""
        try:
            for sinks in self.neurons:
                sinks.awake = True
            yield
        finally:
            for sinks in self.neurons:
                sinks.awake = False

    def gate(self) -> torch.Tensor:
        """Return how far the router opened at the last token of the last attached pass, (rows,), mean over the blocks."""
        said = [sinks.gate[:, -1, 0].float() for sinks in self.neurons if sinks.gate is not None]
        return torch.stack(said).mean(0)


class TokensBefore:
    """The tokens that stand before every text, asleep but while `attached`; a text must then begin and go on attached."""

    routed = False

    def __init__(self, model: torch.nn.Module, memory: Path) -> None:
        """Put the tokens of a memory file into a model of Transformers, see `liborth_cli.tune.tokens.attach_tokens`."""
        self._tokens = attach_tokens(model, memory)
        self._tokens.awake = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the model compute with the memory."""
        try:
            self._tokens.awake = True
            yield
        finally:
            self._tokens.awake = False

    def gate(self) -> torch.Tensor:
        """Refuse: tokens have no router."""
        raise AssertionError


def check_listed(general: Checkpoint) -> None:
    """Hold the files of a general checkpoint against the manifest beside them, where there is one.

    Raises:
        BadInput: when the manifest is damaged, or a file is not the one that it lists.
    """
    folder = general.path if general.path.is_dir() else general.path.parent
    if not (folder / manifest.FILE).is_file():
        return
    known = manifest.read(folder).weights
    listed = [shard.path for name, shard in general.shards.items() if name in known]
    for path, written in zip(listed, BackgroundHasher().each(listed), strict=True):
        if written.sha256 != known[path.name].sha256:
            raise BadInput(f"{path}: damaged, or of another split: its hash is not the one in the manifest")


@contextmanager
def open_attachment(folder: Path, memory: Path | None, model: torch.nn.Module) -> Iterator[Attachment]:
    """Open a general checkpoint and its memory for as long as the attachment is read.

    Args:
        folder: path of the general checkpoint.
        memory: path of its memory, or None to look beside it.
        model: holds the general weights.

    Raises:
        UsageError: when there is no memory.
        PairMismatch: when it was made with other files than these, to the bit.
    """
    place = find_memory(folder, memory)
    if place is None:
        raise UsageError(f"{folder}: no memory beside it; name it with --memory-path, or write without it: --memory off")
    with Checkpoint.open(folder) as general, Memory.open(place) as delta:
        check_belongs(delta, general)
        if holds(delta.checkpoint, TOKENS):
            yield TokensBefore(model, place)
        else:
            yield AddedNeurons(model, place) if delta.grown else ChangedTensors(model, general, delta)
