"""liborth.manifest.json: what was done, to what, with which hashes. Sorted, without dates, paths or host names.

A manifest is parsed once, here, into the records below; whatever does not fit them is refused in one line. It is sealed: its
`digest` is the sha256 of all the rest in canonical JSON (sorted keys, no spaces, ASCII), and the file must be, byte for byte,
what `dump` makes of it, so a change anywhere in it is found. It lists public files only: what is private has a manifest of its
own (checkpoint/private.py), and no manifest holds a hash of private rows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    field_validator,
)

from liborth_cli import __version__
from liborth_cli.checkpoint.documents import NotJson, fit, parse, read_small
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import JsonObject
from liborth_cli.errors import BadInput

if TYPE_CHECKING:
    from liborth_cli.machine import Run

SCHEMA_VERSION = 2
"""Version 1 had no digest, and listed the memory among the outputs. It is still read."""
FILE = "liborth.manifest.json"
LIBRARIES = ("numpy", "scipy", "torch")
MAX_BYTES = 1 << 28


def _inside(name: str) -> str:
    parts = name.split("/")
    if len(parts) > 2 or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError("not the name of a file in this directory")
    return name


Text = Annotated[str, StringConstraints(max_length=4096)]
Name = Annotated[str, StringConstraints(max_length=511), AfterValidator(_inside)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[Number, Field(ge=0)]
Fact = int | Number | Text | list[int | Number] | list[Text] | None


class Record(BaseModel):
    """A part of a manifest: every field checked, none converted, unknown ones ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Content(Record):
    """What a file holds: size in bytes and sha256."""

    size: Count
    sha256: Sha256


class File(Content):
    """One file that was written."""

    name: Name

    @classmethod
    def of(cls, written: Written) -> File:
        """Describe what a writer wrote."""
        return cls(name=written.name, size=written.size, sha256=written.sha256)

    @property
    def written(self) -> Written:
        """It as a writer says it."""
        return Written(self.name, self.size, self.sha256)


class Input(Record):
    """A checkpoint that was read: a name fit for publishing, its commit on the hub, and its files."""

    title: Text = ""
    commit: Text | None = None
    files: dict[Name, Content] = {}

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: Source | None, hashes: Mapping[Path, Written]) -> Input:
        """Describe a checkpoint.

        Args:
            checkpoint: what was read; an empty one where there is none.
            source: where it came from, or None.
            hashes: file → size and sha256.

        Raises:
            BadInput: when a file changed while it was read.
        """
        checkpoint.check_unchanged()
        read = {shard.name: hashes[shard.path] for shard in checkpoint.shards.values()}
        files = {name: Content(size=found.size, sha256=found.sha256) for name, found in read.items()}
        title = source.title.encode("utf-8", "replace").decode() if source else "none"
        return cls(title=title, commit=source.commit if source else None, files=files)

    @property
    def hashes(self) -> set[str]:
        """The sha256 of every file."""
        return {content.sha256 for content in self.files.values()}


@functools.cache
def _version(library: str) -> str:
    """Look a library's version up once: its metadata is a page of text that is parsed every time."""
    return importlib.metadata.version(library)


class Maker(Record):
    """Which command made something, in which versions."""

    kind: Text
    schema_version: Count = SCHEMA_VERSION
    liborth: Text = __version__
    libraries: dict[Text, Text] = Field(default_factory=lambda: {name: _version(name) for name in LIBRARIES})


