"""The inner loops: each op beside the torch code that specifies it. Knows nothing of files or of liborth_cli."""

from liborth_kernels.covariance import add_covariance, symmetric
from liborth_kernels.gram import gram
from liborth_kernels.interpolate import interpolate
from liborth_kernels.moments import add_second_moments
from liborth_kernels.rebuild import rebuild
from liborth_kernels.rounding import round_to
from liborth_kernels.update import update

__all__ = [
    "add_covariance",
    "add_second_moments",
    "gram",
    "interpolate",
    "rebuild",
    "round_to",
    "symmetric",
    "update",
]
