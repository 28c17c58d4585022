import json
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from conftest import ROOT
from replay import changes, replay, study
from torch import nn
from torch.optim import lr_scheduler

from common.data import Task, load, make_split
from common.training import fit

NAME = "18_learning_rate_scheduling"
TASK = Task((1, 8, 8), 10)
RECORD = json.loads((ROOT / "results" / NAME / "results.json").read_text(encoding="utf-8"))
RATES = [0.003, 0.01, 0.03, 0.1, 0.3]
FORMULAS = {  # of the lesson, by schedule
    "StepLR": "step_decay",
    "exponential": "exponential",
    "cosine": "cosine",
    "warm-up + cosine": "warm_up_cosine",
    "one-cycle": "one_cycle",
}


def in_torch(name, optimizer, total):
    """PyTorch's own scheduler for so many steps, with the numbers that the lesson gives."""
    if name == "StepLR":
        return lr_scheduler.StepLR(optimizer, step_size=3 * total // 10, gamma=0.1)
    if name == "exponential":
        return lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / total))
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    if name == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=total)
    up = total // 10
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.01, end_factor=1, total_iters=up)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, total - up)], [up])


def sgd(rate=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate, momentum=0.9)


def applied(build, steps, what="lr", rate=0.1):
    """The rate, or the momentum, of each step, read from the optimiser; `build` makes a scheduler for it."""
    optimizer, seen = sgd(rate), []
    scheduler = build(optimizer)
    for _ in range(steps):
        seen.append(float(optimizer.param_groups[0][what]))
        optimizer.step()
        scheduler.step()
    return np.array(seen)


def formula_of(lesson18, name, total, peak=0.1):
    """The rate of each step by the lesson's formula."""
    return np.array([peak * getattr(lesson18, FORMULAS[name])(t, total) for t in range(total)])


@pytest.mark.parametrize("total", [50, 100, 150, 1000, 4000])
@pytest.mark.parametrize("name", FORMULAS)
def test_each_formula_is_torchs(lesson18, name, total):
    theirs = applied(lambda optimizer: in_torch(name, optimizer, total), total)
    np.testing.assert_allclose(formula_of(lesson18, name, total), theirs, rtol=1e-9, atol=1e-14)
    every, scheduler = lesson18.SCHEDULES[name]
    assert every == "batch"
    np.testing.assert_allclose(applied(partial(scheduler, total=total), total), theirs, rtol=1e-9, atol=1e-14)


def test_the_formulas_in_numbers(lesson18):
    """As the docstrings say them, not as PyTorch computes them."""
    assert {name: getattr(lesson18, formula) for name, formula in FORMULAS.items()} == lesson18.FORMULAS
    expected = {
        "StepLR": {0: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 90: 0.001},
        "exponential": {0: 1, 50: 0.1, 100: 0.01},
        "cosine": {0: 1, 25: 0.5 + 0.125**0.5, 50: 0.5, 100: 0},
        "warm-up + cosine": {0: 0.01, 5: 0.505, 10: 1, 55: 0.5, 100: 0},
        "one-cycle": {0: 0.04, 14.5: 0.52, 29: 1, 64: 0.5 + 2e-6, 99: 4e-6},
    }
    for name, values in expected.items():
        found = [lesson18.FORMULAS[name](t, 100) for t in values]
        assert found == pytest.approx(list(values.values()), abs=1e-12), name


def test_what_is_typed_follows_the_formulas_for_100_steps(lesson18):
    assert list(lesson18.TYPED) == list(FORMULAS)
    for name, build in lesson18.TYPED.items():
        rates = applied(build, 100)
        np.testing.assert_allclose(rates, formula_of(lesson18, name, 100), rtol=1e-3, atol=1e-9, err_msg=name)
        if name != "exponential":  # 0.955 is rounded
            np.testing.assert_allclose(rates, applied(lambda o, name=name: in_torch(name, o, 100), 100), rtol=1e-9)


def test_torchs_one_cycle_moves_the_momentum_against_the_rate(lesson18):
    rates, momenta = (applied(lesson18.TYPED["one-cycle"], 100, what) for what in ("lr", "momentum"))
    assert (momenta[0], momenta[rates.argmax()], momenta[-1]) == pytest.approx((0.95, 0.85, 0.95))
    assert rates.argmax() == 29
    assert (np.sign(np.diff(momenta)) == -np.sign(np.diff(rates))).all()


