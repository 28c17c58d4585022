from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from common.data import Batch, Split, Task, load, make_split
from common.training import State, fit

TASK = Task((1, 8, 8), 10)
ARMS = ("none", "lower rate", "weight decay", "L1 subgradient", "L1", "group lasso", "pruning", "pixels only")


@pytest.fixture
def script():
    return load_script("further/l1_feature_selection.py")


def digits(images: int = 200, label_noise: float = 0.0) -> Split:
    return make_split(load("digits"), 0, images, label_noise)


def changed(script, w: torch.Tensor, technique: str, setting: float, **about) -> torch.Tensor:
    """The weights w (units, inputs) of a first layer after `change`, at a learning rate of 0.5."""
    first = nn.Linear(w.shape[1], w.shape[0])
    with torch.no_grad():
        first.weight.copy_(w)
    bias = first.bias.clone()
    model = nn.Sequential(nn.Flatten(), nn.Identity(), first, nn.ReLU(), nn.Linear(len(w), 10))
    last = model[4].weight.clone()
    state = State(model, digits(), epochs=4, learning_rate=0.5, **about)
    script.change(state, technique, setting)
    assert torch.equal(first.bias, bias)
    assert torch.equal(model[4].weight, last)
    return first.weight.detach()


def test_l1_is_torch_softshrink(script):
    w = torch.randn(6, 5)
    found = changed(script, w, "L1", 0.8)
    torch.testing.assert_close(found, F.softshrink(w, 0.4))
    assert (found == 0).any()
    assert (found != 0).any()


def test_weight_decay_is_that_of_adamw(script):
    w = torch.randn(6, 5)
    theirs = nn.Parameter(w.clone())
    theirs.grad = torch.zeros_like(w)
    torch.optim.AdamW([theirs], lr=0.5, weight_decay=0.3).step()
    torch.testing.assert_close(changed(script, w, "weight decay", 0.3), theirs.detach())


def test_the_subgradient_is_a_step_of_sgd_on_the_penalty(script):
    w = torch.randn(6, 5)
    w[0, 0] = 0.1
    theirs = nn.Parameter(w.clone())
    (0.8 * theirs.abs().sum()).backward()
    torch.optim.SGD([theirs], lr=0.5).step()
    found = changed(script, w, "L1 subgradient", 0.8)
    torch.testing.assert_close(found, theirs.detach())
    assert found[0, 0] < 0  # it has stepped over zero


def test_group_lasso_minimises_its_penalty_for_each_input(script):
    w = torch.randn(4, 6) * torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 0.0])
    found = changed(script, w, "group lasso", 0.8)
    for column, mine in zip(w.T.double().numpy(), found.T.double().numpy(), strict=True):

        def objective(u, column=column):
            return 0.4 * np.sqrt(np.sum(u**2)) + 0.5 * np.sum((u - column) ** 2)

        theirs = minimize(objective, column + 0.01, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
        np.testing.assert_allclose(mine, theirs.x, atol=1e-4)
    off = (found == 0).all(0)
    assert off.tolist() == (w.norm(dim=0) <= 0.4).tolist()
    assert 0 < off.sum() < 6
    one = torch.randn(1, 9)  # with a single unit it is L1
    torch.testing.assert_close(changed(script, one, "group lasso", 0.8), F.softshrink(one, 0.4))


def test_pruning_keeps_the_longest_from_half_time_on(script):
    w = torch.randn(3, 100)
    assert torch.equal(changed(script, w, "pruning", 0.25, epoch=2), w)
    found = changed(script, w, "pruning", 0.25, epoch=3)
    on = found.norm(dim=0) > 0
    assert on.sum() == 16  # a quarter of as many as the image has pixels
    assert torch.equal(found[:, on], w[:, on])
    assert w[:, on].norm(dim=0).min() >= w[:, ~on].norm(dim=0).max()


def test_pruned_inputs_are_off_at_the_end(script):
    recipe = script.network("pruning", 4, useless=3, hidden=0, wrong=0.2)
    ((_, notes),) = fit(recipe, [0], inspect=script.selection)
    assert (notes[0]["length"][1] > 0).sum() == 16


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_l1_finds_what_scikit_learns_l1_finds(script, strength):
    """Logistic regression, trained to the end: the same objective, and the same inputs switched off."""
    torch.manual_seed(0)
    x, y = digits(100).train
    keep = y < 2  # two classes, so that the weights are unique
    x, y = x[keep].flatten(1)[:, 8:56], y[keep]
    x = torch.cat([x, torch.randn(len(x), 16)], 1).double()
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(x.shape[1], 2).double())
    state = State(model, digits(), epochs=1, learning_rate=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3000):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        script.change(state, "L1", strength / 2)
    weight = (model[2].weight[1] - model[2].weight[0]).detach().numpy()
    theirs = LogisticRegression(solver="saga", l1_ratio=1, C=2 / strength / len(y), tol=1e-8, max_iter=50_000)
    theirs.fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight, theirs.coef_[0], atol=5e-3)
    off = theirs.coef_[0] == 0
    assert (weight == 0).tolist() == off.tolist()
    assert 0 < off.sum() < len(off)


