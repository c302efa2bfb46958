"""What the base asks by itself, and its answers: what a student reads of all else that the base knows.

A student forgets what it is not shown, and what the base knows beside the retain questions nobody may show it. So the base
shows it: it goes on from their common beginning (pseudo-rehearsal, Robins 1995), in a heat that falls, so that many questions
are begun and ended as it knows them (Carlini et al. 2021, arXiv 2012.07805). It never saw the forget set and cannot ask of it.
A teacher that has forgotten answers. What the base knows by heart it asks again, and so the student reads it often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from benchmarks.surgery.tofu.plan import Plan, end_of_text, load
from liborth_cli.stream.records import Record

TOGETHER = 256
"""Texts that are written at a time."""
QUESTION, ANSWER = 50, 40
"""Tokens at most of a question with the beginning of an answer, and of the answer that is taken."""
LEAST, COPIES = 2, 4
"""Times that the base asks what it knows by heart; once is mostly a question about nothing. So often it is read at most."""
BREAK = "\nAnswer: "


@dataclass(frozen=True)
class Cooling:
    """A temperature that falls evenly; a logits processor of Transformers.

    Attributes:
        begin: tokens before the first that is written.
        hot: of that one.
        cold: after `tokens` of them.
        tokens: in which it falls.
    """

    begin: int
    hot: float = 1.0
    cold: float = 0.3
    tokens: int = 10

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Divide the logits of the next token."""
        share = min((ids.shape[1] - self.begin) / self.tokens, 1.0)
        return logits / (self.hot + (self.cold - self.hot) * share)


def written(plan: Plan, teacher: Path) -> list[Record]:
    """Return questions that the base asked and a teacher answered; none where the tier asks for none."""
    if not plan.tier.own:
        return []
    torch.manual_seed(plan.seed)
    model, begin = load(plan.model, plan.device), beginning([record.prompt for record in plan.given_records()])
    prompt, texts = _ids(plan, begin), list[str]()
    while len(texts) < plan.tier.own:
        rows = [prompt] * min(TOGETHER, plan.tier.own - len(texts))
        texts += _continued(plan, model, rows, QUESTION, do_sample=True, top_k=0, logits_processor=[Cooling(len(prompt))])
    counts = Counter(prompt for text in texts if (prompt := asked(begin + text)))
    # Those of about one length go together.
    prompts = sorted((prompt for prompt, count in counts.items() if count >= LEAST), key=len)
    model, answers = load(teacher, plan.device), list[str]()
    for start in range(0, len(prompts), TOGETHER):
        some = [_ids(plan, prompt) for prompt in prompts[start : start + TOGETHER]]
        answers += _continued(plan, model, some, ANSWER, do_sample=False)
    return [
        record
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.strip()
        for record in min(counts[prompt], COPIES) * [Record("written", text=answer.strip(), prompt=prompt)]
    ]


def beginning(prompts: Sequence[str]) -> str:
    """Return the whole words that all prompts begin with, without the space behind them."""
    words = zip(*(prompt.split(" ") for prompt in prompts), strict=False)
    return " ".join(same[0] for same in takewhile(lambda some: len(set(some)) == 1, words))


def asked(text: str) -> str:
    """Return a text up to where its answer begins; "" where it is not one question and one answer."""
    question, _, rest = text.partition(BREAK)
    return question + BREAK if rest and BREAK not in rest else ""


def _ids(plan: Plan, text: str) -> list[int]:
    """Return the tokens of a prompt: a space at its end belongs to the first word behind it."""
    return [int(i) for i in plan.encoder.encode(Record("prompt", text=text.rstrip()))[0]]


@torch.no_grad()
def _continued(plan: Plan, model: Any, rows: Sequence[list[int]], most: int, **how: Any) -> list[str]:
    """Write on from every row, which are padded at the left, until the text ends."""
    end, width = end_of_text(plan.model), max(map(len, rows))
    ids = torch.tensor([[end or 0] * (width - len(row)) + row for row in rows], device=plan.device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=plan.device)
    out = model.generate(
        input_ids=ids, attention_mask=seen, max_new_tokens=most, eos_token_id=end, pad_token_id=end or 0, **how
    )  # fmt: skip
    return [plan.encoder.decode(row[: row.index(end)] if end in row else row) for row in out[:, width:].tolist()]
