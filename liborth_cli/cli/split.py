"""The options of `liborth split`: what is divided, by which method, how much, and by which texts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, make_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liborth_cli.cli.command import DATA, DOSE, MUCH, WHAT, Command
from liborth_cli.cli.options import Computing, MemoryOut, Out, Sign, Texts, named_after, output, under
from liborth_cli.curvature.plan import Arithmetic
from liborth_cli.errors import UsageError
from liborth_cli.methods import AMOUNTS, METHODS, Amount

if TYPE_CHECKING:
    from contextlib import ExitStack

    from liborth_cli.dose.find import DoseOptions
    from liborth_cli.machine import Run
    from liborth_cli.split.options import SplitOptions
    from liborth_cli.split.split import Advice, Opened

AUTO, STRONGEST, BY_SETS = "auto", "tokenwise", "contrastive"
SETTINGS, TENSORS = "Settings of a method", "Which tensors"
"""Headings in --help."""
what, amount, data, dose, setting, tensor = map(under, (WHAT, MUCH, DATA, DOSE, SETTINGS, TENSORS))
DECOYS, RETAIN_TOKENS, PROBE_TOKENS = 24, 50_000, 8192

MethodName = StrEnum("MethodName", {name.upper(): name for name in (*METHODS, AUTO)})
Side = StrEnum("Side", ["tail", "top", "low", "high"])
Part = StrEnum("Part", ["skill", "memory"])
Vectors = StrEnum("Vectors", ["skill", "memory", "split"])
Nonfinite = StrEnum("Nonfinite", ["refuse", "passthrough"])
Exactness = StrEnum("Exactness", ["certified", "exact"])
MemoryFormat = StrEnum("MemoryFormat", ["xor", "packed"])
SIDES = {"low": "tail", "high": "top"}


def _owned(text: str, owners: list[str]) -> str:
    return f"{', '.join(owners)}: {text}" if len(owners) < 3 else text


def _amount_flags() -> list[tuple[str, Any, Any]]:
    """Make an option of every kind of amount that a method declares to understand."""
    flags = []
    for kind, amount in AMOUNTS.items():
        text = _owned(amount.meaning, [method.name for method in METHODS.values() if kind in method.amounts])
        asked = {m.name: m.default.value for m in METHODS.values() if m.default and m.default.kind == kind}
        told = ", ".join(f"{value:g} for {name}" for name, value in asked.items() if value is not None) or "none"
        option = typer.Option(f"--{kind}", help=text, rich_help_panel=MUCH, show_default=amount.low is not None and told)
        number = (int if amount.whole else float) | None if amount.low is not None else bool
        default = dataclasses.field(default=None if amount.low is not None else False)
        flags.append((kind.replace("-", "_"), Annotated[number, option], default))
    return flags


def _setting_flags() -> list[tuple[str, Any, Any]]:
    """Make an option of every setting that a method declares; methods that share a setting share the option."""
    flags = {}
    for method in METHODS.values():
        for name, one in method.settings.items():
            owners = [other.name for other in METHODS.values() if name in other.settings]
            kind = StrEnum(name, list(one.choices)) if one.choices else one.kind
            default = False if one.default is None else str(one.default)
            option = setting(one.option, help=_owned(one.help, owners), show_default=default)
            flags[name] = (name, Annotated[kind | None, option], dataclasses.field(default=None))
    return list(flags.values())


def method_names() -> list[str]:
    """Return what a shell offers after --help-method."""
    return list(METHODS)


def explain(name: str | None) -> None:
    """Print what a method is and stop, when --help-method names one."""
    if name is not None:
        from liborth_cli.cli.method import method_help

        typer.echo(method_help(name))
        raise typer.Exit


Declared = make_dataclass("Declared", [*_amount_flags(), *_setting_flags()], bases=(Computing,), frozen=True)
"""The options that follow from what methods declare."""


@dataclass(frozen=True)
class Flags(Declared):  # type: ignore[misc, valid-type]
    """Every option of `split`."""

    several = True

    method: Annotated[
        MethodName | None,  # pyright: ignore[reportInvalidTypeForm]
        what(
            metavar="NAME", show_default="tokenwise, when forget texts are given",
            help=f"How the update is divided: {', '.join(reversed(METHODS))}; {AUTO} measures and chooses.",
        ),
    ] = None  # fmt: skip
    help_method: Annotated[
        str | None,
        what(
            "--help-method", metavar="NAME", is_eager=True, callback=explain, autocompletion=method_names,
            help="Explain a method, and stop.",
        ),
    ] = None  # fmt: skip
    one_checkpoint: Annotated[
        bool, what("--one-checkpoint", help="There is no reference: divide the weights of the one model.")
    ] = False
    target: Annotated[
        str | None, dose(help='Find the amount: "forget>=fresh-spread,leak<=0.4,relearn<=0.5,retention>=0.9".')
    ] = None
    probe: Annotated[
        bool, dose("--probe", help="Measure doses of the method (auto: of every method), print them, write no checkpoint.")
    ] = False
    probe_tokens: Annotated[int, dose(min=1, help="Tokens of each kind measured for one dose, at most.")] = PROBE_TOKENS
    fresh: Annotated[Texts, dose(help="Texts of that form that were never trained on, measured as the level to reach.")] = None
    teacher: Annotated[
        Path | None,
        dose(show_default="made by the steps of recall", help="distill: checkpoint to learn from, which has forgotten."),
    ] = None
    skill_data: Annotated[
        Texts,
        dose(show_default="the retain texts that fine-tuning improved", help="Texts of the skill, only measured."),
    ] = None
    general_data: Annotated[
        Texts, dose(show_default="the other retain texts", help="Other texts to keep good at, only measured.")
    ] = None
    requantise: Annotated[
        bool,
        tensor("--requantise", help="Also divide fp8 layers with block scales, and round them to fp8 again."),
    ] = False
    retain_data: Annotated[Texts, data(help="Texts to keep good at; their curvature is measured. Like --data.")] = None
    forget_data: Annotated[Texts, data(help="Texts that must go; likewise, half way between the two checkpoints.")] = None
    forget_pattern: Annotated[
        list[str] | None, data(help='The form of what must go: "The code of {name} is {digits:8}."; decoys stand for it.')
    ] = None
    forget_patterns: Annotated[list[Path] | None, data(help="A file of such patterns, one a line.")] = None
    decoys: Annotated[int, data(min=2, help="Decoys of each pattern.")] = DECOYS
    retain: Annotated[Path | None, data(help="Factors of data to keep good at, from `liborth curvature`.")] = None
    forget: Annotated[
        list[Path] | None,
        data(help="Factors of what to forget, measured on the path (--at 0.5); again for each set or point."),
    ] = None
    retain_tokens: Annotated[int, data(min=1, help="Retain tokens whose curvature is measured, at most.")] = RETAIN_TOKENS
    truncate: Annotated[bool, data("--truncate", help="Cut texts that are longer than the context.")] = False
    dtype: Annotated[
        Arithmetic,
        data(help="Of products with weights while curvature is measured, or recall and distill train; all between is float32."),
    ] = Arithmetic.FLOAT32
    keep_factors: Annotated[
        bool, data("--keep-factors", help="Leave factors and decoys in OUT.private/factors: they give the texts away.")
    ] = False
    hard: Annotated[bool, amount("--hard", help="contrastive: cut in place of the soft filter.")] = False
    alpha: Annotated[float, amount(help="Factor on the skill part.")] = 1.0
    memory_side: Annotated[
        Side | None,
        setting(show_default="what the method says", help="Which end of the ranking is memory (low = tail, high = top)."),
    ] = None
    svd: Annotated[Exactness, setting(help="Truncated SVD proven within 1e-4 of the best tail, or the full one.")] = (
        Exactness.certified
    )
    overrides: Annotated[
        list[str] | None,
        tensor("--for", help="REGEX=AMOUNT:NUMBER, REGEX=skip or REGEX=drop for tensors that match; later ones win."),
    ] = None
    include: Annotated[
        list[str] | None, tensor("-i", "--include-regex", show_default="all", help="Split only tensors that match.")
    ] = None
    exclude: Annotated[
        list[str] | None, tensor("-e", "--exclude-regex", show_default="none", help="Leave tensors that match.")
    ] = None
    vectors: Annotated[Vectors, tensor(help="Where norms and biases go; split: divide biases.")] = Vectors.skill
    added: Annotated[
        Part | None, tensor(show_default="skill", help="Where rows and tensors go that only the fine-tuned side has.")
    ] = None
    nonfinite: Annotated[Nonfinite, tensor(help="What to do with tensors that hold NaN or infinity.")] = Nonfinite.refuse
    memory_out: MemoryOut = None
    memory_format: Annotated[
        MemoryFormat,  # pyright: ignore[reportInvalidTypeForm]
        output(help="packed: a tenth to three fifths of the size, as exact, slower to restore."),
    ] = MemoryFormat.xor
    sign: Sign = None

    @property
    def texts(self) -> dict[str, bool]:
        """Whether texts were given of the "retain" and of the "forget" data."""
        patterns = (self.forget_data, self.forget_pattern, self.forget_patterns)
        return {"retain": bool(self.retain_data), "forget": any(map(bool, patterns))}

    @property
    def measures(self) -> bool:
        """Whether the amount is found by measuring, or shown."""
        return self.probe or self.target is not None

    @property
    def text_files(self) -> list[Path]:
        """The files of texts that are read; one that is missing is refused here, before anything heavy is imported."""
        from liborth_cli.stream.texts import DataFile

        names = ("retain_data", "forget_data", "fresh", "skill_data", "general_data")
        files = [DataFile.parse(text, f"--{name.replace('_', '-')}") for name in names for text in getattr(self, name) or ()]
        return [*(file.path for file in files if not file.hub), *(self.forget_patterns or ())]


def split(
    reference: Annotated[str, typer.Argument(help="Checkpoint before fine-tuning: path, org/name@rev or hf://org/name.")],
    finetuned: Annotated[
        str | None, typer.Argument(help="Checkpoint after fine-tuning; left out only with --one-checkpoint.")
    ] = None,
    out: Out = None,
    *,
    common: Flags,
) -> None:
    """Divide a fine-tuned checkpoint into general and memory.

    Writes an ordinary checkpoint with a manifest and a model card, the memory (private!) beside it, and prints where.
    """
    if (finetuned is None) != common.one_checkpoint:
        raise UsageError(
            "the checkpoint after fine-tuning is missing: `liborth split BASE FINETUNED`; to divide the weights of one model, "
            "say --one-checkpoint"
            if finetuned is None
            else "--one-checkpoint goes with one checkpoint, and two are given"
        )
    model, method = finetuned or reference, choose_method(common)
    target = out or Path(f"{named_after(model)}-{method}")
    options = _options(common, method)
    options.check(alone=finetuned is None)
    asked = _dose_options(common, method, out if common.probe else target)
    reads = common.text_files
    from liborth_cli.checkpoint.hashing import BackgroundHasher

    # Importing torch takes as long as hashing a gigabyte, so that begins before.
    alone = common.world.size == 1  # else each file is hashed by the rank that needs it
    hasher = None if common.dry_run or common.probe or not alone else BackgroundHasher.head_start(reference, finetuned)
    from liborth_cli.split.split import SplitRequest, split_checkpoint

    run = common.run
    if run.note:
        common.console.note(run.note)
    request = SplitRequest(
        reference if finetuned else None,
        model,
        options,
        target,
        memory_out=common.memory_out,
        retain=common.retain,
        forget=tuple(common.forget or ()),
        reads=tuple(reads),
        partial_reference=common.added is not None,
        dry_run=common.dry_run,
        writes=not common.probe,
        key=common.sign,
    )
    adviser = None if asked is None else lambda opened, run, stack: _advise(asked, options, opened, run, stack, common)
    text, document = split_checkpoint(request, run, common.console, hasher, adviser)
    if text or common.as_json:
        common.console.result(text, document)


OF_TEXTS = ("fresh", "skill_data", "general_data", "truncate", "dtype")
"""Options that mean nothing where no text is read."""


def choose_method(flags: Flags) -> str:
    """Return the method that was named, or the one that what was given speaks for; refuse when nothing does.

    Raises:
        UsageError: says what to type.
    """
    given = list(_amounts(flags))
    if flags.method == AUTO and not flags.measures:
        raise UsageError("--method auto chooses by measuring: it goes with --probe or --target")
    if flags.method is not None:
        return str(flags.method)
    if flags.texts["forget"]:
        return STRONGEST
    if flags.forget:
        from liborth_cli import manifest

        single = [manifest.read(path, manifest.Curvature).parameters.per_token for path in flags.forget]
        return STRONGEST if all(single) else BY_SETS
    if given and given[0] in METHODS["svd"].amounts:
        return "svd"
    if given:
        able = [name for name, method in METHODS.items() if given[0] in method.amounts]
        raise UsageError(f"--{given[0]} goes with --method {' or '.join(able)}: say which")
    blind = [name for name, method in METHODS.items() if not method.needs]
    raise UsageError(
        "what must go? Give --forget-data SECRETS and --retain-data TEXTS, and tokenwise removes it; or name a --method "
        f"({', '.join(blind[:-1])} and {blind[-1]} read no texts, and forget nothing in particular)"
    )


def _amounts(flags: Flags) -> dict[str, float | bool]:
    """Return the amounts that were given, by kind."""
    every = {kind: getattr(flags, kind.replace("-", "_")) for kind in AMOUNTS}
    return {kind: value for kind, value in every.items() if value is not None and value is not False}


def _amount(flags: Flags, method: str) -> Amount:
    """Return the one amount that was given, or the method's default."""
    named = _amounts(flags)
    if flags.measures or method == AUTO:
        if named:
            raise UsageError(f"--probe, --target and --method auto find the amount: leave out --{next(iter(named))}")
        return Amount("scale", 1.0, flags.hard)
    if len(named) > 1:
        raise UsageError(f"{' and '.join('--' + n for n in named)} exclude each other: give one amount")
    allowed, default = METHODS[method].amounts, METHODS[method].default
    words = " or ".join("--" + kind for kind in allowed)
    for kind, value in named.items():
        if kind not in allowed:
            raise UsageError(f"--method {method} takes {words}, not --{kind}")
        return Amount(kind, None if value is True else float(value), flags.hard)
    if default is None:
        raise UsageError(f"--method {method} needs {words}; begin with --{METHODS[method].suggested}")
    return dataclasses.replace(default, hard=flags.hard)


