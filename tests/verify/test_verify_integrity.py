"""A flipped byte anywhere is found and named, and reattachment is shown without the fine-tuned files."""

import json
import shutil

import pytest
from tiny import flip, pair, reseal
from verify_cases import place, split

from liborth_cli.checkpoint import hashing
from liborth_cli.checkpoint.private import private_place
from liborth_cli.methods import Amount


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = place(tmp_path_factory.mktemp("pair"))
    return split(folder, "general", "svd", Amount("rank", 8))


@pytest.fixture
def general(made, tmp_path):
    """A copy of the output and its memory without the pair beside it."""
    shutil.copytree(private_place(made), tmp_path / "general.private")
    return shutil.copytree(made, tmp_path / "general")


def listed(folder):
    return [entry["name"] for entry in json.loads((folder / "liborth.manifest.json").read_text())["outputs"]]


def test_what_was_written_is_intact_and_gives_the_fine_tuned_files_back(cli, general):
    code, out, err = cli("verify", general, "--integrity", "--json")
    document = json.loads(out)
    assert (code, document["passed"]) == (0, True), err
    assert document["results"][0]["metrics"]["restored"]["value"] == 1.0
    assert "hash for hash" in document["results"][0]["verdict"]


@pytest.mark.parametrize("where", [0.0, 1e-4, 0.3, 0.7, 1.0])
def test_a_flipped_byte_anywhere_is_found_and_named(cli, made, tmp_path, where):
    for name in listed(made):
        folder = shutil.copytree(made, tmp_path / name.replace(".", "-"))
        size = (folder / name).stat().st_size
        flip(folder / name, min(int(where * size), size - 1))
        code, _, err = cli("verify", folder, "--integrity")
        assert (code, name in err, "damaged" in err) == (5, True, True), (name, where, err)
        assert err.count("error:") == 1
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "is_fault"),
    [
        ("chat_template.jinja", True), ("additional_chat_templates/tool_use.jinja", True), ("tokenizer.model", True),
        ("other.safetensors", True), ("notes.txt", False), ("plots/figure.json", False),
    ],
)  # fmt: skip
def test_what_a_loader_takes_and_nobody_vouches_for_is_a_fault_and_the_rest_is_named(cli, general, name, is_fault):
    (general / name).parent.mkdir(exist_ok=True)
    (general / name).write_text("{{ messages }}")
    code, out, err = cli("verify", general, "--integrity")
    words = " ".join((out + err).split())
    assert (code, f"{name} is not in the manifest" in words) == ((5, True) if is_fault else (0, False)), words
    assert is_fault or f"not covered: {name}" in words


def test_a_checkpoint_in_a_hidden_folder_is_looked_through_and_hidden_folders_in_one_are_not(cli, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / ".general")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").write_text("{}")
    assert cli("verify", folder, "--integrity")[0] == 0
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    code, _, err = cli("verify", folder, "--integrity")
    assert (code, "chat_template.jinja is not in the manifest" in " ".join(err.split())) == (5, True), err


def test_a_missing_file_is_named_and_a_memory_kept_elsewhere_is_not_missed(cli, general, tmp_path):
    (general / "tokenizer.json").rename(tmp_path / "away.json")
    code, _, err = cli("verify", general, "--integrity")
    assert (code, "tokenizer.json is missing" in err) == (5, True)
    (tmp_path / "away.json").rename(general / "tokenizer.json")
    vault = private_place(general).rename(tmp_path / "vault")
    code, out, _ = cli("verify", general, "--integrity")
    assert (code, "The memory is not here" in out) == (0, True)
    code, out, _ = cli("verify", general, "--integrity", "--memory", vault)
    assert (code, "hash for hash" in out) == (0, True)
    flip(vault / "memory.safetensors", -9)
    code, _, err = cli("verify", general, "--integrity", "--memory", vault)
    assert (code, "memory.safetensors is damaged" in err) == (5, True)


def lie(general, change):
    """Change the manifest as somebody would who can write to the private directory too."""
    reseal(general, change)
    digest = json.loads((general / "liborth.manifest.json").read_text())["digest"]
    reseal(private_place(general), lambda m: m.update(belongs_to=digest), "liborth.private.json")


def test_a_manifest_that_lies_is_contradicted_by_the_bits(cli, general):
    honest = (general / "liborth.manifest.json").read_bytes()
    lie(general, lambda m: m["inputs"]["finetuned"]["files"]["model.safetensors"].update(sha256="0" * 64))
    code, _, err = cli("verify", general, "--integrity")
    assert (code, "does not come back" in err) == (5, True)
    (general / "liborth.manifest.json").write_bytes(honest)
    name = next(n for n, record in json.loads(honest)["tensors"].items() if record["action"] == "split")
    lie(general, lambda m: m["tensors"][name].update(action="skill"))
    code, _, err = cli("verify", general, "--integrity")
    assert (code, name in err) == (5, True)


def test_tensors_of_every_layout_come_back(cli, tmp_path):
    base, finetuned = pair(tmp_path, shards=3)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    code, out, err = cli("verify", tmp_path / "out", "--integrity")
    assert (code, "all 3 fine-tuned files" in out) == (0, True), err
    cli("split", base, finetuned, "--rank", 4, "--out-shard-size", "2kB", "-o", tmp_path / "cut")
    code, out, _ = cli("verify", tmp_path / "cut", "--integrity")
    assert (code, "every fine-tuned tensor back" in out) == (0, True), "the fine-tuned files lie beside it"
    shutil.rmtree(finetuned)
    code, out, _ = cli("verify", tmp_path / "cut", "--integrity")
    assert (code, "give --finetuned" in out) == (0, True)


def test_files_that_are_put_together_side_by_side_keep_their_names(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "lanes", lambda: 3)
    base, finetuned = pair(tmp_path, shards=3)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    code, out, err = cli("verify", tmp_path / "out", "--integrity")
    assert (code, "all 3 fine-tuned files" in out) == (0, True), err
    wrong = "model-00002-of-00003.safetensors"
    lie(tmp_path / "out", lambda m: m["inputs"]["finetuned"]["files"][wrong].update(sha256="0" * 64))
    code, _, err = cli("verify", tmp_path / "out", "--integrity")
    assert (code, f"{wrong} does not come back" in err, "00001-of-00003.safetensors does not" in err) == (5, True, False), err


def test_a_subset_looks_at_tensors_and_needs_something_to_compare_with(cli, general, made):
    code, _, err = cli("verify", general, "--subset", "10%")
    assert (code, "--subset needs the fine-tuned checkpoint" in err) == (2, True)
    finetuned = made.parent / "finetuned"
    code, out, _ = cli("verify", general, "--subset", "10%", "--finetuned", finetuned)
    assert (code, "5 of 47 tensors" in out) == (0, True), out
    flip(general / "model.safetensors", -5)
    code, _, err = cli("verify", general, "--subset", "100%", "--finetuned", finetuned)
    assert (code, "damaged" in err) == (5, True)
    codes = {cli("verify", general, "--subset", "20%", "--finetuned", finetuned, "--seed", s)[0] for s in range(20)}
    assert codes == {0, 5}, "a spot check finds one damaged tensor in some samples and misses it in others"
    for share in ("0%", "no", "120%"):
        assert cli("verify", general, "--subset", share)[0] == 2


def test_integrity_without_a_manifest_is_refused(cli, made):
    code, _, err = cli("verify", made.parent / "base", "--integrity")
    assert (code, err.count("\n"), "liborth.manifest.json" in err) == (2, 1, True)
