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
from liborth_cli.verify.check import Options
from liborth_cli.verify.checks import prompts, relearn, rounding
from liborth_cli.verify.checks.prompts import PromptsOptions
from liborth_cli.verify.checks.relearn import Attack, RelearnOptions, halves


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
    names = np.arange(10, 17)
    one, other = halves(names, 3)
    assert sorted(one + other) == names.tolist() and len(one) == 3
    assert halves(names, 3) == (one, other) and halves(names, 4) != (one, other)


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


def test_what_was_learnt_before_comes_back_faster_than_in_the_control():
    """The general weights are three quarters of the fine-tuned ones: relearning must give that away."""
    rows, fresh, options = finance_rows(10), finance_rows(10, first=14_000), RelearnOptions(8, 5e-4)
    with subject(canaries=rows, fresh=fresh) as it:
        it.states.weights["general"] = Point(it.finetuned, it.reference, 0.75)
        first = relearn.run(it, options)
        assert set(first.metrics) == {"relearn_gap", "relearn_gap_fresh", "relearned"}
        gap = first.metrics["relearn_gap"]
        assert gap.low > 0 and gap.forgetting and gap.finetuned > gap.value
        assert "it comes back" in first.verdict
        assert json.dumps(first.to_json()) == json.dumps(relearn.run(it, options).to_json())
        # A model that is its own control shows no gap at all.
        it.states.weights["general"] = it.states.weights["reference"]
        null = relearn.run(it, options).metrics["relearn_gap"]
        assert (null.value, null.low, null.high) == (0.0, 0.0, 0.0)
        text = json.dumps(first.to_json())
        assert not any(TextEncoder(OWNGPT / "finetuned").decode(row.ids)[:20] in text for row in rows)


def test_a_copy_of_a_canary_is_never_held_back_while_it_is_taught():
    rows = finance_rows(5)
    with subject(canaries=[*rows, *rows]) as it:
        for fold in relearn._folds(it):
            assert not {i % 5 for i in fold.taught} & {i % 5 for i in fold.held}
            assert len(fold.taught) + len(fold.held) == 10


def test_rounding_and_prompts_hold_the_fine_tuned_model_beside_the_general_one():
    with subject(canaries=finance_rows(4), retain=finance_rows(4, first=5_000)) as it:
        found = [rounding.run(it, Options()), prompts.run(it, PromptsOptions())]
    for result, name in zip(found, ("quantised_extraction", "prompt_extraction"), strict=True):
        metric = result.metrics[name]
        assert metric.forgetting and metric.finetuned is not None
        assert result.recited == round(metric.value * 4)
        assert "of 4 canaries" in result.verdict.split(". ")[0]


def test_paraphrases_come_from_a_file_and_belong_to_a_canary(tmp_path):
    rows = finance_rows(4)
    encoder, file = TextEncoder(OWNGPT / "finetuned"), tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"prompt": "What?", "completion": encoder.decode(prompts.split_row(rows[2])[1])}) + "\n")
    options = PromptsOptions(str(file))
    with subject(canaries=rows) as it:
        assert prompts.run(it, options).facts["prompts"][-1]["prompt"] == "paraphrases given"
        file.write_text(json.dumps({"prompt": "What?", "completion": "nothing"}) + "\n")
        with pytest.raises(UsageError, match="not that of any canary"):
            prompts.run(it, options)


def test_too_few_canaries_no_control_and_a_model_too_large_are_said(monkeypatch):
    check, options = relearn.CHECK, RelearnOptions()
    with subject(canaries=finance_rows(3)) as it:
        assert "at least 4 different canaries" in check.missing(it, options)
    with subject(canaries=finance_rows(1) * 8) as it:
        assert "and there are 1" in check.missing(it, options)
    with subject() as it:
        assert check.missing(it, options).startswith("--canary")
    with subject(canaries=finance_rows(4)) as it:
        assert not check.missing(it, options) and not check.costs(it, options)
        monkeypatch.setattr(relearn, "PATIENCE", 1e-9)
        assert "minutes" in check.costs(it, options)
        monkeypatch.setattr("liborth_cli.machine.available_bytes", lambda: 0)
        assert "16 bytes a weight" in check.missing(it, options)
