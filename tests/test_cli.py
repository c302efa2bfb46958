"""The command line as a user meets it."""

import inspect
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import files, flip, pair, save, weights

from liborth_cli.cli.main import COMMANDS, EVERY
from liborth_cli.cli.options import named_after
from liborth_cli.console import Console


@pytest.mark.parametrize("words", [("--help",), *((c, "--help") for c in COMMANDS), ("--version",)])
def test_help_is_there(cli, words):
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize("words", [(), *((c,) for c in COMMANDS)])
def test_help_imports_nothing_heavy(words):
    heavy = ("torch", "numpy", "scipy", "transformers", "rich", "huggingface_hub", "liborth_kernels")
    probe = f"import sys; sys.argv = {['liborth', *words, '--help']}\nfrom liborth_cli.cli.main import app\n"
    probe += f"try: app()\nexcept SystemExit: pass\nprint([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    # The options of verify are read off the checks, and those compute with numpy.
    assert result.stdout.strip().splitlines()[-1] == ("['numpy']" if words == ("verify",) else "[]")


@pytest.mark.parametrize(
    ("words", "imported"), [(("--version",), []), (("--help",), []), (("-h",), []), (("inspect", "--help"), ["inspect"])]
)
def test_a_start_imports_the_command_that_is_asked_for(words, imported):
    probe = f"import sys; sys.argv = {['liborth', *words]}\nfrom liborth_cli.cli.main import EVERY, run\n"
    probe += "try: run()\nexcept SystemExit: pass\nprint([name for name in EVERY if f'liborth_cli.cli.{name}' in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == str(imported)


def test_the_list_of_commands_says_what_each_says_of_itself(cli):
    _, listed, _ = cli("--help")
    said = {name: inspect.getdoc(command.function).partition("\n")[0] for name, command in COMMANDS.items()}
    assert said == dict(EVERY)
    assert re.findall(r"^  (\w+) +(.+)$", listed.partition("Commands:")[2], re.MULTILINE) == [*said.items()]


@pytest.mark.parametrize(
    "words",
    [
        ("split", "nowhere", "nothing", "--rank", 2),
        ("excise", "nowhere", "--beta", 0),
        ("curvature", "nowhere", "--data", "nothing"),
        ("verify", "nowhere", "--integrity"),
        ("tune", "nowhere", "--method", "full", "--data", "nothing"),
        ("inspect", "nowhere"),
    ],
    ids=lambda words: words[0],
)
def test_a_wrong_path_is_one_line_and_leaves_nothing(cli, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*words)
    assert (code, out, err.count("\n")) == (3, "", 1), err
    assert err.startswith("error: ") and "no" in err and "\x1b" not in err and len(err) <= 300
    assert not list(tmp_path.iterdir())


def test_options_stand_under_headings(cli):
    _, out, _ = cli("tune", "--help")
    headings = re.findall(r"^(\S[^\n]*):$", out, re.MULTILINE)
    methods = ["--method ogd", "--method sinks", "--method lora"]
    assert headings == ["Arguments", "What", "Data", *methods, "Training", "Output", "Run", "Examples"]
    assert out.index("--method sinks:") < out.index("--rehearse") < out.index("--method lora:") < out.index("--targets")


