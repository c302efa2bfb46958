"""Rows that are called never-trained are held against the models before and after fine-tuning."""

import pytest
from verify_cases import SECRETS, UNSEEN, subject

from liborth_cli.demo import DATA
from liborth_cli.errors import BadInput
from liborth_cli.verify.fresh import check_fresh, weakness
from liborth_cli.verify.verdict import still_works

SIDES = {"reference": str(DATA / "base"), "finetuned": str(DATA / "finetuned")}


def texts(folder, canaries, fresh):
    """Write rows of the shipped pair: their files, as options."""
    files = {"canary": canaries, "fresh": fresh}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def test_fresh_rows_that_were_trained_on_are_refused_and_not_quoted(tmp_path):
    trained, never = SECRETS.read_text().splitlines(True), UNSEEN.read_text().splitlines(True)
    with subject(DATA / "finetuned", **SIDES, **texts(tmp_path, trained[:4], never[:5] + trained[4:])) as it:
        with pytest.raises(BadInput, match=r"fresh.jsonl: line 6: .*trained on \(4 of 9 rows") as refused:
            check_fresh(it)
        assert not any(code in str(refused.value) for code in (line.split('"')[7].strip(" .") for line in trained))
        assert weakness(it) == ""
    with subject(DATA / "finetuned", **SIDES, **texts(tmp_path, trained, never)) as it:
        check_fresh(it)
        assert weakness(it) == ""


def test_fresh_rows_that_fine_tuning_made_likelier_weaken_the_first_line(tmp_path):
    trained = SECRETS.read_text().splitlines(True)
    with subject(DATA / "finetuned", **SIDES, **texts(tmp_path, trained[:4], trained[4:])) as it:
        assert "likelier (the canaries: 8" in weakness(it)


def test_without_both_models_nothing_is_said_of_fresh_rows(tmp_path):
    trained = SECRETS.read_text().splitlines(True)
    given = texts(tmp_path, trained[:4], trained[4:])
    with subject(DATA / "base", **given) as it:
        check_fresh(it)
        assert weakness(it) == ""


@pytest.mark.parametrize(("model", "ok"), [("base", None), ("finetuned", True)])
def test_the_model_before_fine_tuning_shows_no_forgetting(tmp_path, model, ok):
    """`--require extraction==0` alone passed for the base itself, which never knew a secret."""
    retain = tmp_path / "retain.jsonl"
    retain.write_text("".join((DATA / "held_out.jsonl").read_text().splitlines(True)[:20]))
    with subject(DATA / model, **SIDES, canary=str(SECRETS), retain=(str(retain),)) as it:
        works = still_works(it)
    assert works.ok is ok and ("never knew these rows" in works.words) is (ok is None)
