"""What is said of a path that is no checkpoint: what lies there, and which path to give."""

from __future__ import annotations

import re
from pathlib import Path

from liborth_cli.errors import BadInput

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    'convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('IN').save_pretrained('OUT')\""
)
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLED_ADAPTER = "adapter_model.bin"
STEP, HUB = re.compile(r"checkpoint-(\d+)"), re.compile(r"(?:models|datasets|spaces)--")
"""Names of the directories that a trainer, and the hub's cache, keep checkpoints in."""


def refuse_adapter(path: Path) -> None:
    """Raise BadInput when an adapter lies beside full weights: loaders would apply it on top of them."""
    folder = path if path.is_dir() else path.parent
    beside = [name for name in ADAPTERS if (folder / name).is_file()]
    weights = any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    if beside and weights and (path == folder or path.name.startswith("model")):
        raise BadInput(
            f"{folder}: {beside[0]} lies beside full weights, and loaders apply it on top of them; "
            "merge it first (peft: merge_and_unload), or remove it"
        )


def refuse_one_of_many(path: Path, stem: str) -> None:
    """Raise BadInput when a path names one file of a checkpoint that has several."""
    found = _part(stem).fullmatch(path.name)
    if found and int(found[1]) > 1:
        raise BadInput(f"{path}: one of {int(found[1])} files of a checkpoint; name the directory")


def no_checkpoint(folder: Path, stem: str) -> str:
    """Say of a directory without `<stem>.safetensors` and without an index what is there instead.

    Args:
        folder: the directory.
        stem: what the files would be called.
    """
    expected, names = f"{stem}.safetensors", sorted(file.name for file in folder.iterdir())
    if (folder / expected).is_dir():
        return f"{folder / expected}: is a directory, and should be a file"
    if PICKLED_ADAPTER in names:
        return (
            f"{folder}: this is an adapter in a pickle, which can run code when loaded; merge it into its base where you trust "
            "it (peft: merge_and_unload), and save that"
        )
    if any(name in names for name in ADAPTERS):
        return f"{folder}: this is an adapter; name its base model first (liborth split BASE ADAPTER), or merge it into that"
    if parts := [found for name in names if (found := _part(stem).fullmatch(name))]:
        return (
            f"{folder}: {len(parts)} of {int(parts[0][1])} files of a checkpoint are here, and {expected}.index.json, which "
            "says what they hold, is not: a save or a download that was cut short; repeat it"
        )
    return f"{folder}: {_elsewhere(folder, names) or _other(names) or f'no {expected} or index here; is this a checkpoint?'}"


def _part(stem: str) -> re.Pattern[str]:
    return re.compile(re.escape(stem) + r"-\d+-of-(\d{1,9})\.safetensors")


def _elsewhere(folder: Path, names: list[str]) -> str:
    """Say which directory below one is meant; "" when none is."""
    snapshots = folder / "snapshots"
    if HUB.match(folder.name):
        inside = sorted(one for one in snapshots.iterdir() if one.is_dir()) if snapshots.is_dir() else []
        named = f"name {inside[-1]}, or " if inside else ""
        return f"a folder of the hub's cache, which keeps the files of each revision further in; {named}the model as org/name"
    steps = sorted((int(found[1]), name) for name in names if (found := STEP.fullmatch(name)) and (folder / name).is_dir())
    if steps:
        of = "the one checkpoint" if len(steps) == 1 else f"the last of {len(steps)} checkpoints"
        return f"no weights here, but in directories that a trainer made; name {of}, {folder / steps[-1][1]}"
    return ""


def _other(names: list[str]) -> str:
    """Say which other files of weights are there; "" when there are none."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"{pickles[0]} is a pickle, which can run code when loaded; {CONVERT}"
    if "consolidated.safetensors" in names:
        return (
            "consolidated.safetensors has the names of its maker's own program; the same model is published with "
            "model.safetensors, which Transformers reads: take that"
        )
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"no model.safetensors or index, but {others[0]}; if that is the whole model, name it model.safetensors"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return (
            f"{ggufs[0]} is a GGUF file; Transformers makes a checkpoint of it: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={ggufs[0]!r}).save_pretrained(OUT)"
        )
    return ""
