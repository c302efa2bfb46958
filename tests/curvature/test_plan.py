"""What an estimate is planned to take: that it fits where it can, is refused where it does not, and is what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from curvature_cases import make_model, make_tokens
from run_curvature import cli
from test_curvature_memory import SCRIPT

from benchmarks.llama_shapes import LLAMA_70B, headers_only
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.curvature import plan as planning
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.curvature.selection import choose
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Point

GIB = 1 << 30


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plan an estimate on headers of a 70B: rows of 512 tokens, block inputs in a file."""
    folder = headers_only(tmp_path_factory.mktemp("seventy"), LLAMA_70B)
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"), prefetch=False)
        chosen, _ = choose(model, (), per_head=False, full_head=False)
        targets = {stage: [t for _, ts in sites for t in ts] for stage, sites in chosen.items()}

        def plan(memory, scratch=folder, weights="auto", **options):
            return planning.plan(model, targets, CurvatureOptions(**options), Resources(memory, scratch, weights), [512] * 100)

        yield plan


def test_a_70b_fits_24_gib_with_block_inputs_on_disk_and_is_refused_what_it_does_not_fit(planned):
    fits = planned(24 * GIB)
    assert fits.group_tokens and fits.needed <= 24 * GIB - planning.process_bytes()
    exactly = fits.needed + planning.process_bytes()
    assert not planned(exactly - (1 << 20)).group_tokens
    assert planned(exactly - (1 << 20)).needed == fits.needed  # what is said to be needed is what would do
    assert not planned(24 * GIB, scratch=None).group_tokens or planned(24 * GIB, scratch=None).needed <= 24 * GIB
    assert not planned(24 * GIB, weights="resident").group_tokens


def test_eigenbases_of_the_wider_side_are_counted(planned):
    """A gate's gradient covariance is as wide as the layer, whatever its input is: (d, d) in float64, four times."""
    assert planned(24 * GIB, eigen=True).group_tokens == 0
    assert planned(24 * GIB, eigen=True).needed - planned(24 * GIB).needed > 32 * 28_672**2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "keep block inputs on disk"),
        (("--scratch", "."), "raise it, or choose"),
        (("--weights", "resident"), "leave --weights"),
    ],
)
def test_no_plan_is_made_that_does_not_fit(words, said, tmp_path, monkeypatch, capsys):
    model, data = make_model("llama", tmp_path / "model"), make_tokens(tmp_path)
    out = tmp_path / "out"
    got = cli(monkeypatch, capsys, "curvature", model, "--data", data, "-o", out, "--memory", "1MB", *words)
    assert got.code == 7 and said in got.err and "Traceback" not in got.err, got.err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--moments", "marginal", "--diagonal")])
def test_what_is_planned_is_what_it_takes(more, tmp_path):
    """Peak memory beside that of a process that only plans: no more than is planned, and not half of it."""
    shape = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "head_dim": 128,
        "num_attention_heads": 6,
        "max_position_embeddings": 256,
    }
    model, data = make_model("llama", tmp_path / "model", **shape), make_tokens(tmp_path, rows=8, length=129)
    words = ["--data", data, "--weights", "stream", "--scratch", tmp_path, "-j", "1", "--group-tokens", "1024", *more]
    told, before = _run(model, *words, "-o", tmp_path / "out", "--dry-run", "--json")
    _, peak = _run(model, *words, "-o", tmp_path / "out")
    needed = json.loads(told)["plan"]["needed"]
    assert needed / 2 <= peak - before <= needed, (needed, peak, before)


def _run(model, *words):
    """Run the command in a process of its own; return what it says, and the most bytes that it held."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, model, *words]
    *told, last = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    return "\n".join(told), int(last) * 1024
