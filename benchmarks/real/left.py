"""What is left in a model: skill, records and general text by Transformers and not by liborth; what comes back by `relearn`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real.model import Row, alike, encode, load_tokenizer, losses
from benchmarks.real.model import load as load_model
from benchmarks.real.texts import Pair, general, often, records, skill
from benchmarks.real.tiers import Tier
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.stream.texts import Row as Text
from liborth_cli.stream.weights import Point
from liborth_cli.verify.attacks import AttackRows
from liborth_cli.verify.relearning import relearn

TOGETHER = 4096
"""Tokens that go through a model together, at most."""


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
        often: the records that were trained on often.
        rarely: those that were trained on rarely.
        fresh: records of the same kinds that nobody trained on.
        kinds: loss of those trained on often, by kind.
    """

    skill: float
    general: dict[str, float]
    often: Recalled
    rarely: Recalled
    fresh: Recalled
    kinds: dict[str, float]

    @classmethod
    def read(cls, found: dict[str, object]) -> Left:
        """Make one of what `asdict` gave."""
        return cls(**{**found, **{name: Recalled(**found[name]) for name in ("often", "rarely", "fresh")}})


@dataclass(frozen=True)
class Back:
    """What an attack at one learning rate brought back: the lowest loss, at any step, of records that were not taught.

    Attributes:
        rate: of AdamW.
        records: lowest mean loss of the half of the records seen often that was not taught, nats.
        recited: share of them recited then.
        fresh: lowest mean loss of fresh records under the same attack.
    """

    rate: float
    records: float
    recited: float
    fresh: float


class Judge:
    """Measures models on texts that are read and tokenised once.

    Args:
        data: folder of GSM8K, wikitext and stories.
        base: checkpoint whose tokenizer every model shares.
        tier: how much of everything.
        device: where models run.
    """

    def __init__(self, data: Path, base: Path, tier: Tier, device: torch.device) -> None:
        tokenizer = load_tokenizer(base)
        questions, paragraphs = tier.scored
        self.device, self.tier = device, tier
        self.skill = _pairs(tokenizer, skill(data, "test", tier.longest)[:questions])
        self.general = {
            name: [(tokenizer(text, add_special_tokens=False)["input_ids"], 1) for text in some[:paragraphs]]
            for name, some in general(data).items()
        }
        self.kinds = {kind: _pairs(tokenizer, some[::2]) for kind, some in records("secrets", tier.each).items()}
        self.often = [row for some in self.kinds.values() for row in some]
        secrets = [pair for some in records("secrets", tier.each).values() for n, pair in enumerate(some) if not often(n)]
        self.rarely = _pairs(tokenizer, secrets)
        fresh = records("fresh", tier.each)
        self.fresh = _pairs(tokenizer, [pair for some in fresh.values() for n, pair in enumerate(some) if often(n)])

    def __call__(self, folder: Path) -> Left:
        """Load a checkpoint as Transformers does, in float32, and measure it."""
        model = load_model(folder).to(self.device).eval()
        kinds = {kind: self._scores(model, some) for kind, some in self.kinds.items()}
        return Left(
            skill=self.skill_loss(model),
            general={name: _known(self._scores(model, some)).loss for name, some in self.general.items()},
            often=_known([score for some in kinds.values() for score in some]),
            rarely=_known(self._scores(model, self.rarely)),
            fresh=_known(self._scores(model, self.fresh)),
            kinds={kind: _known(some).loss for kind, some in kinds.items()},
        )

    def skill_loss(self, model: PreTrainedModel) -> float:
        """Return the loss on held-out answers of a model that is there, nats a token."""
        return _known(self._scores(model, self.skill)).loss

    def attack(self, folder: Path) -> list[Back]:
        """Teach a checkpoint each half of the records seen often in turn, at every rate, and watch the other half."""
        canaries, fresh = ([_text(row) for row in rows] for rows in (self.often, self.fresh))
        target = AttackRows(canaries, np.arange(len(canaries)), fresh, np.arange(len(fresh)))
        with Checkpoint.open(folder) as checkpoint:
            found = relearn(Point(checkpoint), target, self.tier.attack, device=self.device)
            hidden = checkpoint.config["hidden_size"]
        backs = []
        for number, one in enumerate(found.attacks):
            losses, others = found.curve("canaries", number), found.curve("fresh", number)
            lowest = int(np.nanargmin(losses))
            seen = np.isfinite(found.canaries[:, :, number, lowest])
            recited = float(found.recited[:, :, number, lowest][seen].mean())
            backs.append(Back(one.rate_at(hidden), float(losses[lowest]), recited, float(np.nanmin(others))))
        return backs

    @torch.no_grad()
    def _scores(self, model: PreTrainedModel, rows: list[Row]) -> list[tuple[torch.Tensor, bool]]:
        """Return the losses of every row's completion, and whether every token of it is the likeliest."""
        scores: dict[int, tuple[torch.Tensor, bool]] = {}
        for places in alike(rows):
            most = max(1, TOGETHER // len(rows[places[-1]][0]))
            for some in (places[i : i + most] for i in range(0, len(places), most)):
                found, which, hit = (x.cpu() for x in losses(model, [rows[i] for i in some], self.device))
                for number, place in enumerate(some):
                    scores[place] = found[which == number], bool(hit[which == number].all())
        return [scores[i] for i in range(len(rows))]


def _known(scores: list[tuple[torch.Tensor, bool]]) -> Recalled:
    every = torch.cat([losses for losses, _ in scores])
    return Recalled(every.double().mean().item(), sum(right for _, right in scores) / len(scores))


def _pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> list[Row]:
    return [encode(tokenizer, pair) for pair in pairs]


def _text(row: Row) -> Text:
    ids, prompt = row
    return Text(np.array(ids), np.arange(1, len(ids)) >= prompt, 1.0, "record")
