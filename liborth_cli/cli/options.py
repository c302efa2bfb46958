"""Options that every command shares, and the few lines that let a command take them as one argument."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from liborth_cli.cli.choices import Kernels
from liborth_cli.console import Console


@dataclass(frozen=True)
class Common:
    """Flags of every command."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", envvar="LIBORTH_DEVICE")] = "auto"
    threads: Annotated[
        int | None,
        typer.Option("-j", "--num-threads", min=1, help="Threads; all cores when not given."),
    ] = None
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Tell more; a traceback on a bug.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False

    @property
    def console(self) -> Console:
        """Where this command talks to."""
        return Console(self.quiet, self.verbose, self.as_json)


@dataclass(frozen=True)
class Writing(Common):
    """Flags of every command that writes a checkpoint."""

    seed: Annotated[
        int,
        typer.Option("--seed", "--random-seed", min=0, max=2**63 - 1, help="For everything random."),
    ] = 0
    out_shard_size: Annotated[str | None, typer.Option(help="For example 5GB; the input's own files when not given.")] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output of liborth.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it costs; write nothing.")] = False

    @property
    def shard_bytes(self) -> int | None:
        """--out-shard-size in bytes."""
        from liborth_cli.checkpoint.layout import parse_size

        return parse_size(self.out_shard_size) if self.out_shard_size else None


@dataclass(frozen=True)
class Computing(Writing):
    """Flags of the commands whose inner loops can run on a GPU."""

    kernels: Annotated[
        Kernels, typer.Option(help="Inner loops: triton's on a GPU, or torch's; auto takes triton's where measured faster.")
    ] = Kernels.AUTO


def spread(function: Callable[..., None]) -> Callable[..., None]:
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
    def command(**values: Any) -> None:
        shared = {field.name: values.pop(field.name) for field in fields(kind)}
        function(**values, **{bundle.name: kind(**shared)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword, annotation=hints[p.name]) for p in own]
    parameters += [inspect.Parameter(f.name, keyword, default=f.default, annotation=field_hints[f.name]) for f in fields(kind)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
