from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn
from torch.optim.swa_utils import update_bn

from common.data import Task, load, make_split
from common.training import State, fit

TASK = Task((1, 8, 8), 10)


@pytest.fixture
def why():
    return load_script("further/why_batch_norm_works.py")


@pytest.fixture
def ghost():
    return load_script("further/ghost_batches.py")


@pytest.fixture
def both():
    return load_script("further/batch_norm_and_dropout.py")


def digits(images: int = 100):
    return make_split(load("digits"), 0, images)


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_shaken_batch_norm_shakes_in_training_only(why):
    torch.manual_seed(0)
    layer, x = why.ShakenBatchNorm(200), torch.randn(300, 200)
    first, second = layer(x), layer(x)
    assert not torch.allclose(first, second)
    mean, deviation = first.mean(0), first.std(0)
    assert mean.abs().max() < 0.51
    assert mean.std().item() == pytest.approx((1 / 12) ** 0.5, rel=0.15)
    assert 0.74 < deviation.min() < 0.8
    assert 1.2 < deviation.max() < 1.26
    plain = nn.BatchNorm1d(200)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_networks_of_a_seed_start_from_the_same_weights(why, ghost, both):
    built = {
        why: [why.network(norm, 0.1) for norm in why.NORMS],
        ghost: [ghost.network(norm, 0.1) for norm in ghost.GROUPS],
        both: [both.network(arm, 0.1, blocks=3) for arm in both.ARMS],
    }
    for recipes in built.values():
        weights = []
        for recipe in recipes:
            torch.manual_seed(3)
            weights.append([layer.weight for layer in linears(recipe.model(TASK))])
        for others in weights[1:]:
            for mine, theirs in zip(weights[0], others, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["why", "ghost", "both"])
def test_the_seeds_train_as_one_stack(name, request):
    script = request.getfixturevalue(name)
    arms = {
        "why": [("shaken", 0.1)],
        "ghost": [("groups of 4", 0.1)],
        "both": [("0.5 in each block", 0.1, 3), ("0.5 at the end", 0.1, 3)],
    }
    for arm in arms[name]:
        recipe = script.network(*arm)
        object.__setattr__(recipe, "epochs", 1)
        ((arrays, notes),) = fit(recipe, [0, 1])
        assert arrays["seconds"][2]["alone"] == ""
        assert len(notes) == 2


def test_drift_is_none_when_nothing_moves_and_some_when_it_does(why):
    torch.manual_seed(0)
    model = why.mlp(TASK, nn.BatchNorm1d)
    state, before = State(model, digits(), epochs=3), deepcopy(model.state_dict())
    for epoch in (1, 2, 3):
        state.epoch = epoch
        if epoch == 3:
            with torch.no_grad():
                model[3][1].bias -= 0.5
            before["3.1.bias"] -= 0.5
        why.note_drift(state)
    drift = state.notes["drift"][1]
    assert state.notes["epochs_trained"] == ("epochs_trained", [1, 2, 3])
    assert drift[0] != drift[0]
    assert drift[1] == pytest.approx(0, abs=1e-6)
    assert drift[2] == pytest.approx(0.5, abs=5e-3)  # batch norm's output has a deviation of one
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shaken_inputs_drift_though_no_weight_moves(why):
    torch.manual_seed(0)
    state = State(why.mlp(TASK, why.ShakenBatchNorm), digits(), epochs=2)
    why.note_drift(state)
    why.note_drift(state)
    assert state.notes["drift"][1][1] > 0.2


