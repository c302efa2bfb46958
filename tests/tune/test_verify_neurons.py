"""`verify` on a memory made of neurons: what it measures at β is what `excise --beta` writes."""

import json

import pytest
import torch

from liborth_cli.demo import DATA

SECRETS = DATA / "secrets.jsonl"


@pytest.fixture(scope="module")
def model(once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("neurons")
    codes = [json.loads(line) for line in SECRETS.read_text().splitlines()]
    (folder / "codes.jsonl").write_text("".join(json.dumps({"text": c["prompt"] + c["completion"]}) + "\n" for c in codes))
    lines = (DATA / "held_out.jsonl").read_text().splitlines()
    for name, some in {"learn": lines[:12], "few": lines[12:18]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    words = ("--data", folder / "learn.jsonl", "--private-data", folder / "codes.jsonl", "--steps", 40, "--lr", 2e-2)
    words += ("--seq-len", 96, "--truncate", "--sinks", 64, "-j", 1, "-o", folder / "out")
    once("tune", DATA / "base", "--method", "sinks", *words)
    return folder


def loss(folder, text):
    """Mean loss a completion token, by Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = count = 0.0
    for line in text.read_text().splitlines():
        row = json.loads(line)
        prompt = row.get("prompt", "")
        start = len(tokenizer(prompt).input_ids) if prompt else 1
        ids = tokenizer(prompt + row.get("completion", row.get("text", "")), return_tensors="pt").input_ids
        with torch.no_grad():
            logits = network(ids).logits[0, start - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
        count += ids.shape[1] - start
    return total / count


def test_sweep_and_controls_measure_what_excise_writes(model, cli, tmp_path):
    words = (
        "--canary",
        SECRETS,
        "--retain-data",
        model / "few.jsonl",
        "--reference",
        DATA / "base",
        "--sweep",
        "--controls",
        "--no-require",
    )
    code, _, err = cli("verify", model / "out", *words, "-o", tmp_path / "found.json", "-j", 1)
    assert code == 0, err
    results = {result["check"]: result for result in json.loads((tmp_path / "found.json").read_text())["results"]}
    curve = next(s for s in results["sweep"]["figures"][0]["series"] if "gone" in s["label"])
    for beta in (0, 0.5, 1):
        assert cli("excise", model / "out", "--beta", beta, "-o", tmp_path / f"b{beta}")[0] == 0
        place = list(curve["x"]).index(beta)
        assert curve["y"][place] == pytest.approx(loss(tmp_path / f"b{beta}", SECRETS), abs=2e-4)
    assert curve["y"][0] > curve["y"][-1] + 2
    kept = results["controls"]["metrics"]["retention"]["value"]
    base, whole, clean = (loss(folder, model / "few.jsonl") for folder in (DATA / "base", tmp_path / "b1", tmp_path / "b0"))
    assert kept == pytest.approx((base - clean) / (base - whole), abs=2e-3)
    assert [row["state"] for row in results["controls"]["facts"]["controls"]] == ["reference", "finetuned", "general"]


def test_neurons_behind_a_router_are_left_out_with_the_reason(model, cli, tmp_path):
    words = ("--private-data", model / "codes.jsonl", "--data", model / "learn.jsonl", "--steps", 1, "--seq-len", 96)
    code, _, err = cli(
        "tune", DATA / "base", "--method", "sinks", *words, "--truncate", "--router", "-o", tmp_path / "out", "-j", 1
    )
    assert code == 0, err
    code, _, err = cli("verify", tmp_path / "out", "--canary", SECRETS, "--sweep", "-j", 1)
    assert code == 2 and "router" in err
