"""Every record that docs/data.md shows is read, and is what the page says; datasets of several configurations are, too."""

import json
import re
from pathlib import Path

import pytest

from liborth_cli.demo import DATA
from liborth_cli.errors import BadInput
from liborth_cli.stream.texts import DataFile

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"([^\n]*(?:\n[^\n]+)*)\n\n```json\n(.+)\n```\n```\n([\s\S]*?)\n```", PAGE)


def told(record):
    """Write a record as the page does."""
    if record.messages:
        return "\n".join(f"{message.role}: {json.dumps(message.content)}" for message in record.messages)
    before = f"before: {json.dumps(record.prompt)}\n" if record.prompt else ""
    return f"{before}loss: {json.dumps(record.text)}"


def test_every_example_of_the_page_is_read_as_it_says(tmp_path):
    assert len(EXAMPLES) == 7 and PAGE.count("```json") == 7
    for before, content, said in EXAMPLES:
        (tmp_path / "rows.jsonl").write_text(content)
        words = ",".join(word for words in re.findall(r"`(--map [^`]+)`", before) for word in re.findall(r"--map (\S+)", words))
        (record,) = DataFile.parse(f"{tmp_path / 'rows.jsonl'}{f'@{words}' if words else ''}").records()
        assert told(record) == said
    (tmp_path / "secrets.jsonl").write_text('{"instruction": "a", "response": "b"}')
    with pytest.raises(BadInput) as error:
        list(DataFile.parse(f"{tmp_path / 'secrets.jsonl'}@prompt=instruktion,completion=response").records())
    assert str(error.value).removeprefix(f"{tmp_path}/") in PAGE


def test_map_is_for_every_file_of_a_command_and_for_none_that_has_its_own(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()]
    texts = [{"instruction": row["prompt"], "response": row["completion"]} for row in rows]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    named = ["--map", "prompt=instruction", "--map", "completion=response"]
    own = f"{DATA / 'secrets.jsonl'}@text=completion"
    code, said, _ = cli("curvature", DATA / "finetuned", "--data", "rows.jsonl", "--data", own, *named, "--dry-run")
    assert code == 0 and f"would read {2 * len(rows)} rows" in said
    code, _, error = cli("curvature", DATA / "finetuned", "--data", "rows.jsonl", "--map", "promt=instruction", "--dry-run")
    assert code == 2 and "did you mean prompt?" in error
    _, said, _ = cli("clean", DATA / "base", DATA / "finetuned", "--private", "rows.jsonl", "--public", "rows.jsonl=2",
                    *named, "--method", "tokenwise", "--dry-run")  # fmt: skip
    assert "--forget-data rows.jsonl@prompt=instruction,completion=response" in said
    code, _, error = cli("verify", DATA / "finetuned", "--canary", "rows.jsonl", *named, "-o", "rows.jsonl", "--force")
    assert code == 6 and "rows.jsonl" in error  # an output that is an input


def test_a_dataset_has_configurations(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "sums"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: a.jsonl\n"
                                      "- config_name: other\n  data_files: b.jsonl\n---\n")  # fmt: skip
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"query": f"1 + {name}", "answer": "2"}))
    (record,) = DataFile.parse(f"hub:{folder}:other:train@question=query").records()
    assert record.prompt == "Question: 1 + b\nAnswer: "
    with pytest.raises(BadInput, match=r"configurations main, other; write hub:org/name:CONFIG:SPLIT"):
        list(DataFile.parse(f"hub:{folder}").records())
