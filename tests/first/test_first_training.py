import copy
import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from first_recipes import DIVERGES, SGD, SMALL, linear, noisy
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR

from common.first.data import Batch, load, make_split
from common.first.training import State, evaluate, fit, seed_torch, split_for

seen: list = []


def remember(state: State) -> None:
    seen.append((state.step, state.optimizer.param_groups[0]["lr"]))


def test_fit_is_the_loop_one_would_write_by_hand():
    """Plain SGD, full batches: two epochs by hand give the same weights and losses."""
    weights = {}

    def keep(model: nn.Module, split) -> dict:
        weights.update(copy.deepcopy(model.state_dict()))
        return {}

    recipe = replace(SMALL, batch_size=100, epochs=2)
    run = fit(recipe, seed=4, inspect=keep)
    split = make_split(load("digits"), 4, 100)
    starts = []

    def first(model: nn.Module, split) -> dict:
        starts.append(copy.deepcopy(model))
        return {}

    fit(replace(recipe, epochs=0), seed=4, inspect=first)
    model = starts[0]
    optimizer = SGD(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(split.train.x), split.train.y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name])
    assert run.final["test_loss"] == pytest.approx(F.cross_entropy(model(split.test.x), split.test.y).item(), rel=1e-5)


def test_evaluate_weighs_by_examples_in_eval_mode_and_restores_the_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    batch = Batch(torch.randn(4999, 1, 2, 2), torch.randint(3, (4999,)))  # two full pieces and a ragged one
    loss, accuracy = evaluate(model, batch)
    assert model.training
    logits = model.eval()(batch.x)
    assert loss == pytest.approx(F.cross_entropy(logits, batch.y).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == batch.y).float().mean().item())


def test_arms_of_a_seed_share_split_start_and_batches_whatever_they_draw():
    traces: dict[str, list] = {}

    def trace(name: str):
        def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            traces.setdefault(name, []).append((x.clone(), y.clone(), model[-1].weight.detach().clone()))
            return F.cross_entropy(model(x), y)

        return loss

    fit(replace(SMALL, loss=trace("plain")), seed=7)
    fit(replace(SMALL, model=noisy, loss=trace("noisy")), seed=7)
    assert len(traces["plain"]) == len(traces["noisy"]) == 12
    for (x1, y1, _), (x2, y2, _) in zip(traces["plain"], traces["noisy"], strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)
    assert torch.equal(traces["plain"][0][2], traces["noisy"][0][2])
    assert not torch.equal(traces["plain"][-1][2], traces["noisy"][-1][2])


def test_same_seed_same_run_other_seed_other_run():
    a, b, c = (fit(replace(SMALL, model=noisy), seed) for seed in (0, 0, 1))
    assert (a.history, a.final, a.best) == (b.history, b.final, b.best)
    assert a.final != c.final


def test_measures_at_most_as_often_as_asked_and_always_first_and_last():
    run = fit(replace(SMALL, epochs=30, evaluations=7), 0)
    assert run.history["epoch"][0] == 0
    assert run.history["epoch"][-1] == 30
    assert len(run.history["epoch"]) == 8
    assert {len(values) for values in run.history.values()} == {8}


def test_best_is_the_lowest_validation_loss():
    run = fit(replace(SMALL, epochs=20, evaluations=20, label_noise=0.4), 1)
    lowest = min(run.history["validation_loss"])
    assert run.best["validation_loss"] == lowest
    assert run.best["epoch"] == run.history["epoch"][run.history["validation_loss"].index(lowest)]
    assert run.value("best_test_accuracy") == run.best["test_accuracy"]
    assert run.value("gap") == run.final["validation_loss"] - run.final["train_loss"]


