import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from common.first.data import Batch, Task, load, make_split
from common.first.experiment import Comparison
from common.first.training import Run, State, cross_entropy, evaluate, fit

TASK = Task((1, 8, 8), 10)
SHAPES = {"vectors": (12, 5), "images": (6, 5, 4, 3)}


def pair(lesson, shape, momentum=0.1):
    """Our layer and PyTorch's with the same gain and shift, neither of which is the default."""
    ours = lesson.BatchNorm(shape[1], momentum).double()
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], momentum=momentum).double()
    with torch.no_grad():
        for mine, its in ((ours.gamma, theirs.weight), (ours.beta, theirs.bias)):
            mine.copy_(torch.rand_like(mine) + 0.5)
            its.copy_(mine)
    return ours, theirs


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm_is_torchs(lesson16, shape, momentum):
    """Output, gradients and running statistics over several batches of different sizes, then eval mode."""
    ours, theirs = pair(lesson16, shape, momentum)
    for size in (shape[0], 2, 7):
        x = 3 * torch.randn(size, *shape[1:], dtype=torch.float64) + 1
        seen = []
        for layer in (ours, theirs):
            inputs = x.clone().requires_grad_()
            out = layer.train()(inputs)
            (out * torch.arange(out.numel()).view_as(out).double().sin()).sum().backward()
            seen.append((out, inputs.grad, layer.running_mean, layer.running_var))
        for mine, its in zip(*seen, strict=True):
            torch.testing.assert_close(mine, its)
    torch.testing.assert_close(ours.gamma.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.beta.grad, theirs.bias.grad)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    before = ours.running_mean.clone()
    ours(x + 5)
    assert torch.equal(ours.running_mean, before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm_passes_gradcheck(lesson16, shape):
    layer = lesson16.BatchNorm(shape[1]).double()
    assert torch.autograd.gradcheck(layer, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_a_network_trains_the_same_with_either(lesson16):
    runs = [
        fit(replace(lesson16.WITH, model=partial(lesson16.mlp, norm=norm), epochs=2, evaluations=1), 7)
        for norm in (lesson16.BatchNorm, nn.BatchNorm1d)
    ]
    for name in ("train_loss", "validation_loss", "test_loss"):
        assert runs[0].final[name] == pytest.approx(runs[1].final[name], rel=1e-3)


def test_a_batch_of_one_has_no_variance(lesson16):
    for layer in (lesson16.BatchNorm(3), nn.BatchNorm1d(3)):
        with pytest.raises(ValueError, match="value"):
            layer(torch.randn(1, 3))
        assert layer.eval()(torch.randn(1, 3)).shape == (1, 3)
    assert lesson16.BatchNorm(3)(torch.randn(1, 3, 2, 2)).shape == (1, 3, 2, 2)


def test_the_table_says_which_variance_goes_where(lesson16):
    for n in (2, 16):
        size, biased, unbiased, running, output = map(float, lesson16.which_variance(n))
        assert size == n
        assert unbiased == pytest.approx(biased * n / (n - 1), abs=2e-3)
        assert running == unbiased
        assert output == pytest.approx(1, abs=2e-3)
    row = lesson16.against_torch("x", lesson16.BatchNorm(4), nn.BatchNorm1d(4), (9, 4))
    assert all(float(cell) < 1e-5 for cell in row[1:])
    row = lesson16.against_torch("x", lesson16.BatchNorm(4, momentum=0.2), nn.BatchNorm1d(4), (9, 4))
    assert float(row[3]) > 0.01


def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_all_networks_of_a_seed_start_from_the_same_weights(lesson16):
    variants = [
        {},
        {"norm": nn.BatchNorm1d},
        {"norm": nn.BatchNorm1d, "bias": False},
        {"norm": nn.BatchNorm1d, "order": "NLA"},
        {"p": 0.5},
    ]
    built = []
    for options in variants:
        torch.manual_seed(3)
        built.append(linears(lesson16.mlp(TASK, **options)))
    for other in built[1:]:
        for mine, its in zip(built[0], other, strict=True):
            assert torch.equal(mine.weight, its.weight)
    assert len(built[0]) == 4
    assert not torch.equal(built[0][1].weight, built[0][2].weight)


def test_the_start_is_hes_times_the_scale(lesson16):
    torch.manual_seed(0)
    wide = linears(lesson16.mlp(TASK, width=400, scale=3.0))[1]
    assert wide.weight.std().item() == pytest.approx(3 * (2 / 400) ** 0.5, rel=0.02)
    assert not wide.bias.any()
    torch.manual_seed(0)
    default = linears(lesson16.mlp(TASK, width=400, scale=None))[1]
    assert default.weight.std().item() == pytest.approx((1 / 1200) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        ("LNA", [nn.Linear, nn.BatchNorm1d, nn.ReLU]),
        ("LAN", [nn.Linear, nn.ReLU, nn.BatchNorm1d]),
        ("NLA", [nn.BatchNorm1d, nn.Linear, nn.ReLU]),
    ],
)
def test_the_order_in_a_block(lesson16, order, kinds):
    model = lesson16.mlp(Task((1, 3, 3), 4), norm=nn.BatchNorm1d, order=order, width=7)
    assert [type(layer) for layer in model[1]] == kinds
    assert model(torch.randn(5, 1, 3, 3)).shape == (5, 4)


def test_where_dropout_stands(lesson16):
    every = lesson16.mlp(TASK, norm=nn.BatchNorm1d, p=0.2)
    assert [type(block[-1]) for block in every[1:4]] == [nn.Dropout] * 3
    last = lesson16.mlp(TASK, norm=nn.BatchNorm1d, last_p=0.5)
    assert [layer.p for layer in last.modules() if isinstance(layer, nn.Dropout)] == [0.5]
    assert isinstance(last[-2], nn.Dropout)


@pytest.mark.parametrize("depth", [2, 5, 10])
def test_skip_net_has_the_depth_asked_for(lesson16, depth):
    model = lesson16.skip_net(TASK, depth)
    assert len(linears(model)) == depth + 1
    x = torch.rand(3, 64)
    for block in model:
        if isinstance(block, lesson16.Skip):
            with torch.no_grad():
                block.branch[2].bias.zero_()
            torch.testing.assert_close(block(x), x)


def trained(lesson, seed=1, **options):
    """A briefly trained network and its split."""
    kept = {}
    recipe = replace(lesson.WITH, model=partial(lesson.mlp, norm=nn.BatchNorm1d, **options), epochs=2)
    fit(recipe, seed, inspect=lambda model, split: kept.update(model=model, split=split) or {})
    return kept["model"], kept["split"]


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]


