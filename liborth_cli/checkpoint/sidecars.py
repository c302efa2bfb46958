"""What travels beside the weights: configuration, tokenizer, templates, licence. Never code, other weights, data, or links.

A checkpoint is carried over whole but for what is denied here, one folder deep, and what stays behind is named. (A list of
the allowed would lose the tokenizer of every family it has not heard of.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.errors import BadInput, from_os

MAX_BYTES = 200_000_000


def _endings(words: str) -> tuple[str, ...]:
    return tuple(f".{word}" for word in words.split())


CODE = _endings(
    "py pyc pyd pyi ipynb so dylib dll exe sh bash zsh bat cmd ps1 js mjs ts html php rb pl lua jar class wasm c cc cpp cu h "
    "hpp go rs"
)
PICKLES = _endings("bin pt pth ckpt pkl pickle joblib dill distcp")
WEIGHTS = _endings(
    "safetensors safetensors.index.json bin.index.json gguf ggml h5 onnx onnx_data msgpack tflite mlmodel npz npy pb nemo"
)
DATA = _endings(
    "jsonl ndjson jsonlines csv tsv parquet arrow feather db sqlite sqlite3 mdb xml xls xlsx ods doc docx odt rtf pdf mbox eml "
    "log out err zip tar gz tgz bz2 xz zst lz4 rar 7z bak orig old tmp swp"
)
PRIVATE = "data, which may be private"
KINDS = {"code": CODE, "a pickle": PICKLES, "weights": WEIGHTS, PRIVATE: DATA}
TEXTS = ("vocab", "merges", "license", "licence", "notice", "use_policy", "copying", "bpe", "dict")
"""What a .txt is called that belongs to a tokenizer or a licence; others may be training data."""
BARE = (*TEXTS, "authors", "version", "tokenizer", "spiece", "spm", "sentencepiece")
"""Likewise what has no suffix, which liborth itself reads as running text."""
LOADERS = (
    "config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab", "chat_template", "processor",
    "preprocessor", "video_preprocessor", "modules", "model_index", "quant", "params", "tekken",
)  # fmt: skip
"""How JSON files begin that loaders ask for by name, whatever their form."""
RECORDS = re.compile(
    rb'\A[\s\xef\xbb\xbf]*(\[\s*\{|\{\s*"(messages|conversations|prompt|instruction|question|text|input_ids)"\s*:'
    rb'|\{\s*"\w+"\s*:\s*\[\s*\{)|\}[ \t\r]*\n\s*\{'
)
"""JSON that is data: a list of objects, a record, an object that begins with such a list, or objects one after another."""
LOOKED_AT = 1 << 20
TRAINING = ("trainer_state.json", "trainer_log.jsonl")
OWN = ("README.md", "liborth.manifest.json", "liborth.manifest.json.sig")
"""What every output has of its own."""
SIGNATURES = {b"#!": "code", b"\x7fELF": "code", b"MZ": "code", b"PK\x03\x04": "an archive", b"\x80\x02": "a pickle"} | {
    bytes([0x80, version]): "a pickle" for version in (3, 4, 5)
}
SHOWN = 5


@dataclass
class Sidecars:
    """The files of a checkpoint directory besides the weights.

    Attributes:
        files: relative name ("config.json", "additional_chat_templates/tool_use.jinja") → the file to copy.
        left: relative name → why it is not copied.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of what is copied."""
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def note(self) -> str | None:
        """Name what is not copied, in one sentence; None when that is nothing."""
        named = [f"{name} ({why})" for name, why in list(self.left.items())[:SHOWN]]
        more = f" and {len(self.left) - SHOWN} more" if len(self.left) > SHOWN else ""
        return f"not copied from beside the weights: {', '.join(named)}{more}" if named else None


def find(*folders: Path) -> Sidecars:
    """List what is copied from checkpoint directories, in name order; of two files of a name the later folder's.

    What is hidden, and what every output has of its own, is left without a word.
    """
    found = Sidecars()
    for folder in folders:
        one = Sidecars()
        if folder.is_dir():
            _collect(folder, folder, one)
        found.files |= one.files
        found.left |= one.left
    found.files = dict(sorted(found.files.items()))
    found.left = dict(sorted((name, why) for name, why in found.left.items() if name not in found.files))
    return found


def copy(files: Mapping[str, Path], folder: Path, mode: int = 0o644) -> list[Written]:
    """Copy files into `folder` under their relative names, with the permissions `mode`.

    Raises:
        BadInput: when one cannot be read.
    """
    written = []
    for name, file in files.items():
        try:
            with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as source:
                data = source.read(MAX_BYTES + 1)
        except OSError as error:
            raise from_os(error, file, "read", BadInput) from None
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        written.append(replace(write_file(target, data, mode), name=name))
    return written


def travels(name: str) -> bool:
    """Tell by its relative name whether a file is one that is copied."""
    return name not in OWN and kind_of(name.rpartition("/")[2]) is None


def kind_of(name: str) -> str | None:
    """Tell by its name what a file is that is never copied, or return None."""
    lower = name.lower()
    if lower.startswith("adapter_config."):
        return "an adapter's"
    known = TEXTS if lower.endswith(".txt") else BARE if "." not in lower else ("",)
    if not lower.startswith(known) or "tfevents" in lower or lower in TRAINING or lower.endswith("~"):
        return PRIVATE
    return next((kind for kind, endings in KINDS.items() if lower.endswith(endings)), None)


def _collect(top: Path, folder: Path, found: Sidecars) -> None:
    for entry in _sorted(folder):
        name = str(entry.relative_to(top))
        if entry.name.startswith(".") or entry.name in OWN:
            continue
        if not name.isprintable():
            found.left[ascii(name)] = "its name cannot be printed"
        elif entry.is_dir() and not entry.is_symlink():
            kinds = {kind_of(inner.name) for inner in _sorted(entry)} if folder == top else {"deeper than one folder"}
            why = next((kind for kind in ("weights", "a pickle", "deeper than one folder") if kind in kinds), None)
            if why is None and any((entry / own).exists() for own in OWN[1:]):
                why = "an output of liborth"
            if why is None:
                _collect(top, entry, found)
            else:
                found.left[f"{name}/"] = why
        elif why := kind_of(entry.name) or _refusal(entry, top):
            if not (folder == top and entry.name.endswith(WEIGHTS[:2])):  # those are the checkpoint itself
                found.left[name] = why
        else:
            found.files[name] = entry.resolve()


def _sorted(folder: Path) -> Iterator[Path]:
    try:
        return iter(sorted(folder.iterdir()))
    except OSError as error:
        raise from_os(error, folder, "listed", BadInput) from None


def _refusal(file: Path, top: Path) -> str | None:
    """Look at the file itself: a link that leads out, something that is no file, absurdly large, code or records of data."""
    try:
        if file.is_symlink() and file.resolve().parent not in homes(top):
            return "a link"
        if not file.is_file():
            return "not a file"
        if file.stat().st_size > MAX_BYTES:
            return f"larger than {MAX_BYTES // 10**6} MB"
        with open(file, "rb") as stream:
            start = stream.read(LOOKED_AT)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if RECORDS.search(start) and not file.name.lower().startswith(LOADERS):
        return PRIVATE
    return next((kind for signature, kind in SIGNATURES.items() if start.startswith(signature)), None)


def homes(top: Path) -> tuple[Path, ...]:
    """Where links may lead: the directory itself, and the blobs of a snapshot in the hub's cache."""
    folder = top.resolve()
    return (folder, folder.parent.parent / "blobs") if folder.parent.name == "snapshots" else (folder,)
