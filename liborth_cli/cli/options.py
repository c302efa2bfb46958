"""Options that commands share: the words they accept, their flags, and how a command takes these as one argument.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from liborth_cli.console import Console

OUTPUT, MACHINE = "Output", "Machine"
"""Headings in --help of what every command has."""


def under(heading: str) -> Callable[..., Any]:
    """Return `typer.Option` for options that --help lists under a heading of their own."""
    return functools.partial(typer.Option, rich_help_panel=heading)


output, machine = under(OUTPUT), under(MACHINE)

Out = Annotated[Path | None, output("-o", "--out", help="Directory to create.")]
MemoryOut = Annotated[Path | None, output(help="Directory for what is private; OUT.private when not given.")]
Seed = Annotated[int, typer.Option("--seed", "--random-seed", min=0, max=2**63 - 1, help="For everything random.")]


class Weights(StrEnum):
    """How many weights are in memory."""

    AUTO = "auto"
    STREAM = "stream"
    RESIDENT = "resident"


class Kernels(StrEnum):
    """Whose inner loops compute."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True)
class Common:
    """Flags of every command."""

    device: Annotated[str, machine(help="auto, cpu, cuda or cuda:0.", envvar="LIBORTH_DEVICE")] = "auto"
    threads: Annotated[
        int | None,
        machine("-j", "--num-threads", min=1, help="Threads; all cores when not given."),
    ] = None
    quiet: Annotated[bool, output("-q", "--quiet", help="Only errors on stderr.")] = False
    verbose: Annotated[bool, output("-v", "--verbose", help="Tell more; a traceback on a bug.")] = False
    as_json: Annotated[bool, output("--json", help="One JSON document on stdout.")] = False

    @property
    def console(self) -> Console:
        """Where this command talks to."""
        return Console(self.quiet, self.verbose, self.as_json)


@dataclass(frozen=True)
class Writing(Common):
    """Flags of every command that writes a checkpoint."""

    seed: Seed = 0
    out_shard_size: Annotated[
        str | None,
        output(help="For example 5GB; the input's own files when not given."),
    ] = None
    force: Annotated[bool, output("--force", help="Replace an earlier output of liborth.")] = False
    resume: Annotated[bool, output("--resume", help="Continue a run that was stopped.")] = False
    dry_run: Annotated[
        bool,
        output("--dry-run", help="Say what would be done and what it costs; write nothing."),
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
        machine(help="Inner loops: triton's on a GPU, or torch's; auto takes triton's where measured faster."),
    ] = Kernels.AUTO


class Grouped(TyperCommand):
    """A command whose --help lists its options under their headings, without rich, which takes long to import."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options, heading by heading, those of every command last."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or usual
            if record is not None:
                groups.setdefault(title, []).append(record)
        last = [groups.pop(title, []) for title in (OUTPUT, MACHINE)]
        for title, records in [*groups.items(), *zip((OUTPUT, MACHINE), last, strict=True)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a parameter annotated with one of these dataclasses into its fields, as command-line options.

    Args:
        function: a command whose last parameter is a `Common` or one of its kinds.

    Returns:
        The same command with a signature that Typer understands.
    """
    hints = get_type_hints(function, include_extras=True)
    *own, bundle = inspect.signature(function).parameters.values()
    kind = hints[bundle.name]
    field_hints = get_type_hints(kind, include_extras=True)

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        shared = {field.name: values.pop(field.name) for field in fields(kind)}
        return function(**values, **{bundle.name: kind(**shared)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword, annotation=hints[p.name]) for p in own]
    parameters += [inspect.Parameter(f.name, keyword, default=f.default, annotation=field_hints[f.name]) for f in fields(kind)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
