"""`generate`: write on from prompts without the memory, with it, guarded or routed (`liborth_cli.decode`)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli.console import JsonObject
from liborth_cli.errors import BadInput, UsageError

if TYPE_CHECKING:
    from liborth_cli.console import Console
    from liborth_cli.machine import Run

LEAST, MOST = 1e-3, 1e3
"""Temperatures between the likeliest token and all alike, beyond which float32 says neither."""


class Stream(StrEnum):
    """Whether the memory speaks."""

    OFF = "off"
    ON = "on"
    GUARDED = "guarded"
    ROUTED = "routed"


@dataclass(frozen=True)
class GenerateRequest:
    """What is written on from, and how.

    Attributes:
        model: output of `liborth split` or `liborth tune`.
        prompts: texts.
        file: more of them, a file of records with a prompt each; None: there is none.
        stream: whether the memory speaks.
        threshold: τ of `Stream.GUARDED`, nats, −inf and inf too; None: measured on `retain` or `fresh`.
        retain: files of texts of the skill.
        fresh: file of rows like the records that nobody trained on.
        memory: directory or file; None: beside the model.
        most: tokens to write at most.
        temperature: 0 takes the likeliest token.
        seed: of what is drawn.
    """

    model: str
    prompts: Sequence[str] = ()
    file: str | None = None
    stream: Stream = Stream.OFF
    threshold: float | None = None
    retain: Sequence[str] = ()
    fresh: str | None = None
    memory: Path | None = None
    most: int = 128
    temperature: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError when options contradict each other."""
        levels = sum(given is not None for given in (self.threshold, self.retain or None, self.fresh))
        if self.stream == Stream.GUARDED and levels != 1:
            raise UsageError(
                "--memory guarded needs one of --retain-data FILE (text of the skill), --fresh FILE, --threshold NATS"
            )
        if self.stream != Stream.GUARDED and levels:
            raise UsageError("--threshold, --retain-data and --fresh are read with --memory guarded only")
        if self.threshold is not None and math.isnan(self.threshold):
            raise UsageError("--threshold takes a number of nats, -inf or inf, not nan")
        if self.temperature and not LEAST <= self.temperature <= MOST:
            raise UsageError(f"--temperature is 0, for the likeliest token, or a number from {LEAST:g} to {MOST:g}")


@dataclass(frozen=True)
class Generated:
    """What was written.

    Attributes:
        stream: whether the memory spoke.
        prompts: what was written on from.
        texts: what follows each.
        threshold: of the guard, nats; None without one.
        held: tokens at which the general model spoke in the memory's place.
        tokens: how many were written.
        seconds: that it took.
    """

    stream: Stream
    prompts: list[str]
    texts: list[str]
    threshold: float | None
    held: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        """Return every prompt with what follows."""
        return "\n".join(ask + text for ask, text in zip(self.prompts, self.texts, strict=True))

    def to_json(self) -> JsonObject:
        """Return a JSON object."""
        finite = self.threshold is None or math.isfinite(self.threshold)
        return {
            "memory": self.stream.value,
            "threshold": self.threshold if finite else str(self.threshold),
            "held": self.held,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "texts": [{"prompt": ask, "text": text} for ask, text in zip(self.prompts, self.texts, strict=True)],
        }


def generate_texts(request: GenerateRequest, run: Run, console: Console) -> Generated:
    """Write on from prompts.

    Args:
        request: what is asked.
        run: device and threads.
        console: where notes go.

    Raises:
        LiborthError: the leaf says which.
    """
    import torch

    from liborth_cli import decode
    from liborth_cli.attachment import check_listed
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.measure.generate import Sampling, generate, hold
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.weights import Point
    from liborth_cli.verify.rows import Reader

    request.check()
    asked = [*request.prompts, *(decode.read_prompts(request.file) if request.file else [])]
    if not asked and request.file:
        raise BadInput(f"{request.file}: no prompt in it")
    if not asked:
        raise UsageError("nothing to go on from: give --prompt TEXT, or --prompts FILE")
    source, threshold, tally, begin = resolve(request.model), request.threshold, decode.Tally(), None
    with ExitStack() as stack:
        weights = Point(stack.enter_context(Checkpoint.open(source.path)))
        network = BlockModel(weights, torch.float32, run.device)
        stack.callback(network.close)
        hold(network, weights)
        reader = Reader(source.path if source.path.is_dir() else source.path.parent, lambda: network, tell=console.note)
        encoder = reader.tokenizer("prompt")
        check_listed(weights.finetuned)
        if request.stream != Stream.OFF:
            memory = stack.enter_context(decode.open_attachment(source.path, request.memory, network.model))
            if request.stream == Stream.ON:
                begin = decode.with_memory(memory)
            elif request.stream == Stream.ROUTED:
                decode.check_routed(memory)
                begin = decode.guarded(memory, None, tally)
            else:
                if threshold is None:
                    fresh = request.fresh
                    level = reader.pairs(fresh, "--fresh") if fresh else reader.text(list(request.retain), "--retain-data")
                    threshold = decode.measured_threshold(network, memory, level.rows)
                    console.note(f"threshold: {threshold:.3f} nats")
                begin = decode.guarded(memory, threshold, tally)
        started, prompts = time.perf_counter(), [encoder.prompt(text) for text in asked]
        found = generate(network, prompts, request.most, Sampling(request.temperature, request.seed), begin=begin)
        seconds = time.perf_counter() - started
    full = sum(bool(network.context) and len(a) + len(b) >= network.context for a, b in zip(prompts, found, strict=True))
    if full:
        console.note(f"{full} of {len(found)} texts end where the model's context of {network.context:,} tokens is full")
    if request.stream in (Stream.GUARDED, Stream.ROUTED):
        console.note(f"held back: {tally.held:,} of {tally.tokens:,} tokens, where the general model spoke")
    texts = [decode.continuation(encoder, ids, more) for ids, more in zip(prompts, found, strict=True)]
    return Generated(request.stream, asked, texts, threshold, held=tally.held, tokens=sum(map(len, found)), seconds=seconds)
