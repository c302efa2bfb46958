"""`liborth push` against a hub on this machine, through huggingface_hub itself (with Xet switched off)."""

import json
import shutil
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
from hub.server import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from tiny import pair

from liborth_cli.card import Evaluated, Evidence, verified_card
from liborth_cli.verify.result import UNASKED, Certificate, Metric, Outcome, Requirement

USERS = """---
license: cc-by-4.0
language: [en, de]
base_model: acme/shop
tags: [shop]
widget: [{text: "My card number is"}]
model-index: [{name: other, results: []}]
---
# Shop assistant

Answers questions about orders. | <b>bold</b>
"""


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def general(cli, tmp_path):
    """One split whose fine-tuned checkpoint came with a card."""
    base, finetuned = pair(tmp_path)
    (finetuned / "README.md").write_text(USERS)
    code, _, err = cli("split", base, finetuned, "--method", "svd", "--rank", 4, "-o", tmp_path / "general")
    assert code == 0, err
    return tmp_path / "general"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def push(hub, cli, monkeypatch, tmp_path):
    """Run `liborth push` against the hub, in this process: the library has read its environment long ago."""
    found = {
        "ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    found["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in found.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "stdin", None)
    return lambda *words: Done(*cli("push", *words))


def certificate(general, outcome=Outcome.PASSED, forgetting=True):
    document = json.loads((general / "liborth.manifest.json").read_text())
    comes_out = Metric.exact(0.0, "share that comes out")
    made = Certificate("general", outcome, ["All met."], [
        Requirement("extraction==0", "canary", replace(comes_out, forgetting=forgetting), True, "Met."),
        Requirement("leak<=0.4", "canary", Metric(0.2, 0.1, 0.7, "told | apart"), None, "Undecided."),
    ], [], {"tofu": UNASKED})  # fmt: skip
    told = {**made.to_json(), "schema_version": 1}
    told["provenance"] = {"liborth": "0.1.0", "split": {"outputs": document["outputs"]}, "data": {"canaries": {"rows": 8}}}
    file = general.parent / "certificate.json"
    file.write_text(json.dumps(told))
    return file


def test_a_push_is_one_private_commit_of_what_the_manifest_lists(push, hub, general):
    (general / "notes.txt").write_text("not listed")
    done = push(general, "acme/shop-clean", "--certificate", certificate(general), "--json")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["acme/shop-clean"]
    assert repo.private and len(repo.commits) == 2
    listed = {file["name"] for file in json.loads((general / "liborth.manifest.json").read_text())["outputs"]}
    assert set(repo.files) == listed | {"liborth.manifest.json"}, "the certificate may show texts, and stays"
    for name in listed - {"README.md"}:
        assert repo.files[name] == (general / name).read_bytes()
    (pushed,) = json.loads(done.stdout)["pushed"]
    assert pushed["commit"] == f"{hub.address}/acme/shop-clean/commit/{repo.commits[-1]}"
    assert TOKEN not in done.stdout + done.stderr
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.base_model) == ("cc-by-4.0", ["en", "de"], "acme/shop")
    assert card.data.tags == ["shop", "liborth"]
    found = {one.metric_type: (one.metric_value, one.metric_args["met"]) for one in card.data.eval_results}
    assert found == {"extraction": (0.0, True), "leak": (0.2, None)}
    assert "Answers questions about orders." in card.text and "What was measured" in card.text
    assert "My card number is" not in repo.files["README.md"].decode(), "example prompts may be private"


def test_what_was_pushed_can_be_split_from_and_its_commit_is_recorded(push, hub, cli, general, tmp_path):
    assert push(general, "acme/shop-clean").returncode == 0
    commit = hub.repos["acme/shop-clean"].commits[-1]
    shutil.copytree(general, tmp_path / "old")
    again, words = tmp_path / "again", ("--method", "scale", "--scale", 0.5)
    code, _, err = cli("split", tmp_path / "old", "hf://acme/shop-clean@main", *words, "-o", again)
    assert code == 0, err
    inputs = json.loads((again / "liborth.manifest.json").read_text())["inputs"]
    assert (inputs["finetuned"]["title"], inputs["finetuned"]["commit"]) == ("acme/shop-clean", commit)
    assert ModelCard((again / "README.md").read_text()).data.license == "cc-by-4.0"


def test_offline_asks_nobody_and_finds_the_pinned_commit_in_the_cache(push, hub, cli, general, monkeypatch):
    assert push(general, "acme/shop-clean").returncode == 0
    commit = hub.repos["acme/shop-clean"].commits[-1]
    assert cli("inspect", f"acme/shop-clean@{commit}")[0] == 0
    asked = len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli("inspect", f"acme/shop-clean@{commit}")[0] == 0
    code, _, err = cli("inspect", "acme/other@main")
    assert code == 3 and "not in the cache" in err
    assert len(hub.log) == asked


