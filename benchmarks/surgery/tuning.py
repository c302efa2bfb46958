"""Find every rival's best dose on a pair, at equal disruption: what the surgery benchmark then attacks.

    python -m benchmarks.surgery.tuning --pair DIR/A [--device cuda] [--rival NPO] [--texts 48] [--minutes 20]
    python -m benchmarks.surgery.tuning --pair liborth_cli/demo/stories --general TEXT --results FILE --attack

DIR is `pairs.py`'s; the pair that ships has no general text, so one is given. Each dose edits the fine-tuned model;
the edit is then scaled down, W_f + s·(W − W_f), to the largest share s that stays within a level: KL from the
fine-tuned model on general text of 0.01 and 0.001 nats a token, or 99 % of the skill kept. The best dose at a level
is the one whose secrets end up nearest to the loss of rows nobody trained on in the fine-tuned model, from below or
above: an edit that overshoots marks what it removed. It is tried with seeds 1 and 2 too. Results go to
PAIR/tuning.jsonl, a line a trial; what is there is not tried again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from benchmarks.rivals import RIVALS
from benchmarks.rivals.training import pad, row_losses, whole
from benchmarks.surgery.job import Completion, Job, Rival
from benchmarks.surgery.measure import WIDTH, read, read_pairs, read_texts

PIECES, HALVINGS = 16, 6
"""Texts that go together, and evaluations that find a share."""
PIECE = 400
"""Characters of a general text that count as one."""
KL_LEVELS, KEPT = (0.01, 0.001), 0.99
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trial:
    """One dose with one seed, at one level.

    Attributes:
        rival: its name.
        dose: of it.
        seed: of it.
        level: in words; "" for the edit as it is.
        share: of the edit that was taken.
        kl: from the fine-tuned model on general text, nats a token.
        kept: share of the skill's gain that is left.
        forget: loss of the secrets, nats a token.
        fresh: of rows of the form that nobody trained on, in the same model.
        never: of those rows in the fine-tuned model: where the secrets would be, had they not been learnt.
        seconds: that the edit took.
    """

    rival: str
    dose: float
    seed: int
    level: str
    share: float
    kl: float
    kept: float
    forget: float
    fresh: float
    never: float
    seconds: float

    @property
    def distance(self) -> float:
        """How far the secrets are from what was never learnt, nats a token."""
        return abs(self.never - self.forget)


class Pair:
    """A trained pair with its rows, on one device."""

    def __init__(self, folder: Path, device: str, texts: int, general: Path | None = None) -> None:
        """Load models and rows, and measure both ends.

        Args:
            folder: base/, finetuned/ and JSON lines.
            device: where they go.
            texts: held-out texts of each kind that count.
            general: a text, where there is no general.jsonl.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "finetuned")

        def load(name: str) -> Any:
            if not (folder / name).exists():
                return None
            return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).to(device).eval()

        self.folder, self.device = folder, torch.device(device)
        self.base, self.finetuned = load("base"), load("finetuned")
        self.retain = self._texts("retain")
        self.secrets = self._pairs("secrets")
        self.given, self.fresh = self._pairs("given") or self.secrets, self._pairs("fresh") or self._pairs("unseen")
        self.skill, self.general = (whole(self._texts(name)[:texts]) for name in ("held_out", "general"))
        if general is not None:
            whole_text = general.read_text(encoding="utf-8")
            pieces = [whole_text[i : i + PIECE] for i in range(0, len(whole_text) - PIECE, PIECE)][:texts]
            self.general = whole([self.tokenizer(piece, verbose=False).input_ids[:WIDTH] for piece in pieces])
        self.start = self.loss(self.base, self.skill) if self.base is not None else math.nan
        self.end, self.never = (self.loss(self.finetuned, rows) for rows in (self.skill, self.fresh))
        self.work = copy.deepcopy(self.finetuned)

    @torch.no_grad()
    def loss(self, model: Any, rows: Sequence[Completion]) -> float:
        """Return the mean loss a token that counts, nats."""
        total = tokens = 0.0
        for start in range(0, len(rows), PIECES):
            losses, counts = row_losses(model, pad(rows[start : start + PIECES], self.device), exact=True)
            total, tokens = total + float(losses.sum()), tokens + float(counts.sum())
        return total / tokens

    @torch.no_grad()
    def kl(self, model: Any) -> float:
        """Return KL(fine-tuned ‖ model) on general text, nats a token."""
        total = tokens = 0.0
        for start in range(0, len(self.general), PIECES):
            ids, labels = pad(self.general[start : start + PIECES], self.device)
            old, new = (m(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (self.finetuned, model))
            real = labels[:, 1:] >= 0
            total, tokens = total + float((old.exp() * (old - new)).sum(-1)[real].sum()), tokens + float(real.sum())
        return total / tokens

    def kept(self, model: Any) -> float:
        """Return the share of the skill's gain that is left; NaN without a reference."""
        return (self.start - self.loss(model, self.skill)) / (self.start - self.end)

    def edit(self, rival: Rival, dose: float, seed: int) -> tuple[Any, float]:
        """Return the edited model and the seconds it took."""
        model, begin = copy.deepcopy(self.finetuned), time.perf_counter()
        rival.run(Job(model, self.base, self.retain, self.given, dose, seed))
        if self.device.type != "cpu":
            torch.cuda.synchronize()
        return model, time.perf_counter() - begin

    def blend(self, edited: Any, share: float) -> Any:
        """Return the model that takes a share of an edit; it is overwritten by the next."""
        with torch.no_grad():
            for into, old, new in zip(self.work.parameters(), self.finetuned.parameters(), edited.parameters(), strict=True):
                torch.lerp(old, new, share, out=into)
        return self.work

    def _texts(self, name: str) -> list[list[int]]:
        return read_texts(self.folder / f"{name}.jsonl", self.tokenizer)

    def _pairs(self, name: str) -> list[Completion]:
        return read_pairs(self.folder / f"{name}.jsonl", self.tokenizer)


@dataclass(frozen=True)
class Attacked:
    """What an attack brought back of one model.

    Attributes:
        name: of the rival, or of the model where there is no edit.
        level: that the edit was brought to.
        lowest: loss of the secrets that were not taught, nats a token.
        attack: that got there, in words.
    """

    name: str
    level: str
    lowest: float
    attack: str


class Trials:
    """Trials on disk, and beside them what attacks on the best of them brought back."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path, self.place = path, path.with_suffix(".attacked.jsonl")
        self.every = [Trial(**row) for row in read(path)]
        self.attacked = [Attacked(**row) for row in read(self.place)]

    def attack_on(self, name: str, level: str) -> Attacked | None:
        """Return what came back of a rival's best dose at a level."""
        return next((found for found in self.attacked if (found.name, found.level) == (name, level)), None)

    def add_attack(self, found: Attacked) -> None:
        """Keep it."""
        self.attacked.append(found)
        with self.place.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")

    def of(self, rival: str, dose: float, seed: int) -> list[Trial]:
        """Return the trials of one edit."""
        return [t for t in self.every if (t.rival, t.dose, t.seed) == (rival, dose, seed)]

    def add(self, found: Sequence[Trial]) -> None:
        """Keep the trials of one edit, all at once."""
        self.every += found
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(trial)) + "\n" for trial in found))

    def best(self, rival: str, level: str) -> Trial | None:
        """Return the best dose at a level, by seed 0."""
        some = [t for t in self.every if t.rival == rival and t.level == level and t.seed == 0]
        return min((t for t in some if math.isfinite(t.forget)), key=lambda t: t.distance, default=None)


