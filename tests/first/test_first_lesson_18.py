import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from common.first import data
from common.first.data import Task, load, make_split
from common.first.experiment import AllDivergedError, SameProcess, compare
from common.first.lab import Larger
from common.first.training import Run, State, cross_entropy, evaluate, fit

TASK = Task((1, 8, 8), 10)


def dummy(rate: float = 1.0, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate, **settings)


def rates_of(build, total: int, optimizer: torch.optim.Optimizer | None = None, what: str = "lr") -> list[float]:
    """What a training loop applies: the step first, then the scheduler."""
    optimizer = optimizer or dummy()
    scheduler = build(optimizer, total)
    seen = []
    for _ in range(total):
        seen.append(float(optimizer.param_groups[0][what]))
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("total", [4, 10, 37, 200])
@pytest.mark.parametrize(
    "name",
    ["StepLR", "MultiStepLR", "ExponentialLR", "linear", "cosine", "warm restarts", "warm-up + cosine", "one-cycle"],
)
def test_each_formula_is_torchs(lesson18, name, total):
    by_hand = [lesson18.BY_HAND[name](t, total) for t in range(total)]
    assert rates_of(lesson18.IN_TORCH[name], total) == pytest.approx(by_hand, abs=1e-12)
    assert max(by_hand) <= 1


@pytest.mark.parametrize("total", [20, 37, 200])
def test_one_cycle_moves_the_momentum_and_has_a_triangle(lesson18, total):
    optimizer = dummy(momentum=0.5)
    momentum = rates_of(lesson18.torch_one_cycle, total, optimizer, "momentum")
    assert momentum == pytest.approx([lesson18.one_cycle(t, total, 0.95, 0.85, 0.95) for t in range(total)])
    build = partial(lesson18.torch_one_cycle, triangle=True)
    assert rates_of(build, total) == pytest.approx([lesson18.triangle(t, total) for t in range(total)])


def test_shares_of_the_steps_are_rounded(lesson18):
    assert [lesson18.part(total, 0.3) for total in (1, 5, 10, 100)] == [1, 2, 3, 30]


