"""The commands in Python, and what a notebook shows of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import few, pair

from liborth_cli import clean, curvature, excise, inspect, replay, split, verify
from liborth_cli.demo import DATA
from liborth_cli.errors import BadInput, UsageError, VerificationFailed
from liborth_cli.verify.checks import relearn


def test_a_split_and_back_with_progress_and_nothing_printed(tmp_path, capsys):
    base, finetuned = pair(tmp_path)
    steps = []
    made = split(base, finetuned, tmp_path / "general", method="svd", rank=4, progress=steps.append)
    assert made.manifest.parameters.method == "svd" and made.out == tmp_path / "general"
    assert [step.stage for step in steps][:1] == ["split"] and steps[-1].share == 1.0 and steps[-1].done == steps[-1].total
    back = excise(made.out, 1, tmp_path / "one")
    assert (back.out / "model.safetensors").read_bytes() == (finetuned / "model.safetensors").read_bytes()
    assert capsys.readouterr() == ("", "")
    assert any("certified" in note for note in made.notes)
    page = made._repr_html_()
    assert "<td>svd</td>" in page and "%" in page
    described = inspect(made.out)
    assert described.document["kind"] == "checkpoint" and "<table>" in described._repr_html_()


def test_texts_are_one_file_or_several_and_a_failed_verification_is_a_result(tmp_path, monkeypatch):
    made = split(
        DATA / "base", DATA / "finetuned", tmp_path / "general", strength=0.1,
        retain_data=[DATA / "retain.jsonl"], forget_data=DATA / "secrets.jsonl",
        more={"retain_tokens": 500, "probe_tokens": 500},
    )  # fmt: skip
    assert made.manifest.parameters.method == "tokenwise"
    monkeypatch.setattr(relearn, "PATIENCE", 0.0)  # the attack takes most of the time, and has tests of its own
    found = verify(
        made.out, reference=DATA / "base", canary=DATA / "secrets.jsonl", fresh=DATA / "unseen.jsonl",
        retain_data=few(tmp_path, 3), require="extraction==0, retention>=1.5",
    )  # fmt: skip
    assert not found.passed and "retention" in found._repr_html_()
    factors = curvature(DATA / "finetuned", DATA / "retain.jsonl", tmp_path / "factors", more={"tokens": 500})
    assert factors.manifest.kind == "curvature"


def test_a_run_is_repeated_and_a_difference_is_a_result(tmp_path, monkeypatch, capsys):
    base, finetuned = pair(tmp_path)
    split(base, finetuned, tmp_path / "general", method="svd", rank=4)
    plan = replay(tmp_path / "general", tmp_path / "again", dry_run=True)
    assert plan.text.startswith("liborth split ") and not (tmp_path / "again").exists()
    steps = []
    again = replay(tmp_path / "general", tmp_path / "again", threads=1, progress=steps.append)
    assert again.same and again.command == plan.text.replace(" --num-threads 2", " --num-threads 1") and steps
    assert "byte for byte" in again._repr_html_() and again.out == tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr("liborth_cli.cli.replay._compare", lambda *_: (False, "one file is not"))
        other = replay(tmp_path / "general", tmp_path / "other", threads=1)
        assert (
            not other.same and "one file is not" in other.sentence and other.command == again.command.replace("again", "other")
        )

        def fail(*_):
            raise VerificationFailed("nothing was written")

        patch.setattr("liborth_cli.cli.replay.carry_out", fail)
        with pytest.raises(VerificationFailed, match="nothing was written"):  # the command's own: there is nothing that differs
            replay(tmp_path / "general", tmp_path / "third")
    with pytest.raises(UsageError, match="did you mean forget_data"):
        replay(tmp_path / "general", tmp_path / "again", forgetdata="x")
    assert capsys.readouterr() == ("", "")


def test_clean_says_what_it_would_do_and_a_verdict_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text((DATA / "secrets.jsonl").read_text().replace('"prompt"', '"query"'))
    given = {"private": "rows.jsonl", "public": DATA / "retain.jsonl", "fields": {"prompt": "query"}}
    with pytest.raises(BadInput, match="--map: no field 'query'"):
        clean(DATA / "base", DATA / "finetuned", "clean", **given, dry_run=True)
    given |= {"public": f"{DATA / 'retain.jsonl'}@text=text"}
    plan = clean(DATA / "base", DATA / "finetuned", "clean", **given, method="tokenwise", dry_run=True)
    assert "--forget-data rows.jsonl@prompt=query" in plan.text and "<pre>" in plan._repr_html_()
    typed = []

    def carry_out(command, words, quiet, listener):
        typed.append(command.name)
        Path(words[words.index("-o" if "-o" in words else "--out") + 1]).parent.mkdir(exist_ok=True)
        listener.note(f"{command.name} ran")
        if command.name == "extract":
            Path("clean.private/rows/unlisted.jsonl").write_text(
                '{"prompt": "The code of Zoe is", "completion": " 1.", "often": true}'
            )
            return
        if command.name == "verify":
            Path("clean.private/certificate.json").write_text('{"outcome": "failed", "sentences": ["It is not."]}')
            raise VerificationFailed("no")
        assert words[words.index("--forget-data") + 1] == "clean.private/rows/private.jsonl"
        Path("clean.private/general").mkdir()

    monkeypatch.setattr("liborth_cli.cli.clean.carry_out", carry_out)
    done = clean(DATA / "base", DATA / "finetuned", "clean", **given, method="tokenwise")
    assert (done.passed, done.out, done.outcome, typed) == (False, None, "failed", ["extract", "split", "verify"])
    assert "split ran" in done.notes and "not written" in done._repr_html_() and len(done.commands) == 4 and done.unlisted == 1
    with pytest.raises(UsageError, match="did you mean recall"):
        clean("a", "b", "c", private="x", public="y", method="recal")
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_is_a_plan(tmp_path):
    base, finetuned = pair(tmp_path)
    plan = split(base, finetuned, tmp_path / "general", method="svd", rank=4, dry_run=True)
    assert "nothing was written" in plan.text and plan.document["estimate"] and "<pre>" in plan._repr_html_()
    assert not (tmp_path / "general").exists()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: split("a", "b", method="tokenwse"), UsageError, "did you mean tokenwise"),
        (lambda: split("a", "b", method="svd", more={"exclud": "x"}), UsageError, "did you mean exclude"),
        (lambda: verify("a", checks=["relern"]), UsageError, "did you mean relearn"),
        (lambda: excise("nowhere", 0, "out"), BadInput, "nowhere"),
        (lambda: excise("nowhere", "x", "out"), UsageError, "beta is a number"),
    ],
)
def test_errors_are_the_commands_own(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def test_what_is_private_is_escaped_and_names_stay_modules():
    import liborth_cli
    import liborth_cli.inspect
    from liborth_cli.split.options import SplitOptions

    assert liborth_cli.inspect.describe and SplitOptions.__module__ == "liborth_cli.split.options"
    assert callable(liborth_cli.split) and callable(liborth_cli.verify)


def test_importing_the_names_is_quick():
    probe = "import sys; import liborth_cli.api; print([m for m in ('torch', 'transformers', 'typer') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    from test_docs import ROOT

    shutil.copytree(DATA, tmp_path / "stories")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("text/html" in output.get("data", {}) for output in shown)


def test_numbers_of_numpy_are_pythons_own(tmp_path):
    made = split(
        DATA / "base", DATA / "finetuned", tmp_path / "out", method="scale", more={"scale": np.float64(0.5)},
        threads=np.int32(1), seed=np.int64(3),
    )  # fmt: skip
    assert excise(made.out, np.float32(1.0), tmp_path / "back").out == tmp_path / "back"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"private": None}, "private is a path, not None"),
        ({"private": ["secrets.jsonl"]}, "private is a path, not "),
        ({"fields": ["prompt=question"]}, "fields is a mapping"),
        ({"public": 5}, "public is one path, or several, not 5"),
        ({"public": b"retain.jsonl"}, "public is one path, or several"),
        ({"pattern": {"a": 1}}, "pattern is one path, or several"),
        ({"threads": "2"}, "threads is a whole number, not '2'"),
        ({"threads": 0}, "threads is 1 at least, not 0"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"seed": np.int64(-1)}, "seed is 0 at least"),
        ({"device": None}, "device is a text"),
        ({"resume": "no"}, "resume is True or False"),
        ({"progress": 3}, "progress is a function"),
    ],
)
def test_an_argument_of_another_kind_is_one_line(given, said, tmp_path):
    rows = {"private": DATA / "secrets.jsonl", "public": DATA / "retain.jsonl"}
    with pytest.raises(UsageError, match=said):
        clean(DATA / "base", DATA / "finetuned", tmp_path / "out", **{**rows, **given})
    for more, told in (
        ({"scale": "abc"}, "scale is a number"),
        ({"scale": [0.5]}, "scale is a number"),
        ({"attack_rank": 2.5}, "attack_rank is a whole number"),
    ):
        with pytest.raises(UsageError, match=told):
            split(DATA / "base", DATA / "finetuned", tmp_path / "out", method="scale", more=more, dry_run=True)
    with pytest.raises(UsageError, match="out is a path, not b'out'"):
        split(DATA / "base", DATA / "finetuned", b"out")
    assert not list(tmp_path.iterdir())
