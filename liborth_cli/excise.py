"""`excise`: write the checkpoint at any point between general (β = 0) and fine-tuned (β = 1), or beyond.

The way between them is the straight line, or, as an experiment, the geodesic of the retain curvature (`Ends`).

The ends are copies of bits, never arithmetic: β = 0 is the general checkpoint untouched, β = 1 is the fine-tuned one, file
for file where the layout was kept. Everything is streamed in cache-sized pieces. Nothing is taken on trust: weights, memory
and the files beside them are held against the manifests of the split, and where nothing vouches for them they are refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli import command_module, manifest
from liborth_cli.card import excise_card
from liborth_cli.checkpoint import delta, layout, private, sidecars
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, as_tensor
from liborth_cli.checkpoint.files import Written, copy_file, write_file
from liborth_cli.checkpoint.hashing import ReadHash
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.joint import Joint, agree_on_inputs
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
from liborth_cli.checkpoint.reader import Checkpoint, Shard, TensorInfo, named_shards
from liborth_cli.checkpoint.signing import check_key
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.usercard import read_card
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.console import Console, Progress
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.machine import available_cores
from liborth_cli.ranks import ALONE, World

if TYPE_CHECKING:
    from liborth_cli.ends import Ends

PIECE = 1 << 20
"""Bytes handled at a time."""
ANYWAY = "--unverified goes on all the same"


@dataclass(frozen=True)
class ExciseOptions:
    """Which point to write.

    Attributes:
        beta: how much memory: 0 none, 1 all of it.
        alpha: factor on the skill part; None keeps the split's. Another one needs the reference.
        out_shard_size: bytes; None keeps the general checkpoint's layout.
        unverified: go on where nothing vouches for a file, and say so in the output.
        key: of OpenSSH, to sign the manifest with; None: unsigned. It decides none of the bytes that `--resume` compares.
    """

    beta: float
    alpha: float | None = None
    out_shard_size: int | None = None
    unverified: bool = False
    key: Path | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Means:
    """Who writes, and what to do about outputs that exist; it decides no byte.

    Attributes:
        force: replace an existing output.
        resume: continue a stopped run.
        threads: files to write at the same time; all cores when None.
        world: the processes that share the work.
        gather: they do not see one another's disks: the first gets what the others write.
    """

    force: bool = False
    resume: bool = False
    threads: int | None = None
    world: World = ALONE
    gather: bool = False


@dataclass(frozen=True)
class ExciseRequest:
    """What `excise_checkpoint` is asked to do.

    Attributes:
        model: output of `liborth split` or `liborth tune`.
        out: directory to create.
        options: the point.
        memory: directory or file of it; None: beside the model.
        reference: checkpoint before fine-tuning, for another α.
        geodesic: factor sets at W_g and at W_f, for the geodesic between them; empty: the straight line.
        dry_run: only plan.
    """

    model: str
    out: Path
    options: ExciseOptions
    memory: Path | None = None
    reference: str | None = None
    geodesic: tuple[Path, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class Outline:
    """What an excision would write.

    Attributes:
        files: names of weight files.
        disk_bytes: upper bound of all of it.
    """

    files: list[str]
    disk_bytes: int


def excise_checkpoint(request: ExciseRequest, means: Means, console: Console) -> Outline | manifest.Excise | None:
    """Write the checkpoint with as much memory as asked for.

    Args:
        request: what is asked.
        means: who writes, and what to do about outputs that exist.
        console: where progress goes.

    Returns:
        The manifest that was written, None on every rank but the first; of a dry run what would be.

    Raises:
        LiborthError: the leaf says which; the output is then absent or what it was before.
    """
    source, options = resolve(request.model), request.options
    place = private.find_memory(source.path, request.memory) if options.beta else None
    with ExitStack() as stack:
        general = stack.enter_context(Checkpoint.open(source.path))
        memory = stack.enter_context(delta.Memory.open(place)) if place else None
        base = stack.enter_context(Checkpoint.open(resolve(request.reference).path)) if request.reference else None
        ends = None
        if request.geodesic:
            from liborth_cli.ends import open_ends

            ends = open_ends(stack, *request.geodesic)
        plan = Exciser(general, memory, options, base, ends)
        if request.dry_run:
            return Outline(sorted(plan.files), plan.disk_bytes)
        if means.world.first or means.gather:
            inputs = [source.path, place, base.path if base else None, *request.geodesic]
            check_outputs([Place(request.out)], inputs, means.force)
            check_space(request.out, plan.disk_bytes)
            check_key(options.key)
        return plan.write(request.out, console, means)


class Exciser:
    """A planned excision; `write` carries it out.

    Attributes:
        general: W_g.
        memory: the delta, or None when β = 0 needs none.
        reference: W_r, or None when α = 1.
        ends: retain factors at W_g and at W_f, where the way is a geodesic; None where it is straight.
        history: the manifest of the split or training run; None when there is no sound one and the user goes on.
        doubts: what nothing vouched for.
        unknown: whether nothing says that the weights are a general checkpoint's; they are then treated as private.
        sidecars: the files beside the weights that are copied, by name.
        left_out: those that the manifest does not know.
        note: in words, what of other files beside the weights is never copied; None when that is nothing.
        files: output file → (tensors in the order of writing, exact header or None).
    """

    def __init__(
        self,
        general: Checkpoint,
        memory: delta.Memory | None,
        options: ExciseOptions,
        reference: Checkpoint | None = None,
        ends: Ends | None = None,
    ) -> None:
        """Plan everything from headers.

        Raises:
            UsageError: when β or α is not a number, α needs a reference, or a geodesic does not go there.
            BadInput: when β needs a memory and there is none, or no sound manifest says what the files should be.
            PairMismatch: when the memory (or the reference) is for other tensors, or the factors are of other models.
        """
        if not (math.isfinite(options.beta) and math.isfinite(options.alpha or 0.0)):
            raise UsageError("--beta and --alpha take finite numbers")
        self.general, self.options, self.reference = general, options, reference
        self.doubts: list[str] = []
        self.unknown = False
        self.history = self._read_history()
        if memory is None and options.beta != 0.0:
            raise BadInput(f"{general.path}: no memory file here, so only --beta 0 is possible; name it with --memory")
        self.memory = memory if options.beta != 0.0 else None
        self._stop = threading.Event()
        self._copied: dict[Path, Written] = {}
        if self.memory:
            self.memory.check_fits(self.general)
            delta.check_excisable(self.memory.checkpoint)
        self._replaced = delta.sidecars(self.memory.checkpoint) if self.memory else {}
        beside = sidecars.find(*general.folders)
        self.note, self._denied = beside.note, {n for n, why in beside.left.items() if why == sidecars.PRIVATE}
        found = {n: file for n, file in beside.files.items() if n not in self._replaced}
        self.sidecars = {n: file for n, file in found.items() if self.history is None or n in self.history.written}
        self.left_out = sorted(found.keys() - self.sidecars.keys())
        self._alpha = self._relative_alpha()
        self.ends = ends
        if ends is not None:
            self._check_ends(ends)
        self.files = self._plan()

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what will be written."""
        headers = 3 * sum(len(s.header) for s in self.general.shards.values())
        extra = sum(f.stat().st_size for f in self.sidecars.values())
        return sum(t.nbytes for tensors, _ in self.files.values() for t in tensors) + headers + extra

    @property
    def private(self) -> bool:
        """Whether the output holds some of the memory, or may: nobody vouches that what it is made of holds none."""
        return self.memory is not None or self.unknown

    def fingerprint(self) -> str:
        """Hash everything that decides the output's bytes, for --resume."""
        seen: list[object] = [[shard.identity for shard in side.shards.values()] for side in self._sides.values()]
        known = self.history.digest if self.history else None
        if self.ends is not None:
            seen.append([self.ends.start.identity, self.ends.end.identity])
        return sha256(repr((seen, known, self.options, manifest.Maker(kind="excise").model_dump())).encode()).hexdigest()

    def write(self, out: Path, console: Console, means: Means = Means()) -> manifest.Excise | None:
        """Carry the plan out.

        Args:
            out: directory to create.
            console: where progress goes.
            means: who writes, and what to do about outputs that exist.

        Returns:
            The manifest that was written; None on every rank but the first.

        Raises:
            LiborthError: the leaf says which; `out` is then absent or what it was before.
        """
        world = means.world
        if self.note:
            console.warn(self.note)
        if self.left_out:
            console.warn(f"not copied, for the manifest does not know them: {', '.join(self.left_out)}")
        agree_on_inputs(world, self._sides.values())
        world.agree("other options", (self.options.beta, self.options.alpha, list(self.files)))
        named = named_shards(self._sides)
        reads = {shard.path: ReadHash(shard) for shard in named.values()}

        def hashed(path: Path) -> Written:
            return self._copied.get(path) or reads[path].finish()

        with ExitStack() as stack:
            transaction = None
            if world.first or means.gather:
                mode = private.FOLDER_MODE if self.private else 0o777
                transaction = stack.enter_context(Transaction(out, self.fingerprint(), means.force, means.resume, mode=mode))
                if transaction.anew:
                    console.note(transaction.anew)
                transaction.check_inputs(lambda name: hashed(named[name].path).sha256 if name in named else None)
            joint = stack.enter_context(Joint(world, transaction, (out, out), (self.files, ()), means.gather))
            with console.progress("excise", sum(t.nbytes for tensors, _ in self.files.values() for t in tensors)) as progress:
                self._write_files(joint, hashed, progress, means.threads)
            joint.wait(self.files)
            hashes = joint.hashes({name: shard.path for name, shard in named.items()}, hashed)
            for side in self._sides.values():
                side.check_unchanged()
            world.barrier()  # every rank has looked
            if not world.first or transaction is None:
                return None
            self._check_hashes(hashes)
            document = self._finish(transaction, hashes)
            transaction.commit(manifest.dump(document), self.options.key)
        for doubt in self.doubts:
            console.warn(f"UNVERIFIED: {doubt}")
        return document

    @property
    def _sides(self) -> dict[str, Checkpoint]:
        memory = self.memory.checkpoint if self.memory else None
        sides = {"general": self.general, "memory": memory, "reference": self.reference}
        return {name: side for name, side in sides.items() if side is not None}

    @property
    def _mode(self) -> int:
        return private.FILE_MODE if self.private else 0o644

    def _write_files(self, joint: Joint, hashed: Callable[[Path], Written], progress: Progress, threads: int | None) -> None:
        sizes = {file: sum(t.nbytes for t in tensors) for file, (tensors, _) in self.files.items()}
        todo = joint.mine(list(self.files), lambda file: sizes[file])
        progress.skip(sum(sizes[file] for file in sizes.keys() - set(todo)))
        todo.sort(key=lambda file: -sizes[file])  # a large one begun last would be alone
        pool = ThreadPoolExecutor(threads or available_cores(), thread_name_prefix="excise")
        try:
            written = pool.map(lambda file: self._write_file(joint.partial / file, *self.files[file], progress), todo)
            for file, result in zip(todo, written, strict=True):
                inputs = {name: hashed(shard.path).sha256 for name, shard in self._sources(file)}
                joint.finish(Unit.of(file, [result], inputs=inputs))
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

    def _finish(self, transaction: Transaction, hashes: Mapping[Path, Written]) -> manifest.Excise:
        folder = transaction.partial
        outputs = [file.written for name in self.files for file in transaction.finished[name].files]
        self._check_restored(outputs)
        outputs += self._write_sidecars(folder)
        if layout.has_index(self.files, self.general if self.options.out_shard_size is None else None):
            outputs.append(write_file(folder / layout.INDEX, self._index(), self._mode))
        inputs = {"general": manifest.Input.of(self.general, Source(self.general.path), hashes)}
        if self.reference:
            inputs["reference"] = manifest.Input.of(self.reference, Source(self.reference.path), hashes)
        known = self.history.inputs if self.history else {}
        inputs["finetuned"] = known.get("finetuned") or manifest.Input(title=self.general.path.resolve().name)
        document = manifest.Excise(
            parameters=manifest.ExciseParameters(
                beta=self.options.beta,
                alpha=self.options.alpha,
                out_shard_size=self.options.out_shard_size,
                **({"path": "geodesic"} if self.ends is not None else {}),
            ),
            inputs=inputs,
            private=self.private,
            unverified=self.doubts,
        )
        card = excise_card(document, read_card(self.general.path))
        outputs.append(write_file(folder / "README.md", card.encode(), self._mode))
        if self.private:
            outputs.append(write_file(folder / ".gitignore", private.GUARDS[".gitignore"], self._mode))
        return document.with_outputs(outputs)

    def _write_sidecars(self, folder: Path) -> list[Written]:
        written = sidecars.copy(self.sidecars, folder, self._mode)
        if self.history:
            known = self.history.written
            for file, copied in zip(self.sidecars.values(), written, strict=True):
                if known[copied.name].sha256 != copied.sha256:
                    self._hold(file, "is not what the split wrote: its hash is not the one in the manifest")
            for name in sorted(known.keys() - self.sidecars.keys() - self._replaced.keys() - self._denied):
                if sidecars.travels(name):
                    self._hold(self.general.path / name, "is missing; the manifest lists it")
        return written + [write_file(folder / name, text, self._mode) for name, text in self._replaced.items()]

    def _index(self) -> bytes:
        kept = self.memory.frame(layout.INDEX) if self.memory and self._exact and self.options.out_shard_size is None else None
        names = {file: [t.name for t in tensors] for file, (tensors, _) in self.files.items()}
        return kept or layout.index(names, sum(t.nbytes for tensors, _ in self.files.values() for t in tensors))

    def _write_file(self, path: Path, tensors: list[TensorInfo], frame: bytes | None, progress: Progress) -> Written:
        source = self.general.shards.get(path.name)
        untouched = self.memory is None and self._alpha == 1.0 and self.options.out_shard_size is None
        if untouched and source:
            written = self._copied[source.path] = copy_file(source.path, path, self._mode)
            progress.advance(sum(t.nbytes for t in tensors))
            return written
        writer = ShardWriter(path, [(t.name, t.dtype, t.shape) for t in tensors], frame=frame, mode=self._mode)
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
        if self.ends is not None and self.memory and tensor.name in self.ends.layers and 0.0 < self.options.beta < 1.0:
            yield self._on_geodesic(tensor, self.ends, self.memory)
            return
        old = self._reference_of(tensor) if self._alpha != 1.0 else None
        start = 0
        for bits in self._raw(self.general, tensor.name, tensor.nbytes):
            finetuned = self.memory.reattach(tensor.name, bits, start) if self.memory else bits
            if old is not None:
                yield self._rescale(tensor, bits, finetuned, old, start)
            elif finetuned is bits:
                yield bits
            else:
                yield delta.blend(bits, finetuned, self.options.beta, tensor.dtype)
            start += len(bits)

    def _on_geodesic(self, tensor: TensorInfo, ends: Ends, memory: delta.Memory) -> np.ndarray:
        """Return the bits of one matrix on the geodesic from general to fine-tuned; what the two share stays as it is."""
        from liborth_kernels.rounding import round_to

        from liborth_cli.checkpoint.dtypes import torch_dtype

        general = self.general.read(tensor.name)
        finetuned = memory.reattach(tensor.name, general)
        if finetuned is general:
            return general
        w_g, w_f = (as_tensor(bits, tensor.dtype).view(tensor.shape) for bits in (general, finetuned))
        return as_bytes(round_to(ends.at(tensor.name, w_g, w_f, self.options.beta), torch_dtype(tensor.dtype)))

    def _check_ends(self, ends: Ends) -> None:
        """Hold factors against the models they must have been measured at.

        Raises:
            UsageError: when β lies beyond the ends, α is given, or the memory is neurons.
            PairMismatch: when they were measured elsewhere.
        """
        if not 0.0 <= self.options.beta <= 1.0:
            raise UsageError("--path geodesic runs from --beta 0 to 1 and not beyond: there is no metric there")
        if self.options.alpha is not None:
            raise UsageError("--path geodesic goes from the general to the fine-tuned checkpoint: leave out --alpha")
        if self.memory and self.memory.grown:
            raise UsageError("--path geodesic moves weights, and this memory is neurons")
        if self.history is None:
            return
        weights = {file.sha256 for file in self.history.weights.values()}
        origin = self.history.inputs.get("finetuned") if isinstance(self.history, manifest.Split) else None
        for found, known, which in (
            (ends.start, weights, "the general checkpoint"),
            (ends.end, origin.hashes if origin else None, "the fine-tuned one"),
        ):
            model = found.manifest.inputs.get("model", manifest.Input()).hashes
            if found.point != 1.0 or known is None or not model or not model <= known:
                raise PairMismatch(f"{found.path}: was not measured at {which}; `liborth curvature` of it is, without --at")

    def _rescale(
        self, tensor: TensorInfo, general: np.ndarray, finetuned: np.ndarray, old: TensorInfo, start: int
    ) -> np.ndarray:
        """Blend with another α, on the elements that the reference has."""
        from liborth_kernels.interpolate import interpolate

        assert self.reference is not None
        w_g, w_f, beta = as_tensor(general, tensor.dtype), as_tensor(finetuned, tensor.dtype), self.options.beta
        width, old_width = DTYPES[tensor.dtype].bits // 8, DTYPES[old.dtype].bits // 8
        first = start // width
        shared = max(min(old.nbytes // old_width - first, len(w_g)), 0)
        parts = [as_bytes(interpolate(w_g[shared:], w_f[shared:], beta))] if shared < len(w_g) else []
        if shared:
            w_r = as_tensor(self.reference.read(old.name, first * old_width, (first + shared) * old_width), old.dtype)
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

    def _read_history(self) -> manifest.Split | manifest.Tune | None:
        folder = self.general.path if self.general.path.is_dir() else self.general.path.parent
        try:
            found = manifest.read(folder, manifest.Split, manifest.Tune)
        except BadInput as error:
            if not self.options.unverified:
                raise BadInput(f"{error}; {ANYWAY}") from None
            self.doubts.append("no sound manifest of a split or training run says what these files should be")
            self.unknown = True
            return None
        if isinstance(found, manifest.Tune) and not found.memory:
            method = found.parameters.method
            self._hold(folder, f"`liborth tune --method {method}` kept nothing apart: this is the fine-tuned checkpoint")
            self.unknown = True
        return found

    def _hold(self, path: Path, why: str) -> None:
        """Refuse for want of evidence, or note it where the user goes on all the same."""
        if not self.options.unverified:
            raise BadInput(f"{path}: {why}; {ANYWAY}")
        self.doubts.append(f"{path.name}: {why}")

    def _check_hashes(self, hashes: Mapping[Path, Written]) -> None:
        """Hold what was read against what the split wrote."""
        if self.memory:
            for name, shard in zip(layout.keep(self.general), self.general.shards.values(), strict=True):
                self.memory.check_belongs(Written(name, hashes[shard.path].size, hashes[shard.path].sha256))
        if self.history is None:
            return
        self._compare(self.general, self.history.weights, hashes)
        if self.memory:
            self._compare(self.memory.checkpoint, private.vouched(self.memory.checkpoint.path, self.history), hashes)
        if self.reference:
            known = self.history.inputs.get("reference", manifest.Input()).hashes
            for shard in self.reference.shards.values():
                if hashes[shard.path].sha256 not in known:
                    raise PairMismatch(f"{shard.path}: is not the reference this split was made from")

    def _compare(self, side: Checkpoint, known: Mapping[str, manifest.File], hashes: Mapping[Path, Written]) -> None:
        if not known:
            self._hold(side.path, f"nothing vouches for it: {private.FILE} is not beside it")
            return
        for name in sorted(name for name in known if name.endswith(".safetensors") and name not in side.shards):
            self._hold(side.path / name, "is missing; the manifest lists it")
        for name, shard in side.shards.items():
            if name not in known or known[name].sha256 != hashes[shard.path].sha256:
                self._hold(shard.path, "damaged, or of another split: its hash is not in the manifest")

    def _check_restored(self, written: list[Written]) -> None:
        """At β = 1 the files must be those that the split read, hash for hash, where their headers were kept."""
        origin = self.history.inputs.get("finetuned") if isinstance(self.history, manifest.Split) else None
        if origin and self.memory and all(frame is not None for _, frame in self.files.values()):
            for file in written:
                if file.sha256 not in origin.hashes:
                    self._hold(self.general.path, f"{file.name} does not come back as the fine-tuned file that was split")

    def _relative_alpha(self) -> float:
        """Return α divided by the α of the split."""
        if self.options.alpha is None:
            return 1.0
        if not isinstance(self.history, manifest.Split):
            raise UsageError(f"--alpha needs the manifest of the split, and {self.general.path} has none")
        made_with = self.history.parameters.alpha
        if self.options.alpha != made_with and (self.history.parameters.model_extra or {}).get("requantise"):
            raise UsageError("--alpha: this split rounded fp8 codes under their scales; split again with another --alpha")
        if made_with == 0.0:
            raise UsageError("--alpha: this split was made with --alpha 0, so its skill part is gone")
        if self.reference is None and self.options.alpha != made_with:
            none = self.history.parameters.one_checkpoint
            raise UsageError("--alpha: this split had no reference" if none else "--alpha needs --reference, the one before")
        return self.options.alpha / made_with

    def _reference_of(self, tensor: TensorInfo) -> TensorInfo | None:
        assert isinstance(self.history, manifest.Split) and self.reference is not None
        record = self.history.tensors.get(tensor.name)
        if record is None or record.action != "split":
            return None
        old = self.reference.tensors.get(record.reference or record.tied_to or tensor.name)
        if old is None or old.shape[1:] != tensor.shape[1:]:
            raise PairMismatch(f"{self.reference.path}: has no {tensor.name!r} that fits; is this the right reference?")
        return old


command_module(__name__)
