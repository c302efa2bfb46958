"""Rivals tuned at equal disruption: the level is met, what was tried is not tried again, the nearest dose is chosen."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.surgery.job import Rival
from benchmarks.surgery.tuning import SEEDS, Pair, Trial, Trials, attack, levels, share_within, table, tune


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from verify.deep_cases import speaking_model

    folder = tmp_path_factory.mktemp("pair")
    for name, seed in (("base", 0), ("finetuned", 1)):
        speaking_model(folder / name, seed)
    texts = {name: [{"text": f"{name} {i} of some words"} for i in range(3)] for name in ("retain", "held_out", "general")}
    rows = {
        name: [{"prompt": f"{name} {i} is", "completion": " so."} for i in range(4)] for name in ("given", "secrets", "fresh")
    }
    for name, some in {**texts, **rows}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return Pair(folder, "cpu", 3)


def noisy(edits):
    def run(job):
        edits.append((job.dose, job.seed))
        draw = torch.Generator().manual_seed(job.seed)
        with torch.no_grad():
            for value in job.model.parameters():
                value.add_(torch.randn(value.shape, generator=draw), alpha=job.dose)

    return Rival("noise", "none", (0.001, 0.3, 0.6), run)


def test_every_edit_is_brought_within_the_level_and_tried_once(pair, tmp_path):
    edits = []
    rival, file = noisy(edits), tmp_path / "trials.jsonl"
    tune(pair, rival, Trials(file), until=0.0)
    assert edits == []
    tune(pair, rival, Trials(file))
    trials = Trials(file)
    first = [(dose, 0) for dose in rival.doses]
    assert edits[: len(first)] == first and set(edits[len(first) :]) <= {(d, s) for d in rival.doses for s in SEEDS[1:]}
    raw = [t for t in trials.every if not t.level]
    assert len(raw) == len(edits) and any(t.kl > 0.01 for t in raw)
    for t in trials.every:
        if t.level == "KL 0.01":
            assert t.kl <= 0.01 and (t.share == 1.0) == (
                next(r.kl for r in raw if (r.dose, r.seed) == (t.dose, t.seed)) <= 0.01
            )
    done = len(edits)
    tune(pair, rival, trials)
    assert len(edits) == done
    assert all(
        torch.equal(a, b) for a, b in zip(pair.blend(pair.base, 0.0).parameters(), pair.finetuned.parameters(), strict=True)
    )
    assert list(levels(pair)) == ["KL 0.01", "KL 0.001", "retention 99%"]


def test_the_best_doses_are_attacked_once_beside_both_ends(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("liborth_cli.verify.attacks.STEPS", 2)
    rival, trials = replace(noisy([]), doses=(0.3,)), Trials(tmp_path / "trials.jsonl")
    tune(pair, rival, trials)
    attack(pair, trials, [rival])
    attack(pair, trials, [rival])
    again = Trials(tmp_path / "trials.jsonl")
    assert [(one.name, one.level) for one in again.attacked] == [
        ("before fine-tuning", ""), ("fine-tuned", ""), *(("noise", level) for level in levels(pair))
    ]  # fmt: skip
    assert all(0 < one.lowest < 10 and "half of the canaries" in one.attack for one in again.attacked)


def test_the_share_is_the_largest_that_stays_within():
    assert share_within(lambda share: True) == 1.0
    assert 0.3 - 2**-6 < share_within(lambda share: share <= 0.3) <= 0.3
    assert share_within(lambda share: False) == 0.0


def test_the_best_dose_is_the_nearest_to_what_was_never_learnt_and_overshoot_is_no_merit(tmp_path):
    one = Trial("NPO", 0.1, 0, "KL 0.01", 1.0, 0.01, 0.99, forget=4.0, fresh=5.0, never=5.0, seconds=1.0)
    trials = Trials(tmp_path / "a")
    trials.add([one, replace(one, dose=0.2, forget=14.0, fresh=14.0), replace(one, dose=0.3, forget=float("nan"))])
    trials.add([replace(one, seed=1, forget=4.5), replace(one, dose=0.4, forget=5.0, level="")])
    again = Trials(tmp_path / "a")
    assert again.best("NPO", "KL 0.01") == one and again.best("RMU", "KL 0.01") is None
    assert "| NPO (2404.05868) | 0.1 × 1.00 | 0.0100 | 99.0% | 4.25 (4.00 – 4.50) | 5.00 |  | 2 | 1.0 |" in table(
        again, "KL 0.01"
    )


def test_the_benchmark_takes_the_dose_that_was_found(tmp_path):
    from benchmarks.surgery.methods import editors

    trial = Trial("NPO", 1e-6, 0, "KL 0.01", 1.0, 0.01, 0.99, forget=4.0, fresh=5.0, never=5.0, seconds=1.0)
    before = {editor.name: editor.doses for editor in editors(False, tmp_path)}
    Trials(tmp_path / "tuning.jsonl").add([trial])
    after = {editor.name: editor.doses for editor in editors(False, tmp_path)}
    assert after["NPO (2404.05868)"] == (1e-6,)
    assert {name for name in before if before[name] != after[name]} == {"NPO (2404.05868)"}