def test_the_schedules_in_numbers(lesson18):
    """By the paper or the documentation, not by PyTorch's code."""
    assert [lesson18.step_decay(t, 100) for t in (0, 29, 30, 60, 99)] == pytest.approx([1, 1, 0.1, 0.01, 1e-3])
    assert [lesson18.multi_step(t, 100) for t in (49, 50, 74, 75)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert lesson18.exponential(100, 100) == pytest.approx(0.01)
    assert [lesson18.cosine(t, 100) for t in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert [lesson18.linear(t, 100) for t in (0, 50, 75)] == pytest.approx([1, 0.5, 0.25])
    assert [lesson18.warm_restarts(t, 70) for t in (0, 5, 10, 20, 30, 50)] == pytest.approx([1, 0.5, 1, 0.5, 1, 0.5])
    assert [lesson18.warm_up_cosine(t, 100) for t in (0, 10, 55)] == pytest.approx([0.01, 1, 0.5])
    assert [lesson18.one_cycle(t, 100) for t in (0, 29, 99)] == pytest.approx([0.04, 1, 4e-6])
    assert [lesson18.triangle(t, 100) for t in (0, 44, 88, 99)] == pytest.approx([0.04, 1, 0.04, 4e-6])
    assert lesson18.triangle(22, 100) == pytest.approx(0.52)


def test_the_rate_drawn_is_the_rate_applied(lesson18):
    """In a real run by `fit`, whatever is counted; this is the promise of the lesson."""
    total = lesson18.steps_of(lesson18.BASELINE)
    assert total == 200
    for name, by_hand in lesson18.BY_HAND.items():
        recipe = replace(lesson18.LINE_UP[name], epochs=10)
        rates = fit(recipe, 0).notes["rate"]
        assert rates == pytest.approx([0.03 * by_hand(t, 20) for t in range(20)], abs=1e-12), name
    by_epoch = replace(lesson18.LINE_UP["cosine"], epochs=10, schedule_every="epoch")
    assert fit(by_epoch, 0).notes["rate"] == pytest.approx([0.03 * lesson18.cosine(t // 2, 10) for t in range(20)])
    assert fit(replace(lesson18.BASELINE, epochs=3), 0).notes["rate"] == [0.03] * 6


def test_the_momentum_is_noted_beside_the_rate(lesson18):
    assert fit(replace(lesson18.BASELINE, epochs=1), 0).notes["momentum"] == [0.9, 0.9]
    adam = replace(lesson18.at_rate(lesson18.BASELINE, 0.01, lesson18.ADAM), epochs=1)
    assert all(map(math.isnan, fit(adam, 0).notes["momentum"]))


def test_the_table_of_shapes_shows_first_quarters_and_last(lesson18):
    from docs.readme import load_results

    table = load_results()["18_learning_rate_scheduling"]["experiments"]["shapes"]["table"][0]
    rows = {row[0]: row[1:] for row in table["rows"]}
    for name, by_hand in lesson18.BY_HAND.items():
        assert rows[name][:5] == [f"{0.1 * by_hand(t, 80):.1e}" for t in (0, 19, 39, 59, 79)]
    assert all(float(row[5]) < 1e-12 for row in rows.values())


def test_every_schedule_takes_a_run_of_two_steps(lesson18):
    for name, recipe in lesson18.LINE_UP.items():
        assert fit(replace(recipe, epochs=1), 0).diverged_at is None, name


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_by_hand_is_torchs(lesson18, monkeypatch, mode, patience):
    draw = np.random.default_rng(patience)
    losses = (2 * np.exp(-np.arange(60) / 10) + 0.3 * draw.random(60)).tolist()
    losses[20:23] = [losses[19] * (1 - 0.5e-4)] * 3  # better, but by too little
    losses[40:46] = [0.01 * (1 - 5e-4) ** i for i in range(6)]  # better, if only just enough
    optimizer, theirs = dummy(0.1), dummy(0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(theirs, mode=mode, patience=patience, min_lr=1e-6)
    shown = iter(losses)
    monkeypatch.setattr(lesson18, "evaluate", lambda model, batch: (next(shown), 0.0))
    state = State(nn.Linear(1, 1), optimizer, SimpleNamespace(validation=None), 60)
    for loss in losses:
        lesson18.reduce_on_plateau(state, patience=patience, mode=mode)
        scheduler.step(loss)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["lr"] < 0.1
    assert state.notes["watched"] == losses


def test_plateau_in_a_run_watches_validation_and_fires(lesson18):
    recipe = replace(lesson18.LINE_UP["plateau"], epochs=30, evaluations=30)
    recipe = replace(recipe, after_epoch=partial(lesson18.reduce_on_plateau, patience=0))
    run = fit(recipe, 0)
    assert run.notes["watched"] == pytest.approx(run.history["validation_loss"][1:])
    rates = run.notes["rate"]
    optimizer = dummy(0.03)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=1e-6)
    for epoch, loss in enumerate(run.notes["watched"]):
        assert rates[2 * epoch : 2 * epoch + 2] == pytest.approx([float(optimizer.param_groups[0]["lr"])] * 2)
        scheduler.step(loss)
    assert rates[-1] < 0.03
    assert lesson18.drops(rates)


def test_plateau_in_torch_and_drops(lesson18):
    rates = lesson18.plateau_in_torch(0.1, [1.0] * 25)
    assert rates[:12] == [0.1] * 12
    assert rates[12] == pytest.approx(0.01)
    assert lesson18.drops(rates) == [12, 23]
    assert lesson18.drops([1.0, 2.0, 2.0]) == []
    assert lesson18.drops([]) == []


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_by_hand_is_torchs(lesson18, betas):
    torch.manual_seed(0)
    theirs = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    mean, square = torch.zeros(2, 6, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam([theirs], lr=0.05, betas=betas)
    for t in range(1, 30):
        gradient = torch.randn(6, 4, dtype=torch.float64) * 10.0 ** torch.randint(-6, 3, (6, 4))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        lesson18.adam_step(ours, mean, square, t, 0.05, betas)
        optimizer.step()
        torch.testing.assert_close(ours, theirs)
    assert lesson18.adam_against_torch() < 1e-5


def test_adams_first_step_is_the_rate_whatever_the_gradient(lesson18):
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.tensor([1e-3, -5.0, 1e3])
    lesson18.adam_step(weight, torch.zeros(3), torch.zeros(3), 1, 0.1)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1, -0.1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_the_networks_take_any_image(lesson18, shape):
    for build in (lesson18.mlp, lesson18.post_norm_net):
        assert build(Task(shape, 7))(torch.randn(4, *shape)).shape == (4, 7)
    hidden = lesson18.mlp(Task(shape, 7), 2000)[1].weight.detach()
    assert float(hidden.std()) == pytest.approx(math.sqrt(2 / math.prod(shape)), rel=0.05)
    blocks = [layer for layer in lesson18.post_norm_net(TASK) if isinstance(layer, lesson18.PostNorm)]
    assert len(blocks) == 12
    out = blocks[0](torch.randn(50, 32))
    torch.testing.assert_close(out.mean(1), torch.zeros(50), atol=1e-5, rtol=0)  # the norm comes last


def test_noise_is_on_the_images_and_anew_each_time(lesson18):
    seen = []

    def model(x):
        seen.append(x)
        return torch.zeros(len(x), 10)

    x, y = torch.zeros(400, 1, 8, 8), torch.zeros(400, dtype=torch.long)
    assert lesson18.noisy_images(model, x, y).item() == pytest.approx(math.log(10))
    lesson18.noisy_images(model, x, y)
    assert float(seen[0].std()) == pytest.approx(1, rel=0.02)
    assert not torch.equal(seen[0], seen[1])


def comparison(lesson18, history, final, diverged=None):
    """Two made-up runs of one arm."""
    runs = []
    for seed, (values, last) in enumerate(zip(history, final, strict=True)):
        run = Run(seed, {"epoch": list(range(len(values))), "validation_accuracy": values})
        run.final = {"validation_accuracy": last, "train_accuracy": last}
        run.diverged_at = 3 if seed == diverged else None
        runs.append(run)
    return lesson18.Comparison([0, 1], {"a": lesson18.BASELINE}, {"a": "a"}, {"a": runs})


def test_gain_over_time_and_who_trained(lesson18):
    runs = comparison(lesson18, [[0.1, 0.5, 0.6, 0.7, 0.75], [0.1, 0.4, 0.6, 0.6, 0.4]], [0.75, 0.4])
    assert lesson18.gain_over_time(runs, "a") == pytest.approx([15, -20])
    assert lesson18.trained(runs, "a").tolist() == [True, False]
    lost = comparison(lesson18, [[0.1, 0.5, 0.6], [0.1]], [0.6, 0.9], diverged=1)
    assert np.isnan(lesson18.gain_over_time(lost, "a")).tolist() == [False, True]
    assert lesson18.trained(lost, "a").tolist() == [True, False]
    at_once = comparison(lesson18, [[0.1], [0.1]], [0.1, 0.1], diverged=1)
    assert lesson18.gain_over_time(at_once, "a")[0] == 0
    assert np.isnan(lesson18.gain_over_time(at_once, "a")[1])


def test_furthest(lesson18):
    assert lesson18.furthest([1, 2, 5], [1, 2.5, 4]) == 1
    assert lesson18.furthest([1, 2], [1, 2, 99]) == 0
    assert math.isnan(lesson18.furthest([], []))


def noisy_regression(seed: int = 0):
    split = make_split(load("digits"), seed, label_noise=0.3)
    return split


def test_components_are_whitened(lesson18):
    x = lesson18.components(noisy_regression())
    assert x.shape == (1000, 9)
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(9), atol=1e-4, rtol=0)
    assert torch.equal(x[:, -1], torch.ones(1000))


def test_the_minimum_is_one_and_its_noise_is_the_gradients_variance(lesson18):
    split = noisy_regression()
    x, y = lesson18.components(split), split.train.y
    weights, variance = lesson18.minimum(x, y)
    w = weights[0].clone().requires_grad_()
    F.cross_entropy(x @ w, y).backward()
    assert w.grad.abs().max() < 1e-3
    each = torch.func.vmap(torch.func.grad(lambda w, a, b: F.cross_entropy(a @ w, b)), (None, 0, 0))(weights[0], x, y)
    assert variance == pytest.approx(float((each - each.mean(0)).square().sum((1, 2)).mean()), rel=1e-3)
    assert (
        lesson18.regression_loss(weights, x, y)[0] < lesson18.regression_loss(weights + 0.1 * weights.sign(), x, y)[0]
    )


def test_sgd_excess_is_plain_sgd(lesson18):
    split = noisy_regression()
    x, y = lesson18.components(split), split.train.y
    best, _ = lesson18.minimum(x, y)
    rates = torch.tensor([[0.5] * 40, [0.5] * 20 + [0.05] * 20])
    seen = lesson18.sgd_excess(x, y, best, rates, 7, torch.Generator().manual_seed(3))
    assert seen.shape == (2, lesson18.FLOOR_LOOKS)
    weight = torch.zeros(9, 10, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    draw = torch.Generator().manual_seed(3)
    for t in range(40):
        if t == 20:
            optimizer.param_groups[0]["lr"] = 0.05
        i = torch.randint(len(x), (7,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(x[i] @ weight, y[i]).backward()
        optimizer.step()
    lowest = float(lesson18.regression_loss(best, x, y))
    assert seen[1, -1] == pytest.approx(float(F.cross_entropy(x @ weight.detach(), y)) - lowest, abs=1e-5)
    assert seen[0, :20] == pytest.approx(seen[1, :20], rel=1e-3)
    assert seen[0, -1] != seen[1, -1]


def test_smoothing_weighs_the_past_less_and_is_unbiased(lesson18):
    assert lesson18.smooth(np.full(5, 2.0)) == pytest.approx(np.full(5, 2.0))
    assert lesson18.smooth(np.array([1.0, 2.0, 4.0]), 0.5)[-1] == pytest.approx((0.25 + 1 + 4) / 1.75)


def test_suggestions_read_a_curve(lesson18):
    rates = np.geomspace(1e-5, 10, 61)
    losses = 2.3 - 1.5 / (1 + (0.01 / rates) ** 2) + np.where(rates > 1, 5 * rates, 0)
    found = lesson18.suggestions(rates, losses)
    assert 0.008 < found["steepest"] < 0.04  # smoothing lags by a few steps
    assert 0.05 < found["minimum / 10"] <= 0.13
    early = losses + np.where(np.arange(61) < 4, 3.0, 0)  # falls at the start, while the mean is of few
    late = losses.copy()
    late[-4:] = 60.0, 1.0, 1.0, 1.0  # falls again after it exploded
    for curve in (early, late):
        assert lesson18.suggestions(rates, curve)["steepest"] == pytest.approx(found["steepest"], rel=0.6)
    with pytest.raises(AllDivergedError, match="exploded"):
        lesson18.suggestions(rates[:11], losses[:11])


def test_the_range_test_raises_the_rate_and_stops_when_the_loss_explodes(lesson18):
    recipe = lesson18.at_rate(lesson18.BASELINE, 1.0)
    rates, losses = lesson18.range_test(recipe, 0, "digits", "cpu")
    assert 30 < len(rates) == len(losses) <= 60
    assert rates == pytest.approx(lesson18.SWEEP[: len(rates)])
    assert np.isfinite(losses).all()
    assert min(losses[:-1]) < 0.7 * losses[0]
    assert len(losses) < 60
    assert losses[-1] >= 4 * min(losses)
    assert all(losses[i] < 4 * min(losses[: i + 1]) for i in range(len(losses) - 1))
    again = lesson18.range_test(recipe, 0, "digits", "cpu")[1]
    assert (again == losses).all()
    lost = replace(recipe, loss=lambda model, x, y: math.nan * model(x).sum())
    rates, losses = lesson18.range_test(lost, 0, "digits", "cpu")
    assert len(rates) == len(losses) == 0


def test_a_range_test_starts_as_fit_does(lesson18):
    """The same start and batches: the first loss is that of the first batch of a run."""
    recipe = replace(lesson18.BASELINE, loss=cross_entropy)
    seen = []

    def loss(model, x, y):
        value = cross_entropy(model, x, y)
        seen.append(float(value.detach()))
        return value

    fit(replace(recipe, loss=loss, epochs=1), 3)
    assert lesson18.range_test(recipe, 3, "digits", "cpu")[1][0] == pytest.approx(seen[0])


def test_planned_cosines(lesson18):
    whole = rates_of(partial(lesson18.planned, share=1.0), 20)
    assert whole == pytest.approx([lesson18.cosine(t, 20) for t in range(20)])
    assert rates_of(partial(lesson18.planned, share=2.0), 20)[-1] > 0.5
    back = rates_of(partial(lesson18.planned, share=0.5), 20)
    assert min(back) < 1e-6
    assert back[-1] > 0.9


def test_warm_up_is_a_ramp(lesson18):
    assert rates_of(partial(lesson18.warm_up, steps=4), 7) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert rates_of(partial(lesson18.warm_up, steps=0), 3) == [1, 1, 1]


def test_the_optimisers_are_what_they_are_called(lesson18):
    made = {name: build([torch.zeros(2, requires_grad=True)], lr=0.1) for name, build in lesson18.OPTIMIZERS.items()}
    kinds = {name: type(each).__name__ for name, each in made.items()}
    assert kinds == dict.fromkeys(("SGD", "momentum", "Nesterov"), "SGD") | {
        name: name for name in ("RMSprop", "Adam", "AdamW")
    }
    assert [made[name].defaults["momentum"] for name in ("SGD", "momentum", "Nesterov")] == [0, 0.9, 0.9]
    assert made["Nesterov"].defaults["nesterov"]
    assert math.log10(lesson18.TRIED[-1] / lesson18.TRIED[0]) == pytest.approx(4)


def test_the_traps_apply_what_they_say(lesson18):
    trap = lesson18.TRAP
    total = lesson18.steps_of(trap)
    cosine = [0.03 * lesson18.cosine(t, trap.epochs) for t in range(total)]
    by_batch = fit(replace(trap, schedule=lesson18.counting_epochs), 0).notes["rate"]
    assert by_batch == pytest.approx(cosine, abs=1e-9)
    by_epoch = replace(trap, schedule=lesson18.counting_batches, schedule_every="epoch")
    rates = fit(by_epoch, 0).notes["rate"]
    assert rates == pytest.approx([0.03 * lesson18.one_cycle(t // 10, total) for t in range(total)])
    exhausted = fit(replace(trap, schedule=lesson18.plotted_first), 0).notes["rate"]
    assert max(exhausted) == pytest.approx(0.03 * 0.1**3)
    both = fit(replace(trap, schedule=lesson18.two_schedulers), 0).notes["rate"]
    product = [0.03 * lesson18.cosine(t, total) * lesson18.step_decay(t, total) for t in range(total)]
    assert both == pytest.approx(product, rel=1e-6, abs=1e-12)


def test_one_cycle_wins_over_a_scheduler_stepped_before_it(lesson18):
    """As the text says of two schedulers."""

    def both(optimizer, total):
        parts = [lesson18.torch_step(optimizer, total), lesson18.torch_one_cycle(optimizer, total)]
        return lr_scheduler.ChainedScheduler(parts, optimizer)

    alone = rates_of(lesson18.torch_one_cycle, 50, dummy(0.1, momentum=0.9))
    assert rates_of(both, 50, dummy(0.1, momentum=0.9)) == pytest.approx(alone)


def test_the_wrong_order_skips_the_first_rate_and_torch_warns(lesson18):
    right, wrong, warning = lesson18.wrong_order(4)
    assert right == [1, 0.5, 0.25, 0.125]
    assert wrong == [0.5, 0.25, 0.125, 0.0625]
    assert "lr_scheduler.step()` before `optimizer.step()" in warning


@pytest.mark.parametrize("name", ["cosine", "one-cycle", "warm-up + cosine", "StepLR"])
@pytest.mark.parametrize("at", [1, 3])
def test_resumed_with_the_schedulers_state_is_exactly_the_unbroken_run(lesson18, name, at):
    recipe = replace(lesson18.TRAP, schedule=lesson18.IN_TORCH[name], loss=cross_entropy, epochs=4)
    whole, rates, accuracy = lesson18.train_part(recipe, 0, 4)
    broken, before, _ = lesson18.train_part(recipe, 0, at)
    end, after, again = lesson18.train_part(recipe, 0, 4 - at, broken)
    assert before + after == rates
    assert again == accuracy
    for part in ("model", "optimizer"):
        assert str(end[part]) == str(whole[part])
    for weight in whole["model"]:
        assert torch.equal(end["model"][weight], whole["model"][weight])
    lost, other, _ = lesson18.train_part(recipe, 0, 4 - at, broken, ("model", "optimizer"))
    assert other != after
    assert any(not torch.equal(lost["model"][weight], whole["model"][weight]) for weight in whole["model"])


def test_train_part_trains_as_fit_does(lesson18):
    recipe = replace(lesson18.TRAP, schedule=lesson18.torch_cosine, loss=cross_entropy, epochs=3)
    run = fit(recipe, 5)
    saved, rates, accuracy = lesson18.train_part(recipe, 5, 3)
    assert rates == run.notes["rate"]
    assert accuracy == run.final["test_accuracy"]
    model = lesson18.mlp(TASK)
    model.load_state_dict(saved["model"])
    assert evaluate(model, make_split(load("digits"), 5, 100).test)[1] == accuracy


def test_arms_of_one_seed_start_from_the_same_network(lesson18):
    arms = {name: replace(recipe, epochs=1) for name, recipe in lesson18.LINE_UP.items()}
    runs = compare(arms, "constant", [0, 1], SameProcess())
    starts = {tuple(run.history["train_loss"][0] for run in runs.runs[name]) for name in arms}
    assert len(starts) == 1


@pytest.mark.parametrize("name", ["cosine", "StepLR"])
def test_interrupt_compares_three_ways(lesson18, name):
    recipe = replace(lesson18.TRAP, schedule=lesson18.IN_TORCH[name], loss=cross_entropy, epochs=4)
    ended = lesson18.interrupt(recipe, 1, "digits", "cpu")
    whole, kept, lost = (ended[way] for way in ("uninterrupted", "with the scheduler", "without the scheduler"))
    assert kept == whole
    assert whole[2] == 0
    broken, *_ = lesson18.train_part(recipe, 1, 2)
    end, *_ = lesson18.train_part(recipe, 1, 2, broken, ("model", "optimizer"))
    unbroken, *_ = lesson18.train_part(recipe, 1, 4)
    apart = [float((end["model"][name] - unbroken["model"][name]).abs().max()) for name in end["model"]]
    assert lost[2] == max(apart) > 1e-4
    assert len(whole[1]) == len(lost[1]) == 40
    assert lost[1][:20] == whole[1][:20]
    assert lost[1][20:] != whole[1][20:]


def test_floors_rise_with_the_rate_and_fall_with_the_batch(lesson18):
    seen, theory = lesson18.floors(0, 480, "digits", "cpu")
    last = np.array(seen)[:, :, -10:].mean(2)
    assert last.shape == (len(lesson18.FLOOR_BATCHES), len(lesson18.FLOOR_RATES) + 1)
    assert (np.diff(last[:, :-1], axis=1) > 0).all()
    assert (np.diff(last[:, :-1], axis=0) < 0).all()
    assert (last[:, -1] < last[:, -2]).all()
    assert np.array(seen)[:, -1, :20] == pytest.approx(np.array(seen)[:, -2, :20], rel=1e-2)
    ratio = last[1, 0] / (theory * lesson18.FLOOR_RATES[0] / lesson18.FLOOR_BATCHES[1])
    assert 0.7 < ratio < 1.6


def test_schedules_made_for_a_number_of_steps_follow_the_sizes_of_larger_sets(lesson18, tmp_path, monkeypatch):
    """Twice the images and epochs: one-cycle must be made for four times the steps, or it would raise."""
    monkeypatch.setattr(lesson18, "LARGER", Larger(examples=2, epochs=2, seeds=1))
    monkeypatch.setattr(data, "load_torchvision", lambda name, folder: data.load_digits())
    monkeypatch.setattr(data, "kept", {})
    lesson18.main(["--dataset", "mnist", "--only", "traps", "--jobs", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / lesson18.LESSON / "results.json").read_text(encoding="utf-8"))
    arms = record["experiments"]["traps"]["arms"]
    for arm in ("right: cosine", "right: one-cycle"):
        (run,) = arms[arm]["runs"]
        assert run["history"]["epoch"][-1] == 20
        assert run["history"]["learning_rate"][-1] < 1e-4
