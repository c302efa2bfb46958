"""Arguments of the Python functions, held against their annotations before anything is done: a wrong one is one clear line."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from liborth_cli.errors import UsageError, shown

Function = TypeVar("Function", bound=Callable[..., Any])

MEANT = {
    "Place": "a path", "Texts": "one path, or several", "Fields": "a mapping, such as {'prompt': 'instruction'}",
    "More": "a mapping of options to values", "Watch": "a function", "str": "a text", "int": "a whole number",
    "float": "a number", "bool": "True or False", "str | Sequence[str]": "one text, or several", "Sequence[str]": "texts",
}  # fmt: skip
LEAST = {"threads": 1, "seed": 0}
"""Numbers that the command line bounds as well."""


def checked(function: Function) -> Function:
    """Refuse arguments that are not of the types that a function names, with `UsageError`, before it runs.

    Numbers of NumPy are taken for Python's, and whatever stands for a path for one.
    """
    signature = inspect.signature(function)

    @functools.cache
    def adapters() -> dict[str, TypeAdapter[Any]]:
        taken = {name: one.annotation for name, one in signature.parameters.items()}
        hints = get_type_hints(SimpleNamespace(__annotations__=taken), vars(sys.modules[function.__module__]))
        return {name: TypeAdapter(hint) for name, hint in hints.items()}

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        for name, value in bound.arguments.items():
            kind, meant = adapters()[name], signature.parameters[name].annotation
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: _checked(key, one, kind, meant) for key, one in value.items()}
            else:
                bound.arguments[name] = _checked(name, value, kind, meant)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def option(name: str, value: object, hint: Any) -> Any:
    """Hold the value of an option that is given by its name against its type.

    Args:
        name: of the option.
        value: given.
        hint: its type, resolved.

    Returns:
        The value, of a type of Python's own.

    Raises:
        UsageError: when it is of another type.
    """
    meant = hint.__name__ if isinstance(hint, type) else str(hint)
    return _checked(name, value, TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)), meant)


def _checked(name: str, value: object, adapter: TypeAdapter[Any], annotation: str) -> Any:
    """Return an argument in a type of Python's own.

    Raises:
        UsageError: when it is of another than is meant.
    """
    plain = _plain(value)
    try:
        adapter.validate_python(plain, strict=True)
    except ValidationError:
        words = annotation.removesuffix(" | None")
        raise UsageError(f"{name} is {MEANT.get(words, words)}, not {shown(value)}") from None
    if name in LEAST and isinstance(plain, int) and plain < LEAST[name]:
        raise UsageError(f"{name} is {LEAST[name]} at least, not {value}")
    return plain


def _plain(value: object) -> object:
    """Return what stands for a value of Python's own."""
    if isinstance(value, os.PathLike):
        return Path(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", ()):
        return value.item()  # type: ignore[attr-defined]
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
