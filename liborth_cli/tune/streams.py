"""Two streams, of which every row trains one: the general weights, and a memory that acts on top of them.

What the memory is made of is the subclass's: neurons (`sinks`), or tokens before the text (`tokens`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from liborth_cli.tune.data import Example, Stream
from liborth_cli.tune.full import LOSS, Full, Lesson
from liborth_cli.tune.lora import Adapters
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import General, Learns, LoraOptions, SinkOptions


class TwoStreams(Full):
    """The general stream, and a memory that is kept apart.

    Attributes:
        network: the base, in memory.
        options: which stream learns what.
        memory: the memory's parameters, by name.
    """

    def __init__(
        self, network: Network, options: SinkOptions, lora: LoraOptions, memory: Mapping[str, torch.nn.Parameter]
    ) -> None:
        """Take the base, and the memory's parameters by name; let both learn."""
        self.network, self.options, self.memory = network, options, dict(memory)
        self._adapters = Adapters(network, lora) if options.general is General.LORA else None
        if self._adapters is not None:
            self._general = self._adapters.parameters
        else:
            self._general = network.trainable() if options.general is General.TRAIN else {}
        super().__init__(network.model, {**self.memory, **self._general})

    def clipped(self) -> list[Mapping[str, torch.nn.Parameter]]:
        """Clip the streams apart where each has its own rows: nothing of the memory's gradient reaches the general stream."""
        return [self.parameters] if self.options.learnt is Learns.ALL else [self._general, self.memory]

    def rate_factor(self, name: str) -> float:
        """Slow the general stream down."""
        return 1.0 if name in self.memory else self.options.general_rate

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Divide a batch: the general stream reads its rows without any memory; the memory reads its own, and some of these."""
        if self.options.learnt is Learns.ALL:
            return [Lesson(LOSS, rows, self.parameters)]
        mine, other = ([row for row in rows if row.stream is s] for s in (Stream.GENERAL, Stream.MEMORY))
        again = mine[: math.ceil(self.options.rehearse * len(mine))]
        lessons = [Lesson("general", mine, self._general), Lesson("memory", other, self.memory)]
        lessons += [Lesson("rehearsed", again, self.memory, own=False)]
        return [lesson for lesson in lessons if lesson.rows]

    def awake(self, lesson: Lesson | None) -> bool:
        """Tell whether the memory acts in a lesson; on held-out rows it does not."""
        return lesson is not None and lesson.name != "general"

    def finish(self) -> None:
        """Merge what the general stream learnt."""
        if self._adapters is not None:
            self._adapters.merge()