class Manifest(Maker):
    """What every manifest holds.

    Attributes:
        private: whether the output itself holds private data.
    """

    inputs: dict[Text, Input] = {}
    outputs: list[File] = []
    private: bool = False
    digest: Sha256 | None = None
    _document: JsonObject = PrivateAttr(default_factory=dict)

    @property
    def document(self) -> JsonObject:
        """The manifest as a JSON object, checked."""
        if self._document:
            return self._document
        made = self.model_dump(include={*Maker.model_fields})
        return sealed({**made, **self.model_dump(mode="json", exclude_unset=True)})

    @property
    def written(self) -> dict[str, File]:
        """The outputs by name, without the memory that version 1 wrote among them."""
        old = self.schema_version == 1
        return {file.name: file for file in self.outputs if not (old and file.name.startswith("memory"))}

    @property
    def weights(self) -> dict[str, File]:
        """The files of the general checkpoint by name."""
        return {name: file for name, file in self.written.items() if name.endswith(".safetensors")}

    def with_outputs(self, outputs: Iterable[Written]) -> Self:
        """Return the finished manifest: with the files that were written, and sealed."""
        files = [File.of(file) for file in sorted(outputs, key=lambda file: file.name)]
        finished = self.model_copy(update={"outputs": files})
        return finished.model_copy(update={"digest": finished.document["digest"]})


class Machine(Record):
    """Where and how something was computed; `resident`: all weights were in memory; `merged`: of how many sets it was made."""

    device: Text = ""
    threads: Count = 0
    kernels: dict[Text, Text] = {}
    resident: bool | None = None
    merged: Count | None = None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Describe the machine of a run."""
        return cls(device=run.where, threads=run.threads, kernels=dict(run.kernels))


class DataPart(Record):
    """One file of rows; no hash of a secret."""

    title: Text
    weight: Number = 1.0
    sha256: Sha256 | None = None


class Data(Record):
    """Rows that were read: how many, their positions, those that carry loss, and a hash of them, whatever their order.

    `identity` is an HMAC in place of the hash, where the rows are private and their owner keeps the key.
    """

    files: list[DataPart] = []
    rows: Count = 0
    tokens: Count = 0
    loss_tokens: Count = 0
    sha256: Sha256 | None = None
    identity: Sha256 | None = None

    @property
    def unhashed(self) -> Self:
        """The same without any hash: whoever can count finds a short secret from its hash (docs/decisions/0023)."""
        files = [DataPart(title=part.title, weight=part.weight) for part in self.files]
        return type(self)(files=files, rows=self.rows, tokens=self.tokens, loss_tokens=self.loss_tokens)


class Choice(Record):
    """Which tensors took part in a split."""

    include: list[Text] = []
    exclude: list[Text] = []
    vectors: Text = "skill"
    added: Text = "skill"


class SplitParameters(Record):
    """What a split was asked for; more is kept as it is."""

    model_config = ConfigDict(extra="allow")
    method: Text
    amount: Text
    alpha: Number
    memory_side: Text
    policy: Choice = Choice()
    one_checkpoint: bool = False
    layout_kept: bool = True


class Tensor(Record):
    """What happened to one tensor; `energy` is ‖U‖², `skill` and `memory` shares of it.

    `reference` is the reference's tensor where that has another name.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Fact]  # pyright: ignore[reportIncompatibleVariableOverride]
    action: Literal["split", "skill", "memory", "withheld"]
    why: Text
    tied_to: Text | None = None
    reference: Text | None = None
    energy: Size | None = None
    skill: Number | None = None
    memory: Number | None = None
    excess: Number | list[Number] | None = None
    dimension: Number | list[Number] | None = None
    memory_dimension: Number | list[Number] | None = None
    factor_error: Number | None = None
    gap: Number | None = None
    retain_cost: Number | None = None
    forget_gain: list[Number] | None = None


class SplitTotals(Record):
    """All split tensors together."""

    energy: Size | None
    skill: Number | None
    memory: Number | None
    kept: Number | None = None
    removed: Number | None = None
    retain_cost: Number | None = None
    forget_gain: list[Number] | None = None


class FactorsUsed(Record):
    """One factor set that a split used. Of forget rows no hash is kept: who can count finds a short secret from it.

    `stored` is False where the factors were used as they were measured, and never written anywhere.
    """

    model: Text
    at: Number
    fisher: Text
    tokens: Number
    stored: bool = True
    data: list[Sha256] | None = None


