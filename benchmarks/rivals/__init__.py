"""Published edits that remove what a model memorised: our own compact versions, one a file, all on one grid of doses each."""

from __future__ import annotations

from benchmarks.rivals import gradient_difference, kfac_edit, kfade, negation, npo, repselect, rmu, simnpo, winu
from benchmarks.surgery.job import Rival

RIVALS: tuple[Rival, ...] = (
    gradient_difference.RIVAL,
    npo.RIVAL,
    simnpo.RIVAL,
    rmu.RIVAL,
    negation.RIVAL,
    kfade.RIVAL,
    repselect.RIVAL,
    repselect.HARD,
    winu.RIVAL,
    kfac_edit.RIVAL,
    kfac_edit.EVERYWHERE,
)
