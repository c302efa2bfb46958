"""Write on from prompts, greedily or by sampling, with all weights in memory.

Prompts of one length go together and nothing is padded; what a prompt is drawn with depends on its own tokens and the seed
alone. So neither order nor company changes what is written, but for ties within rounding.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from liborth_cli.errors import BadInput, OutOfResources
from liborth_cli.machine import too_large
from liborth_cli.stream.labels import row_seed, sample, uniforms
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Weights

GROUP_ROWS, DEVICE_GROUP_ROWS = 16, 256
"""Prompts that are continued at a time, on the CPU and on a GPU. Fixed: no option changes what is written."""

Reading = Callable[[torch.Tensor], torch.Tensor]
"""Reads tokens (rows, n) on from what it read before; returns scores of the next one, (rows, vocabulary), float32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (the first of equals), otherwise p^(1/temperature) is drawn from.
        seed: of the drawing.
        seeds: of the drawing after each prompt, so that equal ones go on in several ways; `seed` for all where it is empty.
    """

    temperature: float = 0.0
    seed: int = 0
    seeds: Sequence[int] = ()

    def of(self, number: int) -> int:
        """Return the seed of a prompt."""
        return self.seeds[number] if self.seeds else self.seed


GREEDY = Sampling()
SEEDS = 1 << 64
"""So many seeds there are."""


def seeds_for(prompts: Sequence[np.ndarray], seed: int) -> list[int]:
    """Return a seed for each prompt, such that equal ones go on differently: `Sampling.seeds`."""
    copies, seeds = Counter[bytes](), list[int]()
    for ids in prompts:
        seeds.append((seed + (copies[ids.tobytes()] << 32)) % SEEDS)
        copies[ids.tobytes()] += 1
    return seeds


def hold(model: BlockModel, weights: Weights) -> None:
    """Put weights into memory, and leave them there.

    Raises:
        OutOfResources: when they do not fit; writing token by token cannot stream them.
    """
    model.use(weights)
    if model.resident:
        return
    if too_much := too_large(model.nbytes):
        raise OutOfResources(f"generating text needs all weights in memory: {too_much}")
    model.load_all()


def generate(
    model: BlockModel,
    prompts: Sequence[np.ndarray],
    most: int,
    sampling: Sampling = GREEDY,
    advance: Callable[[int], None] = lambda prompts: None,
    begin: Callable[[BlockModel], Reading] | None = None,
) -> list[np.ndarray]:
    """Write on from every prompt until the model ends its text, `most` tokens are written, or the context is full.

    Args:
        model: after `hold`.
        prompts: token ids, (n,) each, n ≥ 1.
        most: tokens to write at most.
        sampling: how a token is chosen.
        advance: told how many prompts are done.
        begin: returns what reads a group of prompts and scores the next token; the model itself (`reading`) when None.

    Returns:
        What was written, without the end-of-text token, (tokens,) each, in the order of the prompts.

    Raises:
        BadInput: when a prompt is empty or fills the context, or the model answers with numbers that are not finite.
    """
    alike: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        if not len(prompt) or (model.context and len(prompt) >= model.context):
            raise BadInput(f"prompt {number + 1}: {len(prompt):,} tokens, and the model's context is {model.context:,}")
        alike[len(prompt)].append(number)
    written: dict[int, np.ndarray] = {}
    together = GROUP_ROWS if model.device.type == "cpu" else DEVICE_GROUP_ROWS
    for length, numbers in sorted(alike.items()):
        room = min(most, model.context - length) if model.context else most
        for start in range(0, len(numbers), together):
            group = numbers[start : start + together]
            ids = torch.from_numpy(np.stack([prompts[i] for i in group])).to(model.device)
            draws = None
            if sampling.temperature > 0:
                mine = [row_seed(sampling.of(i), prompts[i].tobytes()) for i in group]
                draws = torch.stack([uniforms(seed, room) for seed in mine]).to(model.device)
            read = (begin or reading)(model)
            written |= dict(zip(group, _group(model, read, ids, room, sampling.temperature, draws), strict=True))
            advance(len(group))
    return [written[number] for number in range(len(prompts))]


def reading(model: BlockModel) -> Reading:
    """Return what reads with the weights that the model has when it is called, and remembers keys and values."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.model.forward).parameters else {}
    past = None

    def read(ids: torch.Tensor) -> torch.Tensor:
        nonlocal past
        answer = model.model(input_ids=ids, past_key_values=past, use_cache=True, **last_only)
        past = answer.past_key_values
        return answer.logits[:, -1].float()

    return read


@torch.no_grad()
def _group(
    model: BlockModel, read: Reading, ids: torch.Tensor, room: int, temperature: float, draws: torch.Tensor | None
) -> list[np.ndarray]:
    ends = torch.tensor(sorted(end_tokens(model)), device=ids.device, dtype=ids.dtype)
    feed, done, columns = ids, torch.zeros(len(ids), dtype=torch.bool, device=ids.device), []
    for step in range(room):
        scores = read(feed)
        if not bool(torch.isfinite(scores).all()):
            raise BadInput("the model's scores are not finite: its weights are broken, or the arithmetic overflows")
        chosen = scores.argmax(-1) if draws is None else sample(torch.softmax(scores / temperature, -1), draws[:, step])
        done |= torch.isin(chosen, ends)
        columns.append(torch.where(done, -1, chosen))
        if bool(done.all()):
            break
        feed = chosen[:, None]
    table = torch.stack(columns, 1).cpu().numpy()
    return [row[: int((row >= 0).sum())] for row in table]


def end_tokens(model: BlockModel) -> set[int]:
    """Return the tokens that end a text, by the model's configuration."""
    found: set[int] = set()
    for config in (model.model.config, model.model.config.get_text_config(), getattr(model.model, "generation_config", None)):
        end = getattr(config, "eos_token_id", None)
        found |= set(end) if isinstance(end, (list, tuple)) else {end} if end is not None else set()
    return {int(token) for token in found}
