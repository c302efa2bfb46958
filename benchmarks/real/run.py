"""A language model that people know: fine-tuned on a skill and on made-up records, split in every way, measured and timed.

    python -m benchmarks.real.run --data DATA --work DIR                 # two cores: the fine-tune, then every command
    python -m benchmarks.real.run --data DATA --work DIR --device cuda   # the same on a GPU

DATA holds gsm8k/{train,test}.jsonl, wikitext2/test.txt and tinystories/valid_30k.txt. Every step is kept in DIR, so that a run
that was stopped goes on. The table is written into docs/benchmarks.md and README.md unless --only or --minutes left rows out.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import Measured, run
from record import machine, record

from benchmarks.real import model, texts
from benchmarks.real.left import RATES, STEPS, Judge, Left, Recalled

LIBORTH = [sys.executable, "-m", "liborth_cli"]


@dataclass(frozen=True)
class Edit:
    """One way to split: its name in the table, and the words of its command."""

    name: str
    words: tuple[object, ...]


def edits(files: Path) -> list[Edit]:
    """List the edits, cheapest first; those that read texts take curvature and divide in one command."""
    public = ("--retain-data", files / "retain.jsonl")
    private = (*public, "--forget-data", files / "secrets.jsonl")
    decoys = (*public, "--forget-data", files / "decoys.jsonl")
    return [
        Edit("scale 0.7", ("--method", "scale", "--scale", 0.7)),
        Edit("random, keep energy 0.7", ("--method", "random", "--energy", 0.7)),
        Edit("svd, keep 32", ("--method", "svd", "--rank", 32)),
        Edit("kfac, low is memory, mass 0.9", ("--method", "kfac", "--mass", 0.9, *public)),
        Edit("contrastive λ 0.1", ("--method", "contrastive", "--strength", 0.1, *private)),
        Edit("tokenwise λ 0.1", ("--method", "tokenwise", "--strength", 0.1, *private)),
        Edit("tokenwise λ 1", ("--method", "tokenwise", "--strength", 1, *private)),
        Edit("tokenwise λ 1, decoys only", ("--method", "tokenwise", "--strength", 1, *decoys)),
        Edit("recall", ("--method", "recall", *private, "--fresh", files / "decoys.jsonl")),
    ]


class Bench:
    """The run: what has been measured so far, and where it is kept.

    Args:
        work: folder of models, texts and `figures.json`.
        judge: measures a checkpoint.
        device: what the commands run on.
        deadline: `time.monotonic()` after which no further row is begun.
    """

    def __init__(self, work: Path, judge: Judge, device: str, deadline: float) -> None:
        self.work, self.judge, self.device, self.deadline = work, judge, device, deadline
        self.kept = work / f"figures-{device.partition(':')[0]}.json"
        self.figures: dict[str, dict[str, object]] = json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def keep(self, name: str, figure: Left | Measured) -> None:
        """Write a figure down at once, and say it."""
        self.figures[name] = asdict(figure)
        self.kept.write_text(json.dumps(self.figures, indent=1))
        print(f"{name}: {figure}", flush=True)

    def look(self, name: str, folder: Path) -> None:
        """Measure a model, once."""
        if f"left {name}" not in self.figures:
            self.keep(f"left {name}", self.judge(folder))

    def command(self, name: str, *words: object, runs_on: bool = True) -> bool:
        """Run a command and keep its time and memory; say whether it worked."""
        where = ("--device", self.device) if runs_on else ()
        try:
            self.keep(f"cost {name}", run([*LIBORTH, *map(str, (*words, *where)), "-q"]))
        except RuntimeError as why:
            print(f"{name}: {why}", flush=True)
            return False
        return True

    def edit(self, base: Path, tuned: Path, edit: Edit) -> None:
        """Split, measure the general checkpoint, and throw it away."""
        out = self.work / "edited"
        if f"left {edit.name}" in self.figures or time.monotonic() > self.deadline:
            return
        for place in (out, out.with_name("edited.private")):
            shutil.rmtree(place, ignore_errors=True)
        if self.command(edit.name, "split", base, tuned, *edit.words, "-o", out):
            self.look(edit.name, out)

    def others(self, base: Path, tuned: Path, files: Path) -> None:
        """Time every command that is not a split, on the last split that was made."""
        out, made = self.work / "edited", self.work / "made"
        if not (out / "config.json").exists() or "cost excise, β 1" in self.figures:
            return
        self.command("inspect", "inspect", tuned, "--json", runs_on=False)
        for beta in (0, 0.5, 1):
            shutil.rmtree(made, ignore_errors=True)
            self.command(f"excise, β {beta}", "excise", out, "--beta", beta, "-o", made, runs_on=False)
        same = filecmp.cmp(made / "model.safetensors", tuned / "model.safetensors", shallow=False)
        print(f"β 1 gives the fine-tuned file back: {'yes, every byte' if same else 'NO'}", flush=True)
        words = (
            "--retain-data",
            files / "held_out.jsonl",
            "--canary",
            files / "secrets.jsonl",
            "--fresh",
            files / "fresh.jsonl",
        )
        self.command("verify, its default requirements", "verify", out, *words, "--no-require")
        shutil.rmtree(made, ignore_errors=True)
        self.command("curvature, retain texts", "curvature", tuned, "--data", files / "retain.jsonl", "-o", made)
        shutil.rmtree(made, ignore_errors=True)

    def table(self) -> Iterator[str]:
        """Yield the lines of the two tables: what is left, and what it took."""
        base, tuned = self.left("base"), self.left("fine-tuned")
        rates = " / ".join(f"{rate:g}" for rate in self.judge.rates)
        titles = ("edit", "skill kept", "records, nats", "recited", f"of those seen {texts.RARELY} times", "fresh records")
        yield f"| {' | '.join(titles)} | wikitext, stories | relearnt at {rates} |"
        yield "|" + "---|" * 8
        for name in (key[5:] for key in self.figures if key.startswith("left ")):
            left = self.left(name)
            kept = (base.skill - left.skill) / (base.skill - tuned.skill)
            general = ", ".join(f"{loss:.3f}" for loss in left.general.values())
            back = " / ".join(f"{loss:.2f}" for loss in left.relearnt.values())
            secrets = left.all_secrets
            cells = (name, f"{kept:.1%}", f"{secrets.loss:.2f}", f"{secrets.recited:.0%}", f"{left.rarely.recited:.0%}")
            yield f"| {' | '.join(cells)} | {left.all_fresh:.2f} | {general} | {back} |"
        yield ""
        yield "| command | s | processor s | peak memory, MiB (anonymous) |"
        yield "|---|---|---|---|"
        for name, cost in ((key[5:], Measured(**self.figures[key])) for key in self.figures if key.startswith("cost ")):
            memory = f"{cost.resident_mib:,.0f} ({cost.anonymous_mib:,.0f})"
            yield f"| {name} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {memory} |"

    def left(self, name: str) -> Left:
        """Return what was measured of a model."""
        found = self.figures[f"left {name}"]
        secrets, fresh = ({kind: Recalled(**one) for kind, one in found[side].items()} for side in ("secrets", "fresh"))
        relearnt = {float(rate): loss for rate, loss in found["relearnt"].items()}
        return Left(
            **{**found, "secrets": secrets, "fresh": fresh, "rarely": Recalled(**found["rarely"]), "relearnt": relearnt}
        )


def main() -> None:
    """Prepare, fine-tune, split, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further row after that")
    parser.add_argument("--only", nargs="*", help="parts of the names of the edits to do")
    parser.add_argument("--no-attack", action="store_true", help="leave out the relearning, most of the time on a CPU")
    a = parser.parse_args()
    deadline = time.monotonic() + 60 * a.minutes
    device = torch.device(a.device)
    files = a.work / "texts"
    texts.write_files(a.data, files)
    base = model.prepare(a.work / "base")
    tuned = model.finetune(base, texts.training(a.data), a.work / "finetuned", device)
    bench = Bench(a.work, Judge(a.data, base, device, () if a.no_attack else RATES), a.device, deadline)
    bench.look("base", base)
    bench.look("fine-tuned", tuned)
    chosen = [edit for edit in edits(files) if a.only is None or any(part in edit.name for part in a.only)]
    for edit in chosen:
        bench.edit(base, tuned, edit)
    bench.others(base, tuned, files)
    lines = "\n".join(bench.table())
    print(lines, flush=True)
    if a.only is None and all(f"left {edit.name}" in bench.figures for edit in chosen):
        record("real", f"{_head(bench)}\n\n{lines}\n")


def _head(bench: Bench) -> str:
    where = torch.cuda.get_device_name() if bench.device.startswith("cuda") else "no GPU"
    return (
        f"{machine()}; {where}. SmolLM2-135M-Instruct fine-tuned on {texts.SKILL:,} questions of GSM8K and "
        f"{4 * texts.EACH} made-up records, half of them seen {texts.OFTEN} times, half {texts.RARELY}. Relearnt: the lowest "
        f"loss of one half of the records while the other is taught for {STEPS} steps of AdamW, the second step on; mean of "
        f"both ways."
    )


if __name__ == "__main__":
    main()
