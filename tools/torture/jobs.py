"""The commands that are tortured, on checkpoints made on the spot: small, and of every kind that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import FILE_MODE, KEY
from tools.torture.inject import run

QUICK = ("-j", 1, "-q")


@dataclass(frozen=True)
class Job:
    """One command line.

    Attributes:
        name: for the table.
        words: its arguments, without -o.
        replaces: arguments that made what it replaces with --force; None when nothing is there.
        resumes: whether it has --resume.
        beside: options that name further files, and the names of these, beside the output.
        keyed: whether it names private data by a key beside the output; it finds one there, so that its bytes repeat.
    """

    name: str
    words: tuple[object, ...]
    replaces: tuple[object, ...] | None = None
    resumes: bool = True
    beside: tuple[tuple[str, str], ...] = ()
    keyed: bool = False

    @property
    def force(self) -> bool:
        """Whether it replaces an output that other arguments made."""
        return self.replaces is not None

    def command(self, out: Path, *more: object) -> list[object]:
        """Return the whole command line."""
        return [*self._line(self.words, out), *(["--force"] if self.force else []), *more]

    def earlier(self, out: Path) -> list[object]:
        """Return the command line that makes what is replaced."""
        assert self.replaces is not None
        return self._line(self.replaces, out)

    def _line(self, words: tuple[object, ...], out: Path) -> list[object]:
        files = [word for option, name in self.beside for word in (option, out.parent / name)]
        return [*words, *QUICK, "-o", out, *files]


def make_inputs(folder: Path, models: bool) -> list[Job]:
    """Make checkpoints and data in a directory; return the jobs on them, those on real models when asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    base, finetuned, model = folder / "base", folder / "finetuned", folder / "model"
    draw = torch.Generator().manual_seed(0)
    old = {f"layers.{i}.weight": torch.randn(24, 16, generator=draw) for i in range(6)}
    _save(base, old), _save(finetuned, {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in old.items()})
    rows = np.random.default_rng(0).integers(0, 64, (6, 8))
    np.save(folder / "rows.npy", rows), np.save(folder / "secret.npy", rows[:2] // 2)
    split = ("split", base, finetuned, "--rank", 4)
    general, page = folder / "general", (("--report", "page.html"),)
    done = run([*split, *QUICK, "-o", general])
    assert done.code == 0, done.err
    jobs = [
        Job("split", split),
        Job("split --force", ("split", base, finetuned, "--rank", 8), split),
        Job("excise 0", ("excise", general, "--beta", 0)),
        Job("excise 0.7", ("excise", general, "--beta", 0.7)),
        Job("excise 1 --force", ("excise", general, "--beta", 1), split),
        Job("verify", ("verify", general, "--integrity"), resumes=False, beside=page),
        Job("verify --force", ("verify", general, "--integrity"), ("verify", general, "--integrity", "--seed", 1), False, page),
    ]
    if models:
        later = folder / "later"
        _llama(model, 0, 0.0), _llama(later, 0, 0.05)
        rows, secret = ("--data", folder / "rows.npy"), ("--private-data", folder / "secret.npy")
        tune = ("tune", model, *rows, "--steps", 2, "--save-every", 1, "--batch-size", 2, "--seq-len", 8)
        curvature = ("curvature", model, *rows, "--group-tokens", 24)
        texts = ("--retain-data", folder / "rows.npy", "--forget-data", folder / "secret.npy")
        jobs += [
            Job("split on texts", ("split", model, later, *texts)),
            Job("curvature", curvature),
            Job("curvature --per-token", ("curvature", model, *rows, "--per-token"), keyed=True),
            Job("tune", (*tune, "--method", "full")),
            Job("tune sinks", (*tune, "--method", "sinks", *secret, "--sinks", 4)),
        ]
    return jobs


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    where, names = {}, list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[shard::shards]}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names[shard::shards], file)
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _llama(folder: Path, seed: int, further: float) -> None:
    """Save a tiny model, its weights moved by so much noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(further * torch.randn_like(weight))
    model.save_pretrained(folder)


def fresh(folder: Path, job: Job, old: Path | None) -> Path:
    """Return an output's name in an empty directory, beside an earlier output when the job replaces one."""
    shutil.rmtree(folder, ignore_errors=True)
    if job.force and old is not None:
        shutil.copytree(old / job.name, folder)
    else:
        folder.mkdir(parents=True)
    if job.keyed:
        write_file(folder / KEY, bytes(32), FILE_MODE)
    return folder / "out"


def make_old(folder: Path, jobs: Sequence[Job]) -> Path:
    """Make the outputs that --force jobs replace, each in a directory named after its job."""
    for job in jobs:
        if job.force:
            done = run(job.earlier(fresh(folder / job.name, job, None)))
            assert done.code == 0, done.err
    return folder
