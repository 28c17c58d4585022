"""Lesson 15's mechanisms against torch, by hand, and against each other."""

import inspect
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_lesson
from torch import nn

from common.first.data import Task, load, make_split
from common.first.experiment import Comparison, what_varies
from common.first.training import State, cross_entropy, fit

TASK = Task((1, 8, 8), 10)
SGD, ADAM = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=0.01)


def batch(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def moved(lesson, optimizer, loss=cross_entropy, steps=10, build=None) -> torch.Tensor:
    """All weights after some steps on one batch from a fixed start."""
    torch.manual_seed(0)
    model = (build or lesson.mlp)(TASK)
    rule = optimizer(model.parameters())
    for _ in range(steps):
        rule.zero_grad()
        loss(model, *batch()).backward()
        rule.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_penalty_is_sgds_weight_decay(lesson15, momentum):
    ours = moved(lesson15, partial(SGD, momentum=momentum), partial(lesson15.l2_penalised, strength=0.1))
    theirs = moved(lesson15, partial(SGD, momentum=momentum, weight_decay=0.1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, moved(lesson15, SGD), atol=1e-3)


def test_decay_is_the_l2_penalty_for_sgd_after_rescaling_by_the_rate(lesson15):
    """The paper's decay is a share of the weight; a penalty of share / lr takes the same off, PyTorch's λ = share / lr
    means the same.
    """
    share = 0.02
    for rate in (0.05, 0.2):
        sgd = partial(torch.optim.SGD, lr=rate)
        penalised = moved(lesson15, sgd, partial(lesson15.l2_penalised, strength=share / rate))
        decayed = moved(lesson15, partial(lesson15.decoupled, base=sgd, decay=share / rate))
        torch.testing.assert_close(penalised, decayed, rtol=1e-5, atol=1e-6)

        def by_hand(params, rate=rate):
            params = list(params)

            def step():
                with torch.no_grad():
                    for p in params:
                        p.copy_((1 - share) * p - rate * p.grad)

            return SimpleNamespace(zero_grad=lambda: [setattr(p, "grad", None) for p in params], step=step)

        torch.testing.assert_close(decayed, moved(lesson15, by_hand), rtol=1e-5, atol=1e-6)


def test_with_adam_the_two_differ_and_each_is_torchs(lesson15):
    penalised = moved(lesson15, ADAM, partial(lesson15.l2_penalised, strength=0.5))
    torch.testing.assert_close(penalised, moved(lesson15, partial(ADAM, weight_decay=0.5)), rtol=1e-4, atol=1e-5)
    decayed = moved(lesson15, partial(lesson15.decoupled, base=ADAM, decay=0.5))
    theirs = moved(lesson15, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5))
    torch.testing.assert_close(decayed, theirs, rtol=1e-5, atol=1e-6)
    assert (penalised - decayed).abs().max() > 0.01


def test_decay_follows_a_schedule_of_the_rate(lesson15):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = lesson15.decoupled([weight], SGD, decay=2.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 1 - 0.1 * 2))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.8))


def test_parameter_groups_spare_biases_and_norms(lesson15):
    torch.manual_seed(0)
    model = lesson15.normed(TASK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = lesson15.weights_only(model.parameters(), SGD, decay=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.9 if p.ndim > 1 else 1.0))
    assert sum(p.ndim == 1 for p in model.parameters()) == 4  # two biases, the norm's gain and shift


def test_the_table_of_penalty_against_decay_says_equal_for_sgd_only(lesson15):
    rows = [lesson15.penalty_against_decay(load("digits"), "x", base, 0.1) for base in (lesson15.SGD, lesson15.ADAM)]
    sgd, adam = ([float(cell) for cell in row[1:]] for row in rows)
    assert sgd[2] < 1e-6 < 0.01 < min(sgd[:2])
    assert min(adam) > 0.01


def test_soft_threshold_is_torchs_softshrink_and_minimises(lesson15):
    w = torch.randn(500)
    torch.testing.assert_close(lesson15.soft_threshold(w, 0.3), F.softshrink(w, 0.3))
    grid = torch.linspace(-3, 3, 6001)
    objective = 0.5 * (grid[:, None] - w) ** 2 + 0.3 * grid.abs()[:, None]
    torch.testing.assert_close(lesson15.soft_threshold(w, 0.3), grid[objective.argmin(0)], atol=1.1e-3, rtol=0)


