"""Curvature on several ranks: the same numbers up to rounding, and the same bytes for the same number of ranks."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import files

sys.path.insert(0, str(Path(__file__).parents[1] / "curvature"))
from curvature_cases import make_model, make_tokens

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
