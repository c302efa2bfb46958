"""The report: one HTML page that needs no network, made from a certificate."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from liborth_cli.errors import OutOfResources, OutputConflict
from liborth_cli.verify.report.page import render_page
from liborth_cli.verify.result import Certificate


def check(path: Path) -> None:
    """Refuse a place where no report can be written; ask before the checks run, not after.

    Raises:
        OutputConflict: when the directory is missing or closed, or something that is no file is in the way.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputConflict(f"{path}: there is no directory {folder}; make it, or choose another --report")
    if os.path.lexists(path) and not path.is_file():
        raise OutputConflict(f"{path}: is not a file; choose another --report")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputConflict(f"{path}: the directory {folder} cannot be written to")


def write(path: Path, certificate: Certificate) -> None:
    """Write the report of a certificate; an earlier file of that name is replaced, or left as it was when this fails.

    Args:
        path: the page to write.
        certificate: what `verify` found.

    Raises:
        OutputConflict: when it cannot be written there.
        OutOfResources: when the disk is full.
    """
    check(path)
    content = render_page(certificate).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}.liborth-partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources(f"{path}: the disk is full; the report needs {len(content) / 1e3:.0f} kB") from None
        raise OutputConflict(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)
