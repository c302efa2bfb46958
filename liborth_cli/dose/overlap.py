"""Rows that stand in other rows: a secret among what must stay, or among what was never trained on, says the opposite there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.errors import BadInput

if TYPE_CHECKING:
    from liborth_cli.console import Console
    from liborth_cli.stream.texts import Row

SHORTEST = 4
"""Tokens from which a secret that is found in another row is no coincidence."""


def check_fresh(fresh: Sequence[Row], secrets: Sequence[Row]) -> None:
    """Refuse never-trained rows that are secrets: everything that is held against them would be met by them.

    Raises:
        BadInput: when there are any; names the first.
    """
    wholes, parts = {row.ids.tobytes() for row in secrets}, {_part(row) for row in secrets}
    width = np.dtype(np.int32).itemsize
    same = [row for row in fresh if row.ids.tobytes() in wholes or (len(p := _part(row)) >= SHORTEST * width and p in parts)]
    if same:
        raise BadInput(
            f"{same[0].where}: {len(same)} of {len(fresh)} fresh rows are forget rows, or end in the same secret; a level that "
            "the secrets set themselves says nothing: give rows that the model never saw"
        )


def warn_of_overlap(secrets: Sequence[Row], fresh: Sequence[Row], retain: Sequence[Row], console: Console) -> None:
    """Warn when what must be forgotten, or what counts as never seen, also stands in what must be kept."""
    joined = _joined(retain)
    if found := _standing_in(joined, secrets):
        console.warn(
            f"{found} of {len(secrets)} forget rows also stand in the retain data ({len(retain)} rows): what is to be kept and "
            "forgotten at once is kept in part; take them out of the retain data"
        )
    if found := _standing_in(joined, fresh):
        console.warn(
            f"{found} of {len(fresh)} fresh rows also stand in the retain data: if the model was trained on them, they are no "
            "measure of what it never saw"
        )


def apart(rows: Sequence[Row], secrets: Sequence[Row]) -> list[Row]:
    """Return the rows that neither are secrets nor say what one does."""
    joined, same = _joined(secrets), {row.ids.tobytes() for row in secrets}
    return [row for row in rows if row.ids.tobytes() not in same and not _stands_in(joined, row)]


def _standing_in(joined: bytes, rows: Sequence[Row]) -> int:
    """Count the rows whose part that carries loss is found in tokens written as int32."""
    return sum(_stands_in(joined, row) for row in rows)


def _stands_in(joined: bytes, row: Row) -> bool:
    """Tell whether the part of a row that carries loss is found in tokens written as int32."""
    width, part = np.dtype(np.int32).itemsize, _part(row)
    at = joined.find(part) if len(part) >= SHORTEST * width else -1
    while at >= 0 and at % width:
        at = joined.find(part, at + 1)
    return at >= 0


def _part(row: Row) -> bytes:
    """What of a row carries loss, as int32."""
    return row.ids[1:][row.keep].astype(np.int32).tobytes()


def _joined(rows: Sequence[Row]) -> bytes:
    """Write rows as int32, joined by an id that no token has."""
    return b"".join(np.append(row.ids, -1).astype(np.int32).tobytes() for row in rows)
