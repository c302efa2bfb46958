"""Carry a planned split out: file by file, hashed as it goes, all or nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from liborth_cli import manifest
from liborth_cli.card import split_card
from liborth_cli.checkpoint import delta, layout, private, sidecars
from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.checkpoint.hashing import BackgroundHasher, lanes
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.joint import Joint, agree_on_inputs
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.pair import Action
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.console import Console
from liborth_cli.curvature.together import Together
from liborth_cli.machine import Run
from liborth_cli.manifest import Dose, File, Split, SplitTotals, Tensor, Text, TextOptions
from liborth_cli.split.divide import Divider, Job, Skill, ahead
from liborth_cli.split.plan import Splitter
from liborth_cli.split.scatter import Scatter
from liborth_cli.split.shard import Folders, ShardRecord, WrittenShard, write_shard


@dataclass(frozen=True)
class Destination:
    """Where a split goes, and what is said of where it came from.

    Attributes:
        out: directory to create.
        sources: where the reference (None: there is none) and the fine-tuned checkpoint came from.
        memory_out: directory to create for what is private; None: `OUT.private`.
        dose: what was measured to find the amount, for the manifest; None: nothing was.
        key: of OpenSSH, to sign the manifest with; None: unsigned.
        texts: how texts were read, for the manifest; None: none were.
    """

    out: Path
    sources: tuple[Source | None, Source]
    memory_out: Path | None = None
    dose: Dose | None = None
    key: Path | None = None
    texts: TextOptions | None = None


def write_split(
    plan: Splitter,
    destination: Destination,
    run: Run,
    console: Console,
    hasher: BackgroundHasher | None = None,
    together: Together | None = None,
) -> Split | None:
    """Carry a plan out.

    Args:
        plan: the split.
        destination: what to create.
        run: device, threads, resume and force.
        console: where progress goes.
        hasher: one that is already reading the inputs.
        together: the walk in which factors are measured that are not stored.

    Returns:
        The manifest that was written; None on every rank but the first.

    Raises:
        LiborthError: the leaf says which; the output is then absent or what it was before.
    """
    hasher, world = hasher or BackgroundHasher(), run.world
    workers = run.share_threads(max((min(item.grid[1:]) for item in plan.split_items), default=0))
    place = private.private_place(destination.out, destination.memory_out)
    agree_on_inputs(world, (plan.reference, plan.finetuned))
    world.agree("other options", (repr(plan.options), list(plan.files), run.kernels, run.device.type))
    world.agree("another number of threads (say -j)", run.threads)
    with ExitStack() as stack:
        transaction = None
        if world.first or run.gather:
            transaction = stack.enter_context(Transaction(destination.out, plan.fingerprint(run), run.force, run.resume, place))
            named = plan.inputs
            transaction.check_inputs(lambda name: hasher.wait(named[name].path).sha256 if name in named else None)
            if transaction.anew:
                console.note(transaction.anew)
        names = (plan.files, plan.memory_files.values())
        joint = stack.enter_context(Joint(world, transaction, (destination.out, place), names, run.gather))
        folders, closers = Folders(joint.partial, joint.private), lanes()

        def close(file: str, shard: WrittenShard) -> None:
            record, sources = shard.close(), plan.sources(file)
            inputs = {name: hasher.wait(source.path).sha256 for name, source in sources.items()}
            hasher.check_same(sources.values())
            joint.finish(ShardUnit.made(file, record, inputs))

        with _pool(workers) as pool, _pool(closers) as closing:
            closed = deque[Future[None]]()

            def written(file: str, shard: WrittenShard) -> None:
                while len(closed) >= closers:
                    closed.popleft().result()
                closed.append(closing.submit(close, file, shard))

            if together is None:
                mine = joint.mine(list(plan.files), plan.cost)
                _in_order(plan, mine, folders, (run, console, hasher, pool), written)
            else:
                owners = joint.owners(list(plan.files), plan.cost)
                scatter = Scatter(plan, folders, owners, written)
                for file in (file for file in owners if owners[file] == world.rank):
                    _ask(plan, file, hasher)
                tokens = together.tokens // world.size
                with console.progress("curvature and split", tokens, unit="tokens", per=together.steps) as progress:
                    scatter.write(together, run, pool, progress.advance)
            while closed:
                closed.popleft().result()
        joint.wait(plan.files)
        hashes = _hashes(plan, joint, hasher, alone=world.size == 1)
        if not world.first or transaction is None:
            return None
        split = _complete(plan, transaction, destination, run, hashes, together)
        transaction.commit(manifest.dump(split), destination.key)
    return split


def _ask(plan: Splitter, file: str, hasher: BackgroundHasher) -> None:
    """Have what an output file is made from hashed."""
    for source in plan.sources(file).values():
        hasher.ask(source.path)


def _hashes(plan: Splitter, joint: Joint, hasher: BackgroundHasher, alone: bool) -> dict[Path, Written]:
    """Hash every input: weights, which who made a file of them has hashed, and factors. Every rank calls this."""
    shards = plan.inputs
    paths = {**{name: s.path for name, s in shards.items()}, **{f"factors/{p}": p for p in plan.factors.paths}}
    for path in paths.values() if alone else ():
        hasher.ask(path)
    found = joint.hashes(paths, hasher.wait)
    if alone:
        hasher.check_same(shards.values())
    return found


def _in_order(
    plan: Splitter,
    mine: Sequence[str],
    folders: Folders,
    means: tuple[Run, Console, BackgroundHasher, Executor],
    written: Callable[[str, WrittenShard], None],
) -> None:
    """Write file after file, matrices divided ahead of them."""
    run, console, hasher, pool = means
    with console.progress("split", plan.finetuned.nbytes) as progress:
        skills = _skills(plan, mine, run, pool)
        for file, tensors in plan.files.items():
            if file in mine or run.world.size == 1:
                _ask(plan, file, hasher)
            if file in mine:
                written(file, write_shard(plan, file, folders, skills, progress))
            else:
                progress.skip(sum(t.nbytes for t in tensors))


def _skills(plan: Splitter, mine: Sequence[str], run: Run, pool: Executor) -> Iterator[Skill]:
    """Divide the matrices of all files of this rank in the order of writing, ahead of the writer, across files."""
    tensors = [t for file in mine for t in plan.files[file]]
    items = [plan.items[t.name] for t in tensors]
    jobs = [Job(item, number) for item in items if item.action == Action.SPLIT for number in range(item.grid[0])]
    divider = Divider(plan.reference, plan.finetuned, plan.options, plan.factors, run.device, devices=run.devices)
    early = run.threads > 1 and divider.last_first(jobs)
    return ahead(pool, divider.skill, jobs, divider.cost, divider.budget(jobs), early)


class ShardUnit(Unit):
    """The journal's line of one output file: what was done to each tensor, and the names of the memory's."""

    tensors: dict[Text, Tensor]
    kept: list[Text]

    @classmethod
    def made(cls, file: str, record: ShardRecord, inputs: dict[str, str]) -> Self:
        """Make it of what became of the file."""
        return cls(
            unit=file,
            files=[File.of(record.general)],
            private=[File.of(record.memory)] if record.memory else [],
            inputs=inputs,
            tensors=record.tensors,
            kept=record.kept if record.memory else [],
        )


@dataclass(frozen=True)
class Finished:
    """All output files of a split, of this run and of the one it resumed.

    Attributes:
        public: files of the general checkpoint.
        secret: files of the memory.
        tensors: what was done to each.
        kept: memory file → names of its tensors.
    """

    public: list[Written]
    secret: list[Written]
    tensors: dict[str, Tensor]
    kept: dict[str, list[str]]

    @classmethod
    def of(cls, plan: Splitter, transaction: Transaction) -> Finished:
        """Read the journal's records."""
        units = {file: transaction.finished[file].become(ShardUnit) for file in plan.files}
        return cls(
            [file.written for unit in units.values() for file in unit.files],
            [file.written for unit in units.values() for file in unit.private],
            {name: tensor for unit in units.values() for name, tensor in unit.tensors.items()},
            {plan.memory_files[file]: unit.kept for file, unit in units.items() if unit.kept},
        )


