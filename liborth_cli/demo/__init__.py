"""`demo`: the whole path on a real pair that ships with liborth, with the controls beside it.

The pair is own-gpt (moreshivam/own-gpt, Apache-2.0): a character-level GPT-2 of 211,328 parameters trained on Shakespeare,
then fine-tuned on questions and answers about finance.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import check_output
from liborth_cli.checkpoint.writer import hash_file
from liborth_cli.console import Console
from liborth_cli.demo.loss import mean_loss
from liborth_cli.excise import ExciseOptions, Exciser
from liborth_cli.methods import Amount
from liborth_cli.run import Run
from liborth_cli.split import SplitOptions, Splitter

DATA = Path(__file__).parent / "owngpt"
RANK = 8
TRAINED_SHARE = 0.9
"""The first part of the finance text was trained on, the rest was held out."""


def run_demo(out: Path | None, run: Run, console: Console) -> dict[str, Any]:
    """Split, excise at 0 and 1, measure, and print one table.

    Args:
        out: where to keep the outputs; a temporary directory when None.
        run: device and threads.
        console: where the table goes (stdout).

    Returns:
        Every number of the table, and whether β = 1 was bit-exact.
    """
    if out is not None:
        check_output(out, [DATA], force=False)
        out.mkdir(parents=True, exist_ok=True)
    with nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="liborth-demo-") as place:
        folder = Path(place)
        quiet = Console(quiet=True)
        reference, finetuned = DATA / "base", DATA / "finetuned"
        console.note(f"$ liborth split base/ finetuned/ --method svd --rank {RANK} -o general/")
        shares = _split("svd", Amount("rank", RANK), folder / "general", run, quiet)
        console.note("$ liborth excise general/ --beta 0 -o clean/\n$ liborth excise general/ --beta 1 -o restored/")
        _excise(folder / "general", 0.0, folder / "clean", quiet)
        _excise(folder / "general", 1.0, folder / "restored", quiet)
        _split("scale", Amount("scale", 1 - math.sqrt(shares["memory"])), folder / "scale", run, quiet)
        _split("random", Amount("energy", shares["skill"]), folder / "random", run, quiet)
        models = {
            "reference (before fine-tuning)": reference,
            "fine-tuned": finetuned,
            f"general: svd, rank {RANK} (beta 0)": folder / "clean",
            "  control: scale, same size of edit": folder / "scale",
            "  control: random, same size of edit": folder / "random",
            "restored (beta 1)": folder / "restored",
        }
        document = _measure(models)
        document["skill_energy"] = shares["skill"]
        weights = "model.safetensors"
        document["bit_exact"] = hash_file(folder / "restored" / weights).sha256 == hash_file(finetuned / weights).sha256
        document["clean_has_memory"] = (folder / "clean" / "memory.safetensors").exists()
    if not console.as_json:
        _print(document, console)
    return document


def _split(method: str, amount: Amount, out: Path, run: Run, console: Console) -> dict[str, float]:
    options = SplitOptions(method, amount)
    with Checkpoint.open(DATA / "base") as old, Checkpoint.open(DATA / "finetuned") as new:
        sources = (Source(DATA / "base"), Source(DATA / "finetuned"))
        return Splitter(old, new, options).write(out, sources, run, console)["totals"]


def _excise(model: Path, beta: float, out: Path, console: Console) -> None:
    with Checkpoint.open(model) as general, Checkpoint.open(model, stem="memory") as memory:
        Exciser(general, Memory(memory), ExciseOptions(beta)).write(out, console)


def _measure(models: dict[str, Path]) -> dict[str, Any]:
    finance = (DATA / "finance_qa.txt").read_text(encoding="utf-8")
    cut = int(TRAINED_SHARE * len(finance))
    texts = {
        "shakespeare": (DATA / "shakespeare_tail.txt").read_text(encoding="utf-8"),
        "finance_trained": finance[:cut],
        "finance_heldout": finance[cut:],
    }
    losses = {model: {name: mean_loss(folder, text) for name, text in texts.items()} for model, folder in models.items()}
    start, end = (losses[model]["finance_heldout"] for model in list(models)[:2])
    for row in losses.values():
        row["skill_retention"] = (start - row["finance_heldout"]) / (start - end)
    return {"losses": losses}


def _print(document: dict[str, Any], console: Console) -> None:
    columns = ["model", ">Shakespeare", ">finance, trained on", ">finance, held out", ">skill kept"]
    names = ("shakespeare", "finance_trained", "finance_heldout")
    rows = [
        (model, *(f"{row[name]:.3f}" for name in names), f"{row['skill_retention']:.1%}")
        for model, row in document["losses"].items()
    ]
    console.table(columns, rows, "Loss per character (nats). The skill is what the held-out finance text gained.", out=True)
    exact = "yes, every byte" if document["bit_exact"] else "NO"
    memory = "YES" if document["clean_has_memory"] else "no"
    console.result(
        f"beta 1 gives the fine-tuned file back: {exact}\n"
        f"beta 0 carries a memory file: {memory}\n"
        "Low rank is the cheapest split, not proof of forgetting: compare it with its controls above.",
        document,
    )
