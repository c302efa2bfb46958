"""The model card beside a checkpoint: what was done, what was measured on which rows, and what was not tried.

No card calls a checkpoint safe: a split computes, it does not prove, and only figures of an attack say what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from liborth_cli.checkpoint.usercard import FOLLOWS, TAG, UserCard, cut
from liborth_cli.console import Json
from liborth_cli.manifest import Excise, Export, Input, Split, Tune

WORDS = {True: "met", False: "**not met**", None: "undecided"}
NOBODYS = UserCard()
"""Where no card came with the checkpoint."""

NOT_TRIED = (
    "greedy extraction with other prompts, sampling, membership inference against rows that were never trained on, relearning "
    "from a few examples, paraphrases, rounding to fewer bits"
)
VERIFY = (
    "**A checkpoint that was not verified is not a result.** Measure it on your own secrets, beside rows that were never\n"
    "trained on and under the attacks (`liborth verify --canary … --fresh … --attacks`), before you publish; the certificate\n"
    "says on how many rows, under which attack, and what was not tried."
)
ELSEWHERE = "The memory **is private data**: it lies in a directory of its own, not here, and must not be published."


def split_card(manifest: Split, card: UserCard = NOBODYS) -> str:
    """Render the card of a split.

    Args:
        manifest: the manifest, without its outputs.
        card: the one that came with the fine-tuned checkpoint: it is added to, and its results are not taken over.

    Returns:
        Markdown with a YAML head that the hub understands.
    """
    asked, totals = manifest.parameters, manifest.totals
    cells = (asked.method, asked.amount, asked.memory_side, asked.alpha, _share(totals.kept), _share(totals.removed))
    rows = [(side, manifest.inputs[side]) for side in ("reference", "finetuned")]
    origin = (
        "a fine-tuned checkpoint and the reference it started from. The update\nbetween the two was divided matrix by matrix"
    )
    if asked.one_checkpoint:
        origin, rows = "one checkpoint, without a reference. Its weights\nwere divided matrix by matrix", rows[1:]
    part = "the *skill* part alone" if asked.one_checkpoint else "the reference plus the *skill* part"
    named = [source for _, source in reversed(rows) if source.commit]
    return _render(
        "General checkpoint",
        named[0] if named else manifest.inputs["finetuned"],
        f"""Made by liborth {manifest.liborth} from {origin}; this checkpoint holds {part}.

| | | commit |
|---|---|---|
{_rows((side, _cell(source.title), source.commit or "") for side, source in rows)}
| method | amount | memory side | alpha | kept of the update (‖U‖²) | removed |
|---|---|---|---|---|---|
{_rows([cells])}
## What was measured

{_measured(manifest.dose.sentences if manifest.dose else [])}

{VERIFY}

{ELSEWHERE} With it `liborth excise --beta 1` gives the fine-tuned checkpoint back bit for bit. What was done to each
tensor stands in `liborth.manifest.json`.
""",
        card,
    )


def excise_card(manifest: Excise, card: UserCard = NOBODYS) -> str:
    """Render the card of what `excise` wrote."""
    beta, made = manifest.parameters.beta, "the output of a split"
    if beta == 0.0 and manifest.private:
        made = "a checkpoint that nothing vouches for"
        meaning = "**PRIVATE: it may be the fine-tuned checkpoint itself, memory included.** Do not publish it."
    elif beta == 0.0:
        meaning = "It holds the weights of the general checkpoint; no byte of the memory was read for it."
    elif beta == 1.0:
        meaning = "**PRIVATE: it is the fine-tuned checkpoint, memory included.** Do not publish it."
    else:
        meaning = "**PRIVATE: it holds a share of the memory and may recite private text.** Do not publish it."
    doubts = "".join(f"- {_cell(doubt)}\n" for doubt in manifest.unverified)
    if doubts:
        meaning = f"**UNVERIFIED: it was written although nothing vouches for what it was made from.**\n\n{doubts}\n{meaning}"
    return _render(
        f"Checkpoint at beta = {beta:g}",
        manifest.inputs["finetuned"],
        f"{meaning}\n\nMade by liborth {manifest.liborth} from {made}.\n\n"
        f"## What was measured\n\n{_measured([])}\n\n{VERIFY}\n",
        card,
    )


def export_card(manifest: Export, card: UserCard = NOBODYS) -> str:
    """Render the card of what `export` wrote."""
    form, facts, base = manifest.parameters.to, manifest.facts, manifest.inputs["base"]
    adapter = ""
    if form in ("peft", "gguf-lora"):
        adapter = (
            f"A LoRA adapter of rank {facts.get('rank')} for PEFT, Transformers and vLLM (`--max-lora-rank "
            f"{facts.get('max_lora_rank')}`); {facts.get('lost'):.2g} of the update's ‖U‖² is not in it. On random tokens it "
            f"is {facts.get('self_test'):.1e} nats a token from the checkpoint it stands for."
        )
    meaning = {
        "peft": adapter,
        "gguf-lora": f"{adapter} `adapter.gguf` is the same for llama.cpp (`--lora`).",
        "task-vector": "Differences of weights, tensor by tensor: add them to the checkpoint they were subtracted from.",
        "mergekit": "A recipe for `mergekit-yaml`: at weight 1 its output is the general checkpoint. Models not on the "
        "hub are named by their directories: run it where these lie.",
    }[form]
    whose = (
        "**PRIVATE: it is the memory, and may recite private text.** Do not publish it."
        if manifest.private
        else ("It holds the *skill* part only.")
    )
    return _render(
        "Memory" if manifest.private else "Skill",
        base,
        f"{meaning}\n\n{whose}\n\nMade by liborth {manifest.liborth}, to be attached to {_cell(base.title)}.\n\n"
        f"## What was measured\n\n{_measured([])}\n\n{VERIFY}\n",
        card,
    )


def tune_card(manifest: Tune, card: UserCard = NOBODYS) -> str:
    """Render the card of what `tune` wrote."""
    method = manifest.parameters.method
    mixed = "nothing is kept apart, so **it may recite what it was trained on: treat it as private**"
    meaning = {
        "full": f"every weight was trained; {mixed}",
        "lora": f"low-rank updates were trained and merged; {mixed}",
        "ogd": "this checkpoint is the base itself; what was learnt lies in the memory, orthogonal to what the base uses",
        "sinks": "the general stream; the neurons that were added for memory lie in the memory",
    }[method]
    source = manifest.inputs["reference"]
    return _render(
        "General checkpoint" if manifest.memory else "Fine-tuned checkpoint",
        source,
        f"""Made by liborth {manifest.liborth} from {_cell(source.title)} with `liborth tune --method {method}`: {meaning}.

