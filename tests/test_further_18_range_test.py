from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from conftest import load_script
from torch import nn, optim

from common.data import Task, load, make_split
from common.training import fit

TASK = Task((1, 8, 8), 10)
SGD = partial(optim.SGD, lr=1.0, momentum=0.9)


@pytest.fixture
def script():
    return load_script("further/range_test.py")


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = make_split(load("digits"), 0, 20 * count).train
    return list(zip(x.split(20), y.split(20), strict=True))


def start(script) -> nn.Module:
    torch.manual_seed(0)
    return script.mlp(TASK)


@pytest.mark.parametrize("rule", [SGD, partial(optim.Adam, lr=1.0)])
def test_the_loop_is_an_ordinary_training_with_an_exponential_schedule(script, rule):
    model, expected = start(script), []
    optimizer = rule(model.parameters())
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 * 1.3**step)
    for x, y in batches(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x + 2 * torch.randn_like(x)), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    again = start(script)
    rates = [1e-4 * 1.3**step for step in range(15)]
    assert script.range_test(again, rule(again.parameters()), batches(15), rates) == pytest.approx(expected)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_loop_ends_with_rates_or_batches_or_an_explosion(script, monkeypatch):
    model = start(script)
    run = partial(script.range_test, model, SGD(model.parameters()))
    assert len(run(batches(5), [1e-3] * 3)) == 3
    assert len(run(batches(3), [1e-3] * 5)) == 3
    assert len(run(batches(20), [1e-3, 1e-3, 1e4] + [1e-3] * 17)) < 20
    given = iter([3.0, 5.0, 2.0, 7.9, 8.1, 2.0])
    monkeypatch.setattr(script, "noisy_loss", lambda model, x, y: 0 * model(x).sum() + next(given))
    assert run(batches(6), [1e-3] * 6) == pytest.approx([3.0, 5.0, 2.0, 7.9, 8.1])
    given = iter([3.0, torch.nan, 3.0])
    assert len(run(batches(6), [1e-3] * 6)) == 2


def test_the_running_mean(script):
    losses = np.random.default_rng(0).random(40)
    means, _ = script.read_off(losses, memory=0.7)
    for step in (0, 1, 7, 39):
        weights = [0.7 ** (step - i) for i in range(step + 1)]
        assert means[step] == pytest.approx(np.average(losses[: step + 1], weights=weights))
    assert script.read_off(np.full(40, 2.5))[0] == pytest.approx(2.5)


def test_the_fall_of_a_step_is_what_its_own_loss_is_below_the_mean(script):
    """So the steepest fall is that of the luckiest batch: it is why seeds do not agree."""
    losses = 3 + np.random.default_rng(0).random(100)
    means, (steepest, lowest) = script.read_off(losses)
    luck = (losses[1:] - means[:-1]) * 0.1  # the weights sum up to 1 / (1 - 0.9), nearly
    np.testing.assert_allclose(np.diff(means)[50:], luck[50:], rtol=0.01, atol=1e-6)
    assert 10 <= steepest <= lowest + 1


@pytest.mark.parametrize("tail", [(), (9.0,), (np.nan,), (np.inf,)])
def test_the_steps_read_off_a_curve_that_a_reader_can_draw(script, tail):
    losses = np.concatenate([np.full(30, 3.0), np.full(20, 1.0), np.full(20, 2.0), tail])
    means, (steepest, lowest) = script.read_off(losses)
    assert (steepest, lowest) == (30, 49)  # the first low loss; the last one
    assert means[lowest] == np.nanmin(means)
    early = losses.copy()
    early[:4] = 0.1  # a mean of few: before the tenth step nothing is read off
    early[4:10] = 4.0
    assert script.read_off(early)[1][1] == 49
    late = np.concatenate([np.linspace(3, 1, 60), np.full(5, 20.0), np.full(5, 1.5)])
    _, (steepest, lowest) = script.read_off(late)  # falls faster after it has exploded
    assert steepest <= lowest == 59
    rising = np.linspace(1, 2, 30)
    assert script.read_off(rising)[1] == [10, 9]


def test_a_seeds_test_has_the_data_and_the_start_of_its_training(script, monkeypatch):
    recipe, seen, original = script.network("SGD", 1.0, 50), [], script.noisy_loss

    def loss(model, x, y):
        seen.append((model[1].weight.detach().clone(), x.clone(), y.clone()))
        return original(model, x, y)

    monkeypatch.setattr(script, "noisy_loss", loss)
    rates = np.geomspace(1e-5, 1e-3, 12)
    losses = script.run_test(recipe, rates, "digits", "cpu", 7)
    assert script.run_test(recipe, rates, "digits", "cpu", 7) == losses
    assert script.run_test(recipe, rates, "digits", "cpu", 8) != losses
    train = make_split(load("digits"), 7, 1000, 0.4).train
    labels = {tuple(x.flatten().tolist()): y.item() for x, y in zip(*train, strict=True)}
    for _, x, y in seen[:12]:
        assert len(x) == 50
        assert [labels[tuple(each.flatten().tolist())] for each in x] == y.tolist()
    assert not torch.equal(seen[0][1], seen[1][1])
    (begun, _, _), seen[:] = seen[0], []
    fit(replace(recipe, loss=loss, epochs=1), [7])
    assert torch.equal(begun, seen[0][0])


class FakeLab:
    """Runs in this process and keeps what an experiment hands over."""

    def __init__(self, larger: int = 1) -> None:
        self.options = SimpleNamespace(seeds=[0, 1, 2], dataset="digits", device="cpu", larger=larger)
        self.executor, self.said, self.claims, self.tables = SimpleNamespace(map=map), [], [], []
        self.say = self.said.append

    def sized(self, recipe):
        return replace(recipe, examples=self.options.larger * recipe.examples)

    def claim(self, statement, source, effect, **limits):
        self.claims.append((statement, effect))

    def table(self, values, rows, columns):
        self.tables.append(values)

    def sweep(self, *arrays, **how):
        pass


