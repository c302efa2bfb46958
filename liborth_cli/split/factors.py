"""The factor sets of a split: do they belong to it and to each other, and which factors are those of which matrix?"""

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
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import GRADIENT_COVARIANCE, INPUT_COVARIANCE
from liborth_cli.curvature.layer import DiagonalFisher, KroneckerFactors, SampledFactors, TokenGradients
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.methods import NEEDS
from liborth_cli.methods.kronecker import Factors, SummedFactors
from liborth_cli.split.edits import EditSet

COMMAND = "liborth curvature MODEL --data TEXTS"


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
        edit: what steps moved the matrix by, or None.
        input_key: names the input it shares with other matrices, or None.
    """

    transposed: bool
    retain: Factors | None = None
    forget: tuple[Factors | SampledFactors, ...] = ()
    tokens: tuple[TokenGradients, ...] = ()
    shares: tuple[float, ...] = ()
    diagonal: DiagonalFisher | None = None
    edit: torch.Tensor | None = None
    input_key: tuple[str, ...] | None = None


class FactorSource:
    """The open factor sets of a split.

    Attributes:
        needs: what the method needs of them.
        retain: of the data to keep good at, or None.
        forget: of what must go, any number.
        shares: what each of these counts: sets of one text, taken at several points of the path, share its 1.
        warnings: what is odd about where they were measured.
        released: the factors are gone, and whoever divides remembers what it needs of them: `of` only says how matrices lie.
    """

    def __init__(
        self,
        needs: Sequence[str],
        finetuned: Checkpoint,
        retain: FactorSet | None,
        forget: FactorSet | Sequence[FactorSet] | None,
        alone: bool = False,
        edit: EditSet | None = None,
    ) -> None:
        """Hold the sets against the checkpoint and each other.

        Args:
            needs: what the method needs, keys of `NEEDS`.
            finetuned: W_f.
            retain: factors of the data to keep good at.
            forget: factors of what must go, one set or several.
            alone: whether there is no reference.
            edit: what steps moved, for the method that takes them.

        Raises:
            UsageError: when a set the method needs was not given.
            PairMismatch: when a set was made from another model or at another point, or two sets from the same data.
        """
        self.needs, self.retain, self.edit = tuple(needs), retain, edit
        self.forget = (forget,) if isinstance(forget, FactorSet) else tuple(forget or ())
        self._finetuned, self.released = finetuned, False
        if "edit" in needs and edit is None:
            raise UsageError("recall takes its steps on texts: give --retain-data and --forget-data, and --fresh if you can")
        for side in sorted({NEEDS[need].side for need in needs} if edit is None else ()):
            if not self._sets(side):
                raise UsageError(f"this method needs --{side}: factors from `liborth curvature`")
        for found in self._every():
            found.check_belongs(finetuned)
        _check_apart(retain, self.forget)
        self.warnings = _check_points(retain, self.forget, alone)
        self.shares = [1 / sum(one.same_data(other) for other in self.forget) for one in self.forget]
        self._uses: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
        for found in self._every()[:1]:
            for name in found.names:
                record = found.layers[name]
                self._uses[record.tensor, record.matrix or 0].append(name)

    def layers_of(self, tensor: str, number: int) -> list[str]:
        """Return the layers whose factors one matrix or bias is divided by."""
        bias = (tensor, number) not in self._uses and self.covers_bias(tensor)
        return self._uses.get((_weight_of(tensor) if bias else tensor, number), [])

    def covers(self, tensor: str, number: int = 0) -> bool:
        """Tell whether one matrix of a tensor has the factors the method needs, for every use of it."""
        if self.edit is not None:
            return self.edit.holds(tensor)
        names = self._uses.get((tensor, number), [])
        pairs = [(one, NEEDS[need].held) for need in self.needs for one in self._sets(NEEDS[need].side)]
        return bool(names) and all(one.holds(kind, name) for name in names for one, kind in pairs)

    def covers_bias(self, tensor: str) -> bool:
        """Tell whether a bias belongs to a matrix that is covered: its curvature is that matrix's G. Steps move no bias."""
        weight = _weight_of(tensor)
        return self.edit is None and tensor.endswith(".bias") and self.covers(weight) and len(self._uses[weight, 0]) == 1

    def of(self, tensor: str, number: int) -> MatrixFactors | None:
        """Read the factors of one matrix or bias; None when there are none.

        Sets that the method does not need are read where they cover the matrix: they tell what the edit should do.

        Raises:
            BadInput: when a set lacks what the method needs (see `FactorSet`).
        """
        bias, names = (tensor, number) not in self._uses, self.layers_of(tensor, number)
        if not names and self.edit is not None and self.edit.holds(tensor):
            return MatrixFactors(transposed=False, edit=self.edit.of(tensor, number))
        if not names:
            return None
        turned = self._every()[0].layers[names[0]].transposed
        if self.released:
            return MatrixFactors(turned and not bias, edit=self._moved(tensor, number, turned))

        def read(one: FactorSet) -> Factors:
            parts = [one.layer(name) for name in names]
            if bias:
                return _of_bias(parts[0])
            parts = [part if part.transposed == turned else _flipped(part) for part in parts]
            return parts[0] if len(parts) == 1 else SummedFactors.of(parts)

        def felt(one: FactorSet) -> Factors | SampledFactors:
            plain = len(names) == 1 and not bias and one.layers[names[0]].transposed == turned
            return (one.samples(names[0]) if plain else None) or read(one)

        def tokens(one: FactorSet) -> TokenGradients:
            found = one.single_tokens(names[0])
            if bias:
                return found.of_bias()
            return found if one.layers[names[0]].transposed == turned else found.flipped()

        whole = [one for one in self._every() if all(one.holds("factors", name) for name in names)]
        diagonal = None
        if self.retain and "diagonal" in self.needs and len(names) == 1:
            diagonal = _diagonal_of_bias(self.retain.layer(names[0])) if bias else self.retain.diagonal(names[0])
        gone = [(one, share) for one, share in zip(self.forget, self.shares, strict=True) if one in whole]
        single = "tokens" in self.needs
        return MatrixFactors(
            transposed=turned and not bias,
            retain=read(self.retain) if self.retain in whole and self.retain else None,
            forget=() if single else tuple(felt(one) for one, _ in gone),
            tokens=tuple(tokens(one) for one, _ in gone) if single else (),
            shares=tuple(share for _, share in gone),
            diagonal=diagonal,
            edit=self._moved(tensor, number, turned),
            input_key=None if bias or len(names) > 1 else self._input_key(names[0], whole),
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
            known = {f.sha256 for f in found.manifest.inputs.get("reference", manifest.Input()).files.values()}
            if found.point != 1.0 and not known <= set(reference.values()):
                raise PairMismatch(
                    f"{found.path}: was measured at {found.point:g} on the path from another reference; "
                    "give `liborth curvature` the --reference of this split"
                )
            listed = dict(found.checkpoint_hashes())
            for name, shard in found.files.items():
                if shard.path in own and listed.get(name) != own[shard.path]:
                    raise BadInput(f"{shard.path}: damaged, or of another set: not the hash in the manifest beside it")

    @property
    def paths(self) -> list[Path]:
        """Every tensor file of every set."""
        return [shard.path for one in self._every() for shard in one.files.values()]

    def describe(self) -> manifest.Factors:
        """Say for the manifest which sets were used: model, point, labels, tokens.

        No hash of forget rows, or of files made from them, is published: who can try all six-digit codes has the code.
        """
        retain = _describe(self.retain).model_copy(update={"data": self.retain.data}) if self.retain else None
        return manifest.Factors(retain=retain, forget=[_describe(one) for one in self.forget])

    def identity(self) -> list[object]:
        """Return what identifies the sets, for --resume."""
        return [
            self.retain.identity if self.retain else None,
            [one.identity for one in self.forget],
            *([self.edit.identity] if self.edit else []),
        ]

    def _sets(self, side: str) -> Sequence[FactorSet]:
        return self.forget if side == "forget" else [self.retain] if self.retain else []

    def _every(self) -> list[FactorSet]:
        return [*self._sets("retain"), *self.forget]

    def _moved(self, tensor: str, number: int, turned: bool) -> torch.Tensor | None:
        found = self.edit.of(tensor, number) if self.edit else None
        return found.T if found is not None and turned else found

    def _input_key(self, name: str, sets: Sequence[FactorSet]) -> tuple[str, ...] | None:
        owners = tuple(one.layers[name].input for one in sets)
        layers = sets[0].layers if sets else {}
        shared = sum(layer.input == owners[0] for layer in layers.values()) if sets else 0
        return owners if shared > 1 else None


def _check_apart(retain: FactorSet | None, forget: Sequence[FactorSet]) -> None:
    """Refuse the same rows in two sets, unless taken at another point of the path: what is kept cannot be what must go."""
    for number, one in enumerate(forget):
        for other in forget[:number]:
            if one.shares_data(other) and (one.point == other.point or not one.same_data(other)):
                raise PairMismatch(f"{one.path}: was made from the same data as {other.path}; it would count twice")
        if retain and retain.shares_data(one):
            raise PairMismatch(
                f"{retain.path} and {one.path} were made from the same data: what must be kept cannot be what must go"
            )


def _check_points(retain: FactorSet | None, forget: Sequence[FactorSet], alone: bool) -> list[str]:
    """Say what is odd about where the sets were measured; refuse a set from a path where there is none."""
    for one in (*([retain] if retain else []), *forget):
        if alone and one.point != 1.0:
            raise PairMismatch(
                f"{one.path}: was measured at {one.point:g} on a path from a reference, and this split has none; measure it "
                f"at the model itself ({COMMAND})"
            )
    warnings = []
    if retain and retain.point != 1.0:
        warnings.append(
            f"{retain.path}: retain factors were measured at {retain.point:g}, not at the fine-tuned model; they tell what "
            "another model feels"
        )
    at_end = [one for one in forget if one.point == 1.0 and not alone]
    if at_end:
        warnings.append(
            f"{at_end[0].path}: forget factors were measured at the fine-tuned model, where what it memorised has hardly any "
            "curvature; --at 0.5 --reference BASE works better"
        )
    return warnings


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


def _flipped(factors: KroneckerFactors) -> KroneckerFactors:
    """Return the factors of Wᵀ: a tied head is the embedding the other way round."""
    return replace(
        factors,
        transposed=not factors.transposed,
        input_covariance=factors.gradient_covariance,
        gradient_covariance=factors.input_covariance,
        input_moment=factors.gradient_moment,
        gradient_moment=factors.input_moment,
        second_moments=None if factors.second_moments is None else factors.second_moments.T,
        cached_basis=None,
    )


def _of_bias(factors: KroneckerFactors) -> KroneckerFactors:
    """Return the factors of the bias added to a matrix's output, a column (d_out, 1): A = 1, and its curvature is G itself."""
    g = factors.gradient_covariance
    total = g.sum() if g.dim() == 1 else g.diagonal(dim1=-2, dim2=-1).sum()
    return replace(
        factors,
        transposed=False,
        input_covariance=torch.ones(1, dtype=g.dtype),
        input_moment=total.reshape(1),
        gradient_moment=g,
        second_moments=None,
        cached_basis=None,
    )


def _diagonal_of_bias(factors: KroneckerFactors) -> DiagonalFisher:
    """Return the diagonal Fisher of that bias, (d_out, 1): the diagonal of G."""
    g = factors.gradient_covariance
    values = g if g.dim() == 1 else g.diagonal(dim1=-2, dim2=-1).reshape(-1)
    return DiagonalFisher(factors.name, factors.tokens, values[:, None])


def _describe(one: FactorSet) -> manifest.FactorsUsed:
    used = manifest.FactorsUsed(model=one.model_sha256, at=one.point, fisher=one.fisher, tokens=one.tokens)
    return used if one.stored else used.model_copy(update={"stored": False})


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"
