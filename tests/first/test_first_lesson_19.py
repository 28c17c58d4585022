import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import nn

from common.first.data import Task, load, make_split
from common.first.experiment import Comparison, SameProcess, Tuning, compare
from common.first.training import Run, cross_entropy, evaluate, fit

TASK = Task((1, 8, 8), 10)
SHAPES = [(50, 200), (200, 50), (64, 64), (32, 16, 3, 3), (16, 3, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_start_draws_what_torch_draws(lesson19, shape):
    for name, (ours, theirs, _) in lesson19.FORMULAS.items():
        if name == "truncated normal":  # PyTorch draws it in another way since 2.14
            continue
        assert torch.equal(lesson19.drawn(ours, shape, 3), lesson19.drawn(theirs, shape, 3)), name


@pytest.mark.parametrize("shape", SHAPES)
def test_each_start_has_the_deviation_of_its_formula(lesson19, shape):
    for name, (ours, _, std) in lesson19.FORMULAS.items():
        draws = torch.stack([lesson19.drawn(ours, shape, seed) for seed in range(20)])
        assert float(draws.std()) == pytest.approx(std(draws[0]), rel=0.02), name
        assert float(draws.mean()) == pytest.approx(0, abs=0.02 * std(draws[0])), name


def test_formulas_in_numbers(lesson19):
    """By the papers, for fan-in 200 and fan-out 50; a convolution's fans count the pixels of its kernel."""
    assert lesson19.fans(torch.empty(50, 200)) == (200, 50)
    assert lesson19.fans(torch.empty(32, 16, 3, 3)) == (16 * 9, 32 * 9)
    std = {name: each.std(torch.empty(50, 200)) for name, each in lesson19.FORMULAS.items()}
    expected = {"Xavier, normal": 2 / 250, "He, uniform": 2 / 200, "He, normal, fan-out": 2 / 50, "LeCun": 1 / 200}
    for name, variance in (expected | {"PyTorch's default": 1 / 600}).items():
        assert std[name] ** 2 == pytest.approx(variance), name


def test_the_default_is_what_layers_draw_themselves(lesson19):
    for build, shape in ((partial(nn.Linear, 200, 50), (50, 200)), (partial(nn.Conv2d, 16, 32, 3), (32, 16, 3, 3))):
        torch.manual_seed(5)
        assert torch.equal(build().weight, lesson19.drawn(lesson19.torch_default, shape, 5))


def test_a_truncated_normal_is_cut_and_narrower(lesson19):
    for cut in (0.5, 1.0, 2.0, 3.0):
        draw = lesson19.drawn(partial(lesson19.truncated_normal, std=0.1, cut=cut), (300, 300), 0)
        assert float(draw.abs().max()) <= 0.1 * cut + 1e-8
        assert lesson19.shrinkage(cut) == pytest.approx(truncnorm.std(-cut, cut))
        assert float(draw.std()) == pytest.approx(0.1 * lesson19.shrinkage(cut), rel=0.01)
    theirs = lesson19.drawn(partial(nn.init.trunc_normal_, std=0.1, a=-0.2, b=0.2), (300, 300), 0)
    ours = lesson19.drawn(partial(lesson19.truncated_normal, std=0.1), (300, 300), 1)
    quantiles = torch.linspace(0, 1, 21)
    apart = theirs.flatten().quantile(quantiles) - ours.flatten().quantile(quantiles)
    assert float(apart.abs().max()) < 0.003


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_rows_or_columns_are_orthonormal(lesson19, shape):
    matrix = lesson19.drawn(partial(lesson19.orthogonal, gain=3.0), shape, 0).flatten(1) / 3
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    assert torch.allclose(product, torch.eye(len(product)), atol=1e-5)


def test_a_gain_scales_the_start(lesson19):
    for start in (lesson19.xavier_normal, lesson19.xavier_uniform, lesson19.orthogonal):
        twice = lesson19.drawn(partial(start, gain=2.0), (50, 200), 0)
        assert torch.allclose(twice, 2 * lesson19.drawn(start, (50, 200), 0), rtol=1e-5), start.__name__


def test_a_row_of_formulas(lesson19, monkeypatch):
    row = lesson19.formula_row("He, normal", range(3))
    assert row[0] == "He, normal"
    assert [float(row[i]) for i in (1, 3)] == pytest.approx([0.1, math.sqrt(2 / 144)], abs=1e-4)
    assert [float(row[i]) for i in (2, 4)] == pytest.approx([0.1, math.sqrt(2 / 144)], rel=0.02)
    assert row[5] == "0e+00"
    wrong = lesson19.FORMULAS["He, normal"]._replace(ours=lambda w: w.fill_(1.0), theirs=nn.init.zeros_)
    monkeypatch.setitem(lesson19.FORMULAS, "wrong", wrong)
    assert lesson19.formula_row("wrong", range(3))[5] == "1e+00"
    assert float(lesson19.formula_row("wrong", range(3))[2]) == 0


def test_gains_in_numbers(lesson19):
    found = {name: lesson19.gains(activation()) for name, activation in lesson19.ACTIVATIONS.items()}
    assert found["identity"] == pytest.approx((1, 1), abs=1e-6)
    assert found["ReLU"] == pytest.approx((math.sqrt(2), math.sqrt(2)), abs=1e-3)
    assert found["SELU"][0] == pytest.approx(1, abs=1e-3)  # Klambauer et al. chose its constants for this
    assert found["tanh"][1] == pytest.approx(1.467, abs=1e-3)
    assert found["sigmoid"][1] == pytest.approx(4.723, abs=1e-3)
    z = torch.randn(4_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("tanh", "sigmoid", "GELU"):
        forward = float(lesson19.ACTIVATIONS[name]()(z).square().mean()) ** -0.5
        assert found[name][0] == pytest.approx(forward, rel=2e-3), name
    assert [lesson19.torch_gain(name) for name in ("identity", "ReLU", "tanh")] == pytest.approx([1, 2**0.5, 5 / 3])
    assert math.isnan(lesson19.torch_gain("GELU"))


def test_slopes_are_derivatives(lesson19):
    z = torch.tensor([-2.0, -0.5, 0.3, 4.0])
    assert torch.allclose(lesson19.slopes(nn.Tanh(), z), 1 - z.tanh() ** 2, atol=1e-6)
    assert torch.allclose(lesson19.slopes(nn.Sigmoid(), z), z.sigmoid() * (1 - z.sigmoid()), atol=1e-6)
    assert lesson19.slopes(nn.ReLU(inplace=True), z).tolist() == [0, 0, 1, 1]
    assert z.tolist() == pytest.approx([-2.0, -0.5, 0.3, 4.0])
    with torch.no_grad():
        assert lesson19.slopes(nn.Identity(), z).tolist() == [1, 1, 1, 1]


def test_flat_is_below_a_twentieth_of_the_steepest(lesson19):
    z = torch.tensor([-5.0, -1.0, 0.0, 1.0, 3.0])
    assert lesson19.flat(nn.Tanh(), z).tolist() == [True, False, False, False, True]
    assert lesson19.flat(nn.ReLU(), z).tolist() == [True, True, True, False, False]
    assert lesson19.flat(nn.Sigmoid(), z).tolist() == [True, False, False, False, False]
    assert lesson19.flat(nn.GELU(), torch.tensor([-1.2, -0.75])).tolist() == [
        False,
        True,
    ]  # its slope is negative, then 0


def test_initialise_fills_weights_and_clears_biases(lesson19):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10, bias=False))
    before = [each.clone() for each in model.parameters()]
    lesson19.initialise(model, None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    lesson19.initialise(model, lesson19.constant)
    assert torch.equal(model[0].weight, torch.full((4, 1, 3, 3), 1 / 9))
    assert torch.equal(model[3].weight, torch.full((10, 144), 1 / 144))
    assert not model[0].bias.any()
    assert model[1].weight.all()
    assert model[0].weight.requires_grad


def test_arms_of_one_seed_share_their_draws(lesson19):
    """He's weights are Xavier's times a number, layer by layer."""
    models = []
    for start in (lesson19.he_normal, lesson19.xavier_normal):
        torch.manual_seed(7)
        models.append(lesson19.mlp(TASK, start, depth=3, widths=(32, 128)))
    for ours, theirs in zip(*map(lesson19.linear_layers, models), strict=True):
        fan_in, fan_out = lesson19.fans(ours.weight)
        factor = math.sqrt((fan_in + fan_out) / fan_in)
        assert torch.allclose(ours.weight, factor * theirs.weight, rtol=1e-5)


def test_the_network_is_as_deep_and_as_wide_as_asked(lesson19):
    widths = [layer.out_features for layer in lesson19.linear_layers(lesson19.mlp(TASK, None, 5, (32, 128)))]
    assert widths == [32, 128, 32, 128, 32, 10]
    model = lesson19.mlp(
        Task((3, 4, 4), 7), lesson19.he_normal, 2, activation=nn.Tanh, norm=nn.BatchNorm1d, dropout=0.5
    )
    assert model(torch.randn(6, 3, 4, 4)).shape == (6, 7)
    kinds = [type(layer) for layer in model]
    block = [nn.Linear, nn.BatchNorm1d, nn.Tanh, nn.Dropout]
    assert kinds == [nn.Flatten, *block, *block, nn.Linear]


def by_hand(lesson, name: str, start, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Activations and their gradients in the network of experiment 2, with plain matrix products in float64."""
    x, y = make_split(load("digits"), seed, lesson.BASELINE.examples).train
    torch.manual_seed(seed)
    layers = lesson.linear_layers(lesson.mlp(TASK, start, lesson.DEPTH))
    h, hidden = x[: lesson.IMAGES].flatten(1).double(), []
    for layer in layers[:-1]:
        h = lesson.ACTIVATIONS[name]()(h @ layer.weight.double().T + layer.bias.double())
        hidden.append(h)
    logits = h @ layers[-1].weight.double().T + layers[-1].bias.double()
    gradients = torch.autograd.grad(F.cross_entropy(logits, y[: lesson.IMAGES]), hidden)
    return [h.detach() for h in hidden], list(gradients)


@pytest.mark.parametrize(("name", "start"), [("ReLU", "He"), ("tanh", "Xavier, LeCun"), ("SELU", "default")])
def test_sizes_through_the_layers(lesson19, name, start):
    draw = lesson19.SIGNAL_STARTS[start]
    found = lesson19.through_layers(draw, "digits", 4)[name]
    hidden, gradients = by_hand(lesson19, name, draw, 4)
    for key, values in (("size", hidden), ("gradient", gradients)):
        assert found[key] == pytest.approx([float(each.std(correction=0)) for each in values], rel=1e-3), key
    apart = [float(each.var(0, correction=0).mean().sqrt()) for each in hidden]
    assert found["difference"] == pytest.approx(apart, rel=2e-3)
    if name == "ReLU":
        assert found["saturated"] == pytest.approx([float((each <= 0).double().mean()) for each in hidden], abs=0.01)
        assert found["dead"] == pytest.approx([float((each <= 0).all(0).double().mean()) for each in hidden], abs=0.03)
    assert np.isnan(found["lost"]).all()
    if name in lesson19.EDGES:
        assert found["histogram"].sum(1) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("name", ["tanh", "ReLU"])
def test_histograms_are_of_the_layers_they_name(lesson19, name):
    found = lesson19.through_layers(lesson19.lecun_normal, "digits", 0)[name]
    hidden, _ = by_hand(lesson19, name, lesson19.lecun_normal, 0)
    for shares, look in zip(found["histogram"], (1, 10, 50), strict=True):
        values = hidden[look - 1].numpy().ravel()
        if name == "ReLU":
            values = np.log10(values[values > 0])
        counts, _ = np.histogram(values, lesson19.EDGES[name])
        assert shares == pytest.approx(counts / counts.sum(), abs=0.01)


def test_histograms_keep_what_lies_beyond_their_edges(lesson19):
    assert lesson19.histogram("ReLU", torch.tensor([0.0, 1e-30, 1.0, 1e30]))[[0, 24, -1]] == pytest.approx([1 / 3] * 3)
    assert lesson19.histogram("ReLU", torch.zeros(5)).sum() == 0


def test_where_signals_overflow_and_vanish(lesson19):
    """× 10 multiplies by 10 · √(64/2) a layer: past float32's 3.4e38 after 22 layers, past float16's 65504 after 3."""
    times_ten = partial(lesson19.normal, std=10.0)
    lost = {
        dtype: lesson19.through_layers(times_ten, "digits", 0, dtype)["ReLU"]["lost"]
        for dtype in lesson19.DTYPES.values()
    }
    assert lost[torch.float16][0] == 3
    assert 20 <= lost[torch.float32][0] <= 24
    assert abs(lost[torch.bfloat16][0] - lost[torch.float32][0]) <= 1  # as many bits for the exponent
    assert all(each[1] == 50 for each in lost.values())  # no loss, no gradient
    small = partial(lesson19.normal, std=0.01)  # 0.01 · √(64/2) a layer: below float32's 1.4e-45 after some 36
    vanished = lesson19.through_layers(small, "digits", 0)
    assert 34 <= vanished["ReLU"]["lost"][0] <= 39
    assert vanished["ReLU"]["size"][-1] == 0
    assert np.isnan(vanished["sigmoid"]["lost"][0])  # half of it is a constant
    assert 20 <= vanished["sigmoid"]["lost"][1] <= 30
    overflown = lesson19.through_layers(times_ten, "digits", 0)["ReLU"]
    assert np.isfinite(overflown["size"][:20]).all()
    assert np.isnan(overflown["dead"][-1])


def test_lost_is_all_zero_or_any_overflow(lesson19):
    fine, zero, one_zero, over = torch.ones(2, 2), torch.zeros(2, 2), torch.eye(2), torch.tensor([[1.0, math.inf]] * 2)
    assert lesson19.lost(torch.stack([fine, zero, one_zero, over])).tolist() == [False, True, False, True]


def test_all_activations_share_the_weights(lesson19):
    found = lesson19.through_layers(lesson19.he_normal, "digits", 0)
    assert list(found) == list(lesson19.ACTIVATIONS)
    hidden, _ = by_hand(lesson19, "identity", lesson19.he_normal, 0)
    assert found["identity"]["size"][0] == pytest.approx(float(hidden[0].std(correction=0)), rel=1e-4)
    assert found["sigmoid"]["histogram"].size == 0


def test_changes_are_told_in_powers_of_ten_or_words(lesson19):
    sizes = np.array([[1.0, 10.0, 1000.0], [1.0, 10.0, 100.0]])
    found = {"size": sizes, "gradient": sizes}
    assert [lesson19.change(found, key, last=3).mean for key in ("size", "gradient")] == [2.5, -2.5]
    assert lesson19.change(found, "size", last=2).mean == 1
    every = {(name, start): sizes for name in lesson19.ACTIVATIONS for start in lesson19.SIGNAL_STARTS}
    every |= {("tanh", "He"): np.array([[1.0, 0.0], [1.0, 1.0]]), ("ReLU", "He"): np.array([[1.0, np.nan], [1.0, 1.0]])}
    every = {key: {"size": np.pad(each, ((0, 0), (0, 50 - each.shape[1])), "edge")} for key, each in every.items()}
    rows = {row[0]: row[1:] for row in lesson19.change_table("x", every, "size").rows}
    assert rows["He"] == ["+2.5", "zero", "+2.5", "over", "+2.5", "+2.5"]
    assert lesson19.powers([0.0, 100.0, np.inf, np.nan, -1.0])[1] == 2
    assert np.isnan(lesson19.powers([0.0, 100.0, np.inf, np.nan, -1.0])).sum() == 4


def test_gradients_and_updates_of_the_first_steps(lesson19):
    recipe = replace(lesson19.with_start(lesson19.BASELINE, lesson19.he_normal), after_step=lesson19.note_gradients)
    recipe = lesson19.at_rate(recipe, 0.01)
    run = fit(replace(recipe, epochs=3), 0)
    assert run.notes["gradients"].shape == run.notes["updates"].shape == (8, 9)
    assert np.isfinite(run.notes["gradients"]).all()
    seen = []

    def watch(state) -> None:
        if state.step <= 2:
            seen.append(
                [
                    (layer.weight.grad.clone(), layer.weight.detach().clone())
                    for layer in lesson19.linear_layers(state.model)
                ]
            )

    fit(replace(recipe, epochs=1, after_step=watch), 0)
    expected = [[float(gradient.norm()) for gradient, _ in step] for step in seen]
    assert run.notes["gradients"][:2] == pytest.approx(np.array(expected), rel=1e-4)
    moved = [float((b - a).norm() / b.norm()) for (_, a), (_, b) in zip(*seen, strict=True)]
    assert run.notes["updates"][1] == pytest.approx(moved, rel=1e-2)


def test_a_diverged_run_keeps_the_gradients_it_had(lesson19):
    recipe = lesson19.with_start(lesson19.BASELINE, partial(lesson19.normal, std=10.0))
    run = fit(replace(lesson19.at_rate(recipe, 0.01), after_step=lesson19.note_gradients), 0)
    assert run.diverged_at == 2
    assert run.notes["gradients"][0, 0] > 1e13
    assert np.isnan(run.notes["gradients"][-1]).all()


def test_all_zero_relu_learns_nothing_but_the_output_bias(lesson19):
    largest = []

    def watch(state) -> None:
        *others, last = state.model.parameters()
        largest.append((max(float(each.grad.abs().max()) for each in others), float(last.grad.abs().max())))

    recipe = lesson19.at_rate(lesson19.with_start(lesson19.BASELINE, lesson19.zeros), 0.3)
    run = fit(replace(recipe, after_step=watch), 0, inspect=lesson19.note_zeros)
    assert len(largest) == 32
    assert all(others == 0 and last > 0 for others, last in largest)
    assert run.notes["moved"] == [0.0] * 17 + [1.0]


def symmetric_recipes(lesson) -> dict:
    alike = lesson.with_start(lesson.SHALLOW, lesson.constant)
    recipes = {
        "constant": alike,
        "noisy images": replace(alike, loss=lesson.noisy_images),
        "dropout": replace(alike, model=partial(alike.model, dropout=0.2)),
        "noisy weights": lesson.with_start(lesson.SHALLOW, lesson.constant_and_noise),
        "He": lesson.SHALLOW,
        "zeros": lesson.with_start(lesson.SHALLOW, lesson.zeros),
    }
    return {
        name: replace(lesson.at_rate(recipe, 0.1), after_epoch=lesson.note_symmetry, epochs=5)
        for name, recipe in recipes.items()
    }


def test_a_constant_start_stays_symmetric_and_what_breaks_it(lesson19):
    notes = {name: fit(recipe, 1).notes for name, recipe in symmetric_recipes(lesson19).items()}
    for name in ("constant", "noisy images"):
        assert notes[name]["distinct"] == [1] * 5
        assert notes[name]["rank"] == [1] * 5
    for name in ("dropout", "noisy weights", "He"):
        assert notes[name]["distinct"][-1] >= 60, name
    assert notes["zeros"] == {"distinct": [1] * 5, "rank": [0] * 5}


def test_symmetric_layers_are_of_rank_one_to_the_last_bit(lesson19):
    seen = []

    def inspect(model, split) -> dict:
        seen.extend(layer.weight.detach().clone() for layer in lesson19.linear_layers(model))
        return {}

    fit(symmetric_recipes(lesson19)["constant"], 0, inspect=inspect)
    for weight in seen[:-1]:
        assert torch.allclose(weight, weight[:1], rtol=1e-5, atol=1e-7)
    assert len(seen[-1].round(decimals=4).unique(dim=0)) == 10  # the classes differ
    assert torch.allclose(seen[-1], seen[-1][:, :1], rtol=1e-5, atol=1e-7)


def test_distinct_counts_rows(lesson19):
    assert lesson19.distinct(torch.zeros(5, 3)) == 1
    assert lesson19.distinct(torch.eye(4)) == 4
    assert lesson19.distinct(torch.eye(3)[[0, 1, 0, 0]]) == 2
    assert lesson19.distinct(torch.ones(3, 2) + 1e-5 * torch.arange(6.0).view(3, 2)) == 1
    assert lesson19.distinct(torch.eye(4).view(4, 1, 2, 2)) == 4
    assert lesson19.distinct(1e-6 * torch.eye(4)) == 4  # only the ratio counts


def test_the_noise_that_breaks_the_tie_is_small(lesson19):
    weight = lesson19.drawn(lesson19.constant_and_noise, (64, 64), 0)
    assert float(weight.mean()) == pytest.approx(1 / 64, rel=0.01)
    assert float(weight.std()) == pytest.approx(0.01 * math.sqrt(2 / 64), rel=0.05)


def test_symmetry_is_noted_of_the_second_layer_and_shares_of_what_moved(lesson19):
    model = lesson19.mlp(TASK, lesson19.zeros, 3)
    first, second, *_ = lesson19.linear_layers(model)
    with torch.no_grad():
        first.weight.normal_()
        second.weight[:3] = torch.eye(64)[:3]
        second.weight[5, 5] = 1e-5  # nothing, beside 1
    state = SimpleNamespace(model=model, notes={})
    lesson19.note_symmetry(state)
    assert state.notes == {"distinct": [4], "rank": [3]}
    moved = lesson19.note_zeros(model, None)["moved"]
    assert moved[0] == 1
    assert moved[2] == pytest.approx(4 / 64**2)


def test_a_run_trains_when_half_of_the_training_digits_are_right(lesson19):
    rows = [(0.51, 0.1), (0.5, 0.1), (0.49, 0.9), (math.nan, 0.9)]
    lost = {3: {"diverged_at": 5}}
    runs = [Run(i, final={"train_accuracy": a, "test_accuracy": b}, **lost.get(i, {})) for i, (a, b) in enumerate(rows)]
    share = lesson19.share_that_trains(Comparison(range(4), {}, {}, {"a": runs}), "a")
    assert (share.mean, share.n) == (50, 4)


def test_a_rate_keeps_the_optimiser(lesson19):
    recipe = lesson19.at_rate(lesson19.LONG, 0.5)
    assert recipe.optimizer.func is torch.optim.Adam
    assert recipe.optimizer.keywords["lr"] == 0.5


class FakeLab:
    """A lab whose runs are made up: the rate decides what they say."""

    def __init__(self, lesson, note) -> None:
        self.settings, self.tables, self.note = SimpleNamespace(seeds=[0, 1]), [], note

    def sized(self, arms: dict) -> dict:
        return arms

    def tune(self, name: str, grids: dict, count: int) -> Tuning:
        self.count = count
        scores = {row: {rate: np.array([self.note(row, rate)]) for rate in grid} for row, grid in grids.items()}
        return Tuning("validation_accuracy", scores)

    def train(self, arms: dict, baseline: str, seeds: list) -> Comparison:
        self.seeds = seeds
        runs = {}
        for arm, recipe in arms.items():
            steps = self.note(arm.split(",")[0], recipe.optimizer.keywords["lr"])
            runs[arm] = [Run(seed, notes={} if math.isnan(steps) else {"steps": steps}) for seed in seeds]
        return Comparison(seeds, arms, {}, runs)

    def table(self, table) -> None:
        self.tables.append(table)


def test_each_arm_gets_its_own_best_rate(lesson19):
    lab = FakeLab(lesson19, lambda row, rate: -abs(rate - (0.01 if row == "a" else 0.03)))
    arms = lesson19.at_best_rate(lab, dict.fromkeys("ab", lesson19.BASELINE), dict.fromkeys("ab", (0.003, 0.01, 0.03)))
    assert [arms[name].optimizer.keywords["lr"] for name in "ab"] == [0.01, 0.03]
    assert lab.count == 3


def test_linear_networks_get_the_rate_that_needs_the_fewest_steps(lesson19):
    lab = FakeLab(lesson19, lambda arm, rate: math.nan if rate > 0.1 else 1 / rate)
    arms = lesson19.fastest(lab, {"Gaussian 5": lesson19.LINEAR, "orthogonal 40": lesson19.LINEAR})
    assert [recipe.optimizer.keywords["lr"] for recipe in arms.values()] == [0.08, 0.04]
    assert min(lab.seeds) >= 1_000_000
    rows = {row[0]: row[1:] for row in lab.tables[0].rows}
    assert rows["Gaussian 5"] == ["", "", "50.0", "25.0", "12.5*", "–", "–", ""]
    assert rows["orthogonal 40"] == ["200.0", "100.0", "50.0", "25.0*", "", "", "", ""]
    nothing = lesson19.fastest(FakeLab(lesson19, lambda arm, rate: math.nan), {"Gaussian 5": lesson19.LINEAR})
    assert list(nothing) == ["Gaussian 5"]


def test_a_run_that_never_arrives_counts_with_its_length_and_a_diverged_one_not_at_all(lesson19):
    runs = [Run(0, notes={"steps": 7}), Run(1), Run(2, diverged_at=3)]
    compared = Comparison([0, 1, 2], {"a": lesson19.LINEAR}, {}, {"a": runs})
    assert lesson19.at_least(compared, "a") == pytest.approx([7, 60, math.nan], nan_ok=True)
    assert lesson19.steps_needed(compared, "a") == pytest.approx([7, math.nan, math.nan], nan_ok=True)


def test_a_norm_does_not_underflow(lesson19):
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    assert lesson19.norm(x) == pytest.approx(5)
    assert lesson19.norm(1e-300 * x) == pytest.approx(5e-300, abs=0)
    assert math.isnan(lesson19.powers([lesson19.norm(0 * x)])[0])


def test_a_zero_output_layer_starts_at_guessing_and_learns(lesson19):
    torch.manual_seed(0)
    model = lesson19.zero_output(TASK)
    split = make_split(load("digits"), 0, 400)
    assert evaluate(model, split.validation)[0] == pytest.approx(math.log(10), abs=1e-6)
    run = fit(lesson19.at_rate(replace(lesson19.SHALLOW, model=lesson19.zero_output), 0.03), 0)
    assert run.value("validation_accuracy") > 0.85


def test_equal_widths_make_xavier_lecuns_start(lesson19):
    starts = [lesson19.xavier_normal, lesson19.lecun_normal]
    equal, taking_turns = (
        [[lesson19.drawn(start, shape, 0) for start in starts] for shape in shapes]
        for shapes in ([(64, 64)], [(32, 128), (128, 32)])
    )
    assert all(torch.allclose(a, b) for a, b in equal)
    assert not any(torch.allclose(a, b) for a, b in taking_turns)


def test_linear_networks_stop_when_they_have_learned(lesson19):
    recipe = lesson19.at_rate(replace(lesson19.LINEAR, model=partial(lesson19.LINEAR.model, depth=5)), 0.1)
    run = fit(recipe, 0)
    steps = run.notes["steps"]
    assert run.final["epoch"] == steps < 60
    assert run.value("train_loss") < lesson19.TARGET
    earlier = fit(replace(recipe, epochs=steps - 1), 0)
    assert earlier.value("train_loss") >= lesson19.TARGET
    model = recipe.model(TASK)
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(model(2 * x), 2 * model(x), atol=1e-5)  # it is linear


def test_steps_needed_has_a_gap_where_a_run_did_not_arrive(lesson19):
    late, lost = Run(1, final={"epoch": 60}), Run(2, notes={"steps": 3}, diverged_at=4)
    runs = Comparison([0, 1, 2], {}, {}, {"a": [Run(0, notes={"steps": 7}), late, lost]})
    steps = lesson19.steps_needed(runs, "a")
    assert steps[0] == 7
    assert np.isnan(steps[1:]).all()


def test_gradients_through_time(lesson19):
    """In a linear network the gradient on the way back is multiplied by the recurrent matrix, again and again."""
    assert np.abs(lesson19.through_time("linear", lesson19.orthogonal, "digits", 0)).max() < 1e-4
    assert np.abs(lesson19.through_time("linear", lesson19.identity, "digits", 0)).max() < 1e-4
    seen = []

    def spy(weight) -> None:
        lesson19.lecun_normal(weight)
        seen.append(weight.double())

    found = lesson19.through_time("linear", spy, "digits", 3)
    assert found.shape == (64,)
    assert found[-1] == 0
    x, y = make_split(load("digits"), 3, lesson19.BASELINE.examples).train
    torch.manual_seed(3)
    inputs, outputs = torch.empty(64, 1), torch.empty(10, 64)
    lesson19.xavier_normal(inputs)
    lesson19.xavier_normal(outputs)
    h = torch.zeros(lesson19.IMAGES, 64, dtype=torch.float64)
    for pixel in x[: lesson19.IMAGES].flatten(1).double().T:
        h = h @ seen[0].T + pixel[:, None] @ inputs.double().T
    h.requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(h @ outputs.double().T, y[: lesson19.IMAGES]), h)[0]
    norms = [gradient.norm()]
    for _ in range(63):
        gradient = gradient @ seen[0]
        norms.append(gradient.norm())
    assert found[::-1] == pytest.approx(np.log10(np.array(norms) / float(norms[0])), abs=1e-3)


def test_tanh_loses_gradient_where_linear_keeps_it(lesson19):
    assert lesson19.through_time("tanh", lesson19.orthogonal, "digits", 0)[0] < -1
    assert isinstance(lesson19.CELLS["tanh"], nn.Tanh)


@pytest.mark.parametrize("zero_last", [False, True])
def test_skip_nets(lesson19, zero_last):
    torch.manual_seed(0)
    model = lesson19.skip_net(TASK, lesson19.he_normal, zero_last)
    skips = [layer for layer in model if isinstance(layer, lesson19.Skip)]
    assert len(skips) == 4
    assert len(lesson19.linear_layers(model)) == 1 + 2 * 4 + 1
    h = torch.randn(8, 64)
    for skip in skips:
        assert torch.equal(skip(h), h) == zero_last
        assert torch.allclose(skip(h) - h, skip.branch(h), atol=1e-5)
        assert skip.branch[0].weight.any()
    torch.manual_seed(0)
    default = lesson19.skip_net(TASK, None, zero_last)
    assert default[1].bias.any()
    assert bool(default[3].branch[-1].bias.any()) != zero_last


def finished(seed: int, validation: float, test: float) -> Run:
    return Run(seed, final={"validation_accuracy": validation, "test_accuracy": test})


def test_best_and_worst_are_chosen_on_validation(lesson19):
    runs = Comparison(
        [0, 1],
        {},
        {},
        {
            "a": [finished(0, 0.9, 0.5), finished(1, 0.9, 0.6)],
            "b": [finished(0, 0.8, 0.9), finished(1, 0.8, 0.9)],
            "c": [finished(0, 0.7, 0.4), finished(1, 0.7, 0.4)],
            "lost": [Run(0, diverged_at=3), finished(1, 0.99, 0.3)],
        },
    )
    assert lesson19.best_and_worst(runs, ["b", "a", "c"], 0.1) == ("a", "c")
    assert lesson19.best_and_worst(runs, ["a", "b", "lost"], 0.1) == ("a", "lost")
    assert lesson19.accuracies(runs, "lost", 0.1) == pytest.approx([10, 30])


def test_each_relief_changes_one_thing(lesson19):
    from common.first.experiment import what_varies

    for name, recipe in lesson19.RELIEF.items():
        varies, _ = what_varies([lesson19.RELIEF["plain"], recipe])
        assert {each.split(".")[0] for each in varies} <= ({"optimizer"} if name == "Adam" else {"model"}), name
        kinds = {type(layer) for layer in lesson19.with_start(recipe, lesson19.he_normal).model(TASK).modules()}
        assert (nn.BatchNorm1d in kinds) == (name == "batch norm")
        assert (lesson19.Skip in kinds) == name.startswith("skips")
        fit(replace(lesson19.with_start(recipe, lesson19.xavier_normal), epochs=1), 0)


# ---- first aid ----


def batch(count: int = 100):
    x, y = make_split(load("digits"), 0, 400).train
    return x[:count], y[:count]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["healthy", "vanishing", "exploding", "symmetric", "dead units"])
def test_each_diagnosis(lesson19, name, seed):
    found = lesson19.examine(lesson19.PATIENTS[name], "digits", seed)
    assert found.cause == name
    assert (name == "healthy") == (list(found.diagnosis) == ["healthy"])
    assert len(found.layers) == 21
    assert found.guessing == pytest.approx(math.log(10))


def examine(lesson, model: nn.Module, x: torch.Tensor | None = None, **settings):
    images, y = batch()
    torch.manual_seed(0)
    return lesson.first_aid(model, images if x is None else x, y, **settings)


def test_other_ills(lesson19):
    torch.manual_seed(0)
    he = lesson19.mlp(TASK, lesson19.he_normal, 3)
    with torch.no_grad():
        he[-1].weight *= 20
    assert list(examine(lesson19, he).diagnosis) == ["overconfident"]
    flat = lesson19.mlp(TASK, partial(lesson19.normal, std=10.0), 2, activation=nn.Tanh)
    with torch.no_grad():
        flat[-1].weight *= 0.001
    assert list(examine(lesson19, flat).diagnosis) == ["saturated"]
    half = lesson19.mlp(TASK, lesson19.he_normal, 3)
    with torch.no_grad():
        half[-1].weight *= 0.1
        half[3].bias[:60] = -100
    found = examine(lesson19, half)
    assert found.cause == "dead units"
    assert found.layers[2].dead == pytest.approx(60 / 64, abs=0.04)
    assert "layer 3 (5)" in found.diagnosis["dead units"]
    overflowing = lesson19.mlp(TASK, partial(lesson19.normal, std=10.0), 40)
    found = examine(lesson19, overflowing)
    assert list(found.diagnosis) == ["exploding"]
    assert not math.isfinite(found.loss)
    narrow = lesson19.mlp(TASK, lesson19.he_normal, 1)
    with torch.no_grad():
        narrow[1].weight *= 1e-6
    assert examine(lesson19, narrow).cause == "vanishing"
    x, _ = batch()
    x[3, 0, 2, 2] = math.nan
    assert list(examine(lesson19, lesson19.healthy(TASK), x).diagnosis) == ["bad batch"]


def test_rates_are_examined_last(lesson19):
    torch.manual_seed(0)
    model = lesson19.healthy(TASK)
    for rate, cause in ((100.0, "rate"), (0.01, "healthy"), (1e-9, "rate")):
        assert list(examine(lesson19, model, optimizer=partial(torch.optim.SGD, lr=rate)).diagnosis) == [cause]


def test_starts_at_zero_on_purpose_are_no_illness(lesson19):
    torch.manual_seed(0)
    found = examine(lesson19, lesson19.zero_output(TASK))
    assert list(found.diagnosis) == ["healthy"]
    assert "no gradient back" in found.diagnosis["healthy"]
    for start in (None, lesson19.xavier_normal):
        assert examine(lesson19, lesson19.skip_net(TASK, start, zero_last=True)).cause == "healthy"


class Convolutions(nn.Module):
    """What a learner may bring: convolutions, a norm, in-place and functional activations, dropout, a shared module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3)
        self.activation, self.dropout, self.out = nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.norm(self.first(x)))
        x = F.relu(self.second(x), inplace=True)
        return self.out(self.dropout(x.flatten(1)))


def test_first_aid_for_any_model_leaves_no_trace(lesson19):
    torch.manual_seed(0)
    model = Convolutions().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        found = lesson19.first_aid(model, *batch())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [layer.name for layer in found.layers] == ["1 (first)", "2 (second)", "3 (out)"]
    assert 0.2 < found.layers[0].saturated < 0.8
    assert [math.isnan(layer.saturated) for layer in found.layers] == [False, True, True]  # F.relu is not seen
    assert list(found.diagnosis) == ["healthy"]
    lines = str(found).splitlines()
    assert len(lines) == 2 + 3 + 1
    assert all(len(line) <= 80 for line in lines)
    x, _ = batch()
    torch.manual_seed(0)
    expected = model.train()(x)
    model.eval()
    torch.manual_seed(0)
    assert lesson19.first_aid(model, *batch()).loss == pytest.approx(
        float(F.cross_entropy(expected, batch()[1]).detach())
    )


def test_a_deep_pooled_convolutional_net_is_healthy(lesson19):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(1, 16, 3, padding=1)]
    for _ in range(4):
        blocks += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    model = lesson19.initialise(
        nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), lesson19.he_normal
    )
    images = F.interpolate(batch()[0], size=(32, 32))
    assert examine(lesson19, model, images).cause == "healthy"


