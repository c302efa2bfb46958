"""The kernel of forget tokens against the model itself: what a step does to their loss, what it costs, streamed or resident."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import OWNGPT

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import SILENT
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.curvature.selection import choose
from liborth_cli.demo import DATA
from liborth_cli.machine import Run
from liborth_cli.recall.attack import attacks
from liborth_cli.recall.kernel import KernelWalk, Metric
from liborth_cli.recall.levels import Likeness, Losses, alike, relearnt, unseen
from liborth_cli.recall.moves import Moves, Stepped
from liborth_cli.recall.retain import _parts
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, Row, RowReader
from liborth_cli.stream.weights import Point
from liborth_cli.tune.options import Arithmetic

RUN = Run(torch.device("cpu"), 1)
PAIRS = {
    "llama": (DATA / "finetuned", DATA / "retain.jsonl", DATA / "unseen.jsonl"),
    "gpt2": (OWNGPT / "finetuned", OWNGPT / "shakespeare_tail.txt", OWNGPT / "finance_qa.txt"),
}
DAMPING = 1e-2


def read(folder, file, model, tokens):
    reader = RowReader(TextEncoder(folder), model.vocabulary, 32, truncate=True)
    return reader.read([DataFile(file)], tokens)


@pytest.fixture(scope="module", params=PAIRS)
def walked(request, tmp_path_factory):
    """A model, some rows of which every token counts, and a walk over them in the metric of other rows."""
    folder, kept, gone = PAIRS[request.param]
    place = tmp_path_factory.mktemp("recall")
    checkpoint = Checkpoint.open(folder)
    model = BlockModel(Point(checkpoint), torch.float32, RUN.device)
    job = Estimator(Point(checkpoint), model, read(folder, kept, model, 1500), CurvatureOptions(), Resources(1 << 40), RUN)
    job.write(place / "retain", [DataFile(kept)], (None, None), SILENT)
    model.load_all()  # the pass before streams where memory is short
    rows = sorted(read(folder, gone, model, 90), key=lambda row: row.tokens, reverse=True)
    rows = [replace(row, keep=np.ones_like(row.keep)) for row in rows]
    linear = {
        stage: [(site, [t for t in targets if t.kind == "linear"]) for site, targets in sites]
        for stage, sites in choose(model, (), False, False)[0].items()
    }
    with FactorSet.open(place / "retain") as factors:
        walk = KernelWalk(model, linear, Metric(factors, DAMPING, RUN.device), place)
        shapes = {t.tensor: checkpoint.tensors[t.tensor].shape for t in walk.targets.values()}
        yield model, rows, walk, factors, Moves(shapes, place), checkpoint, walk.walk(rows)


def loss(folder, moved, checkpoint, rows):
    """Sum the losses of all tokens with Transformers, at float64 weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    known = dict(model.named_parameters())
    total = 0.0
    with torch.no_grad():
        for name, value in moved.items():
            known[name] += value
        for row in rows:
            ids = torch.from_numpy(row.ids)
            logits = model(ids[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    return total


def test_the_kernel_is_how_a_step_moves_the_loss(walked):
    """1ᵀKα is the derivative of the summed loss along the step of α; a difference quotient of the whole model agrees."""
    _, rows, _, _, step, checkpoint, felt = walked
    alpha = torch.randn(len(felt.kernel), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    felt.fill(step, alpha)
    small = 1e-5 / max(float(t.abs().max()) for t in step.tensors.values())
    ends = [loss(checkpoint.path, {n: c * small * t for n, t in step.tensors.items()}, checkpoint, rows) for c in (-1, 1)]
    assert (ends[1] - ends[0]) / (2 * small) == pytest.approx(float((felt.kernel @ alpha).sum()), rel=2e-3)


def test_the_cost_is_that_of_the_retain_metric(walked):
    """½αᵀKα = Σ ½ tr(G D A Dᵀ) over the matrices, with the damped factors written out."""
    _, _, walk, factors, step, _, felt = walked
    alpha = torch.randn(len(felt.kernel), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    felt.fill(step, alpha)
    total = 0.0
    for name, target in walk.targets.items():
        d = step.tensors[target.tensor].double()
        if target.transposed:
            d = d.T
        found = factors.layer(name)
        sides = [found.gradient_covariance.double(), found.input_covariance.double()]
        g, a = (s + DAMPING * s.trace() / len(s) * torch.eye(len(s)) for s in sides)
        total += 0.5 * float(torch.trace(g @ d @ a @ d.T))
    assert felt.cost(alpha) == pytest.approx(total, rel=1e-4)


def test_a_step_climbs_the_loss_of_no_kind_of_retain_rows(walked, tmp_path):
    """Along a step that is solved with slopes, the loss of each kind of rows has no derivative, and the others still move."""
    _, rows, walk, _, step, checkpoint, felt = walked
    kinds, shapes = (rows[1:2], rows[2:]), {name: tensor.shape for name, tensor in step.tensors.items()}
    slopes = [Moves(shapes, tmp_path) for _ in kinds]
    for kept, slope in zip(kinds, slopes, strict=True):
        walk.climb(rows[:1], slope)
        walk.climb(kept, slope, memory=0.0)  # what it held is forgotten
    residuals = torch.linspace(-1, 1, len(felt.kernel), dtype=torch.float64)

    def derivative(some, slopes=(), owed=()):
        alpha, theta = felt.solve(residuals, 1e-2, slopes, owed)
        felt.fill(step, alpha, theta.tolist(), slopes)
        small = 1e-5 / max(float(t.abs().max()) for t in step.tensors.values())
        ends = [loss(checkpoint.path, {n: c * small * t for n, t in step.tensors.items()}, checkpoint, some) for c in (-1, 1)]
        return (ends[1] - ends[0]) / (2 * small)

    free = [derivative(kept) for kept in kinds]
    assert all(abs(derivative(kept, slopes)) < 2e-2 * max(map(abs, free)) for kept in kinds)
    assert abs(derivative(rows[:1], slopes)) > 10 * max(abs(derivative(kept, slopes)) for kept in kinds)
    assert abs(derivative(kinds[1], slopes[:1])) > 10 * abs(derivative(kinds[1], slopes)), "one slope says nothing of the other"
    for kept, owed in zip(kinds, ((0.5, 0.0), (0.0, 0.5)), strict=True):
        tokens = sum(int(row.keep.sum()) for row in kept)
        assert derivative(kept, slopes, owed) / tokens == pytest.approx(-0.5, rel=2e-2), "what is owed is won back"
    before = slopes[0].flat.clone()
    walk.climb(kinds[0], slopes[0], memory=0.6)
    torch.testing.assert_close(slopes[0].flat, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_parts_hold_every_row_once_and_none_is_small():
    rows = [Row(np.zeros(n + 1, np.int64), np.ones(n, bool), 1.0, str(k)) for k, n in enumerate((3, 9, 4, 8, 2, 1))]
    parts = _parts(rows, 10)
    assert [sum(row.tokens for row in part) for part in parts] == [12, 15]
    assert [[row.tokens for row in part] for part in parts] == [[9, 3], [8, 4, 2, 1]]
    assert [row.tokens for row in _parts(rows, 100)[0]] == [9, 8, 4, 3, 2, 1]


def test_streamed_and_resident_walks_agree(walked, tmp_path):
    model, rows, walk, factors, _, checkpoint, felt = walked
    assert model.resident
    other = BlockModel(Point(checkpoint), torch.float32, RUN.device)
    streamed = KernelWalk(other, walk.chosen, Metric(factors, DAMPING, RUN.device), tmp_path).walk(rows)
    assert not other.resident
    assert torch.allclose(streamed.kernel, felt.kernel, rtol=1e-4, atol=1e-4 * float(felt.kernel.abs().max()))
    other.close()


def test_a_model_that_moved_is_rounded_as_it_would_be_stored(walked, tmp_path):
    *_, checkpoint, _ = walked
    name = next(n for n, info in checkpoint.tensors.items() if len(info.shape) == 2)
    info = checkpoint.tensors[name]
    moved, step = (Moves({name: info.shape}, tmp_path) for _ in range(2))
    moved.tensors[name].fill_(1e-3)
    step.tensors[name].fill_(2e-3)
    out = torch.empty(info.shape).view(-1)
    Stepped(Point(checkpoint), moved, step, 0.5).read_into(out, info)
    stored = checkpoint.load(name)
    assert torch.equal(out, (stored.float() + 2e-3).to(stored.dtype).float().view(-1))


def losses(*values):
    return [np.array(v, float) for v in values]


def alike_rows(forget, fresh):
    """Rows that share nothing, so that all fresh rows count the same."""
    beside = np.arange(forget) % fresh if fresh else np.zeros(0, int)
    return Likeness(np.zeros((forget, fresh)), np.zeros((fresh, fresh)), beside, np.zeros(forget))


def test_the_unseen_level_is_the_references_loss_at_the_level_of_the_form():
    reference = Losses(losses([6, 2], [4, 2]), losses([5, 2], [5, 2]))
    found = unseen(reference, losses([10, 1], [10, 1]), alike_rows(2, 2))
    assert 6 < found[0][0] <= 12
    assert 1 <= found[0][1] < 3, "what is certain in the form is certain, but for the prior"
    assert found[0][0] / found[1][0] == pytest.approx(1.5), "hard tokens stay hard"
    np.testing.assert_array_equal(unseen(reference, [], alike_rows(2, 0)), reference.forget)
    level = unseen(alike(reference), losses([10, 1], [10, 1]), alike_rows(2, 2))
    assert np.allclose(level[0], level[1]), "without a reference every row gets the level of its places"


def test_rows_of_two_forms_aim_at_two_levels():
    reference = Losses(losses([5, 5], [5, 5]), losses(*[[5, 5]] * 8))
    fresh = losses(*[[8, 8]] * 4, *[[2, 2]] * 4)
    like = np.repeat([[1.0, 0.0], [0.0, 1.0]], 4, axis=1)
    like = Likeness(like, np.tile(like.repeat(4, axis=0), 1), np.array([0, 4]), np.zeros(2))
    hard, easy = unseen(reference, fresh, like)
    assert (hard > 6).all()
    assert (easy < 4).all()
    assert np.allclose(np.add(hard, easy), 10), "each as far from the mean of both as the prior leaves it"


def test_rows_are_like_those_that_share_pairs_of_tokens():
    def row(*ids):
        return Row(np.array(ids), np.ones(len(ids) - 1, bool), 1.0, "")

    forget = [row(1, 2, 3, 4), row(7, 8, 9), row(5, 5, 5, 5)]
    fresh = [row(1, 2, 3, 9), row(0, 1, 2), row(7, 8, 9)]
    found = Likeness.of(forget, fresh)
    assert found.forget.tolist() == [[1, 0.5, 0], [0, 0, 1], [0, 0, 0]]
    assert found.fresh.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]], "a row is not like itself"
    assert Likeness.of(forget, []).forget.shape == (3, 0)


def test_under_attack_forget_rows_aim_at_what_fresh_rows_are_there_even_above_the_reference():
    reference = Losses(losses([2, 2], [3, 3]), losses([2, 2], [2, 2]))
    goal = relearnt(reference, losses([5, 1], [1, 1]), losses([1, 3], [1, 3]), alike_rows(2, 2))
    assert np.allclose(goal.fresh, [[2 * (2 + 4 * 2) / (4 + 4 * 2), 2]] * 2), (
        "fresh rows should fall as far as they do for the reference, but stay where that is above where they stood"
    )
    ratio = np.array([6 + 4 * 2, 2 + 4 * 2]) / (4 + 4 * 2)
    assert np.allclose(goal.forget, [2 * ratio * 6 / 4, 3 * ratio * 2 / 4]), (
        "no row is held at the reference's level while fresh ones stay above, and each stands as the fresh one beside it does"
    )


def test_rows_spread_as_fresh_rows_do():
    rng = np.random.default_rng(0)
    seen = [rng.uniform(3, 5, 8) for _ in range(300)]
    fresh = [row * rng.lognormal(0, 0.2) for row in seen[100:]]
    fresh[0] = seen[100] * 0.01
    reference = Losses(seen[:100], seen[100:])
    rows = [Row(np.array([7, 8, n]), np.ones(2, bool), 1.0, "") for n in range(300)]
    aims = unseen(reference, fresh, Likeness.of(rows[:100], rows[100:]))
    mine, theirs = (
        np.log([(row / was).mean() for row, was in zip(some, before, strict=True)])
        for some, before in ((aims, seen[:100]), (fresh[1:], seen[101:]))
    )
    assert 0.75 < mine.std() / theirs.std() < 1.25 and abs(mine.mean() - theirs.mean()) < 0.06
    assert mine.min() > np.log(0.45), "a fresh row that was trained on after all holds no secret as it is"


def test_only_rows_that_are_known_spread():
    reference = Losses(losses([4, 4], [4, 4], [4, 4]), losses([4, 4], [4, 4]))
    fresh = losses([3, 3], [5, 5])
    found = alike_rows(3, 2).of_known(reference, Losses(losses([0.1, 0.1], [1.9, 1.9], [3, 3]), fresh), taught=False)
    assert found.beside.tolist() == [0, 1, -1]
    easier, harder, mean = (float(aim.sum()) for aim in unseen(reference, fresh, found))
    assert easier < mean < harder
    assert mean == pytest.approx(8), "a student's row stands at the level"
    assert alike_rows(3, 0).of_known(reference, Losses(reference.forget, []), taught=True).beside.shape == (0,)


def test_a_row_that_was_not_learnt_stays_as_hard_as_it_is():
    reference = Losses(losses([4, 4], [4, 4]), losses([4, 4], [4, 4]))
    mine, fresh = losses([0.1, 0.1], [7, 5]), losses([4, 4], [4, 4])
    taught, student = (alike_rows(2, 2).of_known(reference, Losses(mine, fresh), taught) for taught in (True, False))
    assert [float(aim.sum()) for aim in unseen(reference, fresh, taught)] == pytest.approx([8, 12])
    assert [float(aim.sum()) for aim in unseen(reference, fresh, student)] == pytest.approx([8, 8])
    alone = alike_rows(2, 0).of_known(Losses(reference.forget, []), Losses(mine, []), taught=True)
    assert [float(aim.sum()) for aim in unseen(Losses(reference.forget, []), [], alone)] == pytest.approx([8, 12])


def test_a_row_is_put_beside_one_that_is_like_it_and_copies_beside_the_same():
    def row(*ids):
        return Row(np.array(ids), np.ones(len(ids) - 1, bool), 1.0, "")

    fresh = [row(1, 2, n) for n in range(10, 30)] + [row(5, 6, n) for n in range(10, 30)]
    forget = [row(1, 2, n, 5) for n in range(40, 80)] + [row(5, 6, 90), row(5, 6, 90), row(0, 0)]
    beside = Likeness.of(forget, fresh).beside
    assert (beside[:40] < 20).all() and len(set(beside[:40])) > 10 and beside[40] == beside[41] >= 20
    assert (beside == Likeness.of(forget[::-1], fresh).beside[::-1]).all()
    assert Likeness.of(forget, []).beside.shape == (0,)


def test_hands_are_dealt_so_that_a_row_is_never_in_both():
    rows = [Row(np.array([1, 2, i % 5]), np.ones(2, bool), 1.0, "") for i in range(10)]
    found = attacks(rows, 3, seed=0)
    assert len(found) == 12, "four hands at three rates"
    assert {one.rate for one in found[:4]} == {one.rate for one in found}
    for one in found:
        assert sorted((*one.taught, *one.held)) == list(range(10))
        assert not {i % 5 for i in one.taught} & {i % 5 for i in one.held}
    assert attacks(rows[:1], 3, 0) == []
    assert attacks(rows, 0, 0) == []


def test_an_attack_in_bfloat16_leads_where_the_one_in_float32_does(walked):
    model, rows, *_, checkpoint, _ = walked
    ends = {}
    for dtype in (None, *Arithmetic):
        if dtype is None:
            model.use(Point(checkpoint))
            model.load_all()
        else:
            attacks(rows, 4, 0, dtype)[0].run(model, Point(checkpoint), rows)
        ends[dtype] = torch.cat([value.flatten() for value in model.model.state_dict().values()]).clone()
    model.use(Point(checkpoint))
    model.load_all()
    wide, narrow = (ends[dtype] - ends[None] for dtype in (Arithmetic.FLOAT32, Arithmetic.BFLOAT16))
    assert 0 < float((narrow - wide).norm()) < 0.3 * float(wide.norm())


def test_a_walk_in_bfloat16_feels_what_the_one_in_float32_does(walked, tmp_path):
    model, rows, walk, factors, *_, felt = walked
    model.load_all()
    other = KernelWalk(model, walk.chosen, Metric(factors, DAMPING, RUN.device), tmp_path)
    other.dtype = Arithmetic.BFLOAT16
    narrow = other.walk(rows)
    assert not torch.equal(narrow.kernel, felt.kernel)
    assert float((narrow.kernel - felt.kernel).norm()) < 0.05 * float(felt.kernel.norm())
    assert set(narrow.gradients) == set(felt.gradients)


def test_a_gpu_whitens_what_the_walk_left_on_the_host_and_a_step_comes_back_to_it(walked):
    from elsewhere import GPU, Elsewhere

    _, _, _, factors, moves, _, felt = walked
    name = next(iter(felt.targets))
    gradients = torch.randn(5, felt.gradients[name].shape[0])
    here = Metric(factors, DAMPING, RUN.device).gradients(name, gradients)
    felt.fill(moves, torch.ones(len(felt.kernel)))
    expected = moves.flat.clone()
    with Elsewhere():
        there = Metric(factors, DAMPING, GPU).gradients(name, gradients)
        torch.testing.assert_close(here, there.cpu())
        sent = [{key: value.to(GPU) for key, value in held.items()} for held in (felt.inputs, felt.gradients)]
        elsewhere = replace(felt, inputs=sent[0], gradients=sent[1], metric=Metric(factors, DAMPING, GPU))
        elsewhere.fill(moves, torch.ones(len(felt.kernel)).to(GPU))
    torch.testing.assert_close(moves.flat, expected)
