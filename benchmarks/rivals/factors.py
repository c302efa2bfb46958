"""Inputs and output gradients of every linear layer of the blocks: summed into Kronecker factors, or token by token.

These are the rivals' own, by hooks on the whole model in memory; liborth's curvature code takes no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.rivals.training import IGNORED, device_of, pad
from benchmarks.surgery.job import Completion

ROWS = 16
DAMPING = 0.01
"""Added to a factor, relative to its mean eigenvalue."""
RETAIN_TOKENS = 20_000
"""Retain tokens that are measured at most."""


@dataclass(frozen=True)
class Factors:
    """Of one matrix, float64, means over tokens.

    Attributes:
        inputs: E[aaᵀ], (d_in, d_in).
        gradients: E[ggᵀ] of the summed loss of the tokens, (d_out, d_out).
    """

    inputs: torch.Tensor
    gradients: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """Of one matrix, a row a token that carries loss, or that one sees.

    Attributes:
        inputs: a, (tokens, d_in).
        gradients: g, (tokens, d_out).
    """

    inputs: torch.Tensor
    gradients: torch.Tensor


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Return the linear layers of the blocks by name; the head is none of them."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def tokens_of(
    model: Any, rows: Sequence[Completion], seed: int | None = None, names: Sequence[str] | None = None
) -> Iterator[dict[str, Tokens]]:
    """Give inputs and gradients of the loss, batch by batch, at every position but padding and a row's last token.

    Args:
        model: is not changed.
        rows: of them all labelled tokens carry loss.
        seed: draws labels from the model in place of the real ones (the Fisher matrix); of every token, prompts too.
        names: of the layers; all when not given.
    """
    layers = linear_layers(model)
    layers = layers if names is None else {name: layers[name] for name in names}
    draw = torch.Generator(device_of(model)).manual_seed(seed or 0)
    for start in range(0, len(rows), ROWS):
        ids, labels = pad(rows[start : start + ROWS], device_of(model))
        lengths = torch.tensor([len(row.ids) for row in rows[start : start + ROWS]], device=ids.device)
        real = torch.arange(ids.shape[1] - 1, device=ids.device)[None] < lengths[:, None] - 1
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = [layer.register_forward_hook(_noting(seen, name)) for name, layer in layers.items()]
        try:
            with torch.enable_grad():
                logs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()
        if seed is None:
            wanted, counted = labels[:, 1:].clamp(min=0), labels[:, 1:] != IGNORED
        else:
            wanted = torch.multinomial(logs.detach().exp().flatten(0, 1), 1, generator=draw).view(logs.shape[:2])
            counted = real
        loss = -(logs.gather(-1, wanted[..., None])[..., 0] * counted).sum()
        grads = torch.autograd.grad(loss, [out for _, out in seen.values()])
        yield {name: Tokens(a[:, :-1][real], g[:, :-1][real]) for (name, (a, _)), g in zip(seen.items(), grads, strict=True)}


def retain_factors(model: Any, retain: Sequence[list[int]], seed: int) -> dict[str, Factors]:
    """Estimate the factors of retain rows, with labels drawn from the model, and damp them.

    Args:
        model: is not changed.
        retain: of these rows as many as hold `RETAIN_TOKENS`, from all over.
        seed: of the labels.
    """
    step = max(1, -(-sum(map(len, retain)) // RETAIN_TOKENS))
    rows = [Completion(list(row), 1) for row in retain[::step] if len(row) > 1]
    return {
        name: Factors(_damped(found.inputs), _damped(found.gradients))
        for name, found in sums(tokens_of(model, rows, seed)).items()
    }


def sums(batches: Iterator[dict[str, Tokens]]) -> dict[str, Factors]:
    """Add batches up to factors, undamped."""
    totals: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    count = 0
    for batch in batches:
        for name, one in batch.items():
            a, g = (one.inputs.T @ one.inputs).double(), (one.gradients.T @ one.gradients).double()
            old = totals.get(name)
            totals[name] = (a, g) if old is None else (old[0] + a, old[1] + g)
        count += len(next(iter(batch.values())).inputs)
    return {name: Factors(a / count, g / count) for name, (a, g) in totals.items()}


def solve(factor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return factor⁻¹ · columns of a positive definite factor."""
    return torch.cholesky_solve(columns, torch.linalg.cholesky(factor))


def retain_cost(factors: dict[str, Factors], steps: dict[str, torch.Tensor]) -> float:
    """Predict what a change of the weights costs on retain data, ½ Σ tr(G·D·A·Dᵀ), nats a token."""
    return sum(float(((factors[n].gradients @ d) * (d @ factors[n].inputs)).sum()) for n, d in steps.items()) / 2


def apply(model: Any, steps: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    """Add scale · D to every weight."""
    with torch.no_grad():
        for name, layer in linear_layers(model).items():
            if name in steps:
                layer.weight += (scale * steps[name]).to(layer.weight.dtype)


def _noting(seen: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str) -> Any:
    def note(module: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen[name] = given[0].detach(), out

    return note


def _damped(factor: torch.Tensor) -> torch.Tensor:
    extra = DAMPING * factor.trace() / len(factor) + torch.finfo(factor.dtype).tiny
    return factor + extra * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
