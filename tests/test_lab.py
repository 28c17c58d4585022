"""The laboratory: studies as labelled arrays, tuning, claims, tables and figures, on recipes that train in moments."""

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import recipes as small
import torch
import xarray as xr
from matplotlib.colors import to_hex
from PIL import Image
from recipes import DIVERGES, SMALL
from torch import nn, optim

from common import lab as laboratory
from common import plotting
from common.data import FOLDER, LessonError
from common.lab import Lab, flatten, what_varies
from common.statistics import FAILS, HOLDS, NOT_JUDGED, UNCLEAR, interval
from common.training import Recipe, fit
from runner.workers import workers

LONG = "a technique with a longer name"  # 30 characters


def asked(lab: Lab) -> None:
    """What is asked?"""


@pytest.fixture
def make_lab(tmp_path):
    """Make a Lab in whose experiment one can go on, with these options instead of the usual ones."""
    pool = ThreadPoolExecutor(1)

    def make(**options) -> Lab:
        usual = {"dataset": "digits", "seeds": [0, 1], "device": "cpu", "quick": False, "longer": 1, "larger": 1}
        usual |= {"verbose": False, "only": None, "list": False, "jobs": 0, "first_seed": 0, "data_dir": FOLDER}
        lab = Lab("fake", "A fake lesson", None, argparse.Namespace(**usual | {"out": tmp_path} | options), ["asked"])
        lab.executor = options.get("executor", pool)
        lab.run(asked)
        return lab

    yield make
    pool.shutdown()


@pytest.fixture
def lab(make_lab) -> Lab:
    return make_lab()


def arm(width: int = 16, rate: float = 0.1, p: float = 0.0, epochs: int = 3, model=small.mlp, **others) -> Recipe:
    """A recipe with as many settings as the tests vary."""
    model = partial(small.noisy, p=p) if p else partial(model, width=width)
    return replace(SMALL, model=model, optimizer=partial(optim.SGD, lr=rate), epochs=epochs, **others)


def or_diverges(diverges: bool) -> Recipe:
    return DIVERGES if diverges else replace(SMALL, epochs=4, evaluations=2)


def by_layer(model: nn.Module, split) -> dict:
    norms = [p.detach().norm() for p in model.parameters()]
    return {
        "layer": ("layer", [f"layer {i}" for i in range(len(norms), 0, -1)]),
        "norm": ("layer", torch.stack(norms), {"unit": "nats", "long_name": "norm of the weights"}),
        "largest": max(norms).item(),
        "fine": bool(norms[0] > 0),
    }


# Labelled arrays


def test_a_study_is_labelled_by_factors_and_seed_in_the_order_given(lab):
    runs = lab.study(arm, width={"wide": 24, "narrow": 8}, rate=(0.1, 0.01, 0.3))
    assert runs.test_accuracy.dims == ("width", "rate", "seed")
    assert runs.validation_loss_curve.dims == ("width", "rate", "seed", "epoch")
    assert runs.width.values.tolist() == ["wide", "narrow"]
    assert runs.rate.values.tolist() == [0.1, 0.01, 0.3]
    assert runs.seed.values.tolist() == [0, 1]
    assert runs.epoch.values.tolist() == [0, 1, 2, 3]


def test_a_study_holds_the_numbers_of_fit(lab):
    widths, rates = {"wide": 24, "narrow": 8}, (0.1, 0.01)
    runs = lab.study(arm, width=widths, rate=rates, inspect=by_layer)
    for label, width in widths.items():
        for rate in rates:
            ((found, notes),) = fit(arm(width, rate), [0, 1], inspect=by_layer)
            here = runs.sel(width=label, rate=rate)
            for name in set(found) - {"seconds", "seed", "epoch"}:
                np.testing.assert_equal(here[name].values, found[name][1])
            for i, note in enumerate(notes):
                np.testing.assert_equal(here.norm.values[i], note["norm"][1])
                assert here.largest.values[i] == note["largest"]


def test_arrays_carry_units_and_names(lab):
    runs = lab.study(arm, width=(8,), inspect=by_layer)
    assert runs.test_accuracy.attrs == {"unit": "%", "long_name": "test accuracy"}
    assert runs.train_loss_curve.attrs == {"unit": "nats", "long_name": "train loss"}
    assert runs.best_test_accuracy.attrs["long_name"] == "test accuracy at the lowest validation loss"
    assert runs.norm.attrs == {"unit": "nats", "long_name": "norm of the weights"}
    assert runs.largest.attrs == {"unit": "", "long_name": "largest"}


@pytest.mark.parametrize("factor", [(False, True), {"no": False, "yes": True}, {2: False, 1: True}])
def test_labels_select_whatever_their_kind(lab, factor):
    runs = lab.study(or_diverges, diverges=factor)
    no, yes = list(factor)
    assert runs.diverges.values.tolist() == [no, yes]
    assert np.isfinite(runs.sel(diverges=no).test_accuracy).all()
    assert np.isnan(runs.sel(diverges=yes).test_accuracy).all()


def test_inspections_have_dimensions_and_coordinates_of_their_own(lab):
    runs = lab.study(arm, width=(8, 16), inspect=by_layer)
    assert runs.norm.dims == ("width", "seed", "layer")
    assert runs.layer.values.tolist() == ["layer 4", "layer 3", "layer 2", "layer 1"]
    assert runs.largest.dims == ("width", "seed")
    assert (runs.norm.max("layer") == runs.largest).all()


def count_layers(model: nn.Module, split) -> dict:
    depth = len(list(model.parameters()))
    return {"layer": ("layer", np.arange(depth)), "size": ("layer", np.arange(depth) + 10.0)}


def deep(depth: int) -> Recipe:
    return replace(SMALL, model={1: small.linear, 2: small.mlp}[depth])


