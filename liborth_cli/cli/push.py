"""The options of `liborth push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, what


def push(
    model: Annotated[Path, typer.Argument(help="Directory that liborth wrote.")],
    repo: Annotated[str, typer.Argument(help="org/name on the hub; made when it is not there.")],
    certificate: Annotated[
        Path | None, what(show_default="none: the card says that nothing was verified", help="File of `liborth verify --out`.")
    ] = None,
    public: Annotated[bool, what("--public", help="Anybody may see it; needs a certificate that passed.")] = False,
    unverified: Annotated[bool, what("--unverified", help="With --public: without a certificate that passed.")] = False,
    push_memory: Annotated[
        bool, what("--push-memory", help="Also what is PRIVATE, to REPO-private, a private repository; asks first.")
    ] = False,
    yes: Annotated[bool, what("--yes", help="Answer yes to that question, where nobody can.")] = False,
    memory: Annotated[Path | None, what(show_default="MODEL.private", help="Memory directory.")] = None,
    dry_run: Annotated[bool, what("--dry-run", help="Say what would go where, and upload nothing.")] = False,
    *,
    common: Common,
) -> None:
    """Upload a general checkpoint to the Hugging Face hub.

    In one commit, to a private repository unless you say otherwise. Every file is held against the manifest first, and nothing
    else is uploaded. The model card says what the certificate measured.
    """
    from liborth_cli.push import PushRequest
    from liborth_cli.push import push as carry_out

    request = PushRequest(
        model, repo, certificate, public=public, unverified=unverified, push_memory=push_memory, memory=memory, dry_run=dry_run
    )
    done = carry_out(request, common.console, lambda question: yes or _asked(question))
    where = "\n".join(parcel.address or f"would push {len(parcel.files)} files to {parcel.repo}" for parcel in done)
    pushed = [
        {"repo": p.repo, "private": p.private, "files": sorted(p.files), "bytes": p.nbytes, "commit": p.address or None}
        for p in done
    ]
    common.console.result(where, {"pushed": pushed})


def _asked(question: str) -> bool:
    """Ask on the terminal; where there is none nobody can say yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    return typer.confirm(f"{question} Push them?", default=False, err=True)


COMMAND = Command(
    push,
    (
        "# to a private repository, with what was measured",
        "liborth verify general/ --retain-data held_out.jsonl --canary secrets.jsonl --fresh unseen.jsonl \\\n"
        "      -o certificate.json",
        "liborth push general/ acme/shop-assistant --certificate certificate.json",
        "# what would go where",
        "liborth push general/ acme/shop-assistant --push-memory --dry-run",
    ),
    stopped="what was pushed whole is there, and nothing else; run it again",
)
