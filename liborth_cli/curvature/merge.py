"""Add factor sets up: means weighted by tokens, so that shards of the data give what all of it would have given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.console import Console
from liborth_cli.curvature import factors
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import INPUT_COVARIANCE, SECOND_MOMENTS, TOKENS, VALUES, VECTORS, Sums
from liborth_cli.errors import PairMismatch, UsageError
from liborth_cli.machine import Run

SAME = ("fisher", "at", "per_head", "full_head", "diagonal", "per_token", "dtype", "tensors")
"""Parameters that must agree, or the sum means nothing."""


def merge(paths: Sequence[Path], out: Path, eigen: bool, run: Run, console: Console) -> manifest.Curvature:
    """Add factor sets of one model up.

    Args:
        paths: the sets.
        out: directory to create.
        eigen: store eigenbases of the result.
        run: force and resume.
        console: where progress goes.

    Returns:
        The manifest that was written.

    Raises:
        BadInput: when one of them is no factor set.
        PairMismatch: when they belong to different models, points or settings.
        UsageError: when there is only one.
    """
    if len(paths) < 2:
        raise UsageError("--merge needs at least two factor sets")
    check_outputs([Place(out)], paths, run.force)
    with ExitStack() as stack:
        sets = [stack.enter_context(FactorSet.open(path)) for path in paths]
        _check(sets)
        layers = _layers(sets)
        tokens = {name: layer.tokens for name, layer in layers.items()}
        if any(one.manifest.parameters.moments == "exact" for one in sets):
            console.warn(
                "exact second moments are left out: each set has its own eigenbasis, so they do not add up; "
                "compute them over all data, or use --moments marginal, which merges"
            )
        hashes = {f"{number}/{name}": sha256 for number, one in enumerate(sets) for name, sha256 in one.checkpoint_hashes()}
        seen = json.dumps([sorted(hashes.items()), eigen, manifest.Maker(kind="curvature").model_dump()], sort_keys=True)
        files = sorted({file for one in sets for file in one.files if not file.startswith("moments.")})
        total = sum(shard.size for one in sets for shard in one.files.values())
        check_space(out, 2 * total)
        plan = hashlib.sha256(seen.encode()).hexdigest()
        with Transaction(out, plan, run.force, run.resume, mode=0o700) as transaction:
            with console.progress("merge", total) as progress:
                for file in files:
                    if file not in transaction.finished:
                        means = factors.packed(factors.average(_add(sets, file), tokens, eigen))
                        written = factors.write(transaction.partial / file, means)
                        transaction.finish(Unit(unit=file, files=[written]))
                    progress.advance(sum(one.files[file].size for one in sets if file in one.files))
            outputs = [transaction.finished[file].files[0] for file in files]
            document = factors.finish(transaction.partial, outputs, _describe(sets, layers, eigen))
            transaction.commit(manifest.dump(document))
    return document


def _check(sets: Sequence[FactorSet]) -> None:
    first = sets[0]
    for other in sets[1:]:
        if other.model_sha256 != first.model_sha256:
            raise PairMismatch(
                f"{other.path}: its factors belong to another model, or another point, than those of {first.path}"
            )
        for key in SAME:
            one, two = (getattr(each.manifest.parameters, key, None) for each in (first, other))
            if one != two:
                raise PairMismatch(f"{other.path}: made with {key} {two}, and {first.path} with {one}; they do not add up")
    for number, other in enumerate(sets):
        for earlier in sets[:number]:
            if earlier.shares_data(other):
                raise PairMismatch(f"{other.path}: was made from the same data as {earlier.path}; it would count twice")


def _layers(sets: Sequence[FactorSet]) -> dict[str, manifest.FactorLayer]:
    """Return every layer of any set, with the tokens of all."""
    layers: dict[str, manifest.FactorLayer] = {}
    for one in sets:
        for name, layer in one.manifest.layers.items():
            known = layers.get(name)
            same = ("d_out", "d_in", "input", "transposed", "kind")
            if known is not None and any(getattr(known, key) != getattr(layer, key) for key in same):
                raise PairMismatch(f"{one.path}: {name!r} has another shape or shares its input with another layer")
            layers[name] = layer if known is None else known.model_copy(update={"tokens": known.tokens + layer.tokens})
    return layers


def _add(sets: Sequence[FactorSet], file: str) -> Sums:
    """Sum tokens·mean over the sets, in float64, and return it in the stored dtype; single tokens follow each other."""
    sums: Sums = {}
    for one in sets:
        for key in one.keys(file):
            if key.startswith((VALUES, VECTORS, SECOND_MOMENTS)):
                continue
            value = one.read(key)
            if key.startswith(TOKENS):
                sums[key] = torch.cat((sums[key], value)) if key in sums else value
                continue
            wide = value.double() * one.layers[key.partition("/")[2]].tokens
            sums[key] = sums[key].add_(wide) if key in sums else wide
    kept = torch.float64 if any(one.manifest.parameters.dtype == "float64" for one in sets) else torch.float32
    for key, value in sums.items():
        diagonal = value.dim() == 1 and key.startswith(INPUT_COVARIANCE)
        sums[key] = value if diagonal else value.to(kept)
    return sums


def _describe(sets: Sequence[FactorSet], layers: dict[str, manifest.FactorLayer], eigen: bool) -> manifest.Curvature:
    parts = [one.manifest for one in sets]
    count = sum(part.totals.loss_tokens for part in parts)
    loss = sum((part.totals.loss or 0.0) * part.totals.loss_tokens for part in parts)
    asked = {
        **parts[0].parameters.model_dump(exclude_unset=True),
        "eigen": eigen,
        "moments": "marginal" if {part.parameters.moments for part in parts} == {"marginal"} else "none",
        "tokens": None,
        "seed": sorted({str(part.parameters.seed) for part in parts}),
    }
    return manifest.Curvature(
        parameters=manifest.CurvatureParameters(**asked),
        inputs=parts[0].inputs,
        model_sha256=parts[0].model_sha256,
        data=[data for part in parts for data in part.data],
        layers=layers,
        left_out={name: why for part in parts for name, why in part.left_out.items() if name not in layers},
        totals=manifest.FactorTotals(tokens=sum(one.tokens for one in sets), loss=loss / max(count, 1), loss_tokens=count),
        machine=parts[0].machine.model_copy(update={"merged": len(sets)}),
        private=any(part.private for part in parts),
    )