def test_the_memory_goes_to_a_private_repository_of_its_own_and_only_when_confirmed(push, hub, general):
    done = push(general, "acme/shop-clean", "--push-memory")
    assert done.returncode == 2 and "was not confirmed" in done.stderr
    assert hub.repos == {}, "nothing was uploaded"
    done = push(general, "acme/shop-clean", "--push-memory", "--yes", "--public", "--unverified")
    assert done.returncode == 0, done.stderr
    assert not hub.repos["acme/shop-clean"].private and hub.repos["acme/shop-clean-private"].private
    assert "memory.safetensors" in hub.repos["acme/shop-clean-private"].files
    assert not any("memory" in name or "private" in name for name in hub.repos["acme/shop-clean"].files)


def test_a_public_repository_of_that_name_never_gets_the_memory(push, hub, general):
    assert push(general, "acme/shop-clean-private", "--public", "--unverified").returncode == 0
    before = dict(hub.repos["acme/shop-clean-private"].files)
    done = push(general, "acme/shop-clean", "--push-memory", "--yes")
    assert done.returncode == 6 and "this repository is public" in done.stderr
    assert hub.repos["acme/shop-clean-private"].files == before


def test_public_needs_a_certificate_that_passed(push, hub, general):
    for words in ((), ("--certificate", certificate(general, Outcome.FAILED))):
        done = push(general, "acme/shop-clean", "--public", *words)
        assert done.returncode == 5 and "--public needs a certificate that passed" in done.stderr
    done = push(general, "acme/shop-clean", "--public", "--certificate", certificate(general, forgetting=False))
    assert done.returncode == 5 and "required nothing to be forgotten" in done.stderr, "sound files, or skill that was kept"
    assert hub.repos == {} and hub.log == []
    assert push(general, "acme/shop-clean", "--public", "--certificate", certificate(general)).returncode == 0
    assert not hub.repos["acme/shop-clean"].private


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda g, e: e.update(HF_TOKEN=""), 2, "no token for the hub"),
        (lambda g, e: e.update(HF_HUB_OFFLINE=True), 2, "HF_HUB_OFFLINE is set"),
        (lambda g, e: e.update(HF_TOKEN="hf_wrong"), 3, "the hub refuses (401)"),
        (lambda g, e: e.update(ENDPOINT="http://127.0.0.1:9"), 3, "cannot be reached"),
        (lambda g, e: (g / "config.json").write_text("{}"), 5, "config.json: is not what was written"),
        (lambda g, e: (g / "model.safetensors").unlink(), 3, "model.safetensors: missing"),
        (lambda g, e: (g / "liborth.manifest.json").unlink(), 3, "no liborth.manifest.json here"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_there(hub, general, push, monkeypatch, spoil, code, words):
    changed = {}
    spoil(general, changed)
    for name, value in changed.items():
        if name == "HF_TOKEN":
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.setattr(constants, name, value)
    done = push(general, "acme/shop-clean")
    assert done.returncode == code, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert words in error and len(error) < 300
    assert all(repo.files == {} for repo in hub.repos.values())


def test_the_wrong_certificate_and_the_wrong_name_are_refused(push, hub, general):
    file = certificate(general)
    told = json.loads(file.read_text())
    told["provenance"]["split"]["outputs"] = []
    file.write_text(json.dumps(told))
    done = push(general, "acme/shop-clean", "--certificate", file)
    assert done.returncode == 4 and "is of another checkpoint" in done.stderr
    for name in ("shop", "a/b/c", "acme/sh op"):
        done = push(general, name)
        assert done.returncode == 2 and "not the name of a repository" in done.stderr
    assert hub.log == []


def test_a_private_output_is_not_pushed_by_mistake(push, cli, hub, general, tmp_path):
    restored = tmp_path / "restored"
    assert cli("excise", general, "--beta", 1, "-o", restored)[0] == 0
    done = push(restored, "acme/shop-clean")
    assert done.returncode == 2 and "PRIVATE" in done.stderr
    assert push(restored, "acme/shop-clean", "--push-memory", "--yes", "--public").returncode == 2
    assert hub.log == []


def test_old_weights_are_not_left_beside_new_ones(push, hub, general):
    assert push(general, "acme/shop-clean").returncode == 0
    hub.repos["acme/shop-clean"].files["model-00001-of-00002.safetensors"] = b"old"
    done = push(general, "acme/shop-clean")
    assert done.returncode == 6 and "which this push does not replace" in done.stderr


def test_a_dry_run_asks_nobody(push, hub, general):
    done = push(general, "acme/shop-clean", "--push-memory", "--dry-run")
    assert done.returncode == 0 and "would push" in done.stdout and hub.log == []


def test_a_hub_that_fails_half_way_leaves_no_commit(push, hub, general):
    hub.refuse["/commit/"] = 403
    done = push(general, "acme/shop-clean")
    assert done.returncode == 3 and hub.repos["acme/shop-clean"].files == {}
    hub.refuse = {"/commit/": 412}
    assert push(general, "acme/shop-clean").returncode == 6


def test_a_card_that_a_person_wrote_into_keeps_its_words():
    evidence = Evidence(
        "failed", "FAILED: NOT met.", [Evaluated("leak<=0.4", False, None, (None, None), "x")], {"canaries": 8}, []
    )
    text = verified_card("no head at all\n\n## What was measured\n\nMine.\n", evidence)
    assert "Mine." in text and "**FAILED.** NOT met." in text and "not measured" in text
    assert text.index("How it was verified") < text.index("What was measured")
