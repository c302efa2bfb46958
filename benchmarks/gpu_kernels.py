"""Every Triton kernel on a GPU: right against float64, and timed against every way torch has to do the same.

Called by gpu.py. A kernel is proven when it is faster than the fastest way of torch at every size of its table; then its
figure goes into its line of `KERNELS` in kernels/liborth_kernels/dispatch.py. If it is not, it is to be removed, and its lesson
kept in docs/log.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from liborth_kernels import dispatch
from liborth_kernels.covariance import add_covariance
from liborth_kernels.filter import filter_coefficients
from liborth_kernels.moments import add_second_moments
from liborth_kernels.rebuild import rebuild_delta
from liborth_kernels.sketch import add_update_gram, update_sketch

if TYPE_CHECKING:
    from gpu_parts import Asked

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Way = Callable[[], Result]
BF16, F32 = torch.bfloat16, torch.float32
TOLERANCE = {
    "add_covariance": 2e-5, "add_second_moments": 1e-4, "update_gram": 1e-5, "update_sketch": 2e-5,
    "filter_coefficients": 1e-13, "rebuild_delta": 0.0,
}  # fmt: skip
"""Largest error allowed, as a share of the largest entry; `rebuild_delta` promises torch's bits."""
SIZES = {
    "add_covariance": [(8192, 4096, BF16), (8192, 14336, BF16), (8192, 28672, BF16), (8192, 4096, F32), (8192, 14336, F32)],
    "add_second_moments": [(8192, 4096, 4096, BF16), (8192, 14336, 4096, BF16), (8192, 4096, 14336, F32)],
    "update_gram": [(28672, 4096, BF16), (28672, 8192, BF16), (128256, 4096, BF16)],
    "update_sketch": [(28672, 4096, 80, BF16), (28672, 8192, 80, BF16), (128256, 4096, 80, BF16)],
    "filter_coefficients": [(4096, 4096), (14336, 4096), (28672, 8192)],
    "rebuild_delta": [(4096, 4096, BF16), (28672, 8192, BF16), (28672, 8192, F32)],
}
"""Op → sizes to time: rows come first; a covariance sees 8192 tokens."""
SKETCH_TILES = [(64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3)]
"""What a program of the sketch may work on: rows, depth, warps, stages."""
BRIEF = {
    "add_covariance": [(8192, 8192, BF16), (8192, 4096, F32)],
    "update_gram": [(28672, 4096, BF16)],
    "update_sketch": [(28672, 4096, 80, BF16)],
}
"""Op → sizes to time when there is little time: of what was changed last."""
ODD = {
    "add_covariance": [(1, 1, BF16), (1001, 77, BF16), (1001, 77, torch.float16), (333, 130, F32)],
    "add_second_moments": [(1, 1, 1, BF16), (1001, 77, 130, BF16), (333, 7, 260, F32)],
    "update_gram": [(1, 1, BF16), (1001, 77, BF16), (1001, 130, torch.float16), (333, 130, F32)],
    "update_sketch": [(1, 1, 1, BF16), (1001, 77, 19, BF16), (65, 2001, 130, F32)],
    "filter_coefficients": [(1, 1), (333, 77)],
    "rebuild_delta": [(1, 1, BF16), (333, 77, BF16), (333, 77, torch.float16), (333, 77, F32)],
}
"""Op → sizes to check only."""
TINY = {
    "add_covariance": [(70, 40, BF16), (40, 30, F32)],
    "add_second_moments": [(70, 33, 40, BF16)],
    "update_gram": [(70, 40, BF16)],
    "update_sketch": [(70, 40, 19, BF16)],
    "filter_coefficients": [(33, 77)],
    "rebuild_delta": [(33, 77, BF16), (33, 77, F32)],
}
"""For a dry run, where the interpreter is slow."""


@dataclass
class Case:
    """One op at one size.

    Attributes:
        kernels: what Triton can do; the first is what `--kernels triton` takes.
        torch: what torch can do; the first is the op's own reference.
        exact: the right result, as `shown` shows it: in float64, or as bits.
        total: the running sum that every way adds to, or None where ways return what they made.
        flops: multiplications and additions that are needed; 0 where memory is the limit.
        nbytes: that have to be moved.
    """

    kernels: dict[str, Way]
    torch: dict[str, Way]
    exact: Callable[[], torch.Tensor]
    total: torch.Tensor | None = None
    flops: float = 0.0
    nbytes: float = 0.0

    def shown(self, way: Way) -> torch.Tensor:
        """Return what a way gives, from zero; of a symmetric sum the upper triangle."""
        if self.total is None:
            found = way()
            return torch.stack(found) if isinstance(found, tuple) else found
        self.total.zero_()
        way()
        square = self.total.shape[0] == self.total.shape[1]
        return self.total.triu() if square else self.total.clone()


