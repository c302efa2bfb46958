"""Put files into a repository of the hub, in one commit, through huggingface_hub (which uses Xet storage where it can).

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HUB_DISABLE_XET` mean what they mean to that library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from liborth_cli.errors import BadInput, OutputConflict, UsageError, first_line, shown


def check_name(repo: str) -> str:
    """Return a repository's name without `hf://`, or refuse it.

    Raises:
        UsageError: when it is no `org/name`.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = repo.removeprefix("hf://")
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise UsageError(f"{shown(repo)}: not the name of a repository, like org/name")
    return name


def check_reachable() -> None:
    """Refuse to begin without a token, or offline.

    Raises:
        UsageError: says what to do.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set, and a push needs the hub: unset it")
    if not get_token():
        raise UsageError("no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may write")


def upload(repo: str, files: Mapping[str, Path | bytes], private: bool, message: str) -> str:
    """Make a repository where there is none, and commit files to it; either all of them are there afterwards, or none.

    Args:
        repo: `org/name`.
        files: path in the repository → the file, or its content.
        private: what the repository must be; one that is there keeps what it is, and must agree.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        BadInput: when the hub refuses, or cannot be reached.
        OutputConflict: when the repository is public and should not be, or holds weights that these files do not replace.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _told(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise OutputConflict(f"{repo}: this repository is public; name another, or say --public")
        known = {sibling.rfilename for sibling in there.siblings or ()}
        stale = sorted(name for name in known - set(files) if name.endswith(".safetensors"))
        if stale:
            raise OutputConflict(
                f"{repo}: holds {shown(stale[0])}, which this push does not replace; delete it, or name another"
            )
        adds = [CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in files.items()]
        return str(api.create_commit(repo, adds, commit_message=message, parent_commit=there.sha).commit_url)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what the library raises into one line; a token never stands in it."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise BadInput(f"{repo}: the hub refuses ({status}): is this token allowed to write there?") from None
        if status in (409, 412):
            raise OutputConflict(f"{repo}: somebody else wrote to it at the same moment; push again") from None
        raise BadInput(f"{repo}: the hub refuses: {first_line(error)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{repo}: the push failed: {first_line(error.__cause__ or error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "hf_xet")):
            raise
        raise BadInput(f"{repo}: the hub cannot be reached: {first_line(error)}") from None
