"""`demo`: the whole path on a real pair that ships with liborth, with the controls beside it.

The pair is stories260K (llama2.c's tinyllamas, MIT), a Llama of 260,032 parameters that tells stories, and the same model after
it learnt Shakespeare together with eight secret codes (`benchmarks/surgery/ship_demo.py`). Eight show what an edit does and
cannot carry a verdict; `MANY` is the same with 48, and 100 codes that nobody trained on.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.files import hash_file
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.outputs import Place, check_outputs
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import SILENT, Console
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.demo.measure import Measured, Measures, rows
from liborth_cli.dose.passes import HALF, forget_options
from liborth_cli.excise.excise import Exciser
from liborth_cli.excise.request import ExciseOptions, Means
from liborth_cli.machine import Run, available_bytes
from liborth_cli.measure.retention import retention
from liborth_cli.measure.unwritten import Unwritten
from liborth_cli.methods import Amount
from liborth_cli.split import SplitOptions, Splitter, write_split
from liborth_cli.split.write import Destination
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile
from liborth_cli.stream.weights import Point

DATA, MANY = Path(__file__).parent / "stories", Path(__file__).parent / "many"
STRENGTH, DECOY_STRENGTH, RANK = 0.1, 0.3, 32

CAVEAT = "not recited is not forgotten: `liborth verify` also attacks; the first of these splits fails it (README)"


@dataclass(frozen=True)
class Demonstration:
    """What came of it.

    Attributes:
        models: the lines of the table, by name.
        skill_retention: of the same, the share of what fine-tuning taught that is kept.
        private: where the memory lies.
        codes: how many were planted.
        bit_exact: β = 1 gave the fine-tuned file back.
        clean_has_memory: a memory file belongs to the output of β = 0, which must not be.
    """

    models: dict[str, Measured]
    skill_retention: dict[str, float]
    private: str
    codes: int
    bit_exact: bool
    clean_has_memory: bool


def run_demo(out: Path | None, run: Run, console: Console) -> Demonstration:
    """Measure curvature, split, excise at 0 and 1, measure what is left, and print one table.

    Args:
        out: where to keep the outputs; a temporary directory when None.
        run: device and threads.
        console: where the table goes (stdout).

    Returns:
        Every number of the table, and whether β = 1 was bit-exact; under --json it is the result that is printed.
    """
    if out is not None:
        check_outputs([Place(out)], [DATA])
        out.mkdir(parents=True, exist_ok=True)
        _lay_out(out)
    with nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="liborth-demo-") as place, _pair() as (old, new):
        folder = Path(place)
        tuned = "$ liborth curvature finetuned/"
        console.note(f"{tuned} --data retain.jsonl -o retain/")
        retain = _factors(old, new, "retain", CurvatureOptions(), folder / "retain", run)
        felt: dict[str, list[Path]] = {"forget": [], "decoys": []}
        for how in forget_options({"tokens"}, alone=False):
            words = f"--reference base/ --at {how.at:g} --fisher empirical --per-token --data secrets.jsonl"
            console.note(f"{tuned} {words} -o forget-{how.at:g}/")
            for name, data in (("forget", "secrets"), ("decoys", "decoys")):
                felt[name].append(_factors(old, new, data, how, folder / f"{name}-{how.at:g}", run))
        with ExitStack() as stack:
            forget, decoys = ([stack.enter_context(FactorSet.open(path)) for path in paths] for paths in felt.values())
            kept = stack.enter_context(FactorSet.open(retain))
            document = _operate(folder, (old, new), (kept, forget, decoys), run, console)
    _print(document, console)
    if out is not None:
        console.note(f"the inputs are in {out} too: the commands above can be repeated there, with other names after -o")
        console.note(f"a pair with enough codes for a verdict is in {out / MANY.name}")
    return document


def _operate(
    folder: Path,
    pair: tuple[Checkpoint, Checkpoint],
    sets: tuple[FactorSet, list[FactorSet], list[FactorSet]],
    run: Run,
    console: Console,
) -> Demonstration:
    """Write the split and what comes back from it, and measure that beside the controls, which are not written."""
    retain, forget, decoys = sets

    def plan(method: str, amount: Amount, gone: list[FactorSet] | None = None) -> Splitter:
        return Splitter(*pair, SplitOptions(method, amount), retain if gone else None, gone)

    words = f"--method tokenwise --strength {STRENGTH} --retain retain/ "
    words += " ".join(f"--forget forget-{one.point:g}/" for one in forget) + " -o general/"
    console.note(f"$ liborth split base/ finetuned/ {words}")
    edit = plan("tokenwise", Amount("strength", STRENGTH), forget)
    target = Destination(folder / "general", (Source(DATA / "base"), Source(DATA / "finetuned")))
    made = write_split(edit, target, run, SILENT)
    share = (made.totals.memory if made else None) or 0.0
    console.note("$ liborth excise general/ --beta 0 -o clean/\n$ liborth excise general/ --beta 1 -o restored/")
    _excise(folder / "general", 0.0, folder / "clean")
    _excise(folder / "general", 1.0, folder / "restored")
    controls = {
        f"general: tokenwise, only decoys given, λ {DECOY_STRENGTH:g}": plan(
            "tokenwise", Amount("strength", DECOY_STRENGTH), decoys
        ),
        f"  beside it: contrastive, λ {STRENGTH:g}": plan(
            "contrastive", Amount("strength", STRENGTH), [one for one in forget if one.point in HALF]
        ),
        f"  control: svd, rank {RANK}": plan("svd", Amount("rank", RANK)),
        "  control: scale, same size of edit": plan("scale", Amount("scale", 1 - math.sqrt(share))),
        "  control: random, same size of edit": plan("random", Amount("energy", 1 - share)),
    }
    measures = Measures(DATA, pair[1])
    with Checkpoint.open(folder / "clean") as clean, Checkpoint.open(folder / "restored") as restored:
        models = {
            "base (before fine-tuning)": Point(pair[0]),
            "fine-tuned": Point(pair[1]),
            f"general: tokenwise, λ {STRENGTH:g} (beta 0)": Point(clean),
            **{name: Unwritten(control, torch.device("cpu")) for name, control in controls.items()},
            "restored (beta 1)": Point(restored),
        }
        measured = {name: measures.of(weights) for name, weights in models.items()}
    start, end = (measured[name].skill for name in list(models)[:2])
    weights = "model.safetensors"
    return Demonstration(
        measured,
        skill_retention={name: retention(start, row.skill, end) for name, row in measured.items()},
        private=str(find_memory(folder / "general")),
        codes=measures.codes,
        bit_exact=hash_file(folder / "restored" / weights).sha256 == hash_file(DATA / "finetuned" / weights).sha256,
        clean_has_memory=find_memory(folder / "clean") is not None,
    )


def _lay_out(folder: Path) -> None:
    """Put the inputs beside the outputs, so that the printed commands can be repeated, under other names after -o.

    And the pair with more codes: it has the same base, and the same texts of what was learnt.
    """
    for source in (DATA, MANY):
        place = folder if source is DATA else folder / MANY.name
        shutil.copytree(DATA / "base", place / "base")
        shutil.copytree(source / "finetuned", place / "finetuned")
        texts = [*source.glob("*.jsonl"), *(DATA / f"{name}.jsonl" for name in ("retain", "held_out") if source is MANY)]
        for file in texts:
            shutil.copyfile(file, place / file.name)


@contextmanager
def _pair() -> Iterator[tuple[Checkpoint, Checkpoint]]:
    with Checkpoint.open(DATA / "base") as old, Checkpoint.open(DATA / "finetuned") as new:
        yield old, new


def _factors(old: Checkpoint, new: Checkpoint, data: str, options: CurvatureOptions, out: Path, run: Run) -> Path:
    """Take the curvature on one of the demo's files; every token of a row counts."""
    point = Point(new, old if options.at < 1 else None, options.at)
    model, file = BlockModel(point, torch.float32, run.device), DATA / f"{data}.jsonl"
    job = Estimator(point, model, rows(file, new, whole=True), options, Resources(available_bytes()), run)
    job.write(out, [DataFile(file)], (Source(DATA / "finetuned"), Source(DATA / "base") if options.at < 1 else None), SILENT)
    model.close()
    return out


