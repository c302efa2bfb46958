"""The options of `liborth export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.command import Command
from liborth_cli.cli.options import Common, Out, Seed, named_after, output, under, what
from liborth_cli.export.request import ExportRequest, Form, Part

adapter = under("--to peft and gguf-lora")


def export(
    model: Annotated[str, typer.Argument(help="Output of `liborth split`.")],
    to: Annotated[
        Form, what("--to", help="LoRA adapter (for llama.cpp too), differences of weights, or a recipe for mergekit.")
    ],
    part: Annotated[Part, what(help="General − reference, or fine-tuned − general (private).")] = Part.SKILL,
    reference: Annotated[str | None, what(show_default="as the manifest says", help="Checkpoint before fine-tuning.")] = None,
    memory: Annotated[Path | None, what(show_default="MODEL.private", help="Memory directory or file.")] = None,
    rank: Annotated[
        int | None, adapter(min=1, max=4096, show_default="the smallest that holds the update", help="Of every layer.")
    ] = None,
    whole: Annotated[
        bool, adapter("--whole", help="Carry changed norms and tables whole (modules_to_save): not for vLLM.")
    ] = False,
    lossy: Annotated[
        bool, adapter("--lossy", help="Write it also where it does not stand for the checkpoint; its card says by how much.")
    ] = False,
    out: Out = None,
    seed: Seed = 0,
    force: Annotated[bool, output("--force", help="Replace an earlier output of liborth.")] = False,
    *,
    common: Common,
) -> None:
    """Write what other tools read: the skill or the memory by itself.

    An adapter is held against the checkpoint it stands for, and refused (exit 5) when it is more than 1e-3 nats a token away.
    """
    from liborth_cli.export.export import export as carry_out
    from liborth_cli.machine import configure

    target = out or Path(f"{named_after(model)}-{part.value}-{to.value}")
    request = ExportRequest(
        model, to, target, part=part, reference=reference, memory=memory, rank=rank, whole=whole, lossy=lossy, seed=seed
    )
    made = carry_out(request, configure(common.device, common.threads, force), common.console)
    common.console.result(str(target), {"output": str(target), "manifest": made.document})


COMMAND = Command(
    export,
    (
        "# serve the skill on the base you already serve",
        "liborth export general/ --to peft -o skill-adapter/",
        "# the memory, for those who may see it: attach it to the general checkpoint",
        "liborth export general/ --to peft --part memory -o memory-adapter/",
        "# for llama.cpp: llama-cli -m base.gguf --lora skill-gguf/adapter.gguf",
        "liborth export general/ --to gguf-lora -o skill-gguf/",
        "liborth export general/ --to task-vector -o skill-vector/",
        "# then: mergekit-yaml recipe/mergekit.yml merged/",
        "liborth export general/ --to mergekit -o recipe/",
    ),
)
