"""One transaction of many ranks: rank 0 has it; the others write files into its directories and tell it of them.

Where ranks do not see one another's disks (`gather`) each has a transaction of its own, and sends rank 0 what it has finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from liborth_cli.checkpoint.claim import FILES as INSIDE
from liborth_cli.checkpoint.claim import FOLDER, OWNER
from liborth_cli.checkpoint.files import Anchor, Written, anchors, hash_file, write_pieces
from liborth_cli.checkpoint.journal import Unit, owner_of
from liborth_cli.checkpoint.private import FILE_MODE
from liborth_cli.checkpoint.reader import Checkpoint, Shard
from liborth_cli.checkpoint.transaction import Transaction, beside, real
from liborth_cli.errors import BadInput, OutputConflict, PairMismatch, RankLost
from liborth_cli.manifest import File
from liborth_cli.ranks import World

SAMPLES, SAMPLE = 8, 4096
"""Places of a file that ranks compare before they begin, and bytes at each."""
FILES = 2
"""Tag of the bytes of files."""


class Joint:
    """The transaction of one command, as one rank sees it; used in a `with` around the writing of all units.

    Attributes:
        partial: where public files are written.
        private: where private files are written.
        finished: units that were there before this run.
    """

    def __init__(
        self,
        world: World,
        transaction: Transaction | None,
        places: tuple[Path, Path],
        planned: Sequence[Iterable[str]],
        gather: bool,
    ) -> None:
        """Let every rank in; all of them call this.

        Args:
            world: the ranks.
            transaction: rank 0's; with `gather`, each rank's own.
            places: the public and the private output.
            planned: the names that any rank may make in the public and in the private directory.
            gather: ranks do not see one another's disks.

        Raises:
            OutputConflict: when a rank does not see the directories of rank 0.
        """
        self._world, self._transaction, self._gather = world, transaction, gather and world.size > 1
        self._lock, self._failed, self._all_in = threading.Lock(), list[BaseException](), threading.Event()
        self._anchors: dict[Path, Anchor] = {}
        self._listener: threading.Thread | None = None
        self.partial, self.private = (beside(real(place)) / INSIDE for place in places)
        if transaction is not None and world.size > 1:
            transaction.expect(planned)
        found = world.share((transaction.owner, sorted(transaction.finished)) if transaction else ("", []))
        blind = [rank for rank, sees in enumerate(world.share(bool(transaction) or self._see(found[0][0]))) if not sees]
        if blind:
            raise OutputConflict(
                f"{world.where(blind[0])} does not see {self.partial.parent}: put the output on a file "
                "system that all ranks share, or say --gather"
            )
        self.finished = set[str]().union(*(one[1] for one in found))
        if world.first and world.size > 1:
            self._listener = threading.Thread(target=self._listen, name="joint", daemon=True)
            self._listener.start()
        elif self._gather and transaction is not None:
            earlier = set[str]().union(*(one[1] for one in found[: world.rank]))
            for unit in transaction.finished.keys() - earlier:
                self._send(transaction.finished[unit])

    def owners(self, units: Sequence[str], cost: Callable[[str], float]) -> dict[str, int]:
        """Deal those of the units that are unfinished: unit → rank."""
        dealt = self._world.assign([unit for unit in units if unit not in self.finished], cost)
        return {unit: rank for rank, some in enumerate(dealt) for unit in some}

    def mine(self, units: Sequence[str], cost: Callable[[str], float]) -> list[str]:
        """Return those of the unfinished units that this rank makes."""
        owners = self.owners(units, cost)
        return [unit for unit in units if owners.get(unit) == self._world.rank]

    def finish(self, unit: Unit) -> None:
        """Note that the files of a unit are complete, as `Transaction.finish` does; any thread may call it."""
        with self._lock:
            if self._transaction is not None:
                self._transaction.finish(unit)
            if not self._world.first:
                self._send(unit)

    def wait(self, units: Collection[str]) -> None:
        """Wait until every rank has finished all of its units, and rank 0 knows of them; every rank calls this."""
        while self._world.first and self._transaction and not self._transaction.finished.keys() >= set(units):
            if self._failed:
                raise self._failed[0]
            self._all_in.wait(0.02)
            self._world.look()
        self._all_in.set()
        self._world.barrier()
        if self._gather and not self._world.first and self._transaction:
            self._transaction.hand_over()

    def hashes(self, paths: Mapping[str, Path], hashed: Callable[[Path], Written]) -> dict[Path, Written]:
        """Return the hash of every input when all units are finished; their records know most. Every rank calls this.

        Args:
            paths: name → file, the same names on every rank.
            hashed: hashes a file that no record knows; one process has hashed all of them.

        Raises:
            BadInput: when two ranks have read different files under one name.
        """
        units = self._transaction.finished.values() if self._listener is not None and self._transaction else ()
        return hashes_of_all(self._world, paths, _inputs_of(units), hashed)

    def __enter__(self) -> Joint:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, and let go of the directories."""
        self._all_in.set()
        if self._listener is not None:
            self._listener.join()
        for folder, anchor in self._anchors.items():
            anchors.pop(folder, None)
            os.close(anchor.fd)

    def _see(self, owner: str) -> bool:
        """Hold the directories of rank 0 by descriptor; tell whether they are there and are its own."""
        try:
            for folder in {self.partial, self.private}:
                if owner_of((folder.parent / OWNER).read_bytes()) != owner:
                    return False
                self._anchors[folder] = anchors[folder] = Anchor(os.open(folder, FOLDER), lambda _: None)
        except OSError:
            return False
        return True

    def _send(self, unit: Unit) -> None:
        """Tell rank 0 of a unit, and with `gather` send what it consists of."""
        self._world.post((self._world.rank, unit.line))
        for path, file, _ in self._sent(unit):
            self._world.tensors.send_file(path, file.size, 0, FILES)

    def _sent(self, unit: Unit) -> Iterator[tuple[Path, File, int]]:
        """Yield the files of a unit that go from rank to rank, in that order: where each is, what it is, its mode."""
        for files, folder, mode in ((unit.files, self.partial, 0o644), (unit.private, self.private, FILE_MODE)):
            for file in files if self._gather else ():
                yield folder / file.name, file, mode

    def _listen(self) -> None:
        assert self._transaction is not None
        try:
            for rank, line in self._world.posts(self._all_in.is_set):
                unit = Unit.model_validate(line)
                for path, file, mode in self._sent(unit):
                    got = write_pieces(path, self._world.tensors.receive_file(rank, file.size, FILES), mode)
                    if got.sha256 != file.sha256:
                        raise RankLost(f"{file.name}: changed on its way from rank {rank}; run again with --resume")
                with self._lock:
                    self._transaction.finish(unit)
        except BaseException as error:
            self._failed.append(error)