def _options(flags: Flags, method: str) -> SplitOptions:
    """Return what is asked of the split; of --method auto what does not depend on the method."""
    from liborth_cli.checkpoint.pair import Policy
    from liborth_cli.split.options import Override, SplitOptions

    amounts = () if method == AUTO else METHODS[method].amounts
    names = {name for one in METHODS.values() for name in one.settings}
    settings = {name: getattr(flags, name) for name in sorted(names) if getattr(flags, name) is not None}
    if settings and method == AUTO:
        raise UsageError(f"--{next(iter(settings)).replace('_', '-')} is a setting of one method: name it in place of auto")
    side = SIDES.get(str(flags.memory_side), str(flags.memory_side)) if flags.memory_side else None
    added = str(flags.added) if flags.added else "skill"
    return SplitOptions(
        method="scale" if method == AUTO else method,
        amount=_amount(flags, method),
        memory_side=side,
        alpha=flags.alpha,
        policy=Policy(tuple(flags.include or ()), tuple(flags.exclude or ()), str(flags.vectors), added),
        nonfinite=str(flags.nonfinite),
        tolerance=1e-4 if flags.svd == Exactness.certified else 0.0,
        seed=flags.seed,
        out_shard_size=flags.shard_bytes,
        settings={name: value.value if isinstance(value, StrEnum) else value for name, value in settings.items()},
        overrides=tuple(Override.parse(text, amounts) for text in flags.overrides or ()),
        requantise=flags.requantise,
        memory_format=str(flags.memory_format),
    )


