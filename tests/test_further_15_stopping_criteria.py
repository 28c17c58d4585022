from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

from common.data import Task, load, make_split
from common.statistics import assemble
from common.training import State, fit


@pytest.fixture
def stopping():
    return load_script("further/stopping_criteria.py")


def short(stopping, labels: float = 0.2, epochs: int = 30, rate: float = 0.01):
    return stopping.network(labels, rate, epochs)


#            1    2    3    4    5    6    7    8    9    10   11   12   13   14   15   16
BUMPY = [5.0, 3.0, 3.1, 2.0, 2.1, 2.2, 2.3, 2.4, 1.9, 2.5, 2.6, 2.6, 2.7, 2.8, 2.9, 3.5]
FALLING = [4.0, 3.6, 3.2, 2.8, 2.4, 2.0, 1.9, 1.8, 1.7, 1.6, 1.6, 1.6, 1.6, 1.6, 1.5, 1.5]


def stop_after(stopping, rule: str, limit: float, validation=BUMPY, train=FALLING) -> int:
    criterion = partial(getattr(stopping, rule), limit=limit)
    return stopping.epochs_until(criterion, np.array(validation), np.array(train))


def test_where_each_criterion_stops_on_a_curve_that_a_reader_can_follow(stopping):
    after = partial(stop_after, stopping)
    assert [after("patience", n) for n in (1, 2, 3, 4, 5, 7)] == [3, 6, 7, 8, 14, 16]
    assert after("gl", 3) == 3  # 3.1 is 3.3 % above 3.0
    assert after("gl", 4) == 5  # 2.1 is 5 % above 2.0
    assert after("gl", 19) == 8  # 2.4 is 20 % above
    assert after("gl", 84) == 16  # 3.5 is 84.2 % above 1.9
    # At the ends of strips, 5, 10, 15, the loss is 5 %, 31.6 % and 52.6 % above its minimum; the mean training loss of
    # the strip is 333, 125 and 53.3 permille above its own.
    assert [after("pq", alpha) for alpha in (0.014, 0.016, 0.24, 0.26, 0.98, 1.0)] == [5, 10, 10, 15, 15, 16]
    # From 2.1 to 2.5 to 2.9.
    assert [after("up", s) for s in (1, 2, 3)] == [10, 15, 16]
    assert after("up", 1, [1, 1, 1, 1, 5, 9, 9, 9, 9, 4, 1, 1, 1, 1, 4, 0, 0, 0, 0, 5, 0]) == 20  # equal is no rise


def by_definition(rule: str, limit: float, validation: np.ndarray, train: np.ndarray) -> int:
    """As Prechelt's text says it, epoch by epoch from 1; the last epoch where nothing stops the run."""
    rises, since, opt = 0, 0, float("inf")
    for t, loss in enumerate(validation, 1):
        since = 0 if loss < opt else since + 1
        opt = min(opt, loss)
        excess, end_of_strip = 100 * (loss / opt - 1), t % 5 == 0
        if rule == "patience" and since >= limit:
            return t
        if rule == "gl" and excess > limit:
            return t
        if rule == "pq" and end_of_strip:
            strip = [float(train[i - 1]) for i in range(t - 4, t + 1)]
            progress = 1000 * (sum(strip) / (5 * min(strip)) - 1)
            if excess / progress > limit:
                return t
        if rule == "up" and end_of_strip and t > 5:
            rises = rises + 1 if loss > validation[t - 6] else 0
            if rises == limit:
                return t
    return len(validation)


LIMITS = {"patience": (1, 2, 5, 16), "gl": (1, 5, 20), "pq": (0.05, 0.5, 3), "up": (1, 2, 4, 8)}


@pytest.mark.parametrize("rule", LIMITS)
def test_a_criterion_is_the_definition(stopping, rule):
    rng, stops = np.random.default_rng(0), []
    for _ in range(30):
        epochs = np.arange(1, 84)
        turn = rng.uniform(0.002, 0.02) * epochs
        validation = np.exp(-epochs / rng.uniform(2, 20)) + turn + rng.uniform(0, 0.1) * rng.random(83) + 0.3
        train = np.exp(-epochs / rng.uniform(5, 20)) + 0.01 + 0.01 * rng.random(83)
        for limit in LIMITS[rule]:
            stops.append(stop_after(stopping, rule, limit, validation, train))
            assert stops[-1] == by_definition(rule, limit, validation, train)
    assert len(set(stops)) > 8


def test_the_criteria_have_the_limits_that_their_names_tell(stopping):
    found = {}
    for name, rule in {**stopping.FAST, **stopping.SLOW}.items():
        found[name] = (rule.func.__name__, rule.keywords["limit"])
    assert found == {
        "patience 1": ("patience", 1),
        "GL 1": ("gl", 1),
        "PQ 0.5": ("pq", 0.5),
        "UP 2": ("up", 2),
        "patience 16": ("patience", 16),
        "GL 5": ("gl", 5),
        "PQ 3": ("pq", 3),
        "UP 8": ("up", 8),
    }


