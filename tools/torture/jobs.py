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

from tools.torture.inject import run

SECRET = "the vault code of Marta Quell is 8823-4417"
QUICK = ("-j", 1, "-q")


@dataclass(frozen=True)
class Job:
    """One command line.

    Attributes:
        name: for the table.
        words: its arguments, without -o.
        force: whether it replaces an output that other arguments made.
        resumes: whether it has --resume.
        beside: options that name further files, and the names of these, beside the output.
    """

    name: str
    words: tuple[object, ...]
    force: bool = False
    resumes: bool = True
    beside: tuple[tuple[str, str], ...] = ()

    def command(self, out: Path, *more: object) -> list[object]:
        """Return the whole command line."""
        files = [word for option, name in self.beside for word in (option, out.parent / name)]
        return [*self.words, *QUICK, "-o", out, *files, *(["--force"] if self.force else []), *more]


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
    general = folder / "general"
    done = run([*split, *QUICK, "-o", general])
    assert done.code == 0, done.err
    tune = ("tune", model, "--data", folder / "rows.npy", "--steps", 4, "--save-every", 2, "--batch-size", 2, "--seq-len", 8)
    jobs = [
        Job("split", split),
        Job("split --force", ("split", base, finetuned, "--rank", 8), force=True),
        Job("excise 0", ("excise", general, "--beta", 0)),
        Job("excise 0.7", ("excise", general, "--beta", 0.7)),
        Job("excise 1 --force", ("excise", general, "--beta", 1), force=True),
        Job("verify", ("verify", general, "--integrity"), resumes=False, beside=(("--report", "page.html"),)),
    ]
    if models:
        _llama(model)
        jobs += [
            Job("curvature", ("curvature", model, "--data", folder / "rows.npy", "--group-tokens", 24)),
            Job("tune", (*tune, "--method", "full")),
            Job("tune sinks", (*tune, "--method", "sinks", "--private-data", folder / "secret.npy", "--sinks", 4)),
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


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def fresh(folder: Path, job: Job, old: Path | None) -> Path:
    """Return an output directory's name in an empty directory, holding an earlier output when the job replaces one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.force and old is not None:
        for path in old.iterdir():
            shutil.copytree(path, folder / path.name)
    return folder / "out"


def make_old(folder: Path, jobs: Sequence[Job]) -> Path:
    """Make the output that --force jobs replace."""
    out = fresh(folder, jobs[0], None)
    done = run(jobs[0].command(out))
    assert done.code == 0, done.err
    return folder
