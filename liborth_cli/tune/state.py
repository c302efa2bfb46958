"""The state of a training run on disk: everything that decides what the next step does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from liborth_cli.checkpoint.dtypes import as_bytes
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.tune.curve import Curve

UNIT = "training"
NOTES, RANDOM = "notes", "random"
STEM = "state-"
"""What the names of states begin with."""


@dataclass
class State:
    """Where a run is.

    Attributes:
        step: steps done.
        curve: what was measured.
        best: lowest held-out loss so far.
        best_step: where that was.
        first_loss: of the first step, to tell when training runs away.
        recent_loss: running mean of the training loss.
        best_values: the trained parameters at `best_step`, by name; empty when nobody asked for early stopping.
    """

    step: int = 0
    curve: Curve = field(default_factory=Curve)
    best: float = float("inf")
    best_step: int = -1
    first_loss: float = 0.0
    recent_loss: float = 0.0
    best_values: dict[str, torch.Tensor] = field(default_factory=dict)


class Keeper:
    """Saves and restores the state in a transaction's partial directory."""

    def __init__(self, transaction: Transaction, parameters: dict[str, torch.nn.Parameter], optimiser: Any) -> None:
        """Know what a state is made of.

        Args:
            transaction: where it is kept; its journal says which file is whole.
            parameters: what is trained, by name.
            optimiser: over the same parameters.
        """
        self._transaction, self._parameters, self._optimiser = transaction, parameters, optimiser

    @property
    def saved(self) -> bool:
        """Whether there is a state to go back to."""
        return UNIT in self._transaction.finished

    def save(self, state: State, random: torch.Tensor) -> None:
        """Write the state under a new name, note it in the journal, and then forget the one before.

        Args:
            state: where the run is.
            random: state of the random numbers from which the next step begins.
        """
        notes = {
            "step": state.step,
            "curve": state.curve.to_json(),
            "best": state.best if state.best_step >= 0 else None,
            "best_step": state.best_step,
            "first_loss": state.first_loss,
            "recent_loss": state.recent_loss,
        }
        tensors = {NOTES: torch.from_numpy(np.frombuffer(json.dumps(notes).encode(), np.uint8).copy())}
        tensors[RANDOM] = random
        for name, parameter in self._parameters.items():
            tensors[f"value/{name}"] = parameter.data
            tensors |= {f"moment/{key}/{name}": v for key, v in self._optimiser.state.get(parameter, {}).items()}
        tensors |= {f"best/{name}": value for name, value in state.best_values.items()}
        writer = ShardWriter(
            self._transaction.partial / f"{STEM}{state.step:08d}.safetensors",
            [(name, _name(t.dtype), tuple(t.shape)) for name, t in tensors.items()],
            mode=0o600,
        )
        for name, tensor in tensors.items():
            writer.begin(name, _name(tensor.dtype), tuple(tensor.shape))
            writer.write(as_bytes(tensor))
        written = writer.finish()
        self._transaction.finish(UNIT, {"files": [written.to_json()], "inputs": {}})
        self._remove(self._file())

    def load(self) -> State:
        """Put parameters, optimiser and random numbers back as they were saved, and return the rest."""
        with Checkpoint.open(self._file()) as file:
            notes = json.loads(file.read(NOTES).tobytes())
            torch.set_rng_state(file.load(RANDOM))
            best = {n.removeprefix("best/"): file.load(n) for n in file.tensors if n.startswith("best/")}
            for name, parameter in self._parameters.items():
                parameter.data.copy_(file.load(f"value/{name}"))
                keys = [n for n in file.tensors if n.startswith("moment/") and n.split("/", 2)[2] == name]
                if keys:
                    self._optimiser.state[parameter] = {
                        part: file.load(key).to("cpu" if "step" in part else parameter.device)
                        for key in keys
                        for part in [key.split("/", 2)[1]]
                    }
        return State(
            notes["step"],
            Curve.from_json(notes["curve"]),
            float("inf") if notes["best"] is None else notes["best"],
            notes["best_step"],
            notes["first_loss"],
            notes["recent_loss"],
            best,
        )

    def forget(self) -> None:
        """Remove every state: the run is over, and they hold what is private."""
        self._remove()

    def _remove(self, but: Any = None) -> None:
        """Remove states, those too that a killed run wrote and did not live to journal or to remove."""
        for file in self._transaction.partial.glob(f"{STEM}*"):
            if file != but:
                file.unlink(missing_ok=True)

    def _file(self) -> Any:
        return self._transaction.partial / self._transaction.finished[UNIT]["files"][0]["name"]


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "F32", torch.uint8: "U8", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}[dtype]
