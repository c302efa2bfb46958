"""What is asked of `liborth tune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli.tune.dual import SinkOptions
from liborth_cli.tune.lora import LoraOptions


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        base: the checkpoint, as the user names it.
        data: the --data arguments.
        out: directory to create.
        method: full, lora, ogd or sinks.
        private_data: the --private-data arguments: rows that only the memory may learn.
        eval_data: the --eval-data arguments.
        eval_share: share of the rows to hold out.
        seq_len: longest row, or None.
        truncate: cut longer rows.
        epochs: how often every row is read, where `LoopOptions.steps` is 0.
        retain: a factor set from public text, or None.
        retain_data: public text in its place.
        protect: share of the mass to protect.
        form: "kronecker" or "input".
        hold: weight of the divergence from the base on `retain_data`.
        exact: stored gradients, or 0.
        keep_dtype: store what was learnt in the base's dtype even where that cannot hold the orthogonality.
        sinks: the memory stream.
        lora: the low-rank updates.
        shard_bytes: size of an output file, or None.
        dry_run: say what would be done.
    """

    base: str
    data: tuple[str, ...]
    out: Path
    method: str
    private_data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    eval_share: float = 0.0
    seq_len: int | None = None
    truncate: bool = False
    epochs: float = 1.0
    retain: Path | None = None
    retain_data: tuple[str, ...] = ()
    protect: float = 0.7
    form: str = "kronecker"
    hold: float = 0.5
    exact: int = 0
    keep_dtype: bool = False
    sinks: SinkOptions = field(default_factory=SinkOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    shard_bytes: int | None = None
    dry_run: bool = False
