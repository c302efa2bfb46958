"""Options that commands share: the words they accept, their flags, and how a command takes these as one argument.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from liborth_cli.cli.command import DATA, OUTPUT, RUN, WHAT
from liborth_cli.cli.config import read_config
from liborth_cli.console import Console
from liborth_cli.errors import UsageError
from liborth_cli.ranks import ALONE, World
from liborth_cli.stream.fields import FieldMap, with_map

if TYPE_CHECKING:
    from liborth_cli.machine import Run


def under(heading: str) -> Callable[..., Any]:
    """Return `typer.Option` for options that --help lists under a heading of their own."""
    return functools.partial(typer.Option, rich_help_panel=heading)


FIELDS, CONTEXT = "fields", "invoked"
"""Parameters: what --map says, and how Typer says that a command was started."""
what, data, output, running = map(under, (WHAT, DATA, OUTPUT, RUN))

Out = Annotated[Path | None, output("-o", "--out", show_default="named after the input", help="Directory to create.")]
MemoryOut = Annotated[Path | None, output(show_default="OUT.private", help="Directory for what is private.")]
Sign = Annotated[
    Path | None, output(show_default="unsigned", help="Key of OpenSSH that signs the manifest, for --signers of verify.")
]
RECORDS = "files of records"
"""Marks an option that names such files, so that the command takes --map."""
Texts = Annotated[list[str] | None, RECORDS]
TextFile = Annotated[str | None, RECORDS]
Map = Annotated[
    list[str] | None,
    data("--map", show_default="none", help="Fields of records that go by other names: prompt=instruction (docs/data.md)."),
]
Seed = Annotated[int, running("--seed", "--random-seed", min=0, max=2**63 - 1, help="For everything random.")]


class Residency(StrEnum):
    """How many weights are in memory."""

    AUTO = "auto"
    STREAM = "stream"
    RESIDENT = "resident"


class Parallel(StrEnum):
    """What several ranks share of a walk through a model."""

    AUTO = "auto"
    DATA = "data"
    LAYERS = "layers"


class Kernels(StrEnum):
    """Whose inner loops compute."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True)
class Common:
    """Flags of every command."""

    device: Annotated[str, running(help="auto, cpu, cuda or cuda:0; split takes cuda:all.", envvar="LIBORTH_DEVICE")] = "auto"
    threads: Annotated[
        int | None,
        running("-j", "--num-threads", min=1, show_default="what is free of the cores allowed", help="Threads."),
    ] = None
    quiet: Annotated[bool, running("-q", "--quiet", help="Only errors on stderr.")] = False
    verbose: Annotated[bool, running("-v", "--verbose", help="Tell more; a traceback on a bug.")] = False
    as_json: Annotated[bool, output("--json", help="One JSON document on stdout.")] = False
    config: Annotated[
        Path | None,
        running(is_eager=True, callback=read_config, help="Flags that are not typed, from a YAML file: `method: tokenwise`."),
    ] = None
    print_config: Annotated[bool, running("--print-config", help="Print what was given as such a file, and stop.")] = False
    world: World = ALONE
    """The processes that carry the command out; no option."""
    listener: Console | None = None
    """Who is told in place of the terminal, when a program calls the command; no option."""

    @property
    def console(self) -> Console:
        """Where this command talks to; the first rank speaks for all."""
        return self.listener or Console(self.quiet or not self.world.first, self.verbose, self.as_json)


@dataclass(frozen=True)
class Writing(Common):
    """Flags of every command that writes a checkpoint."""

    seed: Seed = 0
    out_shard_size: Annotated[
        str | None,
        output(show_default="the input's own files", help="Largest weight file, for example 5GB."),
    ] = None
    force: Annotated[bool, output("--force", help="Replace an earlier output of liborth.")] = False
    resume: Annotated[bool, running("--resume", help="Continue a run that was stopped.")] = False
    gather: Annotated[
        bool, running("--gather", help="Under torchrun, ranks do not see one another's disks: the first collects the output.")
    ] = False
    dry_run: Annotated[
        bool,
        running("--dry-run", help="Say what would be done and what it costs; write nothing."),
    ] = False

    @property
    def shard_bytes(self) -> int | None:
        """--out-shard-size in bytes."""
        from liborth_cli.checkpoint.layout import parse_size

        return parse_size(self.out_shard_size) if self.out_shard_size else None