def build(op: str, size: tuple, device: torch.device) -> Case:
    """Make the case of an op at a size."""
    *shape, dtype = size if isinstance(size[-1], torch.dtype) else (*size, torch.float64)

    def draw(*shape: int, seed: int = 0, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(kind)

    def by(asked: str, way: Way) -> Way:
        def call() -> Result:
            dispatch.use(asked, device)
            return way()

        return call

    def both(way: Way) -> dict[str, dict[str, Way]]:
        return {"kernels": {"kernel": by("triton", way)}, "torch": {"torch": by("torch", way)}}

    return BUILDERS[op](shape, dtype, draw, both)


def _covariance(shape, dtype, draw, both):
    n, d = shape
    rows, total = draw(n, d), draw(d, d, kind=F32).zero_()

    case = Case(
        **both(lambda: add_covariance(total, rows)),
        exact=lambda: torch.mm(rows.double().T, rows.double()).triu(),
        total=total,
        flops=n * d * (d + 1.0),
    )
    if dtype != F32 and rows.is_cuda:
        case.torch["cuBLAS, strips of two-byte rows, float32 out"] = lambda: _strips(total, rows)
    if dtype == F32:
        case.kernels |= _precisions(lambda p: _syrk(total, rows.T, None, p))
    return case


def _strips(total: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What torch could do in place of the kernel, without converting the rows: 9/16 of the product."""
    step = max(len(total) // 8, 1)
    for start in range(0, len(total), step):
        total[start : start + step, start:] += torch.mm(rows[:, start : start + step].T, rows[:, start:], out_dtype=F32)
    return total


def _gram(shape, dtype, draw, both):
    m, n = shape
    new, old, total = draw(m, n), draw(m, n, seed=1), draw(n, n, kind=F32).zero_()

    def exact() -> torch.Tensor:
        u = new.double() - old.double()
        return (u.T @ u).triu()

    case = Case(**both(lambda: add_update_gram(total, new, old)), exact=exact, total=total, flops=m * n * (n + 1.0))
    case.kernels |= _precisions(lambda p: _syrk(total, new.T, old.T, p))
    return case


def _sketch(shape, dtype, draw, both):
    m, n, k = shape
    new, old, x = draw(m, n), draw(m, n, seed=1), draw(n, k, seed=2, kind=F32)
    case = Case(
        **both(lambda: update_sketch(new, old, x)),
        exact=lambda: (new.double() - old.double()) @ x.double(),
        nbytes=2.0 * m * n * dtype.itemsize,
    )

    def cut(parts: int, tile: tuple[int, ...]) -> Way:
        from liborth_kernels.sketch_triton import Tile, sketch

        return lambda: sketch(new, old, x, parts, Tile(*tile))

    case.kernels |= {f"kernel, 2 parts, {tile}": cut(2, tile) for tile in SKETCH_TILES}
    case.kernels[f"kernel, 3 parts, {SKETCH_TILES[0]}"] = cut(3, SKETCH_TILES[0])
    return case


def _moments(shape, dtype, draw, both):
    n, d_out, d_in = shape
    g, a, total = draw(n, d_out), draw(n, d_in, seed=1), draw(d_out, d_in, kind=F32).zero_()

    def exact() -> torch.Tensor:
        found = g.double().square().T @ a.double().square()
        return found.triu() if d_out == d_in else found

    return Case(**both(lambda: add_second_moments(total, g, a)), exact=exact, total=total, flops=2.0 * n * d_out * d_in)


def _filter(shape, dtype, draw, both):
    c, rho = draw(*shape), draw(*shape, seed=1).square()
    return Case(
        **both(lambda: filter_coefficients(c, rho, 0.3)), exact=lambda: c - c / (1 + 0.3 * rho), nbytes=24.0 * c.numel()
    )


def _rebuild(shape, dtype, draw, both):
    old, new, skill = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2, kind=F32)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]

    def way() -> Result:
        general, delta = rebuild_delta(old, new, skill, 0.5)
        return general.view(bits), delta

    def exact() -> torch.Tensor:
        dispatch.use("torch", torch.device("cpu"))
        general, delta = rebuild_delta(old.cpu(), new.cpu(), skill.cpu(), 0.5)
        return torch.stack([general.view(bits), delta]).to(old.device)

    return Case(**both(way), exact=exact, nbytes=(4.0 * dtype.itemsize + 4) * old.numel())


BUILDERS = {
    "add_covariance": _covariance, "update_gram": _gram, "update_sketch": _sketch, "add_second_moments": _moments,
    "filter_coefficients": _filter, "rebuild_delta": _rebuild,
}  # fmt: skip


def _precisions(way: Callable[[str], Result]) -> dict[str, Way]:
    return {f"kernel, {name}": lambda name=name: way(name) for name in ("ieee", "bf16x3")}


def _syrk(total: torch.Tensor, new: torch.Tensor, old: torch.Tensor | None, precision: str) -> torch.Tensor:
    from liborth_kernels.syrk_triton import syrk

    syrk(total, new, old, 1.0, precision)
    return total


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest entry."""
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-300))