def levels(pair: Pair) -> dict[str, Callable[[Any], bool]]:
    """Return the levels, by their words: whether a model stays within."""
    found: dict[str, Callable[[Any], bool]] = {f"KL {k:g}": (lambda m, k=k: pair.kl(m) <= k) for k in KL_LEVELS}
    if pair.base is not None:
        found[f"retention {KEPT:.0%}"] = lambda m: pair.kept(m) >= KEPT
    return found


def attempt(pair: Pair, rival: Rival, dose: float, seed: int) -> list[Trial]:
    """Edit once, and bring the edit to every level."""
    edited, seconds = pair.edit(rival, dose, seed)

    def trial(level: str, share: float, model: Any) -> Trial:
        measures = pair.kl(model), pair.kept(model), pair.loss(model, pair.secrets), pair.loss(model, pair.fresh)
        return Trial(rival.name, dose, seed, level, share, *measures, never=pair.never, seconds=seconds)

    found = [trial("", 1.0, edited)]
    for level, within in levels(pair).items():
        share = share_within(lambda s, within=within: within(pair.blend(edited, s)))
        found.append(trial(level, share, pair.blend(edited, share)))
    return found


def share_within(within: Callable[[float], bool], halvings: int = HALVINGS) -> float:
    """Return the largest share that stays within a level, to one part in 2^halvings; 1 when all of it does."""
    if within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def tune(pair: Pair, rival: Rival, trials: Trials, until: float = math.inf) -> None:
    """Try all doses with the first seed, and the best of each level with the others.

    Args:
        pair: to edit.
        rival: that edits.
        trials: what was tried; more are added.
        until: seconds since the epoch after which no edit begins.
    """
    wanted: list[tuple[float, int]] = [(dose, SEEDS[0]) for dose in rival.doses]
    for dose, seed in wanted:
        if time.time() < until and not trials.of(rival.name, dose, seed):
            trials.add(attempt(pair, rival, dose, seed))
            _say(trials.of(rival.name, dose, seed))
    chosen = {best.dose for level in levels(pair) if (best := trials.best(rival.name, level)) is not None}
    for dose, seed in ((dose, seed) for dose in sorted(chosen) for seed in SEEDS[1:]):
        if time.time() < until and not trials.of(rival.name, dose, seed):
            trials.add(attempt(pair, rival, dose, seed))
            _say(trials.of(rival.name, dose, seed))


