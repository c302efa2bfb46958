"""The options of `liborth generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, Seed, TextFile, Texts, under
from liborth_cli.generate import GenerateRequest, Stream, generate_texts

WHAT, HOW = under("What is asked"), under("How the memory speaks")


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
    from liborth_cli.machine import configure

    request = GenerateRequest(
        model, prompts=tuple(prompt or ()), file=prompts, stream=memory, threshold=threshold,
        retain=tuple(retain_data or ()), fresh=fresh, memory=memory_path,
        most=max_new_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    request.check()  # before torch is imported
    found = generate_texts(request, configure(common.device, common.threads), common.console)
    common.console.result(str(found), found.to_json())


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
