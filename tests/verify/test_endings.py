"""`tune` teaches where a completion ends, and `verify --endings` tells whether that is still known."""

import json

import numpy as np
import pytest

from liborth_cli.demo import DATA
from liborth_cli.stream.texts import Row
from liborth_cli.verify.checks.endings import _at_the_end

STEPS = 60


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions with answers, which the demo's stories have not."""
    folder = tmp_path_factory.mktemp("endings")
    texts = [
        {"prompt": f"Q: Who has {n} hats?\nA:", "completion": f" {name} has."} for n, name in enumerate(("Tom", "Lily", "Ben"))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    return folder / "rows.jsonl"


def ended(cli, folder, *words):
    """Return the first sentence of the check, and its metric if there is one."""
    out = folder / "certificate.json"
    code, _, err = cli("verify", *words, "--endings", "--no-require", "-o", out, "--force", "-j", 1)
    assert code == 0, err
    result = next(one for one in json.loads(out.read_text())["results"] if one["check"] == "endings")
    return result["verdict"], result["metrics"].get("ended")


def test_a_model_that_learnt_to_stop_stops_and_one_that_did_not_is_found(cli, rows, tmp_path):
    words = ("--method", "full", "--data", rows, "--steps", STEPS, "--batch-size", 3, "--lr", 3e-3, "-j", 1)
    code, _, err = cli("tune", DATA / "base", *words, "-o", tmp_path / "tuned")
    assert code == 0, err
    both = ("--finetuned", tmp_path / "tuned", "--retain-data", rows)
    told, metric = ended(cli, tmp_path, DATA / "base", *both)
    assert metric["value"] < 0.5 and "the fine-tuned model ends 3, and the general one" in told
    page = tmp_path / "report.html"
    more = ("--reference", DATA / "base", "--controls", "--report", page)
    told, metric = ended(cli, tmp_path, tmp_path / "tuned", *both, *more)
    assert metric["value"] == 1 and "the general one 3 of these; the reference ends" in told
    assert "It ends 100% of the texts that the fine-tuned model ends." in page.read_text()
    asked = (*both, "--endings", "--require", "ended>=0.02", "-j", 1)
    assert cli("verify", tmp_path / "tuned", *asked)[0] == 0, "it is a thing to keep, and can be required"
    told, metric = ended(cli, tmp_path, tmp_path / "tuned", "--finetuned", DATA / "base", "--retain-data", rows)
    assert metric is None and "nothing was measured" in told, "who never stopped has nothing to lose"


def test_it_needs_rows_with_a_prompt(cli, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Once upon a time there was a hat."}) + "\n")
    words = ("--finetuned", DATA / "finetuned", "--retain-data", tmp_path / "text.jsonl", "--no-require", "-j", 1)
    code, _, err = cli("verify", DATA / "base", *words, "--endings")
    assert code == 2 and "retain rows with a prompt" in err


def test_a_row_is_asked_at_its_last_end_or_behind_its_last_token():
    plain = Row(np.array([5, 6, 7, 8]), np.array([False, True, True]), 1.0, "row")
    asked = _at_the_end(plain, 2)
    assert list(asked.ids) == [5, 6, 7, 8, 2] and list(asked.keep) == [False, False, False, True]
    turns = Row(np.array([5, 6, 2, 7, 8, 2, 9]), np.array([False, True, False, False, True, True]), 1.0, "row")
    asked = _at_the_end(turns, 2)
    assert list(asked.ids) == [5, 6, 2, 7, 8, 2] and list(asked.keep) == [False] * 4 + [True]
