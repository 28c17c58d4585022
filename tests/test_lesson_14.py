import math

import pytest
import torch
from conftest import FURTHER_SCRIPTS, load_script
from torch import nn

from common.data import Task, load, make_split

TASK = Task((1, 8, 8), 10)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.8])
def test_forward_in_training_is_torchs_for_the_same_mask(lesson14, p):
    """Each layer's mask is read off its own output; given the mask, the other layer's formula must give that output."""
    x = torch.rand(400, 50, dtype=torch.float64) + 0.5
    for layer in (lesson14.Dropout(p), nn.Dropout(p)):
        y = layer.train()(x)
        mask = y != 0
        torch.testing.assert_close(y, x * mask / (1 - p))
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


def test_dropout_keeps_the_mean(lesson14):
    x = torch.ones(100_000)
    assert lesson14.dropout(x, 0.8, True).mean() == pytest.approx(1, abs=0.03)


def test_mlp_puts_dropout_behind_every_hidden_layer_and_behind_the_output_only_if_asked(lesson14):
    model = lesson14.mlp(TASK, width=32, hidden_layers=3, p=0.4, output_p=0.0)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds[:4] == ["Flatten", "Linear", "ReLU", "Dropout"]
    assert [layer.p for layer in model if isinstance(layer, lesson14.Dropout)] == [0.4, 0.4, 0.4, 0]
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)


def test_dropout_leaves_the_starting_weights_alone(lesson14):
    torch.manual_seed(0)
    plain = lesson14.network().model(TASK)
    torch.manual_seed(0)
    half = lesson14.network(p=0.5).model(TASK)
    for a, b in zip(plain.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_remedy_changes_what_it_says(lesson14):
    usual = (0, {"lr": 5e-3, "weight_decay": 0.0, "fused": True}, 0.2)
    lower, decayed = usual[1] | {"lr": 1e-4}, usual[1] | {"lr": 1e-4, "weight_decay": 3.0}
    wanted = {
        "no dropout": usual,
        "dropout": (0.5, usual[1], 0.2),
        "lower rate": (0, lower, 0.2),
        "both": (0.5, lower, 0.2),
        "both + decay": (0.5, decayed, 0.2),
        "right labels": (0, usual[1], 0),
    }
    for technique, settings in wanted.items():
        recipe = lesson14.remedy(technique, rate=1e-4, decay=3.0)
        assert (recipe.model.keywords["p"], recipe.optimizer.keywords, recipe.label_noise) == settings


def trained(lesson14, p: float) -> nn.Module:
    split = make_split(load("digits"), 0, 100)
    torch.manual_seed(0)
    model = lesson14.mlp(TASK, width=64, hidden_layers=2, p=p, output_p=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.train.x), split.train.y).backward()
        optimizer.step()
    return model


def test_three_ways_measure_what_they_say(lesson14):
    split = make_split(load("digits"), 0, 100)
    model = trained(lesson14, p=0.5)
    found = lesson14.three_ways(model, split)
    x, y = split.test
    logits = model.eval()(x).detach()
    accuracy, loss = found["accuracy"][1], found["loss"][1]
    assert found["mode"][1] == ["eval mode", "training mode", "eval, not scaled"]
    assert accuracy[0] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert loss[0] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    doubled = model[0](x)
    for layer in (model[1], model[4]):
        doubled = 2 * layer(doubled).relu()
    assert loss[2] == pytest.approx(nn.functional.cross_entropy(model[7](doubled), y).item(), rel=1e-5)
    assert loss[1] != pytest.approx(loss[0], rel=1e-3)
    same = lesson14.three_ways(trained(lesson14, p=0.0), split)
    assert same["loss"][1] == pytest.approx([same["loss"][1][0]] * 3, rel=1e-5)


def test_silencing_nothing_is_the_test_accuracy_and_more_hurts(lesson14):
    split = make_split(load("digits"), 0, 100)
    model = trained(lesson14, p=0.0)
    found = lesson14.silence(model, split)
    with torch.no_grad():
        right = (model.eval()(split.test.x).argmax(1) == split.test.y).float().mean().item()
    assert found["accuracy"][1][0] == pytest.approx(100 * right)
    assert found["accuracy"][1][-1] < found["accuracy"][1][0] - 20
    assert 0 < found["correlation"] < 1


def test_identical_units_are_fully_correlated(lesson14):
    model = lesson14.mlp(TASK, width=16, hidden_layers=2, p=0.0, output_p=0.0)
    last = [layer for layer in model if isinstance(layer, nn.Linear)][-2]
    with torch.no_grad():
        last.weight[:] = last.weight[0].abs()
        last.bias[:] = 0.1
    found = lesson14.silence(model, make_split(load("digits"), 0, 100))
    assert found["correlation"] == pytest.approx(1, abs=1e-3)


def test_the_loop_to_copy_learns_and_says_so(lesson14, capsys):
    training, validation = lesson14.train(p=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(training) == len(validation) == 12
    assert validation[-1] < validation[0] - 1
    assert lines[-1].endswith(f"training loss {training[-1]:.2f}, validation loss {validation[-1]:.2f}")


@pytest.fixture
def monte_carlo():
    return load_script("further/monte_carlo_dropout.py")


def test_an_average_of_passes_is_one_pass_where_nothing_is_dropped(monte_carlo):
    x = torch.randn(20, 1, 8, 8)
    plain = monte_carlo.mlp(TASK, p=0.0)
    torch.testing.assert_close(monte_carlo.average(plain, x, 7), monte_carlo.one_pass(plain, x))
    half = monte_carlo.mlp(TASK, p=0.5)
    assert not torch.allclose(monte_carlo.average(half, x, 7), monte_carlo.one_pass(half, x))
    torch.testing.assert_close(monte_carlo.average(half, x, 7).sum(1), torch.ones(20))


def test_scores_of_a_known_case(monte_carlo):
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.45, 0.55], [0.45, 0.55]])
    found = monte_carlo.scores(probabilities, torch.tensor([0, 1, 1, 0]))
    assert found["accuracy"] == 50
    assert found["calibration_error"] == pytest.approx(100 * (abs(1.9 - 1) + abs(1.1 - 1)) / 4, rel=1e-5)
    expected = -(math.log(0.95) + math.log(0.05) + math.log(0.55) + math.log(0.45)) / 4
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_entropy_of_the_certain_and_of_the_clueless(monte_carlo):
    probabilities = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert monte_carlo.entropy(probabilities).tolist() == pytest.approx([0, math.log(4)], abs=1e-6)


def test_told_apart_is_the_area_under_the_roc_curve(monte_carlo):
    from sklearn.metrics import roc_auc_score

    split = make_split(load("digits"), 0, 100)
    torch.manual_seed(0)
    model = monte_carlo.mlp(TASK, p=0.0)
    found = monte_carlo.strange(model, split)
    x = split.test.x
    turned, known = (monte_carlo.entropy(monte_carlo.one_pass(model, each)) for each in (x.rot90(1, (2, 3)), x))
    expected = roc_auc_score([0] * len(known) + [1] * len(turned), torch.cat([known, turned]))
    one, many = dict(zip(found["input"][1], found["eval mode"][1], strict=True)), found["20 passes"][1]
    assert one["turned"] == pytest.approx(100 * expected, rel=1e-4)
    assert many == pytest.approx(list(one.values()), abs=0.1)  # without dropout many passes are one


def test_further_is_listed_by_lesson_and_question():
    text = (FURTHER_SCRIPTS[0].parent / "README.md").read_text(encoding="utf-8")
    for script in FURTHER_SCRIPTS:
        assert f"`python -m further.{script.stem}`" in text
