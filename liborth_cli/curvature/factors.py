"""Factor sets: what `liborth curvature` writes and every curvature method reads, one layer at a time.

Shapes are those of the mathematical weight W (d_out, d_in), y = W x, whatever way round the file holds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.reader import Checkpoint, Shard
from liborth_cli.checkpoint.tensors import as_tensor
from liborth_cli.curvature import per_token
from liborth_cli.curvature.collect import (
    A_MOMENT,
    DIAGONAL,
    G_MOMENT,
    MOMENTS,
    TOKEN_GRADIENTS,
    TOKEN_INPUTS,
    TOKEN_WEIGHTS,
    A,
    G,
)
from liborth_cli.curvature.layer import DiagonalFisher, Eigenbasis, KroneckerFactors
from liborth_cli.errors import BadInput, PairMismatch

STEM = "factors"
VALUES, VECTORS = "eigenvalues/", "eigenvectors/"


class FactorSet:
    """An open factor set.

    Attributes:
        path: its directory.
        manifest: what was computed, from what, at which point.
    """

    def __init__(self, path: Path, document: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Wrap files that are already open."""
        self.path, self.manifest, self._checkpoint = path, document, checkpoint

    @classmethod
    def open(cls, path: Path) -> FactorSet:
        """Open a factor set without reading any factor.

        Raises:
            BadInput: when it is none, or damaged.
        """
        path = Path(path)
        document = manifest.load(path)
        if document.get("kind") != "curvature":
            raise BadInput(f"{path}: the output of `liborth {document.get('kind')}`, not of `liborth curvature`")
        checkpoint = Checkpoint.open(path, stem=STEM)
        try:
            for name, layer in document["layers"].items():
                owner = layer["input"]
                inputs, gradients = {TOKEN_INPUTS + owner, TOKEN_WEIGHTS + owner}, {TOKEN_GRADIENTS + name}
                for key, instead in ((A + owner, inputs), (G + name, gradients)):
                    if key not in checkpoint.tensors and not instead <= checkpoint.tensors.keys():
                        raise BadInput(f"{path}: {key!r} is in the manifest and in no file; the set is damaged")
        except (KeyError, TypeError, AttributeError):
            checkpoint.close()
            raise BadInput(f"{path / manifest.FILE}: damaged; not the manifest of a factor set") from None
        except BaseException:
            checkpoint.close()
            raise
        return cls(path, document, checkpoint)

    @property
    def names(self) -> list[str]:
        """The layers that have factors, in the order of the model."""
        return sorted(self.manifest["layers"], key=lambda name: self.manifest["layers"][name]["position"])

    @property
    def tokens(self) -> float:
        """How many tokens were seen, weighted."""
        return self.manifest["totals"]["tokens"]

    @property
    def point(self) -> float:
        """Where on the path from the reference (0) to the fine-tuned checkpoint (1) the factors were taken."""
        return self.manifest["parameters"]["at"]

    @property
    def fisher(self) -> str:
        """Which labels: sampled, empirical or exact."""
        return self.manifest["parameters"]["fisher"]

    @property
    def model_sha256(self) -> str:
        """Hash of the checkpoints and the point the factors belong to."""
        return self.manifest["model_sha256"]

    @property
    def data_sha256(self) -> list[str]:
        """Hashes of the token rows, one for each merged part."""
        return [part["sha256"] for part in self.manifest["data"]]

    def layer(self, name: str) -> KroneckerFactors:
        """Read the factors of one layer.

        Raises:
            BadInput: when the set does not cover it; says why when the reason is known.
        """
        record = self._record(name)
        owner = record["input"]
        shared = tuple(n for n in self.names if self.manifest["layers"][n]["input"] == owner)
        basis = None
        if VALUES + G + name in self._checkpoint.tensors:
            keys = (VALUES + A + owner, VECTORS + A + owner, VALUES + G + name, VECTORS + G + name)
            basis = Eigenbasis(*(self.read(key).double() if key in self._checkpoint.tensors else _identity() for key in keys))
        return KroneckerFactors(
            name,
            record["tensor"],
            record["matrix"],
            record["transposed"],
            record["tokens"],
            shared,
            self._covariance(A, owner),
            self._covariance(G, name),
            self._read_if(A_MOMENT + name),
            self._read_if(G_MOMENT + name),
            self._read_if(MOMENTS + name),
            basis,
        )

    def holds(self, kind: str, name: str) -> bool:
        """Tell whether the set has something of a layer: "factors", "moments" (either kind), "diagonal" or "tokens"."""
        if name not in self.manifest["layers"]:
            return False
        keys = {
            "factors": [G + name, TOKEN_GRADIENTS + name],
            "moments": [MOMENTS + name, A_MOMENT + name],
            "diagonal": [DIAGONAL + name],
            "tokens": [TOKEN_GRADIENTS + name],
        }[kind]
        return any(key in self._checkpoint.tensors for key in keys)

    def diagonal(self, name: str) -> DiagonalFisher:
        """Read the diagonal Fisher of one layer.

        Raises:
            BadInput: when the set was made without --diagonal, or does not cover the layer.
        """
        record, values = self._record(name), self._read_if(DIAGONAL + name)
        if values is None:
            raise BadInput(f"{self.path}: has no diagonal Fisher of {name!r}; make it with --diagonal")
        return DiagonalFisher(name, record["tokens"], values)

    def check_belongs(self, checkpoint: Checkpoint, hashes: dict[str, str] | None = None) -> None:
        """Hold the set against a checkpoint: shapes always, hashes when they are known.

        Args:
            checkpoint: the fine-tuned checkpoint that is about to be edited.
            hashes: its files' sha256 by name.

        Raises:
            PairMismatch: when the set was made from another model.
        """
        for name, layer in self.manifest["layers"].items():
            found = checkpoint.tensors.get(layer["tensor"])
            if found is None:
                raise PairMismatch(f"{self.path}: has factors of {layer['tensor']!r}, and {checkpoint.path} has no such tensor")
            shape = [layer["d_out"], layer["d_in"]]
            stored = shape[::-1] if layer["transposed"] else shape
            if list(found.shape[-2:]) != stored:
                raise PairMismatch(
                    f"{self.path}: {name!r} is {stored} in the factors and {list(found.shape)} in {checkpoint.path}; "
                    "they belong to another model"
                )
        known = self.manifest["inputs"]["model"]["files"]
        for file, digest in (hashes or {}).items():
            if file in known and known[file]["sha256"] != digest:
                raise PairMismatch(f"{self.path}: was made from another version of {file}; compute the curvature of this model")

    @property
    def files(self) -> dict[str, Shard]:
        """The tensor files by name."""
        return self._checkpoint.shards

    def checkpoint_hashes(self) -> list[tuple[str, str]]:
        """Return name and sha256 of every file, as the manifest has them."""
        return [(entry["name"], entry["sha256"]) for entry in self.manifest["outputs"]]

    def keys(self, file: str) -> list[str]:
        """List the tensors of one file; none when the set has no such file."""
        return [name for name, info in self._checkpoint.tensors.items() if info.shard == file]

    def read(self, key: str) -> torch.Tensor:
        """Read one stored tensor by its full name."""
        info = self._checkpoint.tensors[key]
        return as_tensor(self._checkpoint.read(key), info.dtype).reshape(info.shape)

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

    def _record(self, name: str) -> dict[str, Any]:
        record = self.manifest["layers"].get(name)
        if record is None:
            why = self.manifest["left_out"].get(name, "no such matrix in the model")
            raise BadInput(f"{self.path}: no factors of {name!r}: {why}")
        return record

    def _covariance(self, kind: str, name: str) -> torch.Tensor:
        """Read a covariance, or form it from the tokens that stand in its place."""
        return self.read(kind + name) if kind + name in self._checkpoint.tensors else per_token.covariance(self, kind, name)

    def _read_if(self, key: str) -> torch.Tensor | None:
        return self.read(key) if key in self._checkpoint.tensors else None


def _identity() -> torch.Tensor:
    return torch.empty(0, dtype=torch.float64)