def test_useless_inputs_are_the_same_each_time_and_say_nothing(script):
    torch.manual_seed(0)
    data = load("digits")
    x = torch.from_numpy(data.x).flatten(1)
    x = (x - x.mean()) / x.std()
    layer = script.UselessInputs(64, 192)
    both = layer(x)
    useless = both[:, 64:]
    assert torch.equal(both[:, :64], x)
    torch.testing.assert_close(layer(x[:7])[:, 64:], useless[:7], atol=0.05, rtol=0)
    assert useless.mean(0).abs().max() < 0.1
    assert (useless.std(0) - 1).abs().max() < 0.1
    correlation = torch.corrcoef(useless.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.15
    near = torch.cdist(x, x).fill_diagonal_(1e9).argmin(1)
    alike = (x * x[near]).mean() / (x * x).mean()
    assert alike > 0.9
    assert (useless * useless[near]).mean().abs() < 0.02
    model = LogisticRegression(C=0.01).fit(useless[:1200], data.y[:1200])
    assert model.score(useless[1200:], data.y[1200:]) < 0.15
    assert script.UselessInputs(64, 0)(x).shape == x.shape


def test_selection_agrees_with_scikit_learn(script):
    torch.manual_seed(0)
    split = digits()
    model = script.build(TASK, useless=3, hidden=20)
    with torch.no_grad():
        model[2].weight[:, 64:] *= 0.9
        model[2].weight[:, 64:100] = 0
        model[2].weight[:, 20:24] = 0
    found = script.selection(model, split)
    length = model[2].weight.detach().norm(dim=0)
    torch.testing.assert_close(found["length"][1].flatten(), length)
    assert found["length"][1].shape == (32, 8)
    assert found["off"][1] == pytest.approx(100 * 36 / 192)
    varies = split.train.x.flatten(1).std(0) > 0.5
    assert 30 < varies.sum() < 60
    pixels, useless = length[:64][varies], length[64:]
    truth = [1] * len(pixels) + [0] * len(useless)
    auroc = roc_auc_score(truth, torch.cat([pixels, useless]))
    assert found["ahead"][1] == pytest.approx(100 * auroc, abs=1e-3)
    assert 60 < found["ahead"][1] < 99


def test_pixels_at_the_border_are_left_out(script):
    model = script.build(TASK, useless=1, hidden=0)
    x = torch.zeros(10, 1, 8, 8)
    x[::2, 0, 0, 0] = 2.0
    x[::2, 0, 0, 1] = 0.5
    with torch.no_grad():
        model[2].weight.fill_(1)
        model[2].weight[:, 0] = 2
        model[2].weight[:, 1] = 0
    part = Batch(x, torch.zeros(10, dtype=torch.int64))
    assert script.selection(model, Split(part, part, part))["ahead"][1] == 100


def test_every_technique_has_its_settings(script):
    for hidden in (256, 0):
        for arm in ARMS:
            recipe = script.network(arm, 2, useless=3, hidden=hidden, wrong=0.2)
            first = recipe.model(TASK)[2]
            assert first.in_features == (64 if arm == "pixels only" else 256)
            assert first.out_features == (hidden or 10)
            assert recipe.optimizer.keywords["lr"] == (0.01 if arm == "lower rate" else 0.05)
            assert (recipe.examples, recipe.label_noise, recipe.batch_size) == (200, 0.2, 50)
            if arm in ("none", "pixels only"):
                assert recipe.after_step is None
            else:
                assert recipe.after_step.keywords == {"technique": arm, "setting": script.SETTINGS[arm][1]}
    assert set(script.SETTINGS) | {"none", "pixels only"} == set(ARMS)
    assert set(script.ARMS) < set(ARMS)


def test_a_lower_rate_leaves_the_weights_alone(script):
    w = torch.randn(6, 5)
    assert torch.equal(changed(script, w, "lower rate", 0.01, epoch=4), w)


def test_networks_of_a_seed_start_from_the_same_weights(script):
    for hidden in (256, 0):
        starts = []
        for arm in ARMS[:-1]:
            torch.manual_seed(3)
            starts.append(script.network(arm, 1, useless=1, hidden=hidden, wrong=0).model(TASK).state_dict())
        for other in starts[1:]:
            assert all(torch.equal(value, starts[0][name]) for name, value in other.items())


@pytest.mark.parametrize("arm", ARMS)
def test_the_seeds_train_as_one_stack_and_as_each_would_alone(script, arm):
    recipe = script.network(arm, 2, useless=1, hidden=0, wrong=0.2)
    object.__setattr__(recipe, "epochs", 2)
    ((arrays, notes),) = fit(recipe, [0, 1], inspect=script.selection)
    assert arrays["seconds"][2]["alone"] == ""
    ((_, alone),) = fit(recipe, [1], inspect=script.selection)
    np.testing.assert_allclose(notes[1]["length"][1], alone[0]["length"][1], atol=2e-3)


def test_the_picture_shows_pixels_above_the_line(script, monkeypatch):
    """The line lies between the pixels' rows and those of the useless inputs, three for each pixel."""
    import xarray as xr
    from matplotlib.figure import Figure

    kept = []
    arms = ("none", *script.SETTINGS, "pixels only")
    seeds = xr.DataArray(np.ones((len(arms), 2)), dims=("technique", "seed"), coords={"technique": list(arms)})
    seeds.attrs = {"unit": "%", "long_name": "x"}
    length = xr.DataArray(np.random.rand(len(arms), 2, 32, 8), dims=("technique", "seed", "row", "column"))
    runs = xr.Dataset({"test_accuracy": seeds, "off": seeds, "ahead": seeds, "length": length})

    def new_figure(title, columns):
        figure = Figure()
        return figure, figure.subplots(1, columns).tolist()

    lab = SimpleNamespace(
        study=lambda *_, **__: runs,
        table=lambda *_, **__: None,
        claim=lambda *_, **__: None,
        gain=lambda values, **baseline: values - values.sel(baseline, drop=True),
        plotting=SimpleNamespace(new_figure=new_figure),
        figure=kept.append,
    )
    script.who_selects(lab)
    for ax in kept[0].axes:
        assert ax.images[0].get_array().shape == (32, 8)
        assert list(ax.lines[0].get_ydata()) == [7.5, 7.5]
