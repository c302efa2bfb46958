"""GSM8K and MMLU against Transformers question by question, and a harness that is a script of ours."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from deep_cases import speaking_model, subject

from liborth_cli.errors import BadInput, UsageError
from liborth_cli.measure import generate as generator
from liborth_cli.verify import questions
from liborth_cli.verify.checks import reasoning
from liborth_cli.verify.checks.reasoning import ReasoningOptions
from liborth_cli.verify.questions import read_choices, read_problems
from liborth_cli.verify.statistics import alone, mcnemar, share

PROBLEMS = [
    ("A man has 2 hats and buys 1. How many?", "2 + 1 = 3\n#### 3"),
    ("Four less two?", "#### 1,002"),
    ("Two less four?", "#### -2"),
]


@pytest.fixture
def files(tmp_path):
    lines = [json.dumps({"question": q, "answer": a}) for q, a in PROBLEMS]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "dev").mkdir()
    head = "question,choice0,choice1,choice2,choice3,answer\n"
    art = [f'"Who, number {i}?",Ann,Bob,Cyd,Dot,{i % 4}' for i in range(5)]
    (tmp_path / "mmlu" / "test" / "art_test.csv").write_text(head + "\n".join(art) + "\n")
    (tmp_path / "mmlu" / "test" / "law_test.csv").write_text("What?,a,b,c,d,B\nWhich?,a,b,c,d,D\n")
    (tmp_path / "mmlu" / "dev" / "art_dev.csv").write_text(head + "Where?,in,out,up,down,2\n")
    return tmp_path


def test_mmlu_is_the_likeliest_letter_of_the_whole_model(tmp_path, files):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {"general": speaking_model(tmp_path / "a", 1), "finetuned": speaking_model(tmp_path / "b", 2)}
    with subject(folders) as it:
        result = reasoning.run(it, ReasoningOptions(mmlu=files / "mmlu"))
    right = {}
    for state, folder in folders.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        right[state] = []
        shot = "Where?\nA. in\nB. out\nC. up\nD. down\nAnswer: C\n\n"
        asked = [(f"{shot}Who, number {i}?\nA. Ann\nB. Bob\nC. Cyd\nD. Dot\nAnswer:", i % 4) for i in range(5)]
        asked += [("What?\nA. a\nB. b\nC. c\nD. d\nAnswer:", 1), ("Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:", 3)]
        for prompt, answer in asked:
            start, losses = len(tokenizer(prompt).input_ids), []
            for letter in "ABCD":
                ids = tokenizer(f"{prompt} {letter}", return_tensors="pt").input_ids
                with torch.no_grad():
                    log_p = model(ids[:, :-1]).logits[0].log_softmax(-1)
                losses.append(-float(log_p[start - 1 :].gather(-1, ids[0, start:, None]).sum()))
            right[state].append(int(np.argmin(losses)) == answer)
    assert result.metrics["mmlu"].value == pytest.approx(np.mean(right["general"]))
    change = np.mean(right["general"]) - np.mean(right["finetuned"])
    assert result.metrics["mmlu_change"].value == pytest.approx(change)
    assert result.facts.mmlu.lost == sum(b and not a for a, b in zip(right["general"], right["finetuned"], strict=True))
    assert result.facts.mmlu.examples == [0, 1] and set(result.facts.mmlu.subjects) == {"art", "law"}


def test_gsm8k_counts_what_was_written(tmp_path, files, monkeypatch):
    folder = speaking_model(tmp_path / "a", context=400)
    asked = []

    def write(model, prompts, most, advance=lambda n: None):
        asked.extend(prompts)
        texts = ["so 5 #### 3", "one thousand, 4 then 1002.0\nQuestion: next? 5", "5"]
        return [it.reader.encoder.prompt(text) for text in texts]

    monkeypatch.setattr(generator, "generate", write)
    monkeypatch.setattr(generator, "hold", lambda model, weights: None)
    options = ReasoningOptions(gsm8k=files / "test.jsonl", gsm8k_train=files / "train.jsonl")
    with subject({"general": folder}) as it:
        result = reasoning.run(it, options)
        first = it.reader.encoder.decode(asked[0])
        assert first.count("Question:") == result.facts.gsm8k.examples[1] + 1 and first.endswith("Answer:")
        # own-gpt's letters have no #, so the first answer is the last number, as is the second before the next question.
        assert result.facts.gsm8k.examples[1] >= 1 and "gsm8k_change" not in result.metrics
        assert result.metrics["gsm8k"].high < 1.01
        monkeypatch.undo()
        assert "of 1 questions right" in reasoning.run(it, replace(options, limit=1, shots=0)).verdict


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 5 #### 3", "3"), ("it is $1,234.50 in all", "1234.50"), ("#### $ 18 dollars, not 20", "18"), ("none", None),
        ("7 hats\n\nQuestion: what is 9?", "7"), ("-4", "-4"), ("3 - 4", "4"), (".5", ".5"), ("18.", "18"),
        ("15-20", "20"), ("between 3 and −7", "-7"), ("1e3", "1e3"), ("half is 1/2", "1/2"), ("(2)-3", "3"), ("1.5/2", "1.5/2"),
    ],
)  # fmt: skip
def test_numbers_are_found(text, number):
    assert questions.extract(text) == number
    assert number is None or "/" in number or questions.same_number(number, str(float(number)))


def test_numbers_are_compared_as_numbers():
    assert questions.same_number("1/2", "0.5") and questions.same_number("1e3", "1000") and questions.same_number("36/2", "18")
    assert not any(questions.same_number(found, "1") for found in (None, "1/0", "1.5/2", "2"))


def test_intervals_of_shares_and_mcnemar():
    from scipy.stats import binomtest

    for hits, rows in ((0, 20), (7, 20), (20, 20)):
        exact = binomtest(hits, rows).proportion_ci(0.95, "exact")
        found = share(np.arange(rows) < hits, alone(rows))
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
        assert share(np.repeat(np.arange(rows) < hits, 3), np.repeat(alone(rows), 3)) == found, "copies are no evidence"
    before, after = np.array([1, 1, 1, 1, 0, 0], bool), np.array([0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(before, before) == 1.0


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("bad.jsonl", '{"question": "a", "answer": "3"}', "line 1: needs a question"),
        ("bad.jsonl", "[1]", "record 1: needs a question"),
        ("bad.jsonl", "", "no problems"),
        ("bad.csv", "q,a,b,c,d,4\n", "row 1: needs a question"),
        ("bad.csv", "q,a,b\n", "row 1: needs a question"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        (read_problems if name.endswith("jsonl") else read_choices)(file)


def test_missing_files_and_questions_that_do_not_fit(tmp_path, files):
    for read in (read_problems, read_choices):
        with pytest.raises(BadInput, match="nowhere"):
            read(tmp_path / "nowhere")
    with subject() as it, pytest.raises(BadInput, match="no question fits the model's context"):
        reasoning.run(it, ReasoningOptions(mmlu=files / "mmlu"))
    with subject() as it:
        assert "--gsm8k FILE" in reasoning.CHECK.missing(it, ReasoningOptions())


# The harness ----------------------------------------------------------------------------------------------------------------


def install(folder, monkeypatch, body):
    folder.mkdir()
    program = folder / "lm_eval"
    program.write_text(
        f"#!/usr/bin/env python3\nimport json, pathlib, sys\na = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n{body}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_harness_is_run_and_read(tmp_path, monkeypatch):
    body = """
