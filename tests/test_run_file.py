"""`--config`: flags in a file, behind what is typed and what the environment says."""

import json

import pytest
import yaml
from tiny import pair


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    return tmp_path


def write(folder, **values):
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def test_a_file_stands_for_flags_and_arguments(here, cli):
    file = write(
        here, reference="base", finetuned="finetuned", method="svd", rank=4, out="general", **{"exclude-regex": ["conv"]}
    )
    code, out, err = cli("split", "--config", file)
    assert (code, out) == (0, "general\n"), err
    asked = json.loads((here / "general" / "liborth.manifest.json").read_text())["parameters"]
    assert asked["amount"] == "rank 4" and asked["policy"]["exclude"] == ["conv"]


def test_what_is_typed_comes_before_the_environment_and_that_before_the_file(here, cli, monkeypatch):
    file = write(here, method="svd", rank=4, device="abacus")
    code, _, err = cli("split", "base", "finetuned", "--config", file)
    assert code == 2 and "--device abacus" in err
    monkeypatch.setenv("LIBORTH_DEVICE", "cuda:9")
    assert "--device cuda:9" in cli("split", "base", "finetuned", "--config", file)[2]
    assert cli("split", "base", "finetuned", "--config", file, "--device", "cpu", "--rank", 5, "-o", "general")[0] == 0
    assert json.loads((here / "general" / "liborth.manifest.json").read_text())["parameters"]["amount"] == "rank 5"


@pytest.mark.parametrize("command", ["split", "verify"])
def test_what_is_printed_can_be_read_again(here, cli, command):
    words = {"split": ("base", "finetuned", "--method", "svd", "--rank", 4, "-i", "up", "-o", "x", "--force"),
             "verify": ("x", "--integrity", "--relearn-steps", 7)}[command]  # fmt: skip
    code, out, err = cli(command, *words, "--print-config")
    assert (code, err) == (0, "") and not (here / "x").exists()
    (here / "again.yaml").write_text(out)
    assert cli(command, "--config", "again.yaml", "--print-config")[1] == out
    assert yaml.safe_load(out) == {
        "split": {"reference": "base", "finetuned": "finetuned", "method": "svd", "rank": 4, "include-regex": ["up"],
                  "out": "x", "force": True},
        "verify": {"model": "x", "integrity": True, "relearn-steps": 7},
    }[command]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("metod: svd", "did you mean method?"),
        ("- svd", "not a mapping"),
        ("zzz: 1", "has no flag 'zzz'; `liborth split -h` lists them"),
        ("method: [", "line 1"),
        ("config: other.yaml", "no flag 'config'"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(here, cli, text, says):
    (here / "run.yaml").write_text(text)
    code, out, err = cli("split", "base", "finetuned", "--config", "run.yaml")
    assert (code, out, err.count("\n")) == (3, "", 1) and says in err and len(err) <= 300
    assert "There are" not in err
    assert cli("split", "base", "finetuned", "--config", "nowhere.yaml")[0] == 3


def test_a_word_that_is_wrong_in_a_file_is_found(here, cli):
    code, _, err = cli("split", "base", "finetuned", "--config", write(here, method="tokenwse"))
    assert code == 2 and "did you mean tokenwise" in err


@pytest.mark.parametrize(
    ("text", "said"), [("rank: yes\n", "rank"), ("method: svd\nmethod: scale\n", "twice"), ("rnk: 4\n", "rank")]
)
def test_what_yaml_would_make_of_a_slip_is_refused(here, cli, text, said):
    (here / "run.yaml").write_text(f"reference: base\nfinetuned: finetuned\nout: general\n{text}")
    code, _, err = cli("split", "--config", "run.yaml")
    assert code == 3 and said in err and err.count("\n") == 1 and len(err) < 300, err
    assert not (here / "general").exists()
