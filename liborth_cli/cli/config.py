"""`--config run.yaml`: the flags of a command in a file. What is typed comes before the environment, that before the file.

Keys are the names of flags, without dashes in front; arguments go by their names. `--print-config` prints such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from liborth_cli.errors import BadInput, closest, from_os

LARGEST = 1 << 20
OWN = ("config", "print_config", "help_method")
"""Flags about the file itself, which it does not hold."""


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take what a file says for what is not typed, and not in the environment.

    Raises:
        BadInput: when it is no mapping of flags to values; names a key that is none, and the nearest that is.
    """
    if file is None:
        return None
    import yaml

    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST)
        document = yaml.safe_load(text)
        twice = _twice(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise from_os(error, file, "read", BadInput) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise BadInput(f"--config {file}: not YAML{f', line {mark.line + 1}' if mark else ''}") from None
    if not isinstance(document, dict):
        raise BadInput(f"--config {file}: not a mapping of flags to values, such as `method: tokenwise`")
    names = _names(context)
    if twice:
        raise BadInput(f"--config {file}: {twice[:60]!r} stands there twice")
    typed = {name for name in names if "_" not in name}
    switches = {p.name for p in context.command.get_params(context) if getattr(p, "is_flag", False)}
    for key, value in document.items():
        if str(key) not in names:
            command = f"`liborth {context.info_name}"
            advice = closest(str(key), typed, f"{command} -h` lists them")
            raise BadInput(f"--config {file}: {command}` has no flag {str(key)[:60]!r}; {advice}")
        if isinstance(value, bool) and names[str(key)] not in switches:
            raise BadInput(
                f"--config {file}: {key} is no switch, and YAML reads yes, no, on and off as true and false: quote it"
            )
    context.default_map = {**(context.default_map or {}), **{names[str(key)]: value for key, value in document.items()}}
    return file


def _twice(node: Any) -> str:
    """Return a key that a YAML mapping holds twice, or ""; the library lets the last one win."""
    seen = set[str]()
    for key, _ in node.value if getattr(node, "id", "") == "mapping" else ():
        name = str(getattr(key, "value", ""))
        if name in seen:
            return name
        seen.add(name)
    return ""


def print_config(context: typer.Context) -> None:
    """Print what was given, typed or not, as such a file."""
    import yaml

    words = {parameter: name for name, parameter in reversed(_names(context).items()) if "_" not in name}
    given = {
        words.get(name, name): _plain(context.params[name])
        for name in dict.fromkeys(_names(context).values())
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }
    typer.echo(yaml.safe_dump(given, sort_keys=False, allow_unicode=True), nl=False)


def _names(context: typer.Context) -> dict[str, str]:
    """Return every name that a file may use → the parameter's own."""
    found: dict[str, str] = {}
    for parameter in context.command.get_params(context):
        if parameter.name and parameter.name not in (*OWN, "help"):
            long = [word[2:] for word in parameter.opts if word.startswith("--")]
            found |= dict.fromkeys([*long, parameter.name], parameter.name)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
