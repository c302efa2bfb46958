"""`--tracing` against a pair whose only change lies in one known part."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from liborth_cli.demo import DATA


@pytest.fixture
def planted(tmp_path, cli):
    """The model before fine-tuning, and the same with the fine-tuned MLP of block 2: all memory lies there."""
    for side in ("base", "finetuned"):
        shutil.copytree(DATA / "base", tmp_path / side)
    weights, tuned = (load_file(DATA / side / "model.safetensors") for side in ("base", "finetuned"))
    changed = {name: tuned[name] if ".2.mlp." in name else value for name, value in weights.items()}
    save_file(changed, tmp_path / "finetuned" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "general"
    words = ("split", tmp_path / "base", tmp_path / "finetuned", "--method", "scale", "--scale", 0.001, "-o", out, "-q")
    assert cli(*words)[0] == 0
    return out


def test_the_part_that_holds_it_is_found_and_no_other(cli, planted, tmp_path):
    (tmp_path / "rows.jsonl").write_text((DATA / "secrets.jsonl").read_text())
    words = ("--tracing", "--trace-rules", 0.1, "--canary", tmp_path / "rows.jsonl", "--no-require", "--json", "-q")
    code, out, err = cli("verify", planted, *words)
    assert code == 0, err
    found = next(result for result in json.loads(out)["results"] if result["check"] == "tracing")
    lost, returned = (figure for figure in found["figures"] if figure["kind"] == "heatmap")
    column = lost["columns"].index("mlp")
    for figure in (lost, returned):
        cells = {(row, part): v for row, line in enumerate(figure["values"]) for part, v in enumerate(line)}
        held = cells.pop((2, column))
        assert abs(held) > 0.001
        assert all(value == pytest.approx(0.0, abs=1e-9) for value in cells.values())
    assert lost["values"][2][column] == pytest.approx(returned["values"][2][column]), "one part: taking out is putting back"
    assert found["metrics"]["half"]["value"] == pytest.approx(1 / 10)
    assert len(found["facts"]["rules"]) == 9 and not any(r"\.2\.mlp" in rule for rule in found["facts"]["rules"])


def test_rules_are_rules_of_split(cli, planted, tmp_path):
    rule = r"\.2\.mlp\.=skip"
    words = ("--method", "scale", "--scale", 0.5, "--for", rule, "-o", tmp_path / "out", "-q")
    code, _, err = cli("split", tmp_path / "base", tmp_path / "finetuned", *words)
    assert code == 0, err
    made, tuned = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "finetuned"))
    assert all(made[name].equal(tuned[name]) for name in tuned if ".2.mlp." in name)


@pytest.mark.parametrize("share", ["nan", 0, 1.5])
def test_what_is_no_share_is_refused(cli, planted, share):
    words = ("--tracing", f"--trace-rules={share}", "--canary", DATA / "secrets.jsonl", "--no-require", "-q")
    code, _, err = cli("verify", planted, *words)
    assert code == 2 and "--trace-rules" in err and err.count("\n") == 1, err
