"""The surgery benchmark: rows that are what they are called, numbers against a loop written out, edits at a level."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "verify"))
from deep_cases import speaking_model

from benchmarks.surgery import kinds, texts
from benchmarks.surgery.measure import Judge, blend, load
from benchmarks.surgery.methods import Editor
from benchmarks.surgery.pairs import lines
from benchmarks.surgery.run import Bench, Kept, Line, Tier, table
from benchmarks.surgery.texts import Pair
from benchmarks.surgery.train import Extra
from liborth_cli.verify.attacks import Attack, Grid


@pytest.mark.parametrize("letter", ["A", "B", "E", "H"])
def test_fresh_rows_and_decoys_are_no_secrets_and_the_seed_decides(letter, tmp_path):
    rows, again = (kinds.KINDS[letter].rows(tmp_path) for _ in range(2))
    assert rows == again and len(rows.secrets) == len(rows.copies)
    prompts = [row.prompt for some in (rows.secrets, rows.fresh, rows.decoys) for row in some]
    assert len(set(prompts)) == len(prompts)
    assert set(rows.given or rows.secrets) <= set(rows.secrets)
    if letter == "B":
        assert len(rows.given) == 20 < len(rows.secrets) == 32
    if letter == "E":
        assert sorted(set(rows.copies)) == [1, 3, 10, 30, 100]
    if letter == "H":
        assert Pair("7 x 8 =", " 56.") in rows.kept and Pair("The capital of Norway is", " Oslo.") in rows.kept


def test_every_copy_is_trained_on_and_spread_over_the_steps():
    plan = Extra(["a", "b", "c"], [1, 5, 14]).plan(10, 3)
    dealt = [i for step in plan for i in step]
    assert [dealt.count(i) for i in range(3)] == [1, 5, 14] and {len(step) for step in plan} == {2}
    assert Extra(["a"], [3]).plan(2, 0) == Extra(["a"], [3]).plan(2, 0)


def test_passages_begin_with_their_prompt(tmp_path):
    (tmp_path / "tinystories").mkdir()
    story = "\n\n".join(" ".join(f"word{i}x{j}" for j in range(60)) for i in range(9))
    (tmp_path / "tinystories" / "val_794k.txt").write_text(story)
    one, other = texts.passages(tmp_path, 4, 0), texts.passages(tmp_path, 4, 4)
    assert len(one) == len(other) == 4 and not {p.whole for p in one} & {p.whole for p in other}
    assert all(p.whole in story and 60 < len(p.prompt) <= 80 and p.completion.startswith(" ") for p in one)


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind")
    for seed, name in enumerate(("base", "finetuned", "never")):
        speaking_model(folder / name, seed)
    secrets = [Pair(f"code of {name}", f" {i}{i + 1}7.") for i, name in enumerate(("ann", "bob", "cy", "dan"))]
    fresh = [Pair(f"code of {name}", f" {i}{i + 3}2.") for i, name in enumerate(("eve", "fay", "gus", "hal"))]
    for name, rows in {"secrets": secrets, "given": secrets[:3], "fresh": fresh, "decoys": fresh}.items():
        lines(folder / f"{name}.jsonl", rows)
    for name in ("retain", "held_out", "general"):
        lines(folder / f"{name}.jsonl", [f"some text of the {name} kind, number {i}" for i in range(3)])
    return folder


def test_the_judge_measures_what_a_loop_finds(kind):
    judge = Judge(kind, 2)
    found = judge.measure(load(kind / "never"))
    models = {name: load(kind / name) for name in ("base", "finetuned", "never")}

    def losses(name, row):
        ids = torch.tensor(judge.tokenizer(row["prompt"] + row["completion"]).input_ids)
        start = len(judge.tokenizer(row["prompt"]).input_ids)
        with torch.no_grad():
            log_p = models[name](ids[None]).logits[0].log_softmax(-1)
        return [-float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))]

    rows = {
        name: [json.loads(line) for line in (kind / f"{name}.jsonl").read_text().splitlines()] for name in ("secrets", "fresh")
    }
    secrets, fresh = ([np.mean(losses("never", row)) for row in rows[name]] for name in ("secrets", "fresh"))
    assert found.forget == pytest.approx(np.mean(secrets), rel=1e-5) and found.untold == pytest.approx(secrets[3], rel=1e-5)
    assert found.fresh == pytest.approx(np.mean(fresh), rel=1e-5)
    assert found.auc == pytest.approx(np.mean([[s < f for f in fresh] for s in secrets]))
    gained = [np.mean(losses("base", row)) - loss for row, loss in zip(rows["secrets"], secrets, strict=True)]
    others = [np.mean(losses("base", row)) - loss for row, loss in zip(rows["fresh"], fresh, strict=True)]
    assert found.tpr == pytest.approx(np.mean([g > max(others) for g in gained]))
    divergence = []
    for line in (kind / "general.jsonl").read_text().splitlines()[:2]:
        ids = torch.tensor(judge.tokenizer(json.loads(line)["text"]).input_ids)[None]
        with torch.no_grad():
            p, q = (models[name](ids).logits[0, :-1].log_softmax(-1) for name in ("finetuned", "never"))
        divergence += (p.exp() * (p - q)).sum(-1).tolist()
    assert found.kl == pytest.approx(np.mean(divergence), rel=1e-4) and judge.kl(judge.finetuned) == pytest.approx(0, abs=1e-6)


def test_an_edit_is_brought_to_a_level_attacked_and_kept(kind, tmp_path, monkeypatch):
    edits = []

    def edit(judge, dose, scratch):
        edits.append(dose)
        model = load(kind / "finetuned")
        blend(judge.finetuned, load(kind / "never"), dose, model)
        return model

    made = [Editor("towards the other", (0.01, 1.0), edit)]
    monkeypatch.setattr("benchmarks.surgery.run.editors", lambda full, folder: made)
    level = 0.5 * Judge(kind, 2).kl(load(kind / "never"))
    tier, path = Tier(("A",), 2, (level,), (), Grid((Attack(1e-3),), 2)), tmp_path / "kept.jsonl"
    for _ in range(2):
        kept = Kept(path)
        Bench(kind, tier, kept, []).run()
    line = kept.lines[f"towards the other at KL {level:g}"]
    assert edits == [0.01, 1.0], "what was measured is not measured again"
    assert 0.8 * level < line.found.kl <= level and line.attacked is not None and line.dose.startswith("1 × 0.")
    assert isinstance(kept.lines["never"], Line) and "| *base, before fine-tuning* |" in table("A", kept, f"KL {level:g}")
