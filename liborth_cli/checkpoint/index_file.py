"""The index of a sharded checkpoint, read without trust: it names files, and names can point anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from liborth_cli.checkpoint import header
from liborth_cli.errors import BadInput


def weight_map(raw: bytes, index: Path) -> dict[str, str]:
    """Parse an index file into tensor name → shard name.

    Raises:
        BadInput: when it is not an index, or names a tensor twice.
    """
    try:
        found = header.loads(raw)["weight_map"]
        if not found or not all(isinstance(shard, str) for shard in found.values()):
            raise ValueError
    except header.DuplicateKey as error:
        raise BadInput(f"{index}: names {error.args[0]!r} twice") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{index}: not a safetensors index (no weight_map of tensor names to files)") from None
    return found


def shard_files(names: Mapping[str, str], folder: Path, stem: str) -> list[str]:
    """List the shards an index names, each once, in name order.

    Raises:
        BadInput: when a name could leave the directory, a shard is missing, or one is there that is not named.
    """
    shards = sorted(set(names.values()))
    for name in shards:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise BadInput(f"{folder}: the index names the file {name!r}; only plain *.safetensors names are allowed")
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: the index names this shard and it is missing; download it again")
    pattern = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
    for file in sorted(folder.iterdir()):
        if pattern.fullmatch(file.name) and file.name not in shards:
            raise BadInput(f"{file}: this shard is not in the index; remove it or repair the index")
    return shards


def check(names: Mapping[str, str], held: Mapping[str, str], index: Path) -> None:
    """Compare what the index says with what the shards hold (both: tensor name → shard name).

    Raises:
        BadInput: when they differ either way.
    """
    for name, shard in names.items():
        if held.get(name) != shard:
            raise BadInput(f"{index}: says tensor {name!r} is in {shard}, which does not hold it")
    for name, shard in held.items():
        if name not in names:
            raise BadInput(f"{index}: does not name tensor {name!r} of {shard}; repair the index")