class Factors(Record):
    """The factor sets of a split; `forget` is a list, however many there were."""

    retain: FactorsUsed | None = None
    forget: list[FactorsUsed] = []

    @field_validator("forget", mode="before")
    @classmethod
    def _always_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value


class Dose(Record):
    """What was measured to find the amount; `sentences` say it: on which rows, under which attack, and what was not tried."""

    model_config = ConfigDict(extra="allow")
    sentences: list[Text] = []


class TextOptions(Record):
    """How the texts of a split were read; which they were, no manifest says."""

    retain_tokens: Count
    probe_tokens: Count
    decoys: Count
    truncate: bool
    dtype: Text = "float32"


class Split(Manifest):
    """What `split` wrote."""

    kind: Literal["split"] = "split"  # pyright: ignore[reportIncompatibleVariableOverride]
    parameters: SplitParameters
    tensors: dict[Text, Tensor]
    totals: SplitTotals
    factors: Factors = Factors()
    machine: Machine = Machine()
    dose: Dose | None = None
    texts: TextOptions | None = None


class ExciseParameters(Record):
    """Which point was written; more is kept as it is."""

    model_config = ConfigDict(extra="allow")
    beta: Number
    alpha: Number | None = None
    out_shard_size: Count | None = None


class Excise(Manifest):
    """What `excise` wrote.

    Attributes:
        unverified: what nothing vouched for, when the user went on all the same.
    """

    kind: Literal["excise"] = "excise"  # pyright: ignore[reportIncompatibleVariableOverride]
    parameters: ExciseParameters
    unverified: list[Text] = []


class ExportParameters(Record):
    """What was exported, and in which form."""

    to: Text
    part: Text
    seed: Count = 0


class Export(Manifest):
    """What `export` wrote; `facts` say what it holds and how it was tested."""

    kind: Literal["export"] = "export"  # pyright: ignore[reportIncompatibleVariableOverride]
    parameters: ExportParameters
    facts: dict[Text, Fact] = {}


class TuneParameters(Record):
    """What a training run was asked for; more is kept as it is."""

    model_config = ConfigDict(extra="allow")
    method: Literal["full", "lora", "ogd", "sinks"]


class Protection(Record):
    """What OGD leaves alone in one matrix: how many directions of either side, and which share of the matrix they span."""

    inputs: Count
    outputs: Count | None
    share: Number


class Held(Record):
    """Rows of public text on which the base's answers are held, and the weight of that."""

    weight: Number
    rows: Count


class TuneFacts(Record):
    """What a training method did; more (the size in config.json that neurons change) is kept as it is.

    Attributes:
        trained: numbers that LoRA trained.
        directions: gradients that exact OGD keeps orthogonal to the update.
        protected: of OGD, by matrix.
        frozen: tensors that OGD did not train.
        held: rows on which OGD holds what the base says.
        neurons: that were added to every block.
        active: neurons of a block that one sequence meets.
        orthogonality: the largest of `leaks`.
        leaks: share of an update that lies in the protected subspace, as written.
    """

    model_config = ConfigDict(extra="allow")
    trained: Count | None = None
    directions: Count | None = None
    protected: dict[Text, Protection] = {}
    frozen: list[Text] = []
    held: Held | None = None
    neurons: Count | None = None
    active: Count | None = None
    orthogonality: Number | None = None
    leaks: dict[Text, Number] = {}


class Training(Record):
    """How training ended: steps done, the step that was kept, where the loss ran away, the last held-out loss."""

    steps: Count
    kept: Count
    diverged: Count | None
    held_out: Number | None


class Tune(Manifest):
    """What `tune` wrote; `memory` says whether anything was kept apart; `data` are rows that were trained on or held out."""

    kind: Literal["tune"] = "tune"  # pyright: ignore[reportIncompatibleVariableOverride]
    parameters: TuneParameters
    memory: bool
    data: dict[Text, Data | None] = {}
    machine: Machine = Machine()
    method: TuneFacts = TuneFacts()
    training: Training | None = None