def _complete(
    plan: Splitter,
    transaction: Transaction,
    destination: Destination,
    run: Run,
    hashes: Mapping[Path, Written],
    together: Together | None,
) -> Split:
    """Hold the inputs against what was read, and write all that goes beside the weights."""
    if together is not None:
        together.describe(hashes)
    old, new = ({s.name: hashes[s.path].sha256 for s in side.shards.values()} for side in (plan.reference, plan.finetuned))
    plan.factors.check_hashes(old, new, {path: hashes[path].sha256 for path in plan.factors.paths})
    done, partial = Finished.of(plan, transaction), transaction.partial
    public = [*done.public, *sidecars.copy(plan.sidecars.files, partial)]
    public += [write_file(partial / name, text) for name, text in plan.finetuned.rewritten.items()]
    if layout.has_index(plan.files, plan.finetuned if plan.options.out_shard_size is None else None):
        public.append(write_file(partial / layout.INDEX, _index(plan)))
    split = Split(
        parameters=manifest.SplitParameters(**manifest.finite(_parameters(plan))),
        inputs={
            "reference": manifest.Input.of(plan.reference, destination.sources[0], hashes),
            "finetuned": manifest.Input.of(plan.finetuned, destination.sources[1], hashes),
        },
        factors=plan.factors.describe(),
        machine=manifest.Machine.of(run),
        tensors=done.tensors,
        totals=totals(done.tensors.values()),
    )
    told = {"dose": destination.dose, "texts": destination.texts}
    split = split.model_copy(update={name: value for name, value in told.items() if value})
    public.append(write_file(partial / "README.md", split_card(split, plan.card).encode()))
    split = split.with_outputs(public)
    if done.secret and split.digest:
        secret = done.secret
        if len(plan.files) > 1:
            index = layout.index(done.kept, sum(file.size for file in secret))
            secret = [*secret, write_file(transaction.private / "memory.safetensors.index.json", index, delta.MODE)]
        private.seal(transaction.private, secret, split.digest)
    return split


