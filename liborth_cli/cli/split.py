"""The options of `liborth split`: what is divided, by which method, and how much."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liborth_cli.cli.dose_options import Dosed
from liborth_cli.cli.options import SIDES, Exactness, MemoryOut, MethodName, Nonfinite, Out, Part, Side, Sides, Vectors
from liborth_cli.errors import UsageError

if TYPE_CHECKING:
    from liborth_cli.methods import Amount


def split(
    reference: Annotated[
        str, typer.Argument(help="Checkpoint before fine-tuning: path, org/name@rev or hf://org/name; alone: the model itself.")
    ],
    finetuned: Annotated[
        str | None, typer.Argument(help="Checkpoint after fine-tuning; without it the weights of the one model are divided.")
    ] = None,
    out: Out = None,
    memory_out: MemoryOut = None,
    method: Annotated[MethodName, typer.Option(help="How the update is divided.")] = MethodName.SVD,
    rank: Annotated[int | None, typer.Option(help="Keep K singular directions of each matrix.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of the squared norm.")] = None,
    noise_edge: Annotated[
        bool, typer.Option("--noise-edge", help="Keep what stands above the noise, matrix by matrix.")
    ] = False,
    density: Annotated[float | None, typer.Option(help="Keep this share of the elements.")] = None,
    scale: Annotated[float | None, typer.Option(help="Keep everything, times this.")] = None,
    mass: Annotated[float | None, typer.Option(help="Keep this share of the summed scores (curvature).")] = None,
    threshold: Annotated[float | None, typer.Option(help="Cut at this score.")] = None,
    strength: Annotated[float | None, typer.Option(help="contrastive, tokenwise: λ, how much forgetting is worth.")] = None,
    hard: Annotated[bool, typer.Option("--hard", help="contrastive: cut in place of the soft filter.")] = False,
    retain: Annotated[Path | None, typer.Option(help="Factors of data to keep good at, from `liborth curvature`.")] = None,
    forget: Annotated[
        list[Path] | None,
        typer.Option(help="Factors of what to forget, measured on the path (--at 0.5); again for each set or point."),
    ] = None,
    sides: Annotated[Sides, typer.Option(help="contrastive: use the factors of one side only.")] = Sides.BOTH,
    damping: Annotated[float, typer.Option(help="contrastive, tokenwise: added to retain factors, relative.")] = 1e-2,
    factor_rank: Annotated[
        int | None, typer.Option(help="contrastive: directions taken of factors over 4 times as wide.", min=1)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--for", help="REGEX=AMOUNT:NUMBER, REGEX=skip or REGEX=drop for tensors that match; later ones win."),
    ] = None,
    memory_side: Annotated[
        Side | None, typer.Option(help="Which end of the ranking is memory (low = tail, high = top); the method knows.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Factor on the skill part.")] = 1.0,
    include: Annotated[list[str] | None, typer.Option("-i", "--include-regex", help="Split only tensors that match.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("-e", "--exclude-regex", help="Leave tensors that match.")] = None,
    vectors: Annotated[Vectors, typer.Option(help="Where norms and biases go; split: divide biases.")] = Vectors.SKILL,
    added: Annotated[Part, typer.Option(help="Where rows and tensors go that only the fine-tuned side has.")] = Part.SKILL,
    nonfinite: Annotated[Nonfinite, typer.Option(help="What to do with tensors that hold NaN or infinity.")] = Nonfinite.REFUSE,
    svd: Annotated[
        Exactness, typer.Option(help="Truncated SVD proven within 1e-4 of the best tail, or the full one.")
    ] = Exactness.CERTIFIED,
    *,
    common: Dosed,
) -> None:
    """Divide a fine-tuned checkpoint into general and memory.

    Writes an ordinary checkpoint with a manifest and a model card, the memory (private!) beside it in OUT.private, and prints
    where.
    """
    hasher = None
    if not (common.dry_run or common.probe):
        from liborth_cli.checkpoint.hashing import BackgroundHasher

        hasher = BackgroundHasher.head_start(reference, finetuned)  # importing torch takes as long as hashing a gigabyte
    amount = _amount(
        method, common.measures, rank=rank, energy=energy, noise_edge=noise_edge or None, density=density, scale=scale,
        mass=mass, threshold=threshold, strength=strength,
    )  # fmt: skip
    if hard and strength is None and not common.measures:
        raise UsageError("--hard goes with --strength")
    amount = dataclasses.replace(amount, hard=hard)
    if not math.isfinite(alpha):
        raise UsageError("--alpha takes a finite number")
    from liborth_cli.checkpoint.adapter import is_adapter, open_model
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
    from liborth_cli.checkpoint.pair import Policy
    from liborth_cli.checkpoint.private import private_place
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.checkpoint.views import Origin
    from liborth_cli.curvature.factors import FactorSet
    from liborth_cli.machine import configure
    from liborth_cli.methods import METHODS
    from liborth_cli.split import SplitOptions, Splitter
    from liborth_cli.split.overrides import Override
    from liborth_cli.split.settings import check_settings
    from liborth_cli.split.table import dry_run_document, dry_run_table, report

    source, other = resolve(finetuned or reference), resolve(reference) if finetuned else None
    target = out or Path(f"{source.title.rpartition('/')[2]}-{method.value}")
    places = [Place(target), Place(private_place(target, memory_out), "--memory-out")]
    asked = common.asked(method.value, hard, out if common.probe else target)
    rule, amounts = ("scale", ()) if method == MethodName.AUTO else (method.value, METHODS[method.value].amounts)
    options = SplitOptions(
        method=rule,
        amount=amount,
        memory_side=SIDES[memory_side] if memory_side else None,
        alpha=alpha,
        policy=Policy(tuple(include or ()), tuple(exclude or ()), vectors.value, added.value),
        nonfinite=nonfinite.value,
        tolerance=1e-4 if svd == Exactness.CERTIFIED else 0.0,
        seed=common.seed,
        out_shard_size=common.shard_bytes,
        settings={
            name: value
            for name, value in (
                ("sides", None if sides == Sides.BOTH else sides.value),
                ("damping", None if damping == 1e-2 else damping),
                ("factor_rank", factor_rank),
            )
            if value is not None
        },
        overrides=tuple(Override.parse(text, amounts) for text in overrides or ()),
    )
    check_settings(options, alone=other is None)
    run = configure(common.device, common.threads, common.force, common.resume, common.kernels.value)
    if run.note:
        common.console.note(run.note)
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint.open(other.path)) if other else None
        if base is None and is_adapter(source.path):
            raise UsageError(f"{source.path}: an adapter alone is no update; name its base first: liborth split BASE ADAPTER")
        new = stack.enter_context(open_model(source.path, base))
        old = base or Origin(new)
        kept = stack.enter_context(FactorSet.open(retain)) if retain else None
        gone = [stack.enter_context(FactorSet.open(path)) for path in forget or ()]
        inputs = [*(s.path for s in (other, source) if s), retain, *(forget or []), *common.text_files]
        dose = None
        if asked is not None:
            from liborth_cli.dose.find import Inputs, find_dose

            if not common.dry_run and not common.probe:
                check_outputs(places, inputs, common.force)
            divided = Inputs(old, new, (other, source), kept, gone)
            found = find_dose(asked, divided, options, run, common.console, stack)
            options, kept, gone, dose = found.options, divided.retain, divided.forget, found.frontier
            if found.done:
                if found.text or common.as_json:
                    common.console.result(found.text, found.document)
                return
        plan = Splitter(old, new, options, kept, gone)
        for warning in plan.warnings:
            common.console.warn(warning)
        if common.dry_run:
            common.console.result(dry_run_table(plan), dry_run_document(plan))
            return
        check_outputs(places, inputs, common.force)
        check_space(target, plan.disk_bytes)
        if "auto_map" in new.config:
            common.console.warn("config.json asks for the repository's own code (auto_map), which is not copied")
        if dose is not None:
            plan.more["dose"] = dose.to_json()
        manifest = plan.write(target, (other, source), run, common.console, hasher, memory_out)
    report(manifest, run, common.console)
    common.console.result(str(target), {"output": str(target), "manifest": manifest})


def _amount(method: MethodName, measured: bool, **given: float | bool | None) -> Amount:
    """Pick the one amount that was given, and hold it against what the method understands."""
    from liborth_cli.methods import METHODS, Amount

    named = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    if measured or method == MethodName.AUTO:
        if named:
            raise UsageError(f"--probe, --target and --method auto find the amount: leave out --{next(iter(named))}")
        return Amount("scale", 1.0)
    allowed = METHODS[method.value].amounts
    if len(named) > 1:
        raise UsageError(f"{' and '.join('--' + n for n in named)} exclude each other: give one amount")
    for kind, value in named.items():
        if kind not in allowed:
            raise UsageError(f"--method {method.value} takes {' or '.join('--' + a for a in allowed)}, not --{kind}")
        return Amount(kind, None if value is True else float(value or 0))
    if allowed[0] == "noise-edge":
        return Amount("noise-edge")
    raise UsageError(f"--method {method.value} needs {' or '.join('--' + a for a in allowed)}")
