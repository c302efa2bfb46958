"""The path of `split` to a GPU and back, on a pretended one (elsewhere.py): every basis, bit-exact return, same numbers."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from elsewhere import GPU, Elsewhere
from liborth_kernels import dispatch
from liborth_kernels.gram import gram
from safetensors.torch import load_file
from tiny import OWNGPT, files

from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.errors import UsageError
from liborth_cli.linalg import truncated
from liborth_cli.machine import Run, configure
from liborth_cli.methods import Amount
from liborth_cli.ranks import World
from liborth_cli.split import SplitOptions, Splitter, divide, shard, write_split
from liborth_cli.split import write as write_module
from liborth_cli.split.write import Destination

BASE, FINETUNED = OWNGPT / "base", OWNGPT / "finetuned"
KERNELS = {"rebuild_delta": "torch"}
CASES = {
    "svd, rank": {"method": "svd", "amount": Amount("rank", 4)},
    "svd, noise edge": {"method": "svd", "amount": Amount("noise-edge")},
    "random": {"method": "random", "amount": Amount("density", 0.5)},
    "kfac": {"method": "kfac", "amount": Amount("mass", 0.9)},
    "diagonal": {"method": "diagonal", "amount": Amount("mass", 0.9)},
    "contrastive": {"method": "contrastive", "amount": Amount("strength", 0.3)},
    "contrastive, hard": {"method": "contrastive", "amount": Amount("strength", 0.3, hard=True)},
    "contrastive, input side": {"method": "contrastive", "amount": Amount("strength", 0.3), "settings": {"sides": "input"}},
    "contrastive, wide": {"method": "contrastive", "amount": Amount("strength", 0.3), "settings": {"factor_rank": 8}},
}


class Now(Executor):
    """Work in this thread: a dispatch mode does not reach others."""

    def submit(self, fn, /, *args, **kwargs):
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    from liborth_cli.cli.main import app

    folder = tmp_path_factory.mktemp("factors")
    common = ["curvature", str(FINETUNED), "--tokens", "200", "-q", "--device", "cpu"]
    for name, words in {
        "retain": ["--data", str(OWNGPT / "shakespeare_tail.txt"), "--diagonal"],
        "forget": ["--data", str(OWNGPT / "finance_qa.txt"), "--at", "0.5", "--reference", str(BASE)],
    }.items():
        app([*common, *words, "-o", str(folder / name)], standalone_mode=False)
    return folder / "retain", folder / "forget"


def write(out, device, options, sets, devices=()):
    with ExitStack() as stack:
        old, new = (stack.enter_context(Checkpoint.open(side)) for side in (BASE, FINETUNED))
        retain, forget = (stack.enter_context(FactorSet.open(path)) for path in sets)
        job = Splitter(old, new, options, retain, forget)
        run = Run(device, max(len(devices), 1), kernels=KERNELS, devices=devices)
        return write_split(job, Destination(out, (Source(BASE), Source(FINETUNED))), run, Console(quiet=True))


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_what_the_cpu_gives(case, tmp_path, sets, monkeypatch, cli):
    for module in (write_module, shard):
        monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *_, **__: Now())
    monkeypatch.setattr(shard, "DEVICE_PIECE", 1000)
    monkeypatch.setattr(divide, "DEVICE_BLOCK_BYTES", 5000)
    options = SplitOptions(**CASES[case])
    here = write(tmp_path / "here", torch.device("cpu"), options, sets)
    with Elsewhere():
        there = write(tmp_path / "there", GPU, options, sets)
    assert there.machine.model_dump(exclude_unset=True) == {"device": "cuda:0", "threads": 1, "kernels": KERNELS}
    for key, value in here.totals.model_dump(exclude_none=True).items():
        assert getattr(there.totals, key) == pytest.approx(value, rel=1e-4), key
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "here"))
    for name, value in wanted.items():
        assert torch.allclose(ours[name].float(), value.float(), rtol=1e-4, atol=1e-5), name
    code, _, err = cli("excise", tmp_path / "there", "--beta", 1, "-o", tmp_path / "back", "-q")
    assert code == 0, err
    assert files(tmp_path / "back")["model.safetensors"] == files(FINETUNED)["model.safetensors"]


class There(ThreadPoolExecutor):
    """Threads in each of which the pretended GPUs exist."""

    def __init__(self, workers, **words):
        super().__init__(workers, initializer=Elsewhere().__enter__, **words)


def test_two_gpus_share_the_matrices_of_one_process(tmp_path, sets, monkeypatch):
    """Every thread keeps to its own, nothing of one meets anything of the other, and the files are those of one GPU."""
    two, seen, both = (GPU, torch.device("cuda:1")), set[torch.device](), threading.Barrier(2)
    options = SplitOptions(**CASES["contrastive"])
    plain = divide.Divider._skill

    def skill(self, job):
        if self.here not in seen:
            seen.add(self.here)
            both.wait(30)
        return plain(self, job)

    for module in (write_module, shard):
        monkeypatch.setattr(module, "ThreadPoolExecutor", There)
    with Elsewhere():
        one = write(tmp_path / "one", GPU, options, sets)
        monkeypatch.setattr(divide.Divider, "_skill", skill)
        shared = write(tmp_path / "two", GPU, options, sets, two)
    assert seen == set(two) and shared.machine.device == "cuda:all" and one.machine.device == "cuda:0"
    weights = [files(tmp_path / name)["model.safetensors"] for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_all_gpus_are_for_one_process_that_can_use_them(cli, monkeypatch):
    def said(command, *words):
        code, _, err = cli(command, BASE, *words, "--device", "cuda:all")
        assert code == 2 and err.count("\n") == 1, err
        return err

    assert "torchrun" in said("curvature", "--data", OWNGPT / "finance_qa.txt")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "0 CUDA devices" in said("split", FINETUNED, "--rank", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dispatch, "_choice", dispatch._choice)  # what this run decides is for this test
    run = configure("cuda:all", 8)
    assert [str(device) for device in run.devices] == ["cuda:0", "cuda:1"] and run.share_threads(100) == 4
    assert run.share_threads(20_000) == 2
    with pytest.raises(UsageError, match="torchrun"):
        configure("cuda:all", 1, world=replace(World(), size=2))


def test_a_tall_matrix_by_rows(tmp_path, sets, monkeypatch):
    """Formed from both weights on the device, in blocks; never whole."""
    for module in (write_module, shard):
        monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *_, **__: Now())
    monkeypatch.setattr(divide, "DEVICE_BLOCK_BYTES", 5000)
    monkeypatch.setattr("liborth_cli.split.divide.AHEAD_BYTES", 0)
    monkeypatch.setattr(divide.UpdateRows, "all", _fail_if_tall)
    options = SplitOptions("svd", Amount("rank", 4))
    with Elsewhere():
        there = write(tmp_path / "there", GPU, options, sets)
    assert there.tensors["transformer.wte.weight"].rank == 4


@pytest.mark.parametrize(("route", "tolerance"), [("krylov32", 1e-4), ("gram32", 1e-4), ("gram64", 1e-4), ("svd", 0.0)])
def test_every_route_to_a_leading_subspace(route, tolerance, monkeypatch):
    monkeypatch.setattr(truncated, "KRYLOV_FROM", 1 if route == "krylov32" else 1 << 30)
    u = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 500)
    u = u.double() if route == "gram64" else u
    with Elsewhere():
        there = truncated.leading_subspace(u.to(GPU), 4, truncated.energy(u), torch.Generator().manual_seed(0), tolerance)
        assert there.vectors.device == GPU
        part = there.rebuild(torch.empty_like(u).to(GPU)).cpu()
    here = truncated.leading_subspace(u, 4, truncated.energy(u), torch.Generator().manual_seed(0), tolerance)
    assert there.route == here.route == route
    assert torch.allclose(part, here.rebuild(torch.empty_like(u)), atol=1e-3)


@pytest.mark.parametrize("lost", [2e-6, 2e-5])
def test_a_gram_that_lost_something_is_still_certified_truly(lost, monkeypatch):
    """As a GPU's are: tensor cores cut their sums off."""
    u = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1, 200)
    squares = torch.linalg.svdvals(u.double()).square()
    monkeypatch.setattr(truncated, "gram_of", lambda u, dtype, both=True: gram(u, dtype) * (1 - lost))
    with Elsewhere():
        found = truncated._gram32(u.to(GPU), 8, truncated.energy(u), torch.Generator().manual_seed(0))
    excess = (float(squares[:8].sum()) - found.captured) / float(squares[8:].sum())
    assert -1e-6 <= excess <= found.excess <= 100 * lost


_all = divide.UpdateRows.all


def _fail_if_tall(self, out):
    assert self.shape[0] < 2 * self.shape[1]
    return _all(self, out)
