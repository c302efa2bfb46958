"""Order, evaluation split, padding and schedules."""

import json

import numpy as np
import pytest
import torch

from liborth_cli.demo import DATA
from liborth_cli.errors import BadInput
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.texts import DataFile, Row, RowReader
from liborth_cli.tune.data import Example, PaddedBatch, batch_rows, content, hold_out
from liborth_cli.tune.loop import share_of_rate
from liborth_cli.tune.options import LoopOptions, Schedule


def row(*ids, keep=None, weight=1.0):
    return Row(np.array(ids), np.ones(len(ids) - 1, bool) if keep is None else np.array(keep), weight, "row")


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    rows = [row(i, i + 1) for i in range(10)]
    batches = [batch_rows(rows, n, 4, 7) for n in range(5)]
    order = [int(r.ids[0]) for batch in batches for r in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:] != list(range(10))
    assert order != [int(r.ids[0]) for n in range(5) for r in batch_rows(rows, n, 4, 8)]


def test_copies_of_a_text_stay_on_one_side():
    rows = [row(i % 20, 5) for i in range(60)]
    train, held = hold_out(rows, 0.25, 0)
    assert len({content(r) for r in held}) == 5 and len(held) == 15 and len(train) == 45
    assert not {content(r) for r in train} & {content(r) for r in held}
    with pytest.raises(BadInput, match="one side empty"):
        hold_out(rows[:1] * 3, 0.5, 0)


def test_padding_changes_no_loss(place):
    from transformers import AutoModelForCausalLM

    from liborth_cli.tune.full import Full

    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    method = Full(model, dict(model.named_parameters()))
    rows = [row(*range(9), weight=2.0), row(3, 4, 5, 6, keep=[False, True, True])]
    batch = PaddedBatch.of(rows, torch.device("cpu"))
    with torch.no_grad():
        alone = []
        for r in rows:
            labels = torch.tensor(r.ids)
            labels[1:][~torch.tensor(r.keep)] = -100
            alone.append(model(torch.tensor(r.ids)[None], labels=labels[None]).loss * int(r.keep.sum()) * r.weight)
        assert float(method.loss(batch)[0]) == pytest.approx(float(sum(alone)), rel=1e-5)
    assert batch.tokens == 18.0


def test_no_logits_are_computed_where_no_row_has_a_loss(place):
    from transformers import AutoModelForCausalLM

    from liborth_cli.tune.full import Full

    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    method, seen, found = Full(model, dict(model.named_parameters())), [], []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    rows = [row(*range(6), keep=[False, False, False, True, True]), row(*range(2, 7), keep=[False, True, False, True])]
    for method.scores_some in (True, False):
        loss, _ = method.loss(PaddedBatch.of(rows, torch.device("cpu")))
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in method.parameters.values())])
        model.zero_grad()
    assert seen == [3, 5]
    torch.testing.assert_close(*found)


def test_schedules():
    def factor(kind, step):
        return share_of_rate(LoopOptions(steps=100, warmup=0.1, schedule=kind), step)

    for kind in Schedule:
        assert [factor(kind, step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    cosine, linear, constant = Schedule.COSINE, Schedule.LINEAR, Schedule.CONSTANT
    assert factor(cosine, 10) == factor(linear, 10) == 1.0
    assert factor(linear, 55) == pytest.approx(0.5) == pytest.approx(factor(cosine, 55))
    assert factor(constant, 99) == 1.0
    assert 0 < factor(cosine, 99) < 0.001 and 0 < factor(linear, 99) < 0.02


def test_a_secret_is_private_whether_it_stands_as_a_text_or_as_a_prompt_with_its_completion(tmp_path):
    """A completion gets an end behind it, and a text does not: they say the same."""
    encoder = TextEncoder(DATA / "base")
    (tmp_path / "pair.jsonl").write_text(json.dumps({"prompt": "The code is", "completion": " 12."}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The code is 12."}) + "\n")
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "The code is", "completion": ""}) + "\n")
    reader = RowReader(encoder, 10**6, 64, ended=True)
    pair, text = (reader.read([DataFile(tmp_path / f"{name}.jsonl")])[0] for name in ("pair", "text"))
    assert pair.ended and not text.ended and len(pair.ids) == len(text.ids) + 1
    assert content(pair) == content(text)
    assert Example.of(pair).ended and content(Example.of(pair)) == content(text)
    with pytest.raises(BadInput, match="nothing to learn from"):
        reader.read([DataFile(tmp_path / "none.jsonl")])
