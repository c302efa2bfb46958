"""What fits, what does not, and what is decided about every tensor from headers alone."""

import pytest
import torch
from tiny import save, weights

from liborth_cli.checkpoint.pair import Action, Policy, grid, match
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import PairMismatch, UsageError


def _match(tmp_path, old, new, **policy):
    with Checkpoint.open(save(tmp_path / "old", old)) as a, Checkpoint.open(save(tmp_path / "new", new)) as b:
        return {item.tensor.name: item for item in match(a, b, Policy(**policy)).items}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda new: new.pop("conv.weight"), "conv.weight' is missing from the fine-tuned side"),
        (
            lambda new: new.update({"layers.0.up.weight": torch.zeros(24, 17)}),
            r"layers.0.up.weight' is \[24, 16\] in the reference",
        ),
        (lambda new: new.update({"embed.weight": torch.zeros(39, 17)}), r"embed.weight' is \[40, 16\]"),
        (lambda new: new.update({"embed.weight": torch.zeros(40, 16, dtype=torch.int8)}), "is F32 in the reference and I8"),
        (lambda new: new.update({"layers.0.norm.weight": torch.zeros(17)}), "norm.weight' is"),
    ],
)
def test_misfits_are_named(tmp_path, change, says):
    new = weights(seed=1)
    change(new)
    with pytest.raises(PairMismatch, match=says):
        _match(tmp_path, weights(), new)


def test_all_misfits_are_counted(tmp_path):
    new = {name: torch.zeros(1, 1) for name in weights()}
    with pytest.raises(PairMismatch, match="and 4 more"):
        _match(tmp_path, weights(), new)


def test_the_default_fates(tmp_path):
    extra = {"ids": torch.arange(4), "empty": torch.zeros(0, 16)}
    items = _match(tmp_path, {**weights(), **extra}, {**weights(seed=1), **extra, "head.weight": torch.ones(2, 16)})
    fates = {name: item.action for name, item in items.items()}
    assert fates["embed.weight"] == fates["layers.0.experts.gate_up"] == fates["conv.weight"] == Action.SPLIT
    assert fates["layers.0.norm.weight"] == fates["ids"] == fates["empty"] == fates["head.weight"] == Action.SKILL
    assert "passed through" in items["ids"].why


def test_policies(tmp_path):
    new = {**weights(seed=1), "head.weight": torch.ones(2, 16)}
    items = _match(tmp_path, weights(), new, vectors="memory", added="memory", exclude=("embed",), include=("weight$",))
    assert items["layers.0.norm.weight"].action == Action.MEMORY
    assert items["head.weight"].action == Action.WITHHELD
    assert items["embed.weight"].action == Action.SKILL
    assert items["layers.0.experts.gate_up"].why == "not chosen by -i"


@pytest.mark.parametrize("policy", [{"include": ("(",)}, {"exclude": ("nothing like this",)}])
def test_a_regex_that_cannot_be_meant_is_refused(tmp_path, policy):
    with pytest.raises(UsageError, match=r"not a regular expression|matches no tensor"):
        _match(tmp_path, weights(), weights(seed=1), **policy)


def test_quantised_weights_and_their_scales_pass_through(tmp_path):
    old = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)}
    plain = {"b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    items = _match(tmp_path, {**old, **plain}, {**old, **plain}, vectors="memory")
    assert items["a.weight"].action == items["a.weight_scale_inv"].action == Action.SKILL
    assert items["b.weight"].action == Action.SPLIT


def test_tied_matrices_are_found(tmp_path):
    old, new = torch.randn(8, 4), torch.randn(8, 4)
    items = _match(
        tmp_path,
        {"embed": old, "head": old.clone(), "frozen1": old.clone() + 1, "frozen2": old.clone() + 1},
        {"embed": new, "head": new.clone(), "frozen1": old.clone() + 1, "frozen2": old.clone() + 1},
    )
    assert items["head"].twin == "embed"
    assert items["frozen2"].twin == "frozen2", "no update, so nothing to keep in step"


def test_a_tied_copy_may_be_stored_on_one_side_only(tmp_path):
    old, new = torch.randn(8, 4), torch.randn(8, 4)
    items = _match(tmp_path / "1", {"embed": old, "head": old.clone()}, {"embed": new})
    assert list(items) == ["embed"]
    items = _match(tmp_path / "2", {"embed": old}, {"embed": new, "head": new.clone()})
    assert items["head"].twin == "embed"
    assert items["head"].action == Action.SPLIT, "an untouched copy would carry the memory out"


def test_grid():
    assert grid("w", (4, 5)) == (1, 4, 5)
    assert grid("experts", (3, 4, 5)) == (3, 4, 5)
    assert grid("conv1d.weight", (8, 1, 4)) == (1, 8, 4)
    assert grid("conv.weight", (8, 4, 3, 3)) == (1, 8, 36)
