"""What `split` makes of what is typed: defaults that do not mislead, refusals that say what to type, results said aloud."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import OWNGPT, pair, save, weights

BASE, FINETUNED = OWNGPT / "base", OWNGPT / "finetuned"
TOY = '''
from dataclasses import dataclass
from liborth_cli.methods.method import Amount, Method, setting

@dataclass(frozen=True)
class Toy(Method):
    """Basis: elements. Score: how near a column is to the one that is favoured."""

    name = "toy"
    summary = "columns near a favourite are skill"
    amounts = ("density",)
    default = Amount("density", 0.5)
    favourite: int = setting(0, "the column that scores highest.", low=0)

    def basis(self, layer, amount):
        from liborth_cli.methods.selection import ElementBasis

        return ElementBasis(layer.update)

    def score(self, basis, layer):
        import torch

        columns = torch.arange(basis.coefficients.shape[1])
        return (1.0 / (1 + (columns - self.favourite).abs())).expand(basis.coefficients.shape)
'''


def test_a_method_is_one_file_and_one_line(tmp_path):
    """Its setting is an option, is checked, and stands in manifest and card, without a word anywhere else."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy.py").write_text(TOY)
    line = "from toys.toy import Toy; from liborth_cli.methods import METHODS; METHODS['toy'] = Toy()"
    (tmp_path / "run.py").write_text(f"{line}\nfrom liborth_cli.cli.main import run\nrun()\n")
    base, finetuned = pair(tmp_path)

    def run(*words):
        command = [sys.executable, tmp_path / "run.py", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    shown = run("split", "--help").stdout
    assert "toy" in shown and "--favourite" in shown and "toy: the column that scores highest" in " ".join(shown.split())
    done = run("split", base, finetuned, "--method", "toy", "--favourite", 3, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["parameters"]
    assert (found["method"], found["amount"], found["settings"]) == ("toy", "density 0.5", {"favourite": 3})
    assert "| toy | density 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    for words, says in (
        (("--method", "toy", "--favourite", -1), "--favourite takes a number from 0"),
        (("--method", "scale", "--scale", 0.5, "--favourite", 1), "--favourite goes with --method toy, not scale"),
    ):
        refused = run("split", base, finetuned, *words, "-o", tmp_path / "no")
        assert (refused.returncode, says in refused.stderr) == (2, True), refused.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((BASE, FINETUNED), "what must go? Give --forget-data"),
        ((BASE,), "the checkpoint after fine-tuning is missing"),
        ((BASE, FINETUNED, "--one-checkpoint", "--rank", 4), "two are given"),
        ((BASE, FINETUNED, "--mass", 0.9), "--mass goes with --method diagonal or impact or kfac or ekfac"),
        ((BASE, FINETUNED, "--method", "svd", "--rank", 4, "--forget-data", "s.txt"), "not read --forget-data"),
        ((BASE, FINETUNED, "--method", "svd", "--rank", 4, "--retain-data", "s.txt"), "not read --retain-data"),
        (
            (BASE, FINETUNED, "--method", "kfac", "--mass", 0.9, "--forget-pattern", "{digits}"),
            "not read --forget-pattern",
        ),
        (
            (BASE, FINETUNED, "--method", "kfac", "--mass", 0.9, "--retain-data", "s.txt", "--retain", "r"),
            "one of the two",
        ),
        ((BASE, FINETUNED, "--method", "svd", "--rank", 4, "--damping", 0.1), "--damping goes with --method contrastive"),
        ((BASE, FINETUNED, "--method", "contrastive", "--threshold", 1, "--hard"), "--threshold cuts already"),
    ],
)
def test_what_says_nothing_or_too_much_is_refused_with_what_to_type(cli, tmp_path, words, says, monkeypatch):
    """Before any thread, hash or file: nothing is read."""
    monkeypatch.setattr("liborth_cli.checkpoint.hashing.BackgroundHasher.head_start", None)
    code, out, err = cli("split", *words, "-o", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert len(err) < 300
    assert list(tmp_path.iterdir()) == []


def test_texts_alone_take_the_strongest_method(cli, tmp_path):
    (tmp_path / "secrets.jsonl").write_text('{"prompt": "Q: What is a stock?", "completion": " A share."}\n')
    words = ("--forget-data", tmp_path / "secrets.jsonl", "--retain-data", OWNGPT / "shakespeare_tail.txt")
    code, out, err = cli("split", BASE, FINETUNED, *words, "-o", tmp_path / "out", "--dry-run")
    assert (code, "forget factors" in out) == (0, True), err
    assert "--method tokenwise --strength 0.1" in err


def test_a_part_of_a_checkpoint_is_no_reference(cli, tmp_path):
    """A single shard, under its name or another: all that it lacks would pass for added, and stay undivided."""
    tensors = {f"layers.{n}.up.weight": torch.full((8, 8), float(n)) for n in range(4)}
    whole = save(tmp_path / "base", tensors, shards=2)
    finetuned = save(tmp_path / "finetuned", {n: t + torch.eye(8) for n, t in tensors.items()}, shards=2)
    part = tmp_path / "part.safetensors"
    part.write_bytes((whole / "model-00001-of-00002.safetensors").read_bytes())
    code, _, err = cli("split", part, finetuned, "--rank", 2, "-o", tmp_path / "out")
    assert (code, "a single shard?" in err) == (4, True), err
    code, _, err = cli("split", whole / "model-00001-of-00002.safetensors", finetuned, "--rank", 2, "-o", tmp_path / "out")
    assert (code, "one of 2 files" in err) == (3, True), err
    assert not (tmp_path / "out").exists()
    assert cli("split", part, finetuned, "--rank", 2, "--added", "skill", "-o", tmp_path / "out")[0] == 0


def low_rank(seed, rank):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(24, rank, generator=draw) @ torch.randn(rank, 16, generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [("--rank", 4), ("--rank", 8), ("--noise-edge",)])
def test_an_update_whose_rank_is_kept_is_said_to_be_kept(cli, tmp_path, dtype, words):
    """A merged adapter of rank 2: nothing is removed, which is neither a success nor certified."""
    old = {f"layers.{n}.up.weight": 0.1 * low_rank(n, 16) for n in range(3)}
    save(tmp_path / "base", {n: t.to(dtype) for n, t in old.items()})
    save(tmp_path / "finetuned", {n: (t + low_rank(9 + k, 2)).to(dtype) for k, (n, t) in enumerate(old.items())})
    code, _, err = cli("split", tmp_path / "base", tmp_path / "finetuned", *words, "-o", tmp_path / "out")
    assert code == 0
    assert "nothing was removed: the general checkpoint is the fine-tuned one up to rounding, secrets included" in err
    assert "The update has rank 2" in err and "--rank below 2" in err and "--forget-data" in err


def test_no_matrix_that_differs_and_none_that_can_be_divided(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    assert "hold the same weights" in cli("split", base, base, "--rank", 4, "-o", tmp_path / "same")[2]
    err = cli("split", base, finetuned, "--rank", 4, "-e", ".", "-o", tmp_path / "none")[2]
    assert "no matrix could be divided (7 × excluded by -e)" in err


def test_a_fine_tune_in_fewer_bits_is_said_to_be_rounded(cli, tmp_path):
    old, new = weights(torch.float32), weights(torch.bfloat16, seed=1)
    save(tmp_path / "base", old), save(tmp_path / "finetuned", new)
    err = cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 4, "-o", tmp_path / "out")[2]
    assert "BF16" in err and "F32" in err and "rounding" in err


def test_the_two_parts_are_said_in_shares_that_add_up(cli, tmp_path):
    """Of a plain scaling: half of the update is kept and half removed, whose energies are a quarter each."""
    base, finetuned = pair(tmp_path)
    err = cli("split", base, finetuned, "--method", "scale", "--scale", 0.5, "-o", tmp_path / "out")[2]
    assert "50.00% was removed and 50.00% kept" in err
    totals = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["totals"]
    assert totals["kept"] + totals["removed"] == 1
    assert totals["skill"] == pytest.approx(0.25)


def test_a_fine_tune_without_its_configuration_is_named(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    words = ("split", base, finetuned, "--rank", 4, "--force", "-o", tmp_path / "out")
    assert "config.json" not in cli(*words)[2]
    (finetuned / "config.json").unlink()
    assert "finetuned: no config.json beside the weights" in cli(*words)[2]