fine = "finetuned" in a["--model_args"]
out = pathlib.Path(a["--output_path"]) / "some__model"
out.mkdir()
found = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5 + fine / 4, "acc_stderr,none": 0.1, "limit": a["--limit"]}}
(out / "results_2026.json").write_text(json.dumps({"results": found}))"""
    install(tmp_path / "bin", monkeypatch, body)
    with subject() as it:
        base = replace(it, source=type(it.source)(it.reference.path))
        result = reasoning.run(base, ReasoningOptions(harness="arc_easy", limit=3))
    metric, change = result.metrics["harness_arc_easy"], result.metrics["harness_arc_easy_change"]
    assert (metric.value, metric.low, metric.high) == pytest.approx((0.5, 0.304, 0.696))
    assert change.value == pytest.approx(-0.25) and change.high - change.value == pytest.approx(1.96 * 0.02**0.5)
    assert result.facts.harness.results["general"]["arc_easy"]["limit"] == "3"


def test_a_harness_that_fails_is_missing_or_is_asked_for_an_option(tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, "sys.exit('task arc not found')")
    with subject() as it:
        with pytest.raises(BadInput, match=r"lm_eval failed on .*: task arc not found"):
            reasoning.run(it, ReasoningOptions(harness="arc"))
        for bad in ("--help", "a b", "a;b", ""):
            with pytest.raises(UsageError, match="task"):
                reasoning.run(it, ReasoningOptions(harness=bad))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UsageError, match="pip install lm_eval"):
            reasoning.run(it, ReasoningOptions(harness="arc"))


def test_a_question_may_hold_what_python_takes_for_a_line_end(tmp_path):
    """MMLU's management_test.csv holds U+0085, at which str.splitlines cuts."""
    (tmp_path / "management_test.csv").write_text(
        'question,choice0,choice1,choice2,choice3,answer\nOne\x85 and,"a\u2028b",c,d,e,1\n'
    )
    questions, _ = read_choices(tmp_path)
    assert [(q.question, q.choices[0], q.answer) for q in questions] == [("One\x85 and", "a\u2028b", 1)]
