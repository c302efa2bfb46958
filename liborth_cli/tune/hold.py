"""Hold what the base says about public text while something else is learnt (Li and Hoiem 2016, arXiv 1606.09282).

A projector made at the base protects to first and second order around it. A run goes further than that, and all of the small
directions it leaves free add up. The divergence of base and model on public text is measured where the model is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from liborth_cli.tune.data import IGNORED, Batch, batch_rows
from liborth_cli.tune.method import Lesson
from liborth_cli.tune.network import Network
from liborth_cli.tune.route import Example

PUBLIC = "public"
"""Name of the divergence, in the curve."""


class Hold:
    """Adds w · KL(base ‖ model), mean over the tokens of as many public rows as a batch has.

    Attributes:
        weight: w.
        rows: public text.
    """

    def __init__(
        self, network: Network, base: Mapping[str, torch.Tensor], rows: Sequence[Example], weight: float, seed: int
    ) -> None:
        """Remember where to look.

        Args:
            network: the model.
            base: values at the base of what is trained, by name.
            rows: public text.
            weight: w.
            seed: of the order in which the text is read.
        """
        self.rows, self.weight = rows, weight
        self._network, self._base, self._seed = network, dict(base), seed

    def lesson(self, count: int, number: int, learners: Mapping[str, torch.nn.Parameter]) -> Lesson:
        """Return the public rows that go with batch `number` of `count` rows."""
        rows = batch_rows(self.rows, number, count, self._seed + 1)
        return Lesson(PUBLIC, rows, learners, own=False, weight=self.weight)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return Σ KL(base ‖ model) over the batch's tokens, in nats."""
        model = self._network.model
        words = {"input_ids": batch.ids, "use_cache": False}
        training = model.training
        with torch.no_grad():
            model.eval()  # what the base says, without dropout
            base = torch.func.functional_call(model, self._base, kwargs=words).logits.float().log_softmax(-1)
            model.train(training)
        now = model(**words).logits.float().log_softmax(-1)
        each = torch.nn.functional.kl_div(now, base, reduction="none", log_target=True).sum(-1)
        return (each.where(batch.labels != IGNORED, 0.0).sum(1) * batch.weights).sum()