def attack(pair: Pair, trials: Trials, rivals: Sequence[Rival], until: float = math.inf) -> None:
    """Attack both ends of the pair, and every rival's best dose at every level, by the quick grid of `verify --attacks`."""
    for name, model in (("before fine-tuning", pair.base), ("fine-tuned", pair.finetuned)):
        if model is not None and trials.attack_on(name, "") is None:
            trials.add_attack(Attacked(name, "", *_lowest(pair, model)))
    for rival in rivals:
        for level in levels(pair):
            best = trials.best(rival.name, level)
            if best is None or time.time() > until or trials.attack_on(rival.name, level) is not None:
                continue
            edited, _ = pair.edit(rival, best.dose, best.seed)
            trials.add_attack(Attacked(rival.name, level, *_lowest(pair, pair.blend(edited, best.share))))
            print(trials.attacked[-1], flush=True)


def _lowest(pair: Pair, model: Any) -> tuple[float, str]:
    """Return the lowest loss under the attacks, and the attack that got there."""
    import numpy as np

    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Point
    from liborth_cli.verify.attacks import AttackRows, words
    from liborth_cli.verify.relearning import relearn

    rows = [Row(np.array(row.ids), np.arange(1, len(row.ids)) >= row.prompt, 1.0, "row") for row in pair.secrets]
    target = AttackRows(rows, np.arange(len(rows)))
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        with Checkpoint.open(Path(place)) as checkpoint:
            found = relearn(Point(checkpoint), target, device=pair.device)
    lowest, number, _ = found.lowest()
    return lowest, words([found.attacks[number]], model.config.hidden_size)


def table(trials: Trials, level: str) -> str:
    """Write the best dose of every rival at a level; over the seeds, mean and (lowest – highest)."""
    head = ("rival", "dose × share", "KL", "skill kept", "secrets", "fresh rows", "lowest attacked", "seeds", "seconds")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for rival in RIVALS:
        best = trials.best(rival.name, level)
        if best is None:
            continue
        every = [t for t in trials.every if (t.rival, t.dose, t.level) == (rival.name, best.dose, level)]
        losses = [t.forget for t in every]
        spread = f" ({min(losses):.2f} – {max(losses):.2f})" if len(losses) > 1 else ""
        cells = (
            f"{rival.name} ({rival.source})", f"{best.dose:g} × {best.share:.2f}", f"{best.kl:.4f}", f"{best.kept:.1%}",
            f"{sum(losses) / len(losses):.2f}{spread}", f"{best.fresh:.2f}",
            f"{found.lowest:.2f}" if (found := trials.attack_on(rival.name, level)) else "",
            str(len(every)), f"{best.seconds:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _say(found: Sequence[Trial]) -> None:
    for t in found:
        print(
            f"{t.rival} {t.dose:g} seed {t.seed} {t.level or 'as it is'} × {t.share:.2f}: KL {t.kl:.4f}, skill {t.kept:.2%}, "
            f"secrets {t.forget:.2f} of {t.fresh:.2f}, {t.seconds:.1f} s",
            flush=True,
        )


def main() -> None:
    """Tune rivals on a pair, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="file of trials; PAIR/tuning.jsonl when not given")
    parser.add_argument("--rival", action="append", help="its name; again for each; all when not given")
    parser.add_argument("--texts", type=int, default=48, help="held-out texts of each kind that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--general", type=Path, help="a text, for a pair without general.jsonl")
    parser.add_argument("--attack", action="store_true", help="attack the best doses, too")
    parser.add_argument("--tables", action="store_true", help="only the tables of what was tried")
    parser.add_argument("--publish", help="section of docs/benchmarks.md that takes the tables")
    a = parser.parse_args()
    trials, until = Trials(a.results or a.pair / "tuning.jsonl"), time.time() + 60 * a.minutes
    if not a.tables:
        pair = Pair(a.pair, a.device, a.texts, a.general)
        secrets = pair.loss(pair.finetuned, pair.secrets)
        print(f"skill {pair.start:.3f} → {pair.end:.3f}; secrets {secrets:.3f}, fresh rows {pair.never:.2f}", flush=True)
        rivals = [rival for rival in RIVALS if a.rival is None or rival.name in a.rival]
        for rival in rivals:
            tune(pair, rival, trials, until)
        if a.attack:
            attack(pair, trials, rivals, until)
    tables = "\n\n".join(
        f"At {level}:\n\n{table(trials, level)}" for level in dict.fromkeys(t.level for t in trials.every if t.level)
    )
    print(tables)
    if a.publish:
        never, untried = trials.every[0].never, [r.name for r in RIVALS if not any(t.rival == r.name for t in trials.every)]
        left = f" Not tried: {', '.join(untried)}." if untried else ""
        ends = "".join(f" {one.name.capitalize()}, attacked: {one.lowest:.2f}." for one in trials.attacked if not one.level)
        record(a.publish, f"Fresh rows in the fine-tuned model: {never:.2f} nats a token.{ends}{left}\n\n{tables}\n")


if __name__ == "__main__":
    main()