def test_along_the_gradient_is_steps_of_sgd(why):
    torch.manual_seed(0)
    model, (x, y) = why.mlp(TASK, nn.BatchNorm1d), digits().train
    before = deepcopy(model.state_dict())
    found = why.along_the_gradient(model, x, y, rate=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses, gradients = [], []
    for step in range(9):
        moved = deepcopy(model).train()
        optimizer = torch.optim.SGD(moved.parameters(), lr=0.05 * step)
        F.cross_entropy(moved(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = F.cross_entropy(moved(x), y)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([each.grad.flatten() for each in moved.parameters()]))
    change = (gradients[8] - gradients[0]).norm() / gradients[0].norm()
    assert found["loss_range"] == pytest.approx(max(losses) - min(losses), rel=1e-3)
    assert found["gradient_change"] == pytest.approx(change.item(), rel=1e-3)


def test_the_landscape_is_noted_after_some_epochs_at_the_rate_in_use(why):
    torch.manual_seed(0)
    model, split = why.mlp(TASK, nn.Identity), digits(200)
    state = State(model, split, epochs=5, learning_rate=0.02)
    for epoch in range(1, 6):
        state.epoch = epoch
        why.note_landscape(state)
    assert state.notes["epochs_trained"][1] == [1, 2, 4]
    expected = why.along_the_gradient(model, split.train.x[:100], split.train.y[:100], 0.02)
    assert state.notes["loss_range"][1] == [expected["loss_range"]] * 3
    rates = {each: why.walked(each).optimizer.keywords["lr"] for each in ("no norm", "lower rate", "batch norm")}
    assert rates == {"no norm": 0.03, "lower rate": 0.01, "batch norm": 0.03}
    assert not norms(why.walked("lower rate").model(TASK))


def test_ghost_batch_norm_normalises_each_group(ghost):
    x, layer = torch.randn(12, 3) * 2 + 1, ghost.GhostBatchNorm(3, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    plain = nn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    expected = torch.cat([deepcopy(plain)(part) for part in x.split(4)])
    torch.testing.assert_close(layer(x), expected)
    means = torch.stack([part.mean(0) for part in x.split(4)])
    variances = torch.stack([part.var(0) for part in x.split(4)])
    torch.testing.assert_close(layer.running_mean, 0.1 * means.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 * torch.ones(3) + 0.1 * variances.mean(0))
    with pytest.raises(RuntimeError):
        layer(torch.randn(10, 3))


def test_a_ghost_as_large_as_the_batch_is_batch_norm(ghost):
    mine, plain = ghost.GhostBatchNorm(3, 12), nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(12, 3) * 2 + 1
        torch.testing.assert_close(mine(x), plain(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(mine, name), getattr(plain, name))
    torch.testing.assert_close(mine.eval()(x), plain.eval()(x))
    frozen = deepcopy(mine.state_dict())
    mine(x + 5)
    assert all(torch.equal(value, frozen[name]) for name, value in mine.state_dict().items())


def test_a_remedy_has_the_norm_and_the_rate_that_it_names(ghost):
    wanted = {
        "batch norm": (100, 0.03),
        "lower rate": (100, 0.001),
        "groups of 4": (4, 0.001),
        "no norm": (None, 0.001),
    }
    for technique, settings in wanted.items():
        recipe = ghost.remedy(technique, 0.001)
        assert (recipe.model.keywords["group"], recipe.optimizer.keywords["lr"]) == settings
        assert recipe.label_noise == 0.2
        assert recipe.batch_size == 100


def test_where_dropout_stands(both):
    def dropped(arm: str) -> list[float]:
        model = both.network(arm, 0.1, blocks=3).model(TASK)
        return [layer.p for layer in model if isinstance(layer, nn.Dropout)]

    assert dropped("batch norm") == [0, 0, 0, 0]
    assert dropped("0.2 in each block") == [0.2, 0.2, 0.2, 0]
    assert dropped("0.5 in each block") == dropped("dropout") == [0.5, 0.5, 0.5, 0]
    assert dropped("0.5 at the end") == [0, 0, 0, 0.5]
    model = both.network("0.5 in each block", 0.1, blocks=6).model(TASK)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Flatten", *["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 6, "Dropout", "Linear"]
    assert not norms(both.network("dropout", 0.1, blocks=3).model(TASK))


def trained(both, p: float):
    """A briefly trained network, whose running statistics are those of its last batch, and its split."""
    split = digits(200)
    torch.manual_seed(0)
    model = both.mlp(TASK, blocks=3, p=p).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(split.train.x), split.train.y).backward()
        optimizer.step()
    for layer in norms(model):
        layer.momentum = 1.0
    with torch.no_grad():
        model(split.train.x)
    return model, split


def test_recomputed_statistics_are_those_of_the_training_set_without_dropout(both):
    model, split = trained(both, p=0.5)
    before = deepcopy(model.state_dict())
    fresh = both.recomputed(model, split.train.x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.training for layer in fresh.modules())
    h = split.train.x
    for layer in fresh:
        if isinstance(layer, nn.BatchNorm1d):
            torch.testing.assert_close(layer.running_mean, h.mean(0), atol=0.01, rtol=0.01)
            torch.testing.assert_close(layer.running_var, h.var(0), atol=0.01, rtol=0.01)
        h = layer(h)
    model, split = trained(both, p=0.0)
    updated = deepcopy(model)
    update_bn([split.train.x], updated)
    fresh = both.recomputed(model, split.train.x)
    for mine, theirs in zip(norms(fresh), norms(updated), strict=True):  # without dropout PyTorch's does the same
        torch.testing.assert_close(mine.running_var, theirs.running_var, atol=1e-3, rtol=1e-2)


def test_dropout_shifts_the_variance(both):
    shift = {}
    for p in (0.0, 0.5):
        model, split = trained(both, p)
        found = both.variance_shift(model, split)
        shift[p] = found["shift"]
        right = both.recomputed(model, split.train.x)(split.test.x).argmax(1) == split.test.y
        assert found["recomputed"][1] == pytest.approx(100 * right.float().mean().item())
    assert shift[0.0] == pytest.approx(1, abs=0.02)
    assert shift[0.5] > 1.3
    plain = both.mlp(TASK, blocks=3, norm=False).eval()
    found, split = both.variance_shift(plain, digits()), digits()
    assert found["shift"] != found["shift"]
    right = plain(split.test.x).argmax(1) == split.test.y
    assert found["recomputed"][1] == pytest.approx(100 * right.float().mean().item())