def test_cells_with_fewer_layers_leave_the_others_empty(lab):
    runs = lab.study(deep, depth=(2, 1), inspect=count_layers)
    assert runs["size"].sel(depth=2).values.tolist() == [[10, 11, 12, 13]] * 2
    np.testing.assert_equal(runs["size"].sel(depth=1).values, [[10, 11, math.nan, math.nan]] * 2)


def test_curves_of_cells_that_train_for_different_times_share_one_axis(lab):
    runs = lab.study(arm, epochs=(2, 5), evaluations=(2,))
    assert runs.epoch.values.tolist() == [0, 1, 2, 5]
    curve = runs.validation_loss_curve.sel(evaluations=2)
    assert curve.notnull().all("seed").values.tolist() == [[True, True, True, False], [True, False, True, True]]
    assert (curve.sel(epochs=5, epoch=5) == runs.validation_loss.sel(epochs=5, evaluations=2)).all()


def test_a_cell_that_diverges_is_nan_and_counted(lab):
    runs = lab.study(or_diverges, diverges=(False, True), inspect=by_layer)
    lost = runs.sel(diverges=True)
    assert np.isnan(lost.test_accuracy).all()
    assert np.isnan(lost.norm).all()
    assert (lost.diverged_at >= 1).all()
    assert runs.diverged_at.sel(diverges=False).isnull().all()
    assert interval(runs.test_accuracy)["n"].values.tolist() == [2, 0]
    assert runs.norm.sel(diverges=False).notnull().all()


def one_seed_breaks(broken: bool) -> Recipe:
    model = partial(small.Counting, seed=1)
    return replace(SMALL, model=model, loss=small.breaks_at_6 if broken else small.cross_entropy)


def test_a_seed_that_diverges_leaves_the_others_their_notes(lab):
    runs = lab.study(one_seed_breaks, broken=(True, False), inspect=by_layer)
    assert runs.norm.notnull().all("layer").values.tolist() == [[True, False], [True, True]]
    assert runs.test_accuracy.notnull().values.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("inspect", [None, by_layer])
def test_where_every_run_diverged_there_is_nothing_to_look_at(lab, inspect):
    with pytest.raises(LessonError, match="every run diverged, 0 of 2 at the start; look at data") as error:
        lab.study(or_diverges, diverges=(True,), inspect=inspect)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["n", "mean", "grid", "best_epoch", "test_accuracy", "diverged_at", "seed"])
def test_a_factor_may_not_be_called_like_a_result(lab, name):
    with pytest.raises(LessonError, match="the name of a factor must be one that no result has; got"):
        lab.study(lambda **named: SMALL, **{name: (1, 2)})


@pytest.mark.parametrize("values", [("none", 0.5), (0.5, np.nan), (), "abc", (1, 1), iter((1, 2)), {"a": 1, 2: 2}])
def test_the_labels_of_a_factor_are_different_words_or_numbers(lab, values):
    with pytest.raises(LessonError, match="the values of p must be different words, or different numbers"):
        lab.study(lambda p: SMALL, p=values)


def returns_nothing(model: nn.Module, split) -> None:
    """An inspection whose author forgot to return what it found."""


def always_small(p: int) -> Recipe:
    return SMALL


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"tune": ("p",)}, r"tune must be a dictionary; got \('p',\)"),
        ({"tune": {"p": (1, 2)}}, "a setting to tune must be none of the factors; got"),
        ({"inspect": returns_nothing}, "what inspect returns must be dict; got None"),
    ],
)
def test_what_a_study_is_given_is_checked(lab, named, message):
    with pytest.raises(LessonError, match=message):
        lab.study(always_small, p=(1, 2), **named)


def test_a_factor_of_true_and_false_has_rows_that_say_which(lab):
    values = xr.DataArray([[1.0, 2.0], [3.0, 4.0]], {"norm": [True, False], "seed": [0, 1]}, attrs={"unit": "%"})
    lab.table({"accuracy": values}, rows="norm")
    rows = [line.split()[0] for line in lab.entry["printed"].splitlines() if line.strip()]
    assert rows[-2:] == ["yes", "no"]


