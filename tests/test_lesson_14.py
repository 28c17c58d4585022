import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from common.data import Batch, Task, load, make_split

TASK = Task((1, 8, 8), 10)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_forward_in_training_is_torchs_for_the_same_mask(lesson14, p):
    """Each layer's mask is read off its own output; given the mask, the other layer's formula must give that output."""
    x = torch.rand(400, 50, dtype=torch.float64) + 0.5
    for layer in (lesson14.Dropout(p), nn.Dropout(p)):
        y = layer.train()(x)
        mask = y != 0
        expected = x * mask / (1 - p) if p < 1 else torch.zeros_like(x)
        torch.testing.assert_close(y, expected)
        share = 1 - mask.double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / x.numel()) + 1e-12


def test_backward_is_torchs_for_the_same_mask(lesson14):
    for layer in (lesson14.Dropout(0.3), nn.Dropout(0.3)):
        x = (torch.rand(30, 20, dtype=torch.float64) + 0.5).requires_grad_()
        y = layer.train()(x)
        (y * torch.arange(20.0)).sum().backward()
        expected = (y != 0).double() / 0.7 * torch.arange(20.0)
        torch.testing.assert_close(x.grad, expected)


def test_gradient_passes_gradcheck(lesson14):
    def fixed_mask(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return lesson14.dropout(x, 0.5, training=True)

    assert torch.autograd.gradcheck(fixed_mask, torch.rand(4, 5, dtype=torch.float64, requires_grad=True))


def test_eval_mode_changes_nothing(lesson14):
    x = torch.randn(10, 10)
    assert torch.equal(lesson14.Dropout(0.5).eval()(x), x)
    assert torch.equal(nn.Dropout(0.5).eval()(x), x)


def test_masks_are_independent_by_element_and_by_call(lesson14):
    torch.manual_seed(0)
    x = torch.ones(2000, 2)
    a, b = lesson14.dropout(x, 0.5, True) != 0, lesson14.dropout(x, 0.5, True) != 0
    assert abs((a[:, 0] == a[:, 1]).double().mean() - 0.5) < 0.06
    assert abs((a == b).double().mean() - 0.5) < 0.05


def test_vanilla_keeps_the_mean_only_if_scaled_at_test_time(lesson14):
    x = torch.ones(100_000)
    assert lesson14.vanilla_dropout(x, 0.8, True).mean() == pytest.approx(0.2, abs=0.01)
    assert torch.allclose(lesson14.vanilla_dropout(x, 0.8, False), 0.2 * x)
    assert lesson14.dropout(x, 0.8, True).mean() == pytest.approx(1, abs=0.03)


def test_mlp_puts_dropout_behind_every_hidden_layer_and_never_behind_the_output(lesson14):
    model = lesson14.mlp(TASK, width=32, depth=3, p=0.4)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds[:4] == ["Flatten", "Linear", "ReLU", "Dropout"]
    assert [layer.p for layer in model if type(layer).__name__ == "Dropout"] == [0.4, 0.4, 0.4, 0]
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)


def test_dropout_leaves_the_starting_weights_alone(lesson14):
    torch.manual_seed(0)
    plain = lesson14.mlp(TASK)
    torch.manual_seed(0)
    half = lesson14.mlp(TASK, p=0.5)
    for a, b in zip(plain.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("train", "validation", "epoch"),
    [
        ([5, 4, 3, 2, 1, 0], [5, 4, 3, 4, 5, 6], 2),
        ([5, 4, 3, 2, 1, 0], [5, 4, 3, 4, 2.9, 2.8], math.nan),  # a passing rise is no turn
        ([5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1], math.nan),
        ([5, 4, 3, 2, 1, 0], [5, 4, 4, 3, 5, 6], math.nan),  # too few measurements after the turn
        ([5, 4, 1, 2, 3, 4], [5, 4, 3, 4, 5, 6], math.nan),  # both rise: trouble, but not overfitting
    ],
)
def test_turning_epoch(lesson14, train, validation, epoch):
    history = {"epoch": list(range(6)), "train_loss": train, "validation_loss": validation}
    found = lesson14.turning_epoch(history)
    assert found == epoch or (math.isnan(found) and math.isnan(epoch))


