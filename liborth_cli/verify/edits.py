"""What a split did to each tensor, measured on the weights; and other splits of the same tensors to compare it with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from liborth_cli.checkpoint.pair import Action, Policy
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo, pieces
from liborth_cli.errors import PairMismatch
from liborth_cli.linalg.truncated import energy
from liborth_cli.measure.unwritten import Unwritten
from liborth_cli.methods import Amount
from liborth_cli.split import SplitOptions, Splitter
from liborth_cli.verify.subject import Subject


@dataclass(frozen=True)
class Edit:
    """How much of one tensor's update was taken out.

    Attributes:
        update: ‖W_f − W_r‖².
        memory: ‖W_f − W_g‖².
    """

    update: float
    memory: float

    @property
    def share(self) -> float:
        """‖W_f − W_g‖² / ‖W_f − W_r‖²; more than 1 when the edit went beyond the reference."""
        return self.memory / self.update if self.update else 0.0


def measure_edits(subject: Subject) -> dict[str, Edit]:
    """Return what was done to every tensor whose update is divided, by name.

    A split's manifest tells the energies; without one they are measured, in pieces, from the three checkpoints.
    """
    document = subject.manifest
    if document is not None and document["kind"] == "split":
        records = document["tensors"].items()
        return {
            n: Edit(r["energy"], r["energy"] * r["memory"]) for n, r in records if r["action"] == "split" and r.get("energy")
        }
    plan = Splitter(*_pair(subject), SplitOptions("scale", Amount("scale", 0.5)))
    found = {item.tensor.name: _measure(subject, plan.reference, item.reference, item.tensor) for item in plan.split_items}
    return {name: edit for name, edit in found.items() if edit.memory > 0.0}


def alternative(subject: Subject, edits: dict[str, Edit], method: str, amount: Amount) -> Unwritten:
    """Plan another split of the tensors that were split, and of no others; nothing is written.

    Args:
        subject: with a reference and a fine-tuned checkpoint.
        edits: the tensors that were split.
        method: a key of `METHODS`.
        amount: how much it keeps.
    """
    policy = Policy()
    actions: dict[str, str] = {}
    if subject.manifest is not None and subject.manifest["kind"] == "split":
        recorded = subject.manifest["parameters"]["policy"]
        policy = Policy(vectors=recorded["vectors"], added=recorded["added"])
        actions = {name: record["action"] for name, record in subject.manifest["tensors"].items()}
    plan = Splitter(*_pair(subject), SplitOptions(method, amount, policy=policy, nonfinite="passthrough", seed=subject.seed))
    for name, item in plan.items.items():
        action = Action(actions[name]) if name in actions else item.action
        if action == Action.SPLIT and name not in edits:
            action = Action.SKILL
        if action != item.action and (action != Action.SPLIT or item.reference is not None):
            plan.items[name] = dataclasses.replace(item, action=action, why="as in the split")
    return Unwritten(plan, subject.run.device)


class NormMatched:
    """A random edit: elements of the update dropped by lot until each tensor has lost the energy that the split took out of it.

    The placebo: where it does as well, the split's choice of directions did nothing.

    Attributes:
        split: another split of the same tensors, whose amount is set tensor by tensor.
        edits: what to match.
    """

    def __init__(self, split: Unwritten, edits: dict[str, Edit]) -> None:
        """Take the plan of a `random` split and the energies to match."""
        self.split, self.edits = split, edits

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration."""
        return self.split.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`; an edit larger than the update drops all of it."""
        edit = self.edits.get(info.name)
        if edit is None:
            self.split.read_into(out, info)
            return
        amount = Amount("energy", max(1.0 - edit.share, 0.0))
        self.split.with_amount(amount).read_into(out, info)


def _pair(subject: Subject) -> tuple[Checkpoint, Checkpoint]:
    if subject.reference is None or subject.finetuned is None:
        raise PairMismatch("there is no pair to compare with: a reference and a fine-tuned checkpoint are needed")
    return subject.reference, subject.finetuned


def _measure(subject: Subject, reference: Checkpoint, old: TensorInfo | None, tensor: TensorInfo) -> Edit:
    assert subject.finetuned is not None and old is not None
    update, memory, general = 0.0, 0.0, subject.general.tensors[tensor.name]
    for start, stop in pieces(0, min(math.prod(old.shape), math.prod(tensor.shape))):
        finetuned = subject.finetuned.load_elements(tensor.name, start, stop).double()
        update += energy(finetuned - reference.load_elements(old.name, start, stop).double())
        memory += energy(finetuned - subject.general.load_elements(general.name, start, stop).double())
    return Edit(update, memory)
