"""Find the blocks of a model, and handle the calls it makes to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from liborth_cli.errors import BadInput


def find_blocks(model: Any) -> list[torch.nn.Module]:
    """Return the one list of blocks; raise BadInput when there is none, or more."""
    kinds = set(model._no_split_modules or ())
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and type(module[0]).__name__ in kinds
    ]
    if len(lists) != 1:
        raise BadInput(
            f"{type(model).__name__}: no single list of {count} blocks found in it; liborth does not know this family"
        )
    return list(lists[0])


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the hidden state out of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def silent_embeddings(model: Any) -> Iterator[None]:
    """Make every embedding answer zeros, so that the head can run without its table being loaded."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    dtype = model.dtype
    for table in tables:
        width = table.embedding_dim
        vars(table)["forward"] = lambda ids, *_, _width=width, **__: torch.zeros(
            *ids.shape, _width, dtype=dtype, device=ids.device
        )
    try:
        yield
    finally:
        for table in tables:
            del table.forward
