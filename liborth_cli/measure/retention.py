"""How much of what fine-tuning gained is still there."""

from __future__ import annotations

from typing import Any

import numpy as np


def retention(before: Any, kept: Any, after: Any) -> Any:
    """Return (L_r − L_g) / (L_r − L_f): the share of the loss gained by fine-tuning that a model keeps.

    1: all of it; 0: as before fine-tuning; above 1 where taking memory out helps.

    Args:
        before: L_r, loss of the reference on text of the skill: a number, or an array (…,) of resamples.
        kept: L_g, that of the model in question, likewise.
        after: L_f, that of the fine-tuned model, likewise.

    Returns:
        A float, or an array (…,); NaN where fine-tuning gained nothing, so that there is nothing to keep.
    """
    gain = np.asarray(before, np.float64) - after
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(gain > 0, (np.asarray(before, np.float64) - kept) / gain, np.nan)
    return found if found.ndim else float(found)