@pytest.mark.parametrize("command", ["split", "excise", "curvature"])
def test_writing_commands_share_their_flags(cli, command):
    _, out, _ = cli(command, "--help")
    for flag in ("--device", "-j", "--seed", "--out-shard-size", "--force", "--resume", "--dry-run", "--quiet", "-v", "--json"):
        assert re.search(rf"(^|\s|,){flag}\b", out), flag


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "offered", "others"),
    [
        ("spl", "split", "excise"),
        ("split --method tok", "tokenwise", "svd"),
        ("split --help-method ekf", "ekfac", "svd"),
        ("verify --relearn-s", "--relearn-steps", "--retention"),
        ("verify --reason", "--reasoning", "--relearn"),
        ("split b", "", "excise"),
    ],
)
def test_completion_offers_commands_methods_checks_and_paths(cli, monkeypatch, shell, typed, offered, others):
    """What a shell asks after Tab, asked as it does; where nothing is offered, it completes paths itself."""
    line = f"liborth {typed}"
    monkeypatch.setenv("_LIBORTH_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    _, said, error = cli()
    assert (offered in said if offered else said.strip() in ("", "_files")) and others not in said, error


def test_bash_completes_methods_and_paths(tmp_path):
    """The script that --show-completion prints, in a real bash."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "liborth").write_text(f'#!/bin/sh\nexec {sys.executable} -m liborth_cli "$@"\n')
    (tmp_path / "liborth").chmod(0o755)
    script = """
eval "$(env _LIBORTH_COMPLETE=source_bash liborth)"
COMP_WORDS=(liborth split --method ekf) COMP_CWORD=3
_liborth_completion liborth
echo "${COMPREPLY[*]}"
complete -p liborth
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, env=environment).stdout
    assert "ekfac" in said and "-o default" in said  # bash's own completion of paths where we offer nothing


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rank", 4, "--energy", 0.5), "exclude each other"),
        (("--method", "magnitude"), "needs --energy or --density"),
        (("--method", "magnitude", "--rank", 4), "takes --energy or --density, not --rank"),
        (("--method", "scale", "--scale", 2), "--scale takes a number from 0 to 1"),
        (("--energy", 1.5), "--energy takes a number"),
        (("--rank", 0), "--rank takes a whole number from 1, not 0"),
        (("--rank", 500), "no matrix here has more than 16 singular directions"),
        (("--rank", 4, "--out-shard-size", "many"), "'many' is not a size"),
        (("--rank", 4, "-i", "("), "not a regular expression"),
        (("--rank", 4, "-e", "nothing"), "matches no tensor"),
        (("--rank", 4, "--device", "abacus"), "--device abacus"),
        (("--rank", 4, "--device", "cuda:7"), "CUDA devices"),
        (("--rank", 4, "--alpha", "nan"), "--alpha takes a finite number"),
        (("--rank", 4, "--alpha", "1e308"), "--alpha takes a finite number, 1e+06 at most"),
    ],
)
def test_usage_errors(cli, tmp_path, words, says):
    base, finetuned = pair(tmp_path)
    code, out, err = cli("split", base, finetuned, "-o", tmp_path / "out", *words)
    assert (code, out) == (2, ""), err
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_rank_that_only_some_matrices_have(cli, tmp_path):
    """Matrices with fewer directions are kept whole and named; the others are cut."""
    base, finetuned = pair(tmp_path)
    assert cli("split", base, finetuned, "--rank", 12, "-o", tmp_path / "out")[0] == 0
    tensors = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["tensors"]
    assert tensors["conv.weight"]["why"] == "8 singular directions, not more than --rank"
    assert tensors["embed.weight"]["rank"] == 12


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_nonfinite_weights_are_refused_by_name(cli, tmp_path, value, side):
    base, finetuned = pair(tmp_path)
    tensors = weights(seed=int(side == "finetuned"))
    tensors["layers.1.up.weight"][3, 4] = float(value)
    save(tmp_path / side, tensors)
    words = ("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    code, _, err = cli(*words)
    assert code == 3
    assert "'layers.1.up.weight' (model.safetensors)" in err
    assert "--nonfinite passthrough" in err
    assert sorted(os.listdir(tmp_path)) == ["base", "finetuned"]
    assert cli(*words, "--nonfinite", "passthrough")[0] == 0
    cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (finetuned / "model.safetensors").read_bytes()


def test_a_pair_that_does_not_fit(cli, tmp_path):
    save(tmp_path / "base", weights()), save(tmp_path / "finetuned", {**weights(), "embed.weight": torch.zeros(40, 10)})
    code, out, err = cli("split", tmp_path / "base", tmp_path / "finetuned", "--method", "svd", "--rank", 4)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "'embed.weight' is [40, 16] in the reference and [40, 10]" in err


HOSTILE = "[bold red]\x1b[31m<script>alert(1)</script>\u202e.weight"


@pytest.mark.parametrize("words", [("-v",), ("--dry-run",), ()])
def test_hostile_tensor_names_stay_text(cli, tmp_path, words):
    save(tmp_path / "base", {HOSTILE: torch.zeros(8, 8), "n": torch.zeros(3)})
    save(tmp_path / "finetuned", {HOSTILE: torch.randn(8, 8), "n": torch.zeros(3), HOSTILE + "2": torch.ones(2, 2)})
    code, out, err = cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 2, "-o", tmp_path / "out", *words)
    assert code == 0
    _, listing, _ = cli("inspect", tmp_path / "finetuned", "-v")
    assert "[bold red]" in listing
    for text in (out, err, listing):
        assert "\x1b" not in text
        assert "\u202e" not in text
    save(tmp_path / "bad", {HOSTILE: torch.full((8, 8), float("nan")), "n": torch.zeros(3)})
    code, _, err = cli("split", tmp_path / "base", tmp_path / "bad", "--rank", 2, "-o", tmp_path / "x")
    assert (code, "\x1b" in err, err.count("\n")) == (3, False, 1)


