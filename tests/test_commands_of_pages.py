"""Commands that the pages show are typed: every one is read as the command line reads it, and what can be tried is carried out.

`--dry-run` is added where a command has it, so nothing is trained or split here; the quickstart is carried out as it stands in
test_quickstart.py.
"""

import json
import shlex

import pytest
from test_docs import PAGES, blocks

from liborth_cli.cli.main import COMMANDS, group
from liborth_cli.demo import DATA

NOT_CARRIED_OUT = {
    "verify": "takes minutes: tests/verify, and test_quickstart.py as it stands in a page",
    "push": "sends to the hub: tests/hub, against a server",
    "demo": "test_demo.py",
    "doctor": "test_cli.py",
    "replay": "needs the run that it repeats: test_replay.py",
    "clean": "test_clean.py, and its dry run here",
}
"""Commands that are only read here → where they are carried out."""
ELSEWHERE = (
    "tuned", "out", "clean.private", "certificate.json", "general/liborth", "/shared", "forget-", "at-", "FACTORS", "MODEL",
    "retain/", "forget/", "model",
)  # fmt: skip
"""What other commands of a page write, or a reader has: a command that reads it is only read."""
DRY = {"split", "curvature", "excise", "tune", "clean"}
HERE = {"base": "base", "finetuned": "finetuned", "secrets.jsonl": "secrets", "unseen.jsonl": "unseen", "fresh.jsonl": "unseen",
        "held_out.jsonl": "held_out", "public.jsonl": "retain", "retain.jsonl": "retain", "work.jsonl": "retain",
        "texts.jsonl": "retain", "new.jsonl": "retain", "mix.jsonl": "retain"}  # fmt: skip
"""What a reader is taken to have → what of the pair that ships stands for it."""


def shown():
    """Every whole command in a block of a page, and in a command's own help; a line with … is none."""
    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.name not in ("cli.md", "log.md")]
    helps = "\n".join(line for command in COMMANDS.values() for line in command.examples).replace("\\\n    ", "")
    lines = [line for page in pages for line in blocks(page)] + helps.splitlines()
    whole = {line.replace(" [", " ").replace("]", "") for line in lines if not any(mark in line for mark in ("…", "$", " | "))}
    return sorted(line for line in whole if line.startswith("liborth "))


LINES = [line for line in shown() if len(shlex.split(line)) > 2]


def test_there_are_commands_and_every_kind_is_among_them():
    assert len(LINES) > 50 and {line.split()[1] for line in LINES} | {"doctor"} >= COMMANDS.keys()


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_read_as_it_stands(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, name, *words = shlex.split(line)
    command = group().commands[name]
    with command.make_context(name, words, resilient_parsing=False):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory, once):
    folder = tmp_path_factory.mktemp("pages")
    for name, source in HERE.items():
        if not name.endswith(".jsonl"):
            (folder / name).symlink_to(DATA / source)
            continue
        rows = (DATA / f"{source}.jsonl").read_text().splitlines()[:8]
        (folder / name).write_text("\n".join(rows) + "\n")
    prompts = [{"prompt": json.loads(row)["prompt"]} for row in (DATA / "secrets.jsonl").read_text().splitlines()[:2]]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    once("split", folder / "base", folder / "finetuned", "--rank", 8, "-o", folder / "general", "-q")
    (folder / "restored").symlink_to(DATA / "finetuned")
    (folder / "demo").symlink_to(DATA)
    return folder


def tried():
    for line in LINES:
        name, words = line.split()[1], shlex.split(line)[2:]
        targets = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-o", "--out", "--report")]
        reads = [word for word in words if word not in targets]
        if (name in DRY or name not in NOT_CARRIED_OUT) and not any(word.startswith(ELSEWHERE) for word in reads):
            yield line


@pytest.mark.slow
@pytest.mark.parametrize("line", list(tried()))
def test_a_command_that_can_be_tried_is_carried_out(line, place, cli, monkeypatch):
    monkeypatch.chdir(place)
    _, name, *words = shlex.split(line)
    words = [word.replace("@prompt=instruction,completion=response", "") for word in words]
    words += ["--dry-run"] if name in DRY and "--dry-run" not in words else []
    words += ["--max-new-tokens", "2"] if name == "generate" else []
    words += ["--force"] if name == "export" else []
    if name in DRY and "-o" in words:
        words[words.index("-o") + 1] = "made"
    code, _, error = cli(name, *words)
    fails = ("--to peft" in line and "--whole" not in line) or "--to gguf-lora" in line or "--diff finetuned" in line
    assert code == 0 or (fails and code == 5), error
