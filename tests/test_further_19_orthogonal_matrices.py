from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

from common.data import Task, load, make_split
from common.training import State, fit

TASK = Task((1, 8, 8), 10)


@pytest.fixture
def script():
    return load_script("further/orthogonal_matrices.py")


@pytest.mark.parametrize("shape", [(64, 64), (64, 10), (7, 3)])
def test_orthogonal_is_pytorchs(script, shape):
    torch.manual_seed(0)
    mine = script.orthogonal(*shape, gain=1.5)
    torch.manual_seed(0)
    torch.testing.assert_close(mine, nn.init.orthogonal_(torch.empty(shape), gain=1.5))


@pytest.mark.parametrize("shape", [(64, 64), (64, 10), (10, 64)])
def test_rows_or_columns_are_orthonormal_times_the_gain(script, shape):
    weight = script.orthogonal(*shape, gain=2.0)
    assert weight.shape == shape
    square = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    torch.testing.assert_close(square, 4 * torch.eye(min(shape)), atol=1e-4, rtol=0)


def test_every_orthogonal_matrix_is_equally_likely(script):
    """Of a uniform rotation each element is as often above zero as below; of a bare QR's q the first seldom is."""
    torch.manual_seed(0)
    draws = torch.stack([script.orthogonal(3, 3) for _ in range(2000)])
    assert (draws > 0).float().mean(0).sub(0.5).abs().max() < 0.05
    assert draws.square().mean(0).sub(1 / 3).abs().max() < 0.03


def test_the_gaussian_has_its_variance_and_the_default_that_of_pytorch(script):
    torch.manual_seed(0)
    assert script.gaussian(500, 400, gain=sqrt(2)).var() * 400 == pytest.approx(2, rel=0.02)
    layer = nn.RNN(400, 400).weight_hh_l0
    assert script.SMALLER["Gaussian, 1/(3n)"](400, 400).var() == pytest.approx(layer.var().item(), rel=0.02)


def test_a_deep_network_multiplies_by_one_matrix_after_another(script):
    x, relu = torch.randn(5, 1, 8, 8), nn.ReLU()
    model = script.mlp(TASK, script.gaussian, layers=3, activation=relu)
    first, second, third, output = model.parameters()
    assert [len(each) for each in model.parameters()] == [64, 64, 64, 10]
    hidden = relu(relu(relu(x.flatten(1) @ first.T) @ second.T) @ third.T)
    torch.testing.assert_close(model(x), hidden @ output.T)


def test_directions_count_what_the_product_stretches(script):
    model = script.mlp(TASK, script.orthogonal, layers=4, activation=nn.Identity())
    assert script.directions(model, None)["directions"].item() == pytest.approx(64, rel=1e-4)
    with torch.no_grad():
        for i, weight in enumerate(list(model.parameters())[1:-1]):
            weight.copy_(torch.diag(torch.arange(64) < 40 - 10 * i))  # the last keeps 20 of what the others keep
    assert script.directions(model, None)["directions"].item() == pytest.approx(20, rel=1e-5)
    with torch.no_grad():
        weight.copy_(torch.diag(torch.tensor([3.0, 1.0] + 62 * [0.0])))  # variances 9 and 1: 10² / (81 + 1)
    assert script.directions(model, None)["directions"].item() == pytest.approx(100 / 82, rel=1e-5)


