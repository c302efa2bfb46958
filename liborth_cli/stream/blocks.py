"""A Transformers model on the meta device whose weights come and go, one stage at a time.

The model's own `forward` prepares masks, positions and scalings, and its own last layers make the logits. Its blocks are
told to record what they are called with, so every family that runs its blocks one after the other is understood without
code of its own here; a family that does anything else between two blocks is noticed and refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from liborth_cli.errors import BadInput
from liborth_cli.stream.build import build, make_buffers_real, places
from liborth_cli.stream.names import match_names
from liborth_cli.stream.tap import Site
from liborth_cli.stream.weights import Arena, Point, padded

FRONT, TAIL = "front", "tail"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """Raised inside the model to leave its forward pass."""


class BlockModel:
    """A causal language model cut into stages: front (embeddings), the blocks, tail (norm and head).

    Attributes:
        model: the Transformers model, on the meta device but for the stage that is loaded.
        blocks: its blocks, in order.
        stages: stage names: "front", "0", "1", …, "tail".
        pieces: parameter → the stored tensors it is made of.
        unused: stored tensors that the model does not ask for.
        hidden: width of the residual stream.
        vocabulary: number of tokens the head scores.
        context: longest sequence the configuration allows, or None.
    """

    def __init__(self, point: Point, dtype: torch.dtype, device: torch.device, prefetch: bool = True) -> None:
        """Build the model from its configuration; nothing is read yet.

        Args:
            point: the weights.
            dtype: of the model's arithmetic.
            device: where it runs.
            prefetch: read the next stage while one is computed.

        Raises:
            BadInput: when the configuration is missing or names a model that is not understood.
        """
        self.point, self.dtype, self.device = point, dtype, device
        self.model = build(point.finetuned, dtype)
        self._name = type(self.model).__name__
        self.blocks = self._find_blocks()
        self.pieces, self.unused = match_names(self.model, point.finetuned)
        config = self.model.config.get_text_config()
        self.hidden, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._places = places(self.model)
        self._stage_parameters = self._divide()
        self.stages = [FRONT, *map(str, range(len(self.blocks))), TAIL]
        make_buffers_real(self.model, self._places, device)
        self._arenas = [Arena(dtype, device), Arena(dtype, device)]
        self._pool = ThreadPoolExecutor(1) if prefetch else None
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}
        self._pending: tuple[str, Arena, Future[dict[str, torch.Tensor]]] | None = None
        self._tuples = False
        self.resident = False

    # Weights ------------------------------------------------------------------------------------------------------------

    def stage_elements(self, stage: str) -> int:
        """Return how many numbers a stage's weights are."""
        return sum(padded(tuple(self._shape(name))) for name in self._stage_parameters[stage])

    def load_all(self) -> None:
        """Put every weight into memory and leave it there."""
        names = list(dict.fromkeys(name for stage in self.stages for name in self._stage_parameters[stage]))
        arena = Arena(self.dtype, self.device)
        arena.reset(sum(padded(tuple(self._shape(name))) for name in names))
        self._place(self._fill(arena, names))
        self.resident = True

    @contextmanager
    def loaded(self, stage: str, following: str | None = None) -> Iterator[None]:
        """Have the weights of one stage in memory, and begin to read those of the stage that follows.

        Args:
            stage: what to load.
            following: what will be asked for next.
        """
        if self.resident:
            yield
            return
        if self._pending is not None and self._pending[0] == stage:
            _, arena, future = self._pending
            weights = future.result()
        else:
            if self._pending is not None:
                self._pending[2].result()
            arena = self._arenas[0]
            weights = self._read(stage, arena)
        self._pending = None
        if following is not None and self._pool is not None:
            other = self._arenas[1] if arena is self._arenas[0] else self._arenas[0]
            self._pending = (following, other, self._pool.submit(self._read, following, other))
        self._place(weights)
        try:
            yield
        finally:
            self._remove(weights)

    def sites(self, stage: str | None) -> dict[tuple[int, str], Site]:
        """Return what matrix lies at which address, for the stage that is loaded (all of them when resident).

        Args:
            stage: which one; None for all.
        """
        names = self._stage_parameters[stage] if stage else [n for s in self.stages for n in self._stage_parameters[s]]
        result: dict[tuple[int, str], Site] = {}
        for name in names:
            for alias, module, attribute in self._places[name]:
                for site in self._sites_of(alias, module, attribute):
                    weight = getattr(module, attribute)
                    first = weight if site.matrix is None else weight[site.matrix]
                    use = "embedding" if site.kind == "embedding" else "linear"
                    result.setdefault((first.data_ptr(), use), site)
        return result

    def planned_sites(self) -> dict[str, list[Site]]:
        """Return stage → its matrices, from shapes alone."""
        plan = {}
        for stage in self.stages:
            plan[stage] = [
                site
                for name in self._stage_parameters[stage]
                for alias, module, attribute in self._places[name]
                for site in self._sites_of(alias, module, attribute)
                if stage not in (FRONT, TAIL) or (site.kind == "embedding") == (stage == FRONT)
            ]
        return plan

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    # Running ------------------------------------------------------------------------------------------------------------

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
            hidden, rest, named = _split(args, kwargs)
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
            except (TypeError, AttributeError, IndexError, RuntimeError):
                raise strange from None
        return first[0], calls

    def block(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Run one block: (batch, tokens, hidden) → the same shape."""
        return self._hidden(self.blocks[index](hidden, *call[0], **call[1]))

    def tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run what comes after the last block, position by position.

        Args:
            hidden: output of the last block, (tokens, hidden): any tokens, for each is treated by itself.

        Returns:
            Logits, (tokens, vocabulary).
        """
        states = hidden[None]

        def answer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = states if index == 0 else _split(args, kwargs)[0]
            return (result,) if self._tuples else result

        inputs = torch.zeros(states.shape, dtype=states.dtype, device=states.device)
        with _silent_embeddings(self.model):
            logits = self._run(answer, inputs_embeds=inputs).logits
        if logits.shape[:2] != states.shape[:2]:
            raise BadInput(f"{self._name}: its head does not answer position by position, which is not understood")
        return logits[0]

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

    # How ----------------------------------------------------------------------------------------------------------------

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

    def _read(self, stage: str, arena: Arena) -> dict[str, torch.Tensor]:
        arena.reset(self.stage_elements(stage))
        return self._fill(arena, self._stage_parameters[stage])

    def _fill(self, arena: Arena, names: Sequence[str]) -> dict[str, torch.Tensor]:
        weights = {}
        for name in names:
            weights[name] = tensor = arena.take(tuple(self._shape(name)))
            for piece in self.pieces[name]:
                target = (
                    tensor if piece.matrix is None else tensor[piece.matrix][piece.row : piece.row + piece.tensor.shape[-2]]
                )
                self.point.read_into(target.view(-1), piece.tensor)
        return weights

    def _place(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            for _, module, attribute in self._places[name]:
                if attribute in module._parameters:
                    module._parameters[attribute] = torch.nn.Parameter(tensor, requires_grad=False)
                else:
                    module._buffers[attribute] = tensor

    def _remove(self, weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            for _, module, attribute in self._places[name]:
                held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
                held[attribute] = self._meta[name]

    def _shape(self, name: str) -> torch.Size:
        return self._meta[name].shape

    def _find_blocks(self) -> list[torch.nn.Module]:
        kinds = set(self.model._no_split_modules or ())
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        lists = [
            module
            for module in self.model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count and type(module[0]).__name__ in kinds
        ]
        if len(lists) != 1:
            raise BadInput(f"{self._name}: no single list of {count} blocks found in it; liborth does not know this family")
        return list(lists[0])

    def _divide(self) -> dict[str, list[str]]:
        """Say which parameters each stage needs, every tied one under its first name."""
        block_of = {id(m): str(i) for i, block in enumerate(self.blocks) for m in block.modules()}
        head = self.model.get_output_embeddings()
        stages: dict[str, list[str]] = defaultdict(list)
        self._meta: dict[str, torch.Tensor] = {}
        for name, group in self._places.items():
            _, module, attribute = group[0]
            self._meta[name] = getattr(module, attribute)
            modules = [m for _, m, _ in group]
            if id(module) in block_of:
                stages[block_of[id(module)]].append(name)
                continue
            embeds = any(isinstance(m, torch.nn.Embedding) for m in modules)
            heads = any(m is head for m in modules)
            if embeds or not heads:
                stages[FRONT].append(name)
            if heads or not embeds:
                stages[TAIL].append(name)
        return {stage: stages[stage] for stage in (FRONT, *map(str, range(len(self.blocks))), TAIL)}

    def _sites_of(self, name: str, module: torch.nn.Module, attribute: str) -> Iterator[Site]:
        shape = tuple(self._meta[self._first_name(name)].shape)
        pieces = tuple(self.pieces[name])
        if isinstance(module, torch.nn.Embedding):
            if module is self.model.get_input_embeddings():
                yield Site(name, None, shape[1], shape[0], True, pieces, "embedding")
        elif len(shape) == 2:
            transposed = type(module).__name__ == "Conv1D"
            d_out, d_in = shape[::-1] if transposed else shape
            kind = "head" if module is self.model.get_output_embeddings() else "linear"
            yield Site(name, None, d_out, d_in, transposed, pieces, kind)
        elif len(shape) == 3:
            for matrix in range(shape[0]):
                mine = tuple(piece for piece in pieces if piece.matrix == matrix) or pieces
                yield Site(name, matrix, shape[1], shape[2], False, mine, "linear")

    def _first_name(self, name: str) -> str:
        return next(first for first, group in self._places.items() if any(alias == name for alias, _, _ in group))


class _Strange(Exception):
    """The model did something between two blocks."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the hidden state out of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def _silent_embeddings(model: Any) -> Iterator[None]:
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
