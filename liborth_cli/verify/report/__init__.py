"""The report: one HTML page that needs no network, made from a certificate."""

from __future__ import annotations

from pathlib import Path

from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import mode_in
from liborth_cli.verify.report.page import render_page
from liborth_cli.verify.result import Certificate


def write(path: Path, certificate: Certificate) -> None:
    """Write the report of a certificate; an earlier file of that name is replaced, or left as it was when this fails.

    Raises:
        OutputConflict: when it cannot be written there.
        OutOfResources: when the disk is full.
    """
    write_file(path, render_page(certificate).encode(), mode_in(path.absolute().parent))