def test_vitals_are_what_they_are_called(lesson19):
    torch.manual_seed(0)
    model = lesson19.mlp(TASK, lesson19.he_normal, 2)
    x, y = batch()
    found = lesson19.first_aid(model, x, y, partial(torch.optim.SGD, lr=0.5))
    z1 = model[1](x.flatten(1))
    z2 = model[3](z1.relu())
    logits = model[5](z2.relu())
    loss = F.cross_entropy(logits, y)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    outputs = [z1, z2, logits]
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
    loss.backward()
    inputs = [x.flatten(1), z1.relu().detach(), z2.relu().detach()]
    for layer, module, h, gradient in zip(found.layers, model[1::2], inputs, gradients, strict=True):
        assert layer.size == pytest.approx(float(h.square().mean().sqrt()), rel=1e-4)
        assert layer.difference == pytest.approx(float(h.var(0, correction=0).mean().sqrt()), rel=1e-4)
        assert layer.dead == pytest.approx(float((h == h[0]).all(0).float().mean()))
        assert layer.gradient == pytest.approx(float(gradient.norm(dim=1).mean()), rel=1e-4)
        weight = module.weight
        moved = 0.5 * weight.grad.norm() / weight.norm()
        assert layer.update == pytest.approx(float(moved.detach()), rel=1e-3)
        assert layer.distinct == 1
    saturated = [float((z <= 0).float().mean()) for z in (z1, z2)]
    assert [layer.saturated for layer in found.layers[:2]] == pytest.approx(saturated)
    assert math.isnan(found.layers[2].saturated)