def _index(plan: Splitter) -> bytes:
    general = {
        file: [t for t in tensors if plan.items[t.name].action != Action.WITHHELD] for file, tensors in plan.files.items()
    }
    total = sum(t.nbytes for tensors in general.values() for t in tensors)
    return layout.index({file: [t.name for t in tensors] for file, tensors in general.items()}, total)


def _parameters(plan: Splitter) -> dict[str, Any]:
    settings = {name: getattr(plan.options.rule, name) for name in plan.options.rule.settings}
    options = asdict(plan.options)
    for name, usual in (("requantise", False), ("memory_format", delta.PLAIN)):
        if options[name] == usual:
            del options[name]
    return {
        **options,
        "settings": settings,
        "amount": str(plan.options.amount),
        "overrides": [str(o) for o in plan.options.overrides],
        "one_checkpoint": plan.alone,
        "memory_side": plan.options.side,
        "layout_kept": plan.options.out_shard_size is None,
    }


def totals(tensors: Iterable[Tensor]) -> SplitTotals:
    """Add up all split tensors.

    `skill` and `memory` are ‖U_s‖²/‖U‖² and ‖U_m‖²/‖U‖², which add up to 1 only where the two parts are orthogonal. `kept` and
    `removed` are ⟨U, U_s⟩/‖U‖² and ⟨U, U_m⟩/‖U‖², which always do. Also the predicted retain cost and forget gains.
    """
    split = [t for t in tensors if t.energy]
    whole = math.fsum(t.energy or 0.0 for t in split)

    def share(side: str) -> float:
        return math.fsum((t.energy or 0.0) * (getattr(t, side) or 0.0) for t in split) / whole if whole else 0.0

    skill, memory = share("skill"), share("memory")
    kept = (1 + skill - memory) / 2 if whole else 0.0
    costs = [t.retain_cost for t in split if t.retain_cost is not None]
    gains = [t.forget_gain for t in split if t.forget_gain]
    longest = max(map(len, gains), default=0)
    found = {
        **({"retain_cost": math.fsum(costs)} if costs else {}),
        **({"forget_gain": [math.fsum(g[i] for g in gains if len(g) == longest) for i in range(longest)]} if gains else {}),
    }
    return SplitTotals(
        energy=whole, skill=skill, memory=memory, kept=kept, removed=1.0 - kept if whole else 0.0, **manifest.finite(found)
    )


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that drops what has not begun when an error ends the run."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="split")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