def agree_on_inputs(world: World, sides: Iterable[Checkpoint]) -> None:
    """Compare what every rank has under the names of the inputs, before anything is made.

    Sizes, headers and a few pages of every file; and the hashes of all copies of a file, where ranks do not read the very same
    one. Each copy is hashed by one of those who see it.

    Raises:
        PairMismatch: when a rank has another file; names it.
    """
    if world.size == 1:
        return
    shards = [shard for side in sides for shard in side.shards.values()]
    found = world.share([(shard.name, _sampled(shard)) for shard in shards])
    for rank, one in enumerate(found):
        if one != found[0]:
            raise _different(world, next((a[0] for a, b in zip(found[0], one, strict=False) if a != b), "a file"), rank, 0)
    seen = world.share([[shard.stamp[0], shard.stamp[3]] for shard in shards])  # modified when, and which inode
    busy, mine = [0] * world.size, list[int]()
    for number, shard in enumerate(shards):
        copies = [some[number] for some in seen]
        for first in {copies.index(copy) for copy in copies} if copies.count(copies[0]) < world.size else ():
            rank = min((r for r, copy in enumerate(copies) if copy == copies[first]), key=lambda r: busy[r])
            busy[rank] += shard.size
            if rank == world.rank:
                mine.append(number)
    hashes = world.share({number: hash_file(shards[number].path).sha256 for number in mine})
    for rank, some in enumerate(hashes):
        for number, sha256 in some.items():
            first = next(r for r, other in enumerate(hashes) if number in other)
            if sha256 != hashes[first][number]:
                raise _different(world, shards[number].name, rank, first)


def _different(world: World, name: str, rank: int, other: int) -> PairMismatch:
    return PairMismatch(
        f"{name}: {world.where(rank)} has another file of this name than {world.where(other)}; copy the inputs again"
    )


def hashes_of_all(
    world: World, paths: Mapping[str, Path], known: Mapping[str, str], hashed: Callable[[Path], Written]
) -> dict[Path, Written]:
    """Return the hash of every input: known from who read it, or hashed now, each file by one rank. Every rank calls this.

    Args:
        world: the ranks.
        paths: name → file, the same names on every rank.
        known: name → sha256, on rank 0.
        hashed: hashes a file.
    """
    known = world.broadcast(dict(known))
    rest = [name for name in paths if name not in known]
    found = world.each(rest, lambda name: hashed(paths[name]).sha256, _size_in(paths))
    every = {**known, **dict(zip(rest, found, strict=True))}
    return {path: Written(path.name, path.stat().st_size, every[name]) for name, path in paths.items()}


def dealt_hashing(world: World, paths: Mapping[str, Path]) -> list[str]:
    """Return the names of the files that this rank hashes."""
    return world.assign(list(paths), _size_in(paths))[world.rank]


def _size_in(paths: Mapping[str, Path]) -> Callable[[str], float]:
    return lambda name: paths[name].stat().st_size


def _inputs_of(units: Iterable[Unit]) -> dict[str, str]:
    """Merge what units say of the inputs they were made from.

    Raises:
        BadInput: when two ranks have read different files under one name.
    """
    merged: dict[str, str] = {}
    for unit in units:
        for name, sha256 in unit.inputs.items():
            if merged.setdefault(name, sha256) != sha256:
                raise BadInput(f"{name}: two ranks have read different files of this name; copy the inputs again")
    return merged


def _sampled(shard: Shard) -> str:
    digest = hashlib.sha256(shard.header + str(shard.size).encode())
    buffer = np.empty(min(SAMPLE, shard.size), np.uint8)
    with contextlib.closing(Shard(shard.path)) as quiet:  # nobody who hashes reads shall hear of this
        for number in range(SAMPLES):
            quiet.read_into(buffer, (shard.size - len(buffer)) * number // (SAMPLES - 1))
            digest.update(buffer.data)
    return digest.hexdigest()
