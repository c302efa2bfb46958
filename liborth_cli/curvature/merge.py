"""Add factor sets up: means weighted by tokens, so that shards of the data give what all of it would have given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint import layout
from liborth_cli.checkpoint.outputs import check_space
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import write_file
from liborth_cli.console import Console
from liborth_cli.curvature import factors as shards
from liborth_cli.curvature.factors import INPUT_COVARIANCE, SECOND_MOMENTS, STEM, VALUES, VECTORS, FactorSet, Sums
from liborth_cli.errors import PairMismatch
from liborth_cli.machine import Run

SAME = ("fisher", "at", "per_head", "full_head", "diagonal", "per_token", "dtype", "tensors")
"""Parameters that must agree, or the sum means nothing."""


def merge(paths: Sequence[Path], out: Path, eigen: bool, run: Run, console: Console) -> dict[str, Any]:
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
    """
    with ExitStack() as stack:
        sets = [stack.enter_context(FactorSet.open(path)) for path in paths]
        _check(sets)
        first = sets[0].manifest
        layers, tokens = _layers(sets)
        exact = any(s.manifest["parameters"]["moments"] == "exact" for s in sets)
        if exact:
            console.warn(
                "exact second moments are left out: each set has its own eigenbasis, so they do not add up; "
                "compute them over all data, or use --moments marginal, which merges"
            )
        hashes = [s.checkpoint_hashes() for s in sets]
        seen = json.dumps([hashes, eigen, manifest.new("curvature")], sort_keys=True)
        files = sorted({file for s in sets for file in s.files if not file.startswith("moments.")})
        check_space(out, 2 * sum(shard.size for s in sets for shard in s.files.values()))
        with Transaction(out, hashlib.sha256(seen.encode()).hexdigest(), run.force, run.resume) as transaction:
            total = sum(shard.size for s in sets for shard in s.files.values())
            with console.progress("merge", total) as progress:
                for file in files:
                    if file not in transaction.finished:
                        sums = _add(sets, file, layers)
                        written = shards.write(transaction.partial / file, shards.average(sums, tokens, eigen))
                        transaction.finish(file, {"files": [written]})
                    progress.advance(sum(s.files[file].size for s in sets if file in s.files))
            outputs = [transaction.finished[file]["files"][0] for file in files]
            names = {w["name"]: shards.names(transaction.partial / w["name"]) for w in outputs}
            index = layout.index(names, sum(w["size"] for w in outputs))
            outputs.append(write_file(transaction.partial / f"{STEM}.safetensors.index.json", index).to_json())
            count = sum(s.manifest["totals"]["loss_tokens"] for s in sets)
            loss = sum(s.manifest["totals"]["loss"] * s.manifest["totals"]["loss_tokens"] for s in sets)
            moments = {s.manifest["parameters"]["moments"] for s in sets}
            document = manifest.new(
                "curvature",
                parameters={
                    **first["parameters"],
                    "eigen": eigen,
                    "moments": "marginal" if moments == {"marginal"} else "none",
                    "tokens": None,
                    "seed": sorted({str(s.manifest["parameters"]["seed"]) for s in sets}),
                },
                inputs=first["inputs"],
                model_sha256=first["model_sha256"],
                data=[part for s in sets for part in s.manifest["data"]],
                layers=layers,
                left_out={k: v for s in sets for k, v in s.manifest["left_out"].items() if k not in layers},
                totals={
                    "tokens": sum(s.tokens for s in sets),
                    "loss": loss / max(count, 1),
                    "loss_tokens": count,
                },
                machine={**first["machine"], "merged": len(sets)},
                outputs=sorted(outputs, key=lambda w: w["name"]),
            )
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
            one, two = first.manifest["parameters"][key], other.manifest["parameters"][key]
            if one != two:
                raise PairMismatch(f"{other.path}: made with {key} {two}, and {first.path} with {one}; they do not add up")
        for digest in set(first.data_sha256) & set(other.data_sha256):
            raise PairMismatch(
                f"{other.path}: was made from the same data as {first.path} ({digest[:12]}…); it would count twice"
            )


def _layers(sets: Sequence[FactorSet]) -> tuple[dict[str, Any], dict[str, float]]:
    layers: dict[str, Any] = {}
    tokens: dict[str, float] = {}
    for one in sets:
        for name, layer in one.manifest["layers"].items():
            known = layers.setdefault(name, layer)
            if any(known[key] != layer[key] for key in ("d_out", "d_in", "input", "transposed", "kind")):
                raise PairMismatch(f"{one.path}: {name!r} has another shape or shares its input with another layer")
            tokens[name] = tokens.get(name, 0.0) + layer["tokens"]
    return {name: {**layer, "tokens": tokens[name]} for name, layer in layers.items()}, tokens


def _add(sets: Sequence[FactorSet], file: str, layers: dict[str, Any]) -> Sums:
    """Sum tokens·mean over the sets, in float64, and return it in the stored dtype; single tokens follow each other."""
    sums: Sums = {}
    for one in sets:
        for key in one.keys(file):
            if key.startswith((VALUES, VECTORS, SECOND_MOMENTS)):
                continue
            value = one.read(key)
            if key.startswith(shards.TOKENS):
                sums[key] = torch.cat((sums[key], value)) if key in sums else value
                continue
            layer = key.partition("/")[2]
            wide = value.double() * one.manifest["layers"][layer]["tokens"]
            sums[key] = sums[key].add_(wide) if key in sums else wide
    kept = torch.float64 if any(one.manifest["parameters"]["dtype"] == "float64" for one in sets) else torch.float32
    for key, value in sums.items():
        diagonal = value.dim() == 1 and key.startswith(INPUT_COVARIANCE)
        sums[key] = value if diagonal else value.to(kept)
    return sums
