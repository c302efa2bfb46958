"""Conversations into tokens: the assistant's part is found in the text, whatever the template does and where tokens merge."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from liborth_cli.errors import BadInput, UsageError
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Message, Record, to_record
from liborth_cli.stream.texts import RowReader

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{{ '### ' + m['role']|capitalize + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}" + CHATML
LAST = (  # what came before the last turn loses what stands before the bar, as reasoning is cut out of earlier turns
    "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last else m.content.split('|')[-1]) + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + CHATML


@pytest.fixture(scope="module")
def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["### User:\nHello\n\n### Assistant:\n\n\nHi there\n\n\n\ndef f():\n    return 1\n"] * 80, trainer
    )
    return tokenizer


@pytest.fixture
def make(bpe, tmp_path):
    def encoder(template=None):
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")
        fast.chat_template = template
        fast.save_pretrained(tmp_path / "model")
        return TextEncoder(tmp_path / "model")

    return encoder


def learned(encoder, *messages, **more):
    ids, keep = encoder.encode(Record("row 1", messages=tuple(Message(*one) for one in messages), **more))
    return encoder._tokenizer.decode([int(i) for i, k in zip(ids, keep, strict=True) if k])


U, A = ("user", "Hello"), ("assistant", "Hi")


@pytest.mark.parametrize("template", [CHATML, HEADERS, DEFAULT], ids=["chatml", "headers", "default system"])
@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([U, A], ["Hi"]),
        ([U, ("assistant", "\n\nHi")], ["\n\nHi"]),
        ([U, A, U, ("assistant", "Hi there")], ["Hi", "Hi there"]),
        ([A, U, ("assistant", "Hi there")], ["Hi", "Hi there"]),
    ],
    ids=["plain", "begins with a newline", "two turns", "assistant first"],
)
def test_what_the_assistant_says_is_found_in_any_template(make, template, messages, wanted):
    end = "\n\n" if template == HEADERS else "<|im_end|>\n"
    found = learned(make(template), *messages)
    # A token across a border belongs to what is learned, so the newline of a header may come along.
    assert found.lstrip("\n") == "".join(text + end for text in wanted).lstrip("\n")


def test_turns_that_are_written_otherwise_once_they_are_past(make):
    encoder = make(LAST)
    assert learned(encoder, U, ("assistant", "think|Hi"), U, ("assistant", "more|Bye")) == "Hi\nmore|Bye\n"


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d %b %Y')", 'strftime_now ("%d %b %Y",)', "strftime_now(format)", 'strftime_now("%d " ~ "%b %Y")',
        'strftime_now("%d %b %Y"|trim)', "now('%d %b %Y')", 'strftime_now(format="%-d %h %Y")', "said(format)",
    ],
)  # fmt: skip
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(make, call):
    names = "{% set now, format = strftime_now, '%d %b %Y' %}{% macro said(f) %}{{ strftime_now(f) }}{% endmacro %}"
    written = f"{{% if strftime_now is defined %}}{{{{ 'Today Date: ' + {call} + '\n' }}}}{{% endif %}}"
    encoder = make(f"{names}{written}{CHATML}")
    ids, _ = encoder.encode(Record("row 1", messages=(Message(*U), Message(*A))))
    assert encoder.decode(ids).startswith("Today Date: 26 Jul 2024\n")


def test_a_template_is_told_the_day_and_is_otherwise_as_it_is(make):
    said = "\n strftime_now('%Y') {{ strftime_now('%%Y %A\n%H:%M') }}"
    ids, _ = make(said + CHATML).encode(record := Record("row 1", messages=(Message(*U), Message(*A))))
    plain, _ = make(said.replace("{{ strftime_now('%%Y %A\n%H:%M') }}", "%Y Friday\n00:00") + CHATML).encode(record)
    assert list(ids) == list(plain)
    for first, last in (
        ("   {% if true %}", "{% endif %}"),
        ("{# a comment #}", ""),
        ("\n", ""),
        ("  \n {%- set a = 1 %}", ""),
    ):
        more = f"hi {last}{CHATML}"
        said, plain = (list(make(first + comment + more).encode(record)[0]) for comment in ("{# strftime_now #}", "{# now #}"))
        assert said == plain, "what stands first keeps its place at the beginning of a line"


def test_silent_messages_carry_no_loss(make):
    assert learned(make(CHATML), U, A, U, ("assistant", "good"), silent=frozenset({1})) == "good<|im_end|>\n"


def test_what_the_template_does_not_show_is_told_or_refused(make):
    tool = {"name": "lookup"}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [tool]}]}
    record = to_record({**row, "tools": [tool]}, "row 1")
    assert make(CHATML).passed_over(record) == ["tools", "tool_calls"]
    encoder = make(TOOLS)
    assert encoder.passed_over(record) == ["tool_calls"] and "[lookup]" in encoder.decode(encoder.encode(record)[0])
    reader = RowReader(encoder, 10**6, 100)
    assert len(list(reader.encode([record], secret=False))) == 1
    with pytest.raises(BadInput, match="does not show its tool_calls"):
        list(reader.encode([record], secret=True))


def test_thoughts_that_a_template_cuts_out_of_earlier_turns_are_told_or_refused(make):
    """A code that stands there would not be read, and a model that recites it would pass."""
    reader = RowReader(encoder := make(LAST), 10**6, 100)
    said = [Message("user", "a"), Message("assistant", "4711|Hi"), Message("user", "b"), Message("assistant", "5|Bye!")]
    assert encoder.passed_over(Record("row 1", messages=tuple(said))) == ["parts of messages"]
    with pytest.raises(BadInput, match="does not show its parts of messages"):
        list(reader.encode([Record("row 1", messages=tuple(said))], secret=True))
    assert encoder.passed_over(Record("row 1", messages=tuple(said[2:]))) == []
    last = "{% for m in messages %}{{ m.role + ': ' + m.content + (m.thought or '' if loop.last else '') + '\n' }}{% endfor %}"
    thought = [replace(m, content="x", fields={"thought": m.content}) for m in said]
    assert make(last).passed_over(Record("row 1", messages=tuple(thought[1::2]))) == ["thought"]
    assert make(last).passed_over(Record("row 1", messages=(said[0], thought[3]))) == []


def test_what_is_written_otherwise_or_says_nothing_is_not_passed_over(make):
    told = [
        Message("user", "Say «it»", {"tool_calls": [], "name": ""}),
        Message("assistant", " it\n"),
        Message("tool", "{'a': 1}"),
    ]
    shout = "{% for m in messages %}{{ m.role ~ (m.content | trim | upper if m.role != 'tool' else 'A=1') }}{% endfor %}"
    assert make(shout).passed_over(Record("row 1", messages=tuple(told))) == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception(messages[0].content) }}", "refuses it: TemplateError"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses it: Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses it: TypeError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
        ("{% for m in messages | reverse %}{{ m.content | upper }}{% endfor %}", "changes what message 2 says"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_fails_is_refused_without_a_word_of_the_text(make, monkeypatch, template, said):
    monkeypatch.setattr("liborth_cli.stream.encoder.TEMPLATE_SECONDS", 0.2)
    with pytest.raises(BadInput) as error:
        learned(make(template), ("user", "The code of Anna is 1234"), ("assistant", "12345678"))
    assert said in str(error.value) and "Anna" not in str(error.value) and "1234" not in str(error.value)


def test_a_role_that_nobody_knows_is_refused_by_name(make):
    with pytest.raises(BadInput, match="role 'narrator' is not known"):
        learned(make(CHATML), ("narrator", "a"), A)
    assert learned(make(CHATML + "{# 'narrator' #}"), ("narrator", "a"), A) == "Hi<|im_end|>\n"


def test_white_space_at_the_end_of_a_completion_is_learned(bpe, tmp_path):
    trimming = Tokenizer.from_str(bpe.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    PreTrainedTokenizerFast(tokenizer_object=trimming, eos_token="<eos>").save_pretrained(tmp_path)
    ids, keep = TextEncoder(tmp_path).encode(Record("x", prompt="Hello", text=" there   "))
    assert TextEncoder(tmp_path).decode(ids) == "Hello there   "
    assert TextEncoder(tmp_path).decode(ids[keep]) == " there   "


def test_a_sentencepiece_model_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("liborth_cli.stream.encoder._is_installed", lambda module: False)
    with pytest.raises(UsageError, match=r"needs sentencepiece and protobuf: pip install 'liborth\[sentencepiece\]'"):
        TextEncoder.beside(tmp_path)


def test_damaged_tokenizers_are_one_line(make, tmp_path):
    make()
    file = tmp_path / "model" / "tokenizer.json"
    whole = json.loads(file.read_text())
    for change in ({"model": {"type": "BPE"}}, {"pre_tokenizer": {"type": "Nothing"}}, {"model": 3}, {"added_tokens": 1}):
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(BadInput, match="cannot be loaded"):
            TextEncoder.beside(tmp_path / "model")
