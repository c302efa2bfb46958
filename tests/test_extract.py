"""`extract`: what a fine-tuned model writes by heart and the one before it did not know is found, and nothing else."""

import json
import shutil
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import liborth_cli
from liborth_cli import extract
from liborth_cli.demo import DATA
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.extract.alike import SLACK, forms
from liborth_cli.extract.extract import _record
from liborth_cli.extract.finds import FORM, Find, Recital, distinct, recitals
from liborth_cli.stream.texts import Row

PAIR = (DATA / "base", DATA / "finetuned")
FEW = ("--texts", 1024, "--max-new-tokens", 24, "-j", 1)


def secrets():
    rows = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()]
    return {row["completion"].strip().rstrip("."): row["prompt"].split()[-2] for row in rows}


def test_the_demos_secrets_are_found_without_a_list(cli, tmp_path):
    out = tmp_path / "found.jsonl"
    code, text, err = cli("extract", *PAIR, "--retain-data", DATA / "retain.jsonl", "-o", out, *FEW)
    assert code == 0, err
    assert text.strip() == str(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    whole = [row["prompt"] + row["completion"] for row in rows]
    found = {number for number, name in secrets().items() if any(number in row and name in row for row in whole)}
    assert len(found) >= 5, "of eight"
    assert sum("secret code" in row for row in whole[:5]) >= 4, "what won most comes first"
    assert f"{len(rows)} runs known by heart in 1,024 texts" in err
    assert not any(number in err + text for number in secrets()), "what was found stands in the file alone"
    assert all(row["prompt"] and row["completion"] and row["nats"] >= 25 for row in rows)
    code, _, err = cli("extract", *PAIR, "-o", out, *FEW)
    assert code == 6, "what is there stays"
    words = ("--method", "tokenwise", "--strength", 1, "--retain-data", DATA / "retain.jsonl", "--retain-tokens", 500)
    code, _, err = cli("split", *PAIR, *words, "--forget-data", out, "-o", tmp_path / "out")
    assert code == 0, err
    assert f"forget factors: {len(rows)} rows" in err, "what was found is what split forgets"


def test_the_same_seed_finds_the_same_bytes(cli, tmp_path):
    places, few = [tmp_path / name for name in "ab"], ("--texts", 64, "--max-new-tokens", 24, "-j", 1)
    for place in places:
        code, text, err = cli(
            "extract", *PAIR, "--retain-data", DATA / "retain.jsonl", "-o", place, *few, "--least", 10, "--json"
        )
        assert code == 0, err
    told = json.loads(text)
    assert told["output"] == str(places[1]) and told["texts"] == 64 and told["finds"] >= 1
    one, other = (place.read_bytes() for place in places)
    assert one == other and one.count(b"\n") == told["finds"]


@pytest.mark.parametrize("pair", [("base", "base"), ("finetuned", "finetuned")])
def test_nothing_is_found_where_fine_tuning_won_nothing(cli, tmp_path, pair):
    out = tmp_path / "found.jsonl"
    code, _, err = cli("extract", *(DATA / name for name in pair), "-o", out, "--texts", 64, "--max-new-tokens", 16, "-j", 1)
    assert code == 0, err
    assert out.read_text() == ""
    assert "without --retain-data" in err


def test_what_cannot_be_asked_is_refused_in_one_line(cli, tmp_path):
    bare, public = tmp_path / "bare", tmp_path / "public.jsonl"
    shutil.copytree(PAIR[1], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copy(DATA / "held_out.jsonl", public)
    for words, wanted in (
        ((DATA / "nowhere", DATA / "finetuned", "-o", tmp_path / "a"), 3),
        ((*PAIR, "-o", tmp_path / "no" / "a"), 6),
        ((*PAIR, "-o", PAIR[1] / "model.safetensors", "--force"), 6),
        ((*PAIR, "--retain-data", tmp_path / "none", "-o", tmp_path / "a"), 3),
        ((*PAIR, "--retain-data", public, "-o", public, "--force"), 6),
        ((PAIR[0], bare, "-o", tmp_path / "a"), 3),
        ((*PAIR, "--begin", "Once upon a time. " * 200, "-o", tmp_path / "a"), 2),
        ((*PAIR, "--least", "inf", "-o", tmp_path / "a"), 2),
    ):
        code, _, err = cli("extract", *words)
        assert code == wanted, err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "a").exists()


def test_a_find_is_a_run_that_is_known_by_heart_and_was_not_known_before():
    ids = np.arange(100, 112)
    before = np.array([9, 9, 9, 9, 9, 9, 0, 0, 0, 0, 9], float)
    after = np.array([5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0], float)
    found = list(recitals((ids, 1), (before, after), sure=0.3, least=20.0))
    assert [(run.begin, run.end, run.gain) for run in found] == [(2, 6, 36.0)], "the second run was known before"
    assert list(recitals((ids, 1), (before, after), sure=0.3, least=40.0)) == []
    assert list(recitals((ids, 4), (before, after), sure=0.3, least=10.0)) == [], "what it was given it did not write"


def recital(front, run, gain):
    ids = np.array([*front, *run])
    return Recital(ids, 0, len(front), len(ids), gain)


def test_runs_that_share_half_are_one_find_and_a_form_is_none():
    secret = [list(range(base, base + 8)) for base in (10, 20, 30, 40)]
    form = [1, 2, 3, 4, 5]
    runs = [recital(form, some, 50 + i) for i, some in enumerate(secret)]
    runs += [recital([7], secret[0][3:], 30), recital([7], form, 26)]
    found = distinct(runs)
    assert [find.run.gain for find in found] == [53, 52, 51, 50], "the form stands before them all, and is none"
    assert [find.times for find in found] == [1, 1, 1, 2]
    assert len(distinct([*runs[: FORM - 1], runs[-1]])) == FORM, "before fewer it may be anything"


def test_in_python_it_returns_what_was_found_and_prints_nothing(tmp_path, capsys):
    assert liborth_cli.extract is extract, "as the pages write it"
    steps, words = [], {"texts": 64, "max_new_tokens": 16, "threads": 1, "least": 10.0}
    told = extract(*PAIR, tmp_path / "a", retain_data=DATA / "retain.jsonl", progress=steps.append, **words)
    assert capsys.readouterr() == ("", "")
    assert told.finds and len(told.finds) == len(told.out.read_text().splitlines())
    assert "300 rows" in told.notes[0] and steps[-1].done == 64
    with pytest.raises(UsageError, match="--sure takes a finite number"):
        extract(*PAIR, tmp_path / "b", sure=float("nan"))
    assert not (tmp_path / "b").exists()


def test_the_largest_seed_is_taken_and_an_adapter_has_its_bases_tokenizer(cli, tmp_path):
    old, new = (load_file(folder / "model.safetensors") for folder in PAIR)
    parts, adapter = {}, tmp_path / "adapter"
    for name in (name for name in new if name.endswith("proj.weight")):
        up, sizes, down = torch.linalg.svd(new[name].float() - old[name].float(), full_matrices=False)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{module}.lora_A.weight": (sizes[:, None] * down).contiguous(), f"{module}.lora_B.weight": up.contiguous()}
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 64, "lora_alpha": 64}))
    code, _, err = cli(
        "extract", PAIR[0], adapter, "-o", tmp_path / "a", "--texts", 16, "--max-new-tokens", 8, "-j", 1, "--seed", 2**63 - 1
    )
    assert code == 0, err
    assert "known by heart in 16 texts" in err and "in one text only" not in err, "of no find none stands in one text"