class CurvatureParameters(Record):
    """What factors were measured, and where; more is kept as it is."""

    model_config = ConfigDict(extra="allow")
    at: Annotated[Number, Field(ge=0, le=1)]
    fisher: Text
    moments: Text
    dtype: Text
    eigen: bool = False
    seed: int | list[Text] | None = None
    per_token: bool = False


class FactorLayer(Record):
    """One matrix of a factor set, in the orientation of the mathematical weight (d_out, d_in)."""

    tensor: Text
    matrix: Count | None
    d_out: Annotated[Count, Field(gt=0)]
    d_in: Annotated[Count, Field(gt=0)]
    transposed: bool
    kind: Text
    input: Text
    tokens: Number
    position: Count


class FactorTotals(Record):
    """All rows of a factor set together."""

    tokens: Size
    loss: Number | None
    loss_tokens: Size


class Curvature(Manifest):
    """What `curvature` wrote."""

    kind: Literal["curvature"] = "curvature"  # pyright: ignore[reportIncompatibleVariableOverride]
    parameters: CurvatureParameters
    model_sha256: Sha256
    data: list[Data]
    layers: dict[Text, FactorLayer]
    left_out: dict[Text, Text]
    totals: FactorTotals
    machine: Machine = Machine()


class Private(Manifest):
    """What lies in a private directory, and the digest of the public manifest that it belongs to."""

    kind: Literal["private"] = "private"  # pyright: ignore[reportIncompatibleVariableOverride]
    belongs_to: Sha256


KINDS: dict[str, type[Manifest]] = {
    model.model_fields["kind"].default: model for model in (Split, Excise, Export, Tune, Curvature, Private)
}
Kind = TypeVar("Kind", bound=Manifest)


def sealed(document: JsonObject) -> JsonObject:
    """Return a document with its digest."""
    content = {key: finite(value) for key, value in document.items() if key != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "digest": hashlib.sha256(canonical.encode()).hexdigest()}


def dump(manifest: Manifest | JsonObject) -> bytes:
    """Seal and render a manifest; equal content gives equal bytes."""
    document = manifest.document if isinstance(manifest, Manifest) else manifest
    return (json.dumps(sealed(document), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read(place: Path, *kinds: type[Kind]) -> Kind:
    """Read the manifest in a directory (or a file), check its seal and every field.

    Args:
        place: where it is.
        *kinds: which are meant; any when none is named.

    Raises:
        BadInput: when there is none, when it was changed or is damaged, or when it is of another kind.
    """
    if not os.path.lexists(place):
        raise BadInput(f"{place}: no such file or directory")
    file = place / FILE if place.is_dir() else place
    if not os.path.lexists(file):
        raise BadInput(f"{place}: no {FILE} here, which only what liborth wrote has")
    raw = read_small(file, MAX_BYTES)
    try:
        document = finite(parse(raw))
        version, model = document["schema_version"], KINDS[document["kind"]]
        sealed_as_read = raw == dump(document)
    except NotJson as error:
        raise BadInput(f"{file}: damaged: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{file}: damaged; not a liborth manifest") from None
    if version not in (1, SCHEMA_VERSION):
        raise BadInput(f"{file}: schema version {str(version)[:20]}; this liborth reads {SCHEMA_VERSION}, upgrade it")
    if "digest" in document if version == 1 else not sealed_as_read:
        raise BadInput(f"{file}: damaged, or changed by hand: it is not what its own digest was made of")
    if kinds and not issubclass(model, kinds):
        names = " or ".join(f"`liborth {kind.model_fields['kind'].default}`" for kind in kinds)
        raise BadInput(f"{place}: the output of `liborth {document['kind']}`, not of {names}")
    found = fit(model, document, file)
    found._document = document
    return found  # type: ignore[return-value]


def finite(value: Any) -> Any:
    """Return plain JSON: NaN and infinities, which it has no words for, become null; tuples lists, words of an enum text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
