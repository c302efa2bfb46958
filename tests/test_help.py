"""What the command line says by itself: its help, what it makes of a slip, and what is true after Ctrl-C."""

import re
import shlex
import time

import pytest
from tiny import pair

from liborth_cli.cli.main import COMMANDS, group
from liborth_cli.console import Console
from liborth_cli.errors import Stopped
from liborth_cli.methods import AMOUNTS, METHODS

GROUP = group()


def examples(command):
    """The command lines in an epilog, continued lines joined."""
    lines = [line.strip() for line in command.epilog.replace("\\\n", "").splitlines()]
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_understood_by_the_commands_they_show(cli, name):
    _, out, _ = cli(name, "--help")
    shown = examples(COMMANDS[name])
    assert shown and "Examples:" in out
    for line in shown:
        assert line.split()[0] == "liborth" and (len(line) < 110 or "\\\n" in COMMANDS[name].epilog), line
        command = GROUP.commands[line.split()[1]]
        command.make_context(command.name, shlex.split(line)[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_has_a_default_shows_it(cli, name):
    _, out, _ = cli(name, "--help")
    flat = re.sub(r"\s+", " ", out)
    command = GROUP.commands[name]
    for parameter in command.get_params(command.make_context(name, [], resilient_parsing=True)):
        default = getattr(parameter.default, "value", parameter.default)
        if parameter.param_type_name == "option" and not (parameter.is_flag or parameter.is_eager or parameter.required):
            entry = next(one for one in re.split(r"\n  (?=-)", out)[1:] if parameter.opts[0] in re.split("[ ,\n]+", one))
            assert "default: " in re.sub(r"\s+", " ", entry), parameter.name  # "none", where there is none
        if default not in (None, False, True, (), []) and not callable(default):
            shown = re.search(rf"{parameter.opts[0]}\b.*?(?= -\w, | --)", flat + " --")
            assert shown and "[" in flat[shown.start() :][:600] and f"default: {default}" in flat, (parameter.name, default)


def test_split_lists_what_is_common_first_under_headings_that_say_what_they_are(cli):
    _, out, _ = cli("split", "--help")
    headings = re.findall(r"^(\S[^\n]*):$", out, re.MULTILINE)
    assert headings[:5] == ["Arguments", "What", "How much", "Data", "Dose: an amount found by measuring"]
    assert headings[-3:] == ["Output", "Run", "Examples"]
    lines = out.splitlines()
    assert lines.index(next(line for line in lines if "--method NAME" in line)) < 15
    assert out.index("--strength") < out.index("--threshold")
    assert "list[" not in out and " range" not in out


@pytest.mark.parametrize("name", METHODS)
def test_a_method_explains_itself(cli, name):
    code, out, err = cli("split", "--help-method", name)
    assert (code, err) == (0, "")
    method = METHODS[name]
    assert method.summary in out and all(f"--{kind}" in out for kind in method.amounts)
    assert all(one.option in out for one in method.settings.values())
    (line,) = (line.strip() for line in out.splitlines() if line.strip().startswith("liborth split"))
    command = GROUP.commands["split"]
    values = command.make_context("split", shlex.split(line)[2:]).params
    assert values["method"] == name and values[method.suggested.kind.replace("-", "_")] is not None


def test_the_list_of_commands_says_of_each_a_whole_sentence(cli):
    code, out, _ = cli("-h")
    assert code == 0 and "..." not in out.partition("Commands:")[2]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_an_amount_to_begin_with(name):
    amount = METHODS[name].suggested
    assert amount.kind in METHODS[name].amounts
    amount.check()
    assert amount.kind in AMOUNTS


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("split", "a", "b", "--method", "tokenwse"), "did you mean tokenwise?"),
        (("split", "--help-method", "contrstive"), "did you mean contrastive?"),
        (("split", "a", "b", "--retain-dta", "x"), "did you mean --retain-data?"),
        (("verify", "--relern"), "did you mean --relearn?"),
        (("verify", "--weights", "residnt"), "did you mean resident?"),
        (("splt",), "did you mean split?"),
        (("split",), "for example: liborth split base/ finetuned/"),
        (("excise", "general"), "for example: liborth excise general/ --beta 0"),
        (("push", "general"), "for example: liborth push general/ acme/shop-assistant"),
        (("split", "a", "b", "--strength", "much"), "valid number"),
        (("split", "a", "b", "--method", "magnitude"), "begin with --energy 0.9"),
    ],
)
def test_a_slip_is_one_line_that_says_what_was_meant(cli, words, says):
    code, out, err = cli(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and says in err and len(err) <= 300


@pytest.mark.parametrize(
    ("words", "module", "kept", "says"),
    [
        (
            ("split", "base", "finetuned", "--rank", 4),
            "liborth_cli.split.split.split_checkpoint",
            True,
            "weight files that are",
        ),
        (("split", "base", "finetuned", "--rank", 4), "liborth_cli.split.split.split_checkpoint", False, "nothing was kept"),
        (("verify", "general", "--integrity"), "liborth_cli.verify.verify.verify", True, "checks that are finished are kept"),
        (("verify", "general", "--integrity"), "liborth_cli.verify.verify.verify", False, "nothing was kept"),
        (("inspect", "base"), "liborth_cli.inspect.describe", False, "nothing was kept"),
    ],
)
def test_after_ctrl_c_it_is_said_what_is_kept_by_that_command(cli, tmp_path, monkeypatch, words, module, kept, says):
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)

    def stop(*_, **__):
        error = Stopped(2)
        error.kept = kept
        raise error

    monkeypatch.setattr(module, stop)
    code, out, err = cli(*words)
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert "stopped by Ctrl-C; " in err and says in err
    assert ("--resume" in err) == kept, "nothing is promised that is not there"