def milliseconds(way: Way, device: torch.device) -> float:
    """Return the median time of a call on a GPU; in a dry run the time of one."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return cast("float", do_bench(way, warmup=10, rep=60, return_mode="median"))
    start = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - start)


def check(device: torch.device, tiny: bool) -> Iterator[str]:
    """Hold every kernel against float64 at odd sizes and at those that are timed.

    Yields:
        One line for each failure.
    """
    for op in BUILDERS:
        for size in TINY[op] if tiny else ODD[op]:
            case = build(op, size, device)
            first = next(iter(case.kernels.values()))
            found = case.shown(first)
            wrong = error(found, case.exact())
            if not wrong <= TOLERANCE[op]:
                yield f"{op} {describe(size)}: error {wrong:.1e}, allowed {TOLERANCE[op]:.0e}"
            if not torch.equal(found, case.shown(first)):
                yield f"{op} {describe(size)}: not the same bits twice"


def ceilings(device: torch.device, n: int) -> dict[str, float]:
    """Measure what the machine can do: FLOP/s of torch's product on squares of side n, bytes/s of a copy."""
    found = {}
    for name, dtype in (("float32", F32), ("bfloat16", BF16)):
        x = torch.ones(n, n, dtype=dtype, device=device)
        found[name] = 2.0 * n**3 / milliseconds(lambda x=x: x @ x, device) * 1e3
    x = torch.ones(n * n, device=device)
    found["copy"] = 2.0 * x.nbytes / milliseconds(x.clone, device) * 1e3
    return found


def measure(asked: Asked) -> Iterator[str]:
    """Check and time everything, line by line.

    Raises:
        SystemExit: when a kernel is wrong.
    """
    device, tiny = torch.device(asked.device), asked.dry_run
    wrong = list(check(device, tiny))
    if wrong:
        raise SystemExit("\n".join(wrong))
    yield "Every kernel agrees with float64 at odd sizes too, and gives the same bits twice."
    yield from certificates(device, tiny)
    yield from attention(device, tiny)
    side = 32 if tiny else 8192
    limits = ceilings(device, side)
    yield (
        f"torch's product of squares of side {side}: {limits['float32'] / 1e12:.1f} TFLOP/s in float32, "
        f"{limits['bfloat16'] / 1e12:.1f} in bf16; a copy moves {limits['copy'] / 1e9:.0f} GB/s. Rates count what has to be "
        "done (half the product where it is symmetric)."
    )
    yield ""
    yield "| op | size | way | ms | rate | of the ceiling | error |"
    yield "|---|---|---|---|---|---|---|"
    won: dict[str, bool] = {}
    for op, sizes in (TINY if tiny else BRIEF if asked.brief else SIZES).items():
        for size in sizes:
            case = build(op, size, device)
            exact = case.exact()
            taken: dict[str, float] = {}
            for name, way in {**case.kernels, **case.torch}.items():
                try:
                    off = error(case.shown(way), exact)
                    taken[name] = milliseconds(way, device)
                except Exception as problem:  # a shape that this GPU has no room for
                    yield f"| `{op}` | {describe(size)} | {name} | {type(problem).__name__} | | | |"
                    continue
                rate = _rate(case, taken[name], size, limits)
                yield f"| `{op}` | {describe(size)} | {name} | {taken[name]:.3f} | {rate} | {off:.1e} |"
            kernel = taken[next(iter(case.kernels))]
            won[op] = won.get(op, True) and kernel < min(taken[name] for name in case.torch)
            del case, exact
    yield ""
    yield "Against torch's fastest: " + "; ".join(f"`{op}` {'wins' if w else 'does not win'}" for op, w in won.items()) + "."


