"""The options of `liborth excise`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Out, Sign, Writing, named_after, under, what

EXPERIMENT = under("Experiment: another way between the two")


class Way(StrEnum):
    """How one gets from the general to the fine-tuned checkpoint."""

    STRAIGHT = "straight"
    GEODESIC = "geodesic"


def excise(
    model: Annotated[str, typer.Argument(help="Output of `liborth split` or `liborth tune`.")],
    beta: Annotated[float, what(help="How much memory: 0 none, 1 all of it (bit for bit), any number between or beyond.")],
    out: Out = None,
    memory: Annotated[
        Path | None, what(show_default="MODEL.private, or MODEL itself", help="Memory directory or file.")
    ] = None,
    alpha: Annotated[float | None, what(show_default="as split", help="Factor on the skill part; needs --reference.")] = None,
    reference: Annotated[str | None, what(help="Checkpoint before fine-tuning, for --alpha.")] = None,
    unverified: Annotated[
        bool, what("--unverified", help="Go on where no manifest vouches for the files; the output says so.")
    ] = False,
    path: Annotated[
        Way, EXPERIMENT(help="straight, or the geodesic of the retain curvature, which needs it at both ends.")
    ] = Way.STRAIGHT,
    retain_general: Annotated[Path | None, EXPERIMENT(help="geodesic: factors of MODEL, from `liborth curvature`.")] = None,
    retain_finetuned: Annotated[Path | None, EXPERIMENT(help="geodesic: factors of the fine-tuned model.")] = None,
    sign: Sign = None,
    *,
    common: Writing,
) -> None:
    """Write the checkpoint with as much memory as asked for.

    --beta 0 is the general checkpoint, for which the memory is not read; --beta 1 the fine-tuned one, bit for bit.
    """
    from liborth_cli.console import size
    from liborth_cli.errors import UsageError
    from liborth_cli.excise.excise import excise_checkpoint
    from liborth_cli.excise.request import ExciseOptions, ExciseRequest, Means, Outline

    sets = tuple(one for one in (retain_general, retain_finetuned) if one is not None)
    if (path is Way.GEODESIC) != (len(sets) == 2) or (sets and path is Way.STRAIGHT):
        raise UsageError(
            "--path geodesic goes with --retain-general and --retain-finetuned: factors of the same texts at both ends"
        )
    target = out or Path(f"{named_after(model)}-beta{beta:g}")
    options = ExciseOptions(beta, alpha, common.shard_bytes, unverified, sign)
    request = ExciseRequest(model, target, options, memory, reference=reference, geodesic=sets, dry_run=common.dry_run)
    means = Means(common.force, common.resume, common.threads, common.world, common.gather)
    made = excise_checkpoint(request, means, common.console)
    if isinstance(made, Outline):
        text = f"would write {len(made.files)} weight files, {size(made.disk_bytes)} in all, to {target}"
        common.console.result(text, {"output": str(target), "files": made.files, "disk_bytes": made.disk_bytes})
    elif made is not None:
        common.console.result(str(target), {"output": str(target), "manifest": made.document})


COMMAND = Command(
    excise,
    (
        "# the general checkpoint; the memory is not read",
        "liborth excise general/ --beta 0 -o clean/",
        "# the fine-tuned checkpoint, bit for bit",
        "liborth excise general/ --beta 1 -o restored/",
        "# half of the memory",
        "liborth excise general/ --beta 0.5 --memory general.private/ -o half/",
    ),
    "weight files that are finished are kept",
    ranks=True,
)