def test_only_the_proximal_step_makes_zeros(lesson15):
    recipe = replace(lesson15.BASELINE, optimizer=lesson15.SGD)
    proximal = replace(recipe, after_step=partial(lesson15.proximal_l1, strength=0.01))
    subgradient = replace(recipe, loss=partial(lesson15.l1_penalised, strength=0.01))
    zeros = [fit(each, 0, inspect=lesson15.sparsity).notes["zeros"] for each in (proximal, subgradient, recipe)]
    assert zeros[0] > 0.5
    assert zeros[1] < 1e-4 > zeros[2]


def test_the_proximal_step_is_the_rate_times_the_strength_and_spares_biases(lesson15):
    model = lesson15.mlp(TASK)
    before = [p.detach().clone() for p in model.parameters()]
    state = State(model, SGD(model.parameters()), None, epochs=1)
    lesson15.proximal_l1(state, strength=0.2)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), F.softshrink(old, 0.1 * 0.2) if p.ndim > 1 else old)


def test_l1_penalises_weights_and_spares_biases(lesson15):
    model, (x, y) = lesson15.mlp(TASK), batch()
    extra = lesson15.l1_penalised(model, x, y, 0.1) - cross_entropy(model, x, y)
    expected = 0.1 * sum(layer.weight.abs().sum() for layer in model if isinstance(layer, nn.Linear))
    torch.testing.assert_close(extra, expected)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.9])
def test_label_smoothing_is_torchs(lesson15, strength):
    model, (x, y) = lesson15.mlp(TASK).double(), batch()
    x = x.double()
    ours, theirs = (
        loss
        for loss in (lesson15.smoothed(model, x, y, strength), F.cross_entropy(model(x), y, label_smoothing=strength))
    )
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss, model.parameters()) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_mixup_is_cross_entropy_with_mixed_targets(lesson15):
    model, (x, y) = lesson15.mlp(TASK), batch()
    torch.manual_seed(3)
    found = lesson15.mixup(model, x, y, alpha=0.7)
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.7, 0.7).sample()
    partner = torch.randperm(len(y))
    targets = share * F.one_hot(y, 10) + (1 - share) * F.one_hot(y[partner], 10)
    torch.testing.assert_close(found, F.cross_entropy(model(share * x + (1 - share) * x[partner]), targets))
    assert 0 < share < 1


