"""A language model that people know: fine-tuned on a skill and on made-up records, split in every way, measured and timed.

    python -m benchmarks.real.run --data DATA --work DIR                 # two cores: the fine-tune, then every command
    python -m benchmarks.real.run --data DATA --work DIR --device cuda   # the same on a GPU, at its size
    python -m benchmarks.real.run --data DATA --work DIR --device cuda --parts rivals  # published edits on the same pair
    python -m benchmarks.real.run --work DIR --publish                   # tables of what DIR holds, into docs/ and README.md

DATA holds gsm8k/{train,test}.jsonl, wikitext2/test.txt and tinystories/val_794k.txt. Every figure is a line of
DIR/figures.jsonl as soon as it is known, and every checkpoint stays in DIR, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import Measured, Stopped, clear, run
from record import machine, record, standing

from benchmarks.merge import merged, tables
from benchmarks.real import model, rivals, texts
from benchmarks.real.left import Back, Judge, Left
from benchmarks.real.tiers import TIERS, Tier
from benchmarks.rivals import RIVALS
from benchmarks.surgery.job import Rival
from liborth_cli.errors import VerificationFailed

LIBORTH = [sys.executable, "-m", "liborth_cli"]
RIVAL = [sys.executable, "-m", "benchmarks.real.rivals"]
BASE, TUNED = "base", "fine-tuned"
README = (
    "scale 0.7",
    "svd, keep 32",
    "contrastive λ 0.1",
    "tokenwise λ 0.1",
    "tokenwise λ 1",
    "recall",
    "distill, from recall",
)
"""Edits that stand in the README, where they were measured."""
KNOWN, TOOK = "**What each model knows**:", "**What each command took**:"
"""Titles of the two tables."""
FEW = "few_"
"""Before the names of files of two records of each kind, and of few held-out rows, for a command that splits and verifies."""
SHORT = (0, 2, 3, 4, 6, 8, 10)
"""Columns of `knowledge` that do."""


@dataclass(frozen=True)
class Edit:
    """One way to split: its name in the table, the words of its command, and whether its result is attacked."""

    name: str
    words: tuple[object, ...]
    attacked: bool = False


def edits(files: Path, tier: Tier) -> list[Edit]:
    """List the edits; those that read texts take curvature and divide in one command."""
    public = ("--retain-data", files / "retain.jsonl", "--retain-tokens", tier.retain_tokens)
    private = (*public, "--forget-data", files / "secrets.jsonl")
    decoys = (*public, "--forget-data", files / "decoys.jsonl")
    steps = ("--forget-data", files / "secrets.jsonl", "--fresh", files / "decoys.jsonl", "--dtype", "bfloat16")
    lessons = ("--retain-data", files / "lessons.jsonl", "--retain-tokens", tier.retain_tokens, "--probe-tokens", 2048)
    learning = ("--method", "distill", "--epochs", tier.distill, "--level-steps", tier.level)
    recalled = files.parent / "edits" / "recall"
    return [
        Edit("scale 0.7", ("--method", "scale", "--scale", 0.7)),
        Edit("svd, keep 32", ("--method", "svd", "--rank", 32)),
        Edit("contrastive λ 0.1", ("--method", "contrastive", "--strength", 0.1, *private), attacked=True),
        Edit("tokenwise λ 0.1", ("--method", "tokenwise", "--strength", 0.1, *private), attacked=True),
        Edit("recall", ("--method", "recall", "--steps", tier.recall, *public, *steps), attacked=True),
        Edit("distill, from recall", (*learning, "--teacher", recalled, *lessons, *steps), attacked=True),
        Edit("kfac, low is memory, mass 0.9", ("--method", "kfac", "--mass", 0.9, *public)),
        Edit("tokenwise λ 1", ("--method", "tokenwise", "--strength", 1, *private), attacked=True),
        Edit("tokenwise λ 0.1, decoys only", ("--method", "tokenwise", "--strength", 0.1, *decoys)),
        Edit("ekfac, low is memory, mass 0.9", ("--method", "ekfac", "--mass", 0.9, *public)),
        Edit("random, keep energy 0.7", ("--method", "random", "--energy", 0.7)),
        Edit("magnitude, keep density 0.1", ("--method", "magnitude", "--density", 0.1)),
        Edit("diagonal, mass 0.9", ("--method", "diagonal", "--mass", 0.9, *public)),
        Edit("impact, density 0.1", ("--method", "impact", "--density", 0.1, *public)),
    ]


class Figures:
    """What has been measured so far: a line of a file each, the last one of a name counts.

    Attributes:
        left: model → what it knows.
        backs: model → what attacks brought back.
        costs: command → what it took.
        stopped: command → what it had taken when its time was over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left: dict[str, Left] = {}
        self.backs: dict[str, list[Back]] = {}
        self.costs: dict[str, Measured] = {}
        self.stopped: dict[str, Measured] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            found = json.loads(line)
            name, value = found["name"], found["value"]
            if found["what"] == "left":
                self.left[name] = Left.read(value)
            elif found["what"] == "attacked":
                self.backs[name] = [Back(**one) for one in value]
            else:
                {"cost": self.costs, "stopped": self.stopped}[found["what"]][name] = Measured(**value)

    def know(self, name: str, left: Left) -> None:
        """Keep what a model knows."""
        self.left[name] = left
        self._write("left", name, asdict(left))

    def attacked(self, name: str, backs: list[Back]) -> None:
        """Keep what attacks brought back."""
        self.backs[name] = backs
        self._write("attacked", name, [asdict(one) for one in backs])

    def cost(self, name: str, cost: Measured, stopped: bool = False) -> None:
        """Keep what a command took."""
        (self.stopped if stopped else self.costs)[name] = cost
        self._write("stopped" if stopped else "cost", name, asdict(cost))

    def _write(self, what: str, name: str, value: object) -> None:
        line = json.dumps({"what": what, "name": name, "value": value})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


