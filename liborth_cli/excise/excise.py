"""An excision, planned from headers and carried out file by file.

The ends are copies: β = 0 is the general checkpoint untouched, β = 1 is the fine-tuned one, file for file where the layout was
kept. What is in between is `PathPoint`'s; whether the files may be trusted, `Evidence` says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli import manifest
from liborth_cli.card import excise_card
from liborth_cli.checkpoint import delta, layout, private, sidecars
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
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.excise.evidence import Evidence
from liborth_cli.excise.point import PathPoint
from liborth_cli.excise.request import ExciseOptions, ExciseRequest, Means, Outline
from liborth_cli.machine import available_cores

if TYPE_CHECKING:
    from liborth_cli.ends import Ends


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
        evidence: what vouches for the files that are read.
        point: the weights that are written.
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
        self.evidence = Evidence(general, options.unverified)
        history = self.evidence.history
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
        self.sidecars = {n: file for n, file in found.items() if history is None or n in history.written}
        self.left_out = sorted(found.keys() - self.sidecars.keys())
        alpha = self.evidence.relative(options.alpha, reference)
        self.ends = ends
        if ends is not None:
            self._check_ends(ends)
        records = history.tensors if isinstance(history, manifest.Split) else {}
        self.point = PathPoint(
            general, options.beta, memory=self.memory, reference=reference, alpha=alpha, records=records, ends=ends
        )
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
        return self.memory is not None or self.evidence.unknown

    def fingerprint(self) -> str:
        """Hash everything that decides the output's bytes, for --resume."""
        seen: list[object] = [[shard.identity for shard in side.shards.values()] for side in self._sides.values()]
        known = self.evidence.history.digest if self.evidence.history else None
        if self.ends is not None:
            seen.append([self.ends.start.identity, self.ends.end.identity])
        return sha256(repr((seen, known, self.options, manifest.Maker(kind="excise").model_dump())).encode()).hexdigest()

    def write(self, out: Path, console: Console, means: Means) -> manifest.Excise | None:
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
            self.evidence.check_hashes(self.memory, self.reference, hashes)
            document = self._finish(transaction, hashes)
            transaction.commit(manifest.dump(document), self.options.key)
        for doubt in self.evidence.doubts:
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
        if self.memory and all(frame is not None for _, frame in self.files.values()):
            self.evidence.check_restored(outputs)
        outputs += self._write_sidecars(folder)
        if layout.has_index(self.files, self.general if self.options.out_shard_size is None else None):
            outputs.append(write_file(folder / layout.INDEX, self._index(), self._mode))
        inputs = {"general": manifest.Input.of(self.general, Source(self.general.path), hashes)}
        if self.reference:
            inputs["reference"] = manifest.Input.of(self.reference, Source(self.reference.path), hashes)
        known = self.evidence.history.inputs if self.evidence.history else {}
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
            unverified=self.evidence.doubts,
        )
        card = excise_card(document, read_card(self.general.path))
        outputs.append(write_file(folder / "README.md", card.encode(), self._mode))
        if self.private:
            outputs.append(write_file(folder / ".gitignore", private.GUARDS[".gitignore"], self._mode))
        return document.with_outputs(outputs)

    def _write_sidecars(self, folder: Path) -> list[Written]:
        written = sidecars.copy(self.sidecars, folder, self._mode)
        if self.evidence.history:
            known = self.evidence.history.written
            for file, copied in zip(self.sidecars.values(), written, strict=True):
                if known[copied.name].sha256 != copied.sha256:
                    self.evidence.hold(file, "is not what the split wrote: its hash is not the one in the manifest")
            for name in sorted(known.keys() - self.sidecars.keys() - self._replaced.keys() - self._denied):
                if sidecars.travels(name):
                    self.evidence.hold(self.general.path / name, "is missing; the manifest lists it")
        return written + [write_file(folder / name, text, self._mode) for name, text in self._replaced.items()]

    def _index(self) -> bytes:
        if self.memory and self.point.exact and self.options.out_shard_size is None:
            kept = self.memory.frame(layout.INDEX)
            if kept:
                return kept
        names = {file: [t.name for t in tensors] for file, (tensors, _) in self.files.items()}
        return layout.index(names, sum(t.nbytes for tensors, _ in self.files.values() for t in tensors))

    def _write_file(self, path: Path, tensors: list[TensorInfo], frame: bytes | None, progress: Progress) -> Written:
        source = self.general.shards.get(path.name)
        if source and self.point.untouched and self.options.out_shard_size is None:
            written = self._copied[source.path] = copy_file(source.path, path, self._mode)
            progress.advance(sum(t.nbytes for t in tensors))
            return written
        writer = ShardWriter(path, [(t.name, t.dtype, t.shape) for t in tensors], frame=frame, mode=self._mode)
        for tensor in tensors:
            writer.begin(tensor.name, tensor.dtype, tensor.shape)
            for data in self.point.pieces(tensor):
                if self._stop.is_set():
                    raise InterruptedError(path)
                writer.write(data)
            progress.advance(tensor.nbytes)
        return writer.finish()

    def _check_ends(self, ends: Ends) -> None:
        """Refuse a geodesic that does not go to this point, or whose factors were measured elsewhere."""
        if not 0.0 <= self.options.beta <= 1.0:
            raise UsageError("--path geodesic runs from --beta 0 to 1 and not beyond: there is no metric there")
        if self.options.alpha is not None:
            raise UsageError("--path geodesic goes from the general to the fine-tuned checkpoint: leave out --alpha")
        if self.memory and self.memory.grown:
            raise UsageError("--path geodesic moves weights, and this memory is neurons")
        self.evidence.check_measured(ends)

    def _plan(self) -> dict[str, tuple[list[TensorInfo], bytes | None]]:
        extra = self.memory.withheld() if self.memory else {}
        widen = self.memory.widen if self.memory else (lambda tensor: tensor)
        if self.options.out_shard_size is not None:
            every = [*map(widen, self.general.tensors.values()), *(t for group in extra.values() for t in group)]
            return {file: (tensors, None) for file, tensors in layout.reshard(every, self.options.out_shard_size).items()}
        files: dict[str, tuple[list[TensorInfo], bytes | None]] = {}
        for file, general in layout.keep(self.general).items():
            tensors = [*map(widen, general), *extra.get(file, [])]
            frame = self.memory.frame(file) if self.memory and self.point.exact else None
            files[file] = (tensors, None) if frame is None else (delta.in_order_of(frame, tensors, file), frame)
        return files
