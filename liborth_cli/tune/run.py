"""A training run that can be stopped, and that is given up when its loss runs away: its state on disk, and its curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from liborth_cli.chart import Plot, Series, standalone
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.pace import Pace
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import write_tensors
from liborth_cli.console import Console, Progress
from liborth_cli.errors import VerificationFailed
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import Example, PaddedBatch
from liborth_cli.tune.full import LOSS, Full
from liborth_cli.tune.loop import Losses, Watch, arithmetic, optimiser_of, train
from liborth_cli.tune.options import LoopOptions

SMOOTH = 0.9
"""Weight of the past in the running mean of the loss."""
RUNAWAY = 1.5
"""Running mean, in units of the first loss, from which (and one nat more) training is given up."""
UNIT, STEM = "training", "state-"
"""Unit of the journal, and beginning of the names of states."""
NOTES, RANDOM = "notes", "random"


@dataclass
class Curve:
    """What was measured along the way. A step's number counts the steps done before it was measured.

    Attributes:
        steps: of every training step: step, mean loss a token in nats, learning rate, and the penalties by name.
        evaluations: of every look at the held-out rows: step, loss, and what the method measures of itself.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        """Render training.json, training.csv and training.svg."""
        document = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        made = {"training.json": document, "training.csv": self._csv(), "training.svg": standalone(self._chart())}
        return {name: text.encode() for name, text in made.items()}

    def _csv(self) -> str:
        looks = {int(e["step"]): e["loss"] for e in self.evaluations if "loss" in e}
        lines = ["step,loss,rate,evaluation"]
        lines += [f"0,,,{looks[0]!r}"] if 0 in looks else []
        for entry in self.steps:
            step = int(entry["step"]) + 1
            lines.append(f"{step},{entry['loss']!r},{entry['rate']!r},{looks.get(step, '')!r}".replace("''", ""))
        return "\n".join(lines) + "\n"

    def _chart(self) -> Plot:
        train = [(e["step"] + 1, e["loss"]) for e in self.steps]
        looks = [(e["step"], e["loss"]) for e in self.evaluations if "loss" in e]
        series = tuple(
            Series(label, tuple(x for x, _ in points), tuple(y for _, y in points))
            for label, points in (("training", train), ("held out", looks))
            if points
        )
        ends = "; ".join(f"{one.label} from {one.y[0]:.3f} to {one.y[-1]:.3f}" for one in series)
        about = f"Loss in nats a token: {ends or 'nothing was measured'}."
        return Plot("Loss while training", about, "step", "loss, nats a token", series)


@dataclass
class State:
    """Where a run is.

    Attributes:
        step: steps done.
        curve: what was measured.
        best: lowest held-out loss so far, None before the first look.
        best_step: where that was.
        first_loss: of the first step, to tell when training runs away.
        recent_loss: running mean of the training loss.
        best_values: the trained parameters at `best_step`, by name; empty when nobody asked for early stopping.
    """

    step: int = 0
    curve: Curve = field(default_factory=Curve)
    best: float | None = None
    best_step: int = -1
    first_loss: float = 0.0
    recent_loss: float = 0.0
    best_values: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """How training ended.

    Attributes:
        curve: what was measured.
        steps: how many were done.
        kept: the step whose weights were kept.
        diverged: the step at which the loss ran away, or None.
    """

    curve: Curve
    steps: int
    kept: int
    diverged: int | None

    @property
    def held_out(self) -> float | None:
        """The last held-out loss."""
        return next((entry["loss"] for entry in reversed(self.curve.evaluations) if "loss" in entry), None)


