"""How to run: device, threads, and what to do about outputs that exist."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from liborth_cli.errors import UsageError
from liborth_cli.ranks import ALONE, World

if TYPE_CHECKING:
    import torch

TRAINING_BYTES = 16
"""What training takes for every weight: itself and its gradient in float32, and AdamW's two moments."""
LOW_RANK_BYTES = 4
"""The same where only low-rank updates are trained: float32; the updates, their gradients and moments are few beside that."""
STEPS_BYTES = 40
"""What `recall` takes for every weight, about: that training, the move and two slopes at four bytes each, and factorised retain
factors, as many as fit. `recall.steps.memory_bytes` counts for a model."""
LARGE_MATRIX = 2048
"""Shorter side from which BLAS, LAPACK and torch make better use of several threads than we would."""

HUGE_MATRIX = 6144
"""Shorter side from which a GPU has one matrix at a time: its factors and their factorisations fill the memory."""
ALL = "cuda:all"
"""All GPUs of this machine, in one process."""
DEVICE_LANES = 6
"""Matrices that are read, sent to a GPU and decomposed there at a time, each on a stream of its own."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """Settings that change how fast or where, never what is computed (up to rounding).

    Attributes:
        device: where matrices are decomposed.
        threads: for BLAS, LAPACK and torch.
        force: replace an existing output.
        resume: continue a stopped run.
        kernels: op → who computes it, "torch" or "triton", for the manifest.
        note: what the user should hear of that choice, or "".
        world: the processes that share the work.
        gather: they do not see one another's disks: the first gets what the others write.
        devices: GPUs that share the matrices of a split, where there are several; `device` is the first of them.
        parallel: what of a walk is dealt to them: rows ("data"), blocks ("layers"), or what fits ("auto").
    """

    device: torch.device
    threads: int
    force: bool = False
    resume: bool = False
    kernels: dict[str, str] = field(default_factory=dict)
    note: str = ""
    world: World = ALONE
    gather: bool = False
    parallel: str = "auto"
    devices: tuple[torch.device, ...] = ()

    @property
    def where(self) -> str:
        """The device, as it is asked for."""
        return ALL if len(self.devices) > 1 else str(self.device)

    def all_threads(self) -> None:
        """Give BLAS, LAPACK and torch all threads again."""
        _limit(self.threads)

    def share_threads(self, shorter_side: int) -> int:
        """Divide the threads between matrices and BLAS: small matrices side by side, large ones one by one.

        BLAS spends its threads well on large matrices and badly on small ones (docs/log.md).

        Args:
            shorter_side: of the largest matrix.

        Returns:
            How many matrices to work on at a time. On a GPU the arithmetic of one waits for that of another, but reading
            weights and factors goes on beside it; several GPUs have one thread each, at least.
        """
        count = max(len(self.devices), 1)
        if self.device.type != "cpu" and shorter_side < HUGE_MATRIX:
            return count * max(min(self.threads // (2 * count), DEVICE_LANES), 1)
        if count > 1:
            _limit(max(self.threads // count, 1))
            return count
        if self.device.type != "cpu" or shorter_side >= LARGE_MATRIX:
            _limit(self.threads)
            return 1
        _limit(1)
        return self.threads


def configure(
    device: str,
    threads: int | None,
    force: bool = False,
    resume: bool = False,
    kernels: str = "auto",
    world: World = ALONE,
) -> Run:
    """Choose the device and the kernels, and set the number of threads everywhere.

    Args:
        device: "auto", "cpu", "cuda", "cuda:i" or "cuda:all".
        threads: None takes what is free of the cores that this process may use (`available_cores`).
        force: replace an existing output.
        resume: continue a stopped run.
        kernels: "auto", "triton" or "torch".
        world: the processes that share the work; each takes the GPU of its number.

    Returns:
        The settings.

    Raises:
        UsageError: when the device does not exist, or cannot run the kernels asked for.
    """
    import torch
    from liborth_kernels import dispatch

    count = threads or available_cores()
    _limit(count)
    devices: tuple[torch.device, ...] = ()
    asked = device
    if device == ALL:
        if world.size > 1:
            raise UsageError(f"--device {ALL} is for one process; under torchrun each rank has a GPU: say --device cuda")
        devices, device = tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count())), "cuda:0"
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}: write auto, cpu, cuda or cuda:0") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: write auto, cpu, cuda or cuda:0")
    if chosen.type == "cuda" and chosen.index is None and world.size > 1 and torch.cuda.device_count():
        chosen = torch.device("cuda", world.local % torch.cuda.device_count())
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {asked}: torch sees {torch.cuda.device_count()} CUDA devices")
    try:
        choice = dispatch.use(kernels, chosen)
    except dispatch.KernelsUnavailable as reason:
        raise UsageError(f"--kernels {kernels}: {reason}") from None
    world.use(str(chosen))
    return Run(chosen, count, force=force, resume=resume, kernels=choice.ops, note=choice.note, world=world, devices=devices)


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], count: int, over: Event | None = None
) -> Iterator[Result]:
    """Do some work for every item, on so many threads of one processor each, and yield what came of it, in order.

    When one item fails, or the caller stops asking, what waits is given up, and what runs is waited for: it may read files that
    the caller is going to close.

    Args:
        work: what is done; it may not change what others look at.
        items: all of it.
        count: threads; with one, all is done in this one, with all the threads that BLAS and torch have.
        over: is set when what runs is of no use any more, and may end early.

    Raises:
        BaseException: what the first item to fail did.
    """
    from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

    import torch

    if count < 2:
        yield from map(work, items)
        return
    over, failed = over or Event(), list[BaseException]()

    def run(item: Item) -> Result:
        if over.is_set():
            raise CancelledError
        try:
            return work(item)
        except BaseException as error:
            failed.append(error)
            over.set()
            raise

    threads, pool = torch.get_num_threads(), ThreadPoolExecutor(count)
    torch.set_num_threads(1)
    try:
        for future in [pool.submit(run, item) for item in items]:
            wait([future])
            if failed:
                raise failed[0]
            yield future.result()
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def allowed_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its control group."""
    from liborth_cli.cgroup import cpu_quota

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(min(cores, math.floor(quota + 0.5)), 1)