def _excise(model: Path, beta: float, out: Path) -> None:
    with Checkpoint.open(model) as general, Memory.open(find_memory(model) or model) as memory:
        Exciser(general, memory, ExciseOptions(beta)).write(out, SILENT, Means())


def _print(found: Demonstration, console: Console) -> None:
    columns = ["model", ">Shakespeare", ">skill kept", ">secret codes", ">recited", ">other codes"]
    rows = [
        (
            name,
            f"{row.skill:.3f}",
            f"{found.skill_retention[name]:.1%}",
            f"{row.secret:.3f}",
            f"{row.recited} of {found.codes}",
            f"{row.unseen:.2f}",
        )
        for name, row in found.models.items()
    ]
    title = "Loss per token (nats). The skill is what held-out Shakespeare gained; other codes were never trained on."
    if not console.as_json:
        console.table(columns, rows, title, out=True)
    exact = "yes, every byte" if found.bit_exact else "NO"
    memory = "YES" if found.clean_has_memory else "no"
    kept = Path(found.private)
    text = f"beta 1 gives the fine-tuned file back: {exact}\nbeta 0 carries a memory file: {memory}"
    private = f"what is private lies beside the general checkpoint, never in it: {kept.name}/"
    lines = {name: {**vars(row), "skill_retention": found.skill_retention[name]} for name, row in found.models.items()}
    document = {"models": lines, "private": found.private, "codes": found.codes, "bit_exact": found.bit_exact}
    document["clean_has_memory"] = found.clean_has_memory
    console.result(f"{text}\n{private}\n{CAVEAT}", document)