def test_recomputed_statistics_are_those_of_the_training_set(lesson16):
    model, split = trained(lesson16, p=0.5)
    before = deepcopy(model.state_dict())
    fresh = lesson16.recomputed(model, split.train.x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not fresh.training
    inputs = split.train.x.flatten(1)
    for block in fresh[1:4]:
        arriving = block[0](inputs)
        torch.testing.assert_close(block[1].running_mean, arriving.mean(0), atol=0.01, rtol=0.01)
        torch.testing.assert_close(block[1].running_var, arriving.var(0), atol=0.01, rtol=0.01)
        inputs = block(inputs)
    model, split = trained(lesson16)
    updated = deepcopy(model)
    update_bn([split.train.x], updated)
    fresh = lesson16.recomputed(model, split.train.x)
    for mine, its in zip(norms(fresh), norms(updated), strict=True):  # where nothing drops out, PyTorch's does the same
        torch.testing.assert_close(mine.running_mean, its.running_mean, atol=1e-3, rtol=1e-2)


def test_accuracy_in_training_mode_depends_on_the_company(lesson16):
    model, split = trained(lesson16)
    before = deepcopy(model.state_dict())
    whole = lesson16.accuracy_with_batches(model, split.test, 400)
    with torch.no_grad():
        logits = deepcopy(model).train()(split.test.x)
    assert whole == pytest.approx(float((logits.argmax(1) == split.test.y).float().mean()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    odd = Batch(split.test.x[:5], split.test.y[:5])
    assert 0 <= lesson16.accuracy_with_batches(model, odd, 2) <= 1  # the last image, alone, is left out
    notes = lesson16.forgotten_eval(model, split)
    assert notes["eval"] == evaluate(model, split.test)[1]
    assert notes["mixed"][-1] == pytest.approx(notes["alike"][-1])
    assert notes["alike"][1] < notes["mixed"][1] - 0.1


def test_both_statistics_are_three_evaluations_of_one_network(lesson16):
    model, split = trained(lesson16)
    running, fresh, own = lesson16.both_statistics(model, split)["by statistics"]
    assert running == evaluate(model, split.test)[1]
    assert fresh == evaluate(lesson16.recomputed(model, split.train.x), split.test)[1]
    assert own == lesson16.accuracy_with_batches(model, split.test, 400)
    assert fresh > running  # eight steps: the running statistics lag behind


def test_noisy_batch_norm_shakes_in_training_only(lesson16):
    torch.manual_seed(0)
    layer, x = lesson16.NoisyBatchNorm(200), torch.randn(300, 200)
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


def test_ghost_batch_norm_normalises_each_group(lesson16):
    x = torch.randn(12, 3) * 2 + 1
    layer = lesson16.GhostBatchNorm(3, 4)
    out = layer(x)
    expected = torch.cat([nn.BatchNorm1d(3)(part) for part in x.split(4)])
    torch.testing.assert_close(out, expected)
    parts = torch.stack([part.var(0) for part in x.split(4)])
    torch.testing.assert_close(layer.running_var, 0.9 * torch.ones(3) + 0.1 * parts.mean(0))
    with pytest.raises(RuntimeError):
        layer(torch.randn(10, 3))


def test_a_ghost_as_large_as_the_batch_is_batch_norm(lesson16):
    ghost, plain = lesson16.GhostBatchNorm(3, 12), nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(12, 3) * 2 + 1
        torch.testing.assert_close(ghost(x), plain(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ghost, name), getattr(plain, name))
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))


def test_dropout_shifts_the_variance(lesson16):
    ratio = {}
    for p in (0.0, 0.5):
        model, split = trained(lesson16, p=p)
        for layer in norms(model):
            layer.momentum = 1.0
        model.train()(split.train.x)
        notes = lesson16.variance_shift(model, split)
        ratio[p] = notes["ratio"]
        assert notes["recomputed"] == evaluate(lesson16.recomputed(model, split.train.x), split.test)[1]
    assert ratio[0.0] == pytest.approx(1, abs=0.05)
    assert ratio[0.5] > 1.3
    assert lesson16.variance_shift(lesson16.mlp(TASK), split) == {}


def test_the_bias_before_batch_norm_has_no_gradient(lesson16):
    split = make_split(load("digits"), 0, 100)
    share = {}
    for name, options in {"plain": {}, "before": {"norm": nn.BatchNorm1d}}.items():
        share[name] = lesson16.bias_gradient(lesson16.mlp(TASK, **options), split)["bias"]
    assert share["before"] < 1e-5 < 0.01 < share["plain"]
    assert lesson16.bias_gradient(lesson16.mlp(TASK, norm=nn.BatchNorm1d, bias=False), split) == {}


def state_of(lesson, step, model=None):
    split = make_split(load("digits"), 0, 100)
    model = model or lesson.mlp(TASK, norm=nn.BatchNorm1d)
    return State(model, torch.optim.SGD(model.parameters(), lr=0.1), split, epochs=2, step=step)


def test_drift_is_none_when_nothing_moves_and_some_when_it_does(lesson16):
    torch.manual_seed(0)
    state = state_of(lesson16, lesson16.LOOKS[0])
    for step in lesson16.LOOKS[:3]:
        state.step = step
        lesson16.note_drift(state)
        if step == lesson16.LOOKS[1]:
            with torch.no_grad():
                state.model[lesson16.HIDDEN][1].bias -= 0.5
    drift = state.notes["drift"].numpy()
    assert np.isnan(drift[0])
    assert drift[1] == pytest.approx(0, abs=1e-6)
    assert drift[2] == pytest.approx(0.5, abs=1e-3)  # batch norm's output has a deviation of one


def test_quantiles_and_histogram_are_of_what_arrives_at_the_activation(lesson16):
    torch.manual_seed(0)
    state = state_of(lesson16, lesson16.LOOKS[0], lesson16.mlp(TASK))
    lesson16.note_quantiles(state)
    block = state.model[lesson16.HIDDEN]
    arriving = block[0](state.model[: lesson16.HIDDEN](state.split.validation.x))
    expected = [arriving.quantile(q, 0).mean().item() for q in (0.15, 0.5, 0.85)]
    assert state.notes["quantiles"][0].tolist() == pytest.approx(expected, rel=1e-5)
    assert state.model.training
    notes = lesson16.note_histogram(state.model, state.split)
    assert notes["histogram"].sum() == pytest.approx(1)
    assert notes["deviation"] == pytest.approx(arriving.std(0, correction=0).mean().item(), rel=1e-4)


def test_arrival_is_noted_once(lesson16):
    state = state_of(lesson16, 1)
    lesson16.note_arrival(state, 0.8)
    assert not state.notes  # it looks at every second step
    state.step = 2
    lesson16.note_arrival(state, 0.8)
    assert math.isnan(state.notes["steps"])
    right = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.LBFGS(right.parameters(), max_iter=60)
    train = make_split(load("digits"), 0).train

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(right, *train)
        loss.backward()
        return loss

    optimizer.step(closure)
    state = state_of(lesson16, 3, right)
    for step, target in ((2, 1.1), (3, 0.8), (4, 0.8), (6, 0.8)):
        state.step = step
        lesson16.note_arrival(state, target)
    assert state.notes["steps"] == 4
    accuracy = evaluate(right, state.split.validation)[1]
    lesson16.note_arrival(exact := state_of(lesson16, 2, right), accuracy)
    assert exact.notes["steps"] == 2  # at the target is there


def test_along_the_gradient_is_a_step_of_sgd(lesson16):
    torch.manual_seed(0)
    state = state_of(lesson16, 4)
    batch = Batch(*(each[:100] for each in state.split.train))
    before = deepcopy(state.model.state_dict())
    losses, changes = lesson16.along_the_gradient(state.model, batch, 0.05)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert len(losses) == len(lesson16.WALKS) + 1
    assert len(changes) == len(lesson16.WALKS)
    model = deepcopy(state.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * lesson16.WALKS[1])
    loss = cross_entropy(model, *batch)
    loss.backward()
    first = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert losses[0] == pytest.approx(loss.item(), rel=1e-4)
    optimizer.step()
    optimizer.zero_grad()
    loss = cross_entropy(model, *batch)
    loss.backward()
    second = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert losses[2] == pytest.approx(loss.item(), rel=1e-4)
    assert changes[1] == pytest.approx(((second - first).norm() / first.norm()).item(), rel=1e-3)
    lesson16.note_landscape(state)
    ranges, noted = state.notes["landscape"][0].numpy()
    rate = state.optimizer.param_groups[0]["lr"]
    losses, changes = lesson16.along_the_gradient(state.model, batch, rate)
    so_far = [losses[: i + 2].tolist() for i in range(len(changes))]
    assert ranges == pytest.approx([max(each) - min(each) for each in so_far], abs=1e-6)
    assert noted == pytest.approx(changes.tolist())
    assert state.notes["landscape"][1:].isnan().all()


def test_batch_norm_makes_the_gradient_grow_and_the_default_start_makes_it_vanish(lesson16):
    grown = {
        name: [lesson16.gradient_growth(lesson16.NETWORKS[name], n, "digits", 0) for n in (10, 20)]
        for name in (lesson16.BN, lesson16.DEFAULT)
    }
    assert 0 < grown[lesson16.BN][0] < grown[lesson16.BN][1]
    assert 0 > grown[lesson16.DEFAULT][0] > grown[lesson16.DEFAULT][1]


def comparison(metric, values):
    """A comparison that holds one number for each run; None stands for a diverged one."""
    runs = {
        arm: [
            Run(seed, final={metric: value}) if value is not None else Run(seed, diverged_at=1)
            for seed, value in enumerate(row)
        ]
        for arm, row in values.items()
    }
    return Comparison([0, 1], dict.fromkeys(values), dict.fromkeys(values, next(iter(values))), runs)


def test_a_run_trains_when_it_gets_half_right(lesson16):
    share = {"a": [0.49, 0.5], "b": [None, 0.9], "c": [0.6, 0.7]}
    runs = comparison("train_accuracy", share)
    assert [lesson16.share_that_trains(runs, arm).mean for arm in share] == [50, 50, 100]


def test_which_rates_work(lesson16):
    values = {f"x {rate:g}": [0.9 if rate < 0.1 else 0.1, None] for rate in lesson16.RATES}
    works = lesson16.working(comparison("validation_accuracy", values), "x", 0.8)
    assert works.shape == (2, len(lesson16.RATES))
    assert works[0].tolist() == [rate < 0.1 for rate in lesson16.RATES]
    assert not works[1].any()
    assert not lesson16.working(comparison("validation_accuracy", values), "x", 0.95).any()
    assert [lesson16.good_accuracy(name) for name in ("digits", "fashion-mnist")] == [0.8, 0.65]


def test_the_median_counts_a_diverged_run_as_infinite(lesson16):
    assert lesson16.median(np.array([3.0, 1.0, 2.0, 5.0, 4.0]))[:3] == (3, 2, 4)
    assert lesson16.median(np.array([np.nan, 1.0, 2.0, np.nan, 4.0]))[:3] == (4, 2, np.inf)


def test_the_mean_over_looks_leaves_out_what_is_missing(lesson16):
    table = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    means = lesson16.over_looks(table)
    assert means[0] == 2
    assert np.isnan(means[1])


def test_each_arm_gets_its_own_best_rate(lesson16):
    arms = {"a": lesson16.BASELINE, "b": lesson16.WITH}
    scores = {"a": 0.01, "b": 0.1}

    def tune(name, grids, count):
        assert all(list(grid) == [0.01, 0.1] for grid in grids.values())
        return SimpleNamespace(best=scores.get)

    best = lesson16.at_best_rate(SimpleNamespace(tune=tune), arms, (0.01, 0.1))
    assert {arm: recipe.optimizer.keywords["lr"] for arm, recipe in best.items()} == scores
    assert best["b"].model is lesson16.WITH.model