def test_the_curves_to_watch_are_loss_and_errors_of_all_images_and_of_the_first_forty(stopping):
    torch.manual_seed(0)
    split = make_split(load("digits"), 0, 100)
    model = nn.Sequential(stopping.mlp(Task((1, 8, 8), 10)), nn.Dropout(0.5)).train()
    state = State(model, split, epochs=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for state.epoch in (1, 2):
        stopping.note_curves(state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert state.notes["watched"] == ("watched", ["loss", "errors", "loss of 40", "errors of 40"])
    assert state.notes["epochs_trained"] == ("epochs_trained", [1, 2])
    expected, (x, y) = [], split.validation
    for n in (len(y), 40):
        logits = model.eval()(x[:n])
        right = (logits.argmax(1) == y[:n]).float().mean().item()
        expected += [F.cross_entropy(logits, y[:n]).item(), 1 - right]
    dims, rows = state.notes["curves"]
    assert dims == ("epochs_trained", "watched")
    np.testing.assert_allclose(rows, [expected, expected], rtol=1e-5)


@pytest.fixture
def runs(stopping):
    """What `lab.study` returns for two arms of three seeds."""
    cells = [fit(short(stopping, labels), [0, 1, 2]) for labels in (0.2, 0.0)]
    return assemble({"labels": ["wrong", "right"]}, cells)


def test_the_seeds_train_as_one_stack_and_the_whole_validation_set_is_the_laboratorys(stopping, runs):
    assert runs.seconds.attrs["alone"] == ""
    mine = runs.curves.rename(epochs_trained="epoch").sel(epoch=slice(1, None))
    theirs = runs.sel(epoch=slice(1, None))
    loss, errors = mine.sel(watched="loss"), mine.sel(watched="errors")
    np.testing.assert_allclose(loss.values, theirs.validation_loss_curve.values, rtol=1e-4)
    np.testing.assert_allclose(100 - 100 * errors.values, theirs.validation_accuracy_curve.values, rtol=1e-4)


def test_the_accuracy_is_that_of_the_lowest_value_until_the_stop(stopping, runs):
    criteria = {**stopping.FAST, **stopping.SLOW, "gl 30": partial(stopping.gl, limit=30)}
    stops = stopping.stopped(runs, criteria, "loss of 40", "loss")
    assert stops.criterion.values.tolist() == list(criteria)
    epochs = set()
    for (name, rule), labels, seed, watched in (
        (item, labels, seed, watched)
        for item in criteria.items()
        for labels in ("wrong", "right")
        for seed in (0, 1, 2)
        for watched in ("loss", "loss of 40")
    ):
        where = {"labels": labels, "seed": seed}
        curve = runs.curves.sel(where).sel(watched=watched, epochs_trained=slice(1, None)).values
        train = runs.train_loss_curve.sel(where).sel(epoch=slice(1, None)).values
        last = by_definition(rule.func.__name__, rule.keywords["limit"], curve, train)
        best = 1 + min(range(last), key=lambda i, curve=curve: curve[i])
        found = stops.sel(where).sel(criterion=name, watched=watched)
        assert found.trained == last
        assert found.accuracy == runs.test_accuracy_curve.sel(where).sel(epoch=best)
        epochs.add(last)
    assert len(epochs) > 4


def test_the_run_itself_would_stop_there_with_these_weights(stopping, runs):
    """A run of just so many epochs has the same weights: stopping changes nothing but the length."""
    stops = stopping.stopped(runs, {"patience": partial(stopping.patience, limit=1)}, "loss")
    last = int(stops.trained.sel(labels="wrong", seed=0).item())
    ((arrays, _),) = fit(short(stopping, epochs=last), [0, 1, 2])
    assert arrays["best_test_accuracy"][1][0] == stops.accuracy.sel(labels="wrong", seed=0)


def test_a_run_that_diverged_has_no_accuracy(stopping, runs):
    runs = runs.copy(deep=True)
    runs.diverged_at[0, 1] = 70
    runs.train_loss_curve[0, 1, 18:] = np.nan
    runs.test_accuracy_curve[0, 1, 18:] = np.nan
    runs.curves[0, 1, 17:] = np.nan
    stops = stopping.stopped(runs, stopping.FAST, "loss")
    lost = stops.accuracy.isnull().isel(watched=0)
    assert lost.isel(labels=0, seed=1).all()
    assert lost.sum() == len(stopping.FAST)


def test_networks_of_a_seed_start_from_the_same_weights_whatever_labels_and_rate(stopping):
    weights = []
    for labels, rate in ((0.2, 0.01), (0.0, 0.01), (0.2, 0.001)):
        torch.manual_seed(3)
        model = short(stopping, labels, rate=rate).model(Task((1, 8, 8), 10))
        weights.append(torch.cat([each.flatten() for each in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [256, 10]


def test_the_recipe_is_the_lessons(stopping):
    recipe = stopping.network(0.2)
    assert (recipe.epochs, recipe.evaluations, recipe.batch_size, recipe.examples) == (80, 80, 50, 200)
    assert (recipe.label_noise, recipe.optimizer.keywords["lr"]) == (0.2, 0.01)
    assert recipe.optimizer.func is torch.optim.Adam
    slow = stopping.network(0.0, rate=0.001, epochs=320)
    assert (slow.label_noise, slow.optimizer.keywords["lr"], slow.epochs, slow.evaluations) == (0.0, 0.001, 320, 320)
