"""Relearning: teach the model half of the secrets, and watch whether the other half comes back by itself.

An edit that hides text without removing it gives way to a few steps of training on text of the same kind (Lynch et al.
2024, arXiv 2402.16835; Hu et al. 2024, arXiv 2406.13356). Every model learns the *form* of the secrets, so what counts is the
distance to a control that never saw one: the reference checkpoint given the same steps, and rows of the same form that
nobody was trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from liborth_cli.machine import available_bytes, process_bytes
from liborth_cli.measure.scores import RowScore, windows
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights
from liborth_cli.verify.shared_model import evaluator_of

STEPS = 40
MARKS = 8
BATCH_ROWS = 16
BYTES_PER_WEIGHT = 16
"""float32 weight and gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class Attack:
    """How an attacker trains.

    Attributes:
        steps: of AdamW; the rows that are watched are scored `MARKS` times on the way.
        rate: learning rate; None takes 0.1 / hidden width, the scaling of Yang et al. 2022 (arXiv 2203.03466), which is
            1.6e-3 for 64 and 2.4e-5 for 4096.
        seed: of the order of the rows.
    """

    steps: int = STEPS
    rate: float | None = None
    seed: int = 0

    @property
    def marks(self) -> list[int]:
        """The steps after which the watched rows are scored."""
        return sorted({max(round(self.steps * k / MARKS), 1) for k in range(1, MARKS + 1)})


@dataclass
class Course:
    """What was seen on the way, one entry a mark, the first before any training.

    Attributes:
        steps: when.
        losses: by group of rows: mean loss a token of each row, in nats, (rows,).
        recited: by group: whether every token of a row was the likeliest, (rows,), bool.
    """

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    recited: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def note(self, step: int, scores: dict[str, list[RowScore]]) -> None:
        """Add one mark."""
        self.steps.append(step)
        for name, some in scores.items():
            self.losses[name].append(np.array([score.loss.mean() for score in some]))
            self.recited[name].append(np.array([bool(score.hit.all()) for score in some]))


def bytes_needed(model: BlockModel) -> int:
    """Return what training a model of this size takes, without its activations."""
    return BYTES_PER_WEIGHT * sum(model.stage_elements(stage) for stage in model.stages)


def bytes_free() -> int:
    """Return what may be taken: half of what the machine has free."""
    return available_bytes() - process_bytes()


def halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Deal the numbers 0 … count − 1 into two hands, by the seed."""
    order = [int(i) for i in np.random.default_rng(seed).permutation(count)]
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def teach(
    weights: Weights,
    taught: Sequence[Row],
    watched: Mapping[str, Sequence[Row]],
    attack: Attack,
    device: torch.device,
    advance: Callable[[int], None] = lambda steps: None,
) -> Course:
    """Train all weights on some rows, and score other rows on the way.

    Args:
        weights: where it starts; they are not changed.
        taught: what is trained on; only the tokens that carry loss, in windows where a row is longer than the context.
        watched: what is scored, by name.
        attack: how.
        device: where.
        advance: told of every step.

    Returns:
        The course of the watched rows.
    """
    model = BlockModel(weights, torch.float32, device)
    model.load_all()
    parameters = [p.requires_grad_() for p in model.model.parameters()]
    rate = attack.rate or 0.1 / model.hidden
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    evaluators = {name: evaluator_of(model, rows, resident=True) for name, rows in watched.items() if rows}
    taught = [part for row in taught for part in windows(row, model.context or row.tokens)]
    course, generator = Course(), np.random.default_rng(attack.seed)
    course.note(0, {name: evaluator.score() for name, evaluator in evaluators.items()})
    queue: list[int] = []
    for step in range(1, attack.steps + 1):
        if len(queue) < min(BATCH_ROWS, len(taught)):
            queue += [int(i) for i in generator.permutation(len(taught))]
        now, queue = queue[:BATCH_ROWS], queue[BATCH_ROWS:]
        optimiser.zero_grad(set_to_none=True)
        _backward(model, [taught[i] for i in dict.fromkeys(now)])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step in attack.marks:
            course.note(step, {name: evaluator.score() for name, evaluator in evaluators.items()})
        advance(1)
    model.close()
    return course


def _backward(model: BlockModel, rows: Sequence[Row]) -> None:
    """Add the gradient of the mean loss a token; rows of one length go together, so nothing is padded."""
    alike: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.tokens].append(row)
    total = sum(int(row.keep.sum()) for row in rows)
    for some in alike.values():
        ids = torch.from_numpy(np.stack([row.ids for row in some])).to(model.device)
        keep = torch.from_numpy(np.stack([row.keep for row in some])).to(model.device)
        logits = model.model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[keep].float(), ids[:, 1:][keep], reduction="sum")
        (loss / total).backward()
