"""A split, planned from headers: the fate of every tensor, the files, and what it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from liborth_cli import manifest
from liborth_cli.checkpoint import config, delta, layout, sidecars
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.hashing import lanes
from liborth_cli.checkpoint.pair import Action, Item, match
from liborth_cli.checkpoint.reader import Checkpoint, Shard, named_shards
from liborth_cli.checkpoint.usercard import read_card
from liborth_cli.checkpoint.views import Origin
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.machine import Run
from liborth_cli.methods import METHODS
from liborth_cli.split.edits import EditSet
from liborth_cli.split.factors import FactorSource
from liborth_cli.split.options import SKIP, SplitOptions
from liborth_cli.split.routing import route

FLOPS_PER_BYTE = 100
"""Multiplications that take about as long as reading, rounding, writing and hashing one byte (docs/scaling.md)."""


class Splitter:
    """A planned split of one pair; `write_split` carries it out.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        options: what to do.
        factors: what the method needs of each matrix.
        items: the fate of every tensor, by name.
        warnings: what the user should know before.
        files: output file → its tensors, in the order of writing.
        sidecars: files that are copied beside the weights.
        card: the model card that came with the fine-tuned checkpoint.
        memory_files: output file → the memory file that belongs to it.
    """

    def __init__(
        self,
        reference: Checkpoint,
        finetuned: Checkpoint,
        options: SplitOptions,
        retain: FactorSet | None = None,
        forget: FactorSet | Sequence[FactorSet] | None = None,
        edit: EditSet | None = None,
    ) -> None:
        """Plan everything from headers.

        Args:
            reference: W_r; an `Origin` where there is none.
            finetuned: W_f.
            options: what to do.
            retain: factors of the data to keep good at.
            forget: factors of what must go, one set or several.
            edit: what steps moved, for the method that takes them.

        Raises:
            PairMismatch: when the two do not fit.
            UsageError: when the options do not fit the method or the matrices.
        """
        options.amount.check()
        self.reference, self.finetuned, self.options = reference, finetuned, options
        skip = tuple(override.pattern for override in options.overrides if override.what == SKIP)
        found = match(reference, finetuned, replace(options.policy, skip=skip))
        self.items = {item.tensor.name: item for item in found.items}
        general = [i.tensor for i in self.items.values() if i.action != Action.WITHHELD]
        size = options.out_shard_size
        self.files = layout.keep(finetuned) if size is None else layout.reshard(general, size)
        self.memory_files = delta.shard_names(list(self.files))
        self.factors = FactorSource(METHODS[options.method].needs, finetuned, retain, forget, self.alone, edit)
        self.warnings = [*found.notes, *self.factors.warnings]
        route(self.items, options, self.factors, self.alone, found.left)
        differ = None if self.alone else config.warning(reference, finetuned)
        self.sidecars = sidecars.find(*finetuned.folders)
        self.warnings += [text for text in (differ, self._rounded()) if text]
        self.card = read_card(finetuned.folders[-1]).over(read_card(reference.path))
        if self.card.note:
            self.warnings.append(self.card.note)
        for name in finetuned.rewritten:
            self.sidecars.files.pop(name, None)
            self.warnings.append(f"{name}: tie_word_embeddings is false in the output, whose head has weights of its own")
        if self.sidecars.note:
            self.warnings.append(self.sidecars.note)

    @property
    def alone(self) -> bool:
        """Whether there is no reference, and the weights themselves are divided."""
        return isinstance(self.reference, Origin)

    @property
    def split_items(self) -> list[Item]:
        """The tensors whose update is decomposed."""
        return [item for item in self.items.values() if item.action == Action.SPLIT]

    def _rounded(self) -> str | None:
        """Say when the fine-tuned side has fewer bits than the reference: part of the update is then no learning."""
        kinds = [(i, DTYPES[i.reference.dtype].bits) for i in self.split_items if i.reference and not self.alone]
        coarse = [i for i, bits in kinds if DTYPES[i.tensor.dtype].bits < bits]
        if not coarse:
            return None
        first, before = coarse[0], coarse[0].reference
        return (
            f"{len(coarse)} matrices are {first.tensor.dtype} on the fine-tuned side and {before and before.dtype} in the "
            "reference: part of each update is rounding; give both in the same dtype"
        )

    def disk_bytes(self, scattered: bool = False) -> int:
        """Upper bound of what will be on the disk at a time.

        Args:
            scattered: all files are written at once, for factors come block by block.
        """
        apart = {
            file: sum(t.nbytes for t in tensors if self.items[t.name].action != Action.SKILL)
            for file, tensors in self.files.items()
        }
        headers = 3 * sum(len(s.header) for s in self.finetuned.shards.values())
        # A memory file is packed when it is whole: until then it is there in both forms.
        both = sorted(apart.values(), reverse=True) if self.options.memory_format != delta.PLAIN else []
        twice = sum(both if scattered else both[: lanes() + 1])
        return self.finetuned.nbytes + sum(apart.values()) + twice + headers + self.sidecars.nbytes

    def fingerprint(self, run: Run) -> str:
        """Hash everything that decides the output's bytes, for --resume."""
        where = [run.where, run.kernels]
        inputs = [[s.identity for s in side.shards.values()] for side in (self.reference, self.finetuned)]
        seen = json.dumps(
            [inputs, self.factors.identity(), asdict(self.options), where, manifest.Maker(kind="split").model_dump()],
            sort_keys=True,
        )
        return hashlib.sha256(seen.encode()).hexdigest()

    def sources(self, file: str) -> dict[str, Shard]:
        """Return those of the `inputs` that one output file is made from."""
        found = {}
        for tensor in self.files[file]:
            old = self.items[tensor.name].reference
            found[f"finetuned/{tensor.shard}"] = self.finetuned.shards[tensor.shard]
            if old is not None and not self.alone:
                found[f"reference/{old.shard}"] = self.reference.shards[old.shard]
        return found

    @property
    def inputs(self) -> dict[str, Shard]:
        """The files of the reference, where there is one, and of the fine-tuned checkpoint, by name."""
        old = {} if self.alone else {"reference": self.reference}
        return named_shards({**old, "finetuned": self.finetuned})

    def cost(self, file: str) -> float:
        """Estimate what one output file takes: its bytes, and the cubes of the sides of what is decomposed, as bytes."""
        total = 0.0
        for tensor in self.files[file]:
            item = self.items[tensor.name]
            matrices, rows, cols = item.grid if item.action == Action.SPLIT else (0, 1, 1)
            total += tensor.nbytes + matrices * rows * cols * min(rows, cols) / FLOPS_PER_BYTE
        return total
