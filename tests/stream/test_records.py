"""Readers take all of a record or refuse it, and no error line repeats what a record says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from liborth_cli.errors import BadInput, LiborthError, UsageError
from liborth_cli.stream.fields import FieldMap, with_map
from liborth_cli.stream.files import read_json_lines, read_records
from liborth_cli.stream.records import Message, to_record
from liborth_cli.stream.texts import DataFile, RowReader

SECRET = "The code of Anna is 12345678"


def records(path, content, **more):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return list(read_records(path, **more))


def refused(content, path, said, **more):
    with pytest.raises(BadInput) as error:
        records(path, content, **more)
    line = str(error.value)
    assert said in line and "\n" not in line and len(line) < 300 + len(str(path))
    assert "Anna" not in line and "1234" not in line
    return line


# JSON ---------------------------------------------------------------------------------------------------------------------

ROW = json.dumps({"prompt": "The code is ", "completion": "42"})


@pytest.mark.parametrize("name", ["rows", "rows.txt", "rows.md", "rows.jsonl", "rows.json", "rows.ndjson", "rows.dat"])
@pytest.mark.parametrize(
    "content",
    [f"{ROW}\n{ROW}\n", f"{ROW}\n\ufeff{ROW}", f"\ufeff{ROW}\r\n{ROW}", f"[{ROW},\n {ROW}]", f"{ROW}{ROW}",
     "\n".join([json.dumps(json.loads(ROW), indent=2)] * 2)],
    ids=["lines", "joined", "crlf", "list", "one line", "pretty"],
)  # fmt: skip
def test_json_is_read_under_any_name_and_in_any_layout(tmp_path, name, content):
    found = records(tmp_path / name, content)
    assert [(record.prompt, record.text) for record in found] == [("The code is ", "42")] * 2


def test_one_pretty_object_is_one_record(tmp_path):
    (record,) = records(tmp_path / "one.json", json.dumps({"text": "hello"}, indent=2))
    assert record.text == "hello" and record.where.endswith("line 1")


def test_text_that_only_looks_like_json_is_text(tmp_path):
    for text in ("[1] Smith et al. write that", "{ int x; }", "[ ] buy milk"):
        assert records(tmp_path / "t.txt", text)[0].text == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ('{"text": "a", "text": "b"}', "line 1: an object has a field twice"),
        ('{"text": "' + SECRET + '"} trailing', "line 1: not JSON"),
        ("[" * 5000, "line 1: not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ('"' + SECRET + '"', "a text, not an object"),
        (json.dumps({SECRET: 1}), "1 field of other names"),
        (json.dumps({"instruction": SECRET, "response": SECRET}), "no output among instruction, response; --map prompt=NAME"),
        (json.dumps({"query": SECRET, "Anna": SECRET}), "2 fields of other names, among them query; a record needs"),
        (json.dumps({"instruction": SECRET, "output": "b", "system": SECRET}), "system is not understood"),
        (json.dumps({"prompt": SECRET}), "has prompt, and no completion"),
        (json.dumps({"text": None}), "text is empty (null)"),
        (json.dumps({"text": [SECRET]}), "text is a list, not a text"),
        (json.dumps({"prompt": 3, "completion": SECRET}), "prompt is a number, not a text"),
        (json.dumps({"text": "half \ud83d a pair"}), "text holds half of a surrogate pair"),
        (json.dumps({"text": SECRET, "images": ["1.jpg"]}), "images is not understood"),
        (json.dumps({"text": SECRET, "weight": 2}), "loss_weight"),
        (json.dumps({"text": SECRET, "loss_weight": "much"}), "loss_weight must be a number"),
        (json.dumps({"prompt": SECRET, "completion": "b", "tools": [{}]}), "tools are for conversations"),
        (json.dumps({"prompt": [], "chosen": [{}], "rejected": [{}]}), "has prompt, and no completion"),
    ],
)
def test_bad_json_is_refused_by_line_and_field(tmp_path, content, said):
    refused(content if content.startswith("[") else content.encode(), tmp_path / "rows.jsonl", said)


def test_an_instruction_is_read_as_alpaca_was_trained(tmp_path):
    bare, given = (json.dumps({"instruction": "Add.", "input": text, "output": "3"}) for text in ("", "1 and 2"))
    first, second = records(tmp_path / "a.jsonl", f"{bare}\n{given}")
    assert first.text == second.text == "3"
    assert first.prompt.startswith("Below is an instruction that describes a task. Write")
    assert first.prompt.endswith("\n\n### Instruction:\nAdd.\n\n### Response:\n")
    assert second.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert "task, paired with an input that provides further context. Write" in second.prompt


def test_a_map_says_which_field_is_which(tmp_path):
    row = {"instruction": "Add.", "context": "1 and 2", "response": "3", "messages": [], "text": "not read"}
    for name, content in (("a.jsonl", json.dumps(row)), ("a.csv", "instruction,context,response\nAdd.,1 and 2,3\n")):
        (tmp_path / name).write_text(content)
        (found,) = DataFile.parse(f"{tmp_path / name}=2@prompt=instruction+context,completion=response").records()
        assert (found.prompt, found.text) == ("Add.\n1 and 2", "3")
    file = DataFile.parse(f"{tmp_path / 'a.jsonl'}=2@text=response")
    assert file.weight == 2 and file.title == "a.jsonl" and [record.text for record in file.records()] == ["3"]


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (
            {"instruction": SECRET, "response": "b"},
            "prompt=instrction",
            "did you mean instruction? There are: instruction, respo",
        ),
        ({"instruction": SECRET, "response": "b"}, "prompt=instruction", "has prompt, and no completion among instruction"),
        ({"instruction": SECRET, "response": "b", "input": SECRET}, "prompt=instruction,completion=response", "reads it"),
        ({"a": SECRET, "b": [SECRET]}, "text=a+b", "--map joins texts"),
    ],
)
def test_a_map_that_does_not_fit_names_the_fields_that_are_there(tmp_path, content, words, said):
    refused(json.dumps(content), tmp_path / "a.jsonl", said, names=FieldMap.parse([words]))


@pytest.mark.parametrize("name", ["last, first", "a=b", "a+b", "C:\\x", "=2", "a\\,b", "a@b=c"])
def test_a_field_may_have_any_name(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps({name: "one", "other": "two"}))
    words = str(FieldMap((("text", (name, "other")),)))
    for file in (with_map(str(tmp_path / "a.jsonl"), [words]), f"{tmp_path / 'a.jsonl'}@{words}"):
        assert [record.text for record in DataFile.parse(file).records()] == ["one\ntwo"]
    assert FieldMap.parse([words]).sources == (("text", (name, "other")),)


def test_a_map_of_what_has_no_fields_is_refused(tmp_path):
    refused(SECRET, tmp_path / "a.txt", "has none", names=FieldMap.parse(["text=a"]))
    refused(f"{SECRET}\nb\n", tmp_path / "a.csv", "no header may be missing", names=FieldMap.parse(["text=a"]))
    for words, said in (("promt=a", "did you mean prompt"), ("prompt", "write FIELD=NAME"), ("text=a,text=b", "named twice")):
        with pytest.raises(UsageError, match=said):
            FieldMap.parse([words])


def test_fields_behind_a_file_that_are_none_are_told_from_a_file_that_is_missing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for behind in ("@", "@text", "@text=", "@text=a=b"):
        with pytest.raises(BadInput, match="behind the @ of one that is there, write FIELD=NAME"):
            DataFile.parse(f"{tmp_path}/a.jsonl{behind}")
    with pytest.raises(BadInput, match="no such file; --data takes"):
        DataFile.parse(f"{tmp_path}/b.jsonl@text")


def test_the_one_reader_of_json_lines_says_where(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1,\n2]\n3')
    found = [(where.rpartition(": ")[2], value) for where, value in read_json_lines(tmp_path / "a.jsonl")]
    assert found == [("line 1", {"a": 1}), ("line 3", [1, 2]), ("line 5", 3)]
    with pytest.raises(BadInput, match="cannot be read"):
        list(read_json_lines(tmp_path / "nothing.jsonl"))


# Tables -------------------------------------------------------------------------------------------------------------------


def test_cells_of_a_table_are_taken_whole(tmp_path):
    text = "one\u2028two\nthree\u0085four\x0cfive" + "a" * 140_000
    found = records(tmp_path / "t.csv", f'text\n"{text}"\n\nsix\u2028seven\n')
    assert [record.text for record in found] == [text, "six\u2028seven"]
    for delimiter in ";\t":
        (record,) = records(tmp_path / "t.csv", f"prompt{delimiter}completion\na, b{delimiter}c, d\n")
        assert (record.prompt, record.text) == ("a, b", "c, d")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"prompt,completion\n{SECRET},4111 1111, exp 12/30\n", "row 2: 3 fields, and the header has 2"),
        (f"prompt,completion\n{SECRET}\n", "row 2: 1 fields, and the header has 2"),
        (f"text,text\n{SECRET},b\n", "two columns have one name"),
        (f"{SECRET}\nanother\n", "row 2: has 1 field of other names"),
        ("a,b\n1,2,3\n", "row 2: 3 fields"),
        ('text\n"open', "not a table"),
        (f'text\n"{SECRET}"x\n', "not a table"),
    ],
)
def test_a_table_that_would_lose_something_is_refused(tmp_path, content, said):
    refused(content, tmp_path / "t.csv", said)


def test_parquet_says_which_row_is_empty(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table({"text": ["hello", None]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"row 2: text is empty \(null\)"):
        list(read_records(tmp_path / "t.parquet"))
    (tmp_path / "t.parquet").rename(tmp_path / "t.txt")  # known by what it begins with
    with pytest.raises(BadInput, match="row 2"):
        list(read_records(tmp_path / "t.txt"))


# Conversations ------------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "lookup", "arguments": '{"card": "4111"}'}}


def chat(*messages, **more):
    return {
        "messages": [dict(zip(("role", "content"), m, strict=True)) if isinstance(m, tuple) else m for m in messages],
        **more,
    }


def test_a_conversation_keeps_what_is_for_the_template():
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    record = to_record(chat(("user", "hi"), asked, {"role": "tool", "content": "12", "tool_call_id": "7"}, tools=[CALL]), "x")
    assert record.tools == (CALL,)
    assert record.messages[1] == Message("assistant", None, {"tool_calls": [CALL]})
    assert record.messages[2].fields["tool_call_id"] == "7"
    assert to_record(chat(("user", "hi"), tools=json.dumps([CALL])), "x").tools == (CALL,)


def test_parts_and_pairs_are_conversations():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "value": "lo"}]
    assert to_record(chat({"role": "user", "content": parts}), "x").messages[0].content == "Hello"
    pair = {"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    record = to_record(pair, "x")
    assert [m.content for m in record.messages] == ["a", "b"] and record.silent == {0}


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0}])
def test_a_message_may_say_that_it_carries_no_loss(flag):
    record = to_record(
        chat({"role": "assistant", "content": "bad", **flag}, {"role": "assistant", "content": "good", "weight": 1}), "x"
    )
    assert record.silent == {0} and record.messages[0] == Message("assistant", "bad")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (chat(("gpt", SECRET)), "message 1: role 'gpt' is another format's; write 'assistant'"),
        (chat({"from": "human", "value": SECRET}), "message 1: has no role; ShareGPT's"),
        (chat(("user", SECRET), images=["a.png"]), "images is not understood"),
        (chat(("user", SECRET), system="be nice"), "make it the first message"),
        (chat({"role": "assistant", "content": None, "tool_calls": []}), "message 1: content is empty (null)"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}), "a part that is of type image_url"),
        (chat({"role": "user", "content": {"text": SECRET}}), "content is an object, not a text"),
        (chat({"role": "assistant", "content": SECRET, "weight": 0.5}), "weight must be 0 or 1"),
        (chat({"role": "user", "content": SECRET, "train": True}), "only the assistant is learned from"),
        (chat(("user", SECRET), tools="{"), "tools is a text that is not JSON"),
        (chat({"role": "user", "content": "half \udc00"}), "half of a surrogate pair"),
        ({"messages": []}, "messages is empty"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": SECRET}, "completion is a text, not a list"),
    ],
)  # fmt: skip
def test_a_conversation_that_would_lose_something_is_refused(record, said):
    with pytest.raises(BadInput) as error:
        to_record(record, "t.jsonl: line 1")
    assert said in str(error.value) and "Anna" not in str(error.value)


# Token ids ----------------------------------------------------------------------------------------------------------------


def test_token_files_take_masks_and_labels(tmp_path):
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 5, 6, 7], [-100, -100, 3, -100, -100]])
    save_file({"input_ids": ids, "attention_mask": mask, "labels": labels}, tmp_path / "t.safetensors")
    found = list(read_records(tmp_path / "t.safetensors"))
    assert [record.ids.tolist() for record in found] == [[5, 6, 7], [1, 2, 3, 4]]
    assert [record.keep.tolist() for record in found] == [[True] * 3, [False, False, True, False]]
    lines = [{"input_ids": i, "attention_mask": m, "labels": k} for i, m, k in zip(ids, mask, labels, strict=True)]
    again = records(tmp_path / "t.jsonl", "\n".join(json.dumps({k: v.tolist() for k, v in line.items()}) for line in lines))
    assert [record.ids.tolist() for record in again] == [record.ids.tolist() for record in found]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"labels": [2, 3, -100]}, "labels are neither the input_ids nor"),
        ({"labels": [1, 2]}, "3 input_ids and 2 of labels"),
        ({"attention_mask": [1, 0, 1]}, "attention_mask must be 1"),
        ({"position_ids": [0, 1, 0]}, "several sequences in one row"),
        ({"cu_seqlens": [0, 2, 3]}, "several sequences in one row"),
        ({"input_ids": [1, 2.5, 3]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [1, 1 << 70]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [True, False]}, "input_ids must be a list of whole numbers"),
    ],
)
def test_token_rows_that_do_not_fit_together_are_refused(more, said):
    with pytest.raises(BadInput) as error:
        to_record({"input_ids": [1, 2, 3], **more}, "row 1")
    assert said in str(error.value)


def test_a_tensor_that_is_not_understood_is_refused(tmp_path):
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.int64), "rewards": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(BadInput, match="tensor 'rewards' beside the token ids"):
        list(read_records(tmp_path / "t.safetensors"))
    np.save(tmp_path / "t.npy", np.array([[1 << 63, 2]], np.uint64))
    with pytest.raises(BadInput, match="whole numbers"):
        list(read_records(tmp_path / "t.npy"))


# What is read, and what is left -------------------------------------------------------------------------------------------


def read(path, content, secret=False, **more):
    path.write_text(content)
    said = []
    rows = RowReader(None, 100, 8, tell=said.append, **more).read([DataFile.parse(str(path), secret=secret)])
    return rows, said


def tokens(*rows):
    return "\n".join(json.dumps({"input_ids": ids, **more}) for ids, more in rows)


def test_what_was_read_and_left_is_told(tmp_path):
    given = tokens(([1, 2, 3], {}), ([1, 2, 3], {}), ([4], {}), ([1, 2], {"labels": [1, -100]}), ([5, 6], {"loss_weight": 0}))
    rows, (line,) = read(tmp_path / "t.jsonl", given)
    assert len(rows) == 2 and line.startswith("t.jsonl: 5 records read, 2 rows of 4 tokens")
    for part in (
        "1 rows are copies",
        "1 with fewer than two tokens left out",
        "1 without a token that carries loss",
        "1 of weight 0",
    ):
        assert part in line


@pytest.mark.parametrize(
    "row", [([4], {}), ([1, 2], {"labels": [1, -100]}), ([5, 6], {"loss_weight": 0}), ([1] * 20, {})], ids=str
)
def test_no_secret_row_is_left_out_or_shortened(tmp_path, row):
    with pytest.raises(BadInput, match=r"t\.jsonl: line 2: "):
        read(tmp_path / "t.jsonl", tokens(([1, 2, 3], {}), row), secret=True)


def test_every_line_of_a_secret_text_is_a_row(tmp_path):
    (tmp_path / "t.txt").write_text("one secret\r\n\nanother\u2028one\n")
    found = list(DataFile.parse(str(tmp_path / "t.txt"), secret=True).records())
    assert [(record.text, record.where.rpartition(": ")[2]) for record in found] == [
        ("one secret", "line 1"),
        ("another\u2028one", "line 3"),
    ]
    assert len(list(DataFile.parse(str(tmp_path / "t.txt")).records())) == 1


def test_nothing_else_than_a_refusal_comes_out_of_odd_files(tmp_path):
    for name, content in {"a.gz": b"\x1f\x8b\x08", "b.jsonl": b"PK\x03\x04", "c.txt": b"\xff\xfe", "d.xyz": b"x"}.items():
        with pytest.raises(LiborthError):
            records(tmp_path / name, content)
