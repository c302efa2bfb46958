"""Which factors belong to which matrix of a checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.curvature.factors import GRADIENT_COVARIANCE, INPUT_COVARIANCE, FactorSet
from liborth_cli.curvature.layer import DiagonalFisher, TokenGradients
from liborth_cli.errors import UsageError
from liborth_cli.methods.kronecker import Factors, SummedFactors
from liborth_cli.split.belong import check_own, check_reference, check_together, check_tokens
from liborth_cli.split.uses import diagonal_of_bias, flipped, of_bias

SOURCE = {"retain": "retain", "forget": "forget", "tokens": "forget", "moments": "retain", "diagonal": "retain"}
"""What a method needs → the set it comes from."""
HELD = {"retain": "factors", "forget": "factors", "tokens": "tokens", "moments": "moments", "diagonal": "diagonal"}
"""What a method needs → what the set has to hold."""


@dataclass(frozen=True)
class MatrixFactors:
    """The factors of one matrix.

    Attributes:
        transposed: whether the file holds the mathematical weight the other way round.
        retain: of the retain data, or None.
        forget: of each set of forget data; none where the method takes single tokens.
        tokens: what single tokens of each set feel.
        shares: what each forget set counts.
        diagonal: diagonal Fisher of the retain data, or None.
        input_key: names the input it shares with other matrices, or None.
    """

    transposed: bool
    retain: Factors | None = None
    forget: tuple[Factors, ...] = ()
    tokens: tuple[TokenGradients, ...] = ()
    shares: tuple[float, ...] = ()
    diagonal: DiagonalFisher | None = None
    input_key: tuple[str, ...] | None = None


def moved(value: Any, device: torch.device) -> Any:
    """Return factors with every tensor in them on a device; on the CPU the very same."""
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


class FactorSource:
    """The open factor sets of a split.

    Attributes:
        needs: what the method needs of them.
        retain: of the data to keep good at, or None.
        forget: of what must go, any number.
    """

    def __init__(
        self,
        needs: Sequence[str],
        finetuned: Checkpoint,
        retain: FactorSet | None,
        forget: FactorSet | Sequence[FactorSet] | None,
    ) -> None:
        """Hold the sets against the checkpoint and each other.

        Raises:
            UsageError: when a set the method needs was not given, or they hold too many tokens.
            PairMismatch: when a set was made from another model, or two sets from the same data.
        """
        self.needs, self.retain = tuple(needs), retain
        self.forget = (forget,) if isinstance(forget, FactorSet) else tuple(forget or ())
        self._finetuned = finetuned
        for need in sorted({SOURCE[need] for need in needs}):
            if not self._sets(need):
                raise UsageError(f"this method needs --{need}: factors from `liborth curvature`")
        for found in self._every():
            found.check_belongs(finetuned)
        check_together(retain, self.forget)
        if "tokens" in needs:
            check_tokens(self.forget)
        self._uses: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
        for found in self._every()[:1]:
            for name in found.names:
                record = found.layers[name]
                self._uses[record.tensor, record.matrix or 0].append(name)

    def covers(self, tensor: str, number: int = 0) -> bool:
        """Tell whether one matrix of a tensor has the factors the method needs, for every use of it."""
        names = self._uses.get((tensor, number), [])
        pairs = [(one, HELD[need]) for need in self.needs for one in self._sets(SOURCE[need])]
        return bool(names) and all(one.holds(kind, name) for name in names for one, kind in pairs)

    def covers_bias(self, tensor: str) -> bool:
        """Tell whether a bias belongs to a matrix that is covered: its curvature is that matrix's G."""
        return tensor.endswith(".bias") and self.covers(_weight_of(tensor)) and len(self._uses[_weight_of(tensor), 0]) == 1

    def of(self, tensor: str, number: int) -> MatrixFactors | None:
        """Read the factors of one matrix or bias; None when there are none.

        Sets that the method does not need are read where they cover the matrix: they tell what the edit should do.

        Raises:
            BadInput: when a set lacks what the method needs (see `FactorSet`).
        """
        bias = (tensor, number) not in self._uses and self.covers_bias(tensor)
        names = self._uses.get((_weight_of(tensor) if bias else tensor, number), [])
        if not names:
            return None
        record = self._every()[0].layers[names[0]]
        turned = record.transposed

        def read(one: FactorSet) -> Factors:
            parts = [one.layer(name) for name in names]
            if bias:
                return of_bias(parts[0])
            parts = [part if part.transposed == turned else flipped(part) for part in parts]
            return parts[0] if len(parts) == 1 else SummedFactors.of(parts)

        whole = [one for one in self._every() if all(one.holds("factors", name) for name in names)]
        diagonal = None
        if self.retain and "diagonal" in self.needs and len(names) == 1:
            diagonal = diagonal_of_bias(self.retain.layer(names[0])) if bias else self.retain.diagonal(names[0])

        def tokens(one: FactorSet) -> TokenGradients:
            found = one.single_tokens(names[0])
            if bias:
                return found.of_bias()
            return found if one.layers[names[0]].transposed == turned else found.flipped()

        gone = [one for one in self.forget if one in whole]
        return MatrixFactors(
            turned and not bias,
            read(self.retain) if self.retain in whole and self.retain else None,
            () if "tokens" in self.needs else tuple(read(one) for one in gone),
            tuple(tokens(one) for one in gone) if "tokens" in self.needs else (),
            tuple(self._share(one) for one in gone),
            diagonal,
            None if bias or len(names) > 1 else self._input_key(names[0], whole),
        )

    @property
    def tokens(self) -> int:
        """How many tokens of the forget data meet in one matrix; 0 where the method does not take them one by one."""
        return sum(one.most_tokens() for one in self.forget) if "tokens" in self.needs else 0

    def widths(self, tensor: str) -> list[int]:
        """Return the sizes of the covariances of a tensor's matrix that are no diagonals, those of both sides."""
        one, found = self._every()[0], []
        for name in self._uses.get((tensor, 0), []):
            record = one.layers[name]
            if one.holds("tokens", name):
                found += [record.d_in, record.d_out]
            else:
                shapes = map(one.shape, (INPUT_COVARIANCE + record.input, GRADIENT_COVARIANCE + name))
                found += [shape[-1] for shape in shapes if len(shape) > 1]
        return found

    @property
    def seen(self) -> float:
        """How many tokens the forget factors that the method takes were averaged over; infinite where it takes none."""
        return sum(one.tokens for one in self.forget) if "forget" in self.needs else math.inf

    def is_table(self, tensor: str) -> bool:
        """Tell whether a matrix is looked up or read out by token: an embedding, or the head."""
        layers = self._every()[0].layers
        return any(layers[name].kind in ("embedding", "head") for name in self._uses.get((tensor, 0), []))

    def check_hashes(self, reference: dict[str, str], finetuned: dict[str, str], own: dict[Path, str]) -> None:
        """Hold the sets against what was hashed.

        Args:
            reference: sha256 of the reference's files by name; empty when there is none.
            finetuned: of the fine-tuned checkpoint's.
            own: of the sets' own files, by path.

        Raises:
            PairMismatch: when a set was made from another version of a file, or on the path from another reference.
            BadInput: when a file of a set is not the one its manifest names.
        """
        for found in self._every():
            found.check_belongs(self._finetuned, finetuned)
            check_reference(found, reference)
            check_own(found, own)

    @property
    def paths(self) -> list[Path]:
        """Every tensor file of every set."""
        return [shard.path for one in self._every() for shard in one.files.values()]

    def describe(self) -> manifest.Factors:
        """Say for the manifest which sets were used; of forget rows there is no hash."""
        retain = _describe(self.retain) if self.retain else None
        if self.retain and retain:
            retain = retain.model_copy(update={"data": self.retain.data})
        return manifest.Factors(retain=retain, forget=[_describe(one) for one in self.forget])

    def identity(self) -> list[object]:
        """Return what identifies the sets, for --resume."""
        return [self.retain.checkpoint_hashes() if self.retain else None, [s.checkpoint_hashes() for s in self.forget]]

    def _sets(self, side: str) -> Sequence[FactorSet]:
        return self.forget if side == "forget" else [self.retain] if self.retain else []

    def _every(self) -> list[FactorSet]:
        return [*self._sets("retain"), *self.forget]

    def _share(self, one: FactorSet) -> float:
        """Return what a set counts: those of one text, taken at several points of the path, share its 1."""
        return 1 / sum(one.same_data(other) for other in self.forget)

    def _input_key(self, name: str, sets: Sequence[FactorSet]) -> tuple[str, ...] | None:
        owners = tuple(one.layers[name].input for one in sets)
        layers = sets[0].layers if sets else {}
        shared = sum(layer.input == owners[0] for layer in layers.values()) if sets else 0
        return owners if shared > 1 else None


def _describe(one: FactorSet) -> manifest.FactorsUsed:
    return manifest.FactorsUsed(model=one.model_sha256, at=one.point, fisher=one.fisher, tokens=one.tokens)


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"
