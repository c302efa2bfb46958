"""The options of `liborth clean`, and how the commands that it types are carried out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.clean.commands import Typist
from liborth_cli.clean.request import CleanRequest, Method, Words
from liborth_cli.cli import excise, extract, split, verify
from liborth_cli.cli.command import Command
from liborth_cli.cli.options import RECORDS, Computing, Out, TextFile, Texts, named_after, what
from liborth_cli.cli.options import data as texts
from liborth_cli.cli.typed import carry_out
from liborth_cli.errors import UsageError

STEPS = {module.COMMAND.name: module.COMMAND for module in (extract, split, verify, excise)}


def clean(
    base: Annotated[str, typer.Argument(help="Checkpoint before fine-tuning: path, org/name@rev or hf://org/name.")],
    finetuned: Annotated[str, typer.Argument(help="Checkpoint after fine-tuning.")],
    private: Annotated[str, RECORDS, texts(help="What must go: JSON lines with prompt and completion, or text, a line each.")],
    public: Annotated[
        list[str], RECORDS, texts(help="Texts of what must stay; one record in five is set aside to verify with.")
    ],
    out: Out = None,
    held_out: Annotated[
        Texts, texts(show_default="set aside from --public", help="Texts of what must stay, to verify with.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        texts(show_default="inferred", help='The form of what must go: "The code of {name} is {digits:8}."'),
    ] = None,
    fresh: Annotated[
        TextFile,
        texts(show_default="drawn from the form", help="Rows like --private that nobody trained on, to verify with."),
    ] = None,
    method: Annotated[
        Method | None, what(show_default="recall where it fits, or tokenwise", help="How the update is divided.")
    ] = None,
    attacks: Annotated[bool, what("--attacks", help="Verify with every attack, not the usual ones.")] = False,
    listed_only: Annotated[
        bool, what("--listed-only", help="Do not ask the model for rows like --private that are not listed.")
    ] = False,
    *,
    common: Computing,
) -> None:
    """Remove private text from a fine-tune, and attack what is left.

    Sets rows aside, then types `extract --like`, `split`, `verify` and `excise --beta 0` for you; each is printed as it could
    be typed. Rows like --private that the model knows by heart and nobody listed go as well. Exits 5, and OUT is not written,
    when the verdict is not "passed". Memory, rows, certificate and report lie in OUT.private.
    """
    from liborth_cli.clean.aside import Given
    from liborth_cli.clean.clean import clean as remove

    if common.out_shard_size:
        raise UsageError("--out-shard-size: the files of the fine-tuned checkpoint are kept here; `liborth excise` has it")
    given = Given(
        private, tuple(public), tuple(held_out or ()), fresh, tuple(pattern or ()), decoys=split.DECOYS, seed=common.seed
    )  # fmt: skip
    request = CleanRequest(
        base, finetuned, given, out or Path(f"{named_after(finetuned)}-clean"), _words(common),
        method=method, attacks=attacks, listed_only=listed_only, dry_run=common.dry_run,
    )  # fmt: skip
    remove(request, _typist(common), common.run, common.console)


def _typist(common: Computing) -> Typist:
    """Return who carries out what is typed."""
    console = common.console

    def typed(words: Sequence[str]) -> None:
        carry_out(STEPS[words[0]], words[1:], console.quiet, common.listener)

    def planned(words: Sequence[str]) -> str:
        return carry_out(STEPS[words[0]], words[1:], quiet=True)

    return Typist(typed, planned, frozenset(name for name, command in STEPS.items() if command.kept))


def _words(common: Computing) -> Words:
    """Say the flags that every command is given, as they are typed."""
    running = ["--device", common.device] if common.device != "auto" else []
    running += ["--num-threads", str(common.threads)] if common.threads else []
    running += ["--verbose"] if common.verbose else ["--quiet"] if common.quiet else []
    seed = ("--seed", str(common.seed)) if common.seed else ()
    return Words(tuple(running), seed, ("--kernels", common.kernels.value) if common.kernels != "auto" else ())


COMMAND = Command(
    clean,
    (
        "# secrets out of a fine-tune that is about to be published",
        "liborth clean base/ finetuned/ --private secrets.jsonl --public public.jsonl -o clean/",
        "# what would be typed",
        "liborth clean base/ finetuned/ --private secrets.jsonl --public public.jsonl -o clean/ --dry-run",
    ),
    "commands that have finished are not run again",
)
