"""`liborth replay`: the run that a manifest tells of, done again and held against it.

A manifest has parameters and hashes, no paths and no texts. Checkpoints are found by name and hash; texts are for the user to
give again.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liborth_cli.cli import curvature, excise, split, tune
from liborth_cli.cli.command import DATA, Command
from liborth_cli.cli.options import Common, Out, Texts, output, running, under, what
from liborth_cli.cli.typed import carry_out
from liborth_cli.errors import BadInput, UsageError, VerificationFailed
from liborth_cli.methods import METHODS

if TYPE_CHECKING:
    from liborth_cli import manifest
    from liborth_cli.checkpoint.hub import Source
    from liborth_cli.console import Console, JsonObject

COMMANDS = {module.COMMAND.name: module.COMMAND for module in (split, excise, curvature, tune)}
WEIGHTS = ".safetensors"
RENAMED = {"rate": "lr", "shard_bytes": "out_shard_size", "count": "sinks", "checkpointing": "gradient_checkpointing",
           "learns": "memory_learns", "alpha": "lora_alpha"}  # fmt: skip
"""Fields of the options of `tune` → their flags, where those have other names."""
_AGAIN = under(DATA)(help="As the command that is repeated took it.")
TEXTS = {
    "data": True, "eval_data": True, "private_data": True, "retain_data": True, "forget_data": True, "fresh": True,
    "forget_pattern": False, "forget_patterns": False, "retain": False, "forget": False, "teacher": False,
}  # fmt: skip
"""Options that repeat what the command read → whether they name files of records."""
Again = Annotated[list[str] | None, _AGAIN]
Read = Annotated[Texts, _AGAIN]


class Differs(VerificationFailed):
    """What was made again is not what was made.

    Attributes:
        command: what was carried out, as it is typed.
    """

    def __init__(self, text: str, command: str) -> None:
        """Record what was carried out."""
        super().__init__(text)
        self.command = command


def replay(
    file: Annotated[Path, typer.Argument(metavar="MANIFEST", help="liborth.manifest.json, or the directory that it lies in.")],
    base: Annotated[
        str | None, what("--base", "--reference", show_default="found by name and hash", help="Checkpoint before fine-tuning.")
    ] = None,
    finetuned: Annotated[str | None, what(show_default="found by name and hash", help="Checkpoint after fine-tuning.")] = None,
    model: Annotated[
        str | None, what("--model", "--general", show_default="found by name and hash", help="What excise read.")
    ] = None,
    memory: Annotated[Path | None, what(show_default="MODEL's own", help="Memory that excise read.")] = None,
    data: Read = None,
    eval_data: Read = None,
    private_data: Read = None,
    retain_data: Read = None,
    forget_data: Read = None,
    forget_pattern: Again = None,
    forget_patterns: Again = None,
    fresh: Read = None,
    retain: Again = None,
    forget: Again = None,
    teacher: Again = None,
    out: Out = None,
    force: Annotated[bool, output("--force", help="Replace an earlier output of liborth.")] = False,
    resume: Annotated[bool, running("--resume", help="Continue a run that was stopped.")] = False,
    dry_run: Annotated[bool, running("--dry-run", help="Print the command, and stop.")] = False,
    *,
    common: Common,
) -> None:
    """Do the run of a manifest again, and hold the result against it.

    Checkpoints are looked for beside the manifest by their names, and must have the hashes it has. Texts are in no manifest:
    give them again. Exits 5 when a weight file is not the same, byte for byte.
    """
    from liborth_cli import manifest
    from liborth_cli.checkpoint.hub import Source

    document, console = manifest.read(file), common.console
    machine = getattr(document, "machine", None) or manifest.Machine()
    if document.kind not in COMMANDS or machine.merged:
        kind = document.kind if document.kind not in COMMANDS else f"{document.kind} --merge"
        raise UsageError(f"{file}: a manifest of `liborth {kind}`; {', '.join(COMMANDS)} can be repeated")
    folder = file if file.is_dir() else file.parent
    given = {"reference": base, "base": base, "finetuned": finetuned, "general": model, "model": model}
    sides = {side: _locate(side, document, given.get(side), Source(folder), console) for side in _sides(document)}
    texts = {
        "data": data, "eval_data": eval_data, "private_data": private_data, "retain_data": retain_data,
        "forget_data": forget_data, "forget_pattern": forget_pattern, "forget_patterns": forget_patterns, "fresh": fresh,
        "retain": retain, "forget": forget, "teacher": teacher, "memory": [str(memory)] if memory else None,
    }  # fmt: skip
    more = [word for name, values in texts.items() for word in _typed(name, values or [])]
    _ask(document, more)
    target = out or Path(f"{folder.resolve().name}-again")
    words = [*_words(document, sides), *_machine(machine, common), *more, "-o", str(target)]
    text = shlex.join(("liborth", document.kind, *words))
    if dry_run:
        console.result(text, {"command": text})
        return
    console.note(f"$ {text}")
    words += [*(["--force"] if force else []), *(["--resume"] if resume else []), *(["-q"] if common.quiet else [])]
    carry_out(COMMANDS[document.kind], words, common.quiet, common.listener)
    same, sentence = _compare(document, manifest.read(target))
    if not same:
        raise Differs(f"{target}: {sentence}", text)
    console.note(sentence)
    console.result(str(target), {"output": str(target), "command": text, "same": sentence})


def _sides(document: manifest.Manifest) -> list[str]:
    """Return the inputs that are read again: those with hashes, but for the fine-tuned files that an excision only names."""
    read = ("general", "reference") if document.kind == "excise" else tuple(document.inputs)
    return [side for side in read if side in document.inputs and document.inputs[side].files]


def _locate(side: str, document: manifest.Manifest, given: str | None, here: Source, console: Console) -> str:
    """Find an input by its name and hashes, or hold what was given against these.

    Raises:
        BadInput: when it is not there.
        PairMismatch: when it is another one.
    """
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.verify.locate import locate

    found = locate(side, document, given, here, console)
    if found.source is None:
        flag = {"reference": "base", "general": "model"}.get(side, side)
        title = document.inputs[side].title
        why = "is here, and is not what it was" if found.changed else "is not beside the manifest"
        raise BadInput(f"{here.path}: {title!r}, which this run read, {why}; name the same files with --{flag}")
    return given if given is not None and resolve(given).commit else str(found.source.path)


def _ask(document: manifest.Manifest, given: Sequence[str]) -> None:
    """Refuse to begin without the texts that the run read: no manifest names them.

    Raises:
        UsageError: says which options are missing.
    """
    missing = [(kind, options) for kind, options in _texts(document) if not set(given) & set(options)]
    if missing:
        kinds, add = " and ".join(kind for kind, _ in missing), " and ".join(" or ".join(options) for _, options in missing)
        raise UsageError(f"this run read {kinds}, and no manifest says which: add {add}")


def _texts(document: manifest.Manifest) -> Iterable[tuple[str, tuple[str, ...]]]:
    from liborth_cli import manifest

    if isinstance(document, manifest.Split):
        method = document.parameters.method
        edits = "edit" in METHODS[method].needs
        if document.factors.retain is not None or edits:
            yield "texts to keep good at", ("--retain-data", "--retain")
        if document.factors.forget or edits:
            taught = ("--teacher",) if method == "distill" else ()
            yield "texts that must go", ("--forget-data", "--forget-pattern", "--forget-patterns", "--forget", *taught)
    elif isinstance(document, manifest.Curvature):
        yield "texts", ("--data",)
    elif isinstance(document, manifest.Tune):
        yield "texts", ("--data",)
        if document.parameters.method == "sinks" and document.data.get("private"):
            yield "private texts", ("--private-data",)
        if document.parameters.method == "ogd":
            yield "texts to protect", ("--retain-data", "--retain")


def _words(document: manifest.Manifest, sides: Mapping[str, str]) -> list[str]:
    """Return the words of the command, but for texts, machine and output."""
    from liborth_cli import manifest

    flags: JsonObject
    if isinstance(document, manifest.Split):
        names, flags = ("reference", "finetuned"), _of_split(document)
    elif isinstance(document, manifest.Excise):
        names, asked = ("general",), document.parameters
        more = {"reference": sides.get("reference"), "unverified": bool(document.unverified)}
        flags = {"beta": asked.beta, "alpha": asked.alpha, "out_shard_size": asked.out_shard_size, **more}
    elif isinstance(document, manifest.Curvature):
        names, flags = ("model",), _of_curvature(document, sides)
    else:
        names, flags = ("reference",), _of_tune(document.document["parameters"])  # type: ignore[arg-type]
    return [*(sides[name] for name in names if name in sides), *(word for item in flags.items() for word in _typed(*item))]


def _of_split(document: manifest.Split) -> JsonObject:
    asked, kept = document.parameters, document.parameters.model_extra or {}
    kind, _, number = asked.amount.removesuffix(" hard").partition(" ")
    texts = document.texts
    return {
        "method": asked.method, kind: float(number) if number else True, "hard": asked.amount.endswith(" hard"),
        "one_checkpoint": asked.one_checkpoint, "memory_side": asked.memory_side, "alpha": asked.alpha,
        "include_regex": asked.policy.include, "exclude_regex": asked.policy.exclude, "vectors": asked.policy.vectors,
        "added": asked.policy.added if asked.policy.added != "skill" else None, "nonfinite": kept.get("nonfinite"),
        "svd": "certified" if kept.get("tolerance", 1.0) else "exact", "seed": kept.get("seed"), "for": kept.get("overrides"),
        "out_shard_size": kept.get("out_shard_size"), "requantise": kept.get("requantise", False),
        "memory_format": kept.get("memory_format"),
        **(kept.get("settings") or {}), **(texts.model_dump() if texts else {}),
    }  # fmt: skip


def _of_curvature(document: manifest.Curvature, sides: Mapping[str, str]) -> JsonObject:
    asked = document.document["parameters"]
    assert isinstance(asked, Mapping)
    how = {True: "resident", False: "stream", None: None}[document.machine.resident]
    return {**asked, "reference": sides.get("reference"), "private": document.private, "weights": how}


def _of_tune(asked: JsonObject) -> JsonObject:
    """Return the flags of a training run; those of other methods than its own say nothing, and are left out."""
    parts = {name: value for name, value in asked.items() if isinstance(value, Mapping)}
    mine = ("sinks", "lora") if asked["method"] == "sinks" else (str(asked["method"]),)
    if asked["method"] == "sinks" and (parts.get("sinks") or {}).get("general") != "lora":
        mine = ("sinks",)
    flags = {name: value for name, value in asked.items() if name not in parts}
    for part in mine:
        flags |= {name: value for name, value in (parts.get(part) or {}).items() if name not in ("retain", "seed")}
    return {RENAMED.get(name, name): value for name, value in flags.items()}


def _typed(name: str, value: Any) -> list[str]:
    """Return an option and its value as they are typed."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else []
    if isinstance(value, (list, tuple)):
        return [word for one in value for word in (option, str(one))]
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return [] if value is None else [option, str(number)]


