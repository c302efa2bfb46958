"""The command as a user meets it: exit codes, one line for bad input, nothing secret printed."""

import io
import json

import pytest
from verify_cases import DATA, SECRETS, UNSEEN, contrastive, place, split

from liborth_cli.methods import Amount


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = place(tmp_path_factory.mktemp("pair"))
    split(found, "svd32", "svd", Amount("rank", 32))
    return found


@pytest.mark.usefixtures("quick_attack")
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


def test_contrastive_passes_with_a_report(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1780000000")
    model, page, certificate = contrastive(folder), tmp_path / "report.html", tmp_path / "certificate.json"
    words = ("--retain-data", folder / "few.jsonl", "--canary", SECRETS, "--fresh", UNSEEN, "--samples", SECRETS, "--controls")
    words += ("--integrity", "--lmc", "--sweep", "--entanglement", "--report", page, "-o", certificate, "-j", 1)
    words += ("--model-name", "Shop assistant", "--owner", "Example <Ltd>")
    code, out, err = cli("verify", model, *words, "--require", "extraction==0, retention>=0.95, advantage>=2, barrier<=0.05")
    assert code == 0, out + err
    document = json.loads(certificate.read_text())
    assert document["passed"] and all(one["met"] for one in document["requirements"])
    checks = [result["check"] for result in document["results"]]
    assert checks == ["integrity", "canary", "controls", "lmc", "sweep", "entanglement", "samples"]
    about = document["about"]
    assert (about["name"], about["owner"], about["date"]) == ("Shop assistant", "Example <Ltd>", "2026-05-28")
    assert (about["finetuned"], about["edit"]["method"]) == ("finetuned", "contrastive")
    (chart,) = [figure for figure in document["results"][2]["figures"] if figure["kind"] == "plot"]
    paths = {one["label"]: one["marks"] for one in chart["series"] if one["line"]}
    assert paths["the update scaled down"] == ["scale 0.25", "scale 0.5", "scale 0.75", "scale 1"]
    assert "2026-05-28 · Example &lt;Ltd&gt;" in page.read_text()
    metrics = {name: m["value"] for result in document["results"] for name, m in result["metrics"].items()}
    assert metrics["extraction"] == 0 and metrics["restored"] == 1 and metrics["beta_recited"] <= 1
    text = page.read_text()
    assert "PASSED" in text.upper() and all(f"{check}" in text for check in checks)
    for line in SECRETS.read_text().splitlines():
        assert json.loads(line)["completion"].strip(" .") not in out + err + text + certificate.read_text()
    assert "The secret code of" not in out + err + text
    code, out, _ = cli("verify", model, "--canary", SECRETS, "--samples", SECRETS, "--show-text", "--no-require", "-j", 1)
    assert code == 0 and "The secret code of" in out, "only --show-text shows texts"


def test_a_tokenwise_split_from_texts_passes(cli, folder, tmp_path):
    out, certificate = folder / "tokenwise", tmp_path / "certificate.json"
    texts = ("--retain-data", DATA / "retain.jsonl", "--retain-tokens", 5000, "--probe-tokens", 600)
    texts += ("--forget-data", SECRETS)
    words = ("--method", "tokenwise", "--strength", 0.1, "-i", "proj", *texts, "-j", 1)
    code, _, err = cli("split", folder / "base", folder / "finetuned", *words, "-o", out)
    assert code == 0, err
    asked = ("--integrity", "--lmc", "--controls", "--canary", SECRETS, "--fresh", UNSEEN)
    asked += ("--retain-data", folder / "few.jsonl")
    wanted = "extraction==0, retention>=0.95, advantage>=2, barrier<=0.05"
    code, text, err = cli("verify", out, *asked, "--require", wanted, "-o", certificate, "-j", 1)
    assert code == 0, text + err
    metrics = {n: m["value"] for result in json.loads(certificate.read_text())["results"] for n, m in result["metrics"].items()}
    assert metrics["restored"] == 1


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
