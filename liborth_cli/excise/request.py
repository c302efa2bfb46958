"""What `excise` is asked for: the point, where it goes, and who writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli.ranks import ALONE, World


@dataclass(frozen=True)
class ExciseOptions:
    """Which point to write.

    Attributes:
        beta: how much memory: 0 none, 1 all of it.
        alpha: factor on the skill part; None keeps the split's. Another one needs the reference.
        out_shard_size: bytes; None keeps the general checkpoint's layout.
        unverified: go on where nothing vouches for a file, and say so in the output.
        key: of OpenSSH, to sign the manifest with; None: unsigned. It decides none of the bytes that `--resume` compares.
    """

    beta: float
    alpha: float | None = None
    out_shard_size: int | None = None
    unverified: bool = False
    key: Path | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Means:
    """Who writes, and what to do about outputs that exist; it decides no byte.

    Attributes:
        force: replace an existing output.
        resume: continue a stopped run.
        threads: files to write at the same time; all cores when None.
        world: the processes that share the work.
        gather: they do not see one another's disks: the first gets what the others write.
    """

    force: bool = False
    resume: bool = False
    threads: int | None = None
    world: World = ALONE
    gather: bool = False


@dataclass(frozen=True)
class ExciseRequest:
    """What `excise_checkpoint` is asked to do.

    Attributes:
        model: output of `liborth split` or `liborth tune`.
        out: directory to create.
        options: the point.
        memory: directory or file of it; None: beside the model.
        reference: checkpoint before fine-tuning, for another α.
        geodesic: factor sets at W_g and at W_f, for the geodesic between them; empty: the straight line.
        dry_run: only plan.
    """

    model: str
    out: Path
    options: ExciseOptions
    memory: Path | None = None
    reference: str | None = None
    geodesic: tuple[Path, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class Outline:
    """What an excision would write.

    Attributes:
        files: names of weight files.
        disk_bytes: upper bound of all of it.
    """

    files: list[str]
    disk_bytes: int
