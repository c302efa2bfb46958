"""A model in memory for training, and which stored tensor every part of its parameters is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import BadInput
from liborth_cli.stream.build import Piece, build, make_buffers_real, match_names, places
from liborth_cli.stream.weights import Point, Weights


@dataclass(frozen=True)
class Stored:
    """Where a stored tensor lies in memory.

    Attributes:
        parameter: name of the parameter.
        info: the stored tensor.
        piece: which part of the parameter it is.
    """

    parameter: str
    info: TensorInfo
    piece: Piece

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of a parameter (or of its gradient), as a view in the stored shape."""
        return self.piece.within(whole)


class Network:
    """A Transformers model with real float32 weights; the file keeps its own names, shapes and dtypes.

    Attributes:
        checkpoint: the base.
        model: the model, asking for no gradient until told otherwise.
        parameters: first name of a parameter → the parameter. Tied ones appear once.
        stored: stored name → where it lies. A tensor that the model does not use is missing.
        context: longest sequence, or None.
        vocabulary: number of tokens the head scores.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, weights: Weights | None = None) -> None:
        """Build the model from its configuration and read its weights.

        Args:
            checkpoint: has the configuration, and names, shapes and dtypes.
            device: where the model goes.
            weights: other weights of the same names and shapes; the checkpoint's own where None.

        Raises:
            BadInput: when it is not a causal language model that Transformers knows, or its weights are quantised.
        """
        self.checkpoint = checkpoint
        self.model = build(checkpoint, torch.float32)
        pieces, _ = match_names(self.model, checkpoint)
        held = places(self.model)
        make_buffers_real(self.model, held, device)
        config = self.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.stored: dict[str, Stored] = {}
        weights = weights or Point(checkpoint)
        for name, group in held.items():
            _, module, attribute = group[0]
            is_parameter = attribute in module._parameters
            meta = (module._parameters if is_parameter else module._buffers)[attribute]
            assert meta is not None
            value = torch.empty(meta.shape, dtype=torch.float32 if meta.is_floating_point() else meta.dtype, device=device)
            for piece in pieces[name]:
                place = Stored(name, piece.tensor, piece)
                flat = place.of(value)
                weights.read_into(flat.view(-1), piece.tensor)
                if is_parameter:
                    self.stored[piece.tensor.name] = place
            for alias, _, _ in group if is_parameter else []:
                twin = checkpoint.tensors.get(alias)  # a tied tensor may be stored twice; both must follow
                if twin is not None and alias not in self.stored and twin.shape == tuple(meta.shape):
                    self.stored[alias] = Stored(name, twin, Piece(twin, name))
            if is_parameter:
                self.parameters[name] = torch.nn.Parameter(value, requires_grad=False)
            for _, owner, key in group:
                if is_parameter:
                    owner._parameters[key] = self.parameters[name]
                else:
                    owner._buffers[key] = value

    def value(self, stored: str) -> torch.Tensor:
        """Return what a stored tensor is now, as a view of the parameter, in the stored shape."""
        place = self.stored[stored]
        return place.of(self.parameters[place.parameter].data)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that can be trained: those stored as plain floating point.

        Raises:
            BadInput: when there are none.
        """
        coded = {s.parameter for s in self.stored.values() if not DTYPES[s.info.dtype].editable}
        found = {name: p for name, p in self.parameters.items() if name not in coded}
        if not found:
            raise BadInput(f"{self.checkpoint.path}: no weight is plain floating point; train the checkpoint it was made from")
        return found
