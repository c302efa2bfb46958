"""`split`: divide the update of every chosen matrix, write the general checkpoint and the memory delta.

At any time one matrix's update is in memory, in float32, and cache-sized pieces of everything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from liborth_cli import command_module
from liborth_cli.split.options import SplitOptions

if TYPE_CHECKING:
    from liborth_cli.split.matrix import MatrixReport, split_matrix
    from liborth_cli.split.plan import Splitter
    from liborth_cli.split.write import write_split

command_module(__name__)
__all__ = ["MatrixReport", "SplitOptions", "Splitter", "split_matrix", "write_split"]
HEAVY = {"MatrixReport": "matrix", "split_matrix": "matrix", "Splitter": "plan", "write_split": "write"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: options are checked before."""
    if name not in HEAVY:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{HEAVY[name]}"), name)
