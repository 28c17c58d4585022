import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from replay import replay, study
from torch import nn

from common.data import Task, load, make_split
from common.training import Recipe, fit

TASK = Task((1, 8, 8), 10)
RECORD = json.loads((ROOT / "results" / "19_weight_initialization" / "results.json").read_text(encoding="utf-8"))
SHAPES = [(50, 200), (200, 50), (64, 64), (32, 16, 3, 3), (16, 3, 5, 5)]
KAIMING = nn.init.kaiming_normal_


def drawn(how, shape, seed=3):
    torch.manual_seed(seed)
    weight = torch.empty(shape)
    how(weight)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
def test_each_initialisation_draws_what_torch_draws(lesson19, shape):
    pairs = [
        (lesson19.xavier, nn.init.xavier_normal_),
        (lesson19.he, partial(KAIMING, nonlinearity="relu")),
        (lesson19.he, KAIMING),  # as the loop to copy calls it
        (lesson19.lecun, partial(KAIMING, nonlinearity="linear")),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(drawn(ours, shape), drawn(theirs, shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("build", "shape"), [(partial(nn.Linear, 200, 50), (50, 200)), (partial(nn.Conv2d, 16, 32, 3), (32, 16, 3, 3))]
)
def test_the_default_is_what_layers_draw_themselves(lesson19, build, shape):
    torch.manual_seed(5)
    layer = build()
    fan_in, _ = lesson19.fans(layer.weight)
    assert torch.equal(layer.weight, drawn(partial(nn.init.kaiming_uniform_, a=5**0.5), shape, 5))  # as the table says
    assert layer.weight.abs().max() <= 1 / math.sqrt(fan_in)
    assert layer.weight.var().item() == pytest.approx(1 / (3 * fan_in), rel=0.1)
    assert layer.bias.abs().max() <= 1 / math.sqrt(fan_in)


def test_the_variances_are_those_of_the_papers(lesson19):
    assert lesson19.fans(torch.empty(50, 200)) == (200, 50)
    assert lesson19.fans(torch.empty(32, 16, 3, 3)) == (16 * 9, 32 * 9)
    wanted = {"lecun": 1 / 200, "xavier": 2 / 250, "he": 2 / 200}
    for name, variance in wanted.items():
        draws = torch.stack([drawn(getattr(lesson19, name), (50, 200), seed) for seed in range(20)])
        assert draws.var().item() == pytest.approx(variance, rel=0.02), name
        assert draws.mean().item() == pytest.approx(0, abs=0.01 * math.sqrt(variance)), name


def test_each_step_of_the_derivation_is_measured_as_predicted(lesson19):
    torch.manual_seed(0)
    head, *rows = lesson19.derivation().splitlines()
    assert len(rows) == 9
    assert max(map(len, [head, *rows])) <= 80
    for row in rows:
        predicted, measured = map(float, row.split()[-2:])
        assert measured == pytest.approx(predicted, rel=0.15), row
    predicted = [float(row.split()[-2]) for row in rows]
    assert predicted == pytest.approx([64, 2.553, 1, 0.5, 1, 4, 0.4, 1.6, 1 / 3], abs=0.004)


def test_fifty_products_vanish_explode_or_last(lesson19, capsys):
    torch.manual_seed(0)
    lesson19.fifty_products()
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split()[-1]) for line in lines]
    assert len(values) == 5
    assert values[0] < 1e-40  # 0.01: each product takes nine tenths
    assert values[1] < 1e-10
    assert 1e-2 < values[2] < 1e2  # 0.1 = 1 / √100
    assert values[3] > 1e10
    assert values[4] > 1e40


def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def built(lesson19, how, **options):
    torch.manual_seed(3)
    return lesson19.mlp(TASK, how, **options)


def test_apply_reaches_every_linear_layer_and_zeros_its_bias(lesson19):
    model = built(lesson19, partial(nn.init.constant_, val=0.5), depth=3, norm=nn.BatchNorm1d)
    assert len(linears(model)) == 4
    for layer in linears(model):
        assert (layer.weight == 0.5).all()
        assert not layer.bias.any()
    norm = next(layer for layer in model if isinstance(layer, nn.BatchNorm1d))
    assert (norm.weight == 1).all()


