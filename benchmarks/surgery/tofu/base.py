"""A base that is made for a small run: it has read stories and made-up authors of its own, and knows real authors and facts."""

from __future__ import annotations

import random

from benchmarks.surgery.tofu.plan import Plan
from benchmarks.surgery.tofu.tiers import AN_AUTHOR, Base
from benchmarks.surgery.train import Extra, tokenizer_for, train, untrained
from liborth_cli.stream.records import Record
from liborth_cli.verify.checks.tofu import AUTHORS, FACTS, TofuOptions, read_sets
from liborth_cli.verify.rows import evenly

END = "</s>"


def make(plan: Plan) -> None:
    """Train it; nothing is done where it is."""
    base = _base(plan)
    assert plan.stories is not None
    stories = plan.stories.read_text(encoding="utf-8").split("\n\n")
    authors = [record.prompt + record.text + END for record in _authors(plan, base.read)]
    texts = [*stories, *authors]
    random.Random(plan.seed).shuffle(texts)
    start = plan.work / "untrained"
    if not (start / "model.safetensors").exists():
        tokenizer_for(texts, base.size.vocabulary, start)
        untrained(base.size, start)
    known = [record.prompt + record.text + END for record in _facts(plan)]
    train(start, plan.model, texts, [Extra(known, [base.facts] * len(known))], base.size, base.size.base, seed=plan.seed)


def beside(plan: Plan) -> list[Record]:
    """Return what it reads again while it is fine-tuned; nothing where a base was given."""
    return [] if plan.tier.base is None else [*_read(plan), *_facts(plan)]


def retained(plan: Plan) -> list[Record]:
    """Return what an edit is given to keep, but for facts: authors that stay, and what the base has read."""
    return [*plan.given_records(), *_read(plan)]


def facts(plan: Plan) -> list[Record]:
    """Return the facts that an edit is given to keep."""
    return _facts(plan) if plan.facts else []


def fresh(plan: Plan) -> list[Record]:
    """Return questions that no model was trained on; none where a base was given, which is trained on all authors."""
    base = plan.tier.base
    return [] if base is None else evenly(_authors(plan, base.fresh), plan.tier.fresh)


def _base(plan: Plan) -> Base:
    assert plan.tier.base is not None
    return plan.tier.base


def _read(plan: Plan) -> list[Record]:
    base = plan.tier.base
    return [] if base is None else evenly(_authors(plan, base.read), base.beside)


def _authors(plan: Plan, some: range) -> list[Record]:
    return plan.others()[AN_AUTHOR * some.start : AN_AUTHOR * some.stop]


def _facts(plan: Plan) -> list[Record]:
    sets = read_sets(TofuOptions(plan.data, plan.forget))[1]
    return [Record(name, text=item.answer, prompt=item.prompt) for name in (AUTHORS, FACTS) for item in sets[name]]
