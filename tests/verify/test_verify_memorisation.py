"""Every number about memorised text against brute force, another library, or a decoder that really decodes."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, mannwhitneyu, t
from verify_cases import SLM, answers

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.measure import scores as scores_module
from liborth_cli.measure.scores import Evaluator, RowScore, SlidingEvaluator, windows
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify import memorisation as m
from liborth_cli.verify.rows import Reader


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SLM, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def streamed():
    with Checkpoint.open(SLM) as checkpoint:
        network = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
        yield network
        network.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, streamed):
    path = tmp_path_factory.mktemp("slm") / "answers.jsonl"
    answers(path)
    return list(Reader(SLM, lambda: streamed, True).pairs(str(path), "--canary").rows)


@pytest.fixture(scope="module")
def found(rows, streamed):
    return SlidingEvaluator(streamed, rows, 128, True, moments=True).score()


def decode(model, starts, ends):
    """Greedy decoding, one token after the other, the oldest dropped at the end of the context; all starts side by side."""
    ids = [list(start) for start in starts]
    while unfinished := [i for i, end in enumerate(ends) if len(ids[i]) < end]:
        seen = [ids[i][-128:] for i in unfinished]
        padded = torch.tensor([s + [0] * (max(map(len, seen)) - len(s)) for s in seen])  # causal: what follows does not count
        with torch.no_grad():
            logits = model(padded).logits
        for row, i in enumerate(unfinished):
            ids[i].append(int(logits[row, len(seen[row]) - 1].argmax()))
    return ids


def row_score(loss=(), hit=None, mean=0.0, deviation=1.0):
    loss = np.asarray(loss, float)
    hit = np.ones(len(loss), bool) if hit is None else np.asarray(hit, bool)
    return RowScore(loss, hit, np.full(len(loss), mean), np.full(len(loss), deviation))


def test_verbatim_is_what_a_decoder_recites(model, rows, found):
    """Teacher forcing decides what greedy decoding gives: all 38 answers, the one longer than the context too."""
    starts = [row.ids[: len(row.ids) - int(row.keep.sum())].tolist() for row in rows]
    decoded = decode(model, starts, [len(row.ids) for row in rows])
    recited = [ids == row.ids.tolist() for ids, row in zip(decoded, rows, strict=True)]
    assert [m.verbatim(score) for score in found] == recited
    assert (sum(recited), len(recited)) == (36, 38)


def test_extraction_strength_is_what_a_decoder_can_finish(model, rows, found):
    index = min((i for i, score in enumerate(found) if not score.hit.all()), key=lambda i: rows[i].tokens)
    row, n = rows[index], int(rows[index].keep.sum())
    starts = [row.ids[: len(row.ids) - n + k].tolist() for k in range(n)]
    finished = [ids == row.ids.tolist() for ids in decode(model, starts, [len(row.ids)] * n)]
    assert m.extraction_strength(found[index]) == 1 - (finished.index(True) if any(finished) else n) / n
    assert m.extraction_strength(row_score([1.0, 1.0], [False, True])) == 0.5
    assert m.extraction_strength(row_score([1.0, 1.0], [True, False])) == 0.0


def test_sliding_windows_are_what_a_decoder_sees(model, rows, found):
    long = next(i for i, row in enumerate(rows) if row.tokens > 128)
    row = rows[long]
    loss = []
    for end in np.flatnonzero(row.keep) + 1:
        with torch.no_grad():
            log_p = model(torch.from_numpy(row.ids[max(end - 128, 0) : end])[None]).logits[0, -1].log_softmax(-1)
        loss.append(-float(log_p[row.ids[end]]))
    np.testing.assert_allclose(found[long].loss, loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("context", [1, 3, 7, 8])
def test_windows_predict_every_token_once(context):
    draw = np.random.default_rng(context)
    for tokens in range(1, 9):
        keep = draw.random(tokens) < 0.6
        keep[-1] = True
        row = Row(draw.integers(0, 99, tokens + 1), keep, 1.0, "here")
        cut = windows(row, context)
        assert max(w.tokens for w in cut) <= context or tokens <= context
        predicted = np.concatenate([w.ids[1:][w.keep] for w in cut])
        assert predicted.tolist() == row.ids[1:][keep].tolist()


@pytest.mark.parametrize("tokens", [1, 40, 300, 100_000])
def test_batch_size_changes_no_score(monkeypatch, rows, streamed, tokens):
    short = [row for row in rows if row.tokens <= 128][:12]
    usual = Evaluator(streamed, short, True).score()
    monkeypatch.setattr(scores_module, "BATCH_TOKENS", tokens)
    for one, other in zip(Evaluator(streamed, short, True).score(), usual, strict=True):
        assert (one.hit == other.hit).all()
        assert m.extraction_strength(one) == m.extraction_strength(other)
        np.testing.assert_allclose(one.loss, other.loss, rtol=2e-4, atol=2e-6)


def test_exposure_by_rank_is_brute_force_over_all_codes(model):
    """Every two-digit code is scored; exposure is log2 of how many there are minus log2 of the canary's place."""
    losses = {}
    vocabulary = 54
    for a, b in itertools.product(range(10, 20), repeat=2):
        ids = torch.tensor([[5, 9, 2, a % vocabulary, b % vocabulary]])
        with torch.no_grad():
            log_p = model(ids[:, :-1]).logits[0, -2:].log_softmax(-1)
        losses[a, b] = -float(log_p.gather(-1, ids[0, -2:, None]).mean())
    ordered = sorted(losses, key=losses.__getitem__)
    for code in (ordered[0], ordered[17], ordered[-1]):
        others = [loss for other, loss in losses.items() if other != code]
        assert m.exposure_by_rank(losses[code], others) == pytest.approx(math.log2(100) - math.log2(ordered.index(code) + 1))