def test_the_product_is_taken_in_the_order_of_the_layers(script):
    torch.manual_seed(0)
    model = script.mlp(TASK, script.gaussian, layers=4, activation=nn.Identity())
    squares = torch.linalg.svdvals(nn.Sequential(*model[3:-1])(torch.eye(64))).square()
    expected = squares.sum() ** 2 / (squares**2).sum()
    assert script.directions(model, None)["directions"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_race_ends_with_the_first_step_below_the_loss(script):
    ((arrays, notes),) = fit(script.race(script.orthogonal, layers=4, rate=1.0, epochs=20), [0, 1])
    assert arrays["seconds"][2]["alone"] == ""
    for seed, note in enumerate(notes):
        before = script.race(script.orthogonal, layers=4, rate=1.0, epochs=note["steps"] - 1)
        ((cut, cut_notes),) = fit(before, [0, 1])
        assert arrays["train_loss"][1][seed] < 0.3 <= cut["train_loss"][1][seed]
        assert np.isnan(cut_notes[seed]["steps"])


def test_a_race_shares_its_rate_among_the_layers_and_sees_all_images_at_once(script):
    recipe = script.race(script.gaussian, layers=8, rate=0.5)
    assert recipe.optimizer.keywords["lr"] == 0.5 / 8
    assert recipe.batch_size == recipe.examples == 100
    split = make_split(load("digits"), 0, 100)
    state = State(recipe.model(TASK), split, epochs=1, step=7)
    assert script.note_steps(state) is False
    assert np.isnan(state.notes["steps"])


def test_relu_has_he_gain_and_tanh_has_none(script):
    for activation, variance in ((nn.ReLU(), 2.0), (nn.Tanh(), 1.0)):
        for start in script.STARTS.values():
            recipe = script.deep(activation, start, rate=0.001)
            torch.manual_seed(0)
            weights = list(recipe.model(TASK).parameters())
            assert len(weights) == 21
            assert 64 * weights[5].square().mean().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_the_recurrent_network_is_pytorchs(script, kind):
    torch.manual_seed(0)
    activation = {"tanh": nn.Tanh(), "relu": nn.ReLU()}[kind]
    model = script.Recurrent(TASK, script.orthogonal, activation, pixels=2)
    theirs = nn.RNN(2, 32, nonlinearity=kind, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(model.inputs.weight)
        theirs.weight_hh_l0.copy_(model.matrix)
    x = torch.randn(5, 1, 8, 8)
    _, last = theirs(x.reshape(5, 32, 2))
    torch.testing.assert_close(model(x), model.output(last[0]))


def test_networks_of_a_seed_differ_in_the_recurrent_matrix_alone(script):
    models = []
    for start in (script.SMALLER | script.STARTS).values():
        torch.manual_seed(0)
        models.append(script.reader(start, nn.Tanh(), 1, 0.01, 1).model(TASK))
    for model in models[1:]:
        assert torch.equal(model.inputs.weight, models[0].inputs.weight)
        assert torch.equal(model.output.weight, models[0].output.weight)
        assert not torch.equal(model.matrix, models[0].matrix)


def test_the_gradient_by_pixel_is_relative_to_the_last_in_powers_of_ten(script):
    torch.manual_seed(0)
    split = make_split(load("digits"), 0, 20)
    model = script.Recurrent(TASK, script.gaussian, nn.Tanh(), pixels=1)
    dims, found, about = script.by_pixel(model, split)["gradient"]
    assert (dims, about, found.shape) == ("pixel", {"unit": "powers of 10"}, (64,))
    assert not split.train.x.requires_grad
    norms = []
    for pixel in (3, 63):  # by hand, one pixel as a variable of its own
        value = split.train.x.flatten(1)[:, pixel].clone().requires_grad_()
        x = split.train.x.flatten(1).clone()
        x[:, pixel] = value
        loss = F.cross_entropy(model(x.view(-1, 1, 8, 8)), split.train.y)
        norms.append(torch.autograd.grad(loss, value)[0].norm().item())
    assert found[3].item() == pytest.approx(np.log10(norms[0] / norms[1]), abs=1e-3)
    assert found[63] == 0


def test_a_linear_orthogonal_network_keeps_the_gradient_and_the_seeds_train_as_one_stack(script):
    kept = script.reader(script.orthogonal, nn.Identity(), 1, 0.01, 0)
    lost = script.reader(script.SMALLER["Gaussian, 1/(3n)"], nn.Identity(), 1, 0.01, 0)
    (_, kept), (_, lost) = (fit(recipe, [0, 1], inspect=script.by_pixel)[0] for recipe in (kept, lost))
    for a, b in zip(kept, lost, strict=True):
        assert abs(a["gradient"][1][0]) < 1
        assert b["gradient"][1][0] < -10
    ((arrays, _),) = fit(script.reader(script.orthogonal, nn.Tanh(), 16, 0.01, 2), [0, 1])
    assert arrays["seconds"][2]["alone"] == ""
    ((arrays, _),) = fit(script.deep(nn.ReLU(), script.orthogonal, 0.001), [0])
    assert arrays["train_loss_curve"][1].shape == (1, 21)
