"""What is left in a model, measured by Transformers and not by liborth: skill, records, general text, and what comes back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real.model import Row, batches, encode, load_tokenizer, losses
from benchmarks.real.model import load as load_model
from benchmarks.real.texts import RARELY, Pair, general, records, skill, times

RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates of the attack: AdamW, no decay."""
STEPS = 16
SCORED = 8192
"""Tokens of one scoring batch."""
HELD_OUT = 80
"""Questions of the skill's test set that are scored."""
GENERAL = 20
"""Texts of each general kind; those after them are retain texts."""


@dataclass(frozen=True)
class Recalled:
    """How well a set of records is known.

    Attributes:
        loss: mean over completion tokens, nats.
        recited: share of records whose every completion token is the likeliest.
    """

    loss: float
    recited: float


@dataclass(frozen=True)
class Left:
    """What one model knows.

    Attributes:
        skill: loss on held-out answers, nats a token.
        general: loss on each kind of text that nobody trained on.
        secrets: the records that were trained on, by kind.
        rarely: those of them trained on `RARELY` times.
        fresh: records of the same kinds that nobody trained on, by kind.
        relearnt: rate → lowest loss of one half of the secrets while the other half is taught, both ways, mean.
    """

    skill: float
    general: dict[str, float]
    secrets: dict[str, Recalled]
    rarely: Recalled
    fresh: dict[str, Recalled]
    relearnt: dict[float, float]

    @property
    def all_secrets(self) -> Recalled:
        """The kinds together, each as heavy as the other."""
        kinds = list(self.secrets.values())
        return Recalled(sum(k.loss for k in kinds) / len(kinds), sum(k.recited for k in kinds) / len(kinds))

    @property
    def all_fresh(self) -> float:
        """Loss of fresh records, the kinds together."""
        return sum(kind.loss for kind in self.fresh.values()) / len(self.fresh)


class Judge:
    """Measures models on texts that are read and tokenised once.

    Args:
        data: folder of GSM8K, wikitext and stories.
        base: checkpoint whose tokenizer every model shares.
        device: where models run.
        rates: learning rates of the attack; none for no attack.
    """

    def __init__(self, data: Path, base: Path, device: torch.device, rates: tuple[float, ...] = RATES) -> None:
        tokenizer = load_tokenizer(base)
        self.device, self.rates = device, rates
        self.skill = [encode(tokenizer, pair) for pair in skill(data, "test")[:HELD_OUT]]
        self.general = {name: [_text(tokenizer, text) for text in some[:GENERAL]] for name, some in general(data).items()}
        self.secrets = {kind: _pairs(tokenizer, some) for kind, some in records("secrets").items()}
        self.fresh = {kind: _pairs(tokenizer, some) for kind, some in records("fresh").items()}

    def __call__(self, folder: Path) -> Left:
        """Load a checkpoint as Transformers does, in float32, and measure it."""
        model = load_model(folder).to(self.device).eval()
        rare = [row for some in self.secrets.values() for number, row in enumerate(some) if times(number) == RARELY]
        return Left(
            skill=self._known(model, self.skill).loss,
            general={name: self._known(model, some).loss for name, some in self.general.items()},
            secrets={kind: self._known(model, some) for kind, some in self.secrets.items()},
            rarely=self._known(model, rare),
            fresh={kind: self._known(model, some) for kind, some in self.fresh.items()},
            relearnt={rate: self._relearnt(model, rate) for rate in self.rates},
        )

    @torch.no_grad()
    def _known(self, model: PreTrainedModel, rows: list[Row]) -> Recalled:
        total, right, count = torch.zeros(len(rows)), torch.ones(len(rows), dtype=torch.bool), 0
        for group in batches(rows, SCORED):
            found, which, hit = (x.cpu() for x in losses(model, [rows[i] for i in group], self.device))
            place = torch.tensor(group)[which]
            total.index_add_(0, place, found)
            right[place[~hit]] = False
            count += len(found)
        return Recalled(total.sum().item() / count, right.float().mean().item())

    def _relearnt(self, model: PreTrainedModel, rate: float) -> float:
        """Teach one half, watch the other; scored from the second step on, the lowest loss counts."""
        halves: tuple[list[Row], list[Row]] = ([], [])
        for some in self.secrets.values():
            for number, row in enumerate(some):
                halves[number // 2 % 2].append(row)
        lowest = []
        for taught, watched in (halves, halves[::-1]):
            attacked = copy.deepcopy(model).train()
            optimiser = torch.optim.AdamW(attacked.parameters(), lr=rate, weight_decay=0.0)
            seen = []
            for step in range(1, STEPS + 1):
                optimiser.zero_grad(set_to_none=True)
                losses(attacked, taught, self.device)[0].mean().backward()
                torch.nn.utils.clip_grad_norm_(attacked.parameters(), 1.0)
                optimiser.step()
                if step >= 2 and (step % 2 == 0 or step < 8):
                    seen.append(self._known(attacked.eval(), watched).loss)
                    attacked.train()
            lowest.append(min(seen))
        return sum(lowest) / 2


def _pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> list[Row]:
    return [encode(tokenizer, pair) for pair in pairs]


def _text(tokenizer: PreTrainedTokenizerBase, text: str) -> Row:
    return tokenizer(text, add_special_tokens=False)["input_ids"][:256], 1