## What was measured

The losses while it was trained stand in `training.json`. {_measured([])}

{VERIFY}

{ELSEWHERE if manifest.memory else ""} What was asked for stands in `liborth.manifest.json`.
""",
        UserCard(card.head),  # the text of a base describes the base
    )


def _measured(sentences: Iterable[str]) -> str:
    found = "".join(f"- {_cell(sentence)}\n" for sentence in sentences)
    lead = found or "Nothing was measured about what this checkpoint still recites.\n"
    return f"{lead}\nNot tried when this was written: {NOT_TRIED}."


def _rows(rows: Iterable[Iterable[object]]) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _render(title: str, source: Input, body: str, card: UserCard) -> str:
    base = {"base_model": source.title} if source.commit else {}
    tags = card.head.get("tags")
    known = [tag for tag in tags if tag != TAG] if isinstance(tags, list) else [tags] if isinstance(tags, str) else []
    carried = {key: value for key, value in card.head.items() if key != "tags"}
    text = f"# {title}\n\n{body}"
    if card.text:
        text += f"\n{FOLLOWS}\n\n{card.text}\n"
    return with_head({**base, **carried, "tags": [*known, TAG]}, text)


@dataclass(frozen=True)
class Evaluated:
    """One requirement of a certificate, and what was measured.

    Attributes:
        text: as it was asked, such as "leak<=0.4".
        met: None where that could not be decided.
        value: None where it was not measured.
        interval: of 95 %; None where there is none.
        meaning: one sentence, with the unit.
    """

    text: str
    met: bool | None
    value: float | None
    interval: tuple[float | None, float | None]
    meaning: str

    @property
    def metric(self) -> str:
        """The metric's name."""
        return re.split("[<>=]", self.text)[0].rpartition(".")[2].strip()


@dataclass(frozen=True)
class Evidence:
    """What a certificate says of a checkpoint.

    Attributes:
        outcome: "passed", "failed" or "no decision".
        sentence: its first.
        evaluated: the requirements.
        rows: what was measured on, by name.
        not_tried: what was not.
    """

    outcome: str
    sentence: str
    evaluated: list[Evaluated]
    rows: dict[str, int]
    not_tried: list[str]


def verified_card(text: str, evidence: Evidence) -> str:
    """Add to a card what a certificate measured: a section, and evaluation results that the hub shows.

    Args:
        text: the card as it lies beside the weights.
        evidence: of these very weights.
    """
    try:
        head, body = cut(text)
    except ValueError:
        head, body = {}, text
    lines = [
        (f"`{_cell(one.text)}`", _cell(one.meaning), _number(one.value), _interval(one), WORDS[one.met])
        for one in evidence.evaluated
    ]
    rows = ", ".join(f"{_cell(name)}: {count} rows" for name, count in evidence.rows.items()) or "no rows"
    word, left = evidence.outcome.upper(), _cell(", ".join(evidence.not_tried))
    section = f"""## How it was verified

**{word}.** {_cell(evidence.sentence.removeprefix(f"{word}: "))}

| requirement | what it is | measured | 95 % interval | |
|---|---|---|---|---|
{_rows(lines)}
Measured on {rows} that are not published here. Not tried: {left or "nothing was left out"}.
"""
    ours, mark, users = body.partition(FOLLOWS)
    before, heading, after = ours.partition("\n## What was measured\n")
    placed = f"{before}\n{section}{heading}{after}" if heading else f"{ours.rstrip()}\n\n{section}"
    return with_head({**head, "model-index": _index(head, evidence)}, (placed + mark + users).lstrip("\n"))


def _index(head: Mapping[str, Json], evidence: Evidence) -> list[Json]:
    metrics: list[Json] = [
        {
            "type": one.metric, "name": one.text, "value": one.value, "verified": False,
            "args": {"interval_95": list(one.interval), "met": one.met, "meaning": one.meaning},
        }
        for one in evidence.evaluated
        if one.value is not None
    ]  # fmt: skip
    if not metrics:
        return []
    name = str(head.get("model_name") or "general checkpoint")
    data = {"name": "rows that must be gone, rows never trained on, and held-out text of the skill", "type": "private"}
    return [{"name": name, "results": [{"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}]}]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _interval(one: Evaluated) -> str:
    low, high = one.interval
    if low is None or high is None:
        return ""
    return "exact" if low == high == one.value else f"{low:.4g} to {high:.4g}"


def with_head(head: Mapping[str, Json], text: str) -> str:
    """Put a card together from its head and its text."""
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---\n\n{text}"


def _cell(text: str) -> str:
    return "".join(c for c in text if c.isprintable()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