def certificates(device: torch.device, tiny: bool) -> Iterator[str]:
    """Hold the bound on leading eigenvalues against float64, for Gram matrices made here: it must be above the truth."""
    from liborth_cli.linalg import truncated

    m, n, k = (70, 40, 8) if tiny else (28672, 2048, 64)
    draw = torch.Generator(device).manual_seed(0)
    plain = torch.randn(m, n, generator=draw, device=device)
    decay = torch.logspace(0, -1.5, n, device=device)
    for name, scale in (("flat", torch.ones(n, device=device)), ("falling", decay)):
        new, old = (plain * scale).to(BF16), torch.zeros(m, n, device=device, dtype=BF16)
        exact = new.double()
        truth = torch.linalg.eigvalsh(exact.T @ exact).flip(0)[:k].sum().item()
        for kernels in ("triton", "torch"):
            dispatch.use(kernels, device)
            total = torch.zeros(n, n, device=device)
            add_update_gram(total, new, old)
            g = (total.triu() + total.triu(1).T).double()
            found = torch.linalg.eigvalsh(g).flip(0)[:k]
            energy = truncated.energy(new.float())
            bound = truncated._padded(found.sum().item(), found, F32) * truncated._lost(g, energy)
            yield (
                f"- the {k} leading eigenvalues of a {m} × {n} Gram, {name} spectrum, by {kernels}: lost "
                f"{1 - found.sum().item() / truth:.1e} of their sum, allowed for {bound / found.sum().item() - 1:.1e}"
                + ("" if bound >= truth else " **TOO LITTLE**")
            )


def attention(device: torch.device, tiny: bool) -> Iterator[str]:
    """Ask of every kind of attention whether a row's gradients depend on the rows beside it, and what it takes."""
    from torch.nn.attention import SDPBackend

    ways = [("plain products, float32", SDPBackend.MATH, F32)]
    if device.type == "cuda":
        ways += [
            ("memory-efficient, float32", SDPBackend.EFFICIENT_ATTENTION, F32),
            ("flash, bf16", SDPBackend.FLASH_ATTENTION, BF16),
        ]
    for rows, heads, length, width in [(4, 2, 16, 8)] if tiny else [(64, 32, 256, 64), (8, 32, 2048, 64)]:
        draw = torch.Generator(device).manual_seed(0)
        x = [torch.randn(rows, heads, length, width, generator=draw, device=device) for _ in range(4)]
        exact = _attended(x, 1, SDPBackend.MATH, torch.float64)
        for name, backend, dtype in ways:
            alone = _attended(x, 1, backend, dtype)
            among = [[grad[:1] for grad in _attended(x, rows, backend, dtype)] for _ in range(3)]
            moved = max(error(a, b) for some in among for a, b in zip(some, alone, strict=True))
            off = max(error(a, b) for a, b in zip(alone, exact, strict=True))
            ms = milliseconds(lambda x=x, n=rows, b=backend, d=dtype: _attended(x, n, b, d)[0], device)
            yield (
                f"- attention of {rows} rows of {length} by {name}: {ms:.2f} ms, error {off:.1e}; other rows move a row's "
                f"gradients by {moved:.1e}"
            )


def _attended(x: list[torch.Tensor], rows: int, backend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the gradients of q, k and v, for so many of the rows; x: q, k, v and the gradient that comes in."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    q, k, v = (part[:rows].to(dtype).requires_grad_() for part in x[:3])
    with sdpa_kernel(backend):
        attend(q, k, v, is_causal=True).backward(x[3][:rows].to(dtype))
    return [leaf.grad.double() for leaf in (q, k, v) if leaf.grad is not None]


def _rate(case: Case, ms: float, size: tuple, limits: dict[str, float]) -> str:
    if not case.flops:
        rate = case.nbytes / ms * 1e3
        return f"{rate / 1e9:.0f} GB/s | {rate / limits['copy']:.0%}"
    rate = case.flops / ms * 1e3
    ceiling = limits["float32" if size[-1] == F32 else "bfloat16"]
    return f"{rate / 1e12:.1f} TFLOP/s | {rate / ceiling:.0%}"


def describe(size: tuple) -> str:
    """Write a size as a person would."""
    return " × ".join(str(s) for s in size if isinstance(s, int)) + "".join(
        f", {str(s).removeprefix('torch.')}" for s in size if not isinstance(s, int)
    )
