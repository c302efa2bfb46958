"""What a manifest knows: where the reference and the fine-tuned checkpoint are, and whether they are still the same files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli import manifest
from liborth_cli.checkpoint.adapter import WEIGHTS, is_adapter
from liborth_cli.checkpoint.files import hash_file
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import SILENT, Console
from liborth_cli.errors import BadInput, LiborthError, PairMismatch, UsageError

NAMES = {
    "reference": "the checkpoint before fine-tuning",
    "finetuned": "the fine-tuned checkpoint",
    "general": "the general checkpoint",
    "model": "the model",
}
"""What the inputs of manifests are called for people."""


@dataclass(frozen=True)
class Located:
    """One input of a split, found or not.

    Attributes:
        source: where it is, or None.
        why: why it is not there, in words for an error line.
        changed: it was found, and is not what it was.
        hashes: sha256 of its files, by name; empty when it is not there.
    """

    source: Source | None = None
    why: str = ""
    changed: bool = False
    hashes: dict[str, str] = field(default_factory=dict)


def read_model(spec: str | None) -> Source:
    """Find what is to be verified.

    Args:
        spec: a checkpoint as everywhere; "-" reads what `liborth split` printed (its path, or its --json document) from
            stdin; None is the current directory.

    Raises:
        BadInput: when nothing is there, or stdin holds something else.
        UsageError: when "-" is typed at a terminal.
    """
    if spec != "-":
        return resolve(spec or ".")
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("MODEL is -, and nothing is piped in: liborth split … --json | liborth verify -")
    text = sys.stdin.read().strip()
    if not text:
        raise BadInput("stdin is empty: the command before the pipe wrote no result")
    return resolve(_output_of(text))


def history(source: Source) -> manifest.Manifest | None:
    """Read the manifest beside the weights, or return None when there is none."""
    folder = source.path if source.path.is_dir() else source.path.parent
    return manifest.read(folder) if (folder / manifest.FILE).is_file() else None


def locate(
    side: str, document: manifest.Manifest | None, given: str | None, model: Source, console: Console = SILENT
) -> Located:
    """Find an input of the split, and hold it against the hashes in the manifest.

    Without a name from the user it is looked for on the hub (when the split read it from there), beside the model and in the
    current directory, under the title the manifest gives it.

    Args:
        side: what the manifest calls it: one of `NAMES`, unless somebody else wrote that.
        document: the manifest, or None.
        given: what the user named, or None.
        model: what is verified.
        console: where progress goes.

    Returns:
        The input; without a source when it is not found, or changed since the split.

    Raises:
        PairMismatch: when the user named something else than what the split read.
        BadInput: when what the user named cannot be read.
    """
    record = document.inputs.get(side, manifest.Input()) if document else manifest.Input()
    known = {name: entry.sha256 for name, entry in record.files.items()}
    if given is not None:
        source = resolve(given)
        hashes = _hashes(source, side, console)
        strange = sorted(name for name, sha256 in hashes.items() if known and sha256 not in known.values())
        if strange:
            raise PairMismatch(
                f"{source.path}: {strange[0]} is not the file that this split was made from: it changed, or is another one"
            )
        return Located(source, hashes=hashes)
    if not known or not record.title:
        return Located(None, f"the manifest names none: give --{side}" if document else "")
    return _search(side, record, _candidates(record.title, record.commit, model), console)


def _search(side: str, record: manifest.Input, candidates: list[Source], console: Console) -> Located:
    title, known, changed = record.title, {name: entry.sha256 for name, entry in record.files.items()}, False
    for source in candidates:
        try:
            if _sizes_differ(source, known):
                continue
            hashes = _hashes(source, side, console)
        except LiborthError:
            continue
        if set(hashes.values()) == set(known.values()):
            return Located(source, hashes=hashes)
        changed = True
    if changed:
        return Located(None, f"{title!r} is still here, and changed since the split; give the old files with --{side}", True)
    return Located(None, f"{title!r}, which the split read, is not beside the model: say where with --{side}")


def _candidates(title: str, commit: str | None, model: Source) -> list[Source]:
    if commit is not None:
        try:
            return [resolve(f"{title}@{commit}")]
        except LiborthError:
            return []
    if Path(title).name != title or title in (".", ".."):
        return []
    here = model.path.resolve()
    places = [here.parent / title, Path.cwd() / title, here.parent.parent / title]
    return [Source(place) for place in dict.fromkeys(places) if place.exists() and place != here]


def _sizes_differ(source: Source, known: dict[str, str]) -> bool:
    """Tell, without reading it, that a directory of the right name holds some other kind of checkpoint."""
    with Checkpoint.open(source.path) as checkpoint:
        return len(checkpoint.shards) != len(known)


def _hashes(source: Source, side: str, console: Console) -> dict[str, str]:
    if is_adapter(source.path):
        return {WEIGHTS: hash_file(source.path / WEIGHTS).sha256}
    found = dict[str, str]()
    stage = f"hashing {NAMES.get(side, 'an input')}"
    with Checkpoint.open(source.path) as checkpoint:
        shards = checkpoint.shards.values()
        with console.progress(stage, sum(shard.size for shard in shards), brief=True) as progress:
            for written in BackgroundHasher().each([shard.path for shard in shards]):
                found[written.name] = written.sha256
                progress.advance(written.size)
    return found


def _output_of(text: str) -> str:
    import json

    if not text.startswith("{"):
        lines = text.splitlines()
        if len(lines) != 1:
            raise BadInput("stdin holds neither the path nor the --json document of `liborth split`")
        return lines[0]
    try:
        output = json.loads(text)["output"]
    except (ValueError, KeyError, TypeError, RecursionError):
        output = None
    if not isinstance(output, str):
        raise BadInput("stdin: not the JSON document that `liborth split --json` prints: it has no output")
    return output
