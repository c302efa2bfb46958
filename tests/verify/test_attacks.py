"""Relearning against a loop written out, rounding against its formula, and prompts that are what they are called."""

import json
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deep_cases import CPU, finance_rows, subject
from tiny import OWNGPT, llama

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import OutOfResources, Stopped, UsageError
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point, Quantised, round_to_nearest
from liborth_cli.tune.options import Optimiser
from liborth_cli.verify import attacks, relearning
from liborth_cli.verify.attacks import WIDTH, Attack, AttackRows, Grid, Lesson, halves
from liborth_cli.verify.check import Options
from liborth_cli.verify.checks import loads, prompts, rounding
from liborth_cli.verify.checks import relearn as check
from liborth_cli.verify.checks.prompts import PromptsOptions
from liborth_cli.verify.checks.relearn import RelearnOptions
from liborth_cli.verify.opening import Inputs
from liborth_cli.verify.relearning import Relearnt, means, relearn
from liborth_cli.verify.rows import repeats
from liborth_cli.verify.verify import VerifyOptions, _choose


def _rows(lengths, seed=0, prompt=3):
    """Rows of random tokens, each with a prompt of its own."""
    draw = np.random.default_rng(seed)
    return [Row(draw.integers(0, 64, n + 1), np.arange(n) >= prompt - 1, 1.0, f"row {i}") for i, n in enumerate(lengths)]


def _target(canaries, fresh=(), general=()):
    return AttackRows(canaries, np.arange(len(canaries)), fresh, np.arange(len(fresh)), general)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("optimiser", list(Optimiser))
def test_relearning_is_the_training_loop_written_out(tmp_path, tie, optimiser):
    from transformers import AutoModelForCausalLM

    folder, rows = llama(tmp_path / "model", tie=tie), _rows((5, 9, 5, 7))
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, CPU)
        attack, hidden = Attack(1e-2 * model.hidden / WIDTH if optimiser is Optimiser.ADAMW else 1e-1, optimiser), model.hidden
        model.close()
        found = relearn(Point(checkpoint), _target(rows), Grid((attack,), 4))
    assert attack.rate_at(hidden) == pytest.approx(1e-2 if optimiser is Optimiser.ADAMW else 1e-1)
    assert found.steps == (0, 2, 4) and found.canaries.shape == found.recited.shape == (2, 4, 1, 3)
    for run, hand in enumerate(halves(range(4), 0)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie

        def loss(row, model=model):
            ids = torch.from_numpy(row.ids)
            logits = model(ids[None, :-1]).logits[0]
            return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(row.keep)]

        if optimiser is Optimiser.ADAMW:
            trainer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        else:
            trainer = torch.optim.SGD(model.parameters(), lr=1e-1)
        held = [i for i in range(4) if i not in hand]
        expected = [[float(loss(rows[i]).detach().mean()) for i in held]]
        for step in range(1, 5):
            trainer.zero_grad()
            torch.cat([loss(rows[i]) for i in hand]).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.step()
            if step % 2 == 0:
                expected.append([float(loss(rows[i]).detach().mean()) for i in held])
        np.testing.assert_allclose(found.canaries[run, held, 0].T, np.array(expected), rtol=2e-4)
        assert np.isnan(found.canaries[run, hand]).all()