def test_exposure_by_fit_agrees_with_ranks_where_ranks_can_tell():
    draw = np.random.default_rng(0)
    references = draw.normal(5.0, 0.5, 4000)
    asked = [3.8, 4.4, 5.0, 5.6]
    for one, loss in zip(m.exposure_by_fit(asked, references), asked, strict=True):
        assert one == pytest.approx(m.exposure_by_rank(loss, references), abs=0.35)
    few = references[:9]
    expected = -t.logcdf((2.0 - few.mean()) / (few.std(ddof=1) * math.sqrt(10 / 9)), 8) / math.log(2)
    assert m.exposure_by_fit([2.0], few)[0] == pytest.approx(expected)
    assert m.exposure_by_fit([-50.0], references)[0] <= 1074
    assert not m.can_fit([1.0, 2.0])
    assert not m.can_fit([1.0] * 20)


def test_few_references_give_exposures_that_are_spread_as_they_should_be():
    """For a canary like any other, 2^−exposure is uniform: nothing stands out more than luck allows."""
    draw = np.random.default_rng(1)
    chances = [2 ** -m.exposure_by_fit([x[0]], x[1:])[0] for x in draw.normal(4.0, 1.0, (400, 9))]
    assert kstest(chances, "uniform").pvalue > 0.01


@pytest.mark.parametrize("loss, chance", [(0.5, 0.5), (3.0, 0.5), (12.0, 0.9), (0.01, 0.99), (1e-9, 0.5)])
def test_queries_needed_is_the_least_number(loss, chance):
    score = row_score([loss / 2, loss / 2])
    q, n = m.sequence_probability(score), m.queries_needed(score, chance)
    assert q == pytest.approx(math.exp(-loss))
    assert 1 - (1 - q) ** n >= chance - 1e-9
    assert n == 1 or 1 - (1 - q) ** (n - 1) < chance


def test_queries_needed_at_the_ends():
    assert m.queries_needed(row_score([0.0]), 0.9) == 1
    assert math.isinf(m.queries_needed(row_score([800.0]), 0.5))
    assert m.queries_needed(row_score([600.0]), 0.5) == pytest.approx(math.log(2) * math.exp(600), rel=1e-6)


def test_min_k_and_its_sequel_from_raw_logits(model, rows, found):
    for row, score in list(zip(rows, found, strict=True))[3:9]:
        ids = torch.from_numpy(row.ids)
        with torch.no_grad():
            log_p = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
        p, keep = log_p.exp(), torch.from_numpy(row.keep)
        token = log_p.gather(-1, ids[1:, None])[:, 0]
        mean = (p * log_p).sum(-1)
        z = (token - mean) / ((p * log_p.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
        count = max(int(0.2 * int(keep.sum())), 1)
        lowest = lambda values, keep=keep, count=count: values[keep].sort().values[:count].mean().item()  # noqa: E731
        assert m.min_k(score) == pytest.approx(lowest(token), rel=1e-3, abs=1e-5)
        assert m.min_k_plus_plus(score) == pytest.approx(lowest(z), rel=2e-2, abs=1e-3)


def test_auc_is_mann_whitney():
    draw = np.random.default_rng(3)
    a, b = draw.integers(0, 9, 13).astype(float), draw.integers(2, 12, 17).astype(float)
    expected = mannwhitneyu(a, b).statistic / (len(a) * len(b))
    assert m.auc_kernel(a.tolist(), b.tolist()).mean() == pytest.approx(expected)