class Bench:
    """The run.

    Args:
        work: folder of models, texts and figures.
        judge: measures a checkpoint.
        device: what the commands run on.
        minutes: after which nothing more is begun, and after which one command is stopped.
    """

    def __init__(self, work: Path, judge: Judge, device: str, minutes: tuple[float, float]) -> None:
        self.work, self.judge, self.device = work, judge, device
        self.deadline, self.limit = time.monotonic() + 60 * minutes[0], 60 * minutes[1]
        self.figures = Figures(work / "figures.jsonl")

    @property
    def over(self) -> bool:
        """Whether nothing more may be begun."""
        return time.monotonic() > self.deadline

    def place(self, edit: Edit) -> Path:
        """Say where the general checkpoint of an edit is."""
        return self.work / "edits" / _slug(edit.name)

    def look(self, name: str, folder: Path) -> None:
        """Measure a model, once."""
        if name not in self.figures.left and (folder / "config.json").exists():
            self.figures.know(name, self.judge(folder))

    def attack(self, name: str, folder: Path) -> None:
        """Attack a model, once."""
        if name not in self.figures.backs and (folder / "config.json").exists() and not self.over:
            self.figures.attacked(name, self.judge.attack(folder))

    def command(
        self,
        name: str,
        *words: object,
        runs_on: bool = True,
        ends: Collection[int] = (0,),
        program: Sequence[str] = LIBORTH,
    ) -> None:
        """Run a command, once, and keep its time and memory; one that was stopped is not tried again.

        Args:
            name: in the table.
            words: of the command.
            runs_on: it takes a device.
            ends: exit codes with which it has done its work.
            program: whose command it is.
        """
        if name in self.figures.costs or name in self.figures.stopped or self.over:
            return
        where, quiet = ("--device", self.device) if runs_on else (), ("-q",) if program is LIBORTH else ()
        try:
            self.figures.cost(name, run([*program, *map(str, (*words, *where, *quiet))], limit=self.limit, ends=ends))
        except Stopped as why:
            self.figures.cost(name, why.spent, stopped=True)
        except RuntimeError as why:
            print(f"{name}: {why}", flush=True)

    def edit(self, base: Path, tuned: Path, edit: Edit) -> None:
        """Split, and measure the general checkpoint."""
        out = self.place(edit)
        self.command(edit.name, "split", base, tuned, *edit.words, "-o", out, "--force")
        self.look(edit.name, out)

    def rival(self, rival: Rival, dose: float, data: Path, size: str) -> None:
        """Make a published edit, measure it and attack it."""
        name = rivals.title(rival, dose)
        out = self.work / "edits" / _slug(name)
        given = ("--data", data, "--work", self.work, "--size", size)
        self.command(name, *given, *rivals.words(rival, dose, out), program=RIVAL)
        if (out / rivals.SHARE).exists():
            name = rivals.title(rival, dose, out)
            self.look(name, out)
            self.attack(name, out)

    def others(self, base: Path, tuned: Path, files: Path, split: Path) -> None:
        """Time every command that is not a split, on a split that was made, the quick ones first."""
        made = self.work / "made"
        if not (split / "config.json").exists():
            return
        for name in ("secrets", "fresh", "held_out"):
            rows = (files / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (files / f"{FEW}{name}.jsonl").write_text("".join(rows[:: self.judge.tier.each // 2]), encoding="utf-8")
        for name, words, runs_on in others(base, tuned, files, split, made, self.judge.tier):
            clear(made)
            ends = (0, VerificationFailed.exit_code) if words[0] == "clean" else (0,)  # its verdict may be that it is not
            self.command(name, *words, runs_on=runs_on, ends=ends)
            if name == "excise, β 1" and (made / "model.safetensors").exists():
                same = filecmp.cmp(made / "model.safetensors", tuned / "model.safetensors", shallow=False)
                print(f"β 1 gives the fine-tuned file back: {'yes, every byte' if same else 'NO'}", flush=True)


def others(
    base: Path, tuned: Path, files: Path, split: Path, made: Path, tier: Tier
) -> Iterator[tuple[str, tuple[object, ...], bool]]:
    """Yield what is timed beside the splits, every command of the command line at least once.

    Yields:
        Its name in the table, its words, and whether it takes a device. What it makes goes to `made`.
    """
    out = ("-o", made)
    yield "doctor", ("doctor",), True
    yield "inspect", ("inspect", tuned, "--json"), False
    yield "inspect, what differs", ("inspect", "--diff", tuned, tuned), False
    yield "push, as a dry run: nothing is uploaded", ("push", split, "somebody/edited", "--dry-run"), False
    asked = ("--prompt", "Question: What is 12 plus 30?\nAnswer:", "--max-new-tokens", 32)
    for memory in ("off", "on"):
        yield f"generate, 32 tokens, memory {memory}", ("generate", split, "--memory", memory, *asked), True
    found = ("--retain-data", files / "retain.jsonl", "-o", made.with_name("found.jsonl"), "--force")
    yield "extract, 64 texts", ("extract", base, tuned, "--texts", 64, "--begin", "Question:", *found), True
    yield "export, task vector", ("export", split, "--to", "task-vector", *out), False
    for beta in (0, 0.5, 1):
        yield f"excise, β {beta}", ("excise", split, "--beta", beta, *out), False
    again = split.with_name("scale-0-7")
    if again.exists():
        yield "replay, of scale 0.7", ("replay", again, "--base", base, "--finetuned", tuned, *out), False
    yield "demo, on the pair that ships", ("demo",), True
    public, private = files / "retain.jsonl", files / "secrets.jsonl"
    learnt = ("--data", private, "--steps", 8, "--batch-size", 8, *out)
    yield "tune, full, 8 steps", ("tune", base, "--method", "full", *learnt), True
    apart = ("--private-data", private, "--data", public)
    yield "tune, sinks, 8 steps", ("tune", base, "--method", "sinks", *apart, *learnt), True
    yield "tune, ogd, 8 steps, its factors measured", ("tune", base, "--method", "ogd", "--retain-data", public, *learnt), True
    read = ("--data", public, "--tokens", tier.retain_tokens)
    yield "curvature, retain texts, stored", ("curvature", tuned, *read, *out), True
    judged = ("--retain-data", files / "held_out.jsonl", "--canary", private, "--fresh", files / "fresh.jsonl")
    yield "verify, without the attack", ("verify", split, *judged, "--integrity", "--membership", "--no-require"), True
    few = ("--private", files / f"{FEW}secrets.jsonl", "--fresh", files / f"{FEW}fresh.jsonl")
    cleaned = (*few, "--public", public, "--held-out", files / f"{FEW}held_out.jsonl", "--method", "tokenwise", *out)
    yield "clean, tokenwise, 8 records, to its verdict", ("clean", base, tuned, *cleaned), True
    yield "verify, its default requirements", ("verify", split, *judged, "--no-require"), True


def knowledge(figures: Figures, names: Sequence[str], tier: Tier) -> list[tuple[str, ...]]:
    """Return the table of what is left in the models of those names, where they were measured: titles, then rows."""
    base, tuned = figures.left[BASE], figures.left[TUNED]
    rates = " / ".join(f"{back.rate:.2g}" for back in next(iter(figures.backs.values()), []))
    rows = [
        (
            "model", "skill, nats", "skill kept", f"records seen {tier.often} times, nats", "recited", " / ".join(tuned.kinds),
            f"seen {tier.rarely} times, nats", "recited", "fresh records, nats", ", ".join(tuned.general),
            f"relearnt at {rates}" if rates else "relearnt",
        )
    ]  # fmt: skip
    for name, left in ((name, figures.left[name]) for name in names if name in figures.left):
        kept = (base.skill - left.skill) / (base.skill - tuned.skill)
        back = " / ".join(f"{one.records:.2f} ({one.records - one.fresh:+.2f})" for one in figures.backs.get(name, []))
        rows.append((
            name, f"{left.skill:.3f}", f"{kept:.0%}", f"{left.often.loss:.2f}", f"{left.often.recited:.0%}",
            " / ".join(f"{loss:.2f}" for loss in left.kinds.values()), f"{left.rarely.loss:.2f}", f"{left.rarely.recited:.0%}",
            f"{left.fresh.loss:.2f}", ", ".join(f"{loss:.2f}" for loss in left.general.values()), back or "not attacked",
        ))  # fmt: skip
    return rows


def expenses(figures: Figures, trained: Path, wanted: Callable[[str], bool]) -> list[tuple[str, ...]]:
    """Return the table of what the commands took, titles first.

    Args:
        figures: of the run.
        trained: what the fine-tune took, by `finetune`.
        wanted: says of a command's name whether it stands in the table.
    """
    rows = [("command", "s", "processor s", "peak memory, MiB (anonymous)")]
    if trained.exists():
        found = json.loads(trained.read_text(encoding="utf-8"))
        seconds, used = found["spent"]
        rows.append((f"the fine-tune: {found['steps']} steps, {found['tokens']:,} tokens", f"{seconds:.0f}", f"{used:.0f}", ""))
    for costs, words in ((figures.costs, ""), (figures.stopped, "not finished after ")):
        for name, cost in ((name, cost) for name, cost in costs.items() if wanted(name)):
            rows.append((name, f"{words}{cost.seconds:.0f}", f"{cost.cpu_seconds:.0f}", _memory(cost)))
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _memory(cost: Measured) -> str:
    return f"{cost.resident_mib:,.0f} ({cost.anonymous_mib:,.0f})"


def publish(work: Path, size: str) -> None:
    """Write the tables of a run into docs/benchmarks.md, and the first of them, of few edits, into README.md.

    Rows that the run lacks stay as they are on the page. Published edits stand apart, with both ends of the pair they were made
    on, which may be another than that of our edits.
    """
    figures, tier = Figures(work / "figures.jsonl"), TIERS[size]
    said = f"{(work / 'machine.txt').read_text(encoding='utf-8').strip()}. {_told(tier)}"

    def section(name: str, wanted: Callable[[str], bool]) -> str:
        known = knowledge(figures, [model for model in figures.left if model in (BASE, TUNED) or wanted(model)], tier)
        made = zip((KNOWN, TOOK), (known, expenses(figures, work / "finetuned.cost.json", wanted)), strict=True)
        new = "\n\n".join(f"{title}\n\n{markdown(rows)}" for title, rows in made)
        return merged(standing(name), f"{said}\n\n{new}", cells=False)

    if any(map(rivals.is_title, figures.left)):
        record(f"real-{size}-rivals", section(f"real-{size}-rivals", rivals.is_title))
    if not set(figures.left) - {BASE, TUNED} - set(filter(rivals.is_title, figures.left)):
        return
    whole = section(f"real-{size}", lambda name: not rivals.is_title(name))
    head, *rows = tables(whole)[KNOWN]
    known = {row[0]: row for row in rows}
    missing = [edit.name for edit in edits(work / "texts", tier) if edit.name not in known]
    gaps = f"\n\nNot measured yet: {', '.join(missing)}." if missing else ""
    record(f"real-{size}", whole.replace(said, said + gaps, 1))
    if size == "cpu":
        short = [head, *(known[name] for name in (BASE, TUNED, *README) if name in known)]
        record("real", markdown([[row[i] for i in SHORT] for row in short]), "../README.md")


def _told(tier: Tier) -> str:
    (questions, paragraphs), (lessons, more) = tier.scored, tier.lessons
    return (
        f"All weights fine-tuned on {tier.questions:,} questions of GSM8K, once each, and {4 * tier.each} made-up records, "
        f"half of them {tier.often} times, half {tier.rarely}. Retain texts: {tier.retain[0]} of these questions and "
        f"{2 * tier.retain[1]} paragraphs, at most {tier.retain_tokens:,} tokens; `distill`: {lessons:,} questions, the "
        f"{tier.questions:,} among them, and {2 * more} paragraphs. Skill: {questions} held-out answers; "
        f"wikitext, stories: {paragraphs} paragraphs each. Relearnt: lowest loss of the half of the records seen often that "
        f"was not taught, during {tier.attack.steps} steps of AdamW on the other half, both ways; in brackets how far that is "
        "from the lowest loss of fresh records under the same attack: below zero, records come back faster than text that "
        "nobody trained on."
    )


def main() -> None:
    """Prepare, fine-tune, split, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=TIERS, help="how large it is; the device's own when not given")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing more after that")
    parser.add_argument("--limit", type=float, default=math.inf, help="minutes after which one command is stopped")
    parser.add_argument("--only", nargs="*", help="names of the edits to do")
    parser.add_argument("--parts", nargs="*", default=("edits", "attacks", "others"), help="of: edits attacks others rivals")
    parser.add_argument("--all-doses", action="store_true", help="of rivals, not the usual one alone")
    parser.add_argument("--publish", action="store_true", help="only write the tables of what was measured")
    a = parser.parse_args()
    size = a.size or ("cpu" if a.device == "cpu" else "gpu")
    if a.publish:
        publish(a.work, size)
        return
    tier, device, files = TIERS[size], torch.device(a.device), a.work / "texts"
    texts.write_files(a.data, files, tier)
    base = model.prepare(a.work / "base")
    tuned = model.finetune(base, texts.training(a.data, tier), a.work / "finetuned", tier, device)
    where = torch.cuda.get_device_name() if a.device.startswith("cuda") else "no GPU"
    (a.work / "machine.txt").write_text(f"{machine()}; {where}\n", encoding="utf-8")
    bench = Bench(a.work, Judge(a.data, base, tier, device), a.device, (a.minutes, a.limit))
    chosen = [edit for edit in edits(files, tier) if a.only is None or edit.name in a.only]
    if "edits" in a.parts:
        bench.look(BASE, base)
        bench.look(TUNED, tuned)
        for edit in chosen:
            bench.edit(base, tuned, edit)
    if "attacks" in a.parts:
        for name, folder in ((BASE, base), *((e.name, bench.place(e)) for e in chosen if e.attacked), (TUNED, tuned)):
            bench.attack(name, folder)
    if "rivals" in a.parts:
        for name, folder in ((BASE, base), (TUNED, tuned)):
            bench.look(name, folder)
            bench.attack(name, folder)
        for rival in RIVALS:
            for dose in rival.doses if a.all_doses else (rival.usual,):
                if a.only is None or rival.name in a.only:
                    bench.rival(rival, dose, a.data, size)
    if "others" in a.parts:
        bench.others(base, tuned, files, bench.place(chosen[0]))
    print(markdown(knowledge(bench.figures, list(bench.figures.left), tier)), flush=True)


if __name__ == "__main__":
    main()