def test_dry_run_writes_nothing_and_says_the_cost(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    before = files(tmp_path)
    code, out, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out", "--dry-run")
    assert (code, err) == (0, "")
    assert "nothing was written" in out
    assert "norm or bias" in out
    code, out, _ = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out", "--dry-run", "--json")
    document = json.loads(out)
    assert document["tensors"]["embed.weight"]["action"] == "split"
    assert document["estimate"]["disk_bytes"] > sum(f.stat().st_size for f in finetuned.iterdir())
    assert files(tmp_path) == before
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    assert sum(map(len, files(tmp_path / "out").values())) < document["estimate"]["disk_bytes"] + 20_000
    code, out, _ = cli("excise", tmp_path / "out", "--beta", 0.5, "-o", tmp_path / "x", "--dry-run")
    assert (code, "would write 1 weight files" in out, (tmp_path / "x").exists()) == (0, True, False)


def test_identical_sides_and_foreign_code_are_remarked_on(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_evil.Evil"}}')
    code, _, err = cli("split", base, base, "--rank", 4, "-o", tmp_path / "out")
    assert (code, "hold the same weights" in err, "auto_map" in err) == (0, True, True)
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    code, _, err = cli("split", base, finetuned, "-e", ".", "--rank", 4, "-o", tmp_path / "none")
    assert (code, "excluded by -e" in err) == (0, True)


def test_stdout_is_the_result_only(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    code, out, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "split: " in err
    assert "certified" in err
    code, out, err = cli("excise", tmp_path / "out", "--beta", 0, "-o", tmp_path / "zero", "-q")
    assert (code, out, err) == (0, f"{tmp_path / 'zero'}\n", "")


def test_default_output_names(liborth, tmp_path):
    pair(tmp_path)
    assert liborth("split", "base", "finetuned", "--method", "scale", "--scale", 0.5, "-q").stdout == "finetuned-scale\n"
    assert liborth("excise", "finetuned-scale/", "--beta", "0.25", "-q").stdout == "finetuned-scale-beta0.25\n"


def test_a_terminal_sees_progress_and_a_pipe_does_not(tmp_path):
    base, finetuned = pair(tmp_path)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "liborth_cli", "split", base, finetuned, "--rank", "4", "-o", tmp_path / "out"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment)
    out = process.communicate()[0]
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    assert process.returncode == 0
    assert out.decode() == f"{tmp_path / 'out'}\n"
    assert "\x1b[" in shown, "a bar on a terminal"


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("", False)])
def test_no_color_leaves_no_escape_sequence(capsys, monkeypatch, value, plain):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", value)
    Console().table(("name", ">value"), [("a", "1")], "Title", out=True)
    assert ("\x1b[" not in capsys.readouterr().out) is plain


