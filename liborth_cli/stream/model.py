"""A Transformers model on the meta device whose weights come and go, one stage at a time.

The model's own `forward` prepares masks, positions and scalings, and its own last layers make the logits. Its blocks are
told to record what they are called with, so every family that runs its blocks one after the other is understood without
code of its own here; a family that does anything else between two blocks is noticed and refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from liborth_cli.stream.build import assemble, build, find_blocks, make_buffers_real, match_names, places, standing_in
from liborth_cli.stream.host import now, own_stream
from liborth_cli.stream.runner import Runner
from liborth_cli.stream.tap import Site
from liborth_cli.stream.weights import Arena, Weights, padded

FRONT, TAIL = "front", "tail"
READERS = 4
"""Threads that bring weights to a GPU."""


class BlockModel(Runner):
    """A causal language model cut into stages: front (embeddings), the blocks, tail (norm and head).

    Attributes:
        model: the Transformers model, on the meta device but for the stage that is loaded.
        blocks: its blocks, in order.
        stages: stage names: "front", "0", "1", …, "tail".
        pieces: parameter → the stored tensors it is made of.
        unused: stored tensors that the model does not ask for.
        hidden: width of the residual stream.
        heads: of its attention.
        vocabulary: number of tokens the head scores.
        context: longest sequence the configuration allows, or None.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device, prefetch: bool = True) -> None:
        """Build the model from its configuration; nothing is read yet.

        Args:
            weights: where they come from.
            dtype: of the model's arithmetic.
            device: where it runs.
            prefetch: read the next stage while one is computed.

        Raises:
            BadInput: when the configuration is missing or names a model that is not understood.
        """
        self.weights, self.dtype, self.device = weights, dtype, device
        self.model = build(weights.checkpoint, dtype)
        self._name = type(self.model).__name__
        self.blocks = find_blocks(self.model)
        self.pieces, self.unused = match_names(self.model, weights.checkpoint)
        config = self.model.config.get_text_config()
        self.hidden, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.heads = int(getattr(config, "num_attention_heads", None) or 1)
        self.context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._places = places(self.model)
        self._stage_parameters = self._divide()
        self.stages = [FRONT, *map(str, range(len(self.blocks))), TAIL]
        make_buffers_real(self.model, self._places, device)
        self._arenas, self._whole = [Arena(dtype, device), Arena(dtype, device)], Arena(dtype, device)
        self._pool = ThreadPoolExecutor(1) if prefetch else None
        self._readers = ThreadPoolExecutor(READERS) if device.type != "cpu" else None  # a GPU takes them faster than one reads
        self._pending: tuple[str, Arena, Future[dict[str, torch.Tensor]]] | None = None
        self._tuples = False
        self._held = frozenset[str]()

    # Weights ------------------------------------------------------------------------------------------------------------

    def stage_elements(self, stage: str) -> int:
        """Return how many numbers a stage's weights are."""
        return sum(padded(tuple(self._shape(name))) for name in self._stage_parameters[stage])

    @property
    def elements(self) -> int:
        """How many numbers all weights are; a tied one counts in every stage that holds it."""
        return sum(self.stage_elements(stage) for stage in self.stages)

    @property
    def nbytes(self) -> int:
        """What all weights take in memory."""
        return self.elements * self.dtype.itemsize

    @property
    def resident(self) -> bool:
        """Whether all weights are in memory."""
        return self._held.issuperset(self._meta)

    def load_all(self, stages: Iterable[str] | None = None) -> None:
        """Put every weight into memory and leave it there; or those of some stages, when others have the rest."""
        names = list(dict.fromkeys(name for stage in stages or self.stages for name in self._stage_parameters[stage]))
        self._settle()
        self._whole.reset(sum(padded(tuple(self._shape(name))) for name in names))
        self._place(self._fill(self._whole, names, now(self.device)))
        self._held = frozenset(names)

    def unload(self) -> None:
        """Give the memory of all weights back; whoever needs them next reads them again."""
        self._settle()
        self._remove(self._meta)
        self._held = frozenset()
        self._arenas, self._whole = [Arena(self.dtype, self.device) for _ in range(2)], Arena(self.dtype, self.device)

    def use(self, weights: Weights) -> None:
        """Take the weights of another model of the same shapes from now on; those that stay in memory are loaded at once.

        Args:
            weights: names, shapes and configuration must be those of the first ones.
        """
        self.weights = weights
        self._settle()
        if self._held:
            self.load_all([stage for stage in self.stages if self._held.issuperset(self._stage_parameters[stage])])

    @contextmanager
    def loaded(self, stage: str, following: str | None = None) -> Iterator[None]:
        """Have the weights of one stage in memory, and begin to read those of the stage that follows.

        Args:
            stage: what to load.
            following: what will be asked for next.
        """
        if not self._missing(stage):
            yield
            return
        if self._pending is not None and self._pending[0] == stage:
            _, arena, future = self._pending
            weights, self._pending = future.result(), None
        else:
            self._settle()
            arena = self._arenas[0]
            weights = self._fill(arena, self._missing(stage), self._room(stage, arena))
        if following is not None and self._pool is not None and self._missing(following):
            other = self._arenas[1] if arena is self._arenas[0] else self._arenas[0]
            reading = self._pool.submit(self._fill, other, self._missing(following), self._room(following, other))
            self._pending = (following, other, reading)
        self._place(weights)
        try:
            yield
        finally:
            self._remove(weights)

    def parameters(self, stage: str) -> dict[str, torch.Tensor]:
        """Return what a stage's parameters hold now, under their first names; buffers are left out."""
        held = {name: self._places[name][0] for name in self._stage_parameters[stage]}
        return {name: m._parameters[a] for name, (_, m, a) in held.items() if m._parameters.get(a) is not None}  # type: ignore[misc]

    def replaced(self, values: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Have other tensors stand in for parameters of a loaded stage.

        Args:
            values: first name → what every module that holds the parameter finds in its place.
        """
        return standing_in(self._places, values)

    def read(self, name: str, weights: Weights) -> torch.Tensor:
        """Read one parameter from any weights of the same shapes into memory of its own, in the model's dtype.

        Args:
            name: its first name.
            weights: where from.
        """
        out = torch.empty(tuple(self._shape(name)), dtype=self.dtype, device=self.device)
        assemble(out, self.pieces[name], weights)
        return out

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

    def linear_tensors(self) -> dict[str, bool]:
        """Return the stored matrices inside the blocks, and whether each lies as (d_in, d_out)."""
        sites = (site for sites in self.planned_sites().values() for site in sites if site.kind == "linear")
        return {piece.tensor.name: site.transposed for site in sites for piece in site.pieces}

    def close(self) -> None:
        """Stop reading ahead."""
        for pool in filter(None, (self._pool, self._readers)):
            pool.shutdown(cancel_futures=True)

    # How ----------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait for what is being read ahead, and forget it."""
        if self._pending is not None:
            self._pending[2].result()
            self._pending = None

    def _missing(self, stage: str) -> list[str]:
        return [name for name in self._stage_parameters[stage] if name not in self._held]

    def _room(self, stage: str, arena: Arena) -> Any:
        """Make room for a stage in an arena, and return after what on a GPU it may be filled.

        What the arena held, and what was freed for it, nothing uses that is asked of the GPU later.
        """
        arena.reset(self.stage_elements(stage))
        return now(self.device)

    def _fill(self, arena: Arena, names: Sequence[str], after: Any = None) -> dict[str, torch.Tensor]:
        """Read parameters into an arena; on a GPU beside all work but what must be done before (`after`, from `now`)."""
        weights = {name: arena.take(tuple(self._shape(name))) for name in names}
        if self._readers is None:
            for name, tensor in weights.items():
                assemble(tensor, self.pieces[name], self.weights)
            return weights

        def bring(name: str) -> None:
            with own_stream(self.device, after):
                assemble(weights[name], self.pieces[name], self.weights)

        for _ in self._readers.map(bring, names):
            pass
        return weights

    def _place(self, weights: dict[str, torch.Tensor]) -> None:
        for name, read in weights.items():
            # Norms take their weight in the dtype of the hidden state; where no mode casts it each time, it is cast here.
            tensor = read.float() if self.device.type != "cpu" and read.dim() == 1 and self.dtype == torch.bfloat16 else read
            # One object for all places: a tied weight that is trained must be one weight.
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            for _, module, attribute in self._places[name]:
                if attribute in module._parameters:
                    module._parameters[attribute] = parameter
                else:
                    module._buffers[attribute] = tensor

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            for _, module, attribute in self._places[name]:
                held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
                held[attribute] = self._meta[name]

    def _shape(self, name: str) -> torch.Size:
        return self._meta[name].shape

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
                yield Site(name, matrix=None, d_out=shape[1], d_in=shape[0], transposed=True, pieces=pieces, kind="embedding")
        elif len(shape) == 2:
            transposed = type(module).__name__ == "Conv1D"
            d_out, d_in = shape[::-1] if transposed else shape
            kind = "head" if module is self.model.get_output_embeddings() else "linear"
            yield Site(name, matrix=None, d_out=d_out, d_in=d_in, transposed=transposed, pieces=pieces, kind=kind)
        elif len(shape) == 3:
            for matrix in range(shape[0]):
                mine = tuple(piece for piece in pieces if piece.matrix == matrix) or pieces
                yield Site(name, matrix=matrix, d_out=shape[1], d_in=shape[2], transposed=False, pieces=mine, kind="linear")

    def _first_name(self, name: str) -> str:
        return next(first for first, group in self._places.items() if any(alias == name for alias, _, _ in group))
