"""Read back what was written, and measure what the method promises about it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from liborth_cli.checkpoint.delta import Memory, exists
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.stream.weights import Restored
from liborth_cli.tune.method import Method
from liborth_cli.tune.network import Network
from liborth_cli.tune.ogd import ExactOgd, Ogd

TOLERANCE = 1e-5
"""Largest share of an update that may lie in the protected subspace, as written."""


def check(
    method: Method, network: Network, trained: Collection[str], folder: Path, keep_dtype: bool, console: Console
) -> dict[str, Any]:
    """Measure the orthogonality of what was written, in float64, and say it.

    Args:
        method: how it was trained.
        network: what was trained.
        trained: stored names whose update is in the memory file.
        folder: where the files are.
        keep_dtype: whether the user asked for a dtype that may be too narrow.
        console: where the result goes.

    Returns:
        Facts for the manifest; none for a method that promises nothing.
    """
    if not isinstance(method, (Ogd, ExactOgd)) or not exists(folder):
        return {}
    updates = _updates(network.checkpoint, trained, folder)
    if isinstance(method, Ogd):
        leaks = method.leaks(updates)
        worst = max(leaks, key=lambda name: leaks[name])
        found, where = leaks[worst], f" (worst: {worst})"
    else:
        whole = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in method.parameters().items()}
        for name, update in updates.items():
            place = network.stored[name]
            place.of(whole[place.parameter]).copy_(update)
        found, where, leaks = method.leak(whole), "", {}
    console.note(f"orthogonality of what was written: {found:.1e} of the update lies in the protected subspace{where}")
    if found > TOLERANCE:
        why = "its dtype cannot hold more; leave --keep-dtype out" if keep_dtype else "the update is tiny beside the weights"
        console.warn(f"that is above {TOLERANCE:g}: {why}")
    return {"orthogonality": found, "leaks": leaks}


def _updates(base: Checkpoint, trained: Collection[str], folder: Path) -> dict[str, torch.Tensor]:
    """Return W − W_base of every trained tensor, in the stored shape, float64, from the files."""
    updates: dict[str, torch.Tensor] = {}
    with Checkpoint.open(folder) as general, Checkpoint.open(folder, stem="memory") as file:
        restored = Restored(general, Memory(file))
        for name in sorted(trained):
            info = general.tensors[name]
            new = torch.empty(info.shape, dtype=torch.float64)
            restored.read_into(new.view(-1), info)
            updates[name] = new - base.load(name).double()
    return updates