def test_every_command_that_can_be_resumed_says_what_it_keeps():
    resumable = {name for name, one in GROUP.commands.items() if any("--resume" in p.opts for p in one.params)}
    assert resumable == {name for name, command in COMMANDS.items() if command.kept}


def test_long_work_without_a_terminal_is_told_every_half_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("liborth_cli.console.time.perf_counter", lambda: clock[0])
    with Console().progress("train", 100, "steps") as progress:
        for _ in range(100):
            clock[0] += 1.25
            progress.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "train: 24 of 100 steps, 1.2 s a step, 2 min left", "train: 48 of 100 steps, 1.2 s a step, 65 s left"
    ]  # fmt: skip
    assert lines[-1] == "train: 100 steps in 125.0 s (1.2 s a step)" and len(lines) == 5


def test_work_that_does_not_move_is_told_too_and_what_lies_within_it_in_its_line(monkeypatch, capsys):
    monkeypatch.setattr("liborth_cli.console.HALF_A_MINUTE", 0.0)
    console = Console()
    with console.progress("sweep", 2, "models") as outer:
        with console.progress("scoring", 10, "tokens", brief=True) as inner:
            inner.advance(5)
        outer.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert "sweep: 0 of 2 models after 0 s, scoring 50%" in lines and lines[-1].startswith("sweep: 1 model in ")
    assert not any(line.startswith("scoring") for line in lines)
    with console.progress("loader", 1, "models", brief=True) as silent:
        assert silent.watch is not None
        said = ""
        while "loader: 0 of 1 model after " not in said:  # a thread of its own tells, with nothing having moved
            time.sleep(0.05)
            said += capsys.readouterr().err


@pytest.mark.parametrize(
    ("done", "unit", "says"), [(1, "steps", "1 step in 1.0 s (1 step/s)"), (1, "matrices", "1 matrix"), (3, "rows", "3 rows/s")]
)
def test_one_is_singular(monkeypatch, capsys, done, unit, says):
    clock = [0.0]
    monkeypatch.setattr("liborth_cli.console.time.perf_counter", lambda: clock[0])
    with Console().progress("x", done, unit) as progress:
        progress.advance(done)
        clock[0] = 1.0
    assert says in capsys.readouterr().err
