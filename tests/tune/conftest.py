"""A tiny base, rows to learn, and a way to run `liborth tune` on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import llama


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with a base, rows to learn and public rows."""
    folder = tmp_path_factory.mktemp("tune")
    llama(folder / "base")
    draw = np.random.default_rng(0)
    np.save(folder / "rows.npy", draw.integers(0, 64, (12, 10)))
    np.save(folder / "secret.npy", draw.integers(0, 64, (4, 9)))
    np.save(folder / "public.npy", draw.integers(0, 64, (30, 12)) // 3)
    return folder


@pytest.fixture
def tune(cli, place, tmp_path):
    """Run `liborth tune` on the tiny base; return the output directory."""

    def run(method: str, *words: object, name: str = "out", code: int = 0, base: Path | None = None) -> Path | str:
        out = tmp_path / name
        common = ("--batch-size", 4, "--lr", 3e-3, "--seq-len", 16, "-j", 1, "-o", out)
        given = ("--data", place / "rows.npy", *common, *(() if "--steps" in words else ("--steps", 8)), *words)
        found, _, err = cli("tune", base or place / "base", "--method", method, *given)
        assert found == code, err
        return out if not code else err

    return run


@pytest.fixture
def weights():
    """Read the weights of a directory as float64."""
    return lambda folder: {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def logits():
    """Run a checkpoint with Transformers."""

    def run(folder: Path, ids: np.ndarray) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits

    return run