@dataclass(frozen=True)
class Computing(Writing):
    """Flags of the commands whose inner loops can run on a GPU."""

    kernels: Annotated[
        Kernels,
        running(help="Inner loops: triton's on a GPU, or torch's; auto takes triton's where measured faster."),
    ] = Kernels.AUTO
    parallel: Annotated[
        Parallel,
        running(help="Under torchrun, curvature deals its rows (data) or the model's blocks (layers); auto takes what fits."),
    ] = Parallel.AUTO

    several: ClassVar[bool] = False
    """Whether the command can use several GPUs in one process."""

    @property
    def run(self) -> Run:
        """Where and how to compute."""
        from liborth_cli.machine import ALL, configure

        if self.device == ALL and not self.several:
            raise UsageError(f"--device {ALL} is for split and excise; here name one, or start one process a GPU with torchrun")
        run = configure(self.device, self.threads, self.force, self.resume, self.kernels.value, self.world)
        given = [f"--parallel {self.parallel.value}"] * (self.parallel != Parallel.AUTO) + ["--gather"] * self.gather
        idle = f"{' and '.join(given)} changes nothing in one process: torchrun starts several" if given else ""
        notes = [run.note, idle if self.world.size == 1 else ""]
        return replace(run, gather=self.gather, parallel=self.parallel.value, note="\n".join(filter(None, notes)))


def named_after(model: str) -> str:
    """Return what an output is called that is named after a model: the directory's name, or that on the hub."""
    path = Path(model)
    return path.resolve().name if path.exists() else model.rstrip("/").rpartition("/")[2].partition("@")[0]


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a parameter annotated with one of these dataclasses into its fields, as command-line options.

    Args:
        function: a command whose last parameter is a `Common` or one of its kinds.

    Returns:
        The same command with a signature that Typer understands. Where it has options that name files of records, it has
        --map too, which is put behind the names of these.
    """
    hints = get_type_hints(function, include_extras=True)
    *own, bundle = inspect.signature(function).parameters.values()
    kind = hints[bundle.name]
    field_hints = get_type_hints(kind, include_extras=True)

    options = [field for field in fields(kind) if field.name not in ("world", "listener")]

    every = {p.name: hints[p.name] for p in own} | {one.name: field_hints[one.name] for one in options}
    records = [name for name, hint in every.items() if RECORDS in getattr(hint, "__metadata__", ())]

    context = next((p.name for p in own if hints[p.name] is typer.Context), None)

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        invoked = values[context] if context else values.pop(CONTEXT)
        named = values.pop(FIELDS, None)
        for name in records:
            values[name] = _mapped(values[name], named)
        shared = {field.name: values.pop(field.name) for field in options}
        world = invoked.obj if isinstance(invoked.obj, World) else ALONE
        listener = invoked.obj if isinstance(invoked.obj, Console) else None
        return function(**values, **{bundle.name: kind(**shared, world=world, listener=listener)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [] if context else [inspect.Parameter(CONTEXT, keyword, annotation=typer.Context)]
    parameters += [p.replace(kind=keyword, annotation=hints[p.name]) for p in own]
    parameters += [inspect.Parameter(f.name, keyword, default=f.default, annotation=field_hints[f.name]) for f in options]
    parameters += [inspect.Parameter(FIELDS, keyword, default=None, annotation=Map)] if records else []
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _mapped(files: Any, words: list[str] | None) -> Any:
    """Put what --map says behind the name of a file, or of each of several."""
    if not files or not words:
        return files
    FieldMap.parse(words)
    return with_map(files, words) if isinstance(files, str) else [with_map(file, words) for file in files]
