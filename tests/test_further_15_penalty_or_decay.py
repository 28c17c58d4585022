"""further/penalty_or_decay.py: penalty, gradient and decay against torch.optim, and what its networks decay."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn, optim

from common.data import Task, load, make_split
from common.training import fit

TASK = Task((1, 8, 8), 10)
SGD, MOMENTUM = partial(optim.SGD, lr=0.1), partial(optim.SGD, lr=0.1, momentum=0.9)
ADAM, ADAMW = partial(optim.Adam, lr=0.01), partial(optim.AdamW, lr=0.01)


@pytest.fixture
def script():
    return load_script("further/penalty_or_decay.py")


def batches():
    x, y = make_split(load("digits"), seed=0, examples=200).train
    return [(x[i : i + 50].double(), y[i : i + 50]) for i in (0, 50, 100, 150)]


def start() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).double()


def flat(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def by_hand(script, optimizer, form: str, strength: float = 0.1) -> torch.Tensor:
    """All weights after 20 steps of the script's own."""
    model = start()
    rule = optimizer(model.parameters(), weight_decay=0.0)
    for x, y in batches() * 5:
        script.step(rule, F.cross_entropy(model(x), y), form, strength)
    return flat(model)


def by_torch(optimizer, strength: float = 0.1) -> torch.Tensor:
    """All weights after 20 ordinary steps with PyTorch's `weight_decay`."""
    model = start()
    rule = optimizer(model.parameters(), weight_decay=strength)
    for x, y in batches() * 5:
        rule.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rule.step()
    return flat(model)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize("form", ["penalty", "gradient"])
def test_penalty_and_gradient_are_weight_decay_of_sgd_and_adam(script, optimizer, form):
    torch.testing.assert_close(by_hand(script, optimizer, form), by_torch(optimizer))
    assert not torch.allclose(by_torch(optimizer), by_torch(optimizer, 0.0), atol=1e-3)


def test_decay_beside_the_step_is_adamw(script):
    torch.testing.assert_close(by_hand(script, ADAM, "decay"), by_torch(ADAMW))
    torch.testing.assert_close(by_hand(script, ADAM, "decay", 10.0), by_torch(ADAMW, 10.0))
    assert (by_hand(script, ADAM, "decay") - by_torch(ADAM)).abs().max() > 0.01


def test_decay_is_the_penalty_for_sgd_but_not_with_momentum(script):
    torch.testing.assert_close(by_hand(script, SGD, "decay"), by_torch(SGD))
    penalty = by_torch(MOMENTUM)
    for strength in (0.1, 1.0):  # with momentum 0.9 the penalty's gradients add up to ten times, nearly
        assert (by_hand(script, MOMENTUM, "decay", strength) - penalty).abs().max() > 1e-3


def test_the_share_that_the_toy_leaves(script):
    for optimizer in (script.OPTIMIZERS["SGD"], script.OPTIMIZERS["Adam"]):
        w = torch.ones(3, requires_grad=True)
        rule = optimizer([w], lr=0.01)
        for i in range(500):
            script.step(rule, (-1) ** i * (torch.tensor([0.01, 0.3, 3.0]) * w).sum(), "decay", 0.1)
        assert w.tolist() == pytest.approx([0.999**500] * 3, abs=0.02)


def groups(script, form: str, norm=nn.BatchNorm1d) -> list[float]:
    """The decay of each parameter, in the order of the network's parameters."""
    recipe = script.network(form, 0.001, 10.0, norm)
    model = recipe.model(TASK)
    optimizer = recipe.optimizer(model.parameters())
    decay = {id(w): group["weight_decay"] for group in optimizer.param_groups for w in group["params"]}
    assert {group["lr"] for group in optimizer.param_groups} == {0.001}
    assert len(decay) == len(list(model.parameters()))
    return [decay[id(w)] for w in model.parameters()]


def test_which_parameters_decay(script):
    # first matrix and its bias, gain and shift of the norm, output matrix and its bias
    assert groups(script, "AdamW") == [10] * 6
    assert groups(script, "matrices only") == [10, 0, 0, 0, 10, 0]
    assert groups(script, "first matrix only") == [10, 0, 0, 0, 0, 0]
    assert groups(script, "matrices only", nn.Identity) == [10, 0, 10, 0]
    assert groups(script, "Adam, L2", nn.Identity) == [0.1] * 4


def test_which_optimiser_a_form_is(script):
    weights = [nn.Parameter(torch.ones(2, 2))]
    kinds = {form: type(script.adam(weights, form, 0.1, 1.0)) for form in ("Adam, L2", "AdamW", "matrices only")}
    assert kinds == {"Adam, L2": optim.Adam, "AdamW": optim.AdamW, "matrices only": optim.AdamW}


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_networks_of_a_seed_start_from_the_same_weights(script, norm):
    starts = []
    for form in ("Adam, L2", "AdamW", "matrices only", "first matrix only"):
        torch.manual_seed(3)
        starts.append(flat(script.network(form, 0.01, 3.0, norm).model(TASK)))
    assert all(torch.equal(starts[0], each) for each in starts[1:])
    torch.manual_seed(3)
    plain = script.network("AdamW", 0.01, 3.0).model(TASK)
    torch.manual_seed(3)
    normed = script.network("AdamW", 0.01, 3.0, nn.BatchNorm1d).model(TASK)
    assert torch.equal(plain[1].weight, normed[1].weight)
    assert torch.equal(plain[-1].weight, normed[-1].weight)


def test_batch_norm_undoes_the_length_of_the_matrix_before_it(script):
    torch.manual_seed(0)
    model, x = script.mlp(nn.BatchNorm1d, TASK).double(), batches()[0][0]
    before = model(x)
    with torch.no_grad():
        model[1].weight.mul_(3)
        model[1].bias.mul_(3)
    torch.testing.assert_close(model(x), before, atol=1e-3, rtol=1e-3)  # but for batch norm's eps


@pytest.mark.parametrize("form", ["Adam, L2", "AdamW", "matrices only", "first matrix only"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_the_seeds_train_as_one_stack_and_as_they_would_alone(script, form, norm):
    recipe = script.network(form, 0.01, 10.0, norm)
    object.__setattr__(recipe, "epochs", 3)
    ((together, _),) = fit(recipe, [0, 1])
    assert together["seconds"][2]["alone"] == ""
    ((alone, _),) = fit(recipe, [1])
    # Before batch norm a bias has no gradient but rounding errors, which Adam makes as large as any other.
    close = 1e-3 if norm is nn.Identity else 2e-2
    assert together["train_loss"][1][1] == pytest.approx(alone["train_loss"][1][0], abs=close)
