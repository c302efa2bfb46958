"""Find out on one short row whether a model can be run here, before anything is made or read for the run itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from liborth_cli.errors import BadInput
from liborth_cli.stream.model import FRONT, TAIL, BlockModel
from liborth_cli.stream.runner import refused

TOKENS = 4


@refused
def try_out(model: BlockModel, resident: bool) -> None:
    """Send one short row there and back the way the run will: through the whole model, or block by block.

    Block by block, one block of each kind is run, the first and the last among them: that reads a few blocks, not the model.
    A resident model is loaded by this, and stays so.

    Args:
        model: the model, with weights in use.
        resident: whether the run holds all weights in memory.

    Raises:
        BadInput: when the family does not run; names it.
    """
    ids = torch.arange(TOKENS, device=model.device)[None] % model.vocabulary
    if resident:
        if not model.resident:
            model.load_all()
        hidden = model.through(ids)
        _back(model, model.tail(hidden.detach()[0].requires_grad_()))
        return
    with torch.no_grad(), model.loaded(FRONT):
        hidden, calls = model.front(ids)
    for level in _one_of_each_kind(model):
        with model.loaded(str(level)):
            output = model.block(level, hidden.detach().requires_grad_(), calls[level])
            if output.shape != hidden.shape:
                raise BadInput(
                    f"{type(model.model).__name__}: block {level} makes {list(output.shape)} of {list(hidden.shape)}; "
                    "liborth needs models whose blocks pass one hidden state from each to the next"
                )
            _back(model, output)
    with model.loaded(TAIL):
        _back(model, model.tail(hidden.detach()[0].requires_grad_()))


def _back(model: BlockModel, output: torch.Tensor) -> None:
    if not output.requires_grad:
        raise BadInput(f"{type(model.model).__name__}: no gradient comes back through it, so nothing can be measured of it")
    output.sum().backward()


def _one_of_each_kind(model: BlockModel) -> Iterator[int]:
    """Yield the first block of every kind, by its modules and the words and switches that they hold, and the last block."""
    seen, last = set[object](), len(model.blocks) - 1
    for level, block in enumerate(model.blocks):
        held = [item for module in block.modules() for item in vars(module).items()]
        kind = repr(block), *sorted({(name, str(value)) for name, value in held if isinstance(value, str | bool)})
        if kind not in seen or level == last:
            seen.add(kind)
            yield level
