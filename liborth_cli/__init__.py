"""liborth: take skill and memorised text apart in the weights of a language model.

    from liborth_cli import clean, split, excise, extract, verify, curvature, inspect, replay

gives the commands as functions (`liborth_cli.api`).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.2.0"


class CommandModule(ModuleType):
    """A module or package with the name of a command; it can be called, and is then that command (docs/decisions/0039)."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Carry the command out."""
        return getattr(import_module("liborth_cli.api"), self.__name__.rpartition(".")[2])(*args, **options)


def __getattr__(name: str) -> Any:
    """Return a command: a function, or the module that has its name, which can be called."""
    if name == "replay":
        return import_module("liborth_cli.api").replay
    if name in ("clean", "split", "excise", "extract", "verify", "curvature", "inspect"):
        return import_module(f"liborth_cli.{name}")
    raise AttributeError(f"module 'liborth_cli' has no attribute {name!r}")


def command_module(name: str) -> None:
    """Let an imported module be called; a module says so of itself, whoever imports it first."""
    sys.modules[name].__class__ = CommandModule