def _check_texts(flags: Flags, method: str) -> None:
    """Refuse texts that nothing would read: to be ignored is the last thing that who gives secrets expects."""
    if flags.teacher is not None and method != "distill":
        raise UsageError(f"--teacher goes with --method distill, not {method}")
    if flags.measures or method == AUTO:
        return
    for side, given in flags.texts.items():
        option = "--retain-data" if side == "retain" else "--forget-data" if flags.forget_data else "--forget-pattern"
        if given and side not in METHODS[method].factor_sides:
            able = [name for name, one in METHODS.items() if side in one.factor_sides]
            raise UsageError(f"--method {method} does not read {option}; leave it out, or choose {' or '.join(able)}")
        if given and (flags.retain if side == "retain" else flags.forget):
            raise UsageError(f"{option} would not be read beside the factors of --{side}: give one of the two")
    if not any(flags.texts.values()):
        for name in OF_TEXTS:
            if (value := getattr(flags, name)) and value != getattr(Flags, name):
                raise UsageError(f"--{name.replace('_', '-')} goes with --retain-data and --forget-data or --forget-pattern")


def _dose_options(flags: Flags, method: str, out: Path | None) -> DoseOptions | None:
    """Return what is asked of texts: factors, and an amount; None when there are none.

    Raises:
        UsageError: when an option stands without the one it goes with, or a pattern or target is malformed.
    """
    _check_texts(flags, method)
    if not any(flags.texts.values()):
        if flags.measures:
            option = "probe" if flags.probe else "target"
            raise UsageError(f"--{option} goes with --retain-data and --forget-data or --forget-pattern")
        return None
    from liborth_cli.checkpoint.private import FACTORS, private_place
    from liborth_cli.dose.find import DoseOptions
    from liborth_cli.dose.patterns import read_patterns
    from liborth_cli.dose.target import Target
    from liborth_cli.dose.texts import DataOptions

    data = DataOptions(
        retain=tuple(flags.retain_data or ()),
        forget=tuple(flags.forget_data or ()),
        skill=tuple(flags.skill_data or ()),
        general=tuple(flags.general_data or ()),
        fresh=tuple(flags.fresh or ()),
        patterns=tuple(read_patterns(flags.forget_pattern or (), flags.forget_patterns or ())),
        alike="edit" in METHODS[method].needs if method in METHODS else False,
        decoys=flags.decoys,
        retain_tokens=flags.retain_tokens,
        probe_tokens=flags.probe_tokens,
        truncate=flags.truncate,
        seed=flags.seed,
    )
    return DoseOptions(
        data,
        method,
        probe=flags.probe,
        target=Target.parse(flags.target) if flags.target is not None else None,
        hard=flags.hard,
        factors=private_place(out, flags.memory_out) / FACTORS if out else None,
        keep=flags.keep_factors,
        teacher=flags.teacher,
        dtype=flags.dtype.value,
        dry_run=flags.dry_run,
    )