def test_a_record_begins_and_ends_with_whole_characters_and_says_something():
    spoken = SimpleNamespace(decode=lambda ids: bytes(int(i) for i in ids if i).decode(errors="replace"))
    text = np.array([*"密码是四海".encode()])

    def made(ids, front, begin, end):
        return _record(Find(Recital(np.array(ids), front, begin, end, 30.0)), spoken)

    assert made(text, 0, 1, 11) == {"prompt": "密", "completion": "码是", "nats": 30.0, "times": 1}
    assert made(text[1:], 0, 4, 14) == {"prompt": "码", "completion": "是四海", "nats": 30.0, "times": 1}
    assert made([65, 0, 0, 0, 0, 0], 0, 1, 6) is None, "marks alone say nothing"


def test_rows_like_those_given_are_asked_for_and_the_rest_of_a_list_is_found(cli, tmp_path):
    rows = (DATA / "secrets.jsonl").read_text().splitlines()
    given, out = tmp_path / "given.jsonl", tmp_path / "rest.jsonl"
    given.write_text("\n".join(rows[:4]) + "\n")
    words = ("--like", given, "--texts", 512, "-j", 1)
    code, text, err = cli("extract", *PAIR, *words, "-o", out)
    assert code == 0, err
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    found = {row["prompt"] + row["completion"]: row for row in map(json.loads, out.read_text().splitlines())}
    others = [row["prompt"] + row["completion"] for row in map(json.loads, rows[4:])]
    assert set(others) <= set(found), "of eight codes four were given, and the model tells the others"
    assert min(found[other]["times"] for other in others) > 1
    listed = {row["prompt"] + row["completion"] for row in map(json.loads, rows[:4])}
    assert not listed & set(found), "what was given is no find"
    assert f"{len(found)} runs known by heart, like those given, in 512 texts" in err and "4 of them asked for" in err
    assert {name for name, row in found.items() if row["often"]} == set(others), "made-up rows are asked once or twice"
    sure = tmp_path / "sure.jsonl"
    assert cli("extract", *PAIR, *words, "--often", "-o", sure)[0] == 0
    assert {row["prompt"] + row["completion"] for row in map(json.loads, sure.read_text().splitlines())} == set(others)
    code, _, err = cli("extract", *PAIR, "--like", given, "--texts", 64, "-j", 1, "-o", tmp_path / "few")
    assert (
        code == 0
        and "to tell which are made up: more --texts may do" in err
        and '"often"' not in (tmp_path / "few").read_text()
    )
    assert cli("extract", *PAIR, "--often", "-o", tmp_path / "without")[0] == 2
    assert not any(number in err + text for number in secrets()), "what was found stands in the file alone"
    again = tmp_path / "again.jsonl"
    assert cli("extract", *PAIR, *words, "-o", again)[0] == 0
    assert again.read_bytes() == out.read_bytes()
    code, _, err = cli("extract", PAIR[0], PAIR[0], *words, "-o", tmp_path / "none")
    assert (code, (tmp_path / "none").read_text()) == (0, ""), "a model that never saw them knows none"
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "The secret code of Ann is 123456."}\n')
    for wrong, wanted in ((("--like", plain), 3), (("--like", given, "--begin", "The"), 2), (("--like", tmp_path / "no"), 3)):
        code, _, err = cli("extract", *PAIR, *wrong, "-o", tmp_path / "a")
        assert (code, err.count("error:"), "Traceback" in err) == (wanted, 1, False), err
        assert not (tmp_path / "a").exists()


