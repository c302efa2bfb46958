"""`--integrity`: nothing was damaged, and β = 1 is the fine-tuned checkpoint to the bit."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli import manifest
from liborth_cli.console import Progress
from liborth_cli.errors import UsageError
from liborth_cli.manifest import Content, Manifest, Split
from liborth_cli.verify.check import Check, Need, Options, Part, Work, option
from liborth_cli.verify.outputs import differences, expected
from liborth_cli.verify.result import Facts, Metric, Result, Table
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    from liborth_cli.checkpoint.reader import TensorInfo


LOADED = (".safetensors", ".bin", ".json", ".jinja", ".model", "vocab.txt", "merges.txt")
"""Ends of the names of files that decide what is loaded: a chat_template.jinja goes before the template in the JSON."""
TEMPLATES = "additional_chat_templates/"
"""The one folder below that loaders look into unasked."""


@dataclass(frozen=True)
class IntegrityOptions(Options):
    """How much is looked at."""

    subset: str | None = option(None, "--integrity on a seeded share of the tensors: 10%.")


@dataclass
class IntegrityFacts(Facts):
    """What is wrong; the files nothing vouches for; and where only some tensors were looked at, which."""

    problems: list[str]
    stray: list[str] | None = None
    subset: list[str] | None = None


def run(subject: Subject, options: IntegrityOptions) -> Result:
    """Hold every file and the reattached checkpoint against the hashes of the split, streamed in pieces of 1 MiB.

    1. Files: size and sha256 (FIPS 180-4) of everything in the manifest's `outputs`, one byte flipped anywhere is another hash.
       Weights and configurations that the manifest does not list are a fault: nothing vouches for what would be loaded.
    2. Reattachment: for every fine-tuned file, sha256 of its header frame and of bits(W_g) XOR delta, tensor by tensor, is
       the hash the manifest recorded when the split read that file. The fine-tuned checkpoint need not be there.
    3. Untouched tensors: those the manifest calls "skill" have no entry in the memory, so W_g holds their fine-tuned bits;
       where the fine-tuned files are there, they are compared byte for byte.

    With `--subset 10%` the tensors (any shape) of 2 and 3 are a seeded sample, compared with the fine-tuned files, and weight
    files are not hashed: a spot check for checkpoints that take hours to read.

    Raises:
        UsageError: when a subset has nothing to be compared with.
    """
    document, folder = subject.manifest, subject.folder
    assert document is not None
    share = _share(options.subset)
    files = expected(folder, document, subject.memory.checkpoint.path if subject.memory else None)
    if share < 1.0:
        return _spot_check(subject, share, files)
    with subject.console.progress("files", sum(p.stat().st_size for p in files if p.is_file()), brief=True) as progress:
        problems = differences(files, progress.advance, subject.hasher)
    with subject.console.progress("reattaching", subject.general.nbytes, brief=True) as progress:
        restored, told = _reattach(subject, document, progress)
    problems += [f"{name} does not come back from general and memory" for name, same in restored.items() if not same]
    problems += _touched(subject, list(subject.general.tensors.values()))
    known = {*files, folder / manifest.FILE}
    every = (file for file in (*folder.iterdir(), *folder.glob("[!.]*/*")) if file.is_file() and file not in known)
    stray = sorted(str(file.relative_to(folder)) for file in every)
    away = [name for name in stray if name in document.written]
    top = [name for name in stray if "/" not in name or name.startswith(TEMPLATES)]
    loaded = [name for name in top if name.endswith(LOADED) and name not in away]
    problems += [f"{name} is not in the manifest, so nothing vouches for it" for name in loaded]
    problems += [] if files else ["the manifest vouches for no file at all"]
    others = [name for name in stray if name not in loaded and name not in away]
    verdict = [_sentence(problems, f"{len(files)} of {len(files)} files are, to the byte, what was written")]
    verdict += [told] if told and not problems else []
    verdict += [f"Not in the manifest, so not covered: {', '.join(others)}."] if others else []
    metrics = {"damaged_files": Metric.exact(len(problems), "files or tensors that are not what they should be")}
    if restored:
        meaning = "share of the fine-tuned files that come back hash for hash"
        metrics["restored"] = Metric.exact(sum(restored.values()) / len(restored), meaning)
    rows = tuple((path.name, file.size, file.sha256[:16]) for path, file in files.items() if path.parent == folder)
    table = Table("Files the manifest vouches for", ("file", ">bytes", "sha256"), rows)
    return Result("integrity", " ".join(verdict), not problems, metrics, [table], IntegrityFacts(problems, stray=stray))


def _reattach(subject: Subject, document: Manifest, progress: Progress) -> tuple[dict[str, bool], str]:
    """Rebuild every fine-tuned file as a stream and compare its hash; return file → same, and a sentence."""
    from liborth_cli.checkpoint.hashing import lanes
    from liborth_cli.excise.excise import Exciser
    from liborth_cli.excise.request import ExciseOptions

    known = document.inputs["finetuned"].files if "finetuned" in document.inputs else {}
    if subject.memory is None:
        return {}, "The memory is not here, so nothing can be reattached." if isinstance(document, Split) else ""
    if not isinstance(document, Split) or not known:
        return {}, "The manifest does not name the fine-tuned files, so reattachment cannot be checked."
    plan = Exciser(subject.general, subject.memory, ExciseOptions(1.0))
    if any(frame is None for _, frame in plan.files.values()):
        return _compare_restored(subject)
    counting = threading.Lock()

    def hashed(file: tuple[Sequence[TensorInfo], bytes | None]) -> str:
        tensors, frame = file
        digest = hashlib.sha256(frame or b"")
        for tensor in tensors:
            for piece in plan.point.pieces(tensor):
                digest.update(piece.data)
                with counting:
                    progress.advance(len(piece.data))
        return digest.hexdigest()

    titles = list(known) if len(known) == 1 else list(plan.files)
    with ThreadPoolExecutor(lanes()) as pool:
        found = dict(zip(titles, pool.map(hashed, plan.files.values()), strict=True))
    same = {title: title in known and digest == known[title].sha256 for title, digest in found.items()}
    return same, f"General and memory give all {len(same)} fine-tuned files back, hash for hash."


def _compare_restored(subject: Subject) -> tuple[dict[str, bool], str]:
    """Where the layout was changed, file hashes say nothing: compare tensors with the fine-tuned files."""
    if not _has_files(subject):
        return {}, "The split changed the layout of the files: give --finetuned to compare tensors."
    wrong = [t.name for t in subject.general.tensors.values() if not _comes_back(subject, t)]
    return {"tensors": not wrong}, "General and memory give every fine-tuned tensor back, byte for byte."


def _touched(subject: Subject, tensors: list[TensorInfo]) -> list[str]:
    """Name the tensors that were to stay as they were and did not."""
    records = subject.manifest.tensors if isinstance(subject.manifest, Split) else {}
    kept = {name for name, record in records.items() if record.action == "skill"}
    edited = subject.memory.changes if subject.memory else ()
    found = [f"tensor {t.name} was to stay as it was, and the memory changes it" for t in tensors
             if t.name in kept and t.name in edited]  # fmt: skip
    if _has_files(subject):
        found += [f"tensor {t.name} was to stay as it was, and is not" for t in tensors
                  if t.name in kept and not _same(subject, t, restore=False)]  # fmt: skip
    return found


def _spot_check(subject: Subject, share: float, files: Mapping[Path, Content]) -> Result:
    if not _has_files(subject):
        raise UsageError(
            "--subset needs the fine-tuned checkpoint to compare with: the manifest has hashes of whole files only; give "
            f"--finetuned{subject.why(Need.FINETUNED)}"
        )
    names = sorted(subject.general.tensors)
    count = max(round(share * len(names)), 1)
    chosen = [subject.general.tensors[n] for n in sorted(random.Random(subject.seed).sample(names, count))]  # noqa: S311
    light = {path: file for path, file in files.items() if path.suffix != ".safetensors"}
    problems = differences(light)
    for path, file in files.items():
        if path not in light and (not path.is_file() or path.stat().st_size != file.size):
            problems.append(f"{path.name} is missing or has another size")
    if subject.memory is not None:
        problems += [
            f"tensor {t.name} does not come back from general and memory" for t in chosen if not _comes_back(subject, t)
        ]
    problems += _touched(subject, chosen)
    good = (
        f"{count} of {len(names)} tensors and {len(light)} small files were looked at and are right; a single damaged tensor "
        f"would have been missed with a chance of {1 - count / len(names):.0%}"
    )
    metrics = {"damaged_files": Metric.exact(len(problems), "files or tensors that are not what they should be, in the sample")}
    facts = IntegrityFacts(problems, subset=[t.name for t in chosen])
    return Result("integrity", _sentence(problems, good), not problems, metrics, [], facts)


def _sentence(problems: list[str], good: str) -> str:
    if not problems:
        return f"Intact: {good}."
    more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
    return f"DAMAGED: {'; '.join(problems[:5])}{more}."


def _has_files(subject: Subject) -> bool:
    """Tell whether W_f is there as files of its own, and not only as general and memory."""
    return subject.finetuned is not None and subject.finetuned.shards is not subject.general.shards


def _comes_back(subject: Subject, tensor: TensorInfo) -> bool:
    return _same(subject, tensor, restore=True)


def _same(subject: Subject, tensor: TensorInfo, restore: bool) -> bool:
    """Compare a general tensor, with its memory or without, with the fine-tuned one, piece by piece."""
    finetuned = subject.finetuned
    assert finetuned is not None
    theirs = finetuned.tensors.get(tensor.name)
    if theirs is None or theirs.nbytes != tensor.nbytes:
        return False
    from liborth_cli.excise.point import PIECE

    memory = subject.memory if restore else None
    for start in range(0, tensor.nbytes, PIECE):
        stop = min(start + PIECE, tensor.nbytes)
        bits = subject.general.read(tensor.name, start, stop)
        if memory is not None:
            bits = memory.reattach(tensor.name, bits, start)
        if not np.array_equal(bits, finetuned.read(tensor.name, start, stop)):
            return False
    return True


def _share(text: str | None) -> float:
    """Read "10%" or "0.1"."""
    if text is None:
        return 1.0
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise UsageError(f"--subset {text}: write a share such as 10%")
    return share


CHECK = Check(
    name="integrity",
    title="Integrity",
    words="Hashes, reattachment, untouched tensors.",
    part=Part.RELIABILITY,
    run=run,
    metrics=("damaged_files", "restored"),
    needs=(Need.MANIFEST,),
    cheap=True,
    work=lambda subject, options: Work(),
    require="damaged_files==0",
    options=IntegrityOptions,
    lacks=lambda subject, options: "" if subject.source.path.is_dir() else "a directory that `liborth split` wrote",
    files=True,
)