def running_threads() -> int:
    """Return how many threads of this process run at the moment, the one that asks among them."""
    states = list[str]()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            states.append((task / "stat").read_text(encoding="ascii", errors="replace").rpartition(") ")[2][:1])
    return max(states.count("R"), 1)


def busy_share(cores: int, loads: str | None = None) -> float:
    """Return the share of the machine's cores that others use, 0 … 1.

    Both the average of the last minute and what runs at this moment must say so: the average still holds what has just ended,
    and the moment may be an accident. Threads of this process are no others: it hashes its inputs before it asks.

    Args:
        cores: of the machine.
        loads: what /proc/loadavg says.
    """
    try:
        average, _, _, running, _ = (loads or Path("/proc/loadavg").read_text(encoding="ascii")).split()
        others = int(running.partition("/")[0]) - (1 if loads else running_threads())
    except (OSError, ValueError):
        return 0.0
    return min(max(min(float(average), others), 0.0) / cores, 1.0)


def available_cores() -> int:
    """Return how many threads to use when nobody says: OMP_NUM_THREADS, or what is free of the allowed cores, one at least.

    Threads that wait for each other lose more on a busy core than they gain: two on a machine half busy were 3.5 times slower
    than one (docs/log.md).
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked):
        return int(asked)
    allowed, cores = allowed_cores(), os.cpu_count() or 1
    return max(min(math.floor(allowed * (1 - busy_share(cores)) + 0.5), allowed), 1)


def process_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_bytes() -> int | None:
    """Return how much memory this process may still take: what the machine has free, and its control group allows."""
    from liborth_cli.cgroup import memory_left

    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    left = memory_left()
    return free if left is None else min(free, left)


def spare_bytes() -> int:
    """Return how much memory is still to be taken: half of what is free."""
    free = free_bytes()
    return max((4 << 30) - process_bytes(), 0) if free is None else free // 2


def available_bytes() -> int:
    """Return how much memory this process is to use: what it holds already, and what is spare."""
    return process_bytes() + spare_bytes()


def too_large(needed: int, device: torch.device | None = None) -> str:
    """Say that so many bytes are more than is spare; "" when they are not.

    Args:
        needed: bytes.
        device: that they are to be on; this machine's memory where None.
    """
    if device is not None and device.type == "cuda":
        import torch

        spare = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return f"{needed / 1e9:.1f} GB, and {spare / 1e9:.1f} GB are free on {device}" if needed > spare else ""
    spare = spare_bytes()
    return f"{needed / 1e9:.1f} GB, and {spare / 1e9:.1f} GB may be used here" if needed > spare else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is an allocator's refusal; torch's says so by its text alone."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "alloc" in str(error) and "memory" in str(error)
    )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 numbers faster than float32 ones."""
    import torch

    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def slowed(dtype: torch.dtype, device: torch.device) -> str:
    """Say that a device takes longer in the bfloat16 that was asked for than in float32; "" where it does not."""
    import torch

    if dtype != torch.bfloat16 or multiplies_bfloat16(device):
        return ""
    return f"--dtype bfloat16 on {device}: it has no instructions for it, and float32 is several times faster"


def _limit(threads: int) -> None:
    import liborth_kernels.fortran  # noqa: F401  BLAS must be loaded before it can be told
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
