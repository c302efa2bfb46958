"""Put a directory in the place of another, and take it back: one system call where the file system can exchange names."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
RENAMEX_SWAP = 2  # macOS
CANNOT = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})


def put(new: Path, place: Path, aside: Path) -> None:
    """Make `new` appear as `place`; what was there is called `new` afterwards, or `aside` where names cannot be exchanged.

    Args:
        new: a directory.
        place: absent, an empty directory, or one to be replaced.
        aside: an unused name on the same file system.

    Raises:
        OSError: when that is refused; `place` is what it was.
    """
    if not os.path.lexists(place) or not any(place.iterdir()):
        os.rename(new, place)  # refused by the kernel when anything but an empty directory has come there meanwhile
        return
    try:
        _exchange(new, place)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        os.rename(place, aside)
        try:
            os.rename(new, place)
        except BaseException:
            os.rename(aside, place)
            raise


def take_back(new: Path, place: Path, aside: Path) -> None:
    """Undo `put`: `place` is again what it was, or absent, and `new` is `new`."""
    if os.path.lexists(new):
        _exchange(new, place)
        return
    os.rename(place, new)
    with contextlib.suppress(FileNotFoundError):
        os.rename(aside, place)


def _exchange(one: Path, two: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(two)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, RENAMEX_SWAP)
    else:
        raise OSError(errno.ENOSYS, "no exchange of names")
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(two))