def test_the_lowest_of_all_attacks_counts_and_every_attack_starts_from_the_model(tmp_path):
    rows, fresh, general = _rows((5, 6, 7, 8)), _rows((5, 6, 7, 8), 1), _rows((30,), 2)
    grid = [Attack(1e-4), Attack(1e-2, Optimiser.SGD, Lesson.FRESH), Attack(3e-3, lesson=Lesson.GENERAL)]
    with Checkpoint.open(llama(tmp_path / "model")) as checkpoint:
        together = relearn(Point(checkpoint), _target(rows, fresh, general), Grid(tuple(grid), 4))
        alone = [relearn(Point(checkpoint), _target(rows, fresh, general), Grid((attack,), 4)) for attack in grid]
        without = relearn(Point(checkpoint), _target(rows), Grid(tuple(grid), 4))
    for number, one in enumerate(alone):
        np.testing.assert_array_equal(together.canaries[:, :, number], one.canaries[:, :, 0])
        np.testing.assert_array_equal(together.fresh[:, :, number], one.fresh[:, :, 0])
    best = min(alone, key=lambda one: one.lowest()[0])
    assert together.lowest()[0] == best.lowest()[0] == min(min(one.curve("canaries", 0)) for one in alone)
    assert without.attacks == tuple(grid[:1]), "what there is no text for is not tried"
    # Under fresh rows and general text every canary is watched; fresh rows only while they are not taught.
    assert np.isfinite(together.canaries[:, :, 1]).all() and np.isfinite(together.canaries[0, :, 2]).all()
    assert np.isfinite(together.fresh[:, :, 1]).sum() == 4 * 3


def test_training_that_breaks_down_is_no_lowest_loss():
    table = np.array([[[[5.0, 3.0], [5.0, np.nan]], [[7.0, 5.0], [7.0, np.nan]]]])
    found = Relearnt((Attack(1.0), Attack(9.0)), (0, 2), table, np.zeros(table.shape, bool), np.zeros((1, 0, 2, 2)))
    assert found.lowest() == (4.0, 0, 2)
    assert means(np.array([[[3.0, 1.0]]]), table)[0, 0].tolist() == [5.5, 3.5]


def test_rows_that_ask_what_was_just_taught_are_not_watched():
    canaries, fresh = _rows((6, 6, 6, 6)), _rows((6, 6), 1)
    same = Row(np.concatenate([canaries[0].ids[:3], fresh[0].ids[3:]]), fresh[0].keep, 1.0, "same question")
    for fold in attacks.folds(_target(canaries, [same, fresh[1]]), Lesson.CANARIES, 0):
        taught = any(row is canaries[0] for row in fold.taught)
        assert fold.fresh == ((1,) if taught else (0, 1))
    long = attacks.folds(_target(canaries, general=_rows((300,))), Lesson.GENERAL, 0, 100)[0].taught[0]
    assert long.tokens == 100 and long.keep.all()


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
        it.states.weights["retrained"] = it.states.weights["reference"]
        first = check.run(it, options)
        assert set(first.metrics) == set(check.CHECK.metrics)
        gap = first.metrics["relearn_gap"]
        assert gap.low > 0 and gap.forgetting and gap.finetuned > gap.value
        assert first.metrics["relearn_gap_retrained"].value == gap.value
        assert "it comes back" in first.verdict and "AdamW at rate 0.0005" in first.verdict
        assert json.dumps(first.to_json()) == json.dumps(check.run(it, options).to_json())
        # A model that is its own control shows no gap at all.
        it.states.weights["general"] = it.states.weights["reference"]
        null = check.run(it, options).metrics["relearn_gap"]
        assert (null.value, null.low, null.high) == (0.0, 0.0, 0.0)
        text = json.dumps(first.to_json())
        assert not any(TextEncoder(OWNGPT / "finetuned").decode(row.ids)[:20] in text for row in rows)


def test_models_trained_side_by_side_are_those_trained_one_after_the_other(monkeypatch, tmp_path):
    folder, options = llama(tmp_path / "model"), RelearnOptions(4, 1e-3)
    with subject({"reference": folder, "finetuned": folder}, canaries=_rows((5, 9, 5, 7))) as it:
        alone = check.run(it, options)
        monkeypatch.setattr(check, "_lanes", lambda subject, models, each: models)
        assert json.dumps(alone.to_json()) == json.dumps(check.run(it, options).to_json())


