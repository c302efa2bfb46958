"""Run a model in parts: up to its first block, one block, from the last block to the logits."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from liborth_cli.errors import BadInput, first_line
from liborth_cli.machine import is_out_of_memory
from liborth_cli.stream.build import find_blocks

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside its hidden state."""


class _Enough(Exception):
    """Raised inside the model to leave its forward pass."""


class _Strange(Exception):
    """The model did something between two blocks."""


_OWN = ("runner.py", "tap.py", "direct.py")
"""Files of ours that stand between a model's own code and what it calls."""


def refused(method: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a model's own code raises into a refusal by name: it does not run one block at a time."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            deepest = traceback.extract_tb(error.__traceback__)[-1].filename
            if ("liborth_cli" in deepest and not deepest.endswith(_OWN)) or is_out_of_memory(error):
                raise
            raise BadInput(
                f"{self._name}: this family does not run one block at a time, as liborth needs it "
                f"({type(error).__name__}: {first_line(error, 100)})"
            ) from error

    return run


class Runner:
    """The parts of a model whose blocks follow each other.

    Attributes:
        model: the Transformers model.
        blocks: its blocks, in order.
    """

    model: Any
    blocks: list[torch.nn.Module]
    _name: str
    _tuples: bool

    def twin(self) -> Runner:
        """Return another runner of the weights that are loaded, for another thread: modules of its own, the same tensors."""
        twin, tensors = Runner(), (*self.model.parameters(), *self.model.buffers())
        twin.model = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        twin.blocks, twin._name, twin._tuples = find_blocks(twin.model), self._name, self._tuples
        return twin

    @refused
    def front(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Run what comes before the first block.

        Args:
            ids: token ids, (batch, tokens).

        Returns:
            The first block's input, (batch, tokens, hidden), and what else each block is called with.

        Raises:
            BadInput: when the model does something between its blocks that is not understood.
        """
        calls: list[Call] = []
        first: list[torch.Tensor] = []
        expected: list[torch.Tensor] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, rest, named = split_call(args, kwargs)
            if index == 0:
                first.append(hidden)
            elif hidden is not expected[-1] or len(calls) != index:
                raise _Strange
            calls.append((rest, named))
            if index == len(self.blocks) - 1:
                raise _Enough
            # A fresh view: the same object coming back proves that nothing happens between two blocks.
            expected.append(first[0].view_as(first[0]))
            return (expected[-1],) if self._tuples else expected[-1]

        strange = BadInput(
            f"{self._name}: does something between its blocks that is not understood; liborth needs models whose blocks "
            "pass one hidden state from each to the next"
        )
        try:
            self._run(record, input_ids=ids)
        except _Strange:
            if self._tuples:
                raise strange from None
            # Some families' blocks return a tuple, and their model takes its first element.
            self._tuples = True
            try:
                return self.front(ids)
            except BadInput:
                raise strange from None
        return first[0], calls

    @refused
    def block(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Run one block: (batch, tokens, hidden) → the same shape."""
        return self._hidden(self.blocks[index](hidden, *call[0], **call[1]))

    @refused
    def tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run what comes after the last block, position by position.

        Args:
            hidden: output of the last block, (tokens, hidden): any tokens, for each is treated by itself.

        Returns:
            Logits, (tokens, vocabulary).
        """
        states = hidden[None]

        def answer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = states if index == 0 else split_call(args, kwargs)[0]
            return (result,) if self._tuples else result

        inputs = torch.zeros(states.shape, dtype=states.dtype, device=states.device)
        with silent_embeddings(self.model):
            logits = self._run(answer, inputs_embeds=inputs).logits
        if logits.shape[:2] != states.shape[:2]:
            raise BadInput(f"{self._name}: its head does not answer position by position, which is not understood")
        return logits[0]

    @refused
    def through(self, ids: torch.Tensor, check: Any = None) -> torch.Tensor:
        """Run the model as it is, up to the output of its last block; every weight must be loaded.

        Args:
            ids: token ids, (batch, tokens).
            check: called with (block index, output) after each block.

        Returns:
            (batch, tokens, hidden).
        """
        outputs: list[torch.Tensor] = []

        def observe(index: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                states = self._hidden(output)
                if check is not None:
                    check(index, states)
                if index == len(self.blocks) - 1:
                    outputs.append(states)
                    raise _Enough

            return hook

        handles = [block.register_forward_hook(observe(i)) for i, block in enumerate(self.blocks)]
        try:
            self.model(input_ids=ids, use_cache=False)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return outputs[0]

    def _hidden(self, output: Any) -> torch.Tensor:
        """Take the hidden state out of what a block returned, and remember in which form its model wants it."""
        self._tuples = isinstance(output, tuple)
        return output[0] if self._tuples else output

    def _run(self, answer: Any, **inputs: Any) -> Any:
        """Run the model with every block answering `answer(index, args, kwargs)`."""
        for index, block in enumerate(self.blocks):
            block.forward = lambda *args, _index=index, **kwargs: answer(_index, args, kwargs)
        try:
            return self.model(**inputs, use_cache=False)
        except _Enough:
            return None
        finally:
            for block in self.blocks:
                del block.forward


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
