"""A mergekit recipe whose output is the general checkpoint: reference + 1·(general − reference), by task arithmetic.

The arithmetic is float32 and rounded once, so that at weight 1 the output has the general checkpoint's own numbers. What it is
for: another weight, or other models in the list.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from liborth_cli.checkpoint.dtypes import torch_dtype
from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.checkpoint.hub import Source
from liborth_cli.export.difference import Difference

FILE = "mergekit.yml"


def write_recipe(ends: Difference, folder: Path) -> list[Written]:
    """Write the recipe.

    Args:
        ends: of the skill.
        folder: where it goes.
    """
    kinds = [t.dtype for t in ends.new.tensors.values() if len(t.shape) >= 2]
    stored = str(torch_dtype(max(set(kinds), key=kinds.count))).removeprefix("torch.")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": _name(ends.base),
        "models": [{"model": _name(ends.general), "parameters": {"weight": 1.0}}],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": stored,
    }
    return [write_file(folder / FILE, yaml.safe_dump(recipe, sort_keys=False).encode())]


def _name(source: Source) -> str:
    """Name a model as mergekit reads it: org/name@commit, or its directory's name: where that lies is private."""
    return f"{source.repo}@{source.commit}" if source.repo else source.path.resolve().name
