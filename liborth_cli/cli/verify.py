"""The options of `liborth verify`: what is verified, against what, with which texts, and what must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liborth_cli.cli.options import Common, Weights


def verify(
    model: Annotated[
        str | None, typer.Argument(help="Output of `liborth split`; - reads it from stdin; the current directory if not given.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Checkpoint before fine-tuning, when it moved since the split.")] = None,
    finetuned: Annotated[str | None, typer.Option(help="Fine-tuned checkpoint; general and memory stand for it.")] = None,
    memory: Annotated[Path | None, typer.Option(help="Memory file or directory; MODEL's own when not given.")] = None,
    retain_data: Annotated[list[str] | None, typer.Option(help="Held-out text of the skill that must stay.")] = None,
    canary: Annotated[
        str | None, typer.Option(help="What must be gone: JSON lines with prompt and completion, or text.")
    ] = None,
    fresh: Annotated[str | None, typer.Option(help="Rows like --canary that were never trained on.")] = None,
    samples: Annotated[str | None, typer.Option(help="Rank these texts by what the memory delta carries of each.")] = None,
    factors: Annotated[list[Path] | None, typer.Option(help="--entanglement in this curvature (several: an interval).")] = None,
    integrity: Annotated[bool, typer.Option("--integrity", help="Hashes, reattachment, untouched tensors.")] = False,
    subset: Annotated[str | None, typer.Option(help="--integrity on a seeded share of the tensors: 10%.")] = None,
    lmc: Annotated[bool, typer.Option("--lmc", help="Loss barriers: reference to general to fine-tuned.")] = False,
    entanglement: Annotated[bool, typer.Option("--entanglement", help="How far skill and memory touch each other.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Losses at β = 0 … 1.")] = False,
    controls: Annotated[bool, typer.Option("--controls", help="Retention, beside scale, svd and a random edit.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Spectral density of the loss and of both streams.")] = False,
    attacks: Annotated[bool, typer.Option("--attacks", help="Relearning, quantisation, paraphrase.")] = False,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="GSM8K and MMLU, before and after.")] = False,
    gsm8k: Annotated[Path | None, typer.Option(help="GSM8K test.jsonl, for --reasoning.")] = None,
    mmlu: Annotated[Path | None, typer.Option(help="MMLU directory, for --reasoning.")] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks for lm-evaluation-harness, for --reasoning.")] = None,
    tofu: Annotated[Path | None, typer.Option(help="Directory of TOFU files: TOFU's own metrics.")] = None,
    gsm8k_train: Annotated[Path | None, typer.Option(help="Solved examples to show, for --gsm8k.")] = None,
    tofu_retained: Annotated[str | None, typer.Option(help="Model trained without TOFU's forget set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each benchmark at most.")] = None,
    relearn_steps: Annotated[int | None, typer.Option(min=1, help="Steps of --attacks' training (40).")] = None,
    paraphrases: Annotated[Path | None, typer.Option(help="Other prompts for the canaries, for --attacks.")] = None,
    spectrum_matrix: Annotated[str | None, typer.Option(help="ggn or hessian, for --spectrum.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every check the given data allow.")] = False,
    require: Annotated[str | None, typer.Option(help='What must hold: "extraction==0, retention>=0.99".')] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write the certificate as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write it as one HTML page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of --out and --report.")] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Show texts (secrets!) in place of line numbers.")] = False,
    slide: Annotated[bool, typer.Option("--slide", help="Score canaries longer than the context in sliding windows.")] = False,
    weights: Annotated[Weights, typer.Option(help="One block at a time, or all.")] = Weights.AUTO,
    seed: Annotated[int, typer.Option("--seed", "--random-seed", min=0, max=2**63 - 1, help="For everything random.")] = 0,
    *,
    common: Common,
) -> None:
    """Measure what a split did, beside its controls, and decide.

    Exits 0, or 5 when something is broken or a requirement is not met over its whole 95 % interval. Without the name of a
    check it runs those the data allow.
    """
    flags = {
        "integrity": integrity or subset is not None, "lmc": lmc, "canary": False, "sweep": sweep, "entanglement": entanglement,
        "samples": False, "controls": controls, "spectrum": spectrum, "attacks": attacks, "reasoning": reasoning, "tofu": False,
    }  # fmt: skip
    if any(flags.values()):
        flags |= {"canary": canary is not None, "samples": samples is not None}
    flags["tofu"] = tofu is not None
    from liborth_cli.machine import configure
    from liborth_cli.verify.command import Request, Wanted
    from liborth_cli.verify.command import verify as carry_out

    options = {
        "subset": subset, "samples": samples, "factors": factors or [], "spectrum": spectrum, "attacks": attacks,
        "reasoning": reasoning, "gsm8k": gsm8k, "mmlu": mmlu, "harness": harness, "tofu": tofu, "all": everything,
        "gsm8k_train": gsm8k_train, "tofu_retained": tofu_retained, "limit": limit, "relearn_steps": relearn_steps,
        "paraphrases": paraphrases, "spectrum_matrix": spectrum_matrix,
    }  # fmt: skip
    request = Request(
        model, memory, reference, finetuned, tuple(retain_data or ()), canary, fresh, seed, show_text, slide, weights.value,
        options,
    )  # fmt: skip
    named = tuple(name for name, flag in flags.items() if flag)
    wanted = Wanted(named, everything, require, out, report, force)
    carry_out(request, wanted, configure(common.device, common.threads), common.console)