class Dead(nn.Module):
    """A network whose loss is not finite before its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 10), torch.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


def dead_network(task) -> nn.Module:
    return Dead()


def or_dead(dead: bool) -> Recipe:
    return replace(SMALL, model=dead_network) if dead else SMALL


def test_nothing_is_judged_in_an_experiment_with_a_run_that_was_dead_at_the_start(lab):
    """A comparison of its missing numbers would be a confident no."""
    runs = lab.study(or_dead, dead={"no": False, "yes": True})
    lab.claim("All learn", "somebody", (runs.test_accuracy > 50).sel(dead="yes"), above=50)
    lab.claim("One learns", "somebody", runs.test_accuracy.sel(dead="no"), above=20)
    assert [claim["verdict"] for claim in lab.claims] == ["not judged", "not judged"]
    assert "2 of 4 runs were dead at the start" in lab.entry["printed"]
    lab.run(asked)
    runs = lab.study(or_diverges, diverges=(True, False))
    lab.claim("All learn", "somebody", (runs.test_accuracy > 50).sel(diverges=True), above=50)
    assert [claim["verdict"] for claim in lab.claims] == ["unclear"]  # 0 of 2: judged


def test_where_all_are_dead_at_the_start_it_is_said(lab):
    with pytest.raises(LessonError, match="every run diverged, 2 of 2 at the start; look at data"):
        lab.study(or_dead, dead=(True,))


NOTHING = xr.DataArray(
    np.full((2, 3, 2), np.nan),
    {"arm": ["a", "b"], "p": [0.1, 0.2, 0.3], "seed": [0, 1]},
    name="accuracy",
    attrs={"unit": "points", "long_name": "accuracy"},
)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_no_table_plot_or_claim_breaks_where_no_measurement_is_left(lab, seeds):
    values = NOTHING.sel(seed=seeds)
    for some in (values, values.fillna({"a": 1.0}.get("a")).where(values.arm == "a")):
        lab.table(some, rows="arm", columns="p")
        lab.table({"one": some.sel(p=0.1), "two": some.sel(p=0.2)}, rows="arm")
        lab.sweep(some, x="p", hue="arm")
        lab.curves(some, some, x="p", hue="arm", dashed=some)
        lab.dots(some, some, y="p", hue="arm")
        lab.heat(some, some, x="p", y="arm")
    lab.claim("Something", "somebody", values.sel(arm="a", p=0.1), above=0)
    assert lab.claims[-1]["verdict"] == "unclear"
    assert "–" in lab.entry["printed"]
    assert "nan" not in lab.entry["printed"].lower()
    assert len(lab.entry["figures"]) == 8


@pytest.mark.parametrize("other", [NOTHING.isel(arm=[1, 0]), NOTHING.isel(arm=[0]), NOTHING.assign_coords(arm=[1, 2])])
def test_arrays_of_other_rows_do_not_share_a_table_or_a_legend(lab, other):
    one = NOTHING.sel(p=0.1)
    with pytest.raises(LessonError, match=r"arm, which several arrays share, must be .*in all of them; got"):
        lab.table({"one": one, "two": other.sel(p=0.1)}, rows="arm")
    with pytest.raises(LessonError, match="arm, which several arrays share"):
        lab.curves(NOTHING, other, x="p", hue="arm")
    with pytest.raises(LessonError, match="arm, which several arrays share"):
        lab.dots(NOTHING, other, y="arm")


@pytest.mark.parametrize("seeds", [[0], [3, 1, 2]])
def test_any_number_of_seeds_will_do_in_any_order(make_lab, seeds):
    runs = make_lab(seeds=seeds).study(arm, width=(8, 16), inspect=by_layer)
    assert runs.seed.values.tolist() == seeds
    assert runs.norm.dims == ("width", "seed", "layer")
    ((found, _),) = fit(arm(16), seeds)
    assert runs.test_accuracy.sel(width=16).values.tolist() == found["test_accuracy"][1].tolist()


def test_a_study_without_factors_is_one_arm(lab):
    runs = lab.study(arm)
    assert runs.test_accuracy.dims == ("seed",)


def test_a_recipe_may_be_a_partial_function(lab):
    assert lab.study(partial(arm, width=8), rate=(0.1, 0.2)).test_accuracy.dims == ("rate", "seed")


def test_what_cannot_be_stacked_gives_the_same_array_and_says_why(lab, capsys):
    """Recurrent layers keep a list of their weights, which would be the first seed's."""
    runs = lab.study(lambda rate: replace(SMALL, model=small.lstm), rate=(0.1,))
    assert runs.test_accuracy.dims == ("rate", "seed")
    assert runs.seed.values.tolist() == [0, 1]
    assert "trained one seed at a time: the networks differ in more" in " ".join(capsys.readouterr().out.split())


def test_the_reason_is_told_though_only_the_second_arm_cannot_be_stacked(lab, capsys):
    lab.study(lambda net: replace(SMALL, model=net), net={"linear": small.linear, "lstm": small.lstm})
    assert "trained one seed at a time" in capsys.readouterr().out


# Tuning


def tuned(runs: xr.Dataset, name: str) -> list:
    return runs[f"chosen_{name}"].values.tolist()


def test_tuning_takes_the_best_on_validation_and_trains_that(lab):
    runs = lab.study(arm, width=(8, 24), tune={"rate": (1e-6, 0.3, 0.01)})
    assert runs.grid.dims == ("width", "rate", "tuning_seed")
    assert runs.test_accuracy.dims == ("width", "seed")
    assert tuned(runs, "rate") == [0.3, 0.3]
    assert runs.grid.mean("tuning_seed").idxmax("rate").values.tolist() == [0.3, 0.3]
    ((found, _),) = fit(arm(24, 0.3), [0, 1])
    assert runs.test_accuracy.sel(width=24).values.tolist() == found["test_accuracy"][1].tolist()
    ((brief, _),) = fit(arm(8, 0.01), runs.grid.tuning_seed.values.tolist())
    assert runs.grid.sel(width=8, rate=0.01).values.tolist() == brief["validation_accuracy"][1].tolist()


def test_two_settings_of_two_factors_are_tuned_for_each_combination(lab):
    choices = {"rate": {"tiny": 1e-6, "good": 0.3}, "batch_size": (100, 25, 50)}
    runs = lab.study(arm, width=(8, 24), label_noise={"right": 0.0, "wrong": 0.5, "some": 0.2}, tune=choices)
    assert runs.grid.dims == ("width", "label_noise", "rate", "batch_size", "tuning_seed")
    mean = runs.grid.mean("tuning_seed")
    for width in (8, 24):
        for noise, share in {"right": 0.0, "wrong": 0.5, "some": 0.2}.items():
            here = mean.sel(width=width, label_noise=noise)
            best = here.where(here == here.max(), drop=True)
            rate, size = best.rate.values[0], best.batch_size.values[0]
            cell = runs.sel(width=width, label_noise=noise)
            assert (cell.chosen_rate.item(), cell.chosen_batch_size.item()) == (rate, size)
            recipe = arm(width, choices["rate"][rate], label_noise=share, batch_size=int(size))
            ((found, _),) = fit(recipe, [0, 1])
            assert cell.test_accuracy.values.tolist() == found["test_accuracy"][1].tolist()


@pytest.mark.parametrize("reported", [[0, 1], [1_000_000, 1_000_002], [3_000_000_000], [999_999]])
def test_tuning_seeds_are_never_reported(make_lab, reported):
    runs = make_lab(seeds=reported).study(arm, tune={"rate": (0.1, 0.2)})
    seeds = runs.grid.tuning_seed.values.tolist()
    assert len(set(seeds)) == 3
    assert min(seeds) >= 1_000_000
    assert not set(seeds) & set(reported)
    assert runs.seed.values.tolist() == reported


