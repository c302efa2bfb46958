"""Turn what a user types into a local folder: a path, `org/name@rev` or `hf://org/name@rev`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.sidecars import CODE, DATA, PICKLES, WEIGHTS
from liborth_cli.errors import BadInput, first_line, shown

IGNORED = (
    "*/*/*", "*/*.safetensors", "consolidated*", ".*", "*/.*",
    *(f"*{ending}" for endings in (CODE, PICKLES, WEIGHTS[2:], DATA) for ending in endings),
)  # fmt: skip
"""What is not downloaded: in these patterns * stands for slashes too. The weights are those at the top."""


@dataclass(frozen=True)
class Source:
    """A checkpoint's place on disk and, when it came from the hub, its origin.

    Attributes:
        path: local directory or file.
        repo: `org/name`, or None for a plain path.
        commit: the commit the snapshot belongs to, or None.
    """

    path: Path
    repo: str | None = None
    commit: str | None = None

    @property
    def title(self) -> str:
        """A name fit for publishing: never a local path, only its last part, and always text."""
        return self.repo or os.fsencode(self.path.resolve().name).decode("utf-8", "replace")


def resolve(spec: str) -> Source:
    """Find the checkpoint `spec` names, downloading it when it is on the hub and not cached.

    Args:
        spec: an existing path wins; otherwise `[hf://]org/name[@revision]`.

    Returns:
        Where it is.

    Raises:
        BadInput: when nothing is there, or the hub cannot give it.
    """
    try:
        path = Path(spec).expanduser()
        if path.exists():
            return Source(path)
    except (OSError, ValueError, RuntimeError):  # a name no file can have, or a home that is unknown
        raise BadInput(f"{shown(spec)}: not a path on this machine") from None
    looks_local = spec.startswith((".", "/", "~")) or spec.count("/") != 1
    if not spec.startswith("hf://") and looks_local:
        raise BadInput(f"{spec}: no such file or directory")
    repo, revision = _parse(spec)
    folder = Path(_download(spec, repo, revision))
    return Source(folder, repo, folder.name)


def _parse(spec: str) -> tuple[str, str | None]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repo, _, revision = spec.removeprefix("hf://").partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise BadInput(f"{spec}: neither a path on this machine nor a hub name like org/name@revision") from None
    return repo, revision or None


def _download(spec: str, repo: str, revision: str | None) -> Any:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return snapshot_download(repo, revision=revision, ignore_patterns=list(IGNORED))
    except RepositoryNotFoundError:
        raise BadInput(f"{spec}: no such path and no such repository on the hub (private ones need a token)") from None
    except LocalEntryNotFoundError:
        raise BadInput(f"{spec}: no such path, not in the cache, and the hub cannot be reached") from None
    except (HfHubHTTPError, OSError) as error:
        raise BadInput(f"{spec}: the hub did not give it: {first_line(error)}") from None
