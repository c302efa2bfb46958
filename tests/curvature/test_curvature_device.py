"""The way of working that a GPU gets, without one: what it plans, and that nothing but rounding depends on it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from curvature_cases import make_model, make_tokens, relative
from run_curvature import estimate
from test_curvature_invariance import agree, tensors

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.curvature import plan as planning
from liborth_cli.curvature import planned as library
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.curvature.selection import choose
from liborth_cli.errors import BadInput
from liborth_cli.stream import sizes
from liborth_cli.stream.batches import batches
from liborth_cli.stream.host import Beside
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import FiniteCheck
from liborth_cli.stream.weights import Point

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("device") / "llama")


def test_all_weights_in_memory_block_by_block_and_written_beside_the_work_give_the_same_bits(model, tmp_path, monkeypatch):
    data = make_tokens(tmp_path)
    with estimate(model, data, tmp_path / "streamed", weights="stream", moments="marginal", diagonal=True) as streamed:
        plain = library.plan
        monkeypatch.setattr(library, "plan", lambda *a: replace(plain(*a), resident=True, blockwise=True, waiting=2))
        with estimate(model, data, tmp_path / "beside", moments="marginal", diagonal=True) as beside:
            one, two = tensors(streamed), tensors(beside)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
        with estimate(model, data, tmp_path / "groups", moments="marginal", diagonal=True, group_tokens=33) as groups:
            agree(streamed, groups)


def planned(model, free, monkeypatch, rows=(256,) * 64, **options):
    """Plan for a GPU with so many bytes free."""
    monkeypatch.setattr(sizes, "free_bytes", lambda _: free)
    with Checkpoint.open(model) as checkpoint:
        built = BlockModel(Point(checkpoint), torch.float32, CPU, prefetch=False)
        built.device = GPU
        chosen, _ = choose(built, (), False, False)
        targets = {stage: [t for _, ts in sites for t in ts] for stage, sites in chosen.items()}
        asked = CurvatureOptions(**options)
        return planning.plan(built, targets, asked, Resources(1 << 30), rows)


def test_a_gpu_takes_thousands_of_positions_at_once_and_fewer_before_it_takes_groups(model, monkeypatch):
    much = planned(model, 80 << 30, monkeypatch)
    assert much.resident and much.blockwise
    assert much.batch_tokens == sizes.DEVICE_BATCH_TOKENS
    assert much.waiting == planning.MOST_WAITING
    less = planned(model, 160 << 20, monkeypatch)
    assert planning.LEAST_BATCH <= less.batch_tokens < much.batch_tokens
    longest = 256
    assert less.group_tokens >= 64 * longest
    assert longest <= planned(model, 12 << 20, monkeypatch).group_tokens < 64 * longest
    assert planned(model, 1 << 20, monkeypatch).group_tokens == 0
    assert not planned(model, 80 << 30, monkeypatch, fisher="exact").blockwise


def test_logits_come_in_larger_pieces_on_a_gpu():
    assert sizes.logit_rows(128_256, CPU) == 32
    assert sizes.logit_rows(128_256, GPU) > 1000
    assert sizes.logit_rows(10_000_000, GPU) == 16
    assert sizes.logit_rows(64, GPU) == sizes.LONGEST


def test_what_is_done_beside_the_work_fails_the_work():
    def fail(_):
        raise BadInput("broken")

    with Beside(CPU, 2) as beside:
        for number in range(5):
            beside.ask(str(number), partial(lambda n, _: n, number))
        assert list(beside.collect().items()) == [(str(n), n) for n in range(5)]
    with pytest.raises(BadInput, match="broken"), Beside(CPU, 2) as beside:
        beside.ask("a", fail)
        beside.collect()


def test_what_is_not_finite_is_named_when_the_stage_is_done():
    row = Row(np.arange(5), np.ones(4, bool), 1.0, "here:1")
    batch, check = batches([row], 8, None, CPU)[0], FiniteCheck()
    remote = type("Values", (), {"device": GPU, "detach": lambda self: self})  # a tensor on a GPU, for `see`
    real = torch.isfinite
    values = [torch.ones(3), torch.tensor([1.0, float("inf")]), torch.tensor([float("nan")])]
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "isfinite", lambda v: real(v.value) if isinstance(v, remote) else real(v))
    for level, value in enumerate(values):
        there = remote()
        there.value = value
        check.see(there, level, batch)
    patch.undo()
    with pytest.raises(BadInput, match="the output of block 1 is not finite on here:1"):
        check.settle()
    check.settle()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_row_feels_does_not_depend_on_the_rows_beside_it(device, dtype, model, tmp_path, monkeypatch):
    """On a GPU a fused attention kernel may cut the keys up by how many rows there are."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    data, plain = make_tokens(tmp_path, rows=8, length=33), library.plan
    found = []
    for tokens in (32, 1024):
        monkeypatch.setattr(library, "plan", lambda *a, n=tokens: replace(plain(*a), batch_tokens=n))
        out = tmp_path / str(tokens)
        with estimate(model, data, out, device=device, per_token=True, fisher="empirical", dtype=dtype) as factors:
            found.append(tensors(factors))
    alone, together = found
    assert alone.keys() == together.keys()
    # One rounding of a product to bfloat16 may fall the other way: of what it is the product of, 2⁻⁹.
    most = 2e-6 if dtype == "float32" else 2**-9
    for key in alone:
        assert relative(together[key], alone[key]) <= most, key
