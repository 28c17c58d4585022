"""Resuming exactly: the loop against an ordinary one, what a checkpoint holds, and what each forgotten part changes."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from torch import nn
from torch.optim import lr_scheduler

from common.data import Task, derive, load, make_split
from common.lab import Lab
from common.lesson import parse
from runner.workers import workers

TASK = Task((1, 8, 8), 10)


@pytest.fixture
def script():
    return load_script("further/resuming_exactly.py")


@pytest.fixture
def recipe(script):
    """Three epochs of two batches before the break, and three after it."""
    return replace(script.RECIPE, epochs=3, examples=100)


def flat(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def data_of(recipe, seed: int = 0):
    return make_split(load("digits"), seed, recipe.examples, recipe.label_noise).train


def reach(script, recipe, epochs: int, path, seed: int = 0):
    return script.train(recipe, seed, TASK, data_of(recipe), epochs, path)


def test_the_loop_is_an_ordinary_one(script, recipe, tmp_path):
    """Adam, dropout and the cosine, written out once more, without a checkpoint."""
    x, y = data_of(recipe)
    torch.manual_seed(derive(0, "start"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(derive(0, "batches"))
    torch.manual_seed(derive(0, "masks"))
    rates, losses = [], []
    for step in range(12):
        if step % 2 == 0:
            batches = torch.randperm(100, generator=order).split(50)
        rates.append(0.005 * (1 + math.cos(math.pi * step / 12)))
        optimizer.param_groups[0]["lr"] = rates[-1]
        loss = F.cross_entropy(model(x[batches[step % 2]]), y[batches[step % 2]])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained, applied, seen = reach(script, recipe, 6, tmp_path / "whole")
    torch.testing.assert_close(flat(trained), flat(model), atol=1e-5, rtol=1e-4)
    assert applied == pytest.approx(rates)
    assert seen == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["ADAM", "SGD"])
@pytest.mark.parametrize("stops", [(3,), (1, 2, 5)])
def test_interrupted_however_often_the_weights_are_the_same(script, recipe, tmp_path, optimizer, stops):
    recipe = replace(recipe, optimizer=getattr(script, optimizer))
    whole, rates, losses = reach(script, recipe, 6, tmp_path / "whole")
    seen_rates, seen_losses = [], []
    for stop in (*stops, 6):
        torch.rand(7)  # what happens in between has no influence
        model, *part = reach(script, recipe, stop, tmp_path / "resumed")
        seen_rates += part[0]
        seen_losses += part[1]
    assert torch.equal(flat(model), flat(whole))
    assert seen_rates == rates
    assert seen_losses == losses


def test_another_process_goes_on_with_exactly_the_same_weights(script, recipe, tmp_path):
    whole, *_ = reach(script, recipe, 6, tmp_path / "whole")
    reach(script, recipe, 3, tmp_path / "resumed")
    program = (
        "import sys; from dataclasses import replace; from pathlib import Path; import torch\n"
        "from common.data import Task, load, make_split; from further import resuming_exactly as script\n"
        "torch.set_num_threads(1); recipe = replace(script.RECIPE, epochs=3, examples=100)\n"
        "data = make_split(load('digits'), 0, 100).train\n"
        "script.train(recipe, 0, Task((1, 8, 8), 10), data, 6, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "resumed")], cwd=ROOT, check=True)
    saved = torch.load(tmp_path / "resumed", weights_only=True)
    assert saved["epoch"] == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(saved["model"][name], value)


def test_a_checkpoint_is_written_whole_or_not_at_all(script, recipe, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    reach(script, recipe, 2, path)
    before = path.read_bytes()

    def power_fails(saved, place):
        place.write_bytes(b"half a check")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", power_fails)
        with pytest.raises(KeyboardInterrupt):
            reach(script, recipe, 3, path)
    assert path.read_bytes() == before
    reach(script, recipe, 6, path)
    assert torch.load(path, weights_only=True)["epoch"] == 6
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_holds_six_parts_and_each_epoch_has_one(script, recipe, tmp_path):
    for epochs in (1, 3):
        reach(script, recipe, epochs, tmp_path / "half")
        saved = torch.load(tmp_path / "half", weights_only=True)
        assert set(saved) == {*script.PARTS, "model"}
        assert saved["epoch"] == epochs
        assert saved["scheduler"]["last_epoch"] == 2 * epochs
        assert saved["optimizer"]["state"][0]["step"] == 2 * epochs


def test_what_is_forgotten(script):
    assert script.FORGOTTEN == {
        "none": (),
        "order": ("order",),
        "masks": ("masks",),
        "scheduler": ("scheduler",),
        "optimizer": ("optimizer",),
        "epoch": ("epoch",),
        "not in tutorial": ("order", "masks", "scheduler"),
        "all but model": ("order", "masks", "scheduler", "optimizer", "epoch"),
    }


@pytest.fixture
def lab(tmp_path):
    """A laboratory with three seeds, in which 100 images train for 2 epochs at least."""
    options = parse("resuming_exactly", "", [], ["--seeds", "3", "--longer", "2", "--out", str(tmp_path)])
    options.out.mkdir(parents=True)
    with workers(0, "digits") as executor:
        made = Lab("resuming_exactly", "", None, options, ["exactly"])
        made.executor, made.name, made.claims = executor, "exactly", []
        made.entry = {"question": "?", "printed": "", "varies": [], "figures": [], "studies": []}
        yield made

    noisy = replace(recipe, label_noise=0.5)
    runs = script.resumed(lab, "labels", {"right": recipe, "wrong": noisy})
    assert runs.sizes["step"] == 2 * 12  # twice as long, and without the epoch's number all of it once more
    assert runs.change.dims == ("labels", "forgotten", "seed")
    assert (runs.change.sel(forgotten="none") == 0).all()
    assert (runs.change.drop_sel(forgotten="none") > 1e-5).all()
    applied = runs.rate.isel(labels=0, seed=0) / 0.01
    steps = applied.notnull().sum("step")
    assert dict(zip(script.FORGOTTEN, steps.values.tolist(), strict=True)) == {
        **dict.fromkeys(script.FORGOTTEN, 12),
        "epoch": 24,
        "all but model": 24,
    }
    # The rate lives in the optimiser, the count of steps in the scheduler, which takes a rate from the last one.
    count = np.arange(24)
    cosine = 0.5 * (1 + np.cos(np.pi * count / 24))
    expected = {
        "none": cosine[12:],
        "masks": cosine[12:],
        "optimizer": 2 * cosine[12:],
        "scheduler": 0.5 * cosine[:12],
        "not in tutorial": 0.5 * cosine[:12],
        "all but model": cosine,
    }
    for forgotten, rates in expected.items():
        found = applied.sel(forgotten=forgotten).values[: len(rates)]
        np.testing.assert_allclose(found, rates, atol=1e-6)
    assert applied.sel(forgotten="epoch").values[-1] == pytest.approx(cosine[1], abs=1e-6)  # up again
    # What is forgotten shows at once: other batches or masks have another loss, other rates only later.
    loss = runs.loss.isel(labels=0)
    same = loss.sel(step=1) == loss.sel(step=1, forgotten="none")
    assert not same.sel(forgotten=["order", "masks"]).any()
    assert same.sel(forgotten=["scheduler", "optimizer", "epoch"]).all()


def test_accuracy_and_change_are_those_of_the_resumed_network(script, recipe, tmp_path):
    args = parse("resuming_exactly", "", [], [])
    forgotten = {"none": (), "optimizer": ("optimizer",)}
    found = script.interrupt(1, replace(recipe, label_noise=0.2), forgotten, args)
    split = make_split(load("digits"), 1, 100, 0.2)
    whole, *_ = script.train(recipe, 1, TASK, split.train, 6, tmp_path / "whole")
    script.train(recipe, 1, TASK, split.train, 3, tmp_path / "resumed")
    saved = torch.load(tmp_path / "resumed", weights_only=True)
    del saved["optimizer"]
    torch.save(saved, tmp_path / "resumed")
    resumed, *_ = script.train(recipe, 1, TASK, split.train, 6, tmp_path / "resumed")
    for (arrays, (note,)), model in zip(found, (whole, resumed), strict=True):
        assert arrays["seed"] == [1]
        right = model.eval()(split.test.x).argmax(1) == split.test.y
        assert note["test_accuracy"][1] == pytest.approx(100 * right.double().mean().item())
        assert note["change"] == pytest.approx((flat(model) - flat(whole)).abs().max().item())
    assert found[0][1][0]["change"] == 0 < found[1][1][0]["change"]


@pytest.mark.parametrize("name", ["ADAM", "SGD"])
def test_with_a_constant_rate_only_the_means_are_lost(script, recipe, tmp_path, name):
    """Adam's next step is then as long as the rate, SGD's the gradient's alone."""
    rule = partial(getattr(script, name).func, **(getattr(script, name).keywords | {"fused": False}))
    recipe = replace(recipe, optimizer=rule, schedule=lr_scheduler.StepLR, examples=50)
    before, *_ = reach(script, recipe, 3, tmp_path / "resumed")
    start = flat(before)
    saved = torch.load(tmp_path / "resumed", weights_only=True)
    peak = rule.keywords["lr"]
    assert saved["optimizer"]["param_groups"][0]["lr"] == peak
    del saved["optimizer"]
    torch.save(saved, tmp_path / "resumed")
    after, rates, _ = reach(script, recipe, 4, tmp_path / "resumed")
    assert rates == [peak]
    gradient = torch.cat([each.grad.flatten() for each in after.parameters()])
    step, there = flat(after) - start, gradient.abs() > 1e-4
    expected = -peak * (gradient.sign() if name == "ADAM" else gradient)
    torch.testing.assert_close(step[there], expected[there], atol=2e-6, rtol=2e-3)
    _, rates, _ = reach(script, recipe, 6, tmp_path / "resumed")
    assert set(rates) == {peak}


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 100), 0.004),
        (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100), 0.1),
    ],
)
def test_schedules_that_only_count_jump_back_when_they_start_afresh(schedule, first):
    def fresh():
        optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, schedule(optimizer)

    optimizer, scheduler = fresh()
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    saved = optimizer.state_dict()
    assert abs(saved["param_groups"][0]["lr"] / first - 1) > 0.4
    optimizer, scheduler = fresh()
    optimizer.load_state_dict(saved)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first, rel=0.1)


def test_networks_and_settings(script):
    recipe = script.RECIPE
    assert (recipe.epochs, recipe.examples, recipe.label_noise) == (10, 800, 0.0)
    assert recipe.optimizer.keywords["lr"] == 0.01
    assert (script.SGD.keywords["lr"], script.SGD.keywords["momentum"]) == (0.1, 0.9)
    layers = list(recipe.model(TASK))
    assert [type(layer) for layer in layers] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert (layers[1].out_features, layers[3].p) == (64, 0.2)
