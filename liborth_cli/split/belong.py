"""Do the factor sets of a split belong to it, to each other, and to their own manifests?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from liborth_cli.curvature.factors import FactorSet
from liborth_cli.curvature.plan import MOST_TOKENS
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.manifest import Input

COMMAND = "liborth curvature MODEL --data TEXTS"


def check_together(retain: FactorSet | None, forget: Sequence[FactorSet]) -> None:
    """Hold the sets against each other: the same rows must not be in two of them, unless taken at another point.

    Raises:
        PairMismatch: when they are.
    """
    for number, one in enumerate(forget):
        for other in forget[:number]:
            if one.shares_data(other) and (one.point == other.point or not one.same_data(other)):
                raise PairMismatch(f"{one.path}: was made from the same data as {other.path}; it would count twice")
        if retain and retain.shares_data(one):
            raise PairMismatch(
                f"{retain.path} and {one.path} were made from the same data: what must be kept cannot be what must go"
            )


def check_tokens(forget: Sequence[FactorSet]) -> None:
    """Bound the eigenproblem of a matrix that takes the tokens of all sets together.

    Raises:
        UsageError: when there are too many.
    """
    counts = [one.most_tokens() for one in forget]
    if sum(counts) > MOST_TOKENS:
        listed = ", ".join(f"{one.path} {count:,}" for one, count in zip(forget, counts, strict=True))
        raise UsageError(
            f"tokenwise takes the tokens of all --forget sets together, {MOST_TOKENS:,} at most, and these are {sum(counts):,} "
            f"({listed}); give fewer points of the path, read fewer with `liborth curvature --tokens`, or use contrastive"
        )


def check_own(found: FactorSet, hashes: dict[Path, str]) -> None:
    """Hold the files of a set against its manifest.

    Args:
        found: the set.
        hashes: sha256 by path.

    Raises:
        BadInput: when one of them is damaged or of another set.
    """
    known = dict(found.checkpoint_hashes())
    for name, shard in found.files.items():
        if shard.path in hashes and known.get(name) != hashes[shard.path]:
            raise BadInput(f"{shard.path}: damaged, or of another set: its hash is not the one in the manifest beside it")


def check_reference(found: FactorSet, files: dict[str, str]) -> None:
    """Hold a set that was measured on the path against the reference of the split.

    Args:
        found: the set.
        files: the reference's sha256 by name; empty when there is none.

    Raises:
        PairMismatch: when it was measured on the way to another reference.
    """
    if found.point == 1.0:
        return
    known = {f.sha256 for f in found.manifest.inputs.get("reference", Input()).files.values()}
    if not known <= set(files.values()):
        raise PairMismatch(
            f"{found.path}: was measured at {found.point:g} on the path from another reference; "
            "give `liborth curvature` the --reference of this split"
        )


def points(retain: FactorSet | None, forget: Sequence[FactorSet], alone: bool) -> list[str]:
    """Say what is odd about where the sets were measured.

    Args:
        retain: of the data to keep good at.
        forget: of what must go.
        alone: whether there is no reference.

    Returns:
        Warnings.

    Raises:
        PairMismatch: when a set was measured on a path and there is none.
    """
    warnings = []
    for one in (*([retain] if retain else []), *forget):
        if alone and one.point != 1.0:
            raise PairMismatch(
                f"{one.path}: was measured at {one.point:g} on a path from a reference, and this split has none; measure it "
                f"at the model itself ({COMMAND})"
            )
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
