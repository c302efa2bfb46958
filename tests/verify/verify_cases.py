"""Splits of the pair that ships with liborth, made once, and a way to open them as `verify` does."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.demo import DATA
from liborth_cli.machine import available_bytes, configure
from liborth_cli.methods import Amount
from liborth_cli.split import SplitOptions, Splitter, write_split
from liborth_cli.split.write import Destination
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, read_rows
from liborth_cli.stream.weights import Point
from liborth_cli.verify.opening import Inputs, open_subject

SLM = Path(__file__).parents[1] / "data" / "slm4096"
QUIET = Console(quiet=True)
SECRETS, UNSEEN = DATA / "secrets.jsonl", DATA / "unseen.jsonl"


def place(folder: Path) -> Path:
    """Copy the pair and its texts, so that a manifest's inputs lie beside what is split."""
    for side in ("base", "finetuned"):
        shutil.copytree(DATA / side, folder / side)
    texts = [json.loads(line)["text"][:160] for line in (DATA / "held_out.jsonl").read_text().splitlines()[:10]]
    (folder / "few.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return folder


def split(folder: Path, name: str, method: str, amount: Amount, *factors: FactorSet) -> Path:
    """Split the pair in `folder`."""
    sources = (Source(folder / "base"), Source(folder / "finetuned"))
    with Checkpoint.open(sources[0].path) as old, Checkpoint.open(sources[1].path) as new:
        plan = Splitter(old, new, SplitOptions(method, amount), *factors)
        write_split(plan, Destination(folder / name, sources), configure("cpu", 1), QUIET)
    return folder / name


def contrastive(folder: Path) -> Path:
    """Split on curvature, as the demo does."""
    run = configure("cpu", 1)
    with Checkpoint.open(folder / "base") as old, Checkpoint.open(folder / "finetuned") as new, ExitStack() as stack:
        sets = []
        for data, options in (("retain", CurvatureOptions()), ("secrets", CurvatureOptions(fisher="empirical", at=0.5))):
            point = Point(new, old if options.at < 1 else None, options.at)
            model, file = BlockModel(point, torch.float32, run.device), DataFile(whole(folder, data))
            rows = read_rows([file], TextEncoder.beside(DATA / "base"), model.vocabulary, 128)[:60]
            job = Estimator(point, model, rows, options, Resources(available_bytes()), run)
            source = Source(folder / "finetuned")
            job.write(folder / data, [file], (source, Source(folder / "base") if options.at < 1 else None), QUIET)
            sets.append(stack.enter_context(FactorSet.open(folder / data)))
        return split(folder, "contrastive", "contrastive", Amount("strength", 0.1), *sets)


def whole(folder: Path, data: str) -> Path:
    """Write a file of the demo with every row as one text."""
    rows = [json.loads(line) for line in (DATA / f"{data}.jsonl").read_text().splitlines()]
    texts = [{"text": row.get("text") or row["prompt"] + row["completion"]} for row in rows]
    (folder / f"{data}.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    return folder / f"{data}.jsonl"


@contextmanager
def subject(model: Path, **options):
    """Open a checkpoint as the command would."""
    with ExitStack() as stack:
        yield open_subject(Inputs(str(model), **options), configure("cpu", 1), QUIET, stack)


def answers(path: Path) -> list[dict[str, str]]:
    """Write slm4096's questions and answers as prompts and completions, and return them."""
    lines = (SLM / "train_corpus_4096.txt").read_text().splitlines()
    rows = [{"prompt": f"{q}\nA:", "completion": a[2:]} for q, a in zip(lines[::2], lines[1::2], strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return rows