def stand_in(scores: dict):
    """A `fit` that finds, by the recipe's learning rate, these validation accuracies, and their opposite on test."""

    def find(recipe, seeds, *others):
        found = []
        for seed in seeds:
            score = scores[recipe.optimizer.keywords["lr"]]
            score = score[seed % len(score)] if isinstance(score, tuple) else score
            found.append(score)
        values, about = np.array(found, float), {"unit": "%"}
        arrays = {"seed": ("seed", list(seeds)), "validation_accuracy": ("seed", values, about)}
        arrays |= {"test_accuracy": ("seed", -values, about), "diverged_at": ("seed", values * math.nan)}
        arrays |= {f"{part}_loss": ("seed", values) for part in ("train", "validation")}
        arrays |= {"train_accuracy": ("seed", values), "seconds": ("seed", values, {"unit": "s", "alone": ""})}
        return [(arrays, [{} for _ in seeds])]

    return find


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({0.1: 50, 0.2: 70, 0.3: 60}, 0.2),
        ({0.1: 50, 0.2: 70, 0.3: 70}, 0.2),  # of equals the first
        ({0.1: 50, 0.2: (99, 99, math.nan), 0.3: 60}, 0.3),  # one that lost a run comes last
        ({0.1: math.nan, 0.2: (99, math.nan), 0.3: 1}, 0.3),
        ({0.1: (90, 0, 0), 0.2: (40, 40, 40), 0.3: (0, 90, 0)}, 0.2),  # the best mean
    ],
)
def test_the_choice(lab, monkeypatch, scores, chosen):
    monkeypatch.setattr(laboratory, "fit", stand_in(scores))
    runs = lab.study(arm, tune={"rate": tuple(scores)})
    assert tuned(runs, "rate") == chosen
    np.testing.assert_equal(runs.validation_accuracy.values, [np.ravel(scores[chosen])[0]] * 2)


def test_where_all_candidates_lost_a_run_the_first_is_taken(lab, monkeypatch):
    monkeypatch.setattr(laboratory, "fit", stand_in({0.1: (1, math.nan, 1), 0.2: (2, math.nan, 2)}))
    assert tuned(lab.study(arm, tune={"rate": (0.1, 0.2)}), "rate") == 0.1


def remedy(technique: str, rate: float) -> Recipe:
    """A rate that only one of the techniques has."""
    return arm(rate={"none": 0.1, "lower": rate}[technique])


def test_a_setting_that_makes_no_difference_is_no_choice(lab, capsys):
    runs = lab.study(remedy, technique=("none", "lower"), tune={"rate": (0.01, 0.3, 1e-6)})
    np.testing.assert_equal(tuned(runs, "rate"), [math.nan, 0.3])
    assert "rate, chosen on validation from 0.01, 0.3, 1e-06: 0.3 for lower\n" in capsys.readouterr().out


def test_a_winner_at_the_edge_of_its_grid_is_told(lab, monkeypatch, capsys):
    monkeypatch.setattr(laboratory, "fit", stand_in({0.1: 50, 0.2: 60, 0.3: 70}))
    lab.study(arm, width=(8,), tune={"rate": (0.1, 0.2, 0.3)})
    assert "rate, chosen on validation at its edge from 0.1, 0.2, 0.3: 0.3 for 8\n" in capsys.readouterr().out
    lab.study(arm, width=(8,), tune={"rate": (0.1, 0.3, 0.2)})
    assert "rate, chosen on validation from 0.1, 0.3, 0.2: 0.3 for 8\n" in capsys.readouterr().out
    lab.study(arm, width=(8,), tune={"rate": (0.2, 0.3)})  # of two candidates any is at the edge
    assert "at its edge" not in capsys.readouterr().out


def test_nothing_is_chosen_on_the_test_set(lab, monkeypatch):
    """The stand-in's best on validation are its worst on test; and a stand-in without test values will do to choose."""
    find, parts = stand_in({0.1: 50, 0.2: 60, 0.3: 55}), []

    def blind(recipe, seeds, *others):
        ((arrays, notes),) = find(recipe, seeds)
        if min(seeds) >= 1_000_000:
            parts.append(recipe.evaluations)
            arrays = {name: arrays[name] for name in ("seed", "validation_accuracy", "seconds")}
        return [(arrays, notes)]

    monkeypatch.setattr(laboratory, "fit", blind)
    assert tuned(lab.study(arm, tune={"rate": (0.1, 0.2, 0.3)}), "rate") == 0.2
    assert parts == [1, 1, 1]


# What is trained


@pytest.fixture
def trained(monkeypatch) -> list:
    """The recipes, seeds and data sets that `fit` is asked for."""
    calls = []

    def noting(recipe, seeds, *others):
        calls.append((recipe, list(seeds), others))
        return fit(recipe, seeds, *others)

    monkeypatch.setattr(laboratory, "fit", noting)
    return calls


def test_equal_recipes_are_trained_once(lab, trained):
    runs = lab.study(remedy, technique=("none", "lower"), rate=(0.1, 0.2, 0.3))
    assert len(trained) == 3
    assert (runs.test_accuracy.sel(technique="none") == runs.test_accuracy.sel(technique="lower", rate=0.1)).all()


def test_those_with_the_most_work_are_trained_first(lab, trained):
    """Epochs times examples times weights."""
    lab.study(arm, epochs=(1, 3), examples={"few": 25, "many": 100, "all": None}, width=(8, 24))
    order = [(recipe.epochs, recipe.examples or 1e9, recipe.model.keywords["width"]) for recipe, *_ in trained]
    assert len(set(order)) == 12
    assert order == sorted(order, key=lambda each: each[0] * each[1] * (75 * each[2] + 10), reverse=True)


def test_longer_larger_and_quick_change_what_they_say(make_lab, trained):
    def sizes(**options) -> tuple:
        trained.clear()
        make_lab(**options).study(arm, width=(8,), examples=(80,), evaluations=(2,))
        ((recipe, seeds, _),) = trained
        return recipe.epochs, recipe.evaluations, recipe.examples, recipe.batch_size, seeds

    assert sizes() == (3, 2, 80, 25, [0, 1])
    assert sizes(longer=4) == (12, 8, 80, 25, [0, 1])
    assert sizes(larger=3) == (3, 2, 240, 25, [0, 1])
    assert sizes(quick=True) == (1, 1, 80, 25, [0, 1])
    assert sizes(quick=True, longer=4) == (1, 1, 80, 25, [0, 1])


