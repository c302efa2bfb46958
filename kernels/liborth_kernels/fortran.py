"""BLAS and LAPACK routines that let other Python threads run meanwhile.

SciPy's Python wrappers hold the interpreter lock for the whole call, so two matrices could not be worked on at once. SciPy
publishes the same routines as C pointers (scipy.linalg.cython_blas, cython_lapack); called through ctypes they release it.
These two extension modules are loaded without the package around them, which takes ten times as long (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np


def _extension(name: str) -> ModuleType:
    """Import scipy.linalg.`name` alone, or the ordinary way where SciPy is packed differently."""
    full = f"scipy.linalg.{name}"
    scipy = importlib.util.find_spec("scipy")
    folders = [f"{place}/linalg" for place in (scipy and scipy.submodule_search_locations) or ()]
    spec = None if full in sys.modules else importlib.machinery.PathFinder.find_spec(full, folders)
    if spec is None or spec.loader is None:
        return importlib.import_module(full)
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = tuple(map(_extension, ("cython_blas", "cython_lapack")))
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, (ctypes.py_object,)


@functools.cache
def routine(name: str) -> Callable[..., None]:
    """Find a routine by its Fortran name, such as "ssyrk".

    The callable takes what `call` makes of Python values: everything by reference.
    """
    for module in MODULES:
        if name in module.__pyx_capi__:
            capsule = module.__pyx_capi__[name]
            return ctypes.CFUNCTYPE(None)(_pointer(capsule, _name(capsule)))
    raise LookupError(name)


def call(name: str, *arguments: str | int | float | np.ndarray | ctypes.c_int, real: type = ctypes.c_float) -> None:
    """Call a routine; strings are passed as characters, numbers by reference, arrays by address.

    Args:
        name: the Fortran name.
        *arguments: in Fortran's order. Pass a `ctypes.c_int` to read an output integer back.
        real: the ctypes type that floats are passed as.
    """
    boxed = [_box(a, real) for a in arguments]
    routine(name)(*[a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else ctypes.byref(a) for a in boxed])


def _box(value, real: type):
    if isinstance(value, str):
        return ctypes.c_char(value.encode())
    if isinstance(value, int):
        return ctypes.c_int(value)
    return real(value) if isinstance(value, float) else value
