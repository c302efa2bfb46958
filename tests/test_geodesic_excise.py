"""`excise --path geodesic`: exact at its ends, the formula between them, and refused where there is no metric."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import few

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.demo import DATA
from liborth_cli.methods.geodesic import Chart


@pytest.fixture(scope="module")
def place(once, tmp_path_factory):
    """A split that forgets everything, and factors of a few rows at both of its ends."""
    found = tmp_path_factory.mktemp("geodesic")
    rows = few(found, 4)
    once("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.02, "-o", found / "general", "-q")
    for name, model in (("at-general", found / "general"), ("at-finetuned", DATA / "finetuned")):
        once("curvature", model, "--data", rows, "--truncate", "--seq-len", 64, "-o", found / name, "-q")
    return found


def words(place, beta, *more):
    sets = ("--retain-general", place / "at-general", "--retain-finetuned", place / "at-finetuned")
    return ("excise", place / "general", "--beta", beta, "--path", "geodesic", *sets, *more)


@pytest.mark.parametrize("beta", [0, 1])
def test_its_ends_are_the_two_checkpoints_to_the_bit(cli, place, tmp_path, beta):
    assert cli(*words(place, beta, "-o", tmp_path / "out", "-q"))[0] == 0
    whole = (place / "general" if beta == 0 else DATA / "finetuned") / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole.read_bytes()


def test_between_them_every_matrix_is_where_the_formula_puts_it(cli, place, tmp_path):
    assert cli(*words(place, 0.5, "-o", tmp_path / "out", "-q"))[0] == 0
    assert cli("excise", place / "general", "--beta", 0.5, "-o", tmp_path / "line", "-q")[0] == 0
    general, tuned, made, line = (
        load_file(folder / "model.safetensors")
        for folder in (place / "general", DATA / "finetuned", tmp_path / "out", tmp_path / "line")
    )
    bent = 0
    with FactorSet.open(place / "at-general") as start, FactorSet.open(place / "at-finetuned") as end:
        tensors = [layer.tensor for layer in start.layers.values()]
        curved = {layer.tensor: name for name, layer in start.layers.items() if tensors.count(layer.tensor) == 1}
        for tensor, value in made.items():
            if tensor not in curved:
                assert torch.equal(value, line[tensor]), "what has no factors of its own stays on the line"
                continue
            name = curved[tensor]
            step = Chart.of(start.layer(name), end.layer(name)).travelled(
                tuned[tensor].double() - general[tensor].double(), 0.5
            )
            assert torch.equal(value, (general[tensor].double() + step).to(value.dtype))
            bent += not torch.equal(value, line[tensor])
    assert bent == len(curved) == 35


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (("--beta", 1.5), 2, "no metric"),
        (("--beta", 0.5, "--path", "straight"), 2, "--path geodesic goes with"),
        (("--beta", 0.5, "--alpha", 1), 2, "leave out --alpha"),
        (("--beta", 0.5, "--retain-general", "at-finetuned"), 2, "the straight line"),
        (("--beta", 0.5, "--retain-finetuned", "at-general", "--retain-general", "at-finetuned"), 4, "not measured at"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_line(cli, place, tmp_path, change, code, says):
    change = tuple(place / word if str(word).startswith("at-") else word for word in change)
    found, _, err = cli(*words(place, 0.5), *change, "-o", tmp_path / "out", "-q")
    assert (found, err.count("\n")) == (code, 1) and says in err, err
    assert not (tmp_path / "out").exists()