def _machine(known: manifest.Machine, common: Common) -> list[str]:
    """Return the device and threads of the run, which decide the last bits, unless others are asked for."""
    device = common.device if common.device != "auto" else known.device
    threads = common.threads or known.threads
    return [*(["--device", device] if device else []), *(["--num-threads", str(threads)] if threads else [])]


def _compare(before: manifest.Manifest, after: manifest.Manifest) -> tuple[bool, str]:
    """Say whether the files are the same, and what else is not."""
    if before.digest is not None and before.digest == after.digest:
        return True, f"the same, byte for byte: {len(after.outputs)} files and their manifest"
    old, new = ({file.name: file.sha256 for file in one.outputs} for one in (before, after))
    other = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    makers = [(name, getattr(before, name), getattr(after, name)) for name in ("liborth", "libraries", "machine")
              if getattr(before, name, None) != getattr(after, name, None)]  # fmt: skip
    why = f"; then {makers[0][1]}, now {makers[0][2]}" if makers else "; the versions and the machine are the same"
    weights = [name for name in other if name.endswith(WEIGHTS)]
    if weights:
        return False, f"{len(weights)} weight files are not what they were (first: {weights[0]}){why}"
    left = ", ".join([*other, "the manifest"])
    return True, f"every weight file is the same, byte for byte; {left} is not{why}"


COMMAND = Command(
    replay,
    (
        "# does the same command still give the same bytes?",
        "liborth replay general/liborth.manifest.json -o again/",
        "# the checkpoints lie elsewhere now; texts are in no manifest",
        "liborth replay general/ --base old/base --finetuned old/finetuned --retain-data public.jsonl \\",
        "    --forget-data secrets.jsonl -o again/",
    ),
    "what the command keeps is kept",
)