def test_all_the_examples_there_are_stay_all_there_are(make_lab, trained):
    make_lab(larger=4, quick=True).study(arm, width=(8,), epochs=(1,), examples={"all": None})
    assert [recipe.examples for recipe, *_ in trained] == [None]


def test_a_quick_run_tunes_on_one_seed_and_a_longer_run_tunes_longer(make_lab, trained):
    make_lab(quick=True).study(arm, tune={"rate": (0.1, 0.2)})
    assert [seeds for _, seeds, _ in trained] == [[1_000_000], [1_000_000], [0, 1]]
    trained.clear()
    make_lab(longer=2).study(arm, tune={"rate": (0.1, 0.2)})
    assert {recipe.epochs for recipe, *_ in trained} == {6}


def test_stacks_hold_ten_seeds_whatever_the_jobs(make_lab, trained):
    """So that the first ten of twelve seeds are those of a run with ten, masks included."""
    twelve = make_lab(seeds=list(range(12))).study(arm, p=(0.5,))
    assert [seeds for _, seeds, _ in trained] == [list(range(10)), [10, 11]]
    ten = make_lab(seeds=list(range(10))).study(arm, p=(0.5,))
    assert twelve.seed.values.tolist() == list(range(12))
    for name in ("test_loss", "validation_loss_curve", "best_epoch"):
        np.testing.assert_equal(twelve[name].sel(seed=range(10)).values, ten[name].values)
    assert twelve.test_loss.notnull().all()


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_same_numbers_for_a_thread_and_for_any_number_of_processes(make_lab, jobs):
    def study(**options) -> xr.Dataset:
        lab = make_lab(seeds=[0, 1, 2], **options)
        return lab.study(arm, p=(0.2, 0.5), tune={"rate": (0.1, 0.3)}, inspect=by_layer).drop_vars("seconds")

    with workers(jobs, "digits") as pool:
        xr.testing.assert_identical(study(executor=pool), study())


def test_an_error_in_a_worker_reaches_the_caller(make_lab):
    with workers(2, "digits") as pool, pytest.raises(LessonError, match="training examples"):
        make_lab(executor=pool).study(arm, examples=(5000, 100))


# What varies


def scaled(width: int, scale: float) -> None:
    """Never called: only its signature is looked at."""


def test_what_varies_is_computed_from_the_recipes():
    a = replace(SMALL, model=partial(small.noisy), optimizer=partial(torch.optim.SGD, lr=0.1))
    b = replace(a, optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9), epochs=9)
    varies, held = what_varies([a, b])
    assert set(varies) == {"optimizer.lr", "optimizer.momentum", "epochs"}
    assert held["model"] == "noisy"
    assert held["optimizer"] == "SGD"
    assert what_varies([a, a])[0] == []
    positional = [replace(SMALL, model=partial(partial(scaled, 2), scale=scale)) for scale in (1, 3)]
    varies, held = what_varies(positional)
    assert varies == ["model.scale"]
    assert held["model.width"] == "2"
    assert what_varies([replace(SMALL, model=partial(scaled, width)) for width in (1, 2)])[0] == ["model.width"]
    assert what_varies([replace(SMALL, model=each) for each in (small.linear, small.mlp)])[0] == ["model"]


def test_settings_of_nested_partial_functions_have_names_with_dots():
    nested = partial(scaled, scale=partial(small.mlp, width=3))
    found = flatten("model", nested)
    assert found == {"model": "scaled", "model.scale": "mlp", "model.scale.width": "3"}


def test_a_study_says_what_varies_and_keeps_it(lab, capsys):
    lab.study(arm, width=(8, 16), tune={"rate": (0.1, 0.2)})
    assert "varies: model.width, optimizer.lr\n" in capsys.readouterr().out
    lab.study(arm, epochs=(1, 2))
    assert lab.entry["varies"] == ["model.width", "optimizer.lr", "epochs"]
    assert lab.entry["studies"][0]["held"]["batch_size"] == "25"
    assert "epochs" not in lab.entry["studies"][1]["held"]
    assert [study["recipe"] for study in lab.entry["studies"]] == ["arm", "arm"]


# What is refused


def no_recipe(width: int, rate: float) -> Recipe:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    "factors",
    [
        {"width": (8,)},
        {"width": (8,), "rate": (0.1,), "depth": (1,)},
        {"width": (8, 8), "rate": (0.1,)},
        {"width": (1, True), "rate": (0.1,)},
        {"width": (), "rate": (0.1,)},
        {"width": 8, "rate": (0.1,)},
        {"width": {}, "rate": (0.1,)},
        {"width": (None, 8), "rate": (0.1,)},
        {"width": ((1, 2), (3, 4)), "rate": (0.1,)},
    ],
)
def test_factors_that_make_no_study_are_refused_in_one_line(lab, factors):
    with pytest.raises(LessonError) as error:
        lab.study(no_recipe, **factors)
    assert "\n" not in str(error.value)


def test_a_function_no_worker_could_find_is_refused_in_one_line(lab):
    with pytest.raises(LessonError, match="top level") as error:
        lab.study(lambda rate: replace(SMALL, model=lambda task: small.linear(task)), rate=(0.1,))
    assert "\n" not in str(error.value)


def test_an_inspection_no_worker_could_find_is_refused_in_one_line(make_lab):
    with workers(1, "digits") as pool, pytest.raises(LessonError, match="top level"):
        make_lab(executor=pool).study(arm, width=(8,), inspect=lambda model, split: {"a": 1})


# Gains and claims


