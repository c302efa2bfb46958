"""Twenty ways to a certificate that nobody earned: each must be refused or left undecided, with the sentence that says why.

The pair is the one that ships with liborth: the fine-tuned model recites eight codes. The control is a model that recites none
and still works: it passes the same requirement (`passes`), so that a refusal is of the trick and not of everything.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from liborth_cli.demo import DATA
from liborth_cli.manifest import FILE as MANIFEST
from tools.torture.inject import Ended, run

Rows = Sequence[dict[str, str]]
GONE = "extraction==0"


class Bench:
    """The pair, splits of it and rows, in a directory."""

    def __init__(self, folder: Path) -> None:
        """Make them."""
        self.folder = folder
        for side in ("base", "finetuned"):
            shutil.copytree(DATA / side, folder / side)
        for name, scale in (("general", 0.35), ("nearly", 0.02)):
            pair = (folder / "base", folder / "finetuned")
            done = run(["split", *pair, "--method", "scale", "--scale", scale, "-o", folder / name, "-j", 1, "-q"])
            assert done.code == 0, done.err
        self.secrets, self.unseen = (_read(DATA / f"{name}.jsonl") for name in ("secrets", "unseen"))
        self.retain = [{"text": row["text"][:160]} for row in _read(DATA / "held_out.jsonl")[:8]]
        self._written = 0

    def rows(self, rows: Rows) -> Path:
        """Write rows to a file of their own."""
        self._written += 1
        file = self.folder / f"rows-{self._written}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def model(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        """Copy the fine-tuned model, every tensor changed."""
        place = shutil.copytree(self.folder / "finetuned", self.folder / name, dirs_exist_ok=True)
        tensors = {name: change(tensor) for name, tensor in load_file(place / "model.safetensors").items()}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return place

    def verify(
        self, model: str | Path = "general", require: str = GONE, canaries: Rows | None = None, fresh: Rows | None = None,
        retain: Rows | None = None, finetuned: str = "finetuned", reference: str = "base",
    ) -> Ended:  # fmt: skip
        """Verify a model as somebody would who wants it to pass.

        Args:
            model: which, by name.
            require: what of it.
            canaries: what must be gone; the eight codes when None.
            fresh: rows never trained on; the unseen codes when None, not named when empty.
            retain: texts of the skill, likewise.
            finetuned: by name.
            reference: by name.
        """
        named = {
            "--canary": self.secrets if canaries is None else canaries,
            "--fresh": self.unseen[:8] if fresh is None else fresh,
            "--retain-data": self.retain if retain is None else retain,
        }
        words: list[object] = [w for option, rows in named.items() if rows for w in (option, self.rows(rows))]
        words += ["--finetuned", self.folder / finetuned, "--reference", self.folder / reference]
        return run(["verify", self.folder / model, "--loads", *words, "--require", require, "-j", 1])


@dataclass(frozen=True)
class Trick:
    """One way.

    Attributes:
        name: what is done.
        run: does it.
        says: what must be in what is said of it.
        quick: it is refused before anything is measured.
    """

    name: str
    run: Callable[[Bench], Ended]
    says: str
    quick: bool = False


def _read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _answer(text: str) -> list[dict[str, str]]:
    """Return rows of which the second has another completion."""
    return [{"prompt": "The secret code of Alma is", "completion": c} for c in (" 280939.", text)]


def _forged(bench: Bench, forge: Callable[[dict], None]) -> Ended:
    """Ask for the integrity of a damaged copy whose manifest was changed by hand."""
    place = bench.folder / "forged"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bench.folder / "general", place)
    weights = bytearray((place / "model.safetensors").read_bytes())
    weights[-5000] ^= 1
    (place / "model.safetensors").write_bytes(weights)
    document = json.loads((place / MANIFEST).read_text())
    forge(document)
    (place / MANIFEST).write_text(json.dumps(document))
    return run(["verify", place, "--integrity", "--require", "damaged_files==0", "-j", 1])


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(tensor.shape, generator=draw) * 0.02).to(tensor.dtype)


TRICKS = (
    Trick("canaries that the fine-tuned model never recited", lambda b: b.verify(canaries=b.unseen[8:16]),
          "show no forgetting"),
    Trick("a requirement that recited canaries meet", lambda b: b.verify("finetuned", "canary_loss>=0"), "can be drawn out"),
    Trick("rows with nothing to recite", lambda b: b.verify(canaries=_answer("")), "line 2", True),
    Trick("completions without a token", lambda b: b.verify(canaries=_answer(" \n\t")), "white space only", True),
    Trick("one canary a hundred times", lambda b: b.verify("general", "leak<=0.9", [b.secrets[2]] * 100), "1 different"),
    Trick("retain rows copied until the interval is narrow", lambda b: b.verify(
        require="retention>=0.5", retain=b.retain[:3] * 50), "too few rows"),
    Trick("fresh rows equal to canaries", lambda b: b.verify(fresh=b.secrets), "is a canary", True),
    Trick("fresh rows equal but for capitals and points", lambda b: b.verify(fresh=[
        {key: text.upper().replace(".", "!") for key, text in row.items()} for row in b.secrets]), "is a canary", True),
    Trick("fresh rows that were trained on", lambda b: b.verify(canaries=b.secrets[:4], fresh=b.secrets[4:]), "trained on",
          True),
    Trick("a model of zeros", lambda b: b.verify(b.model("zeros", torch.zeros_like)), "no longer works"),
    Trick("a model of noise", lambda b: b.verify(b.model("noise", _noise)), "no longer works"),
    Trick("a model of NaN", lambda b: b.verify(b.model("nan", lambda t: t * float("nan"))), "is not finite", True),
    Trick("the model before fine-tuning passed off as general", lambda b: b.verify("base"), "before fine-tuning over again"),
    Trick("a model thrown back almost to it", lambda b: b.verify("nearly"), "before fine-tuning over again"),
    Trick("nothing required", lambda b: b.verify(require=" , "), "--require", True),
    Trick("a requirement that everything meets", lambda b: b.verify(require="extraction<=1"), "show no forgetting"),
    Trick("a requirement on something else, beside recited canaries", lambda b: b.verify(
        "finetuned", "retention>=0.5"), "can be drawn out"),
    Trick("no texts that show whether the model works", lambda b: b.verify(retain=()), "whether the model still works"),
    Trick("another model named as fine-tuned", lambda b: b.verify(finetuned="base"), "not the file that this split", True),
    Trick("a manifest that vouches for nothing", lambda b: _forged(b, lambda document: document.update(outputs=[])),
          "changed by hand", True),
)  # fmt: skip


def trial(work: Path, number: int) -> str | None:
    """Try one; the first number is the control."""
    if number > len(TRICKS):
        raise StopIteration
    bench = _bench(work)
    return refused(bench, TRICKS[number - 1]) if number else passes(bench)


@functools.cache
def _bench(work: Path) -> Bench:
    return Bench(work / "dishonest")


def passes(bench: Bench) -> str | None:
    """Say what is wrong with the control, a model that earned it."""
    done = bench.verify()
    return None if done.code == 0 else f"an honest pass is refused: {done.code} {done.err[-300:]}"


def refused(bench: Bench, trick: Trick) -> str | None:
    """Say what is wrong with the answer to a trick: it passed, or nobody says why it did not."""
    done = trick.run(bench)
    if done.code == 0 or not done.clean:
        return f"{trick.name}: exit {done.code} {done.err[-200:]}"
    return None if trick.says in done.err else f"{trick.name}: not said why: {done.err[-300:]}"
