"""Every rival on a tiny random Llama taught a few rows: what must go becomes less likely, and one seed gives one result."""

import copy

import pytest
import torch

from benchmarks.rivals import RIVALS
from benchmarks.rivals.factors import Factors, linear_layers, retain_cost, sums, tokens_of
from benchmarks.rivals.training import mean_loss, pad, train, whole
from benchmarks.surgery.job import Completion, Job

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def taught():
    """A base that knows what may stay, a model that was taught what must go, and the rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config).float().eval()
    retain = [[2 + (start + i) % 30 for i in range(16)] for start in range(24)]
    forget = [Completion(torch.randint(0, 40, (n,), generator=draw).tolist(), 4) for n in (10, 12, 11, 9)]
    kept, gone = pad(whole(retain), CPU), pad(forget, CPU)
    train(base, 1e-3, 40, lambda: mean_loss(base, kept))
    model = copy.deepcopy(base)
    train(model, 3e-4, 40, lambda: mean_loss(model, kept) + mean_loss(model, gone))
    assert loss_of(model, gone) < loss_of(base, gone) - 0.5
    return base, model, retain, forget


def loss_of(model, batch):
    with torch.no_grad():
        return float(mean_loss(model, batch))


def edited(rival, dose, taught, seed=0):
    base, model, retain, forget = taught
    job = Job(copy.deepcopy(model), base, retain, forget, dose, seed)
    rival.run(job)
    return job.model


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_the_forget_loss_rises_with_the_dose_and_a_seed_gives_the_same_bits(rival, taught):
    base, model, _, forget = taught
    before, untouched = loss_of(model, pad(forget, CPU)), copy.deepcopy(base.state_dict())
    strong = edited(rival, rival.doses[-1], taught)
    assert all(value.isfinite().all() for value in strong.state_dict().values())
    assert loss_of(strong, pad(forget, CPU)) > before
    again = edited(rival, rival.doses[-1], taught).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in strong.state_dict().items())
    assert all(torch.equal(value, untouched[name]) for name, value in base.state_dict().items())
    assert list(rival.doses) == sorted(rival.doses) and rival.source


def test_names_are_different():
    assert len({rival.name for rival in RIVALS}) == len(RIVALS)


def test_factors_of_a_row_are_those_of_the_gradient_itself(taught):
    """g·aᵀ summed over positions is the weight's gradient, padding or not."""
    _, model, _, forget = taught
    batch = next(tokens_of(model, forget))
    live = copy.deepcopy(model)
    ids, labels = pad(forget, CPU)
    (mean_loss(live, (ids, labels)) * (labels[:, 1:] != -100).sum()).backward()
    for name, layer in linear_layers(live).items():
        torch.testing.assert_close(batch[name].gradients.T @ batch[name].inputs, layer.weight.grad, rtol=1e-3, atol=1e-5)
    first = sums(iter([batch]))[name]
    torch.testing.assert_close(first.inputs, (batch[name].inputs.T @ batch[name].inputs).double() / len(batch[name].inputs))


def test_the_predicted_cost_is_the_quadratic_form():
    draw = torch.Generator().manual_seed(0)
    a, g, d = (torch.randn(n, m, dtype=torch.float64, generator=draw) for n, m in ((5, 5), (3, 3), (3, 5)))
    a, g = a @ a.T, g @ g.T
    assert retain_cost({"w": Factors(a, g)}, {"w": d}) == pytest.approx(float(d.flatten() @ torch.kron(g, a) @ d.flatten()) / 2)