def array(values, unit: str = "%", **coordinates) -> xr.DataArray:
    """An array with these coordinates, and seeds last."""
    values = np.asarray(values)
    about = {"unit": unit, "long_name": "test accuracy"}
    return xr.DataArray(
        values, coordinates | {"seed": np.arange(values.shape[-1])}, [*coordinates, "seed"], attrs=about
    )


def test_a_gain_is_paired_and_labelled(lab):
    accuracy = array([[50.0, 60.0], [51.0, 62.0], [49.0, 70.0]], p=[0.0, 0.1, 0.5])
    gain = lab.gain(accuracy, p=0.0)
    assert gain.values.tolist() == [[0, 0], [1, 2], [-1, 10]]
    assert gain.attrs == {"unit": "points", "long_name": "gain in test accuracy"}
    assert gain.dims == ("p", "seed")
    assert accuracy.attrs["unit"] == "%"
    two = accuracy.expand_dims(width=[1, 2]) * xr.DataArray([1.0, 2.0], dims="width")
    assert lab.gain(two.assign_attrs(accuracy.attrs), p=0.0).sel(width=2, p=0.1).values.tolist() == [2, 4]


def judged(lab: Lab, *arguments, **expected) -> dict:
    lab.claim("A statement", "somebody", *arguments, **expected)
    return lab.claims[-1]


@pytest.mark.parametrize(
    ("expected", "text", "verdict"),
    [
        ({"above": 0.5}, "> 0.5 points", HOLDS),
        ({"below": -0.5}, "< -0.5 points", FAILS),
        ({"above": -1, "below": 1}, "> -1 and < 1 points", FAILS),
        ({"above": 2}, "> 2 points", UNCLEAR),
        ({"above": 0, "below": 5}, "> 0 and < 5 points", HOLDS),
    ],
)
def test_a_claim_is_judged_and_says_what_was_expected(lab, expected, text, verdict):
    claim = judged(lab, array([2.0, 2.1]), **expected)
    assert (claim["expected"], claim["verdict"]) == (text, verdict)
    assert (claim["statement"], claim["source"], claim["experiment"]) == ("A statement", "somebody", "asked")
    assert claim["estimate"]["unit"] == "points"
    assert claim["estimate"]["mean"] == pytest.approx(2.05)
    assert (claim["estimate"]["n"], claim["seeds"]) == (2, 2)


def test_claims_are_numbered_within_their_experiment(lab):
    assert [judged(lab, array([1.0, 2.0]), above=0)["id"] for _ in range(3)] == ["asked-1", "asked-2", "asked-3"]


@pytest.mark.parametrize(("unit", "text"), [("nats", "> 0.5 nats"), ("", "> 0.5"), ("points", "> 0.5 points")])
def test_other_units_stay(lab, unit, text):
    assert judged(lab, array([1.0, 2.0], unit), above=0.5)["expected"] == text


def test_true_and_false_are_a_share_of_seeds(make_lab):
    lab = make_lab(seeds=list(range(10)))
    claim = judged(lab, array([True] * 9 + [False]), above=50)
    assert claim["expected"] == "> 50 % of seeds"
    wanted = {"mean": 90, "low": 55.498, "high": 99.747, "n": 10, "unit": "% of seeds"}
    assert claim["estimate"] == pytest.approx(wanted, abs=1e-3)
    assert claim["verdict"] == HOLDS
    assert lab.report.measured(claim) == "9 of 10 seeds"


def test_a_note_that_is_true_or_false_is_a_share_of_seeds_though_another_arm_diverged(lab):
    runs = lab.study(or_diverges, diverges=(False, True), inspect=by_layer)
    claim = judged(lab, runs.fine.sel(diverges=False), above=10)
    assert (claim["expected"], lab.report.measured(claim)) == ("> 10 % of seeds", "2 of 2 seeds")
    lost = judged(lab, runs.fine.sel(diverges=True), above=10)
    assert lost["verdict"] == UNCLEAR


def test_a_quick_run_judges_nothing(make_lab):
    assert judged(make_lab(quick=True), array([2.0, 2.1]), above=0)["verdict"] == NOT_JUDGED


def test_survivors_decide_nothing(make_lab):
    lab = make_lab(seeds=[0, 1, 2])
    claim = judged(lab, array([2.0, 2.1, math.nan]), above=0)
    assert claim["verdict"] == UNCLEAR
    assert lab.report.measured(claim) == "+2.0 [+1.4, +2.7] points (2 of 3 seeds)"
    nothing = judged(lab, array([math.nan] * 3), above=0)
    assert nothing["verdict"] == UNCLEAR
    assert lab.report.measured(nothing) == "– points (0 of 3 seeds)"


def test_a_single_seed_has_a_mean_and_no_verdict(make_lab):
    lab = make_lab(seeds=[0])
    claim = judged(lab, array([2.0]), above=0)
    assert claim["verdict"] == UNCLEAR
    assert lab.report.measured(claim) == "+2.0 points"


# Tables


@pytest.fixture
def runs(lab) -> xr.Dataset:
    """Three arms, of which one diverges, one with a name of thirty characters."""
    technique = {"none": False, LONG: False, "batch norm": True}
    return lab.study(lambda technique: or_diverges(technique), technique=technique)


def shown(lab: Lab, capsys) -> str:
    """What was printed, all of it within 80 columns, all of it kept."""
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert out in lab.entry["printed"]
    return out


def test_huge_losses_and_wide_intervals_fit_80_columns_too(lab, runs, capsys):
    capsys.readouterr()
    losses = {name: (runs[name] * 3.4e19).assign_attrs(unit="nats") for name in ("train_loss", "validation_loss")}
    wide = array([[0, 0], [-43.5, -41.5], [math.nan, math.nan]], "points", technique=runs.technique.values.tolist())
    lab.table(losses | {"gain": wide}, rows="technique")
    out = shown(lab, capsys)
    assert "e19" in out or "e20" in out
    assert "-42.5 [-55.2, -29.8]" in out


