"""`split`: divide the update of every chosen matrix, write the general checkpoint and the memory delta.

At any time one matrix's update is in memory, in float32, and cache-sized pieces of everything else.
"""

from liborth_cli.split.matrix import MatrixReport, SplitOptions, split_matrix
from liborth_cli.split.plan import Splitter

__all__ = ["MatrixReport", "SplitOptions", "Splitter", "split_matrix"]
