"""Write what was trained: the general checkpoint in the base's own layout, and the memory beside it; and read it back."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from liborth_kernels.rounding import round_to

from liborth_cli.checkpoint import delta, header, layout, sidecars
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.dtypes import DTYPES, WIDE, as_bytes, as_tensor, torch_dtype
from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.views import Reattached
from liborth_cli.checkpoint.writer import Coming, ShardWriter
from liborth_cli.tune.network import Network


@dataclass
class Parts:
    """What goes where.

    Attributes:
        trained: stored names whose value in the network is the trained one; all others are the base's bits.
        apart: keep the base as the general checkpoint, and the update in the memory file.
        widened: store float32 where the base stores less.
        added: stored name → (kind of growth, values in the stored orientation): neurons, in the memory file.
        router: name → values, in the memory file: gates, or tokens that stand before a text.
        config: what config.json says about the model with the neurons in.
    """

    trained: set[str] = field(default_factory=set)
    apart: bool = False
    widened: bool = False
    added: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    router: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, int] = field(default_factory=dict)


class Output:
    """Writes one network."""

    def __init__(self, network: Network, parts: Parts, shard_bytes: int | None) -> None:
        """Plan the files, of `shard_bytes` each; None keeps the base's."""
        self.network, self.parts = network, parts
        self.base: Checkpoint = network.checkpoint
        tensors = [self._stored(t) for t in self.base.tensors.values()]
        by_name = {t.name: t for t in tensors}
        self.layout_kept = shard_bytes is None
        if shard_bytes is None:
            self.files = {f: [by_name[t.name] for t in some] for f, some in layout.keep(self.base).items()}
        else:
            self.files = layout.reshard(tensors, shard_bytes)
        self.memory_files = delta.shard_names(list(self.files))

    @property
    def has_memory(self) -> bool:
        """Whether anything is kept apart."""
        return bool(self.parts.apart or self.parts.added or self.parts.router)

    def write(self, folder: Path, private: Path) -> tuple[list[Written], list[Written]]:
        """Write weights, indexes and what travels beside them into `folder`, the memory into `private`; return their files."""
        written: list[Written] = []
        apart: list[Written] = []
        kept: dict[str, list[str]] = {}
        for number, (file, tensors) in enumerate(self.files.items()):
            general = ShardWriter(folder / file, [(t.name, t.dtype, t.shape) for t in tensors])
            for tensor in tensors:
                general.begin(tensor.name, tensor.dtype, tensor.shape)
                general.write(self._general(tensor))
            written.append(general.finish())
            entries = dict(self._memory(tensors, first=number == 0))
            if not entries:
                continue
            path = private / self.memory_files[file]
            memory = ShardWriter(
                path,
                [(n, d, s) for n, (d, s, _) in entries.items()],
                delta.metadata(file),
                mode=delta.MODE,
                coming=Coming.FEWER,
            )
            for name, (dtype, shape, bits) in entries.items():
                memory.begin(name, dtype, shape)
                memory.write(bits)
            apart.append(memory.finish(delta.metadata(file, written[-1].sha256)))
            kept[path.name] = list(entries)
        if layout.has_index(self.files, self.base if self.layout_kept else None):
            size = sum(t.nbytes for tensors in self.files.values() for t in tensors)
            index = layout.index({f: [t.name for t in tensors] for f, tensors in self.files.items()}, size)
            written.append(write_file(folder / layout.INDEX, index))
            if kept and len(self.files) > 1:
                index = layout.index(kept, sum(file.size for file in apart))
                apart.append(write_file(private / "memory.safetensors.index.json", index, delta.MODE))
        return written + self._beside(folder), apart

    def _memory(
        self, tensors: Sequence[TensorInfo], first: bool
    ) -> Iterator[tuple[str, tuple[str, tuple[int, ...], np.ndarray]]]:
        """Yield the entries of one memory file: name → dtype, shape, bits."""
        if first and self.parts.config:
            text = np.frombuffer(self._config(self.parts.config), np.uint8)
            yield delta.SIDECAR + "config.json", ("U8", (len(text),), text)
        if first:
            for name, value in self.parts.router.items():
                yield name, ("F32", tuple(value.shape), as_bytes(value.float()))
        for tensor in tensors:
            if self.parts.apart and tensor.name in self.parts.trained:
                bits = delta.xor(self._general(tensor), self._tuned(tensor))
                if bits.any():
                    yield delta.XOR + tensor.name, (DTYPES[tensor.dtype].bit_view, tensor.shape, bits)
            if tensor.name in self.parts.added:
                kind, value = self.parts.added[tensor.name]
                bits = as_bytes(round_to(value.float(), torch_dtype(tensor.dtype)))
                yield kind + tensor.name, (tensor.dtype, tuple(value.shape), bits)

    def _general(self, tensor: TensorInfo) -> np.ndarray:
        """Return the bits of one tensor of the general checkpoint."""
        if tensor.name in self.parts.trained and not self.parts.apart:
            return self._tuned(tensor)
        bits, old = self.base.read(tensor.name), self.base.tensors[tensor.name]
        return bits if old.dtype == tensor.dtype else as_bytes(as_tensor(bits, old.dtype).to(torch_dtype(tensor.dtype)))

    def _tuned(self, tensor: TensorInfo) -> np.ndarray:
        return as_bytes(round_to(self.network.value(tensor.name).float(), torch_dtype(tensor.dtype)))

    def _stored(self, tensor: TensorInfo) -> TensorInfo:
        """Return a tensor with the dtype it will be written in."""
        if not (self.parts.widened and DTYPES[tensor.dtype].editable and tensor.dtype not in WIDE):
            return tensor
        return replace(tensor, dtype="F32", nbytes=header.nbytes("F32", tensor.shape))

    def _beside(self, folder: Path) -> list[Written]:
        files = sidecars.find(*self.base.folders).files
        if not self.parts.widened:
            return sidecars.copy(files, folder)
        written = sidecars.copy({name: file for name, file in files.items() if name != "config.json"}, folder)
        return [*written, write_file(folder / "config.json", self._config({}))]

    def _config(self, changes: dict[str, int]) -> bytes:
        document = {**self.base.config, **changes}
        if self.parts.widened:
            document = {**document, **{key: "float32" for key in ("torch_dtype", "dtype") if key in document}}
        return (json.dumps(document, indent=2) + "\n").encode()


def read_updates(network: Network, trained: Collection[str], folder: Path, private: Path) -> dict[str, torch.Tensor]:
    """Return parameter name → W − W_base as the files have it, float64; zero where nothing was trained."""
    whole = {network.stored[name].parameter: network.stored[name] for name in trained}
    updates = {name: torch.zeros_like(network.parameters[name], dtype=torch.float64, device="cpu") for name in whole}
    with Checkpoint.open(folder) as general, Memory.open(private) as memory:
        restored = Reattached(general, memory)
        for name in sorted(trained):
            place = network.stored[name]
            place.of(updates[place.parameter]).copy_(restored.load(name).double() - network.checkpoint.load(name).double())
    return updates