def test_first_aid_takes_other_shapes_and_layers(lesson19):
    torch.manual_seed(0)
    x, y = batch()
    rows = nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 32), nn.SiLU(), nn.Flatten(), nn.Linear(256, 10))
    found = lesson19.first_aid(rows, x, y)
    assert found.cause == "healthy"
    assert found.layers[0].saturated < 0.5  # SiLU is seen
    assert lesson19.first_aid(nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 10, 64), nn.Flatten()), x, y).cause == "healthy"
    assert lesson19.first_aid(nn.Sequential(nn.Conv2d(1, 10, 1)), x, y[:, None, None].expand(-1, 8, 8)).loss > 0
    assert lesson19.first_aid(rows.double(), x.double(), y).cause == "healthy"
    single = lesson19.first_aid(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, y)
    assert len(single.layers) == 1


def test_tiny_gradients_tell_units_apart(lesson19):
    """Equal weights, gradients that differ but are 10⁹ times smaller: the units will part."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.weight.grad = 1e-9 * torch.eye(3, 4)
    seen = lesson19.Vitals("1 (a)", 1.0, 1.0, 0.0)
    lesson19.look_at_weights(seen, layer, torch.ones(5, 3), layer.weight.detach().clone())
    assert (seen.distinct, seen.update) == (1, 0)
    assert seen.gradient == pytest.approx(math.sqrt(3))
    layer.weight.grad = 1e-9 * torch.ones(3, 4)
    lesson19.look_at_weights(seen, layer, torch.ones(5, 3), layer.weight.detach() + 1)
    assert seen.distinct == pytest.approx(1 / 3)
    assert seen.update == pytest.approx(0.5)


def test_the_step_is_sgds_at_a_hundredth_unless_told_otherwise(lesson19):
    torch.manual_seed(0)
    model = lesson19.mlp(TASK, lesson19.he_normal, 2)
    default = examine(lesson19, model).layers[0].update
    hundredth = examine(lesson19, model, optimizer=partial(torch.optim.SGD, lr=0.01)).layers[0].update
    assert default == hundredth > 0


def test_frozen_layers_and_models_that_cannot_be_examined(lesson19):
    torch.manual_seed(0)
    model = lesson19.mlp(TASK, lesson19.he_normal, 2)
    model[1].requires_grad_(False)
    found = examine(lesson19, model)
    assert found.layers[0].update == 0
    assert found.layers[1].update > 0
    with pytest.raises(ValueError, match="depends on no linear or convolutional layer"):
        lesson19.first_aid(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), *batch())
    with pytest.raises(ValueError, match="must return logits"):
        lesson19.first_aid(nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 10)), *batch())


def test_layers_outside_the_loss_are_left_out(lesson19):
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = nn.Linear(64, 32), nn.Linear(32, 10), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                h = self.body(x.flatten(1)).relu()
            self.unused(h)
            return self.head(h)

    torch.manual_seed(0)
    assert [layer.name for layer in examine(lesson19, TwoHeads()).layers] == ["3 (head)"]


def sound(lesson, count: int = 3, **changes) -> list:
    """Vitals of a healthy network of so many layers."""
    plain = {
        "size": 1.0,
        "difference": 1.0,
        "dead": 0.1,
        "saturated": 0.5,
        "gradient": 1.0,
        "distinct": 1.0,
        "update": 1e-3,
    }
    return [lesson.Vitals(f"{i} (layer)", **(plain | changes)) for i in range(1, count + 1)]


def diagnosis(lesson, layers: list, loss: float = 2.3) -> dict[str, str]:
    return lesson.diagnose(torch.zeros(2), loss, 2.3, layers)


def test_diagnoses_of_vitals(lesson19):
    """Each rule alone, just beyond its threshold and just within."""

    def with_one(where: int, **changes) -> list:
        layers = sound(lesson19)
        for name, value in changes.items():
            setattr(layers[where], name, value)
        return layers

    cases = [
        (with_one(0), ["healthy"]),
        (with_one(-1, difference=1.1e3), ["exploding"]),
        (with_one(-1, difference=0.9e3), ["healthy"]),
        (with_one(-1, difference=0.9e-3), ["vanishing"]),
        (with_one(-1, difference=1.1e-3), ["healthy"]),
        (with_one(0, gradient=1.1e3), ["exploding"]),
        (with_one(0, gradient=0.9e-3), ["vanishing"]),
        (with_one(-1, gradient=1e9), ["healthy"]),  # the output layer's gradient is of another kind
        (with_one(1, distinct=0.49), ["symmetric"]),
        (with_one(1, distinct=0.51), ["healthy"]),
        (with_one(-1, distinct=0.1), ["healthy"]),  # rare classes may have equal rows
        (with_one(1, dead=0.76), ["dead units"]),
        (with_one(1, dead=0.74), ["healthy"]),
        (with_one(0, dead=0.9), ["healthy"]),  # pixels of a margin
        (with_one(1, saturated=0.91), ["saturated"]),
        (with_one(1, saturated=0.89), ["healthy"]),
        (sound(lesson19, saturated=math.nan), ["healthy"]),
        ([*sound(lesson19, 1, saturated=math.nan), *sound(lesson19, 2, saturated=0.95)], ["saturated"]),
        (sound(lesson19, update=0.11), ["rate"]),
        (sound(lesson19, update=0.9e-5), ["rate"]),
        (sound(lesson19, update=0.0), ["healthy"]),
        (sound(lesson19, gradient=0.0), ["healthy"]),
        (sound(lesson19, difference=0.0), ["vanishing"]),
    ]
    for layers, names in cases:
        assert list(diagnosis(lesson19, layers)) == names, layers
    assert list(diagnosis(lesson19, sound(lesson19), 4.7)) == ["overconfident"]
    assert list(diagnosis(lesson19, sound(lesson19), 4.5)) == ["healthy"]
    assert list(diagnosis(lesson19, sound(lesson19), math.inf)) == ["exploding"]
    both = with_one(1, dead=0.8)
    both[-1].difference = 1e-6
    assert list(diagnosis(lesson19, both)) == ["dead units", "vanishing"]
    wild = with_one(-1, difference=1e6)
    wild[0].gradient = 1e-6
    assert list(diagnosis(lesson19, wild, 1e9)) == ["exploding", "overconfident"]


def test_the_words_of_a_diagnosis(lesson19):
    layers = sound(lesson19)
    layers[1].distinct = 0.25
    assert diagnosis(lesson19, layers)["symmetric"].startswith("25 % of layer 2 (layer)'s units differ")
    layers = sound(lesson19)
    layers[2].dead = 0.8
    assert diagnosis(lesson19, layers)["dead units"].startswith("80 % of layer 3 (layer)'s inputs never change")
    layers = sound(lesson19)
    layers[1].saturated = 0.95
    assert diagnosis(lesson19, layers)["saturated"].startswith("95 % of what follows layer 2 (layer)")
    layers[2].difference, layers[0].gradient = 2e4, 30.0
    words = diagnosis(lesson19, layers)["exploding"]
    assert words == "difference × 2e+04 on the way, gradient × 3e+01 back; start smaller (ReLU: He)"
    layers[2].difference = 2e-4
    assert "start larger" in diagnosis(lesson19, layers)["vanishing"]


def test_an_examination_prints_every_vital(lesson19):
    layer = lesson19.Vitals("10 (7.branch.0.long.name)", 1.5, 0.25, 0.125, 0.5, 3e-4, 1.0, 2e-3)
    text = str(lesson19.Examination(2.5, 2.302585, [layer], {"healthy": "words", "rate": "more"}))
    assert text.splitlines()[0] == "loss 2.5, guessing 2.3"
    heads = ["layer", "size", "diff.", "dead", "%", "sat.", "%", "gradient", "dist.", "%", "update"]
    assert text.splitlines()[1].split() == heads
    assert (
        text.splitlines()[2]
        == f"{'10 (7.branch.0.':16s}  1.5e+00  2.5e-01       12       50  3.0e-04      100  2.0e-03"
    )
    assert text.splitlines()[3:] == ["healthy: words", "rate: more"]
    assert lesson19.Examination(2.5, 2.3, [layer], {"rate": "a", "other": "b"}).cause == "rate"


def test_the_loss_at_the_start_is_hes_over_guessing(lesson19):
    torch.manual_seed(3)
    model = lesson19.mlp(TASK, lesson19.he_normal, 20)
    expected = evaluate(model, make_split(load("digits"), 3).validation)[0] - math.log(10)
    assert lesson19.start_loss("digits", 3) == pytest.approx(expected)


def test_the_same_numbers_on_one_process_and_in_quick_runs_with_lost_arms(lesson19):
    """What every experiment's tables must survive: an arm of which no run is left."""
    bad = lesson19.at_rate(lesson19.with_start(lesson19.BASELINE, partial(lesson19.normal, std=10.0)), 0.1)
    runs = compare({"bad": bad}, "bad", [0, 1], SameProcess())
    assert lesson19.share_that_trains(runs, "bad").mean == 0
    assert lesson19.share_that_trains(runs, "bad").n == 2