def test_small_numbers_are_rounded_like_all_others_and_have_no_sign_of_smaller(lab, capsys):
    values = array([[0.004, 0.004], [0.016, 0.016]], "nats", mode=["a", "b"])
    lab.table({"loss": values, "gain": values.assign_attrs(unit="points")}, rows="mode")
    out = shown(lab, capsys)
    assert "0.00 [0.00, 0.00]" in out
    assert "0.02 [0.02, 0.02]" in out
    assert "+0.0 [+0.0, +0.0]" in out
    assert "<" not in out


def test_a_matrix_fits_80_columns_and_loses_no_number(lab, capsys):
    values = np.arange(48.0).reshape(3, 8, 2)
    lab.table(array(values, technique=["none", LONG, "x"], p=np.linspace(0, 0.875, 8)), rows="technique", columns="p")
    out = shown(lab, capsys)
    assert "test accuracy (%) by p (means over seeds)" in out
    assert all(f"{value:.1f}" in out for value in values.mean(2).ravel())
    assert all(f"{p:g}" in out for p in np.linspace(0, 0.875, 8))
    assert "a technique" in out


def test_columns_have_intervals_and_units(lab, capsys):
    first, second = (
        array([[50.0, 60.0], [10.0, 30.0]], mode=["a", LONG]),
        array([[0.5, 0.7], [0.1, 0.3]], "nats", mode=["a", LONG]),
    )
    lab.table({"test accuracy": first, "test loss": second}, rows="mode")
    out = shown(lab, capsys)
    assert "55.0 [-8.5, 118.5]" in out
    assert "0.60 [-0.67, 1.87]" in out
    assert "0.20 [-1.07, 1.47]" in out
    assert "test accuracy" in out
    assert "nats" in out


def test_what_diverged_is_a_dash_and_never_nan(lab, runs, capsys):
    capsys.readouterr()
    lab.table({"test accuracy": runs.test_accuracy, "gap": runs.gap}, rows="technique")
    out = shown(lab, capsys)
    assert "–" in out
    assert "nan" not in out


def test_rows_of_a_table_are_in_the_order_of_the_factor(lab, capsys):
    values = array([[[1.0, 2.0]], [[3.0, 4.0]]], depth=["shallow", "deep"], p=[0.1])
    lab.table(values, rows="depth", columns="p")
    out = shown(lab, capsys)
    assert out.index("shallow") < out.index("deep")
    assert out.index("1.5") < out.index("3.5")


def claims_and_all(lab: Lab) -> None:
    """Does a question with a great many words, more than will ever fit a single line, still print at 80 columns?"""
    runs = lab.study(
        remedy, technique=("none", "lower"), tune={"rate": (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)}
    )
    gain = lab.gain(runs.test_accuracy, technique="none")
    lab.table({"train loss": runs.train_loss, "gain": gain}, rows="technique")
    lab.table({"test accuracy": runs.test_accuracy, "validation accuracy": runs.validation_accuracy}, rows="technique")
    lab.claim(
        "A statement of a great many words " * 5, "A source with a long name 2014", gain.sel(technique="lower"), above=0
    )
    lab.claim("Every seed gains", "somebody", gain.sel(technique="lower") > 0, above=50)


def test_a_run_prints_at_most_80_columns_and_files_itself(lab, capsys, tmp_path):
    capsys.readouterr()
    lab.order.append("claims_and_all")
    lab.run(claims_and_all)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\n2 of 2: claims_and_all ---" in out
    assert " of 2 seeds; expected > 50 % of seeds\n" in out
    for number, claim in enumerate(lab.claims, 1):
        assert f"\n{claim['verdict'].ljust(15)}{number}. {claim['statement'][:20]}" in out
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["experiments"]) == ["asked", "claims_and_all"]
    entry = record["experiments"]["claims_and_all"]
    assert entry["question"].startswith("Does a question with a great many words, more than will")
    assert entry["printed"] in out
    study = entry["studies"][0]
    assert set(study["coords"]) >= {"technique", "seed", "epoch", "rate", "tuning_seed"}
    assert set(study["data_vars"]) >= {"test_accuracy", "validation_loss_curve", "chosen_rate", "grid", "diverged_at"}
    assert [claim["id"] for claim in record["claims"]] == ["claims_and_all-1", "claims_and_all-2"]
    lab.close()
    assert "2 rules of thumb (" in capsys.readouterr().out


# Figures


def not_blank(path) -> bool:
    with Image.open(path) as image:
        low, high = image.convert("L").getextrema()
        return image.width >= 600 and high - low > 100