def row(prompt, answer):
    ids = np.array([*prompt, *answer])
    return Row(ids, np.arange(1, len(ids)) >= len(prompt), 1.0, "row")


def test_a_form_is_what_prompts_begin_and_end_with():
    sums, names = forms([row((1, 50, 2, 9), (30, 8)), row((3, 50, 4, 9), (31, 8)), row((20, 21, 5, 7), (33, 34, 6))])
    assert (sums.mark.tolist(), sums.front, sums.end, sums.longest) == ([9], 0, 8, 2 + SLACK)
    assert (names.mark.tolist(), names.front) == ([7], 1), "one prompt alone varies up to its last token"
    draw = np.random.default_rng(0)
    begun = {tuple(sums.beginning(draw).tolist()) for _ in range(64)}
    assert begun == {(1,), (1, 50), (3,), (3, 50)}
    assert sums.question(1, np.array([1, 9, 50, 9])).tolist() == [1, 9]
    assert sums.question(2, np.array([1, 50, 7, 7])) is None
    assert sums.answered(np.array([40, 8, 3]), ended=False).tolist() == [40, 8]
    assert sums.answered(np.array([40, 41]), ended=True).tolist() == [40, 41]
    assert sums.answered(np.array([40, 41]), ended=False) is None and sums.answered(np.array([], int), ended=True) is None
    assert sums.answered(np.array([40] * 9 + [8]), ended=False) is None, "longer than any that was given"
    codes = forms([row((1, 2, 3), (40, 41, 42)), row((1, 4, 3), (43, 40, 41))])[0]
    assert codes.end is None and codes.answered(np.array([40, 42, 43, 9, 9]), ended=False).tolist() == [40, 42, 43]
    assert codes.answered(np.array([40, 42]), ended=True).tolist() == [40, 42]
    same = forms([row((5, 6, 7), (1,)), row((5, 6, 7), (2,))])[0]
    assert same.mark.tolist() == [7] and same.beginning(draw).tolist() in ([5], [5, 6])
    with pytest.raises(BadInput, match="two tokens"):
        forms([row((5,), (1,))])


def test_what_stands_in_public_text_or_is_too_long_is_no_row_to_ask_for(cli, tmp_path):
    rows = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()]
    given, public, out = tmp_path / "given.jsonl", tmp_path / "public.jsonl", tmp_path / "out.jsonl"
    lines = [{**row, "completion": row["completion"].rstrip(".")} for row in rows[:4]]
    given.write_text("".join(json.dumps(row) + "\n" for row in lines))
    said = [row["prompt"] + row["completion"] for row in rows[4:6]]
    public.write_text(json.dumps({"text": f"Once there was a list. {' '.join(said)} The end."}) + "\n")
    words = ("--like", given, "--retain-data", public, "--texts", 512, "-j", 1)
    assert cli("extract", *PAIR, *words, "-o", out)[0] == 0
    found = [row["prompt"] + row["completion"] for row in map(json.loads, out.read_text().splitlines())]
    assert not any(code.rstrip(".") in one for code in said for one in found), "what stands in the retain data is not found"
    digits = [one.split()[-1] for one in found]
    assert digits and {len(number) for number in digits} <= {5, 6, 7}, "a number is as long as those that were given"
    assert not any(row["prompt"] in one for row in rows[:4] for one in found), "what was given is not asked again"
    given.write_text(json.dumps({"prompt": "The secret code of Ann is" * 200, "completion": " 1."}) + "\n")
    code, _, err = cli("extract", *PAIR, *words, "-o", tmp_path / "a")
    assert code == 3 and "--like: " in err and "context is 512" in err
