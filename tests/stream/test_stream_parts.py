"""Weights at a point, scratch files, labels, groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from liborth_cli.checkpoint.reader import PIECE, Checkpoint
from liborth_cli.stream.batches import batches, groups
from liborth_cli.stream.labels import LogitGradient, row_seed, sample, uniforms
from liborth_cli.stream.store import FileStore, MemoryStore
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Arena, Point, padded

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float64", "float32")]
)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_a_point_on_the_path(dtypes, t, tmp_path):
    """W_r + t(W_f − W_r) in float32 or better, whole tensors and grown vocabularies, across the pieces it is read in."""
    torch.manual_seed(0)
    shape = (PIECE // 100 + 7, 101)
    old = {"w": torch.randn(shape).to(getattr(torch, dtypes[0])), "e": torch.randn(5, 8)}
    new = {"w": torch.randn(shape).to(getattr(torch, dtypes[1])), "e": torch.randn(7, 8)}
    for name, tensors in (("r", old), ("f", new)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path / "r") as reference, Checkpoint.open(tmp_path / "f") as finetuned:
        point = Point(finetuned, reference, t)
        out = torch.full((shape[0] * shape[1],), float("nan"), dtype=torch.float64)
        point.read_into(out, finetuned.tensors["w"])
        wide = torch.float64 if "float64" in dtypes else torch.float32
        a, b = old["w"].to(wide).flatten(), new["w"].to(wide).flatten()
        wanted = {0.0: old["w"].flatten(), 1.0: new["w"].flatten()}.get(t, a + t * (b - a))
        assert torch.equal(out, wanted.double()) or (t not in (0.0, 1.0) and torch.allclose(out, wanted.double(), atol=1e-6))
        grown = torch.full((56,), float("nan"))
        point.read_into(grown, finetuned.tensors["e"])
        rows = old["e"] + t * (new["e"][:5] - old["e"])
        assert torch.allclose(grown.view(7, 8)[:5], rows, atol=1e-6) and torch.equal(grown.view(7, 8)[5:], new["e"][5:])


def test_an_arena_hands_out_separate_stretches_and_is_used_again():
    arena = Arena(torch.float32, CPU)
    arena.reset(padded((3, 5)) + padded((7,)))
    one, two = arena.take((3, 5)), arena.take((7,))
    one.fill_(1.0), two.fill_(2.0)
    assert bool((one == 1).all())
    address = one.data_ptr()
    arena.reset(10)
    assert arena.take((10,)).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_stores_return_what_they_were_given(dtype, tmp_path):
    values = {(b, level): torch.randn(2, 3 + b, 4).to(dtype) for b in range(3) for level in range(4)}
    sizes = [2 * (3 + b) * 4 * dtype.itemsize for b in range(3)]
    for store in (MemoryStore(), FileStore(tmp_path, sizes, 4)):
        for (batch, level), value in values.items():
            store.put(batch, level, value)
        store.put(1, 2, -values[1, 2])
        for (batch, level), value in values.items():
            assert torch.equal(store.get(batch, level), -value if (batch, level) == (1, 2) else value)
        assert not list(tmp_path.iterdir())
        store.close()


def test_the_logit_gradient_is_autograd_s():
    logits = torch.randn(9, 31, dtype=torch.float64, requires_grad=True)
    labels, keep = torch.randint(0, 31, (9,)), torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    differentiate = LogitGradient()
    for _ in range(2):
        gradient, loss = differentiate(logits, labels, keep, None)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        (wanted,) = torch.autograd.grad((losses * keep).sum(), logits)
        assert torch.allclose(gradient, wanted, atol=1e-14)
        assert float(loss) == pytest.approx(float((losses.detach() * keep).sum()), rel=1e-12)


def test_the_loss_survives_a_label_of_no_probability():
    logits = torch.zeros(1, 3)
    logits[0, 0] = 1000.0
    _, loss = LogitGradient()(logits, torch.tensor([1]), torch.ones(1, dtype=torch.bool), None)
    assert float(loss) == 1000.0


def test_sampled_labels_have_the_right_frequencies():
    p = torch.tensor([0.5, 0.25, 0.0, 0.25]).expand(40_000, -1)
    found = torch.bincount(sample(p, uniforms(row_seed(0, b"x"), len(p))), minlength=4) / len(p)
    assert found[2] == 0 and torch.allclose(found, p[0], atol=0.01)


def test_row_seeds_depend_on_seed_and_content_only():
    assert row_seed(1, b"abc") == row_seed(1, b"abc") != row_seed(2, b"abc")
    assert row_seed(1, b"abc") != row_seed(1, b"abd")
    assert row_seed(1, b"same begin b") != row_seed(1, b"same begin c")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 30), st.integers(1, 30))
def test_groups_and_batches_lose_and_repeat_nothing(lengths, group_tokens, batch_tokens):
    rows = [Row(np.full(n + 1, i), np.ones(n, bool), 1.0 + i % 2, str(i)) for i, n in enumerate(lengths)]
    seen = []
    for group in groups(rows, group_tokens):
        assert sum(row.tokens for row in group) <= group_tokens or len(group) == 1
        for batch in batches(group, batch_tokens, 0, CPU):
            assert batch.tokens <= batch_tokens or len(batch.ids) == 1
            assert batch.draws is not None and batch.draws.shape == batch.ids.shape == batch.keep.shape
            assert {1.0 + int(i) % 2 for i in batch.ids[:, 0]} == {batch.weight}
            seen += batch.ids[:, 0].tolist()
    assert sorted(seen) == list(range(len(rows)))