def test_the_arms_of_a_seed_share_their_draws(lesson19):
    """The normal initialisations are one draw, scaled; PyTorch's own is as nn.Linear makes it."""
    hidden = [
        built(lesson19, how)[4].weight for how in (lesson19.lecun, lesson19.he, lesson19.UNSCALED, lesson19.SMALL)
    ]
    for weight, scale in zip(hidden, (1 / 8, math.sqrt(2) / 8, 1.0, 0.01), strict=True):
        torch.testing.assert_close(weight / scale, hidden[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(built(lesson19, lesson19.xavier)[4].weight, hidden[0])  # equal widths
    torch.manual_seed(3)
    first = nn.Linear(64, 64)
    assert torch.equal(built(lesson19, None)[1].weight, first.weight)
    assert torch.equal(built(lesson19, None)[1].bias, first.bias)


@pytest.mark.parametrize("task", [TASK, Task((3, 28, 28), 4)])
def test_networks_have_the_depth_asked_for(lesson19, task):
    for depth in (1, 6, 30):
        model = lesson19.mlp(task, lesson19.he, depth, nn.Tanh)
        assert len(linears(model)) == depth + 1
        assert sum(isinstance(layer, nn.Tanh) for layer in model) == depth
    x = torch.randn(5, *task.shape)
    for model in (lesson19.mlp(task, None, 2), lesson19.skip_net(task, lesson19.he)):
        assert model(x).shape == (5, task.classes)


def test_a_skip_net_has_ten_hidden_layers_of_which_nine_are_skipped(lesson19):
    torch.manual_seed(0)
    model = lesson19.skip_net(TASK, None)
    assert len(linears(model)) == 11
    skips = [layer for layer in model if isinstance(layer, lesson19.Skip)]
    assert len(skips) == 9
    x = torch.randn(4, 64)
    torch.testing.assert_close(skips[0](x), x + skips[0][1](x.relu()))
    nn.init.zeros_(skips[1][1].weight)
    nn.init.zeros_(skips[1][1].bias)
    assert torch.equal(skips[1](x), x)


def gradients(lesson19, how, activation):
    model = built(lesson19, how, depth=2, activation=activation)
    split = make_split(load("digits"), 0, 100)
    F.cross_entropy(model(split.train.x), split.train.y).backward()
    return model


def test_from_zeros_behind_a_relu_all_weights_have_exactly_no_gradient(lesson19):
    model = gradients(lesson19, nn.init.zeros_, nn.ReLU)
    for layer in linears(model):
        assert not layer.weight.grad.any()
    *hidden, output = linears(model)
    assert not any(layer.bias.grad.any() for layer in hidden)
    assert output.bias.grad.any()  # which learns how frequent each class is


def test_from_zeros_a_sigmoid_networks_output_layer_learns_and_its_units_are_copies(lesson19):
    model = gradients(lesson19, nn.init.zeros_, nn.Sigmoid)
    *hidden, output = linears(model)
    assert output.weight.grad.any()
    torch.testing.assert_close(output.weight.grad, output.weight.grad[:, :1].expand(-1, 64))
    assert not any(layer.weight.grad.any() for layer in hidden)  # in the first step


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
def test_from_one_constant_units_stay_copies_of_each_other(lesson19, activation):
    kept = []
    recipe = replace(lesson19.network(lesson19.CONSTANT, 0.03, 1, activation), epochs=3)
    fit(recipe, [0], inspect=lambda model, split: kept.append(model[1].weight.detach().clone()) or {})
    (weight,) = kept
    assert (weight - 1 / 64).abs().max() > 1e-3  # it has learned
    torch.testing.assert_close(weight, weight[:1].expand(64, -1), rtol=1e-3, atol=1e-4)


def test_distinct_units_are_counted(lesson19):
    split = make_split(load("digits"), 0, 100)
    for how, count in ((lesson19.CONSTANT, 1), (nn.init.zeros_, 1), (lesson19.xavier, 64), (lesson19.zero_output, 64)):
        model = built(lesson19, how, depth=1)
        assert lesson19.distinct_units(model, split)["distinct_units"] == pytest.approx(count)
    model = built(lesson19, lesson19.zero_output, depth=1)
    assert model[1].weight.any()
    assert not model[-1].weight.any()


def test_the_flow_of_a_known_network_is_what_it_should_be(lesson19):
    """Two identity layers: the signal stays; each is a tenth: it falls by a decade, as does the gradient."""
    split = make_split(load("digits"), 0, 100)
    model = built(lesson19, lesson19.he, depth=3, activation=nn.Identity)
    for factor in (1.0, 0.1):
        for layer in linears(model)[1:3]:
            nn.init.eye_(layer.weight)
            layer.weight.data *= factor
        notes = lesson19.flow(model, split)
        signal, gradient = notes["signal"][1], notes["gradient"][1]
        assert list(notes["layer"][1]) == [1, 2, 3]
        torch.testing.assert_close(signal.diff(), torch.full((2,), math.log10(factor), dtype=torch.float64))
        torch.testing.assert_close(gradient.diff(), torch.full((2,), -math.log10(factor), dtype=torch.float64))
    deep = built(lesson19, lesson19.UNSCALED, depth=40)
    assert lesson19.flow(deep, split)["signal"][1].isfinite().all()
    assert next(deep.parameters()).dtype == torch.float32


def test_the_loop_to_copy_learns_with_he_and_not_without(lesson19, capsys):
    training, validation = lesson19.train("PyTorch's", with_he=False)
    assert min(training) > 2.25
    training, validation = lesson19.train("He's", with_he=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[-1].endswith(f"loss {training[-1]:.2f}, validation {validation[-1]:.2f}")
    assert training[-1] < 0.3


def first_study(experiment):
    """The recipe and the factors of an experiment's first study."""
    asked = []

    def study(recipe, **factors):
        asked.extend((recipe, factors))
        raise StopIteration

    with pytest.raises(StopIteration):
        experiment(SimpleNamespace(study=study, say=lambda text: None))
    return asked


def arms(lesson19, name):
    """One recipe for each combination of the factors of an experiment's first study, the first candidate of each."""
    recipe, asked = first_study(getattr(lesson19, name))
    asked.pop("inspect", None)
    first = {key: next(iter(values)) for key, values in asked.pop("tune", {}).items()}
    settings = [{}]
    for key, values in asked.items():
        values = values.values() if isinstance(values, dict) else values
        settings = [setting | {key: value} for setting in settings for value in values]
    return [recipe(**setting, **first) for setting in settings]


EXPERIMENTS = ["signal", "trains", "symmetry", "activations", "depth", "relief"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_arms_of_an_experiment_differ_in_network_and_optimiser_only(lesson19, name):
    recipes = arms(lesson19, name)
    assert len(recipes) >= 6
    shared = {(r.epochs, r.batch_size, r.examples, r.label_noise, r.loss, r.schedule) for r in recipes}
    assert len(shared) == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_seeds_train_as_one_stack(lesson19, name):
    for recipe in arms(lesson19, name)[:: 2 if name == "relief" else 3]:
        results = fit(replace(recipe, epochs=min(recipe.epochs, 1), evaluations=1, examples=40), [0, 1])
        assert len(results) == 1, recipe.model
        assert results[0][0]["seconds"][2]["alone"] == ""


def test_each_initialisation_has_a_grid_of_its_own(lesson19):
    for name, arm in lesson19.INITIALISATIONS.items():
        rates = [lesson19.at_own_rate(arm, level).optimizer.keywords["lr"] for level in range(3)]
        assert set(rates) == set(arm[1]), name
    assert isinstance(lesson19.at_own_rate(lesson19.INITIALISATIONS["He"], 0), Recipe)


def test_a_deeper_network_gets_a_lower_grid(lesson19):
    recipe = lesson19.deep(lesson19.he, 20, 0.1)
    assert recipe.optimizer.keywords["lr"] == pytest.approx(0.005)
    assert len(linears(recipe.model(TASK))) == 21


def test_initialise_takes_convolutions_and_layers_without_bias(lesson19):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))
    model.apply(partial(lesson19.initialise, how=partial(nn.init.constant_, val=0.5)))
    assert (model[0].weight == 0.5).all()
    assert not model[0].bias.any()
    assert (model[2].weight == 0.5).all()
    assert (model[3].weight == 1).all()


def test_both_networks_of_the_loop_see_the_same_batches(lesson19, monkeypatch):
    orders = {False: [], True: []}
    shuffle = torch.randperm
    for with_he, seen in orders.items():
        monkeypatch.setattr(torch, "randperm", lambda n, seen=seen: seen.append(shuffle(n)) or seen[-1])
        lesson19.train("x", with_he=with_he)
    assert all(torch.equal(a, b) for a, b in zip(*orders.values(), strict=True))


def test_the_signal_is_the_difference_between_images_and_not_their_size(lesson19):
    split = make_split(load("digits"), 0, 100)
    model = built(lesson19, lesson19.he, depth=2, activation=nn.Identity)
    before = lesson19.flow(model, split)["signal"][1]
    nn.init.constant_(model[1].bias, 1000.0)
    torch.testing.assert_close(lesson19.flow(model, split)["signal"][1], before)


def test_what_experiment_1_looks_at_is_not_trained(lesson19):
    for recipe in arms(lesson19, "signal"):
        assert recipe.epochs == 0
        assert len(linears(recipe.model(TASK))) == 51


def test_the_initialisations_are_what_they_are_called(lesson19):
    spread = {name: built(lesson19, how)[4].weight for name, (how, _) in lesson19.INITIALISATIONS.items()}
    assert not spread["zeros"].any()
    assert (spread["all 1/64"] == 1 / 64).all()
    wanted = {"0.01": 0.01, "PyTorch's": 1 / math.sqrt(3 * 64), "Xavier": 1 / 8, "He": math.sqrt(2) / 8, "unscaled": 1}
    for name, deviation in (wanted | {"unscaled × 10": 10}).items():
        assert spread[name].std().item() == pytest.approx(deviation, rel=0.05), name


def test_each_technique_of_relief_has_its_network_and_its_optimiser(lesson19):
    for name, (kind, holds) in {
        "batch norm": (torch.optim.SGD, nn.BatchNorm1d),
        "skips": (torch.optim.SGD, lesson19.Skip),
        "Adam": (torch.optim.Adam, nn.ReLU),
    }.items():
        recipe = lesson19.relieved(lesson19.RELIEF[name], lesson19.he, 0.007)
        model = recipe.model(TASK)
        optimizer = recipe.optimizer(model.parameters())
        assert isinstance(optimizer, kind)
        assert optimizer.param_groups[0]["lr"] == 0.007
        assert any(isinstance(layer, holds) for layer in model)
        assert len(linears(model)) == 11


def test_scaled_up_ten_times_a_relu_network_is_the_same_function_but_for_scale(lesson19):
    """Why unscaled × 10 learns as unscaled does, at a rate lower by ten to the ninth: eleven layers, no biases yet."""
    x = make_split(load("digits"), 0, 50).train.x.double()
    large = built(lesson19, partial(nn.init.normal_, std=10.0)).double()(x)
    torch.testing.assert_close(large, 1e11 * built(lesson19, lesson19.UNSCALED).double()(x), rtol=1e-5, atol=1e14)


def test_the_lessons_claims_follow_from_the_stored_runs():
    judged = replay(RECORD).judged
    assert [claim["id"] for claim in judged] == [claim["id"] for claim in RECORD["claims"]]
    for claim, stored in zip(judged, RECORD["claims"], strict=True):
        assert claim["verdict"] == stored["verdict"], claim["id"]
        assert float(claim["estimate"]["mean"]) == pytest.approx(stored["estimate"]["mean"], abs=1e-3), claim["id"]


def test_a_run_with_one_seed_comes_to_its_end():
    assert len(replay(RECORD, RECORD["settings"]["seeds"][:1]).judged) == len(RECORD["claims"])


def test_claims_are_about_the_arms_that_they_name():
    """Each from the stored runs by numbers and names, not through the laboratory."""

    def accuracy(experiment, which=0, metric="test_accuracy", **arm):
        return study(RECORD, experiment, which)[metric].sel(arm).values

    he_20 = accuracy("depth", metric="train_accuracy", initialisation="He", depth=20)
    default = accuracy("trains", metric="train_accuracy", initialisation="PyTorch's")
    skips = [accuracy("relief", technique="skips", initialisation=each) for each in ("He", "PyTorch's")]
    early = study(RECORD, "activations").train_loss_curve.sel(activation="ReLU", epoch=4)
    gains = {
        "trains-3": [accuracy("trains", initialisation=each) for each in ("unscaled", "He")],
        "symmetry-3": [accuracy("symmetry", how=each, activation="ReLU") for each in ("zero output", "random")],
        "activations-2": [accuracy("activations", how=each, activation="tanh") for each in ("1/n", "2/n")],
        "activations-3": [accuracy("activations", how=each, activation="SELU") for each in ("1/n", "2/n")],
        "depth-3": [accuracy("depth", initialisation="He", depth=each) for each in (50, 5)],
        "depth-4": [accuracy("depth", 1, initialisation=each, depth=2) for each in ("PyTorch's", "He")],
        "relief-1": [accuracy("relief", technique="batch norm", initialisation=each) for each in ("PyTorch's", "He")],
    }
    wanted = {name: (ours - theirs).mean() for name, (ours, theirs) in gains.items()}
    wanted["trains-1"] = 100 * (default >= 50).mean()
    wanted["depth-2"] = 100 * (he_20 >= 50).mean()
    wanted["relief-2"] = 100 * (skips[0] > skips[1]).mean()
    wanted["activations-1"] = 100 * (early.sel(how="2/n").values < early.sel(how="1/(3n)").values).mean()
    found = {claim["id"]: claim["estimate"]["mean"] for claim in RECORD["claims"]}
    for name, mean in wanted.items():
        assert found[name] == pytest.approx(mean, abs=1e-3), name