@pytest.mark.parametrize(
    ("model", "name"),
    [(".", "here"), ("./", "here"), ("deep/model/", "model"), ("org/name@rev", "name"), ("hf://org/name", "name")],
)
def test_an_output_is_named_after_its_input_wherever_one_stands(tmp_path, monkeypatch, model, name):
    (tmp_path / "here" / "deep" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert named_after(model) == name


CELLS = ("model.layers.4.self_attn.k_proj.weight", "123456.7", "0.2409 … 0.3216", "share of tokens that come by themselves", "")


@pytest.mark.parametrize("columns", [40, 60, 80, 160, None])
def test_a_table_is_as_wide_as_it_is_asked_to_be_and_cuts_nothing(capsys, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    Console().table(("tensor", ">value", ">95 % interval", "what it is", "nothing"), [CELLS, CELLS], out=True)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= (columns or 160)
    assert shown.count("123456.7") == shown.count("0.2409 … 0.3216") == 2
    assert "".join(shown.split()).count("themselves") == 2
    assert "…" not in shown.replace("0.2409 … 0.3216", "") and "nothing" not in shown


def test_a_damaged_general_checkpoint_is_not_copied(cli, tmp_path):
    """β = 0 is a copy, and a copy of something else must not get a manifest of its own."""
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    flip(file)
    code, _, err = cli("excise", tmp_path / "out", "--beta", 0, "-o", tmp_path / "zero")
    assert (code, "damaged" in err) == (3, True)
    assert not (tmp_path / "zero").exists()


def test_damaged_or_strange_memory_is_refused(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    for out, rank in (("a", 4), ("b", 5)):
        cli("split", base, finetuned, "--rank", rank, "-o", tmp_path / out)
    code, _, err = cli("excise", tmp_path / "a", "--beta", 1, "--memory", tmp_path / "b.private", "-o", tmp_path / "x")
    assert code in (3, 4)
    assert "does not belong" in err or "damaged" in err
    file = tmp_path / "a.private" / "memory.safetensors"
    flip(file)
    code, _, err = cli("excise", tmp_path / "a", "--beta", 1, "-o", tmp_path / "x")
    assert (code, "damaged" in err) == (3, True)
    general = tmp_path / "b" / "model.safetensors"
    flip(general)
    code, _, err = cli("excise", tmp_path / "b", "--beta", 1, "-o", tmp_path / "x")
    assert (code, "does not belong to this model.safetensors" in err) == (4, True)
    save_file({"xor/a": torch.zeros(1)}, tmp_path / "m.safetensors")
    code, _, err = cli("excise", tmp_path / "b", "--beta", 1, "--memory", tmp_path / "m.safetensors", "-o", tmp_path / "x")
    assert (code, "not a memory file" in err) == (3, True)
    assert not (tmp_path / "x").exists()


def test_excise_wants_a_number_and_a_split(cli, tmp_path):
    base, _ = pair(tmp_path)
    assert cli("excise", base, "--beta", "nan", "-o", tmp_path / "x")[0] == 2
    code, _, err = cli("excise", base, "--beta", 1, "-o", tmp_path / "x")
    assert (code, "no liborth.manifest.json here" in err) == (3, True)
    code, _, err = cli("excise", base, "--beta", 1, "--unverified", "-o", tmp_path / "x")
    assert (code, "no memory file here" in err) == (3, True)
    assert cli("excise", base)[0] == 2


def test_hub_names(cli, tmp_path, monkeypatch):
    """A repository in the local cache is found by name and revision; one that is not there is refused without a network."""
    commit = "a" * 40
    base, finetuned = pair(tmp_path)
    repo = tmp_path / "hub" / "models--org--tuned"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    finetuned.rename(repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number, name in enumerate(("org/tuned", "hf://org/tuned", f"org/tuned@{commit}")):
        code, _, err = cli("split", base, name, "--rank", 4, "-o", tmp_path / str(number))
        assert code == 0, err
    manifest = json.loads((tmp_path / "0" / "liborth.manifest.json").read_text())
    assert (manifest["inputs"]["finetuned"]["title"], manifest["inputs"]["finetuned"]["commit"]) == ("org/tuned", commit)
    code, _, err = cli("split", base, "org/absent", "--rank", 4, "-o", tmp_path / "x")
    assert (code, err.count("\n")) == (3, 1)
    for strange in ("org/a/b", "hf://nonsense at all", "./missing"):
        assert cli("split", base, strange, "--rank", 4, "-o", tmp_path / "x")[0] == 3


@pytest.mark.slow
def test_demo(liborth, tmp_path):
    document = json.loads(liborth("demo", "-o", tmp_path / "kept", "--json").stdout)
    assert {"base", "finetuned", "secrets.jsonl", "retain.jsonl"} <= set(os.listdir(tmp_path / "kept"))
    assert (tmp_path / "kept" / "general.private" / "memory.safetensors").exists()
    assert document["bit_exact"] is True and document["clean_has_memory"] is False and document["codes"] == 8
    found = {name.strip().split(":")[-1].strip(): row for name, row in document["models"].items()}
    assert found["restored (beta 1)"] == found["fine-tuned"]
    assert found["fine-tuned"]["recited"] == 8 and found["base (before fine-tuning)"]["recited"] == 0
    edit, svd, scale = found["tokenwise, λ 0.1 (beta 0)"], found["svd, rank 32"], found["scale, same size of edit"]
    assert edit["recited"] == 0 and edit["secret"] > 4 and edit["skill_retention"] > 0.995
    assert svd["recited"] > 0 and scale["recited"] > 0
    assert edit["skill_retention"] > max(svd["skill_retention"], scale["skill_retention"]) + 0.02
    contrastive, decoys = found["contrastive, λ 0.1"], found["tokenwise, only decoys given, λ 0.3"]
    assert contrastive["recited"] == 0 and edit["skill_retention"] > contrastive["skill_retention"]
    assert decoys["recited"] == 0 and decoys["secret"] > 4 and decoys["skill_retention"] > 0.99
