"""The command as a user meets it: exit codes, one line for bad input, nothing secret printed."""

import io
import json

import pytest
from verify_cases import DATA, SECRETS, UNSEEN, place, split

from liborth_cli.methods import Amount


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = place(tmp_path_factory.mktemp("pair"))
    split(found, "svd32", "svd", Amount("rank", 32))
    return found


def test_low_rank_fails_and_no_secret_is_printed(cli, folder, tmp_path):
    out_file = tmp_path / "out.json"
    words = ("--canary", SECRETS, "--fresh", UNSEEN, "--require", "extraction==0", "-o", out_file, "-j", 1)
    code, out, err = cli("verify", folder / "svd32", *words)
    assert (code, "extraction is 0.75" in err) == (5, True)
    document = json.loads(out_file.read_text())
    assert (document["passed"], document["requirements"][0]["met"]) == (False, False)
    for line in SECRETS.read_text().splitlines():
        secret = json.loads(line)["completion"].strip(" .")
        assert secret not in out + err + out_file.read_text()


def test_model_from_a_pipe(cli, folder, monkeypatch):
    for text in (json.dumps({"output": str(folder / "svd32")}), str(folder / "svd32")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert cli("verify", "-", "--integrity")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli("verify", "-", "--integrity")[0] == 3


def test_bad_input_is_one_line(cli, folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 3000, "completion": " b"}))
    svd = folder / "svd32"
    cases = [
        (2, "--lmc needs --retain-data", ("--lmc",)),
        (2, "nothing measures", ("--require", "nonsense==0")),
        (3, "no rows", ("--canary", tmp_path / "empty.jsonl")),
        (3, "context", ("--canary", tmp_path / "long.jsonl")),
        (4, "is not the file that this split was made from", ("--reference", DATA / "finetuned")),
    ]
    for expected, text, words in cases:
        code, _, err = cli("verify", svd, *words, "-q", "-j", 1)
        assert (code, text in err, err.count("\n")) == (expected, True, 1), (words, err)
