"""An open factor set: what every curvature method reads, one layer at a time.

Shapes are those of the mathematical weight W (d_out, d_in), y = W x, whatever way round the checkpoint holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from liborth_kernels.covariance import add_covariance, symmetric

from liborth_cli import manifest
from liborth_cli.checkpoint import private
from liborth_cli.checkpoint.reader import Checkpoint, Shard
from liborth_cli.curvature.factors import (
    DIAGONAL,
    GRADIENT_COVARIANCE,
    GRADIENT_MOMENT,
    INPUT_COVARIANCE,
    INPUT_MOMENT,
    SECOND_MOMENTS,
    STEM,
    TOKEN_GRADIENTS,
    TOKEN_INPUTS,
    TOKEN_WEIGHTS,
    VALUES,
    VECTORS,
)
from liborth_cli.curvature.layer import DiagonalFisher, Eigenbasis, KroneckerFactors, SampledFactors, TokenGradients
from liborth_cli.curvature.triangles import Unpacked
from liborth_cli.errors import BadInput, PairMismatch
from liborth_cli.linalg.rows import Samples, few


class Stored(Protocol):
    """Where the tensors of a factor set are: a folder of files, or memory (curvature/together.py)."""

    @property
    def tensors(self) -> Mapping[str, Described]:
        """What there is, or will be."""
        ...

    @property
    def shards(self) -> dict[str, Shard]:
        """The files, by name."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Return one of the tensors."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Described(Protocol):
    """A tensor, before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def shard(self) -> str:
        """The file it is in."""
        ...


class FactorSet:
    """An open factor set.

    Attributes:
        path: its directory.
        manifest: what was computed, from what, at which point.
        layers: what each layer is, in the order of the model.
        stored: whether it is on disk; else `path` is where it would be.
    """

    def __init__(self, path: Path, described: manifest.Curvature, checkpoint: Stored, stored: bool = True) -> None:
        """Wrap files that are already open.

        Args:
            path: its directory.
            described: its manifest.
            checkpoint: its tensors.
            stored: whether it is on disk.

        Raises:
            BadInput: when a layer's factors are missing.
        """
        self.path, self.manifest, self._checkpoint, self.stored = path, described, checkpoint, stored
        self.layers = dict(sorted(described.layers.items(), key=lambda item: item[1].position))
        for name, layer in self.layers.items():
            inputs, gradients = {TOKEN_INPUTS + layer.input, TOKEN_WEIGHTS + layer.input}, {TOKEN_GRADIENTS + name}
            for key, instead in ((INPUT_COVARIANCE + layer.input, inputs), (GRADIENT_COVARIANCE + name, gradients)):
                if layer.input not in self.layers or (
                    key not in checkpoint.tensors and not instead <= checkpoint.tensors.keys()
                ):
                    raise BadInput(f"{path}: {key!r} is in the manifest and in no file; the set is damaged")

    @classmethod
    def open(cls, path: Path) -> FactorSet:
        """Open a factor set without reading any factor.

        Raises:
            BadInput: when it is none, or damaged.
        """
        path = Path(path)
        described = manifest.read(path, manifest.Curvature)
        checkpoint = Unpacked(Checkpoint.open(path, stem=STEM))
        try:
            return cls(path, described, checkpoint)
        except BaseException:
            checkpoint.close()
            raise

    @property
    def names(self) -> list[str]:
        """The layers that have factors, in the order of the model."""
        return list(self.layers)

    @property
    def tokens(self) -> float:
        """How many tokens were seen, weighted."""
        return self.manifest.totals.tokens

    @property
    def point(self) -> float:
        """Where on the path from the reference (0) to the fine-tuned checkpoint (1) the factors were taken."""
        return self.manifest.parameters.at

    @property
    def fisher(self) -> str:
        """Which labels: sampled, empirical or exact."""
        return self.manifest.parameters.fisher

    @property
    def model_sha256(self) -> str:
        """Hash of the checkpoints and the point the factors belong to."""
        return self.manifest.model_sha256

    @property
    def data(self) -> list[str]:
        """The sha256 of the token rows of each merged part; a private set tells none."""
        return [part.sha256 for part in self.manifest.data if part.sha256]

    def same_data(self, other: FactorSet) -> bool:
        """Tell whether two sets were taken on the same rows."""
        mine, theirs = self.manifest.data, other.manifest.data
        pairs = zip(mine, theirs, strict=False)
        return self is other or (len(mine) == len(theirs) and all(self._same_rows(a, other, b) for a, b in pairs))

    def shares_data(self, other: FactorSet) -> bool:
        """Tell whether some file of rows is in both sets."""
        return any(self._same_rows(a, other, b) for a in self.manifest.data for b in other.manifest.data)

    def layer(self, name: str) -> KroneckerFactors:
        """Read the factors of one layer.

        Raises:
            BadInput: when the set does not cover it; says why when the reason is known.
        """
        record = self._record(name)
        inputs, gradients = INPUT_COVARIANCE + record.input, GRADIENT_COVARIANCE + name
        basis = None
        if VALUES + gradients in self._checkpoint.tensors:
            keys = [kind + side for side in (inputs, gradients) for kind in (VALUES, VECTORS)]
            basis = Eigenbasis(*(self.read(key).double() if key in self._checkpoint.tensors else _identity() for key in keys))
        return KroneckerFactors(
            name=name,
            tensor=record.tensor,
            matrix=record.matrix,
            transposed=record.transposed,
            tokens=record.tokens,
            shares_input_with=tuple(n for n, layer in self.layers.items() if layer.input == record.input),
            input_covariance=self._covariance(inputs),
            gradient_covariance=self._covariance(gradients),
            input_moment=self._read_if(INPUT_MOMENT + name),
            gradient_moment=self._read_if(GRADIENT_MOMENT + name),
            second_moments=self._read_if(SECOND_MOMENTS + name),
            cached_basis=basis,
        )

    def holds(self, kind: str, name: str) -> bool:
        """Tell whether the set has something of a layer: "factors", "moments" (either kind), "diagonal" or "tokens"."""
        keys = {
            "factors": (GRADIENT_COVARIANCE, TOKEN_GRADIENTS),
            "moments": (SECOND_MOMENTS, INPUT_MOMENT),
            "diagonal": (DIAGONAL,),
            "tokens": (TOKEN_GRADIENTS,),
        }[kind]
        return name in self.layers and any(key + name in self._checkpoint.tensors for key in keys)

    def diagonal(self, name: str) -> DiagonalFisher:
        """Read the diagonal Fisher of one layer.

        Raises:
            BadInput: when the set was made without --diagonal, or does not cover the layer.
        """
        record, values = self._record(name), self._read_if(DIAGONAL + name)
        if values is None:
            raise BadInput(f"{self.path}: has no diagonal Fisher of {name!r}; make it with --diagonal")
        return DiagonalFisher(name, record.tokens, values)

    def single_tokens(self, name: str) -> TokenGradients:
        """Read what single tokens feel of one layer; `holds("tokens", name)` must be true.

        Raises:
            BadInput: when its inputs and gradients are not of the same tokens.
        """
        record = self._record(name)
        inputs, gradients = self.read(TOKEN_INPUTS + record.input), self.read(TOKEN_GRADIENTS + name)
        if len(inputs) != len(gradients):
            raise BadInput(f"{self.path}: {name!r} has {len(inputs)} inputs and {len(gradients)} gradients; damaged")
        return TokenGradients(inputs, gradients, record.tokens)

    def samples(self, name: str) -> SampledFactors | None:
        """Read a layer's covariances as the tokens they are made of; None where those are many, or were not kept."""
        record = self._record(name)
        if not self.holds("tokens", name) or GRADIENT_COVARIANCE + name in self._checkpoint.tensors:
            return None
        inputs, gradients = TOKEN_INPUTS + record.input, TOKEN_GRADIENTS + name
        if max(self.shape(inputs)[0], self.shape(gradients)[0]) > few(min(record.d_in, record.d_out)):
            return None
        weights = self.read(TOKEN_WEIGHTS + record.input) / self.layers[record.input].tokens
        a, g = self.read(inputs) * weights.sqrt()[:, None], self.read(gradients) / record.tokens**0.5
        return SampledFactors(Samples(a), Samples(g), record.tokens)

    def most_tokens(self) -> int:
        """Return how many tokens were kept one by one for the matrix that saw most of them; 0 where none were."""
        return max((self.shape(TOKEN_GRADIENTS + name)[0] for name in self.layers if self.holds("tokens", name)), default=0)

    def check_belongs(self, checkpoint: Checkpoint, hashes: dict[str, str] | None = None) -> None:
        """Hold the set against a checkpoint: shapes always, hashes when they are known.

        Args:
            checkpoint: the fine-tuned checkpoint that is about to be edited.
            hashes: its files' sha256 by name.

        Raises:
            PairMismatch: when the set was made from another model.
        """
        for name, layer in self.layers.items():
            found = checkpoint.tensors.get(layer.tensor)
            if found is None:
                raise PairMismatch(f"{self.path}: has factors of {layer.tensor!r}, and {checkpoint.path} has no such tensor")
            shape = [layer.d_out, layer.d_in]
            stored = shape[::-1] if layer.transposed else shape
            if list(found.shape[-2:]) != stored:
                raise PairMismatch(
                    f"{self.path}: {name!r} is {stored} in the factors and {list(found.shape)} in {checkpoint.path}; "
                    "they belong to another model"
                )
        known = self.manifest.inputs.get("model", manifest.Input()).files
        for file, digest in (hashes or {}).items():
            if file in known and known[file].sha256 != digest:
                raise PairMismatch(f"{self.path}: was made from another version of {file}; compute the curvature of this model")

    @property
    def files(self) -> dict[str, Shard]:
        """The tensor files by name."""
        return self._checkpoint.shards

    @property
    def identity(self) -> object:
        """What decides its numbers: the hashes of its files, or the name that was made of all that they would follow from."""
        return self.checkpoint_hashes() if self.stored else self.path.name

    def checkpoint_hashes(self) -> list[tuple[str, str]]:
        """Return name and sha256 of every file, as the manifest has them."""
        return [(entry.name, entry.sha256) for entry in self.manifest.outputs]

    def keys(self, file: str) -> list[str]:
        """List the tensors of one file; none when the set has no such file."""
        return [name for name, info in self._checkpoint.tensors.items() if info.shard == file]

    def read(self, key: str) -> torch.Tensor:
        """Read one stored tensor by its full name."""
        return self._checkpoint.load(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one stored tensor."""
        return self._checkpoint.tensors[key].shape

    def close(self) -> None:
        """Close all files."""
        self._checkpoint.close()

    def __enter__(self) -> FactorSet:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.close()

    def _record(self, name: str) -> manifest.FactorLayer:
        record = self.layers.get(name)
        if record is None:
            why = self.manifest.left_out.get(name, "no such matrix in the model")
            raise BadInput(f"{self.path}: no factors of {name!r}: {why}")
        return record

    def _same_rows(self, mine: manifest.Data, other: FactorSet, theirs: manifest.Data) -> bool:
        if mine.sha256 and theirs.sha256:
            return mine.sha256 == theirs.sha256
        if mine.identity and theirs.identity:
            return mine.identity == theirs.identity
        closed, name, known = (self, mine.identity, theirs.sha256) if mine.identity else (other, theirs.identity, mine.sha256)
        folder = closed.path.parent
        return known is not None and (folder / private.KEY).is_file() and private.identity(folder, known.encode()) == name

    def _covariance(self, key: str) -> torch.Tensor:
        """Read a covariance, or form it from the tokens that stand in its place."""
        if key in self._checkpoint.tensors:
            return self.read(key)
        kind, _, name = key.partition("/")
        if f"{kind}/" == INPUT_COVARIANCE:
            rows = self.read(TOKEN_INPUTS + name) * self.read(TOKEN_WEIGHTS + name).sqrt()[:, None]
        else:
            rows = self.read(TOKEN_GRADIENTS + name)
        total = rows.new_zeros(rows.shape[1], rows.shape[1])
        add_covariance(total, rows, 1.0 / self.layers[name].tokens)
        symmetric(total)
        return total

    def _read_if(self, key: str) -> torch.Tensor | None:
        return self.read(key) if key in self._checkpoint.tensors else None


def _identity() -> torch.Tensor:
    return torch.empty(0, dtype=torch.float64)
