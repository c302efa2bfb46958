"""`push`: from an output of liborth to a repository of the hub. What is private goes to one of its own, and only when asked.

Nothing is uploaded but what the manifest lists, and every file is hashed first. The card says what a certificate of these very
files measured, as evaluation results that the hub shows, or that nothing was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from liborth_cli import manifest
from liborth_cli.card import Evaluated, Evidence, verified_card
from liborth_cli.checkpoint import private, upload
from liborth_cli.checkpoint.documents import fit, load_json
from liborth_cli.checkpoint.files import hash_file
from liborth_cli.checkpoint.signing import SUFFIX as SIGNED
from liborth_cli.console import Console, size
from liborth_cli.errors import BadInput, PairMismatch, UsageError, VerificationFailed

CARD = "README.md"
MEMORY_SUFFIX = "-private"
MESSAGE = "liborth: general checkpoint"
MEMORY_MESSAGE = "liborth: private memory"


class Measured(manifest.Record):
    """A number of a certificate with its interval; None where there is none."""

    value: manifest.Number | None
    low: manifest.Number | None
    high: manifest.Number | None
    meaning: manifest.Text = ""
    forgetting: bool = False


class Requirement(manifest.Record):
    """One condition of a certificate, decided."""

    text: manifest.Text
    measured: Measured
    met: bool | None
    sentence: manifest.Text = ""


class Made(manifest.Record):
    """What the manifest said when the certificate was made."""

    outputs: list[manifest.File] = Field(default_factory=list)


class Rows(manifest.Record):
    """Rows that were measured on."""

    rows: manifest.Count


class Seen(manifest.Record):
    """What was verified with what."""

    liborth: manifest.Text = ""
    split: Made | None = None
    data: dict[manifest.Text, Rows] = Field(default_factory=dict)


class Certificate(manifest.Record):
    """So much of the file that `verify --out` writes as a card needs."""

    schema_version: Annotated[int, Field(le=1)]
    outcome: manifest.Text
    sentences: list[manifest.Text]
    requirements: list[Requirement]
    not_tried: dict[manifest.Text, manifest.Text] = Field(default_factory=dict)
    provenance: Seen


@dataclass(frozen=True)
class PushRequest:
    """What goes where.

    Attributes:
        model: directory that liborth wrote.
        repo: `org/name` on the hub.
        certificate: file of `verify --out` about these very files, or None.
        public: anybody may see it; it must have passed then, unless `unverified`.
        unverified: public without a certificate that passed.
        push_memory: what is private goes to `org/name-private`, a private repository.
        memory: directory of the memory, when it is not beside the model.
        dry_run: upload nothing.
    """

    model: Path
    repo: str
    certificate: Path | None = None
    public: bool = False
    unverified: bool = False
    push_memory: bool = False
    memory: Path | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Parcel:
    """Files for one repository.

    Attributes:
        repo: its name.
        files: path there → file here, or content.
        private: whether only its owners may see it.
        nbytes: size of all.
        address: of the commit, once it is there.
    """

    repo: str
    files: Mapping[str, Path | bytes]
    private: bool
    nbytes: int
    address: str = ""


def push(request: PushRequest, console: Console, confirm: Callable[[str], bool]) -> list[Parcel]:
    """Upload an output, and its memory where that was asked for and confirmed; the memory goes last.

    Args:
        request: what goes where.
        console: where notes go.
        confirm: asks the user the question it is given, and says whether the answer was yes.

    Returns:
        What was uploaded, or would be.

    Raises:
        UsageError: without a token, offline, or when what is private would be published.
        BadInput: when a file is damaged or missing, or the hub refuses.
        VerificationFailed: when a file is not what the manifest says, or the certificate did not pass and all may see it.
    """
    parcels = pack(request, console)
    for parcel in parcels:
        where = "a private repository" if parcel.private else "a PUBLIC repository"
        console.note(f"{len(parcel.files)} files, {size(parcel.nbytes)}, to {parcel.repo}, {where}")
    if request.dry_run:
        return parcels
    upload.check_reachable()
    secret = parcels[-1] if request.push_memory else None
    if secret and not confirm(
        f"{secret.repo} will hold PRIVATE data: {len(secret.files)} files with what the model memorised."
    ):
        raise UsageError("not pushed: the memory was not confirmed; leave --push-memory out to push the rest alone")
    done = []
    for parcel in parcels:
        message = MEMORY_MESSAGE if parcel is secret else MESSAGE
        done.append(upload.upload(parcel.repo, parcel.files, parcel.private, message))
    return [Parcel(p.repo, p.files, p.private, p.nbytes, where) for p, where in zip(parcels, done, strict=True)]


def pack(request: PushRequest, console: Console) -> list[Parcel]:
    """Choose what goes where, and hold every file against its manifest; see `push`."""
    repo, folder = upload.check_name(request.repo), request.model
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such directory; push takes what liborth wrote")
    document = manifest.read(folder, manifest.Split, manifest.Excise, manifest.Export, manifest.Tune)
    if document.schema_version == 1:
        raise UsageError(f"{folder}: written by an older liborth, with the memory among it; split again before you push")
    if document.private and not request.push_memory:
        raise UsageError(f"{folder}: this output is PRIVATE: it holds the memory, or may; --push-memory pushes it all the same")
    if document.private and request.public:
        raise UsageError(f"{folder}: this output is PRIVATE: it is never pushed with --public")
    certificate = _certificate(request.certificate, document) if request.certificate else None
    if request.public and not request.unverified and (said := _doubt(certificate)):
        raise VerificationFailed(f"{folder}: --public needs a certificate that passed, and {said}; --unverified does without")
    if certificate is None:
        console.warn("nothing was verified: the card says so; give `verify --out` its file with --certificate")
    files: dict[str, Path | bytes] = dict(_checked(folder, document.written.values(), but=CARD))
    for name in (manifest.FILE, manifest.FILE + SIGNED):
        if (folder / name).is_file():
            files[name] = folder / name
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        files[CARD] = verified_card(text, _evidence(certificate)).encode() if certificate else text.encode()
    parcels = [Parcel(repo, files, not request.public, _nbytes(files))]
    if request.push_memory and not document.private:
        secret = _memory(request, document)
        parcels.append(Parcel(repo + MEMORY_SUFFIX, secret, private=True, nbytes=_nbytes(secret)))
    return parcels


def _checked(folder: Path, listed: Iterable[manifest.File], but: str = "") -> Iterator[tuple[str, Path]]:
    for file in listed:
        path = folder / file.name
        if file.name == but:  # people write into their cards
            continue
        if not path.is_file():
            raise BadInput(f"{path}: missing; the manifest lists it")
        if hash_file(path).sha256 != file.sha256:
            raise VerificationFailed(f"{path}: is not what was written: its hash is not the one in the manifest")
        yield file.name, path


def _certificate(path: Path, document: manifest.Manifest) -> Certificate:
    found = fit(Certificate, load_json(path), path)
    known = {file.sha256 for file in found.provenance.split.outputs} if found.provenance.split else set[str]()
    other = next((file.name for file in document.weights.values() if file.sha256 not in known), None)
    if other is not None:
        raise PairMismatch(f"{path}: this certificate is of another checkpoint: it does not know {other}")
    return found


def _doubt(found: Certificate | None) -> str | None:
    """Say why a certificate does not show that what is private is gone; None when it does."""
    if found is None:
        return "there is no --certificate"
    if found.outcome != "passed":
        return f"the certificate says {found.outcome!r}"
    if not any(one.measured.forgetting and one.met for one in found.requirements):
        return "the certificate required nothing to be forgotten (`liborth verify` with --canary does)"
    return None


def _evidence(found: Certificate) -> Evidence:
    evaluated = [
        Evaluated(one.text, one.met, one.measured.value, (one.measured.low, one.measured.high), one.measured.meaning)
        for one in found.requirements
    ]
    rows = {name: some.rows for name, some in found.provenance.data.items()}
    return Evidence(found.outcome, (found.sentences or [""])[0], evaluated, rows, list(found.not_tried))


def _memory(request: PushRequest, document: manifest.Manifest) -> dict[str, Path | bytes]:
    place = private.find_memory(request.model, request.memory)
    if place is None or not place.is_dir():
        raise BadInput(f"{request.model}: no memory here to push; say where it is with --memory")
    listed = private.vouched(place, document)
    if not listed:
        raise BadInput(f"{place}: nothing vouches for these files; split again before you push them")
    files: dict[str, Path | bytes] = dict(_checked(place, listed.values()))
    return {**files, private.FILE: place / private.FILE}


def _nbytes(files: Mapping[str, Path | bytes]) -> int:
    return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
