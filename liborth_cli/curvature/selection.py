"""Which matrices get factors, what they are called, and what is left out and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from liborth_cli.checkpoint.pair import regex
from liborth_cli.errors import UsageError
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.tap import Site

HEADS = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|Wqkv)\.weight$")
"""Projections whose outputs are attention heads, one after the other."""


@dataclass(frozen=True)
class Factored:
    """One stored matrix that gets factors.

    Attributes:
        name: its name in the factor set: the stored tensor's, or the head's own when it is tied to the embedding.
        tensor: the stored tensor.
        stage: where in the model it is used.
        d_out: outputs of the mathematical weight.
        d_in: inputs of the mathematical weight.
        transposed: whether the file holds it as (d_in, d_out).
        outputs: which outputs of the matrix in memory it makes.
        matrix: which matrix of a stored stack, or None.
        kind: "linear", "embedding" or "head".
        heads: attention heads among the outputs, when G is kept for each by itself; otherwise 0.
    """

    name: str
    tensor: str
    stage: str
    d_out: int
    d_in: int
    transposed: bool
    outputs: slice
    matrix: int | None = None
    kind: str = "linear"
    heads: int = 0

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of what is kept of G: a matrix, its blocks for each head, or its diagonal."""
        if self.kind == "head":
            return (self.d_out,)
        if self.heads:
            return (self.heads, self.d_out // self.heads, self.d_out // self.heads)
        return (self.d_out, self.d_out)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what is kept of A: a matrix, or the diagonal of token frequencies."""
        return (self.d_in,) if self.kind == "embedding" else (self.d_in, self.d_in)


def choose(
    model: BlockModel, patterns: Sequence[str], per_head: bool, full_head: bool
) -> tuple[dict[str, list[tuple[Site, list[Factored]]]], dict[str, str]]:
    """Decide which matrices get factors.

    Args:
        model: the model, on the meta device.
        patterns: regular expressions on names; none means all.
        per_head: keep G for each attention head.
        full_head: keep the whole G of the head, (vocabulary, vocabulary), in place of its diagonal.

    Returns:
        Stage → its sites with their targets; and the stored tensors left out, with the reason.

    Raises:
        UsageError: when a pattern is malformed or matches nothing, or --per-head finds no heads.
    """
    compiled = [regex(p, "--tensors") for p in patterns]
    matched: set[int] = set()
    chosen: dict[str, list[tuple[Site, list[Factored]]]] = {}
    left_out: dict[str, str] = {}
    for stage, sites in model.planned_sites().items():
        chosen[stage] = []
        for site in sites:
            targets = []
            for target in _targets(site, stage, _head_size(model) if per_head else 0, full_head):
                hits = {i for i, p in enumerate(compiled) if p.search(target.name)}
                matched |= hits
                if compiled and not hits:
                    left_out[target.name] = "not chosen by --tensors"
                else:
                    targets.append(target)
            if targets:
                chosen[stage].append((site, targets))
    for number, pattern in enumerate(patterns):
        if number not in matched:
            raise UsageError(f"--tensors {pattern!r} matches no matrix; `liborth inspect -v` lists the names")
    every = [t for sites in chosen.values() for _, targets in sites for t in targets]
    if per_head and not any(t.heads for t in every):
        raise UsageError("--per-head: no projection to attention heads is recognised in this model")
    left_out |= _uncovered(model, {t.tensor for t in every} | set(left_out))
    return chosen, left_out


def _uncovered(model: BlockModel, covered: set[str]) -> dict[str, str]:
    """Say why the stored tensors that are no matrix of the plan have no factors."""
    left_out = dict.fromkeys(model.unused, "the model does not use it")
    for parameter, pieces in model.pieces.items():
        for piece in pieces:
            if piece.tensor.name not in covered:
                vector = len(piece.tensor.shape) < 2
                left_out[piece.tensor.name] = "norm or bias: no Kronecker factors" if vector else _why_not(parameter)
    return left_out


def _why_not(parameter: str) -> str:
    if re.search(r"wpe|position", parameter):
        return "table of positions: one look-up serves all rows, so it has no gradient of its own for each token"
    return "not used as a matrix product"


def _targets(site: Site, stage: str, head_size: int, full_head: bool) -> list[Factored]:
    kind = "linear" if site.kind == "head" and full_head else site.kind
    result = []
    for piece in site.pieces:
        outputs = site.outputs(piece)
        stacked = site.matrix is not None and piece.matrix is None
        name = piece.tensor.name
        if kind != "embedding" and name != site.parameter and stage == "tail":
            # A tied head is used under its own name: the stored tensor's name belongs to the embedding.
            name = site.parameter
        if stacked:
            name, outputs = f"{name}[{site.matrix}]", slice(0, site.d_out)
        rows = outputs.stop - outputs.start
        heads = rows // head_size if head_size and HEADS.search(name) and rows % head_size == 0 else 0
        result.append(
            Factored(
                name,
                tensor=piece.tensor.name,
                stage=stage,
                d_out=rows,
                d_in=site.d_in,
                transposed=site.transposed,
                outputs=outputs,
                matrix=site.matrix if stacked else None,
                kind=kind,
                heads=heads,
            )
        )
    return result


def _head_size(model: BlockModel) -> int:
    config: Any = model.model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