def test_all_four_kinds_of_figure_are_drawn_though_runs_diverged_and_ended_early(make_lab, tmp_path):
    lab = make_lab(seeds=[0, 1])
    runs = lab.study(
        lambda net, epochs: replace(or_diverges(net), epochs=epochs),
        net={"none": False, "dropout": True},
        epochs=(2, 5),
    )
    accuracy, short = runs.test_accuracy, runs.sel(epochs=2)
    lab.sweep(accuracy, lab.gain(accuracy, net="none"), x="epochs", hue="net")
    lab.curves(short.validation_loss_curve, short.validation_accuracy_curve, hue="net", dashed=short.train_loss_curve)
    lab.dots(accuracy, lab.gain(accuracy, net="none"), y="net", hue="epochs")
    lab.heat(accuracy, x="epochs", y="net")
    assert lab.entry["figures"] == ["asked.png", "asked_2.png", "asked_3.png", "asked_4.png"]
    assert all(not_blank(tmp_path / name) for name in lab.entry["figures"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_single_seed_draws_and_prints_without_warnings(make_lab, tmp_path, capsys):
    lab = make_lab(seeds=[0])
    runs = lab.study(or_diverges, diverges=(False, True))
    lab.sweep(runs.test_accuracy, x="diverges")
    lab.curves(runs.validation_loss_curve, hue="diverges")
    lab.dots(runs.test_accuracy, y="diverges")
    lab.heat(runs.test_accuracy.expand_dims("x"), x="x", y="diverges")
    lab.table({"accuracy": runs.test_accuracy}, rows="diverges")
    lab.table({"gain": lab.gain(runs.test_accuracy, diverges=False), "gap": runs.gap}, rows="diverges")
    assert "nan" not in capsys.readouterr().out
    assert len(lab.entry["figures"]) == 4


def colours(figure) -> dict[str, str]:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    return {label: to_hex(handle.get_color()) for handle, label in zip(handles, labels, strict=True)}


def sweep_of(*techniques: str) -> dict[str, str]:
    values = array(np.ones((len(techniques), 2, 3)), technique=list(techniques), x=[1, 2])
    return colours(plotting.lines("x?", [values], "x", "technique", None, even=True))


@pytest.mark.parametrize("baseline", ["none", "no dropout", "no norm", "plain", "constant"])
def test_the_baseline_is_black_and_a_technique_keeps_its_colour(baseline):
    many = sweep_of(LONG, "batch norm", baseline, "dropout", "something else")
    assert many[baseline] == "#000000"
    assert many["batch norm"] == "#0072b2"
    few = sweep_of("dropout", baseline, "batch norm")
    assert all(many[name] == few[name] for name in few)
    assert len(set(many.values())) == 5


def test_a_techniques_own_colour_is_no_other_labels():
    first = plotting.OTHERS[0]
    assert first in plotting.TECHNIQUES.values()
    owner = next(name for name, colour in plotting.TECHNIQUES.items() if colour == first)
    drawn = sweep_of("something else", owner, "another")
    assert drawn[owner] == first.lower()
    assert len(set(drawn.values())) == 3


def test_dots_and_curves_have_the_same_colours():
    values = array(np.ones((2, 2, 3)), technique=["none", "dropout"], x=[1, 2])
    curves = colours(plotting.lines("x?", [values], "x", "technique", None, even=False))
    figure = plotting.dots("x?", [values], "x", "technique")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    assert {label: to_hex(handle[0].get_color()) for handle, label in zip(handles, labels, strict=True)} == curves


def test_more_words_than_colours_are_drawn():
    assert len(sweep_of(*map(str, range(20)))) == 20


def test_curves_are_means_with_bands_in_proportion_and_gaps_are_bridged():
    values = array([[1.0, 3.0], [math.nan, math.nan], [3.0, 5.0], [2.0, 4.0]], "nats", epoch=[0, 1, 2, 10])
    figure = plotting.lines("x?", [values], "epoch", None, None, even=False)
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [0, 2, 10]
    assert line.get_ydata().tolist() == [2, 4, 3]
    (band,) = figure.axes[0].collections
    low, high = interval(values)["low"].values[0], interval(values)["high"].values[0]
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(low)
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


def test_a_sweep_is_evenly_spaced_and_names_its_values():
    values = array(np.ones((3, 2)), p=[0.0, 0.001, 0.5])
    figure = plotting.lines("x?", [values], "p", None, None, even=True)
    ax = figure.axes[0]
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.001", "0.5"]
    assert ax.get_ylabel() == "test accuracy (%)"


@pytest.mark.parametrize(
    ("values", "even", "label"),
    [
        ([1, 2, 16], True, "batch size (not to scale)"),
        ([0.1, 0.2, 0.9], True, "batch size (not to scale)"),
        (["one", "two", "all"], True, "batch size"),
        ([1, 2, 16], False, "batch size"),
    ],
)
def test_only_numbers_that_are_evenly_spaced_are_said_to_be_out_of_scale(values, even, label):
    figure = plotting.lines("x?", [array(np.ones((3, 2)), batch_size=values)], "batch_size", None, None, even=even)
    assert figure.axes[0].get_xlabel() == label


def test_dashed_lines_have_their_arms_colours_and_no_label():
    values = array(np.ones((2, 2, 3)), "nats", technique=["none", "dropout"], epoch=[0, 1])
    dashed = (values * 2).assign_attrs(long_name="train loss")
    figure = plotting.lines("x?", [values], "epoch", "technique", dashed, even=False)
    lines = figure.axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "--", "-", "-"]
    assert [line.get_color() for line in lines[:2]] == [line.get_color() for line in lines[2:]]
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 2
    assert "(dashed: train loss)" in figure.axes[0].get_ylabel()


def test_gains_have_a_line_at_zero():
    gains = array([[1.0, 2.0], [3.0, 4.0]], "points", p=[0.1, 0.2])
    assert len(plotting.lines("x?", [gains], "p", None, None, even=True).axes[0].lines) == 2
    accuracy = gains.assign_attrs(unit="%")
    assert len(plotting.lines("x?", [accuracy], "p", None, None, even=True).axes[0].lines) == 1


def test_dots_are_named_from_top_to_bottom_with_their_intervals():
    values = array([[1.0, 3.0], [math.nan, math.nan]], mode=["a", "b"])
    figure = plotting.dots("x?", [values], "mode", None)
    figure.canvas.draw()
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim() == (1.5, -0.5)
    low, high = ax.containers[0][2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


def test_a_heat_map_is_rows_by_columns_from_the_bottom():
    values = array(np.arange(12.0).reshape(2, 3, 2), y=["a", "b"], x=[1, 2, 3])
    values[1, 1] = math.nan
    figure = plotting.heat("x?", [values], "x", "y")
    figure.canvas.draw()
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.5", "2.5", "4.5", "6.5", "–", "10.5"]
    assert [text.get_position() for text in ax.texts[:4]] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim() == (-0.5, 1.5)


def test_arrays_may_have_their_dimensions_in_any_order():
    values = array(np.arange(12.0).reshape(2, 3, 2), hue=["a", "b"], x=[1, 2, 3])
    turned = values.transpose("seed", "x", "hue")
    one, two = (plotting.lines("x?", [each], "x", "hue", None, even=True).axes[0].lines for each in (values, turned))
    assert [line.get_ydata().tolist() for line in one] == [line.get_ydata().tolist() for line in two]