def test_noise_on_images_is_as_large_as_the_signal(lesson19):
    model = lesson19.mlp(TASK, lesson19.he_normal, 2)
    x, y = batch()
    torch.manual_seed(1)
    noisy = lesson19.noisy_images(model, x, y)
    torch.manual_seed(1)
    assert torch.equal(noisy, cross_entropy(model, x + torch.randn_like(x), y))


DIFFERENCES = {
    "He beats Xavier (ReLU)": ("trains", "He", "Xavier"),
    "Orthogonal is for RNNs only: no gain over He here": ("trains", "orthogonal", "He"),
    "The tie broken, it is as good as He (dropout)": ("symmetry", "dropout", "He"),
    "The tie broken, it is as good as He (noisy weights)": ("symmetry", "noisy weights", "He"),
    "Never start a layer at zero: it costs accuracy (the output layer)": ("symmetry", "zero output", "He"),
    "PyTorch's default is already good: no worse than He (ReLU, 2 layers)": ("matrix", "default 2", "He 2"),
    "PyTorch's default is already good: no worse than He (ReLU, 20 layers)": ("matrix", "default 20", "He 20"),
    "Five layers: nothing to choose between them": ("how_deep", "He 5", "Xavier 5"),
}
SHARES = {
    "It does not train (zeros)": ("trains", "zeros"),
    "It does not train (constant)": ("trains", "constant"),
    "N(0, 0.01²) does not train a deep network": ("trains", "small"),
    "It does not train at rate 0.01 (unscaled)": ("trains", "unscaled, 0.01"),
    "It does not train. Period. (unscaled, its own rate)": ("trains", "unscaled"),
    "It does not train. Period. (× 10, its own rate)": ("trains", "× 10"),
    "It trains (He)": ("trains", "He"),
    "Default → already good: it trains": ("trains", "default"),
    "20 layers: Xavier trains, in this budget": ("how_deep", "Xavier 20"),
    "20 layers: He trains, in this budget": ("how_deep", "He 20"),
    "30 layers: He trains, in this budget": ("how_deep", "He 30"),
    "50 layers: He trains, in this budget": ("how_deep", "He 50"),
    "30 layers: Xavier does not train, in this budget": ("how_deep", "Xavier 30"),
}


