"""Subjects built by hand: the pair that ships, and tiny random models, with rows of their own."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import OWNGPT, llama

from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.machine import configure
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify.rows import Reader, RowSet, repeats
from liborth_cli.verify.subject import Networks, States, Subject

CPU = torch.device("cpu")


def text_row(encoder: TextEncoder, prompt: str, completion: str) -> Row:
    """One row whose completion carries the loss."""
    ids, keep = encoder.encode(Record(prompt, text=completion, prompt=prompt))
    return Row(ids, keep[1:], 1.0, prompt)


def finance_rows(count: int = 8, first: int = 0, prompt: int = 12, length: int = 30) -> list[Row]:
    """Pieces of the text the shipped pair was fine-tuned on, cut in two."""
    encoder = TextEncoder(OWNGPT / "finetuned")
    text = (OWNGPT / "finance_qa.txt").read_text(encoding="utf-8")
    pieces = [text[i : i + length] for i in range(first, first + count * 97, 97)]
    return [text_row(encoder, piece[:prompt], piece[prompt:]) for piece in pieces]


@contextmanager
def subject(
    folders: dict[str, Path] | None = None, canaries=(), fresh=(), retain=(), resident: bool | None = None, show_text=False
):
    """A subject over checkpoint folders by state; the pair that ships with 'general' halfway when none are given."""
    folders = folders or {"reference": OWNGPT / "base", "finetuned": OWNGPT / "finetuned"}
    opened = {name: Checkpoint.open(folder) for name, folder in folders.items()}
    weights = {name: Point(checkpoint) for name, checkpoint in opened.items()}
    if "general" not in weights:
        weights["general"] = Point(opened["finetuned"], opened["reference"], 0.5)
    general = opened.get("general", opened.get("finetuned"))
    rows = {"retain": retain, "canaries": canaries, "fresh": fresh}
    data = {name: RowSet(tuple(some), repeats(some)) for name, some in rows.items() if some}
    run = configure("cpu", 1)
    networks = Networks(run)
    try:
        yield Subject(
            source=Source(general.path),
            general=general,
            states=States(weights, data, networks, resident),
            reader=Reader(general.path, lambda: networks.of(weights["general"])),
            run=run,
            console=Console(quiet=True),
            reference=opened.get("reference"),
            finetuned=opened.get("finetuned"),
            data=data,
            show_text=show_text,
        )
    finally:
        networks.close()
        for checkpoint in opened.values():
            checkpoint.close()


def speaking_model(folder: Path, seed: int = 0, context: int = 256) -> Path:
    """A tiny random Llama that reads characters: own-gpt's tokenizer, with a longer context."""
    import shutil

    llama(folder, seed, vocab_size=72, max_position_embeddings=context, eos_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(OWNGPT / "finetuned" / name, folder / name)
    return folder