def test_what_is_read_off_each_seeds_test(script):
    lab = FakeLab()
    read = script.run_tests(lab, "Adam", "100 steps")
    assert read.dims == ("reading", "seed")
    assert read.unit == "decades"
    np.testing.assert_allclose(read.sel(reading="minimum / 10"), read.sel(reading="minimum") - 1)
    rates, recipe = np.geomspace(1e-5, 10, 100), script.network("Adam", 1.0)
    for seed in lab.options.seeds:
        _, steps = script.read_off(script.run_test(recipe, rates, "digits", "cpu", seed))
        assert read.sel(seed=seed)[[0, 2]].values == pytest.approx(np.log10(rates[steps]))
    assert "minimum / 10 0.0" in lab.said[0]


@pytest.mark.parametrize(("test", "steps", "size"), [("400 steps", 400, 100), ("batches of 500", 100, 500)])
def test_the_kinds_of_test(script, monkeypatch, test, steps, size):
    asked = []

    def run_test(recipe, rates, data, device, seed):
        asked.append((len(rates), recipe.batch_size, recipe.examples, data, device, seed))
        return np.full(len(rates), 2.0)

    monkeypatch.setattr(script, "run_test", run_test)
    script.run_tests(FakeLab(larger=2), "SGD", test)
    assert asked == [(steps, size, 2000, "digits", "cpu", seed) for seed in (0, 1, 2)]


def test_the_recipe_is_lesson_18s(script):
    found = {}
    for kind in ("SGD", "Adam", "one-cycle"):
        recipe = script.network(kind, 0.05)
        assert (recipe.epochs, recipe.batch_size, recipe.examples, recipe.label_noise) == (60, 100, 1000, 0.4)
        assert recipe.schedule_every == "batch"
        optimizer = recipe.optimizer(recipe.model(TASK).parameters())
        rates = []
        if recipe.schedule:
            schedule = recipe.schedule(optimizer, 600)
            for _ in range(600):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step() if len(rates) < 600 else None
        group = optimizer.param_groups[0]
        found[kind] = (type(optimizer), group["lr"] if not rates else max(rates), bool(rates))
    assert found == {
        "SGD": (optim.SGD, 0.05, False),
        "Adam": (optim.Adam, 0.05, False),
        "one-cycle": (optim.SGD, pytest.approx(0.05), True),
    }
    assert script.network("SGD", 0.1).optimizer.keywords == {"lr": 0.1, "momentum": 0.9, "fused": True}
    assert rates[0] == pytest.approx(0.05 / 25)
    assert rates[-1] < 1e-6


def test_he_start(script):
    torch.manual_seed(0)
    weights = torch.cat([script.mlp(TASK)[1].weight.flatten() for _ in range(20)])
    assert weights.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "one-cycle"])
def test_the_seeds_train_as_one_stack(script, kind):
    ((arrays, _),) = fit(replace(script.network(kind, 0.01), epochs=1), [0, 1])
    assert arrays["seconds"][2]["alone"] == ""


def test_each_seed_takes_the_rate_of_the_grid_that_is_next_to_its_own(script, monkeypatch):
    """Accuracies from which kind, rate and seed can be read: each looked up where it should be."""
    lab, seeds = FakeLab(), [0, 1, 2]

    def study(recipe, kind, rate):
        shape = (len(kind), len(rate), len(seeds))
        values = np.arange(np.prod(shape)).reshape(shape).astype(float)
        dims = {"kind": list(kind), "rate": list(rate), "seed": seeds}
        tested = xr.DataArray(values, dims, list(dims), attrs={"unit": "%"})
        validation = xr.zeros_like(tested)
        for each, best in zip(kind, (0.01, 0.003, 0.1), strict=True):
            validation.loc[each, best] = 90
        return xr.Dataset({"test_accuracy": tested, "validation_accuracy": validation})

    lab.study, read = study, {"SGD": [0.0008, 0.002, 0.004], "Adam": [0.02, 0.0014, 0.00025]}

    def run_tests(lab, kind, test):
        minimum = np.log10(read[kind]) + 1
        places = {"reading": ["steepest", "minimum / 10", "minimum"], "seed": seeds}
        return xr.DataArray([minimum - 2, minimum - 1, minimum], places, list(places), attrs={"unit": "decades"})

    monkeypatch.setattr(script, "run_tests", run_tests)
    script.against_the_grid(lab)
    tested, found = lab.tables
    for kind, own in (("SGD", "SGD"), ("Adam", "Adam"), ("one-cycle", "SGD")):
        nearest = {0.0008: 0.001, 0.002: 0.003, 0.004: 0.003, 0.02: 0.03, 0.0014: 0.001, 0.00025: 0.0003}
        for seed in seeds:
            expected = tested.sel(kind=kind, rate=nearest[read[own][seed]], seed=seed)
            assert found.sel(kind=kind, reading="minimum / 10", seed=seed) == expected
    (_, gain), (_, lower), (_, off) = lab.claims
    best = tested.sel(kind="SGD", rate=0.01)
    assert gain.values.tolist() == (found.sel(kind="SGD", reading="minimum / 10") - best).values.tolist()
    assert lower.values == pytest.approx(np.log10(read["Adam"]) - np.log10(read["SGD"]))
    assert off.values == pytest.approx(np.abs(np.log10(read["SGD"]) + 1 - np.log10(0.1)))
    assert (gain.unit, lower.unit, off.unit) == ("%", "decades", "decades")
