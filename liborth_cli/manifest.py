"""liborth.manifest.json: what was done, to what, with which hashes. Sorted, without dates, paths or host names."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from liborth_cli import __version__
from liborth_cli.errors import BadInput

SCHEMA_VERSION = 1
FILE = "liborth.manifest.json"
LIBRARIES = ("numpy", "scipy", "torch")


def new(kind: str, **content: Any) -> dict[str, Any]:
    """Start a manifest.

    Args:
        kind: "split" or "excise".
        **content: the rest of the document.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"schema_version": SCHEMA_VERSION, "kind": kind, "liborth": __version__, "libraries": versions, **content}


def dump(manifest: dict[str, Any]) -> bytes:
    """Render a manifest; equal content gives equal bytes."""
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def load(folder: Path) -> dict[str, Any]:
    """Read the manifest in a directory.

    Raises:
        BadInput: when there is none, or it is not one this version understands.
    """
    file = folder / FILE if folder.is_dir() else folder
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["schema_version"]
    except OSError:
        raise BadInput(f"{folder}: no {FILE} here; is this the output of `liborth split`?") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{file}: damaged; not a liborth manifest") from None
    if version != SCHEMA_VERSION:
        raise BadInput(f"{file}: schema version {version}; this liborth reads {SCHEMA_VERSION}, upgrade it")
    return manifest