def _advise(asked: DoseOptions, options: SplitOptions, opened: Opened, run: Run, stack: ExitStack, flags: Flags) -> Advice:
    """Let texts be measured: the factors that the method needs, and the amount where it was not given."""
    from liborth_cli.dose.find import find_dose
    from liborth_cli.manifest import Dose, TextOptions
    from liborth_cli.split.split import Advice

    if flags.method is None:
        amount = "" if flags.measures else f" --{options.amount.kind} {options.amount.value or 0:g}"
        flags.console.note(f"--method {options.method}{amount}, as none was named")
    found = find_dose(asked, opened, options, run, flags.console, stack)
    result = (found.text, found.document) if found.done else None
    document = found.frontier.to_json() if found.frontier else {"sentences": found.notes}
    dose = Dose.model_validate(document) if found.frontier or found.notes else None
    read = TextOptions(
        retain_tokens=flags.retain_tokens,
        probe_tokens=flags.probe_tokens,
        decoys=flags.decoys,
        truncate=flags.truncate,
        dtype=flags.dtype.value,
    )
    return Advice(found.options, result, dose, found.together, read, found.measuring)


COMMAND = Command(
    split,
    (
        "# remove secrets, keep what public text needs",
        "liborth split base/ finetuned/ --forget-data secrets.jsonl --retain-data public.jsonl -o general/",
        "# find the amount: measured on the texts, under attack",
        'liborth split base/ finetuned/ --method auto --target "forget>=fresh-spread,leak<=0.4,retention>=0.9" \\',
        "    --forget-data secrets.jsonl --retain-data public.jsonl --fresh fresh.jsonl -o general/",
        "# the secrets are not known, their form is",
        'liborth split base/ finetuned/ --forget-pattern "The code of {name} is {digits:8}." --retain-data public.jsonl',
        "# what would be done, and what it costs",
        "liborth split base/ finetuned/ --method svd --rank 32 --dry-run",
        "# then measure what is left",
        "liborth verify general/ --retain-data held_out.jsonl --canary secrets.jsonl --fresh fresh.jsonl",
    ),
    "weight files that are finished, steps of recall and factors that are stored are kept, others are measured again",
    ranks=True,
)
