"""Memory as tokens: learnt embeddings before the text, trained by what is private alone, beside a general stream.

`tokens` are K vectors before the embeddings of the text (prompt tuning, Lester et al. 2021, arXiv 2104.08691); `deep-tokens`
are K more in the input of every block, at the same places (prefixes of every layer: Li and Liang 2021, arXiv 2101.00190; Liu et
al. 2021, arXiv 2110.07602). No weight changes, so without them the general checkpoint is untouched. The text begins at place K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from liborth_cli.checkpoint import delta
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.manifest import TuneFacts
from liborth_cli.stream.build import find_blocks
from liborth_cli.stream.runner import split_call
from liborth_cli.tune.data import IGNORED, PaddedBatch
from liborth_cli.tune.full import Lesson
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import LoraOptions, MemoryForm, SinkOptions
from liborth_cli.tune.streams import TwoStreams

COUNT = 16
"""Tokens when nobody says how many."""


class Tokens(nn.Module):
    """Learnt embeddings that stand before every text, put into a model by hooks.

    Attributes:
        embeddings: of the input, and where they are deep of the inputs of blocks 1, 2, …; (1 or blocks, K, hidden).
        awake: whether they stand there.
    """

    def __init__(self, model: Any, embeddings: torch.Tensor) -> None:
        """Hook them in, asleep.

        Args:
            model: a Transformers model.
            embeddings: see `Tokens`.
        """
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)
        self.awake, self._here = False, False
        self._table = [model.get_input_embeddings()]  # in a list, so that it is not this module's own
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        for level, block in enumerate(find_blocks(model)[: len(embeddings)]):
            if level:
                hook = lambda _module, args, kwargs, level=level: self._into(level, args, kwargs)  # noqa: E731
                self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def count(self) -> int:
        """How many tokens they are."""
        return self.embeddings.shape[1]

    def remove(self) -> None:
        """Take them out of the model."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put them before the text where the text begins; where it goes on, its places have moved on by as many."""
        if not self.awake:
            return None
        kwargs = {**kwargs, **({"input_ids": args[0]} if args else {})}
        past = kwargs.get("past_key_values")
        self._here = past is None or past.get_seq_length() == 0
        ids = kwargs["input_ids"]
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                places = kwargs[name] + self.count
                first = torch.arange(self.count, device=places.device).expand(*places.shape[:-1], -1)
                kwargs[name] = torch.cat([first, places], -1) if self._here else places
        if kwargs.get("attention_mask") is not None:
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], 1)
        if kwargs.get("labels") is not None and self._here:
            labels = kwargs["labels"]
            kwargs["labels"] = torch.cat([labels.new_full((len(labels), self.count), IGNORED), labels], 1)
        if self._here:
            text = self._table[0](kwargs.pop("input_ids"))
            mine = self.embeddings[0].to(text).expand(len(ids), -1, -1)
            kwargs["inputs_embeds"] = torch.cat([mine, text], 1)
        return (), kwargs

    def _into(self, level: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the tokens of one block in place of what the block before made of them."""
        if not (self.awake and self._here):
            return None
        hidden, rest, named = split_call(args, kwargs)
        mine = self.embeddings[level].to(hidden).expand(len(hidden), -1, -1)
        return (torch.cat([mine, hidden[:, self.count :]], 1), *rest), named

    def _after(self, _model: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Leave the answers to the tokens out."""
        if self.awake and self._here and not kwargs.get("logits_to_keep"):
            output.logits = output.logits[:, self.count :]
        return output


class MemoryTokens(TwoStreams):
    """The general stream, and tokens that are kept apart.

    Attributes:
        tokens: that are trained.
    """

    def __init__(self, network: Network, options: SinkOptions, lora: LoraOptions) -> None:
        """Draw the tokens from the table of embeddings, so that they begin as words do.

        Raises:
            UsageError: when options of neurons are given, or the tokens leave no room for a text.
        """
        if options.router or options.orthogonality or options.active or options.count:
            raise UsageError(
                "--router, --orthogonality, --active and --sinks are of neurons: leave them out beside --memory tokens"
            )
        count = options.tokens or COUNT
        if network.context is not None and count >= network.context:
            raise UsageError(f"--tokens {count}: the context of {network.context:,} tokens has no room for a text behind them")
        generator = torch.Generator().manual_seed(options.seed)
        table = network.model.get_input_embeddings().weight.detach()
        levels = len(find_blocks(network.model)) if options.memory is MemoryForm.DEEP_TOKENS else 1
        drawn = table[torch.randint(len(table), (levels * count,), generator=generator).to(table.device)]
        self.tokens = Tokens(network.model, drawn.view(levels, count, -1).clone())
        super().__init__(network, options, lora, {delta.TOKENS + "embeddings": self.tokens.embeddings})
        self.scores_some = False  # positions would count from the first of the tokens

    def loss(self, batch: PaddedBatch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Read a batch with the tokens before it, or without."""
        self.tokens.awake = self.awake(lesson)
        try:
            return self._cross_entropy(batch), {}
        finally:
            self.tokens.awake = False

    def facts(self) -> TuneFacts:
        """Say what was added."""
        return TuneFacts.model_validate({"tokens": self.tokens.count, "levels": len(self.tokens.embeddings)})


def attach_tokens(model: Any, memory: str | Path) -> Tokens:
    """Put the tokens of a memory file before every text that a general model reads.

        model = AutoModelForCausalLM.from_pretrained("out")
        tokens = liborth_cli.tune.tokens.attach_tokens(model, "out")
        …
        tokens.remove()

    Args:
        model: the general model of Transformers.
        memory: the memory file, the directory it lies in, or the output that it belongs to.

    Returns:
        The tokens; they stand there until `remove`.

    Raises:
        BadInput: when the file is not a memory, or holds no tokens.
        PairMismatch: when they are another model's.
    """
    with Checkpoint.open(find_memory(Path(memory)) or Path(memory), stem="memory") as file:
        entry = delta.TOKENS + "embeddings"
        if entry not in Memory(file).checkpoint.tensors:
            raise BadInput(f"{memory}: this memory holds no tokens")
        embeddings = file.load(entry)
    width, blocks = model.get_input_embeddings().weight.shape[1], len(find_blocks(model))
    if embeddings.dim() != 3 or embeddings.shape[2] != width or len(embeddings) not in (1, blocks):
        raise PairMismatch(f"{memory}: {entry!r} does not fit this model")
    found = Tokens(model, embeddings.to(model.device, model.dtype)).requires_grad_(False)
    found.awake = True
    return found
