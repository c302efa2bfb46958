"""Modules that do their own products give what the modes give, on every family; other uses of weights are left to the modes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "curvature"))
from curvature_cases import FAMILIES, make_model, make_tokens, relative
from run_curvature import estimate
from test_curvature_invariance import tensors

from liborth_cli.stream import walk
from liborth_cli.stream.direct import Direct

MODES = {"gpt2", "mixtral", "qwen3_moe", "falcon"}
"""Families whose matrices do not all lie in linear modules."""


@pytest.fixture
def taken(monkeypatch):
    """Have the modules do their products on the CPU too; returns which blocks were taken over, or not."""
    found = []
    begin, take = walk.ForwardWalk.__init__, Direct.of.__func__  # type: ignore[attr-defined]

    def watched(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._watched = kwargs.get("watched", False)

    def noted(cls, *args):
        found.append(take(cls, *args))
        return found[-1]

    monkeypatch.setattr(walk.ForwardWalk, "__init__", watched)
    monkeypatch.setattr(Direct, "of", classmethod(noted))
    return found


@pytest.mark.parametrize("family", [*FAMILIES])
def test_every_family(family, tmp_path, request):
    model, data = make_model(family, tmp_path / "model"), make_tokens(tmp_path)
    options = {"weights": "stream", "moments": "marginal", "diagonal": True}
    with estimate(model, data, tmp_path / "modes", **options) as modes:
        found = request.getfixturevalue("taken")
        with estimate(model, data, tmp_path / "direct", **options) as direct:
            one, two = tensors(modes), tensors(direct)
            assert one.keys() == two.keys()
            assert max(relative(two[key], one[key]) for key in one) <= 2e-6
    assert found
    assert all((each is None) == (family in MODES) for each in found)


@pytest.mark.parametrize("more", [{}, {"per_token": True}, {"moments": "exact"}])
def test_in_bfloat16(more, tmp_path, request):
    """Products are rounded as under the modes; a bias is added before that there, and after it here."""
    model, data = make_model("qwen3", tmp_path / "model"), make_tokens(tmp_path)
    with estimate(model, data, tmp_path / "modes", weights="stream", dtype="bfloat16", **more) as modes:
        found = request.getfixturevalue("taken")
        with estimate(model, data, tmp_path / "direct", weights="stream", dtype="bfloat16", **more) as direct:
            one, two = tensors(modes), tensors(direct)
            assert one.keys() == two.keys()
            for key in one:
                if not key.startswith(("eigen", "second")):  # eigenvectors of close eigenvalues turn
                    # What is kept was rounded to bfloat16, as the product took it: half of 2⁻⁸ an entry, at random.
                    assert relative(two[key], one[key]) <= 2**-8, key
    assert all(found)


def test_a_linear_module_is_itself_again_afterwards(tmp_path, taken):
    module = torch.nn.Linear(3, 2).requires_grad_(False)
    direct = Direct({module: None})  # type: ignore[dict-item]
    x = torch.randn(4, 3, requires_grad=True)
    with direct.telling(None):
        found = module(x)
    assert "forward" not in vars(module)
    assert torch.allclose(found, module(x))
    found.sum().backward()
    assert torch.allclose(x.grad, module.weight.sum(0).expand(4, 3))
