"""What a way of training is to the loop: what is trained, what a batch costs, and what happens around a step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liborth_cli.manifest import TuneFacts
from liborth_cli.tune.data import IGNORED, Example, PaddedBatch

LOSS = "loss"
"""Name of what a run is to learn, in the curve."""


@dataclass(frozen=True)
class Lesson:
    """Some rows of a step, and who learns from them.

    Attributes:
        name: of its loss in the curve; lessons of one name count their tokens together.
        rows: what is read.
        learners: the parameters that get a gradient, by name.
        own: whether its rows are what the run is to learn.
        weight: of its mean loss.
    """

    name: str
    rows: Sequence[Example]
    learners: Mapping[str, torch.nn.Parameter]
    own: bool = True
    weight: float = 1.0


def divergence(teacher: torch.Tensor, student: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Return Σ KL(teacher ‖ student) over a batch's tokens, in nats.

    Args:
        teacher: its logits, (rows, n, vocabulary).
        student: likewise.
        batch: which tokens count, and for how much.
    """
    said, now = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    each = torch.nn.functional.kl_div(now, said, reduction="none", log_target=True).sum(-1)
    return (each.where(batch.labels != IGNORED, 0.0).sum(1) * batch.weights).sum()


class Full:
    """Plain training of the parameters it is given; the other methods change what they must.

    Attributes:
        model: a causal language model of Transformers, in float32.
        parameters: what is trained, by name, always in the same order.
        scores_some: whether the model can be told for which positions to compute logits.
    """

    def __init__(self, model: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Let the parameters ask for gradients."""
        self.model, self.parameters = model, dict(parameters)
        self.scores_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    def rate_factor(self, name: str) -> float:
        """Return what the learning rate of one parameter is multiplied by."""
        return 1.0

    def clipped(self) -> list[Mapping[str, torch.nn.Parameter]]:
        """Return the parameters, in groups whose gradient is clipped together."""
        return [self.parameters]

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Say who learns what from batch `number` of the run."""
        return [Lesson(LOSS, rows, self.parameters)]

    def loss(self, batch: PaddedBatch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the model.

        Args:
            batch: rows.
            lesson: that they belong to; None for held-out rows.

        Returns:
            The summed loss of the batch's tokens, in nats, and penalties by name, each a mean to be added a token.
        """
        return self._cross_entropy(batch), {}

    def before_step(self) -> None:
        """Change gradients before the optimiser sees them."""

    def after_step(self) -> None:
        """Change weights after the optimiser moved them."""

    def measure(self) -> dict[str, float]:
        """Measure what the method promises, for the curve."""
        return {}

    def finish(self) -> None:
        """Bring the model's parameters to what will be written."""

    def facts(self) -> TuneFacts:
        """Say for the manifest what the method did."""
        return TuneFacts()

    def _cross_entropy(self, batch: PaddedBatch) -> torch.Tensor:
        """Sum the losses; where no row has a loss, as in prompts, no logits are computed."""
        labels, some = batch.labels, {}
        if self.scores_some and bool((empty := (labels == IGNORED).all(0)).any()):
            some["logits_to_keep"] = torch.nonzero(~empty)[:, 0]
            labels = labels[:, ~empty]
        logits = self.model(input_ids=batch.ids, use_cache=False, **some).logits.float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return (each.view(labels.shape).sum(1) * batch.weights).sum()