def test_the_triangle_is_had_by_the_two_arguments_that_the_text_names():
    build = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=100, anneal_strategy="linear", three_phase=True)
    rates = applied(build, 100)
    top, foot = rates.argmax(), 2 * rates.argmax()
    assert np.diff(rates[: top + 1]) == pytest.approx(rates[1] - rates[0])
    assert rates[: top + 1] == pytest.approx(rates[top : foot + 1][::-1])


LOSSES = {
    "steady": [1.0] * 60,
    "falling": [0.9**i for i in range(60)],
    "rising": [1.0 + i for i in range(60)],
    "by less than 0.01 %": [(1 - 0.99e-4) ** min(i, 1) for i in range(60)],
    "by more than 0.01 %": [(1 - 1.01e-4) ** i for i in range(60)],
    "noisy": (2 * np.exp(-np.arange(60) / 5) + 0.3 * np.random.default_rng(1).random(60)).tolist(),
    "twice": [1.0] * 9 + [0.5] * 9 + [0.6, 0.4] * 3 + [0.7] * 36,
}


@pytest.mark.parametrize("patience", [0, 1, 3, 10])
@pytest.mark.parametrize("losses", LOSSES)
def test_plateau_is_torchs(lesson18, losses, patience):
    optimizer, theirs = sgd(), []
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, eps=0)  # no drop is too small
    for loss in LOSSES[losses]:
        theirs.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    ours = 0.1 * np.array(lesson18.plateau(LOSSES[losses], patience))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=0)
    drops = len(set(theirs)) - 1
    assert drops == {"falling": 0, "by more than 0.01 %": 0, "steady": 58 // (patience + 1)}.get(losses, drops)
    assert drops > 1 or losses in ("falling", "by more than 0.01 %")


def looped(lesson18, monkeypatch, name, **options):
    """What the lesson's own loop returns, and the rate and momentum of each of its steps; the modes of its passes."""
    seen, build = SimpleNamespace(rates=[], momenta=[], modes=[]), torch.optim.SGD

    def optimizer(parameters, **given):
        built = build(parameters, **given)
        (group,) = built.param_groups
        built.register_step_pre_hook(
            lambda *_: seen.rates.append(group["lr"]) or seen.momenta.append(group["momentum"])
        )
        return built

    def flat(self, x):
        seen.modes.append((self.training, torch.is_grad_enabled(), len(x)))
        return x.flatten(1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", optimizer)
        patch.setattr(nn.Flatten, "forward", flat)
        seen.losses = lesson18.train(name, **options)
    return seen


def by_hand(rates, momenta):
    """The validation loss after each epoch of ten steps, by SGD written out, at these rates and momenta."""
    (x, y), (x_new, y_new), _ = make_split(load("digits"), 0, 500, 0.3)
    torch.manual_seed(0)
    first, last = nn.Linear(64, 64), nn.Linear(64, 10)
    weights = [*first.parameters(), *last.parameters()]
    speeds, losses, step = [torch.zeros_like(w) for w in weights], [], 0
    for _ in range(len(rates) // 10):
        order = torch.randperm(500)
        for i in range(0, 500, 50):
            batch = order[i : i + 50]
            loss = F.cross_entropy(last(first(x[batch].flatten(1)).relu()), y[batch])
            for w, speed, gradient in zip(weights, speeds, torch.autograd.grad(loss, weights), strict=True):
                speed.mul_(momenta[step]).add_(gradient)
                w.data -= rates[step] * speed
            step += 1
        losses.append(F.cross_entropy(last(first(x_new.flatten(1)).relu()), y_new).item())
    return losses


@pytest.mark.parametrize("epochs", [6, 4])
def test_the_loop_to_copy_steps_each_scheduler_at_its_place(lesson18, monkeypatch, capsys, epochs):
    for name in ("constant", "one-cycle", "cosine", "plateau"):
        seen = looped(lesson18, monkeypatch, name, epochs=epochs)
        by_epoch = {"constant": np.full(epochs, 0.1), "cosine": formula_of(lesson18, "cosine", epochs)}
        by_epoch["plateau"] = 0.1 * np.array(lesson18.plateau(seen.losses, 0))
        cycle = formula_of(lesson18, "one-cycle", 10 * epochs)
        assert seen.rates == pytest.approx(cycle if name == "one-cycle" else by_epoch[name].repeat(10)), name
        moved = applied(lambda o: in_torch("one-cycle", o, 10 * epochs), 10 * epochs, "momentum")
        assert seen.momenta == pytest.approx(moved if name == "one-cycle" else [0.9] * 10 * epochs)
        assert seen.losses == pytest.approx(by_hand(seen.rates, seen.momenta), rel=1e-3)
        assert seen.modes == epochs * (10 * [(True, True, 50)] + [(False, False, 397)])
        lines = capsys.readouterr().out.splitlines()
        for epoch, (line, loss) in enumerate(zip(lines, seen.losses, strict=True), 1):
            rate = f"{seen.rates[10 * epoch - 1]:.4f}"
            assert line == f"{name:9}, epoch {epoch}: rate {rate}, validation loss {loss:.2f}"
    assert len(set(seen.rates)) > (1 if epochs == 4 else 2)  # plateau fired, and then once more


def test_which_schedules_count_batches_and_which_epochs(lesson18):
    stepped = {name: every for name, (every, _) in lesson18.SCHEDULES.items()}
    assert stepped == dict.fromkeys(["constant", *FORMULAS], "batch") | {"plateau": "epoch"}
    assert lesson18.SCHEDULES["constant"][1] is None
    scheduler = lesson18.on_plateau(sgd(), 40, 3)
    assert (scheduler.factor, scheduler.patience, scheduler.mode) == (0.1, 3, "min")
    assert lesson18.on_plateau(sgd(), 40, 3, mode="max").mode == "max"
    assert lesson18.SCHEDULES["plateau"][1](sgd(), 40).patience == 10


def test_the_laboratory_applies_the_formula_times_the_peak(lesson18):
    for name, schedule in lesson18.SCHEDULES.items():
        recipe = lesson18.run(schedule, 0.03, epochs=20)
        ((found, _),) = fit(recipe, [4])
        assert found["epoch"][1].tolist() == list(range(21))
        rates, losses = (found[f"{each}_curve"][1][0] for each in ("learning_rate", "validation_loss"))
        expected = {"constant": [0.03] * 20, "plateau": [0.03 * f for f in lesson18.plateau(losses[1:].tolist(), 10)]}
        if name in FORMULAS:  # as the last of the ten batches of each epoch was stepped
            expected[name] = formula_of(lesson18, name, 200, 0.03)[9::10]
        np.testing.assert_allclose(rates[1:], expected[name], rtol=1e-6, atol=1e-12, err_msg=name)
    impatient = ("epoch", partial(lesson18.on_plateau, patience=0))
    ((found, _),) = fit(lesson18.run(impatient, 0.3, epochs=20), [4])
    rates, losses = (found[f"{each}_curve"][1][0][1:] for each in ("learning_rate", "validation_loss"))
    np.testing.assert_allclose(rates[:8], 0.3 * np.array(lesson18.plateau(losses.tolist(), 0))[:8], rtol=1e-6)
    assert rates[-1] < 0.03


def test_one_hidden_layer_of_64_units(lesson18):
    for task in (TASK, Task((3, 5, 5), 7)):
        model = lesson18.mlp(task)
        assert [type(layer).__name__ for layer in model] == ["Flatten", "Linear", "ReLU", "Linear"]
        assert model[1].out_features == 64
        assert model(torch.randn(4, *task.shape)).shape == (4, task.classes)


def test_noise_of_deviation_1_on_each_pixel_anew_at_each_call(lesson18):
    torch.manual_seed(0)
    x, y, logits = torch.full((2000, 1, 8, 8), 3.0), torch.arange(2000) % 10, torch.randn(2000, 10)
    seen = []
    for _ in range(2):
        loss = lesson18.noisy(lambda images: seen.append(images) or logits, x, y)
        torch.testing.assert_close(loss, F.cross_entropy(logits, y))
    assert (x == 3).all()
    for noise in (seen[0] - x, seen[1] - x, (seen[0] - seen[1]) / 2**0.5):  # the two are independent
        assert noise.std().item() == pytest.approx(1, abs=0.01)
        assert noise.mean((1, 2, 3)).std().item() == pytest.approx(1 / 8, rel=0.1)  # of each image
        assert noise.mean(0).std().item() == pytest.approx(2000**-0.5, rel=0.4)  # of each pixel


def test_twelve_blocks_with_the_norm_after_the_addition(lesson18):
    torch.manual_seed(0)
    for task in (TASK, Task((3, 5, 5), 7)):
        model = lesson18.post_norm(task)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        weights = dict(model.named_parameters())
        assert len(weights) == 2 + 12 * 6 + 2
        x = torch.randn(4, *task.shape)
        h = F.linear(x.flatten(1), weights["1.weight"], weights["1.bias"])
        for i in range(2, 14):
            inner = F.linear(h, weights[f"{i}.mlp.0.weight"], weights[f"{i}.mlp.0.bias"]).relu()
            h = h + F.linear(inner, weights[f"{i}.mlp.2.weight"], weights[f"{i}.mlp.2.bias"])
            h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            h = h * weights[f"{i}.norm.weight"] + weights[f"{i}.norm.bias"]
        assert h.shape == (4, 32)
        torch.testing.assert_close(model(x), F.linear(h, weights["14.weight"], weights["14.bias"]))


@pytest.fixture(scope="module")
def replayed():
    """The lesson's own experiments on the stored results of all networks."""
    return replay(RECORD)


def test_a_run_with_one_seed_comes_to_its_end(replayed):
    """Whoever takes away the factors of one value must leave the seed."""
    one = replay(RECORD, RECORD["settings"]["seeds"][:1])
    assert [claim["id"] for claim in one.judged] == [claim["id"] for claim in replayed.judged]


def arms(lesson18, asked):
    """By its label what makes each arm of a study differ from a constant rate; and the rates, the same for each arm."""
    tried = asked.levels.get("rate", [])
    found, rates = {label: set() for label in asked.labels}, {label: [] for label in asked.labels}
    place = list(asked.levels).index("rate")
    for labels, recipe in zip(product(*asked.levels.values()), asked.recipes, strict=True):
        label = " ".join(str(each) for i, each in enumerate(labels) if i != place)
        rate = recipe.optimizer.keywords["lr"]
        rates[label].append(rate)
        found[label].add(changes(recipe, lesson18.run(("batch", None), rate)))
    assert all(each == list(tried) for each in rates.values())
    return {label: " ".join(each) for label, each in found.items()}, list(tried)


def formula(name):
    return f"schedule=by_formula schedule.formula={FORMULAS[name]}"


def test_the_arms_of_each_study_differ_in_what_their_names_say_and_nothing_else(lesson18, replayed):
    base = lesson18.run(("batch", None), 0.03)
    assert (base.batch_size, base.examples, base.label_noise, base.epochs) == (50, 500, 0.3, 100)
    assert (base.loss, base.model, base.evaluations) == (lesson18.noisy, lesson18.mlp, 20)
    assert base.optimizer.func is torch.optim.SGD
    assert base.optimizer.keywords == {"momentum": 0.9, "fused": True, "lr": 0.03}
    by_schedule = {name: formula(name) for name in FORMULAS}
    waits = {p: f"schedule=on_plateau schedule.patience={p} schedule_every=epoch" for p in (0, 3, 10)}
    line_up = {"constant": ""} | by_schedule | {"plateau": waits[10]}
    # (a label has the schedule and what else the study varies, but for the rate)
    pair = {name: line_up[name] for name in ("constant", "cosine")}
    clean = {"cosine": f"examples=1000 label_noise=0.0 {line_up['cosine']}"}
    lengths = {(n, e): f"epochs={e} " for n in (*pair, "one-cycle") for e in (5, 10, 20, 50)}
    forty = {"constant": ""} | {f"patience {p}": each for p, each in waits.items()}
    forty["mode max"] = "schedule=on_plateau schedule.mode=max schedule.patience=3 schedule_every=epoch"
    forty |= {"cosine, planned": line_up["cosine"], "cosine, cut off": f"{line_up['cosine']} schedule.planned=2.0"}
    methods = {"SGD": "optimizer.momentum=0", "momentum": "", "Adam": "optimizer=Adam"}
    deep = "epochs=12 label_noise=0.0 loss=cross_entropy model=post_norm optimizer=Adam"
    slips = {name: line_up[name] for name in ("cosine", "one-cycle", "StepLR")}
    slips["stepped per batch"] = f"{formula('cosine')} schedule.planned=0.1"
    slips["stepped per epoch"] = f"{formula('one-cycle')} schedule.planned=10.0 schedule_every=epoch"
    slips["drawn first"] = "schedule=drawn_first"
    expected = {
        "hundred_epochs": [(line_up, [0.001, *RATES[:4]]), (clean, [0.03])],
        "budgets": [
            ({f"{n} {e}": start + line_up[n] for (n, e), start in lengths.items()}, RATES),
            ({"constant": ""}, [0.003, 0.01, 0.03]),
        ],
        "waiting": [({f"{n} 40": f"epochs=40 {each}" for n, each in forty.items()}, [0.1])],
        "optimizers": [
            ({f"constant 50 {name}": f"epochs=50 {each}" for name, each in methods.items()}, [0.0003, 0.001, *RATES]),
            ({"cosine 50 Adam": f"epochs=50 optimizer=Adam {line_up['cosine']}"}, [0.001, *RATES[:4]]),
        ],
        "warm_up": [({n: f"{deep} {formula(n)}" for n in ("cosine", "warm-up + cosine")}, [0.001, 0.003, 0.01, 0.03])],
        "traps": [({f"{n} 20": f"epochs=20 {each}" for n, each in slips.items()}, [0.1])],
    }
    found = {name: [arms(lesson18, each) for each in asked] for name, asked in replayed.asked.items() if asked}
    for name, studies in expected.items():
        stripped = [({label: each.strip() for label, each in levels.items()}, rates) for levels, rates in studies]
        assert found.pop(name) == stripped, name
    assert found == {}


def schedules(replayed):
    """Every schedule of the lesson, by its place and label."""
    found = {}
    for name, asked in replayed.asked.items():
        for label, schedule in (pair for each in asked for pair in each.levels["schedule"].items()):
            found[name, label] = schedule
    return found


def on_plateau(lesson18, schedule):
    return getattr(schedule[1], "func", None) is lesson18.on_plateau


def watched(lesson18, schedule, rate):
    """All that a run of two epochs starts from and is given: weights, images, labels and noise."""
    given = []

    def model(task):
        built = lesson18.mlp(task)
        given.extend(p.detach().clone() for p in built.parameters())
        return built

    def loss(network, x, y):
        given.extend([x, y])
        return lesson18.noisy(lambda images: given.append(images) or network(images), x, y)

    fit(replace(lesson18.run(schedule, rate, epochs=2), model=model, loss=loss), [3])
    return given


def test_runs_of_one_seed_share_weights_data_order_and_noise_whatever_the_schedule(lesson18, replayed):
    first = watched(lesson18, ("batch", None), 0.001)
    assert len(first) == 4 + 20 * 3
    for place, schedule in schedules(replayed).items():
        for a, b in zip(first, watched(lesson18, schedule, 0.1), strict=True):
            assert torch.equal(a, b), place


def test_all_schedules_but_plateau_train_as_one_stack(lesson18, replayed):
    wanted = "ReduceLROnPlateau follows each seed's own loss"
    for place, schedule in schedules(replayed).items():
        parts = fit(replace(lesson18.run(schedule, 0.01, epochs=1), evaluations=1), [0, 1])
        alone = [arrays["seconds"][2]["alone"] for arrays, _ in parts]
        assert alone == ([wanted] * 2 if on_plateau(lesson18, schedule) else [""]), place
    ((arrays, _),) = fit(replace(lesson18.transformer(lesson18.SCHEDULES["cosine"], 0.01), epochs=1), [0, 1])
    assert arrays["seconds"][2]["alone"] == ""
    for name, experiment in RECORD["experiments"].items():
        told = [each["data_vars"]["seconds"]["attrs"]["alone"] for each in experiment["studies"]]
        assert told[:1] == ([wanted] if name in ("hundred_epochs", "waiting") else [""])[: len(told)]
        assert not any(told[1:])


def test_a_cosine_that_is_cut_off_ends_at_half_of_its_peak(replayed):
    every, build = replayed.asked["waiting"][0].levels["schedule"]["cosine, cut off"]
    rates = applied(partial(build, total=400), 401)
    assert every == "batch"
    assert rates[[0, 400]] == pytest.approx([0.1, 0.05])
    np.testing.assert_allclose(rates, applied(lambda o: in_torch("cosine", o, 800), 401), rtol=1e-9)


def test_the_three_slips_apply_other_rates_than_were_meant(replayed):
    slips = replayed.asked["traps"][0].levels["schedule"]
    every, build = slips["stepped per batch"]  # a cosine for 20 epochs, in 200 batches
    rates = applied(partial(build, total=200), 200)
    assert every == "batch"
    np.testing.assert_allclose(rates, applied(lambda o: in_torch("cosine", o, 20), 200), rtol=1e-9, atol=1e-15)
    assert rates[20::40] == pytest.approx(0, abs=1e-12)
    assert rates[::40] == pytest.approx(0.1)
    assert (np.diff(rates[:21]) < 0).all()
    assert (np.diff(rates[20:41]) > 0).all()
    every, build = slips["stepped per epoch"]  # a one-cycle for 200 batches, in 20 epochs
    rates = applied(partial(build, total=20), 20)
    assert every == "epoch"
    np.testing.assert_allclose(rates, applied(lambda o: in_torch("one-cycle", o, 200), 20), rtol=1e-9)
    assert (np.diff(rates) > 0).all()
    assert rates[-1] < 0.5 * 0.1
    every, build = slips["drawn first"]
    for total in (10, 200, 800):
        rates = applied(partial(build, total=total), total)
        assert rates[0] == pytest.approx(0.0001)  # a thousandth of the peak
        assert (np.diff(rates) <= 0).all()
    assert every == "batch"


def test_drawing_a_schedule_changes_no_weight(lesson18):
    weight = torch.ones(3, requires_grad=True)
    optimizer = lesson18.SGD([weight], lr=0.1)
    lesson18.drawn_first(optimizer, 200)
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state


def test_the_stored_rates_are_the_formulas_times_the_peaks(lesson18, replayed):
    """Of every network of the reference run; plateau follows losses that are not all stored, but only falls."""
    for name, which in ((name, i) for name, asked in replayed.asked.items() for i in range(len(asked))):
        runs, asked = study(RECORD, name, which), replayed.asked[name][which]
        dims = [each for each in asked.levels if each not in asked.tuned]
        for values in product(*(asked.levels[each].items() for each in dims)):
            here = {each: label for each, (label, _) in zip(dims, values, strict=True)}
            given, arm = {each: value for each, (_, value) in zip(dims, values, strict=True)}, runs.sel(here)
            recipe = asked.recipe(**({"rate": float(arm.chosen_rate)} if asked.tuned else {}), **given)
            peak, per = recipe.optimizer.keywords["lr"], 10 * recipe.examples // 500
            rates = arm.learning_rate_curve.transpose("seed", "epoch").dropna("epoch", how="all")
            epochs = rates.epoch.values[1:]
            assert epochs[-1] == recipe.epochs
            every, build = given["schedule"]
            steps = (epochs * per if every == "batch" else epochs) - 1  # the last of each epoch
            total = recipe.epochs * (per if every == "batch" else 1)
            expected = np.full(len(steps), peak)
            if on_plateau(lesson18, given["schedule"]):
                assert set(np.round(np.log10(rates.values[:, 1:] / peak), 4).ravel()) <= set(-np.arange(9.0)), name
                assert (np.diff(rates.values) <= 0).all()
                continue
            if build:
                expected = applied(partial(build, total=total), total, rate=peak)[steps]
            np.testing.assert_allclose(rates.values[:, 1:], np.tile(expected, (len(rates), 1)), rtol=1e-4, atol=1e-8)


def test_each_rate_is_chosen_on_validation_by_seeds_that_are_not_reported(replayed):
    tuned = [(name, i) for name, asked in replayed.asked.items() for i, each in enumerate(asked) if each.tuned]
    assert tuned == [("hundred_epochs", 0)]
    for name, which in tuned:
        runs, (rate,) = study(RECORD, name, which), replayed.asked[name][which].tuned
        rates = [0.001, *RATES[:4]]
        assert (rate, runs.rate.values.tolist()) == ("rate", rates)
        assert len(runs.tuning_seed) == 3
        assert not set(runs.tuning_seed.values) & set(RECORD["settings"]["seeds"])
        scores = runs.grid.mean("tuning_seed").transpose(..., "rate").values.round(3)  # of equals the first wins
        chosen = runs.chosen_rate.values
        np.testing.assert_array_equal(chosen, np.array(rates)[scores.argmax(-1)])
        inside = (chosen > rates[0]) & (chosen < rates[-1])
        assert inside.all() or "at its edge" in replayed.printed[name], (name, which)


def test_the_figure_of_the_loop_shows_what_it_returned(lesson18, replayed):
    (figure,) = replayed.figures["your_own_loop"]
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["constant", "one-cycle", "cosine", "plateau"]
    for line in lines:
        assert line.get_ydata() == pytest.approx(lesson18.train(line.get_label()), rel=1e-3)
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]


def test_the_figure_of_the_shapes_lays_each_formula_over_the_rates_applied(lesson18, replayed):
    (figure,) = replayed.figures["shapes"]
    lines = [line for ax in figure.axes for line in ax.get_lines()]
    assert [line.get_label() for line in lines[::2]] == list(FORMULAS)
    for name, rates, by_formula in zip(FORMULAS, lines[::2], lines[1::2], strict=True):
        torchs = 1000 * applied(lambda o, name=name: in_torch(name, o, 100), 100)
        np.testing.assert_allclose(rates.get_ydata(), torchs, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(by_formula.get_ydata(), torchs, rtol=1e-9, atol=1e-12)
        assert by_formula.get_linestyle() == "--"


def test_where_plateau_first_halves_the_rate_is_read_from_the_stored_rates(replayed):
    runs = study(RECORD, "waiting").squeeze(["rate", "epochs"])
    text = replayed.printed["waiting"]
    for label in runs.schedule.values.tolist():
        curve = runs.learning_rate_curve.sel(schedule=label).transpose("seed", "epoch").values
        first = [runs.epoch.values[np.flatnonzero(each < 0.05)[:1]] for each in curve]
        mean = np.concatenate(first).mean() if sum(map(len, first)) else None
        row = next(line for line in text.splitlines() if line.startswith(f"{label}  "))
        assert row.removeprefix(label).split()[0] == ("–" if mean is None else f"{mean:.1f}")


def of(experiment, which=0, metric="test_accuracy", **where):
    """The numbers of an arm of the reference run, by seed."""
    values = study(RECORD, experiment, which)[metric].sel(where)
    return values.squeeze([each for each in values.dims if each != "seed" and values.sizes[each] == 1]).values


def best(experiment, dim, sign, which=0, **where):
    """The arm with the highest mean validation accuracy, or with a sign of -1 the lowest."""
    scores = sign * study(RECORD, experiment, which).validation_accuracy.sel(where).transpose(..., "seed")
    return {dim: scores[dim].values[scores.values.mean(-1).argmax()]}


def at_best(experiment, sign, which=0, **where):
    """The test accuracies of an arm at its best rate, by seed."""
    return of(experiment, which, **where, **best(experiment, "rate", sign, which, **where))


def test_the_best_rate_is_the_one_with_the_best_mean_on_validation_of_each_arm(lesson18):
    scores, test = np.zeros((2, 3, 4)), np.arange(24.0).reshape(2, 3, 4)
    scores[0, 1], scores[1, 2], scores[0, 2, 0] = 5, 5, 19  # the last lifts one seed only
    dims = ("schedule", "rate", "seed")
    runs = xr.Dataset({"validation_accuracy": (dims, scores), "test_accuracy": (dims, test)}, {"rate": [0.1, 0.2, 0.3]})
    found = lesson18.at_best_rate(runs).test_accuracy
    assert found.rate.values.tolist() == [0.2, 0.3]
    np.testing.assert_array_equal(found.transpose("schedule", "seed"), [test[0, 1], test[1, 2]])


def claims_by_hand(sign=1):
    """For each claim its effect by seed and what is expected of it."""
    others = [name for name in study(RECORD, "hundred_epochs").schedule.values.tolist() if name != "constant"]
    winner = best("hundred_epochs", "schedule", sign, schedule=others)
    loss = study(RECORD, "hundred_epochs").validation_loss_curve
    middle = [loss.sel(schedule=name, epoch=50).values for name in ("constant", "cosine")]
    end = [of("hundred_epochs", 0, "validation_loss", schedule=name) for name in ("constant", "cosine")]
    wait, slip = partial(of, "waiting"), partial(of, "traps")
    budget, method = partial(at_best, "budgets", sign), partial(at_best, "optimizers", sign)
    few = [budget(schedule="one-cycle", epochs=e) - budget(schedule="constant", epochs=e) for e in (5, 10, 20)]
    half = budget(schedule="one-cycle", epochs=50) - budget(which=1, schedule="constant")
    fifty = {"schedule": "constant", "epochs": 50}
    adam, momentum, plain = (method(optimizer=each, **fifty) for each in ("Adam", "momentum", "SGD"))
    usual = partial(of, "optimizers", **fifty)
    falling = method(which=1, schedule="cosine", epochs=50, optimizer="Adam")
    warm, cold = ({"schedule": each} for each in ("warm-up + cosine", "cosine"))
    at_best_rates = at_best("warm_up", sign, **warm) - at_best("warm_up", sign, **cold)
    return {
        "hundred_epochs-1": (of("hundred_epochs", **winner) - of("hundred_epochs", schedule="constant"), "> 5 points"),
        "hundred_epochs-2": (middle[0] - end[0], "< 0.01 nats"),
        "hundred_epochs-3": (middle[1] - end[1], "> 0.01 nats"),
        "budgets-1": (sum(few) / 3, "> 2 points"),
        "budgets-2": (half, "> -1 points"),
        "waiting-1": (wait(schedule="patience 0") - wait(schedule="patience 3"), "< 0 points"),
        "waiting-2": (wait(schedule="cosine, planned") - wait(schedule="constant"), "> 3 points"),
        "waiting-3": (wait(schedule="patience 3") - wait(schedule="cosine, planned"), "> -3 points"),
        "waiting-4": (wait(schedule="cosine, cut off") - wait(schedule="cosine, planned"), "< 0 points"),
        "optimizers-1": (usual(optimizer="Adam", rate=0.001) - adam, "> -3 points"),
        "optimizers-2": (usual(optimizer="SGD", rate=0.1) - plain, "> -3 points"),
        "optimizers-3": (usual(optimizer="momentum", rate=0.1) - momentum, "> -3 points"),
        "optimizers-4": (adam - momentum, "> 2 points"),
        "optimizers-5": (falling - adam, "> 2 points"),
        "warm_up-1": (of("warm_up", **warm, rate=0.03) - of("warm_up", **cold, rate=0.03), "> 20 points"),
        "warm_up-2": (at_best_rates, "> 1 points"),
        "traps-1": (slip(schedule="stepped per batch") - slip(schedule="cosine"), "< 0 points"),
        "traps-2": (slip(schedule="drawn first") - slip(schedule="StepLR"), "< -10 points"),
    }


def test_the_claims_are_the_differences_that_they_name(replayed):
    """Computed once more from the stored numbers, by other means; and from which value on a claim would hold."""
    expected = claims_by_hand()
    assert replayed.printed == {name: RECORD["experiments"][name]["printed"] for name in replayed.printed}
    for claims in (RECORD["claims"], replayed.judged):
        assert {each["id"]: each["expected"] for each in claims} == {name: text for name, (_, text) in expected.items()}
        means = [each["estimate"]["mean"] for each in claims]
        assert means == pytest.approx([np.nanmean(value) for value, _ in expected.values()], abs=1e-3)


def test_no_arm_is_chosen_on_test_images():
    """Where the order on validation is turned around, what was best there is another arm."""
    turned, expected, found = replay(RECORD, sign=-1), claims_by_hand(sign=-1), {}
    for claim in turned.judged:
        found[claim["id"]] = claim["estimate"]["mean"]
    assert found == pytest.approx({name: np.nanmean(value) for name, (value, _) in expected.items()}, abs=1e-3)
    changed = {
        name for name, (value, _) in claims_by_hand().items() if np.nanmean(value) != np.nanmean(expected[name][0])
    }
    chosen = {"hundred_epochs-1", "budgets-1", "budgets-2", "warm_up-2", *(f"optimizers-{i}" for i in range(1, 6))}
    assert changed == chosen
