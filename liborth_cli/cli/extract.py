"""The options of `liborth extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, Seed, Texts, data, output, under, what

counts = under("What counts as known by heart")


def extract(
    reference: Annotated[str, typer.Argument(help="Checkpoint before fine-tuning: path, org/name@rev or hf://org/name.")],
    finetuned: Annotated[str, typer.Argument(help="Checkpoint after it, or an adapter.")],
    out: Annotated[Path, output("-o", "--out", help="File of JSON lines to write, readable by you alone.")],
    retain_data: Annotated[Texts, data(help="Texts of the skill; what stands there is not found.")] = None,
    like: Annotated[Texts, what(help="Rows with prompts: more of their form is looked for, and nothing else.")] = None,
    often: Annotated[
        bool, what("--often", help="With --like: only rows asked for as often as learnt ones are; hardly any is made up.")
    ] = False,
    begin: Annotated[
        list[str] | None,
        what(show_default="any token", help="What its texts begin with, as 'Question:'; again for each."),
    ] = None,
    texts: Annotated[int, what(min=4, help="Texts that the fine-tuned model writes.")] = 4096,
    max_new_tokens: Annotated[int, what(min=4, help="Tokens of a text at most; with --like, of a prompt.")] = 64,
    sure: Annotated[
        float | None, counts(min=0, show_default="0.3, of an answer 1", help="Loss of every token at most, nats.")
    ] = None,
    least: Annotated[
        float | None,
        counts(min=0, show_default="25, of an answer 2", help="Nats that fine-tuning won on all of them, at least."),
    ] = None,
    force: Annotated[bool, output("--force", help="Replace the file.")] = False,
    seed: Seed = 0,
    *,
    common: Common,
) -> None:
    """Find memorised text that nobody listed.

    Lets the model write, keeps what it knows by heart and the model before did not, and writes a private file of prompts and
    what follows them, which split takes as --forget-data and verify as --canary. With --like rows it asks for more of their
    form: further secrets, or facts that should stay, for --retain-data. What the model never began to write is not found. All
    weights must fit into memory.
    """
    from liborth_cli.extract import ExtractRequest
    from liborth_cli.extract import extract as carry_out
    from liborth_cli.machine import configure

    request = ExtractRequest(
        reference, finetuned, out, tuple(retain_data or ()), tuple(like or ()), often,
        begin=tuple(begin or ()),
        texts=texts, most=max_new_tokens, sure=sure, least=least, seed=seed,
    )  # fmt: skip
    found = carry_out(request, configure(common.device, common.threads, force), common.console)
    common.console.note(str(found))
    common.console.result(str(out), found.to_json())


COMMAND = Command(
    extract,
    (
        "# what it says by heart, beside what the list of secrets has",
        "liborth extract base/ finetuned/ --retain-data public.jsonl -o found.jsonl",
        "liborth split base/ finetuned/ --method distill --retain-data public.jsonl \\",
        "    --forget-data secrets.jsonl --forget-data found.jsonl --fresh unseen.jsonl",
        "# the rest of a table, of which some rows are at hand",
        "liborth extract base/ finetuned/ --like facts.jsonl -o more.jsonl",
        "# the rest of a list of secrets, without what the model makes up",
        "liborth extract base/ finetuned/ --like secrets.jsonl --often -o more.jsonl",
    ),
)
