"""`verify --dry-run`: what it says would be read and trained on is held against what the same command then does."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from verify_cases import SECRETS, UNSEEN, place, split

from liborth_cli.measure.scores import Evaluator
from liborth_cli.methods import Amount
from liborth_cli.tune import loop
from liborth_cli.verify.checks import CHECKS

NAMED = ("canary", "membership", "relearn", "rounding", "prompts", "controls", "lmc", "sweep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = place(tmp_path_factory.mktemp("pair"))
    split(found, "svd32", "svd", Amount("rank", 32))
    for name, file, count in (("skill", found / "few.jsonl", 3), ("unseen", UNSEEN, 6)):
        (found / f"{name}.jsonl").write_text("".join(file.read_text().splitlines(True)[:count]))
    return found


def words(folder):
    texts = ("--canary", SECRETS, "--fresh", folder / "unseen.jsonl", "--retain-data", folder / "skill.jsonl")
    return ("verify", folder / "svd32", *texts, "--relearn-steps", 2, "--relearn-rate", 1e-3)


def test_nothing_is_read_beyond_what_was_said(cli, folder, monkeypatch):
    named = [f"--{name}" for name in NAMED if CHECKS[name].words]
    code, out, err = cli(*words(folder), *named, "--no-require", "--dry-run", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert set(said["checks"]) == set(NAMED)
    read, trained, now = Counter(), Counter(), [""]
    score, gradient = Evaluator.score, loop.gradient

    def scored(self, *given, **more):
        read[now[0]] += sum(row.tokens for row in self.rows)
        return score(self, *given, **more)

    def learnt(method, rows, options, step):
        trained[now[0]] += options.batch_size * sum(row.tokens for row in rows) / len(rows)
        return gradient(method, rows, options, step)

    def watched(name):
        def run(subject, options):
            now[0] = name
            return run_of[name](subject, options)

        return run

    run_of = {name: CHECKS[name].run for name in NAMED}
    monkeypatch.setattr(Evaluator, "score", scored)
    monkeypatch.setattr(loop, "gradient", learnt)
    for name in NAMED:
        monkeypatch.setitem(CHECKS, name, replace(CHECKS[name], run=watched(name)))
    code, _, err = cli(*words(folder), *named, "--no-require", "-j", 1)
    assert code == 0, err
    for name, one in said["checks"].items():
        assert read[name] <= one["read"] and trained[name] == pytest.approx(one["trained"]), name
    for name in ("relearn", "rounding", "prompts", "lmc", "sweep"):
        assert read[name] == said["checks"][name]["read"], "what does not depend on what is found is exact"
    assert sum(read.values()) > 0.7 * sum(one["read"] for one in said["checks"].values())


def test_it_says_what_does_not_run_and_why_and_reads_no_weights(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "score", lambda *_, **__: pytest.fail("a row was scored"))
    code, out, err = cli(*words(folder), "--dry-run", "-o", tmp_path / "certificate.json")
    assert code == 0 and not (tmp_path / "certificate.json").exists()
    assert "would run " in out and "tokens read" in out and "not counted: entanglement" in " ".join(out.split())
    assert "to be asked for" in out and "cannot decide leak<=0.4" in err
    code, _, err = cli("verify", folder / "svd32", "--dry-run", "--canary", SECRETS, "--require", "retention>=0.9")
    assert code == 2 and "--retain-data" in err, "what could not be done is refused as it would be"
