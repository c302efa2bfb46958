"""How much is computed at a time: what a processor's cache holds, or what keeps a GPU busy."""

from __future__ import annotations

import torch

BATCH_TOKENS = 1024
"""Positions computed at a time on the CPU: enough for a product to run at full speed."""
DEVICE_BATCH_TOKENS = 16_384
"""On a GPU, where every call costs as much as 10⁹ multiplications."""
LOGIT_BYTES = 1 << 24
"""Logits in flight at a time on the CPU: small enough for the allocator to hand the same memory out again."""
DEVICE_LOGIT_BYTES = 1 << 29
"""On a GPU; loss and gradient take about five times as much. Not what is free: then it would decide how numbers are rounded."""
LONGEST = 4096
"""Positions of logits at a time on a GPU, at most: the model takes them for one row, and may make a mask of their square."""


def batch_tokens(device: torch.device, on_cpu: int = BATCH_TOKENS) -> int:
    """Return how many positions are computed at a time."""
    return on_cpu if device.type == "cpu" else DEVICE_BATCH_TOKENS


def logit_rows(vocabulary: int, device: torch.device) -> int:
    """Return for how many positions logits are computed at a time, at least 16.

    Args:
        vocabulary: scores of a position.
        device: where.
    """
    if device.type == "cpu":
        return max(LOGIT_BYTES // (4 * vocabulary), 16)
    return max(min(DEVICE_LOGIT_BYTES // (4 * vocabulary), LONGEST), 16)


def free_bytes(device: torch.device) -> int:
    """Return what this process can still take of a GPU's memory: what nobody holds, and what torch keeps for it."""
    if not torch.cuda.is_available():  # a pretended one, in tests
        return 4 << 30
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
