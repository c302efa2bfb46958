"""Scores against Transformers' own forward pass, streamed against resident, and unwritten models against written ones."""

import numpy as np
import pytest
import torch
from tiny import OWNGPT

from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.views import Reattached
from liborth_cli.console import Console
from liborth_cli.errors import BadInput
from liborth_cli.machine import configure
from liborth_cli.measure import scores
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.measure.unwritten import Unwritten
from liborth_cli.methods import Amount
from liborth_cli.split import SplitOptions, Splitter, write_split
from liborth_cli.split.write import Destination
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.runner import Runner
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Patched, Point

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    with Checkpoint.open(OWNGPT / "base") as old, Checkpoint.open(OWNGPT / "finetuned") as new:
        yield old, new


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    made = []
    for number in range(13):
        length = int(draw.integers(2, 31))
        keep = draw.random(length) < 0.7
        keep[-1] = True
        made.append(Row(draw.integers(0, 40, length + 1), keep, 1.0, f"row {number}"))
    return made


class Scaled(Point):
    """A checkpoint whose every weight is multiplied by a number."""

    def __init__(self, point, factor):
        super().__init__(point.finetuned)
        self._factor = factor

    def read_into(self, out, info):
        super().read_into(out, info)
        out.mul_(self._factor)


def evaluator(checkpoint, rows, resident=True, dtype=torch.float32, moments=False):
    return Evaluator(BlockModel(Point(checkpoint), dtype, CPU), rows, resident, moments=moments)


def test_scores_are_those_of_the_model_that_transformers_loads(pair, rows):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(OWNGPT / "finetuned", dtype=torch.float64).eval()
    for row, score in zip(rows, evaluator(pair[1], rows, moments=True).score(), strict=True):
        ids = torch.from_numpy(row.ids)
        with torch.no_grad():
            log_p = model(ids[None, :-1]).logits[0].log_softmax(-1)
        p, keep = log_p.exp(), torch.from_numpy(row.keep)
        loss = -log_p.gather(-1, ids[1:, None])[:, 0]
        mean = (p * log_p).sum(-1)
        deviation = ((p * log_p.square()).sum(-1) - mean.square()).sqrt()
        np.testing.assert_allclose(score.loss, loss[keep], rtol=1e-4)
        np.testing.assert_allclose(score.mean, mean[keep], rtol=1e-4)
        np.testing.assert_allclose(score.deviation, deviation[keep], rtol=1e-4)
        assert (score.hit == (log_p.argmax(-1) == ids[1:])[keep].numpy()).all()


def test_moments_are_told_where_they_are_asked_for_and_change_no_loss(pair, rows):
    told, plain = (evaluator(pair[1], rows, moments=moments).score() for moments in (True, False))
    for one, other in zip(told, plain, strict=True):
        assert (one.loss == other.loss).all()
        assert (one.hit == other.hit).all()
        assert len(one.mean) == len(one.deviation) == len(one.loss)
        assert len(other.mean) == len(other.deviation) == 0


def test_streamed_is_resident(pair, rows):
    for one, other in zip(evaluator(pair[1], rows).score(), evaluator(pair[1], rows, False).score(), strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-6)


def test_batches_side_by_side_are_the_same_to_the_bit(pair, rows, monkeypatch):
    twins, twin, scored = [], BlockModel.twin, evaluator(pair[1], rows, moments=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as each of those beside each other has; a product on two adds up in another order
        plain = [scored.score(Point(side)) for side in pair]
        monkeypatch.setattr(scores, "WORTH_A_THREAD", 0)
        monkeypatch.setattr(BlockModel, "twin", lambda self: twins.append(1) or twin(self))
        torch.set_num_threads(3)
        beside = [scored.score(Point(side)) for side in pair]
        with pytest.raises(BadInput, match="not finite"):
            scored.score(Scaled(Point(pair[1]), float("nan")))
        assert torch.get_num_threads() == 3 and len(twins) == 6
    finally:
        torch.set_num_threads(before)
    for one, other in zip((s for some in plain for s in some), (s for some in beside for s in some), strict=True):
        assert (one.table == other.table).all()


@pytest.mark.parametrize("resident", [True, False])
def test_what_comes_before_a_changed_block_is_computed_once(pair, rows, resident, monkeypatch):
    ran, block = [], BlockModel.block
    base, other, scored = Point(pair[1]), Point(pair[0]), evaluator(pair[1], rows, resident)
    depth = len(scored.model.blocks)
    assert depth > 1
    parts = [(level, Patched(base, other, lambda name, at=f".h.{level}.": at in name)) for level in [*range(depth), depth - 1]]
    whole = [scored.score(weights) for _, weights in parts]
    scored.score(base)
    monkeypatch.setattr(BlockModel, "block", lambda self, level, *a: ran.append(level) or block(self, level, *a))
    for found, expected in zip(scored.score_from(base, parts), whole, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one.loss == other.loss).all()
    batches = len(scored._batches)
    assert len(ran) == batches * (sum(depth - level for level, _ in parts) + depth - 1)
    assert any((one.loss != other.loss).any() for one, other in zip(*whole[:2], strict=True))


def test_the_company_a_row_keeps_does_not_change_its_score(pair, rows):
    together = evaluator(pair[1], rows).score()
    for index, row in enumerate(rows):
        np.testing.assert_allclose(evaluator(pair[1], [row]).score()[0].loss, together[index].loss, rtol=1e-5)


@pytest.mark.parametrize("method, amount", [("svd", Amount("rank", 8)), ("scale", Amount("scale", 0.5))])
@pytest.mark.parametrize("resident", [True, False])
def test_an_unwritten_split_is_the_written_one(pair, rows, tmp_path, method, amount, resident):
    run = configure("cpu", 1)
    plan = Splitter(*pair, SplitOptions(method, amount))
    target = Destination(tmp_path / "out", (Source(OWNGPT / "base"), Source(OWNGPT / "finetuned")))
    write_split(plan, target, run, Console(quiet=True))
    unwritten = evaluator(pair[1], rows, resident)
    with Checkpoint.open(tmp_path / "out") as general, Memory.open(tmp_path / "out.private") as memory:
        written = evaluator(general, rows, resident).score()
        for one, other in zip(unwritten.score(Unwritten(plan, run.device)), written, strict=True):
            assert (one.loss == other.loss).all()
        for beta, expected in ((0.0, written), (1.0, evaluator(pair[1], rows, resident).score())):
            for one, other in zip(unwritten.score(Point(Reattached(general, memory, beta))), expected, strict=True):
                assert (one.loss == other.loss).all()
        half = mean_loss(unwritten.score(Point(Reattached(general, memory, 0.5))))
        middle = mean_loss(evaluator(pair[1], rows).score(Point(pair[1], general, 0.5)))
        assert half == pytest.approx(middle, rel=1e-6)


def test_logits_are_computed_where_there_is_loss_alone(pair, rows, monkeypatch):
    seen, tail = [], Runner.tail
    monkeypatch.setattr(Runner, "tail", lambda runner, states: seen.append(len(states)) or tail(runner, states))
    last = [Row(row.ids, np.arange(row.tokens) == row.tokens - 1, row.weight, row.where) for row in rows]
    every, ends = (evaluator(pair[1], some).score() for some in (rows, last))
    assert sum(seen) == sum(int(row.keep.sum()) for row in rows) + len(rows)
    for whole, end in zip(every, ends, strict=True):
        np.testing.assert_allclose(end.loss, whole.loss[-1:], rtol=1e-5, atol=1e-6)
