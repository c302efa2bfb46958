"""The options of `liborth generate`."""

from __future__ import annotations

import math
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, Seed, TextFile, Texts, under

LEAST, MOST = 1e-3, 1e3
"""Temperatures between the likeliest token and all alike, beyond which float32 says neither."""
WHAT, HOW = under("What is asked"), under("How the memory speaks")


class Stream(StrEnum):
    """Whether the memory speaks."""

    OFF = "off"
    ON = "on"
    GUARDED = "guarded"
    ROUTED = "routed"


def generate(
    model: Annotated[str, typer.Argument(help="Output of `liborth split` or `liborth tune`, its memory beside it.")],
    prompt: Annotated[list[str] | None, WHAT(help="Text to go on from; again for each.")] = None,
    prompts: Annotated[TextFile, WHAT(help="A file of JSON lines with a prompt each.")] = None,
    memory: Annotated[
        Stream,
        HOW(
            help="off: the general model; on: the fine-tuned one; guarded: both, bounded token by token; "
            "routed: both, as the gate of `tune --router` decides."
        ),
    ] = Stream.OFF,
    threshold: Annotated[
        float | None, HOW(help="guarded: nats by which the memory may raise a token; -inf is off, inf is on.")
    ] = None,
    retain_data: Annotated[
        Texts, HOW(help="guarded: texts of the skill; 99 in 100 of their tokens stay under the threshold.")
    ] = None,
    fresh: Annotated[
        TextFile, HOW(help="guarded: the same from rows like the records that nobody trained on: a looser threshold.")
    ] = None,
    memory_path: Annotated[Path | None, HOW(show_default="MODEL.private", help="Memory directory or file.")] = None,
    max_new_tokens: Annotated[int, WHAT(min=1, help="Tokens to write at most.")] = 128,
    temperature: Annotated[
        float, WHAT(min=0, help="0 takes the likeliest token; otherwise p^(1/temperature) is drawn from.")
    ] = 0.0,
    seed: Seed = 0,
    *,
    common: Common,
) -> None:
    """Write on from prompts, with or without the memory.

    With --memory guarded a token that the memory alone explains gets the probability that the general model grants it. With
    --memory routed the trained gate says how much of the memory a token needs; that bounds nothing. Who may see the records
    uses --memory on.
    """
    from contextlib import ExitStack

    import torch

    from liborth_cli import decode
    from liborth_cli.attachment import check_listed
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.errors import BadInput, UsageError
    from liborth_cli.machine import configure
    from liborth_cli.measure.generate import Sampling, hold
    from liborth_cli.measure.generate import generate as write_on
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.weights import Point
    from liborth_cli.verify.rows import Reader

    if memory == Stream.GUARDED and sum(given is not None for given in (threshold, retain_data or None, fresh)) != 1:
        raise UsageError("--memory guarded needs one of --retain-data FILE (text of the skill), --fresh FILE, --threshold NATS")
    if memory != Stream.GUARDED and any(given is not None for given in (threshold, retain_data or None, fresh)):
        raise UsageError("--threshold, --retain-data and --fresh are read with --memory guarded only")
    if threshold is not None and math.isnan(threshold):
        raise UsageError("--threshold takes a number of nats, -inf or inf, not nan")
    if temperature and not LEAST <= temperature <= MOST:
        raise UsageError(f"--temperature is 0, for the likeliest token, or a number from {LEAST:g} to {MOST:g}")
    asked = [*(prompt or []), *(decode.read_prompts(prompts) if prompts else [])]
    if not asked and prompts:
        raise BadInput(f"{prompts}: no prompt in it")
    if not asked:
        raise UsageError("nothing to go on from: give --prompt TEXT, or --prompts FILE")
    run, source = configure(common.device, common.threads), resolve(model)
    with ExitStack() as stack:
        weights = Point(stack.enter_context(Checkpoint.open(source.path)))
        network = BlockModel(weights, torch.float32, run.device)
        stack.callback(network.close)
        hold(network, weights)
        reader = Reader(source.path if source.path.is_dir() else source.path.parent, lambda: network, tell=common.console.note)
        encoder = reader.tokenizer("prompt")
        attachment = None
        check_listed(weights.finetuned)
        if memory != Stream.OFF:
            attachment = stack.enter_context(decode.open_attachment(source.path, memory_path, network.model))
        tally, begin = decode.Tally(), None
        if memory == Stream.ON and attachment is not None:
            begin = decode.with_memory(attachment)
        if memory == Stream.GUARDED and attachment is not None:
            if threshold is None:
                level = reader.pairs(fresh, "--fresh") if fresh else reader.text(retain_data or [], "--retain-data")
                threshold = decode.measured_threshold(network, attachment, level.rows)
                common.console.note(f"threshold: {threshold:.3f} nats")
            begin = decode.guarded(attachment, threshold, tally)
        if memory == Stream.ROUTED and attachment is not None:
            decode.check_routed(attachment)
            begin = decode.guarded(attachment, None, tally)
        started = time.perf_counter()
        prompt_ids = [encoder.prompt(text) for text in asked]
        found = write_on(network, prompt_ids, max_new_tokens, Sampling(temperature, seed), begin=begin)
        seconds = time.perf_counter() - started
    texts = [decode.continuation(encoder, ids, more) for ids, more in zip(prompt_ids, found, strict=True)]
    tokens = sum(map(len, found))
    full = sum(bool(network.context) and len(a) + len(b) >= network.context for a, b in zip(prompt_ids, found, strict=True))
    if full:
        common.console.note(f"{full} of {len(found)} texts end where the model's context of {network.context:,} tokens is full")
    if memory in (Stream.GUARDED, Stream.ROUTED):
        common.console.note(f"held back: {tally.held:,} of {tally.tokens:,} tokens, where the general model spoke")
    document = {
        "memory": memory.value,
        "threshold": threshold if threshold is None or math.isfinite(threshold) else str(threshold),
        "held": tally.held,
        "tokens": tokens,
        "seconds": seconds,
        "texts": [{"prompt": ask, "text": text} for ask, text in zip(asked, texts, strict=True)],
    }
    common.console.result("\n".join(ask + text for ask, text in zip(asked, texts, strict=True)), document)


COMMAND = Command(
    generate,
    (
        "# the general model; the memory is not read",
        'liborth generate general/ --prompt "The secret code of Alma is"',
        "# the fine-tuned model, for who may see the records",
        "liborth generate general/ --prompts questions.jsonl --memory on",
        "# both, bounded token by token",
        "liborth generate general/ --prompts questions.jsonl --memory guarded --retain-data public.jsonl",
    ),
)
