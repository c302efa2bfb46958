"""What the control groups of this process allow it: processors and memory, by cgroup v2 and v1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 writes a number about as large as the address space for "no limit"."""


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many processors' worth of time this process may use, the tightest of its groups; None: no limit.

    Args:
        root: where /proc and /sys are.
    """
    found = []
    for folder, second in _groups(root, "cpu"):
        if second:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process may still take, by the tightest of its groups; None: no limit.

    Args:
        root: where /proc and /sys are.
    """
    found = []
    for folder, second in _groups(root, "memory"):
        limit = _read(folder / ("memory.max" if second else "memory.limit_in_bytes"))
        used = _read(folder / ("memory.current" if second else "memory.usage_in_bytes"))
        if limit.isdigit() and used.isdigit() and int(limit) < UNLIMITED:
            found.append(max(int(limit) - int(used), 0))
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the directories of a controller's groups, the innermost first, and whether they are of version 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        second = number == "0" and not controllers
        if not second and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if second else controllers)
        place = top / path.strip("/")
        for folder in (place, *place.parents):
            yield folder, second
            if folder == top:
                break


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