def test_reported_loss_is_plain_cross_entropy_whatever_is_minimised():
    def doubled(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * F.cross_entropy(model(x), y)

    once = fit(replace(SMALL, epochs=1), 0)
    twice = fit(replace(SMALL, epochs=1, loss=doubled), 0)
    assert once.history["train_loss"][0] == twice.history["train_loss"][0]


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_schedule_steps_as_often_as_the_recipe_says(every):
    seen.clear()
    recipe = replace(SMALL, schedule=lambda o, n: ExponentialLR(o, 0.5), schedule_every=every, after_step=remember)
    fit(recipe, 0)
    drops = {"epoch": [(step - 1) // 4 for step in range(1, 13)], "batch": list(range(12))}[every]
    assert seen == [(step, 0.1 * 0.5**drop) for step, drop in zip(range(1, 13), drops, strict=True)]


def test_schedule_is_told_how_often_it_will_be_stepped():
    periods = []

    def schedule(optimizer: torch.optim.Optimizer, n: int) -> LinearLR:
        periods.append(n)
        return LinearLR(optimizer)

    fit(replace(SMALL, schedule=schedule), 0)
    fit(replace(SMALL, schedule=schedule, schedule_every="batch"), 0)
    assert periods == [3, 12]


def test_after_epoch_can_stop_and_the_stop_is_measured():
    run = fit(replace(SMALL, epochs=50, evaluations=2, after_epoch=lambda state: state.epoch == 3), 0)
    assert run.history["epoch"][-1] == 3
    assert run.value("test_accuracy") > 0.3


def test_hooks_leave_notes():
    def note(state: State) -> None:
        state.notes.setdefault("steps", []).append(state.step)

    run = fit(replace(SMALL, after_step=note), 0, inspect=lambda model, split: {"layers": len(model)})
    assert run.notes == {"steps": list(range(1, 13)), "layers": 2}


def test_divergence_is_a_result():
    run = fit(DIVERGES, 0, inspect=lambda model, split: {"never": 1})
    assert 1 <= run.diverged_at <= 16
    assert math.isnan(run.value("test_accuracy"))
    assert math.isnan(run.value("gap"))
    assert run.history["epoch"][0] == 0
    assert all(map(math.isfinite, run.history["validation_loss"]))
    assert run.notes == {}


def test_divergence_is_dated_to_the_first_step_whose_loss_is_not_finite():
    calls = []

    def breaks(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(model(x), y) + (math.inf if len(calls) == 6 else 0)

    run = fit(replace(SMALL, loss=breaks), 0)
    assert run.diverged_at == 6
    assert run.history["epoch"] == [0, 1]


def test_fresh_model_for_every_run():
    built = []

    def build(task) -> nn.Module:
        built.append(linear(task))
        return built[-1]

    recipe = replace(SMALL, model=build)
    first, second = fit(recipe, 0), fit(recipe, 0)
    assert built[0] is not built[1]
    assert first.final == second.final


def count_down(state: State) -> None:
    state.notes.setdefault("left", []).append(state.epochs - state.epoch)
    time.sleep(0.05)


def test_a_hook_knows_the_last_epoch_and_its_time_is_counted():
    run = fit(replace(SMALL, epochs=3, after_epoch=count_down), seed=0)
    assert run.notes["left"] == [2, 1, 0]
    assert run.seconds >= 3 * 0.05


def test_a_split_is_kept_for_the_arms_of_its_seed_and_for_no_other():
    kept = split_for("digits", 3, 100, 0.2, "cpu")
    assert split_for("digits", 3, 100, 0.2, "cpu") is kept
    for other in ((4, 100, 0.2), (3, 90, 0.2), (3, 100, 0.0)):
        split = split_for("digits", *other, "cpu")
        fresh = make_split(load("digits"), *other)
        assert all(
            torch.equal(a, b) for one, two in zip(split, fresh, strict=True) for a, b in zip(one, two, strict=True)
        )
        assert not torch.equal(split.train.x[:90], kept.train.x[:90]) or not torch.equal(split.train.y, kept.train.y)


def test_runs_leave_the_kept_split_as_it_was():
    before = [part.x.clone() for part in split_for("digits", 0, 200, 0.0, "cpu")]
    fit(replace(SMALL, examples=200, epochs=2), 0)
    after = split_for("digits", 0, 200, 0.0, "cpu")
    assert all(torch.equal(a, part.x) for a, part in zip(before, after, strict=True))


def test_seeding_gives_the_numbers_of_torchs_own():
    seed_torch(5, "cpu")
    ours = torch.randn(3), torch.nn.Linear(2, 2).weight
    torch.manual_seed(5)
    theirs = torch.randn(3), torch.nn.Linear(2, 2).weight
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_final_test_is_measured_whether_the_last_epoch_is_the_best_or_not():
    seen = []

    def look(model, split):
        seen.append(model.training)
        return {"test": evaluate(model, split.test)}

    best_last = []
    for epochs, rate in ((1, 0.01), (30, 0.3)):
        recipe = replace(SMALL, optimizer=partial(torch.optim.SGD, lr=rate), epochs=epochs, label_noise=0.9)
        run = fit(recipe, 0, inspect=look)
        assert (run.final["test_loss"], run.final["test_accuracy"]) == run.notes["test"]
        assert run.final["epoch"] == epochs
        best_last.append(run.best["epoch"] == epochs)
        run.final["test_loss"] = -1.0
        assert run.best["test_loss"] > 0
    assert best_last == [True, False]
    assert seen == [True, True]
