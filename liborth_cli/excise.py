"""`excise`: write the checkpoint at any point between general (β = 0) and fine-tuned (β = 1), or beyond.

The ends are copies of bits, never arithmetic: β = 0 is the general checkpoint untouched, β = 1 is the fine-tuned one, file
for file where the layout was kept. Everything is streamed in cache-sized pieces.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from liborth_kernels import interpolate_numpy

from liborth_cli import manifest
from liborth_cli.card import excise_card
from liborth_cli.checkpoint import delta, layout, sidecars
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.hashing import ReadHash
from liborth_cli.checkpoint.reader import Checkpoint, Shard, TensorInfo
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import ShardWriter, Written, copy_file, write_file
from liborth_cli.console import Console, Progress
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.machine import available_cores

PIECE = 1 << 20
"""Bytes handled at a time."""


@dataclass(frozen=True)
class ExciseOptions:
    """Which point to write.

    Attributes:
        beta: how much memory: 0 none, 1 all of it.
        alpha: factor on the skill part; None keeps the split's. Another one needs the reference.
        out_shard_size: bytes; None keeps the general checkpoint's layout.
    """

    beta: float
    alpha: float | None = None
    out_shard_size: int | None = None


class Exciser:
    """A planned excision; `write` carries it out.

    Attributes:
        general: W_g.
        memory: the delta, or None when β = 0 needs none.
        reference: W_r, or None when α = 1.
        files: output file → (tensors in the order of writing, exact header or None).
    """

    def __init__(
        self, general: Checkpoint, memory: delta.Memory | None, options: ExciseOptions, reference: Checkpoint | None = None
    ) -> None:
        """Plan everything from headers.

        Raises:
            UsageError: when β or α is not a number, or α needs a reference.
            BadInput: when β needs a memory and there is none.
            PairMismatch: when the memory (or the reference) is for other tensors.
        """
        if not (math.isfinite(options.beta) and math.isfinite(options.alpha or 0.0)):
            raise UsageError("--beta and --alpha take finite numbers")
        if memory is None and options.beta != 0.0:
            raise BadInput(f"{general.path}: no memory file here, so only --beta 0 is possible; name it with --memory")
        self.general, self.options, self.reference = general, options, reference
        self.memory = memory if options.beta != 0.0 else None
        folder = general.path if general.path.is_dir() else general.path.parent
        self.history = manifest.load(folder) if (folder / manifest.FILE).is_file() else None
        self._stop = threading.Event()
        self._copied: dict[Path, Written] = {}
        if self.memory:
            self.memory.check_fits(self.general)
            delta.check_excisable(self.memory.checkpoint)
        self._alpha = self._relative_alpha()
        self.files = self._plan()

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what will be written."""
        headers = 3 * sum(len(s.header) for s in self.general.shards.values())
        extra = sidecars.find(*self.general.folders).nbytes
        return sum(t.nbytes for tensors, _ in self.files.values() for t in tensors) + headers + extra

    def fingerprint(self) -> str:
        """Hash everything that decides the output's bytes, for --resume."""
        sides = [
            self.general,
            *([self.memory.checkpoint] if self.memory else []),
            *([self.reference] if self.reference else []),
        ]
        seen = [[shard.identity for shard in side.shards.values()] for side in sides]
        return sha256(repr((seen, self.options, manifest.new("excise"))).encode()).hexdigest()

    def write(
        self, out: Path, console: Console, force: bool = False, resume: bool = False, threads: int | None = None
    ) -> dict[str, Any]:
        """Carry the plan out.

        Args:
            out: directory to create.
            console: where progress goes.
            force: replace an existing output.
            resume: continue a stopped run.
            threads: files to write at the same time; all cores when None.

        Returns:
            The manifest that was written.

        Raises:
            LiborthError: the leaf says which; `out` is then absent or what it was before.
        """
        sides = {"general": self.general}
        if self.memory:
            sides["memory"] = self.memory.checkpoint
        if self.reference:
            sides["reference"] = self.reference
        reads = {shard.path: ReadHash(shard) for side in sides.values() for shard in side.shards.values()}
        with Transaction(out, self.fingerprint(), force, resume) as transaction:
            named = {f"{name}/{s.name}": reads[s.path] for name, side in sides.items() for s in side.shards.values()}
            transaction.check_inputs(lambda name: named[name].finish().sha256 if name in named else None)
            with console.progress("excise", sum(t.nbytes for tensors, _ in self.files.values() for t in tensors)) as progress:
                self._write_files(transaction, reads, progress, threads)
            hashes = {path: self._copied.get(path) or read.finish() for path, read in reads.items()}
            self._check_hashes(hashes)
            for side in sides.values():
                side.check_unchanged()
            document = self._finish(transaction, sides, hashes)
            transaction.commit(manifest.dump(document))
        return document

    def _write_files(
        self, transaction: Transaction, reads: dict[Path, ReadHash], progress: Progress, threads: int | None
    ) -> None:
        todo = []
        for file, (tensors, _) in self.files.items():
            if file in transaction.finished:
                progress.skip(sum(t.nbytes for t in tensors))
            else:
                todo.append(file)
        todo.sort(key=lambda file: -sum(t.nbytes for t in self.files[file][0]))  # a large one begun last would be alone
        pool = ThreadPoolExecutor(threads or available_cores(), thread_name_prefix="excise")
        try:
            written = pool.map(lambda file: self._write_file(transaction.partial / file, *self.files[file], progress), todo)
            for file, result in zip(todo, written, strict=True):
                inputs = {
                    name: (self._copied.get(shard.path) or reads[shard.path].finish()).sha256
                    for name, shard in self._sources(file)
                }
                transaction.finish(file, {"files": [result.to_json()], "inputs": inputs})
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _sources(self, file: str) -> Iterator[tuple[str, Shard]]:
        """Yield the input files that one output file is made from."""
        names = {t.name for t in self.files[file][0]}
        general = {t.shard for name in names if (t := self.general.tensors.get(name))}
        for shard in self.memory.checkpoint.shards.values() if self.memory else ():
            if any(e.name.partition("/")[2] in {*names, file} for e in shard.entries):
                yield f"memory/{shard.name}", shard
        for shard in self.general.shards.values():
            if shard.name in general:
                yield f"general/{shard.name}", shard
        for shard in self.reference.shards.values() if self.reference else ():
            if any(e.name in names for e in shard.entries):
                yield f"reference/{shard.name}", shard

    def _finish(self, transaction: Transaction, sides: dict[str, Checkpoint], hashes: dict[Path, Written]) -> dict[str, Any]:
        folder = transaction.partial
        outputs = [w for file in self.files for w in transaction.finished[file]["files"]]
        replaced = delta.sidecars(self.memory.checkpoint) if self.memory else {}
        files = sidecars.find(*self.general.folders).files
        kept = {name: file for name, file in files.items() if name not in replaced}
        outputs += [w.to_json() for w in sidecars.copy(kept, folder)]
        outputs += [write_file(folder / name, text).to_json() for name, text in replaced.items()]
        if layout.has_index(self.files, self.general if self.options.out_shard_size is None else None):
            outputs.append(write_file(folder / layout.INDEX, self._index()).to_json())
        inputs: dict[str, Any] = {
            name: {
                "files": {s.name: {"size": hashes[s.path].size, "sha256": hashes[s.path].sha256} for s in side.shards.values()}
            }
            for name, side in sides.items()
        }
        origin = self.history["inputs"] if self.history else {}
        inputs["finetuned"] = origin.get("finetuned", {"title": self.general.path.resolve().name, "commit": None})
        document = manifest.new("excise", parameters=asdict(self.options), inputs=inputs)
        outputs.append(write_file(folder / "README.md", excise_card(document).encode()).to_json())
        return manifest.sealed({**document, "outputs": sorted(outputs, key=lambda w: w["name"])})

    def _index(self) -> bytes:
        kept = self.memory.frame(layout.INDEX) if self.memory and self._exact and self.options.out_shard_size is None else None
        names = {file: [t.name for t in tensors] for file, (tensors, _) in self.files.items()}
        return kept or layout.index(names, sum(t.nbytes for tensors, _ in self.files.values() for t in tensors))

    def _write_file(self, path: Path, tensors: list[TensorInfo], frame: bytes | None, progress: Progress) -> Written:
        source = self.general.shards.get(path.name)
        untouched = self.memory is None and self._alpha == 1.0 and self.options.out_shard_size is None
        if untouched and source:
            written = self._copied[source.path] = copy_file(source.path, path)
            progress.advance(sum(t.nbytes for t in tensors))
            return written
        writer = ShardWriter(path, [(t.name, t.dtype, t.shape) for t in tensors], frame=frame)
        for tensor in tensors:
            writer.begin(tensor.name, tensor.dtype, tensor.shape)
            for data in self.pieces(tensor):
                if self._stop.is_set():
                    raise InterruptedError(path)
                writer.write(data)
            progress.advance(tensor.nbytes)
        return writer.finish()

    def pieces(self, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yield the bytes of one output tensor."""
        if tensor.name not in self.general.tensors:
            assert self.memory is not None
            yield from self._raw(self.memory.checkpoint, delta.WHOLE + tensor.name, tensor.nbytes)
            return
        if self.memory and (grown := self.memory.grown.get(tensor.name)):
            yield from grown.pieces(self.general, self.memory.checkpoint, tensor.name, self.options.beta)
            return
        entry = delta.XOR + tensor.name
        memory = self.memory.checkpoint if self.memory else None
        edited = memory if memory and entry in memory.tensors else None
        old = self._reference_of(tensor) if self._alpha != 1.0 else None
        if edited is None and old is None:
            yield from self._raw(self.general, tensor.name, tensor.nbytes)
            return
        start = 0
        for bits in self._raw(self.general, tensor.name, tensor.nbytes):
            finetuned = bits
            if edited:
                finetuned = delta.xor(bits, edited.read(entry, start, start + len(bits)))
            exact = old is None and self.options.beta == 1.0
            yield finetuned if exact else self._blend(tensor, bits, finetuned, old, start)
            start += len(bits)

    def _blend(
        self, tensor: TensorInfo, general: np.ndarray, finetuned: np.ndarray, old: TensorInfo | None, start: int
    ) -> np.ndarray:
        if old is None and tensor.dtype in interpolate_numpy.SUPPORTED:
            return interpolate_numpy.interpolate(general, finetuned, self.options.beta, tensor.dtype)
        from liborth_kernels.interpolate import interpolate

        from liborth_cli.checkpoint.dtypes import as_bytes, as_tensor

        w_g, w_f, beta = as_tensor(general, tensor.dtype), as_tensor(finetuned, tensor.dtype), self.options.beta
        if old is None:
            return as_bytes(interpolate(w_g, w_f, beta))
        assert self.reference is not None
        width, old_width = DTYPES[tensor.dtype].bits // 8, DTYPES[old.dtype].bits // 8
        first = start // width
        shared = max(min(old.nbytes // old_width - first, len(w_g)), 0)
        raw = self.reference.read(old.name, first * old_width, (first + shared) * old_width) if shared else None
        parts = [as_bytes(interpolate(w_g[shared:], w_f[shared:], beta))] if shared < len(w_g) else []
        if raw is not None:
            w_r = as_tensor(raw, old.dtype)
            parts.insert(0, as_bytes(interpolate(w_g[:shared], w_f[:shared], beta, w_r, self._alpha)))
        return np.concatenate(parts)

    def _raw(self, side: Checkpoint, name: str, nbytes: int) -> Iterator[np.ndarray]:
        for start in range(0, nbytes, PIECE):
            yield side.read(name, start, min(start + PIECE, nbytes))

    @property
    def _exact(self) -> bool:
        return self.options.beta == 1.0 and self._alpha == 1.0

    def _plan(self) -> dict[str, tuple[list[TensorInfo], bytes | None]]:
        extra = self.memory.withheld() if self.memory else {}
        widen = self.memory.widen if self.memory else (lambda tensor: tensor)
        if self.options.out_shard_size is not None:
            every = [*map(widen, self.general.tensors.values()), *(t for group in extra.values() for t in group)]
            return {file: (tensors, None) for file, tensors in layout.reshard(every, self.options.out_shard_size).items()}
        files: dict[str, tuple[list[TensorInfo], bytes | None]] = {}
        for file, general in layout.keep(self.general).items():
            tensors = [*map(widen, general), *extra.get(file, [])]
            frame = self.memory.frame(file) if self.memory and self._exact else None
            files[file] = (tensors, None) if frame is None else (delta.in_order_of(frame, tensors, file), frame)
        return files

    def _check_hashes(self, hashes: dict[Path, Written]) -> None:
        names = layout.keep(self.general)
        for name, shard in zip(names, self.general.shards.values(), strict=True):
            if self.memory:
                found = hashes[shard.path]
                self.memory.check_belongs(Written(name, found.size, found.sha256))
        if self.history:
            known = {entry["sha256"] for entry in self.history["outputs"]}
            for side in (self.memory.checkpoint if self.memory else None, self.general):
                for shard in side.shards.values() if side else ():
                    if hashes[shard.path].sha256 not in known:
                        raise BadInput(f"{shard.path}: damaged, or of another split: its hash is not in the manifest")
        if self.history and self.reference:
            known = {entry["sha256"] for entry in self.history["inputs"]["reference"]["files"].values()}
            for shard in self.reference.shards.values():
                if hashes[shard.path].sha256 not in known:
                    raise PairMismatch(f"{shard.path}: is not the reference this split was made from")

    def _relative_alpha(self) -> float:
        """Return α divided by the α of the split."""
        if self.options.alpha is None:
            return 1.0
        if self.history is None or self.history["kind"] != "split":
            raise UsageError(f"--alpha needs the manifest of the split, and {self.general.path} has none")
        made_with = self.history["parameters"]["alpha"]
        if made_with == 0.0:
            raise UsageError("--alpha: this split was made with --alpha 0, so its skill part is gone")
        if self.reference is None and self.options.alpha != made_with:
            none = self.history["parameters"].get("one_checkpoint")
            raise UsageError("--alpha: this split had no reference" if none else "--alpha needs --reference, the one before")
        return self.options.alpha / made_with

    def _reference_of(self, tensor: TensorInfo) -> TensorInfo | None:
        assert self.history is not None and self.reference is not None
        record = self.history["tensors"].get(tensor.name, {})
        if record.get("action") != "split":
            return None
        old = self.reference.tensors.get(record.get("reference") or record.get("tied_to") or tensor.name)
        if old is None or old.shape[1:] != tensor.shape[1:]:
            raise PairMismatch(f"{self.reference.path}: has no {tensor.name!r} that fits; is this the right reference?")
        return old