def drawn(monkeypatch, value: float) -> None:
    """Let every uniform number be the same."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, value, device=device))


def test_a_quarter_turn_and_a_whole_pixel_are_exact(lesson15, monkeypatch):
    x = batch()[0]
    drawn(monkeypatch, 1.0)
    turned = lesson15.augment(x, turn=90)
    assert any(torch.allclose(turned, x.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3))
    shifted = lesson15.augment(x, shift=1)
    torch.testing.assert_close(shifted[:, :, :-1, :-1], x[:, :, 1:, 1:], atol=1e-4, rtol=0)
    background = x.amin((2, 3), keepdim=True).expand(-1, -1, 8, 1)
    torch.testing.assert_close(shifted[:, :, :, -1:], background, atol=1e-4, rtol=0)
    drawn(monkeypatch, 0.5)  # the middle of each range: nothing moves
    torch.testing.assert_close(lesson15.augment(x, shift=2, turn=30), x, atol=1e-4, rtol=0)
    drawn(monkeypatch, 0.0)
    assert torch.equal(lesson15.augment(x, mirror=True), x.flip(3))


def test_every_image_gets_a_draw_of_its_own(lesson15):
    x = batch(1)[0].expand(200, 1, 8, 8)
    for change in ({"shift": 1.0}, {"turn": 15.0}, {"noise": 0.1}):
        changed = lesson15.augment(x, **change).flatten(1)
        assert len(changed.unique(dim=0)) == 200
    mirrored = (lesson15.augment(x, mirror=True) != x).flatten(1).any(1).float().mean()
    assert 0.35 < mirrored < 0.65
    noise = lesson15.augment(x, noise=0.2) - x
    assert noise.std().item() == pytest.approx(0.2, rel=0.05)


def test_no_change_asked_for_is_none_made(lesson15):
    x = batch()[0]
    assert lesson15.augment(x) is x
    assert torch.equal(lesson15.jitter(x, 0.0), x)


def test_jitter_is_all_three_in_one_number(lesson15):
    x = batch()[0]
    torch.manual_seed(0)
    expected = lesson15.augment(x, shift=0.5, turn=7.5, noise=0.15)
    torch.manual_seed(0)
    assert torch.equal(lesson15.jitter(x, 0.5), expected)
    torch.manual_seed(0)
    model = lesson15.mlp(TASK)
    torch.manual_seed(0)
    found = lesson15.augmented(model, x, batch()[1], partial(lesson15.jitter, strength=0.5))
    torch.testing.assert_close(found, cross_entropy(model, expected, batch()[1]))


LEARNS_BY_HEART = {"epochs": 10, "evaluations": 10}


@pytest.mark.parametrize("patience", [2, 100])
def test_early_stopping_restores_the_weights_of_the_lowest_validation_loss(lesson15, patience):
    recipe = replace(lesson15.BASELINE, **LEARNS_BY_HEART)
    whole = fit(recipe, 0)
    stopped = fit(replace(recipe, after_epoch=partial(lesson15.stop_early, patience=patience)), 0)
    losses = whole.history["validation_loss"][1:]
    lowest = int(np.argmin(losses))
    assert lowest + 1 < 10 - 2
    assert stopped.final["validation_loss"] == pytest.approx(losses[lowest], rel=1e-6)
    assert stopped.final["test_accuracy"] == whole.best["test_accuracy"]
    assert stopped.final["epoch"] == min(lowest + 1 + patience, 10)
    assert stopped.notes == {"lowest": pytest.approx(losses[lowest]), "kept": lowest + 1}


@pytest.mark.parametrize("shallow", [dict, lambda weights: weights.copy()])
def test_a_shallow_copy_would_restore_the_last_weights(lesson15, monkeypatch, shallow):
    recipe = replace(lesson15.BASELINE, **LEARNS_BY_HEART, after_epoch=partial(lesson15.stop_early, patience=100))
    right = fit(recipe, 0).final["validation_loss"]
    last = fit(replace(recipe, after_epoch=None), 0).final["validation_loss"]
    monkeypatch.setattr(lesson15, "deepcopy", shallow)
    assert fit(recipe, 0).final["validation_loss"] == pytest.approx(last) != pytest.approx(right)


def test_stopping_where_the_loss_is_no_number_restores_nothing(lesson15, monkeypatch):
    monkeypatch.setattr(lesson15, "evaluate", lambda model, part: (math.nan, 0.1))
    state = State(lesson15.mlp(TASK), None, make_split(load("digits"), 0, 50), epochs=3, epoch=1)
    assert not lesson15.stop_early(state, patience=2)
    state.epoch = 2
    assert lesson15.stop_early(state, patience=2)


VALIDATION = [10, 8, 9, 7, 7.5, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(("patience", "epoch"), [(1, 3), (2, 6), (3, 7), (6, 10), (9, 10)])
def test_by_patience(lesson15, patience, epoch):
    assert lesson15.by_patience(VALIDATION, patience) == epoch


def test_generalisation_loss_and_its_criterion(lesson15):
    gl = lesson15.generalisation_loss(VALIDATION)
    assert gl.tolist() == pytest.approx([0, 0, 12.5, 0, 50 / 7, 100 / 7, 200 / 7, 300 / 7, 400 / 7, 500 / 7])
    assert [lesson15.by_gl(VALIDATION, alpha) for alpha in (5, 12.6, 50, 99)] == [3, 6, 9, 10]


def test_by_pq(lesson15):
    train = [5, 4, 3, 2, 1, 1, 1, 1, 1, 1]  # the first strip of 5 makes progress, P = 1000 (3 / 1 - 1) = 2000
    assert lesson15.by_pq(train, VALIDATION, alpha=0.001, k=5) == 5  # GL = 7.1 > 2
    assert lesson15.by_pq(train, VALIDATION, alpha=0.01, k=5) == 10  # 7.1 < 20, then no progress at all
    assert lesson15.by_pq([1, 0.5] * 5, VALIDATION, alpha=10, k=5) == 10
    slow = [10 - i for i in range(10)]
    assert lesson15.by_pq(slow, [10 - i for i in range(10)], alpha=0.1, k=5) == 10  # never above its minimum


def test_by_up(lesson15):
    ends = [9, 8, 8.5, 9, 7, 8, 9, 10]  # the loss at the end of each strip of 2
    validation = [value for end in ends for value in (0, end)]
    assert [lesson15.by_up(validation, s, k=2) for s in (1, 2, 3, 4)] == [6, 8, 16, 16]


def test_held_out_digits_are_labelled_like_the_training_set(lesson15):
    split = make_split(load("digits"), 0, 200, 0.2)
    part = lesson15.held_out(split, 0.2)
    x, y = split.validation.x[:40], split.validation.y[:40]
    assert torch.equal(part.x, x)
    assert (part.y != y).float().mean().item() == pytest.approx(0.2)
    assert 0 <= part.y.min() <= part.y.max() <= 9
    assert torch.equal(lesson15.held_out(split, 0.0).y, y)


def test_a_replayed_criterion_is_the_real_run(lesson15):
    """What patience 4 would have got, read off the noted losses, is what stopping by patience 4 gets."""
    recipe = replace(lesson15.BASELINE, epochs=15)
    curve = np.array(fit(replace(recipe, after_epoch=partial(lesson15.note_losses, label_noise=0.2)), 1).notes["curve"])
    assert curve.shape == (15, 4)
    stop = lesson15.by_patience(curve[:, 1], 4)
    run = fit(replace(recipe, after_epoch=partial(lesson15.stop_early, patience=4)), 1)
    assert (run.final["epoch"], run.final["test_accuracy"]) == (stop, lesson15.stopped_at(curve, stop))
    assert stop < 15


def test_stopped_at_sees_nothing_after_the_stop(lesson15):
    curve = np.array([[0, 3, 9, 0.1], [0, 2, 8, 0.2], [0, 4, 7, 0.3], [0, 1, 6, 0.4]])
    assert [lesson15.stopped_at(curve, stop) for stop in (1, 3, 4)] == [0.1, 0.2, 0.4]
    assert lesson15.stopped_at(curve, 3, column=2) == 0.3


def keep_weights(model: nn.Module, split) -> dict:
    first = model.members[0] if hasattr(model, "members") else model
    return {"weights": nn.utils.parameters_to_vector(first.parameters()).tolist()}


def test_a_member_trains_as_it_would_alone(lesson15):
    one = replace(lesson15.BASELINE, epochs=3)
    three = replace(one, model=partial(lesson15.ensemble, members=3), loss=lesson15.each_alone)
    weights = [fit(recipe, 0, inspect=keep_weights).notes["weights"] for recipe in (one, three)]
    assert weights[0] == pytest.approx(weights[1], abs=1e-6)


def test_an_ensembles_prediction_is_the_mean_probability(lesson15):
    model, x = lesson15.ensemble(TASK, 4), batch()[0]
    expected = sum(member(x).softmax(1) for member in model.members) / 4
    torch.testing.assert_close(model(x).softmax(1), expected)
    assert len({member[1].weight[0, 0].item() for member in model.members}) == 4


def test_growth_begins_with_one_network_and_ends_with_all(lesson15):
    split = make_split(load("digits"), 0, 100)
    model = lesson15.ensemble(TASK, 3)
    rows = lesson15.growth(model, split)["growth"]
    for row, single in ((rows[0], model.members[0]), (rows[-1], model)):
        loss, accuracy = lesson15.evaluate(single, split.test)
        assert row[:2] == pytest.approx([accuracy, loss], rel=1e-5)
    assert rows[0][3] == 0
    first, second = (member(split.test.x).argmax(1) for member in list(model.members)[:2])
    assert rows[1][3] == pytest.approx((first != second).float().mean().item())
    assert lesson15.growth(model.members[0], split)["parameters"] * 3 == lesson15.growth(model, split)["parameters"]


def test_useless_inputs_are_fixed_rough_and_say_nothing_of_the_class(lesson15):
    split = make_split(load("digits"), 0, 1000)
    x = split.train.x
    torch.manual_seed(1)
    layer = lesson15.UselessInputs(64)
    out = layer(x)
    torch.manual_seed(2)
    assert torch.equal(lesson15.UselessInputs(64)(x), out)
    assert torch.equal(out[:, :64], x.flatten(1))
    extra = out[:, 64:]
    assert extra.std().item() == pytest.approx(1, abs=0.02)
    together = torch.corrcoef(torch.cat([extra, F.one_hot(split.train.y).float()], 1).T)[:64, 64:]
    assert together.abs().max() < 5 / math.sqrt(1000)
    near = layer(x + 1e-2)[:, 64:]  # images alike get other noise
    assert abs(torch.corrcoef(torch.stack([extra.flatten(), near.flatten()]))[0, 1]) < 0.05


def test_weight_by_input_adds_up_and_finds_constant_pixels(lesson15):
    split = make_split(load("digits"), 0, 200)
    model = lesson15.with_useless_inputs(TASK)
    notes = lesson15.weight_by_input(model, split)
    assert sum(notes["weight"]) == pytest.approx(1, abs=1e-5)
    constant = (split.train.x.flatten(1).std(0) == 0).sum().item()
    assert notes["inputs"] == pytest.approx([(64 - constant) / 128, constant / 128, 0.5])
    first = next(layer for layer in model if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight[:, 64:] = 0
    assert lesson15.weight_by_input(model, split)["weight"][2] == 0


def test_sparsity_counts_and_rounds(lesson15):
    split, model = make_split(load("digits"), 0, 100), lesson15.mlp(TASK)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        model[1].weight[:, :32] = 0
        model[1].weight[:, 32:48] = lesson15.ROUND / 2
    notes = lesson15.sparsity(model, split)
    total = 256 * 64 + 2560
    assert notes["zeros"] == pytest.approx(256 * 32 / total)
    assert notes["small"] == pytest.approx(256 * 48 / total)
    assert (model[1].weight[:, 32:48] == 0).all()


def test_scaled_start_scales_the_same_weights(lesson15):
    models = []
    for build in (lesson15.mlp, partial(lesson15.scaled_start, scale=4.0)):
        torch.manual_seed(0)
        models.append(build(TASK))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a * (4 if a.ndim > 1 else 1), b)
    ratio = lesson15.weight_norm(models[1])["norm"] / lesson15.weight_norm(models[0])["norm"]
    assert ratio == pytest.approx(4, rel=1e-5)


def test_the_mosaic_has_every_image_in_its_place(lesson15):
    x = torch.arange(3 * 64.0).view(3, 1, 8, 8)
    picture = lesson15.mosaic({"a": x, "b": -x})
    assert picture.shape == (20, 30)
    assert torch.equal(picture[1:9, 11:19], x[1, 0])
    assert torch.equal(picture[11:19, 21:29], -x[2, 0])
    assert picture[0].isnan().all()


def test_every_size_takes_the_same_number_of_steps(lesson15):
    for size in (*lesson15.SIZES, *lesson15.AUGMENTED_SIZES):
        recipe = lesson15.at_size(size)
        assert recipe.epochs * math.ceil(size / recipe.batch_size) == lesson15.STEPS
    assert lesson15.at_size(lesson15.SIZE) == lesson15.BASELINE


def test_since_best_compares_the_end_with_the_lowest_validation_loss(lesson15):
    recipe = replace(lesson15.BASELINE, evaluations=12)
    runs = [fit(recipe, seed) for seed in (0, 1)]
    comparison = Comparison([0, 1], {"a": recipe}, {"a": "a"}, {"a": runs})
    expected = [run.history["validation_loss"][-1] - min(run.history["validation_loss"]) for run in runs]
    assert lesson15.since_best(comparison, "validation_loss", "a").tolist() == pytest.approx(expected)


def test_combined_switches_on_what_it_is_told_to(lesson15):
    base = lesson15.BASELINE
    assert what_varies([replace(base, model=partial(lesson15.mlp, p=0.0)), lesson15.combined([])])[0] == []
    everything = lesson15.combined(lesson15.STRENGTH, factor=0.5, members=3)
    model = everything.model(TASK)
    assert len(model.members) == 3
    assert model.members[0][3].p == 0.5 * lesson15.STRENGTH["dropout"]
    assert everything.optimizer(model.parameters()).param_groups[0]["decay"] == 0.5 * lesson15.STRENGTH["weight decay"]
    change = everything.loss.keywords["loss"].keywords["change"]
    assert change.keywords == {"strength": 0.5 * lesson15.STRENGTH["augmentation"]}
    assert everything.after_epoch.keywords == {"patience": lesson15.STRENGTH["early stopping"]}


def test_later_experiments_use_the_strengths_that_the_line_up_chose(lesson15):
    record = json.loads((ROOT / "results" / lesson15.LESSON / "results.json").read_text(encoding="utf-8"))
    tables = record["experiments"]["line_up"]["table"]
    prices = next(table for table in tables if table["title"].startswith("What it brings"))
    at = {row[0]: row[prices["columns"].index("at")] for row in prices["rows"]}
    assert {name: at[name] for name in lesson15.STRENGTH} == {n: f"{s:g}" for n, s in lesson15.STRENGTH.items()}


def test_the_line_up_holds_what_the_table_of_the_guide_names(lesson15):
    assert set(lesson15.GRIDS) >= {"L2 penalty", "weight decay", "L1, proximal", "dropout", "early stopping"}
    assert set(lesson15.GRIDS) >= {"augmentation", "smoothing", "mixup"}
    for technique, grid in lesson15.GRIDS.items():
        varies, _ = what_varies(list(grid.values()))
        assert len(varies) == 1, technique  # nothing but the strength differs along a row


def test_importing_trains_nothing(lesson15):
    assert load_lesson(lesson15.LESSON) is lesson15
    assert all(inspect.isfunction(experiment) for experiment in lesson15.EXPERIMENTS)
    assert not any(isinstance(value, (torch.Tensor, np.ndarray)) for value in vars(lesson15).values())
