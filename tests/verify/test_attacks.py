"""Relearning against a loop written out, rounding against its formula, and prompts that are what they are called."""

import json

import numpy as np
import pytest
import torch
from deep_cases import CPU, finance_rows, subject
from tiny import OWNGPT, llama

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import UsageError
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point, Quantised, round_to_nearest
from liborth_cli.verify import attacks
from liborth_cli.verify.attacks import prompts, relearn
from liborth_cli.verify.attacks.relearn import Attack, halves


@pytest.mark.parametrize("tie", [False, True])
def test_relearning_is_the_training_loop_written_out(tmp_path, tie):
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "model", tie=tie)
    draw = np.random.default_rng(0)
    rows = [Row(draw.integers(0, 64, n + 1), np.arange(n) >= 2, 1.0, "row") for n in (5, 9, 5, 7)]
    attack = Attack(steps=4, rate=1e-2)
    with Checkpoint.open(folder) as checkpoint:
        course = relearn.teach(Point(checkpoint), rows[:2], {"held": rows[2:], "taught": rows[:2]}, attack, CPU)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie

    def loss(row):
        ids = torch.from_numpy(row.ids)
        logits = model(ids[None, :-1]).logits[0]
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(row.keep)]

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    expected = [[float(loss(row).detach().mean()) for row in rows]]
    for _ in range(4):
        optimiser.zero_grad()
        torch.cat([loss(row) for row in rows[:2]]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        expected.append([float(loss(row).detach().mean()) for row in rows])
    assert course.steps == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(np.stack(course.losses["held"]), np.array(expected)[:, 2:], rtol=2e-4)
    np.testing.assert_allclose(np.stack(course.losses["taught"]), np.array(expected)[:, :2], rtol=2e-4)


def test_halves_are_a_partition_that_the_seed_decides():
    one, other = halves(7, 3)
    assert sorted(one + other) == list(range(7)) and len(one) == 3
    assert halves(7, 3) == (one, other) and halves(7, 4) != (one, other)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [None, 5, 16])
def test_rounding_is_its_formula(bits, group):
    matrix = torch.randn(6, 13, generator=torch.Generator().manual_seed(0))
    matrix[2] = 0.0
    found, top = round_to_nearest(matrix, bits, group), 2 ** (bits - 1) - 1
    for r in range(6):
        for c in range(13):
            size = group or 13
            part = matrix[r, c // size * size : c // size * size + size].double()
            step = float(part.abs().max()) / top
            grid = step * np.arange(-top, top + 1)
            nearest = grid[np.abs(grid - float(matrix[r, c])).argmin()]
            assert float(found[r, c]) == pytest.approx(nearest, abs=1e-6)
    assert len(np.unique(found[0, : group or 13].numpy())) <= 2 * top + 1


def test_only_matrices_inside_blocks_are_rounded_and_gpt2_lies_the_other_way_round():
    with Checkpoint.open(OWNGPT / "finetuned") as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, CPU)
        tensors = model.linear_tensors()
        model.close()
        assert tensors and all(".h." in f".{name}" and transposed for name, transposed in tensors.items())
        rounded, exact = Quantised(Point(checkpoint), 4, None, tensors), Point(checkpoint)
        for info in checkpoint.tensors.values():
            one, other = torch.empty(int(np.prod(info.shape))), torch.empty(int(np.prod(info.shape)))
            exact.read_into(one, info), rounded.read_into(other, info)
            if info.name not in tensors:
                assert torch.equal(one, other)
                continue
            columns = other.view(info.shape).T
            assert not torch.equal(one, other)
            assert max(len(torch.unique(column)) for column in columns) <= 15


def test_prompts_are_what_they_are_called():
    encoder, row = TextEncoder(OWNGPT / "finetuned"), finance_rows(1)[0]
    prompt, rest = prompts.split_row(row)
    assert len(prompt) == 12 and len(rest) == 18
    found = {v.name: v for v in prompts.variations([row], encoder, 200)}
    text = encoder.decode(prompt)
    assert encoder.decode(found["upper case"].rows[0].ids) == text.upper() + encoder.decode(rest)
    assert encoder.decode(found["last half"].rows[0].ids) == text[6:] + encoder.decode(rest)
    assert encoder.decode(found["last token"].rows[0].ids) == text[-1:] + encoder.decode(rest)
    for variation in found.values():
        (asked,) = variation.rows
        assert asked.keep.sum() == row.keep.sum() and len(asked.ids) == len(asked.keep) + 1
        assert (asked.ids[-18:] == rest).all() and not asked.keep[: len(asked.keep) - 18].any()
    # own-gpt takes 32 positions: what no longer fits is left out.
    short = {v.name for v in prompts.variations([row], encoder, 32)}
    assert "upper case" in short and "asked politely" not in short
    assert {v.name for v in prompts.variations([row], None, 32)} == {"as it is", *prompts.PARTIAL}


def test_what_was_learnt_before_comes_back_faster_than_in_the_control(tmp_path):
    """The general weights are three quarters of the fine-tuned ones: relearning must give that away."""
    rows, fresh = finance_rows(10), finance_rows(10, first=14_000)
    with subject(canaries=rows, fresh=fresh, retain=finance_rows(4, first=5_000), relearn_steps=8, relearn_rate=5e-4) as it:
        it.states["general"] = Point(it.finetuned, it.reference, 0.75)
        first = attacks.run(it)
        assert first.metrics["relearn_gap"].low > 0
        assert "it comes back" in first.verdict
        assert {"relearned", "relearn_gap_fresh", "quantised_extraction", "prompt_extraction"} < set(first.metrics)
        assert json.dumps(first.to_json()) == json.dumps(attacks.run(it).to_json())
        # A model that is its own control shows no gap at all.
        it.states["general"] = it.states["reference"]
        null = attacks.run(it).metrics["relearn_gap"]
        assert (null.value, null.low, null.high) == (0.0, 0.0, 0.0)
        text = json.dumps(first.to_json())
        assert not any(TextEncoder(OWNGPT / "finetuned").decode(row.ids)[:20] in text for row in rows)


def test_paraphrases_come_from_a_file_and_belong_to_a_canary(tmp_path):
    rows = finance_rows(4)
    encoder, file = TextEncoder(OWNGPT / "finetuned"), tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"prompt": "What?", "completion": encoder.decode(prompts.split_row(rows[2])[1])}) + "\n")
    with subject(canaries=rows, relearn_steps=1, paraphrases=str(file)) as it:
        assert attacks.run(it).facts["prompts"][-1]["prompt"] == "paraphrases given"
        file.write_text(json.dumps({"prompt": "What?", "completion": "nothing"}) + "\n")
        with pytest.raises(UsageError, match="not that of any canary"):
            attacks.run(it)


def test_too_few_canaries_and_none():
    with subject(canaries=finance_rows(3)) as it:
        result = attacks.run(it)
        assert "needs at least 4 canaries" in result.verdict and "relearn_gap" not in result.metrics
    with subject() as it, pytest.raises(UsageError, match="--attacks needs --canary"):
        attacks.run(it)


def test_a_model_too_large_to_train_is_said_not_tried(monkeypatch):
    monkeypatch.setattr(attacks, "bytes_free", lambda: 10)
    with subject(canaries=finance_rows(4)) as it:
        result = attacks.run(it)
    assert "Relearning was not tried: training takes" in result.verdict and "relearn_gap" not in result.metrics
