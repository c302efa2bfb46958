"""A second device that needs no hardware: tensors that say they are on a GPU and refuse what a GPU refuses.

Under `Elsewhere()` whatever is sent to `GPU` becomes a wrapper around a CPU tensor. Mixing it with a tensor on the CPU, or
asking for its NumPy array or its address, raises as on a real GPU; all else is computed on the CPU. So the way to a GPU and
back can be walked on any machine, every missing `.to(device)` found, and the result compared. Speed and a GPU's arithmetic
are not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")
CROSSING = ("to", "copy_", "__setitem__")
HOST_ONLY = ("numpy", "data_ptr", "untyped_storage", "__array__")


class Remote(torch.Tensor):
    """A tensor on the pretended GPU; what torch itself sees of it is empty."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = GPU) -> Remote:
        made = torch.Tensor._make_subclass(cls, torch.empty(0, dtype=inner.dtype, device="meta"))
        made.__dict__.update(inner=inner, place=device)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _carry_out(func, args, kwargs or {})


class Elsewhere(TorchFunctionMode):
    """While active in this thread, `GPU` and its like exist."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _carry_out(func, args, kwargs or {})


def _carry_out(func: Any, args: tuple, kwargs: dict) -> Any:
    name, values = getattr(func, "__name__", ""), list(_flat((args, kwargs)))
    remote = [v for v in values if isinstance(v, Remote)]
    if func is torch.device:
        return func(*args, **kwargs)
    if remote and func == torch.Tensor.device.__get__:
        return remote[0].__dict__["place"]
    if remote and func == torch.Tensor.is_cuda.__get__:
        return True
    if remote and name in HOST_ONLY:
        raise TypeError(f"can't take {name} of a tensor on {GPU}; copy it to the host first")
    if remote and name == "cpu":
        return args[0].inner.clone()
    near = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, Remote)]
    if remote and name not in CROSSING and any(v.dim() for v in near):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {GPU} and cpu")
    places = {v.__dict__["place"] for v in remote}
    if len(places) > 1 and name not in CROSSING:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, places))}")
    names = [
        v for v in values if isinstance(v, torch.device) or (isinstance(v, str) and v.partition(":")[0] in ("cpu", "cuda"))
    ]
    devices = [torch.device(name) for name in names]
    there = devices[0].type == "cuda" if devices else bool(remote)
    if name in CROSSING and name != "to":
        there = isinstance(args[0], Remote)
    place = devices[0] if devices else args[0].__dict__["place"] if isinstance(args[0], Remote) else next(iter(places), GPU)
    place = GPU if place.index is None else place
    owners = {id(v.inner): v for v in remote if v.__dict__["place"] == place}
    result = func(*_inner(args), **_inner(kwargs))
    if name == "to" and (args[0].__dict__["place"] if isinstance(args[0], Remote) else None) != (place if there else None):
        result = result.clone()
    return _wrap(result, owners, place) if there else result


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for part in value:
        yield from _flat(part)


def _inner(value: Any) -> Any:
    if isinstance(value, Remote):
        return value.__dict__["inner"]
    if (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value.startswith("cuda:")):
        return torch.device("cpu")
    if isinstance(value, dict):
        return {key: _inner(part) for key, part in value.items()}
    return type(value)(map(_inner, value)) if type(value) in (tuple, list) else value


def _wrap(value: Any, owners: dict[int, Remote], place: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return owners.get(id(value)) if id(value) in owners else Remote(value, place)
    if isinstance(value, (tuple, list)):
        parts = [_wrap(part, owners, place) for part in value]
        return (
            value._replace(**dict(zip(value._fields, parts, strict=True))) if hasattr(value, "_fields") else type(value)(parts)
        )
    return value
