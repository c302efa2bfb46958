"""Which factors belong to which matrix of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.curvature.factors import DiagonalFisher, FactorSet, KroneckerFactors
from liborth_cli.errors import UsageError

SOURCE = {"retain": "retain", "forget": "forget", "moments": "retain", "diagonal": "retain"}
"""What a method needs → the set it comes from."""
HELD = {"retain": "factors", "forget": "factors", "moments": "moments", "diagonal": "diagonal"}
"""What a method needs → what the set has to hold."""


@dataclass(frozen=True)
class MatrixFactors:
    """The factors of one matrix.

    Attributes:
        transposed: whether the file holds the mathematical weight the other way round.
        retain: of the retain data, or None.
        forget: of the forget data, or None.
        diagonal: diagonal Fisher of the retain data, or None.
    """

    transposed: bool
    retain: KroneckerFactors | None = None
    forget: KroneckerFactors | None = None
    diagonal: DiagonalFisher | None = None


class FactorSource:
    """The open factor sets of a split.

    Attributes:
        needs: what the method needs of them.
    """

    def __init__(self, needs: Sequence[str], finetuned: Checkpoint, retain: FactorSet | None, forget: FactorSet | None) -> None:
        """Hold the sets against the checkpoint.

        Raises:
            UsageError: when a set the method needs was not given.
            PairMismatch: when a set was made from another model.
        """
        self.needs, self._sets = tuple(needs), {"retain": retain, "forget": forget}
        self._finetuned = finetuned
        for need in {SOURCE[need] for need in needs}:
            if self._sets[need] is None:
                raise UsageError(f"this method needs --{need}: factors from `liborth curvature`")
        for found in filter(None, self._sets.values()):
            found.check_belongs(finetuned)
        self._layers: dict[tuple[str, int], str] = {}
        if needs:
            first = retain or forget
            assert first is not None
            found = [((r["tensor"], r["matrix"] or 0), name) for name, r in first.manifest["layers"].items()]
            uses = Counter(key for key, _ in found)
            self._layers = {key: name for key, name in found if uses[key] == 1}

    def covers(self, tensor: str, matrices: int) -> bool:
        """Tell whether every matrix of a tensor has the factors the method needs.

        A matrix that is used twice (tied embeddings) has factors of both uses, and no way to combine them yet: not covered.
        """
        names = [self._layers.get((tensor, number)) for number in range(matrices)]
        sets = [(self._sets[SOURCE[need]], HELD[need]) for need in self.needs]
        return all(name is not None and s is not None and s.holds(kind, name) for name in names for s, kind in sets)

    def of(self, tensor: str, number: int) -> MatrixFactors | None:
        """Read the factors of one matrix; None when the method needs none.

        Raises:
            BadInput: when a set lacks what it needs (see `FactorSet`).
        """
        if not self.needs:
            return None
        name = self._layers[tensor, number]
        retain, forget = self._sets["retain"], self._sets["forget"]
        diagonal = retain.diagonal(name) if retain and "diagonal" in self.needs else None
        known = [s for s in (retain, forget) if s]
        return MatrixFactors(
            known[0].manifest["layers"][name]["transposed"],
            retain.layer(name) if retain and "retain" in self.needs else None,
            forget.layer(name) if forget and "forget" in self.needs else None,
            diagonal,
        )

    def check_hashes(self, files: dict[str, str]) -> None:
        """Hold the sets against the fine-tuned files' sha256, by name.

        Raises:
            PairMismatch: when a set was made from another version of a file.
        """
        for found in filter(None, self._sets.values()):
            found.check_belongs(self._finetuned, files)

    def describe(self) -> dict[str, object]:
        """Say for the manifest which sets were used: model, data, point, labels, tokens."""
        return {
            side: {"model": s.model_sha256, "data": s.data_sha256, "at": s.point, "fisher": s.fisher, "tokens": s.tokens}
            for side, s in self._sets.items()
            if s is not None
        }

    def identity(self) -> list[object]:
        """Return what identifies the sets, for --resume."""
        return [s.checkpoint_hashes() if s else None for s in self._sets.values()]