@pytest.mark.parametrize("ends", ["signal", "failure"])
def test_both_trainings_are_over_when_one_has_ended_the_check(monkeypatch, tmp_path, ends):
    """Neither goes on behind the back of whoever closes the files; what is said is what happened, not that it was cancelled."""
    folder, options, together = llama(tmp_path / "model"), RelearnOptions(400, 1e-3), threading.Barrier(2)
    taught, before = relearning._taught, signal.signal(signal.SIGINT, _interrupt)
    running = []

    def watched(*words):
        running.append(1)
        try:
            if together.wait(60) == 0 and ends == "signal":
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            elif ends == "failure" and words[0].weights is it.states.weights["reference"]:
                raise OutOfResources("out of memory")
            yield from taught(*words)
        finally:
            running.pop()

    monkeypatch.setattr(check, "_lanes", lambda subject, models, each: models)
    monkeypatch.setattr(relearning, "_taught", watched)
    try:
        with subject({"reference": folder, "finetuned": folder}, canaries=_rows((5, 9, 5, 7))) as it:
            with pytest.raises(Stopped if ends == "signal" else OutOfResources):
                check.run(it, options)
            assert not running
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number, _frame):
    raise Stopped(number)


def test_models_are_trained_side_by_side_where_they_fit_and_no_lot_is_drawn(monkeypatch, tmp_path):
    folder = llama(tmp_path / "model")
    with subject({"reference": folder, "finetuned": folder}, canaries=_rows((5, 9))) as it:
        config = it.states.model("general").model.config
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert check._lanes(it, 3, 16) == 2
        config.attention_dropout = 0.1
        assert check._lanes(it, 3, 16) == 1
        config.attention_dropout = 0.0
        monkeypatch.setattr("liborth_cli.machine.spare_bytes", lambda: 1)
        assert check._lanes(it, 3, 16) == 1


def test_one_more_attack_never_makes_the_gap_to_fresh_rows_smaller():
    """The second attack brings down the fresh rows, and the third breaks the model: neither hides what the first shows."""
    with subject(canaries=finance_rows(8), fresh=finance_rows(8, first=14_000)) as it:
        spread = np.linspace(-0.2, 0.2, 8)[None, :, None, None]

        def attacked(count):
            canaries = np.array([[4.0, 2.0], [4.0, 2.1], [4.0, 9.0]])[:count] + spread
            fresh = np.array([[4.5, 4.4], [4.5, 2.2], [4.5, 30.0]])[:count] + spread
            tried = tuple(Attack(rate) for rate in (1.0, 2.0, 3.0)[:count])
            return Relearnt(tried, (0, 2), canaries, np.zeros(canaries.shape, bool), fresh)

        found = [check._beyond_fresh(it, {"general": attacked(count)}) for count in (1, 2, 3)]
        assert [one.value for one in found] == pytest.approx([2.4, 2.4, 2.4])
        assert found[0].low == pytest.approx(found[1].low, abs=0.2) and found[2].high < 3.0
        both = {"general": attacked(3), "reference": attacked(3)}
        assert check._beyond_fresh(it, both).value == 0.0


def test_several_deals_of_the_halves_count_in_the_interval():
    with subject(canaries=finance_rows(8)) as it:
        it.states.weights["general"] = Point(it.finetuned, it.reference, 0.75)
        once, often = (check.run(it, RelearnOptions(2, 5e-4, seeds)).metrics["relearn_gap"] for seeds in (1, 2))
    assert once.value != often.value and often.low < often.value < often.high


def test_attacks_asks_for_the_whole_grid_and_says_what_was_tried():
    thorough, small = VerifyOptions(Inputs(), attacks=True), SimpleNamespace(hidden=64, elements=1000, device=CPU)
    assert thorough.asked == ("attributes", "relearn", "rounding", "prompts")
    assert thorough.of(check.CHECK).attacks(small) == attacks.FULL
    assert VerifyOptions(Inputs()).of(check.CHECK).attacks(small) == attacks.QUICK
    told = attacks.words(attacks.FULL, 64)
    assert "half of the canaries by AdamW at rates 0.0002, 0.0006, 0.002, 0.006" in told
    assert "half of the canaries by LoRA of rank 16 at rates 0.002, 0.006, 0.02;" in told
    assert "by SGD at rates" in told and "general text by AdamW" in told and "half of the fresh rows by AdamW" in told


