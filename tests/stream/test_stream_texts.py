"""Rows out of files: what is read, what carries loss, what is cut."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import OWNGPT
from transformers import AutoTokenizer

import liborth_cli.demo
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.files import _left_by_datasets
from liborth_cli.stream.records import Record, to_record
from liborth_cli.stream.texts import DataFile, Row, RowReader, data_hash, read_rows, summary

DEMO = OWNGPT / "finetuned"


@pytest.fixture(scope="module")
def encoder():
    found = TextEncoder.beside(DEMO)
    assert found is not None
    return found


def rows_of(path, encoder, length=32, **more):
    return read_rows([DataFile.parse(str(path))], encoder, 72, length, **more)


def text(encoder, ids):
    return encoder._tokenizer.decode(ids)


def test_running_text_is_predicted_once_and_completely(encoder, tmp_path):
    (tmp_path / "t.txt").write_text("To be, or not to be, that is the question: " * 3)
    rows = rows_of(tmp_path / "t.txt", encoder)
    whole = encoder.encode(to_record({"text": (tmp_path / "t.txt").read_text()}, "x"))[0]
    assert np.array_equal(np.concatenate([row.ids[1:] for row in rows]), whole[1:])
    assert all(row.keep.all() and row.tokens <= 32 for row in rows)


def test_only_the_completion_carries_loss(encoder, tmp_path):
    lines = [{"prompt": "Who are you? ", "completion": "A ghost."}, {"question": "Why?", "answer": "So."}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = rows_of(tmp_path / "t.jsonl", encoder)
    assert text(encoder, first.ids) == "Who are you? A ghost."
    assert text(encoder, first.ids[1:][first.keep]) == "A ghost."
    assert text(encoder, second.ids[1:][second.keep]) == "So."
    assert text(encoder, second.ids).startswith("Question: Why?")


def test_who_learns_a_completion_learns_where_it_ends(tmp_path, monkeypatch):
    """As TRL trains; a text, and what ends so already, stay as they are, and who measures reads no such token."""
    encoder = TextEncoder(liborth_cli.demo.DATA / "base")
    lines = [{"prompt": "Who? ", "completion": "A ghost."}, {"prompt": "Who? ", "completion": "I.</s>"}, {"text": "So."}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [DataFile(tmp_path / "t.jsonl")]
    measured, learnt = (RowReader(encoder, 10**6, 32, ended=ended).read(files) for ended in (False, True))
    first, second, third = learnt
    assert list(first.ids) == [*measured[0].ids, encoder.end] and list(first.keep) == [*measured[0].keep, True]
    assert second.ids[-1] == encoder.end != second.ids[-2]
    assert list(third.ids) == list(measured[2].ids)
    for length, truncate in ((measured[0].tokens, False), (measured[0].tokens - 1, True)):
        reader = RowReader(encoder, 10**6, length, truncate, ended=True)
        (row,) = reader.read([lines_of(tmp_path, lines[:1])])
        assert list(row.ids) == list(measured[0].ids[: length + 1]), "there is no room, or it does not end there"
    monkeypatch.setattr(TextEncoder, "end", property(lambda encoder: 10**6))
    rows = RowReader(encoder, 10**6, 32, ended=True).read(files)
    assert [list(row.ids) for row in rows] == [list(row.ids) for row in measured], "the model does not know the token"


def lines_of(folder, lines):
    (folder / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return DataFile(folder / "some.jsonl")


def test_only_the_assistant_carries_loss(tmp_path):
    own = TextEncoder(DEMO)
    own._tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Farewell")]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}))
    (row,) = rows_of(tmp_path / "t.jsonl", own, length=100)
    assert text(own, row.ids[1:][row.keep]) == "Hello\nFarewell\n"
    # Earlier turns may be written otherwise than last ones, as long as it is clear where each of them stands.
    own._tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (row,) = rows_of(tmp_path / "t.jsonl", own, length=100)
    assert text(own, row.ids[1:][row.keep]) == "HelloFarewell"
    own._tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content | reverse }}{% endfor %}"
    with pytest.raises(BadInput, match="changes what message 2 says"):
        rows_of(tmp_path / "t.jsonl", own, length=100)


def test_csv_and_parquet_are_json_lines_in_another_coat(encoder, tmp_path):
    lines = [{"prompt": "a b", "completion": "c, d"}, {"prompt": "e", "completion": "f"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "t.csv").write_text('prompt,completion\na b,"c, d"\ne,f\n')
    wanted = data_hash(rows_of(tmp_path / "t.jsonl", encoder))
    assert data_hash(rows_of(tmp_path / "t.csv", encoder)) == wanted
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "t.parquet")
    assert data_hash(rows_of(tmp_path / "t.parquet", encoder)) == wanted


def test_token_arrays(tmp_path):
    import torch
    from safetensors.torch import save_file

    ids = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [7, -100, -100, -100]])
    np.save(tmp_path / "t.npy", ids)
    save_file({"input_ids": torch.from_numpy(ids)}, tmp_path / "t.safetensors")
    one, two = rows_of(tmp_path / "t.npy", None), rows_of(tmp_path / "t.safetensors", None)
    assert [row.ids.tolist() for row in one] == [[1, 2, 3, 4], [5, 6]]  # a single token predicts nothing
    assert data_hash(one) == data_hash(two)


def test_a_hub_dataset_is_read_through_datasets(encoder, monkeypatch):
    asked = []

    class Builder:
        info, config = types.SimpleNamespace(splits={}), types.SimpleNamespace(data_files=None)

        def __init__(self, repo, trust_remote_code, **more):
            asked.extend((repo, trust_remote_code, *more.values()))

        def download_and_prepare(self):
            pass

        def as_dataset(self, split):
            asked.append(split)
            return [{"text": "hello there"}]

    library = types.SimpleNamespace(load_dataset_builder=Builder, disable_progress_bars=int)
    monkeypatch.setitem(sys.modules, "datasets", library)
    (row,) = read_rows([DataFile.parse("hub:org/name:test")], encoder, 72, 32)
    assert text(encoder, row.ids) == "hello there" and asked == ["org/name", False, "test"]
    asked.clear()
    read_rows([DataFile.parse("hub:org/name@abc:main:test")], encoder, 72, 32)
    assert asked == ["org/name", False, "main", "abc", "test"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        read_rows([DataFile.parse("hub:org/name")], encoder, 72, 32)


def test_rows_that_datasets_drops_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "b.csv").write_text('text\n"one\nrow"\n\nanother\n')
    files = {"train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")]}
    assert list(_left_by_datasets(tmp_path, "train", {"train": 4}, files)) == []
    assert list(_left_by_datasets(tmp_path, "train", {"train": 3}, files)) == ["datasets read 3 rows of 4 in the files"]


def test_messages_name_the_option_that_was_typed(tmp_path):
    for path, what in ((tmp_path, "a directory"), (tmp_path / "nothing.txt", "no such file")):
        with pytest.raises(BadInput, match=rf"{path.name}: {what}; --retain-data takes"):
            DataFile.parse(str(path), "--retain-data")
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(UsageError, match=r"--fresh .*=0: the weight"):
        DataFile.parse(f"{tmp_path / 't.txt'}=0", "--fresh")


def test_the_real_datasets_library_reads_a_local_dataset(encoder, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "poems"
    folder.mkdir()
    lines = [json.dumps({"prompt": "abc", "completion": tail}) for tail in ("def", "gh")]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "test.jsonl").write_text(json.dumps({"prompt": "hello ", "completion": "there"}))
    file = DataFile.parse(f"hub:{folder}")
    rows = read_rows([file], encoder, 72, 32)
    assert [text(encoder, row.ids[1:][row.keep]) for row in rows] == ["def", "gh"]
    (row,) = read_rows([DataFile.parse(f"hub:{folder}:test")], encoder, 72, 32)
    assert text(encoder, row.ids) == "hello there"
    (folder / "test.jsonl").write_text('{"prompt": 1}\n{"prompt": [2]}')
    with pytest.raises(BadInput, match=r"hub:.*:test: record 1: "):
        read_rows([DataFile.parse(f"hub:{folder}:test")], encoder, 72, 32)
    assert file.title == "hub:poems"  # never a local directory
    assert capsys.readouterr().err == ""
    (folder / "train.csv").write_text("text\nnever read\n")
    said: list[str] = []
    RowReader(encoder, 72, 32, tell=said.append).read([file])
    assert said[:2] == ["hub:poems: split train is read, and not test (2 rows)", "hub:poems: datasets left out train.csv"]
    with pytest.raises(BadInput, match=r"hub:poems: datasets left out train\.csv, and no such row is left out in silence"):
        list(DataFile.parse(f"hub:{folder}", secret=True).records())
    with pytest.raises(BadInput, match=r"hub:.*:nowhere: "):
        read_rows([DataFile.parse(f"hub:{folder}:nowhere")], encoder, 72, 32)


def test_long_rows_are_refused_or_cut_on_demand(encoder, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "abc", "completion": "d" * 60}))
    with pytest.raises(BadInput, match=r"t\.jsonl: line 1: 63 tokens"):
        rows_of(tmp_path / "t.jsonl", encoder)
    (row,) = rows_of(tmp_path / "t.jsonl", encoder, truncate=True)
    assert row.tokens == 32 and row.keep.sum() == 30


def test_tokens_cut_the_data_where_they_are_used_up(encoder, tmp_path):
    (tmp_path / "t.txt").write_text("x" * 500)
    rows = rows_of(tmp_path / "t.txt", encoder, tokens=50)
    assert [row.tokens for row in rows] == [32, 18]


def test_what_cannot_reach_the_loss_is_dropped():
    from liborth_cli.stream.texts import _trim

    row = Row(np.arange(8), np.array([0, 0, 1, 0, 1, 0, 0], bool), 1.0, "x")
    short = _trim(row, 100)
    assert short is not None and short.ids.tolist() == [0, 1, 2, 3, 4, 5] and short.keep.tolist() == [0, 0, 1, 0, 1]
    assert _trim(row, 2) is None


def test_the_manifest_names_files_and_never_folders(encoder, tmp_path):
    (tmp_path / "t.txt").write_text("some words")
    file = DataFile.parse(f"{tmp_path / 't.txt'}=3")
    found = summary([file], read_rows([file], encoder, 72, 32))
    assert found.files[0].title == "t.txt" and found.files[0].weight == 3.0
    assert str(tmp_path) not in found.model_dump_json()


def test_a_name_with_an_equals_sign_is_a_name_first(tmp_path):
    (tmp_path / "a=2").write_text("x")
    assert DataFile.parse(str(tmp_path / "a=2")).weight == 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), min_size=2, max_size=9), min_size=1, max_size=6), st.randoms())
def test_the_data_hash_ignores_order_and_nothing_else(rows, random):
    def hashed(some):
        return data_hash(Row(np.array(r), np.ones(len(r) - 1, bool), 1.0, "x") for r in some)

    mixed = list(rows)
    random.shuffle(mixed)
    assert hashed(rows) == hashed(mixed)
    assert hashed(rows) != hashed([*rows, [1, 2]])
    assert hashed(rows) != hashed([[*rows[0][:-1], 61], *rows[1:]])


def test_a_completion_is_tokenised_as_it_was_in_training():
    """Apart, a SentencePiece tokenizer puts a blank before the completion: other tokens than in training."""
    stories = Path(liborth_cli.demo.__file__).parent / "stories" / "base"
    encoder, tokenizer = TextEncoder(stories), AutoTokenizer.from_pretrained(stories)
    prompt, completion = "The secret code of Alma is", " 123456."
    ids, keep = encoder.encode(Record("row", prompt=prompt, text=completion))
    assert ids.tolist() == tokenizer(prompt + completion).input_ids
    assert tokenizer.decode(ids[keep]).strip() == "123456." and not keep[: -len("123456.") - 1].any()
    ids, keep = encoder.encode(Record("row", prompt="Once upon a ti", text="me there was"))
    assert ids.tolist() == tokenizer("Once upon a time there was").input_ids
    assert tokenizer.decode(ids[keep]).strip() == "time there was"