def test_accuracy_after_the_turn(lesson14):
    history = {"epoch": [0, 10, 20, 30, 40], "train_loss": [4, 3, 2, 1, 0], "validation_loss": [3, 1, 2, 3, 4]}
    history["validation_accuracy"] = [0.1, 0.8, 0.8, 0.75, 0.7]
    assert lesson14.accuracy_after_turn(history) == pytest.approx(-0.1)


def test_silencing_nothing_is_the_test_accuracy_and_more_hurts(lesson14):
    split = make_split(load("digits"), 0, 100)
    torch.manual_seed(0)
    model = lesson14.mlp(TASK, 64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.train.x), split.train.y).backward()
        optimizer.step()
    notes = lesson14.silence(model, split)
    assert notes["accuracy"][0] == pytest.approx(lesson14.evaluate(model, split.test)[1])
    assert notes["accuracy"][-1] < notes["accuracy"][0] - 0.2
    assert 0 < notes["correlation"] < 1
    assert not model[2]._forward_hooks


def test_identical_units_are_fully_correlated(lesson14):
    model = lesson14.mlp(TASK, 16)
    last = [layer for layer in model if isinstance(layer, nn.Linear)][-2]
    with torch.no_grad():
        last.weight[:] = last.weight[0].abs()
        last.bias[:] = 0.1
    assert lesson14.silence(model, make_split(load("digits"), 0, 100))["correlation"] == pytest.approx(1, abs=1e-3)


def test_entropy_of_the_certain_and_of_the_clueless(lesson14):
    probabilities = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert lesson14.entropy(probabilities).tolist() == pytest.approx([0, math.log(4)], abs=1e-6)


def test_told_apart_is_the_area_under_the_roc_curve(lesson14):
    from sklearn.metrics import roc_auc_score

    own, other = torch.randn(50), torch.randn(70) + 0.7
    expected = roc_auc_score([0] * 50 + [1] * 70, torch.cat([own, other]))
    assert lesson14.told_apart(other, own) == pytest.approx(expected)


def test_strange_inputs_keep_the_size(lesson14):
    test = make_split(load("digits"), 0, 100).test
    kinds = lesson14.strange_inputs(test)
    assert {x.shape for x in kinds.values()} == {test.x.shape}
    assert torch.equal(kinds["shuffled"].flatten(1).sort(1).values, test.x.flatten(1).sort(1).values)
    assert torch.equal(kinds["turned"][0, 0], torch.rot90(test.x[0, 0], 1))


def test_without_dropout_many_passes_equal_one(lesson14):
    torch.manual_seed(0)
    notes = lesson14.predict_many(lesson14.mlp(TASK), make_split(load("digits"), 0, 100))
    for passes in lesson14.PASSES:
        assert notes[str(passes)] == pytest.approx(notes["eval"], abs=1e-5)
    assert notes["noise told apart"][0] == pytest.approx(notes["noise told apart"][1], abs=1e-3)
    torch.manual_seed(0)
    varied = lesson14.predict_many(lesson14.mlp(TASK, p=0.5), make_split(load("digits"), 0, 100))
    assert varied["1"] != pytest.approx(varied["eval"], abs=1e-5)


def test_wrong_modes_leave_no_hook_and_measure_what_they_say(lesson14):
    torch.manual_seed(0)
    model = lesson14.mlp(TASK, p=0.5)
    split = make_split(load("digits"), 0, 100)
    notes = lesson14.wrong_modes(model, split)
    loss, accuracy = lesson14.evaluate(model, split.test)
    assert notes["eval_accuracy"] == pytest.approx(accuracy)
    assert notes["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert notes["unscaled_loss"] != pytest.approx(loss, rel=1e-5)
    assert 0 < notes["flips"] <= 1
    assert lesson14.wrong_modes(lesson14.mlp(TASK), split)["flips"] == 0


def test_importing_defines_and_does_nothing_else(lesson14):
    assert all(inspect.isfunction(experiment) for experiment in lesson14.EXPERIMENTS)
    assert not any(isinstance(value, (Batch, np.ndarray)) for value in vars(lesson14).values())
