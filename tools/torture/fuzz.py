"""Damage documents at random and parse them: whatever is no sound document is refused with an error that a user can read.

Mutations are drawn from real files (bits flipped, pieces cut, doubled and swapped, numbers and brackets replaced), so that most
of them get past the first check. Hypothesis and coverage would find more; this finds much, a thousand times a second.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.torture.inject import fork

BATCH = 1000
MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one."""
TOKENS = tuple(b'{ } [ ] " , : null -1 1e999 NaN 18446744073709551616 \\ud800 ../ \xff \x00'.split(b" "))


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Damage a document in one to four places."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        how = draw.randrange(5)
        if how == 0 and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif how == 1:
            del out[at : at + draw.choice((1, 4, 40))]
        elif how == 2:
            out[at:at] = draw.choice(TOKENS)
        elif how == 3:
            out[at:at] = out[at : at + draw.choice((1, 8, 80))]
        else:
            other = draw.randrange(len(out) + 1)
            out[at : at + 8], out[other : other + 8] = out[other : other + 8], out[at : at + 8]
    return bytes(out)


def parsers(work: Path) -> Iterator[tuple[str, list[bytes], Callable[[Path], object]]]:
    """Yield what is parsed: a name, sound documents, and what parses a file."""
    from liborth_cli import manifest
    from liborth_cli.checkpoint.claim import foreign
    from liborth_cli.checkpoint.delta import Memory
    from liborth_cli.checkpoint.journal import Unit
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.checkpoint.transaction import Transaction

    general, model = work / "in" / "general", work / "in" / "model"
    weights = [file.read_bytes() for file in sorted(general.glob("model-*.safetensors"))[:1]]
    memory = sorted([*general.glob("memory-*.safetensors"), *general.with_name("general.private").glob("memory-*.safetensors")])

    def index(path: Path) -> None:
        folder = path.parent / "indexed"
        folder.mkdir(exist_ok=True)
        for shard in general.glob("model-*.safetensors"):
            if not (folder / shard.name).exists():
                (folder / shard.name).symlink_to(shard)
        (folder / "model.safetensors.index.json").write_bytes(path.read_bytes())
        Checkpoint.open(folder).close()

    def config(path: Path) -> None:
        folder = path.parent / "configured"
        folder.mkdir(exist_ok=True)
        if not (folder / "model.safetensors").exists():
            (folder / "model.safetensors").symlink_to(model / "model.safetensors")
        (folder / "config.json").write_bytes(path.read_bytes())
        with Checkpoint.open(folder) as opened:
            _ = opened.config

    def journal(path: Path) -> None:
        place = path.parent / "out.liborth-partial"
        if not place.exists():
            with_files = Transaction(path.parent / "out", "plan")
            with_files.finish(Unit.of("part"))
            (path.parent / "journal").write_bytes((place / "journal.jsonl").read_bytes())
            for claim, _ in with_files._moves:
                claim.release(keep=True)
        (place / "journal.jsonl").write_bytes(path.read_bytes())
        with Transaction(path.parent / "out", "plan", resume=True) as again:
            again.check_inputs(lambda _: None)
            again.finish(Unit.of("part"))
            raise KeyboardInterrupt

    def owned(path: Path) -> None:
        folder = path.parent / "owned"
        folder.mkdir(exist_ok=True)
        (folder / manifest.FILE).write_bytes(path.read_bytes())
        foreign(folder)

    yield "safetensors headers", weights, lambda path: Checkpoint.open(path).close()
    yield "memory files", [file.read_bytes() for file in memory[:1]], lambda path: Memory(Checkpoint.open(path))
    yield "indexes", [(general / "model.safetensors.index.json").read_bytes()], index
    yield "manifests", [(general / manifest.FILE).read_bytes()], manifest.read
    yield "manifests of what --force would replace", [(general / manifest.FILE).read_bytes()], owned
    if model.exists():
        yield "configurations", [(model / "config.json").read_bytes()], config
    head = b'{"owner": "' + b"0" * 32 + b'", "plan": "plan", "private": "/x"}\n'
    unit = b'{"unit": "part", "files": [{"name": "a", "size": 1, "sha256": "00"}], "inputs": {"a": "b"}}\n'
    yield "journals of stopped runs", [head + unit + b'{"commit": [[1, 2]]}\n'], journal


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """Give a directory on a file system in memory, where there is one: what is made and thrown away need not reach a disk."""
    where = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="liborth-torture-", dir=where) as place:
        yield Path(place)


def trials(work: Path) -> Iterator[tuple[str, Callable[[int], str | None]]]:
    """Yield each parser's name and a trial: a batch of damaged documents in a fork."""
    for name, sound, parse in parsers(work):
        yield name, lambda number, sound=sound, parse=parse: _batch(work / "fuzz", number, sound, parse)


def _batch(place: Path, number: int, sound: list[bytes], parse: Callable[[Path], object]) -> str | None:
    place.mkdir(parents=True, exist_ok=True)
    file = place / "document.safetensors"

    def work() -> None:
        from liborth_cli.errors import LiborthError

        draw = random.Random(number)
        for _ in range(BATCH):
            data = mutate(draw.choice(sound), draw)
            file.write_bytes(data)
            try:
                parse(file)
            except LiborthError as error:
                text = str(error)
                if len(text) > 400 or "\n" in text:
                    print("LONG", len(text), repr(text[:150]))
            except KeyboardInterrupt:
                continue
            except BaseException as error:
                print("UNEXPECTED", type(error).__name__, str(error)[:150], data[:100])

    done = fork(work)
    return done.out.strip()[:400] or (None if done.code == 0 else f"exit {done.code}: {done.err[-200:]}")