class TrainingRun(Watch):
    """One run of the loop, whose state is saved on the way."""

    def __init__(
        self, method: Full, held: Sequence[Row], options: LoopOptions, transaction: Transaction, console: Console
    ) -> None:
        """Begin, or go on where a stopped run was.

        Args:
            method: what is trained, and how.
            held: rows to look at.
            options: how long and how fast.
            transaction: where states are kept; its journal says which one is whole.
            console: where progress goes.
        """
        self.method, self.held, self.options = method, held, options
        self._transaction, self._console = transaction, console
        transaction.check_inputs(lambda name: None)  # the plan names every input by its hash
        torch.manual_seed(options.seed)
        self._optimiser = optimiser_of(method, options)
        self.state = self._load() if UNIT in transaction.finished else State()
        self._resumed, self._random, self._diverged = self.state.step, torch.get_rng_state(), False
        self._pace = Pace("step", console.note)

    def carry_out(self, rows: Sequence[Example]) -> Trained:
        """Train until the steps are done, patience is over, or the loss runs away; the method then holds what is kept.

        Raises:
            VerificationFailed: when the loss ran away before a good state was saved.
            OutOfResources: when memory ran out; says what to lower.
        """
        with self._console.progress("train", self.options.steps, "steps") as self._progress:
            self._progress.skip(self.state.step)
            if self.state.step == 0:
                self._look()
            if not self._over:
                with self._pace.minding():
                    train(self.method, rows, self.options, self, optimiser=self._optimiser, begin=self.state.step)
                    if self._pace.waits and not self._diverged:
                        self._save()
            diverged = self.state.step + 1 if self._diverged else None
            if diverged is not None:
                if UNIT not in self._transaction.finished:
                    raise VerificationFailed(
                        f"the loss ran away at step {diverged}, before a state was saved; nothing was written. "
                        "Lower --lr, or raise --warmup"
                    )
                self.state = self._load()
            elif not self._over:
                self._look()
        kept = self.state.step
        if self.state.best_values:
            for name, value in self.state.best_values.items():
                self.method.parameters[name].data.copy_(value)
            kept = self.state.best_step
        self.method.model.eval()
        return Trained(self.state.curve, self.state.step, kept, diverged)

    def forget(self, but: Path | None = None) -> None:
        """Remove states, those too that a killed run wrote and did not live to journal: they hold what is private."""
        for file in self._transaction.private.glob(f"{STEM}*"):
            if file != but:
                file.unlink(missing_ok=True)

    def before(self, step: int, rate: float, losses: Losses | None) -> bool:
        """Give up when the loss runs away; save the weights now and then, once they are known to give a sound loss."""
        if losses is None:
            self._diverged = True
            return False
        if step == 0:
            self.state.first_loss = self.state.recent_loss = losses[LOSS]
        recent = SMOOTH * self.state.recent_loss + (1 - SMOOTH) * losses[LOSS]
        if recent > RUNAWAY * self.state.first_loss + 1.0:
            self._diverged = True
            return False
        if step and step != self._resumed and (step % self.options.save_every == 0 or self._pace.is_due):
            self._save()
        self.state.recent_loss = recent
        self.state.curve.steps.append({"step": step, "rate": rate, **losses})
        return True

    def after(self, done: int) -> bool:
        """Note a step, and look at the held-out rows when it is time; False when patience is over."""
        self.state.step = done
        self._random = torch.get_rng_state()
        self._pace.done()
        self._tell()
        if self.options.eval_every and done % self.options.eval_every == 0 and done < self.options.steps:
            self._look()
        return not self._over

    @property
    def _over(self) -> bool:
        """Whether patience has run out."""
        since = sum(look["step"] > self.state.best_step for look in self.state.curve.evaluations)
        return bool(self.options.patience) and since >= self.options.patience

    @torch.no_grad()
    def _look(self) -> None:
        """Measure the held-out loss and what the method promises; remember the weights when they are the best so far."""
        state, method, options = self.state, self.method, self.options
        entry: dict[str, float] = {"step": state.step, **method.measure()}
        if self.held:
            method.model.eval()
            ordered = sorted(self.held, key=lambda row: row.tokens)
            total = tokens = 0.0
            for start in range(0, len(ordered), options.batch_size):
                batch = PaddedBatch.of(ordered[start : start + options.batch_size], method.device)
                with arithmetic(options, method.device):
                    total += float(method.loss(batch)[0])
                tokens += batch.tokens
            method.model.train()
            entry["loss"] = total / tokens
            if state.best is None or entry["loss"] < state.best:
                state.best, state.best_step = entry["loss"], state.step
                if options.patience:
                    state.best_values = {name: p.detach().clone() for name, p in method.parameters.items()}
        state.curve.evaluations.append(entry)

    def _tell(self) -> None:
        state, steps = self.state, self.options.steps
        progress: Progress = self._progress
        progress.say = f"loss {state.recent_loss:.3f}"
        progress.advance(1)
        if state.step % max(steps // 10, 1) == 0 and state.step < steps:
            look = state.curve.evaluations[-1].get("loss") if state.curve.evaluations else None
            held = f", held out {look:.3f}" if look is not None else ""
            left = progress.seconds_left(steps)
            self._console.note(f"step {state.step} of {steps}: loss {state.recent_loss:.3f}{held}, about {left:.0f} s left")

    def _save(self) -> None:
        """Write the state under a new name, note it in the journal, and then forget the one before."""
        with self._pace.keeping():
            state = self.state
            notes = {key: value for key, value in vars(state).items() if key not in ("curve", "best_values")}
            text = json.dumps({**notes, "curve": asdict(state.curve)}).encode()
            tensors = {NOTES: torch.from_numpy(np.frombuffer(text, np.uint8).copy()), RANDOM: self._random}
            for name, parameter in self.method.parameters.items():
                tensors[f"value/{name}"] = parameter.data
                tensors |= {f"moment/{key}/{name}": v for key, v in self._optimiser.state.get(parameter, {}).items()}
            tensors |= {f"best/{name}": value for name, value in state.best_values.items()}
            written = write_tensors(self._transaction.private / f"{STEM}{state.step:08d}.safetensors", tensors, 0o600)
            self._transaction.finish(Unit.of(UNIT, private=[written]))
            self.forget(but=self._file())

    def _load(self) -> State:
        """Put parameters, optimiser and random numbers back as they were saved, and return the rest."""
        with Checkpoint.open(self._file()) as file:
            notes = json.loads(file.read(NOTES).tobytes())
            torch.set_rng_state(file.load(RANDOM))
            for name, parameter in self.method.parameters.items():
                parameter.data.copy_(file.load(f"value/{name}"))
                keys = [n.split("/", 2)[1] for n in file.tensors if n.startswith("moment/") and n.split("/", 2)[2] == name]
                if keys:
                    self._optimiser.state[parameter] = {
                        key: file.load(f"moment/{key}/{name}").to("cpu" if key == "step" else parameter.device) for key in keys
                    }
            best = {n.removeprefix("best/"): file.load(n) for n in file.tensors if n.startswith("best/")}
        return State(**{**notes, "curve": Curve(**notes["curve"]), "best_values": best})

    def _file(self) -> Path:
        return self._transaction.private / self._transaction.finished[UNIT].private[0].name