def test_where_all_weights_do_not_fit_low_rank_updates_are_trained_and_it_says_so(monkeypatch):
    with subject(canaries=finance_rows(8), fresh=finance_rows(8, first=14_000)) as it:
        it.states.weights["general"] = Point(it.finetuned, it.reference, 0.75)
        model, options = it.states.model("general"), RelearnOptions(4)
        room = 8 * model.elements

        def too_large(needed, device=None):
            return "a lot" if needed > room else ""

        for module in ("liborth_cli.verify.attacks", "liborth_cli.machine"):
            monkeypatch.setattr(f"{module}.too_large", too_large)
        assert options.attacks(model) == attacks.low_rank(attacks.QUICK) and not check._lacks(it, options)
        assert "training all weights: a lot" in check._lacks(it, replace(options, relearn_rank=0))
        result = check.run(it, options)
        assert "half of the canaries by LoRA of rank 16 at rates" in result.verdict
        assert "; all weights were not trained." in result.verdict
        assert check.run(it, options).verdict == result.verdict, "the seed draws the updates"
        ranked = check.run(it, replace(options, relearn_rank=2, relearn_rate=1e-2)).verdict
        assert "Taught were half of the canaries by LoRA of rank 2 at rate 0.01; all" in ranked
        room = 2 * model.elements
        assert "the weights in float32: a lot" in check._lacks(it, options)


def test_a_copy_of_a_canary_is_never_held_back_while_it_is_taught():
    rows = finance_rows(5)
    target = AttackRows([*rows, *rows], repeats([*rows, *rows]))
    for fold in attacks.folds(target, Lesson.CANARIES, 0):
        taught = {i for i, row in enumerate(target.canaries) if any(row is other for other in fold.taught)}
        assert not {i % 5 for i in taught} & {i % 5 for i in fold.canaries}
        assert len(fold.taught) + len(fold.canaries) == 10


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
        assert prompts.run(it, options).facts.prompts[-1]["prompt"] == "paraphrases given"
        file.write_text(json.dumps({"prompt": "What?", "completion": "nothing"}) + "\n")
        with pytest.raises(UsageError, match="not that of any canary"):
            prompts.run(it, options)


def test_too_few_canaries_no_control_and_a_model_too_large_are_said(monkeypatch):
    one, options = check.CHECK, RelearnOptions()
    with subject(canaries=finance_rows(3)) as it:
        assert "at least 4 different canaries" in one.missing(it, options)
    with subject(canaries=finance_rows(1) * 8) as it:
        assert "and there are 1" in one.missing(it, options)
    with subject() as it:
        assert one.missing(it, options).startswith("--canary")
    with subject(canaries=finance_rows(4)) as it:
        assert not one.missing(it, options) and not one.costs(it, options)
        monkeypatch.setattr(check, "PATIENCE", 1e-9)
        assert "minutes" in one.costs(it, options)
        asked = VerifyOptions(Inputs("."))
        chosen = [_choose(it, replace(asked, patient=patient), [])[0] for patient in (False, True)]
        assert "relearn" not in chosen[0] and {*chosen[1]} - {*chosen[0]} == {"relearn"}
        monkeypatch.setattr(loads, "CHEAP", 0)  # what takes memory is not what takes time
        assert "loads" in chosen[1] and "loads" not in _choose(it, replace(asked, patient=True), [])[0]
        monkeypatch.setattr("liborth_cli.machine.spare_bytes", lambda: 0)
        assert "0.0 GB may be used here" in one.missing(it, options)


def test_wide_models_are_not_said_to_be_as_slow_as_narrow_ones():
    narrow, wide = (check._operations("cpu", hidden, 1) for hidden in (64, 576))
    assert (narrow, wide) == (check.RATES["cpu"], 9 * narrow)
    assert check._operations("cpu", 32, 2) == 2 * narrow
    assert check._operations("cpu", 8192, 1) == 10 * narrow
    assert check._operations("cuda", 64, 16) == check._operations("cuda", 8192, 1) == check.RATES["cuda"]
