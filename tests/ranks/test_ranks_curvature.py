"""Curvature on several ranks: the same numbers up to rounding, and the same bytes for the same number of ranks."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import files

sys.path.insert(0, str(Path(__file__).parents[1] / "curvature"))
from curvature_cases import make_model, make_tokens

from liborth_cli.curvature.plan import Plan
from liborth_cli.curvature.reduce import agreed
from liborth_cli.ranks import World
from liborth_cli.stream.relay import Turns

WORDS = ("-j", "1", "--dtype", "float64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curvature")
    make_model("llama", folder / "llama"), make_model("mixtral", folder / "mixtral")
    make_tokens(folder, rows=24)
    return folder


def tensors(place):
    return {f"{file.name}/{name}": t for file in sorted(place.glob("*.safetensors")) for name, t in load_file(file).items()}


def close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if "vectors" not in name:  # each may point either way
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


CASES = [
    ("llama", ("--weights", "stream", "--group-tokens", "150"), 2),
    ("llama", ("--moments", "exact", "--diagonal"), 3),
    ("mixtral", ("--weights", "stream",), 2),
    ("llama", ("--parallel", "layers", "--weights", "stream", "--group-tokens", "150"), 3),
    ("mixtral", ("--parallel", "layers", "--moments", "exact"), 2),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words", "size"), CASES)
def test_curvature_of_ranks(ranks, folder, family, words, size):
    command = ("curvature", family, "--data", "data.npy", *WORDS, *words)
    name = f"{family}{size}{len(words)}"
    assert ranks(1, folder, *command, "-o", f"{name}-one").codes == [0]
    for again in ("a", "b"):
        done = ranks(size, folder, *command, "-o", f"{name}-{again}")
        assert done.codes == [0] * size, done
        assert done.out == [f"{name}-{again}\n"] + [""] * (size - 1)
    assert files(folder / f"{name}-a") == files(folder / f"{name}-b")
    assert files(folder / f"{name}-a").keys() == files(folder / f"{name}-one").keys()
    close(tensors(folder / f"{name}-one"), tensors(folder / f"{name}-a"))
    assert not list(folder.glob("*partial*"))


DIE = """
import os, signal, sys
import liborth_cli.stream.walk as walk
from liborth_cli.cli import main

seen, see = [], walk.FiniteCheck.see
def last(*args, **words):
    seen.append(None)
    if rank == 1 and len(seen) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return see(*args, **words)
walk.FiniteCheck.see = last
sys.argv = ["liborth", *WORDS]
main.run()
"""


@pytest.mark.parametrize("parallel", ["data", "layers"])
def test_a_rank_that_dies_in_the_walk_ends_it_in_one_line(ranks, folder, parallel):
    """Others wait for its sums, for its hidden states, or for it to open a connection; none waits for long."""
    words = ["curvature", "llama", "--data", "data.npy", "-j", "1", "--weights", "stream", "--parallel", parallel, "-o", "dead"]
    done = ranks(3, folder, script=DIE.replace("WORDS", repr(words)), env={"LIBORTH_RANK_TIMEOUT": "5"})
    assert [done.codes[0], done.codes[2]] == [8, 8] and done.codes[1] < 0, done
    assert done.err[0].count("error: ") == 1 and "rank 1 on" in done.err[0] and "Traceback" not in "".join(done.err), done
    assert not (folder / "dead").exists()


def test_blocks_of_ranks_that_share_no_disk_are_gathered(ranks, folder):
    """Each rank has the sums of its own blocks; rank 0 takes them and writes them all: the same bytes."""
    command = ("curvature", "llama", "--data", "data.npy", *WORDS, "--parallel", "layers")
    for words in ((), ("--gather",)):
        assert ranks(2, folder, *command, *words, "-o", f"disk{len(words)}").codes == [0, 0]
    assert files(folder / "disk0") == files(folder / "disk1")


def test_blocks_are_dealt_where_rows_do_not_fit_or_would_stream():
    """By what fits: resident rows, else resident blocks, else rows; and blocks, where no row fits a rank that has them all."""

    def chosen(data, layers, parallel="auto"):
        plans = {1: data, 2: replace(layers, layers=True)}
        two = replace(World(), size=2)
        found = agreed(two, plans.get, parallel)
        return found.layers, found.group_tokens

    stays, streams, nothing = (Plan(r, tokens, 8, 0, blockwise=True) for r, tokens in ((True, 100), (False, 50), (False, 0)))
    assert chosen(stays, stays) == (False, 200)
    assert chosen(streams, stays) == (True, 100)
    assert chosen(streams, streams) == (False, 100)
    assert chosen(nothing, streams) == (True, 50)
    assert chosen(stays, streams, "layers") == (True, 50)
    assert chosen(streams, stays, "data") == (False, 100)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_level_has_one_rank_and_every_tensor_a_place(size):
    turns = [Turns(5, rank, size) for rank in range(size)]
    assert sorted(level for one in turns for level in one.levels) == list(range(-1, 6))
    for one in turns:
        places = [one.slot(level) for level in one.levels if level >= 0]
        gradients = [one.slot(level) + 1 for level in one.levels if level < 5]
        assert places == list(range(len(places))) and set(places + gradients) <= set(range(one.slots))


def test_tokens_kept_one_by_one_are_all_there(ranks, folder):
    """Their order is that of the ranks; what they add up to is the same."""
    command = ("curvature", "llama", "--data", "data.npy", *WORDS, "--per-token", "--fisher", "empirical", "--private")
    assert ranks(1, folder, *command, "-o", "tokens-one").codes == [0]
    assert ranks(2, folder, *command, "-o", "tokens-two").codes == [0, 0]
    one, two = (
        {name: t.double().T @ t.double() for name, t in tensors(folder / place).items() if "token_" in name and t.dim() == 2}
        for place in ("tokens-one", "tokens-two")
    )
    assert one
    for name, gram in one.items():
        torch.testing.assert_close(two[name], gram, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("family", "parallel"), [("llama_tied", "layers"), ("mixtral", "data")])
def test_one_walk_measures_and_divides_on_every_rank(ranks, folder, family, parallel):
    """Texts in, general checkpoint and memory out; the fine-tuned files come back bit for bit."""
    base, finetuned = f"{family}-base", f"{family}-finetuned"
    make_model(family, folder / base), make_model(family, folder / finetuned, seed=1)
    for name, seed in (("keep", 1), ("go", 2)):
        make_tokens(folder, rows=9, seed=seed, name=name)
    command = ("split", base, finetuned, "--retain-data", "keep.npy", "--forget-data", "go.npy", "--strength", "0.3", "-j", "1")
    assert ranks(1, folder, *command, "-o", f"{family}-1").codes == [0]
    for again in ("2a", "2b"):
        done = ranks(2, folder, *command, "--parallel", parallel, "-o", f"{family}-{again}")
        assert done.codes == [0, 0], done
        assert "not stored" in done.err[0]
    assert files(folder / f"{family}-2a") == files(folder / f"{family}-2b")
    one, two = (load_file(folder / f"{family}-{name}" / "model.safetensors") for name in ("1", "2a"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    done = ranks(2, folder, "excise", f"{family}-2a", "--beta", "1", "-o", f"{family}-back")
    assert done.codes == [0, 0], done
    assert (folder / f"{family}-back" / "model.safetensors").read_bytes() == (
        folder / finetuned / "model.safetensors"
    ).read_bytes()