def test_the_reference_runs_claims_are_about_the_arms_they_name():
    from docs.readme import load_results

    record = load_results()["19_weight_initialization"]
    claims = {claim["statement"]: claim for claim in record["claims"]}

    def values(experiment: str, arm: str, part: str) -> np.ndarray:
        runs = record["experiments"][experiment]["arms"][arm]["runs"]
        return np.array([run[part]["accuracy"] for run in runs], dtype=float)

    for statement, (experiment, arm, other) in DIFFERENCES.items():
        mean = 100 * (values(experiment, arm, "test") - values(experiment, other, "test")).mean()
        assert claims[statement]["estimate"]["mean"] == pytest.approx(mean, abs=1e-3), statement
    for statement, (experiment, arm) in SHARES.items():
        share = 100 * (np.nan_to_num(values(experiment, arm, "train")) >= 0.5).mean()
        assert claims[statement]["estimate"]["mean"] == pytest.approx(share), statement
    matrix = record["experiments"]["matrix"]["arms"]
    for name, start in {"tanh": "Xavier", "ReLU": "He", "GELU": "He", "SELU": "LeCun"}.items():
        claim = next(claim for text, claim in claims.items() if text.startswith(f"{name} → {start}"))
        other = claim["statement"].rpartition("(")[2].rstrip(")")
        mean = 100 * (values("matrix", f"{name} {start}", "test") - values("matrix", f"{name} {other}", "test")).mean()
        assert claim["estimate"]["mean"] == pytest.approx(mean, abs=1e-3), name
        rest = {
            each: matrix[f"{name} {each}"]["summary"]["validation_accuracy"]
            for each in ("default", "Xavier", "He", "LeCun")
        }
        whole = {each: summary["mean"] for each, summary in rest.items() if summary["n"] == 10 and each != start}
        assert max(whole, key=whole.get) == other


def test_the_reference_run_found_no_difference_to_torch():
    from docs.readme import load_results

    table = load_results()["19_weight_initialization"]["experiments"]["formulas"]["table"][0]
    assert len(table["rows"]) == 10
    assert all(row[-1] == "0e+00" for row in table["rows"])
    for row in table["rows"]:
        assert [float(row[1]), float(row[3])] == pytest.approx([float(row[2]), float(row[4])], rel=0.02)
