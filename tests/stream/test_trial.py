"""One short row tells whether a family runs, at the price of a few blocks."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
import transformers

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.trial import try_out
from liborth_cli.stream.weights import Point

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "curvature"))
from curvature_cases import BASE, make_model
from run_curvature import cli


def tried(folder, resident, monkeypatch):
    """Try a model out and return the stages that were loaded for it."""
    loaded, real = [], BlockModel.loaded
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
        monkeypatch.setattr(
            BlockModel, "loaded", lambda self, stage, then=None: loaded.append(stage) or real(self, stage, then)
        )
        try_out(model, resident)
        model.close()
    return loaded


@pytest.mark.parametrize(
    ("family", "changes", "stages"),
    [
        ("llama", {"num_hidden_layers": 5}, ["front", "0", "4", "tail"]),
        ("gemma2", {}, ["front", "0", "1", "2", "tail"]),
        ("mixtral", {}, ["front", "0", "2", "tail"]),
    ],
)
def test_one_block_of_each_kind_is_read(family, changes, stages, tmp_path, monkeypatch):
    folder = make_model(family, tmp_path / "model", **changes)
    assert tried(folder, False, monkeypatch) == stages
    assert tried(folder, True, monkeypatch) == []


@pytest.mark.parametrize("resident", [False, True])
def test_a_family_that_does_not_run_is_named(resident, tmp_path, monkeypatch):
    config = transformers.RwkvConfig(**{**BASE, "attention_hidden_size": 32, "context_length": 64})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="RwkvForCausalLM: this family does not run"):
        tried(tmp_path / "model", resident, monkeypatch)


def test_verify_says_so_before_it_hashes_anything(tmp_path, monkeypatch, capsys):
    config = transformers.RwkvConfig(**{**BASE, "attention_hidden_size": 32, "context_length": 64})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "d.npy", np.random.default_rng(0).integers(3, 67, (2, 9)))
    monkeypatch.setattr("liborth_cli.verify.verify._run", lambda *_: pytest.fail("a check ran"))
    done = cli(monkeypatch, capsys, "verify", tmp_path / "model", "--retain-data", tmp_path / "d.npy", "--no-require")
    assert done.code == 3 and "RwkvForCausalLM" in done.err, done.err
