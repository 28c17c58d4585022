import json
import math
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_lesson
from replay import changes, replay, settings, study
from scipy.stats import kstest
from torch import nn

from common.data import Batch, Split, Task, load, make_split
from common.lab import flatten
from common.training import State, cross_entropy, fit

NAME = "15_regularization_techniques_detailed"
TASK = Task((1, 8, 8), 10)
RECORD = json.loads((ROOT / "results" / NAME / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def lesson():
    torch.manual_seed(0)
    return load_lesson(NAME)


def batch(n=40):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def stepped(lesson, build, loss=cross_entropy, after=None):
    """All weights after six steps from a fixed start, by an optimiser that `build` makes for a list of parameters."""
    torch.manual_seed(0)
    model = lesson.mlp(TASK)
    optimizer = build(list(model.parameters()))
    for _ in range(6):
        optimizer.zero_grad()
        loss(model, *batch()).backward()
        optimizer.step()
        if after:
            after(State(model, None, 1, learning_rate=0.2))
    return [p.detach() for p in model.parameters()]


def sgd(parameters, decay=0.0, rate=0.2):
    """SGD with a decay, and a rate, of the matrices only."""
    matrices = {"params": parameters[::2], "weight_decay": decay, "lr": rate}
    return torch.optim.SGD([matrices, {"params": parameters[1::2]}], lr=0.2)


def test_for_sgd_the_penalty_is_weight_decay_and_so_is_shrinking_but_for_the_order(lesson):
    """Shrinking comes after the step and shortens that, too: w ← (1 - rate · decay)(w - rate · gradient)."""
    plain, decayed = stepped(lesson, sgd), stepped(lesson, partial(sgd, decay=0.5))
    same(stepped(lesson, sgd, partial(lesson.penalised, l2=0.5)), decayed)
    shrunk = stepped(lesson, sgd, after=partial(lesson.shrink, decay=0.5))
    same(shrunk, stepped(lesson, partial(sgd, decay=0.5 / 0.9, rate=0.2 * 0.9)))
    assert (shrunk[0] - decayed[0]).abs().max() > 1e-4
    same(stepped(lesson, sgd, after=lesson.shrink), plain)
    ones = lesson.network(rate=0.03).optimizer, partial(torch.optim.Adam, lr=0.03)
    same(*(stepped(lesson, build) for build in ones))  # AdamW without decay is Adam


def test_penalties_and_shrinking_are_the_plain_formulas_and_spare_biases(lesson):
    model, (x, y) = lesson.mlp(TASK, width=32), batch()
    w, b, v, c = model.parameters()
    plain = F.cross_entropy((x.flatten(1) @ w.T + b).relu() @ v.T + c, y)
    torch.testing.assert_close(lesson.penalised(model, x, y), plain)
    size, square = (sum(f(each).sum() for each in (w, v)) for f in (torch.abs, torch.square))
    torch.testing.assert_close(lesson.penalised(model, x, y, l1=0.3, l2=0.7), plain + 0.3 * size + 0.35 * square)
    old = [p.detach().clone() for p in model.parameters()]
    lesson.shrink(State(model, None, 1, learning_rate=0.1), decay=2.0)
    same(model.parameters(), [0.8 * p if p.ndim > 1 else p for p in old], rtol=1e-6, atol=0)
    lesson.shrink(State(model, None, 1, learning_rate=0.01), l1=2.0)
    same(model.parameters(), [F.softshrink(0.8 * p, 0.02) if p.ndim > 1 else p for p in old])
    assert torch.equal(w == 0, (0.8 * old[0]).abs() <= 0.02)  # exactly, without overshooting


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.9, 1.0])
def test_label_smoothing_is_torchs(lesson, strength):
    model, (x, y) = lesson.mlp(TASK), batch()
    pair = lesson.smoothed(model, x, y, strength), F.cross_entropy(model(x), y, label_smoothing=strength)
    torch.testing.assert_close(*pair)
    same(*(torch.autograd.grad(loss, model.parameters()) for loss in pair))


@pytest.mark.parametrize("strength", [1, 4, 16])
def test_mixup_is_cross_entropy_with_mixed_labels_by_a_share_from_beta(lesson, monkeypatch, strength):
    model, (x, y), seen = lesson.mlp(TASK), batch(), []
    torch.manual_seed(3)
    found = lesson.mixup(model, x, y, strength)
    torch.manual_seed(3)
    share, partner = torch.rand(2 * strength - 1).sort().values[strength - 1], torch.randperm(40)
    images, labels = (share * each + (1 - share) * each[partner] for each in (x, F.one_hot(y, 10).float()))
    torch.testing.assert_close(found, F.cross_entropy(model(images), labels))
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n).flip(0))
    for _ in range(1500):
        lesson.mixup(lambda images: seen.append(images) or torch.zeros(2, 2), torch.eye(2), torch.arange(2), strength)
    assert kstest(torch.stack(seen)[:, 0, 0].numpy(), "beta", args=(strength, strength)).pvalue > 0.01
    monkeypatch.setattr(torch, "rand", torch.ones)
    torch.testing.assert_close(lesson.mixup(model, x, y, strength), cross_entropy(model, x, y))


@pytest.mark.parametrize(("size", "strength"), [(8, 0), (28, 0), (8, 0.5), (28, 2.0)])
def test_turns_and_shifts_are_torchs_affine_grid(lesson, monkeypatch, size, strength):
    x, draws = torch.randn(6, 2, size, size), torch.rand(3, 6)
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: draws.view(shape))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    turn, right, down = strength * (2 * draws - 1) * torch.tensor([[0.26], [2 / 8], [2 / 8]])
    rows = [[turn.cos(), -turn.sin(), right], [turn.sin(), turn.cos(), down]]
    grid = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), list(x.shape), align_corners=False)
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=False) if strength else x
    torch.testing.assert_close(lesson.moved(x, strength), expected, rtol=1e-4, atol=1e-4)


def test_each_image_gets_a_draw_of_its_own_and_each_pixel_its_noise(lesson, monkeypatch):
    x = batch(1)[0].expand(2, 100, 1, 8, 8)
    move = torch.func.vmap(partial(lesson.moved, strength=0.5), randomness="different")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        assert len(move(x).view(200, 64).unique(dim=0)) == 200
        assert len(lesson.moved(x[0], 0.5).view(100, 64).unique(dim=0)) == 100
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, 0.5))
    noise = move(x) - x
    assert noise.std((0, 1)).mean().item() == pytest.approx(0.15, rel=0.03)
    assert noise.mean((2, 3, 4)).std().item() == pytest.approx(0.15 / 8, rel=0.3)


def test_losses_on_changed_images_keep_the_labels(lesson):
    model, (x, y), seen, logits = lesson.mlp(TASK), batch(400), [], torch.randn(400, 10)
    torch.manual_seed(3)
    found = lesson.augmented(model, x, y, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(found, cross_entropy(model, lesson.moved(x, 0.5), y))
    loss = lesson.mirrored(lambda images: seen.append(images) or logits, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y))
    kept, flipped = ((seen[0] == each).flatten(1).all(1) for each in (x, x.flip(3)))
    assert (kept ^ flipped).all()
    assert 0.4 < flipped.float().mean() < 0.6


def ended(lesson, weights, patience):
    """The epoch after which training ends, the weight that is left, and the notes; loss rises with the weight."""
    model, modes = nn.Linear(1, 2, bias=False), []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    x, y = torch.ones(60, 1), torch.ones(60, dtype=torch.long)
    split = Split(Batch(x, y), Batch(x, y * (torch.arange(60) >= 39)), Batch(x, y))
    state = State(model, split, epochs=len(weights))
    for state.epoch, weight in enumerate(weights, 1):
        model.weight.data.copy_(torch.tensor([[0.0], [weight]]))
        stop = lesson.stop_early(state, patience)
        assert (model.training, any(modes)) == (True, False)
        if stop:
            return state.epoch, round(model.weight[1].item(), 4), state.notes
        assert model.weight[1].item() == pytest.approx(weight)


@pytest.mark.parametrize(("patience", "last", "best"), [(1, 3, 2), (2, 6, 4), (3, 7, 4), (6, 10, 4), (99, 10, 4)])
def test_early_stopping_waits_and_restores_the_best_weights(lesson, monkeypatch, patience, last, best):
    losses = [1.0, 0.8, 0.9, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.2]
    epoch, weight, notes = ended(lesson, losses, patience)
    assert (epoch, weight) == (last, losses[best - 1])
    assert notes == {"best": best, "lowest": pytest.approx(np.log1p(np.exp(weight)) - weight / 40)}
    assert ended(lesson, [1.0] * 9, 2)[0] == 3  # an equal loss is no new minimum
    assert ended(lesson, [3.0, 2.0, 1.0], 1)[:2] == (3, 1.0)
    for shallow in (dict, copy):  # would restore the last weights
        monkeypatch.setattr(lesson, "deepcopy", shallow)
        assert ended(lesson, losses, patience)[1] == losses[last - 1]


def test_early_stopping_survives_a_first_loss_that_is_no_number(lesson):
    model = nn.Linear(1, 2, bias=False)
    good, bad = (Batch(torch.ones(3, 1), torch.full((3,), label)) for label in (0, 1))
    state = State(model, Split(bad, good, bad), epochs=9)
    for state.epoch, weight in enumerate((math.nan, 0.8, 0.9), 1):
        model.weight.data.copy_(torch.tensor([[0.0], [weight]]))
        stop = lesson.stop_early(state, 1)
    assert (stop, state.notes["best"], round(model.weight[1].item(), 4)) == (True, 2, 0.8)


def test_a_stack_of_networks_is_stopped_one_by_one(lesson):
    def note(state):
        x, y = (each[:40] for each in state.split.validation)
        state.notes.setdefault("losses", []).append(cross_entropy(state.model.eval(), x, y).item())
        state.model.train()

    recipe = replace(lesson.network(), epochs=15, evaluations=15, after_epoch=note)
    stop = replace(recipe, after_epoch=partial(lesson.stop_early, patience=3))
    (plain, curves), (found, notes) = (fit(each, range(4))[0] for each in (recipe, stop))
    for seed in range(4):
        best, last = notes[seed]["best"], np.isfinite(found["gap_curve"][1][seed]).sum() - 1
        assert (best, last) == (np.argmin(curves[seed]["losses"][:last]) + 1, min(best + 3, 15))
        assert found["test_accuracy"][1][seed] == plain["test_accuracy_curve"][1][seed][best]


def test_the_network_and_its_share_of_zeros(lesson):
    model = lesson.mlp(Task((3, 5, 5), 7), p=0.3, width=32)
    assert model(torch.randn(4, 3, 5, 5)).shape == (4, 7)
    assert [type(layer).__name__ for layer in model] == ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
    assert (model[1].out_features, model[3].p, lesson.mlp(TASK)[3].p) == (32, 0.3, 0)
    nn.init.zeros_(model[1].bias)
    model[1].weight.data[:16] = 0
    model[4].weight.data[0] = 1e-9
    assert lesson.zeros(model, None)["zeros"][1] == pytest.approx(100 * 16 * 75 / (32 * 75 + 7 * 32))


def test_an_ensemble_is_the_mean_of_probabilities_whose_members_learn_alone(lesson):
    model, one, (x, y) = lesson.Ensemble(TASK, 3), lesson.Ensemble(TASK, 1), batch()
    torch.testing.assert_close(model(x).exp(), sum(member(x).softmax(1) for member in model.members) / 3)
    assert len({member[1].weight[0, 0].item() for member in model.members}) == 3
    losses = [cross_entropy(member, x, y) for member in model.members]
    loss, pairs = lesson.each_alone(model, x, y), zip(losses, model.members, strict=True)
    torch.testing.assert_close(loss, sum(losses))
    alone = [gradient for each, member in pairs for gradient in torch.autograd.grad(each, member.parameters())]
    same(torch.autograd.grad(loss, model.parameters()), alone)
    torch.testing.assert_close(one(x), one.members[0](x).log_softmax(1))
    one.members[0][4].weight.data.mul_(1e4)
    assert cross_entropy(one, x, y).isfinite()


def looped(lesson, monkeypatch, regularised, move=None):
    """The losses of the lesson's own loop, its weights at the start and at the end, and what else it did."""
    seen, build, move = SimpleNamespace(calls=[], loss=[], modes=[]), torch.optim.AdamW, move or lesson.moved

    def optimizer(groups, **options):
        seen.groups = (built := build(groups, **options)).param_groups
        seen.weights = [w for group in seen.groups for w in group["params"]]
        seen.start = deepcopy(seen.weights)
        return built

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", optimizer)
        patch.setattr(nn.ReLU, "forward", lambda self, x: seen.modes.append((self.training, len(x))) or x.relu())
        patch.setattr(lesson, "moved", lambda x, by: seen.calls.append((len(x), by)) or move(x, by))
        seen.losses = seen.training, seen.validation = lesson.train("arm", regularised)
    w, v, b, c = seen.weights
    for x, y in make_split(load("digits"), 0, 200, 0.2)[:2]:
        seen.loss.append(F.cross_entropy((x.flatten(1) @ w.T + b).relu() @ v.T + c, y).item())
    return seen


def test_the_loop_to_copy(lesson, monkeypatch, capsys, replayed):
    without, three = (looped(lesson, monkeypatch, each) for each in (False, True))
    printed, count, best = capsys.readouterr().out, len(three.training), int(np.argmin(three.validation))
    for run, at, decay in ((without, 11, 0), (three, best, 1)):
        for i, losses in enumerate(zip(run.training, run.validation, strict=True), 1):
            line, _, printed = printed.partition("\n")
            assert line == f"arm, epoch {i:2}: loss {losses[0]:.2f}, validation {losses[1]:.2f}"
        assert run.loss == pytest.approx([run.training[at], run.validation[at]], rel=1e-4)
        assert [tuple(w.shape) for w in run.start] == [(256, 64), (10, 256), (256,), (10,)]
        same(run.start, without.start)
        assert [(each["lr"], each["weight_decay"]) for each in run.groups] == [(0.01, decay), (0.01, 0)]
        assert run.modes == len(run.training) * (10 * [(True, 20)] + [(False, 200), (False, 397)])
    assert (without.calls, three.calls, count) == ([], [(20, 0.5)] * 10 * count, min(best + 4, 12))
    assert (printed, len(without.training)) == ("", 12)
    lines = replayed.figures["your_own_loop"][0].axes[0].get_lines()
    assert [line.get_label() for line in lines[1::2]] == ["without", "with"]
    for line, curve in zip(lines, [*without.losses, *three.losses], strict=True):
        assert list(line.get_ydata()) == pytest.approx(curve, rel=1e-3)
    signs = iter([1] * 20 + [-3] * 100)  # by which the images are multiplied: validation loss rises from epoch 3 on
    run = looped(lesson, monkeypatch, True, lambda x, by: next(signs) * x)
    assert (int(np.argmin(run.validation)), len(run.validation)) == (1, 5)
    assert run.loss == pytest.approx([run.training[1], run.validation[1]], rel=1e-4)


@pytest.fixture(scope="module")
def replayed():
    """The lesson's own experiments on the stored results of all networks."""
    return replay(RECORD)


def test_each_technique_changes_one_thing_and_that_by_its_strengths(lesson, replayed):
    expected = {
        "decay": [f"optimizer.weight_decay={each}" for each in (1.0, 3.0, 10.0, 30.0)],
        "L1": [f"after_step=shrink after_step.l1={each}" for each in (0.3, 0.6, 0.9, 1.2)],
        "dropout": [f"model.p={each}" for each in (0.5, 0.7, 0.8, 0.9)],
        "stopping": [f"after_epoch=stop_early after_epoch.patience={each}" for each in (1, 2, 4, 8)],
        "augmentation": [f"loss=augmented loss.strength={each}" for each in (0.25, 0.5, 1.0, 2.0)],
        "smoothing": [f"loss=smoothed loss.strength={each}" for each in (0.05, 0.1, 0.3, 0.6)],
        "mixup": [f"loss=mixup loss.strength={each}" for each in (1, 4, 16, 64)],
        "lower rate": [f"optimizer.lr={each}" for each in (5e-05, 0.0002, 0.001, 0.005)],
        "ensemble of 5": ["loss=each_alone model=Ensemble model.members=5"] * 4,
        "none": [""] * 4,
        "right labels": ["label_noise=0.0"] * 4,
        "800 images": ["epochs=20 examples=800"] * 4,
        "subgradient": ["loss=penalised loss.l1=0.001 optimizer=SGD optimizer.lr=0.5"] * 4,
        "proximal": ["after_step=shrink after_step.l1=0.001 optimizer=SGD optimizer.lr=0.5"] * 4,
        "1": [""] * 4,
        "3": ["loss=each_alone model=Ensemble model.members=3"] * 4,
        "10": ["loss=each_alone model=Ensemble model.members=10"] * 4,
        "1, 10 × width": ["model.width=2560"] * 4,
        "1, 10 × epochs": ["epochs=800"] * 4,
    }
    asked, found = [replayed.asked["line_up"][0], replayed.asked["penalties"][1], replayed.asked["ensembles"][0]], {}
    for name, technique in (pair for each in asked for pair in each.levels["technique"].items()):
        found[name] = [changes(lesson.variant(technique, i), lesson.network()) for i in range(4)]
    assert list(found.items()) == list(expected.items())
    chosen = study(RECORD, "line_up").chosen_level
    ones = [found[each][int(chosen.sel(technique=each))] for each in ("augmentation", "dropout", "decay")]
    assert changes(lesson.combination(True, True, True, 1.0), lesson.network()) == " ".join(ones)


def test_the_other_recipes_change_what_their_names_say(lesson, replayed):
    base, asked, values = lesson.network(), replayed.asked, {}
    assert (base.batch_size, base.examples, base.label_noise, base.epochs) == (50, 200, 0.2, 80)
    assert base.optimizer.keywords == {"lr": 0.01, "weight_decay": 0, "fused": True}
    assert changes(lesson.stopped(0.2, 0), base) == "evaluations=80"
    stop = "after_epoch=stop_early after_epoch.patience=16 examples=160 label_noise=0.0"
    assert changes(lesson.stopped(0.0, 16), lesson.stopped(0.2, 0)) == stop
    assert changes(lesson.with_sgd(1.0, 0.0), base) == "model.start=1.0 optimizer=SGD optimizer.lr=0.5"
    smaller = changes(lesson.with_sgd(0.25, 0.1), lesson.with_sgd(1.0, 0.0))
    assert smaller == "model.start=0.25 optimizer.weight_decay=0.1"
    for name, losses in (pair for each in asked["augmentation"] for pair in each.levels["kind"].items()):
        values[name] = [" ".join(flatten("", each).values()) for each in losses]
    assert values == {"none": ["cross_entropy"], "moved": ["augmented 0.5", "augmented 1.0"], "mirrored": ["mirrored"]}
    fewer = {(0.0, 1): "epochs=320 examples=50 label_noise=0.0 ", (0.0, 4): "label_noise=0.0 "}
    for (wrong, times), text in (fewer | {(0.2, 1): "", (0.2, 4): "epochs=20 examples=800 "}).items():
        recipe = lesson.at_own_rate([cross_entropy, lesson.mirrored], wrong, times, 0.3, 1)
        assert changes(recipe, base) == f"{text}loss=mirrored optimizer.lr=0.3"
    plain = lesson.combination(False, False, False, 1.0)
    halves = ["loss=augmented loss.strength=0.5", "model.p=0.4", "optimizer.weight_decay=5.0"]
    assert changes(lesson.combination(True, True, True, 0.5), plain) == " ".join(halves)
    for i, each in enumerate(halves):
        assert changes(lesson.combination(i == 2, i == 1, i == 0, 0.5), plain) == each
    labels, starts, on = {"wrong": 0.2, "right": 0.0}, {"usual": 1.0, "small": 0.25}, {"off": False, "on": True}
    assert asked["detect"][0].levels["labels"] == labels
    assert list(asked["augmentation"][0].levels.values())[1:3] == [labels, {"few": 1, "4 × as many": 4}]
    assert (asked["penalties"][0].levels["start"], asked["penalties"][1].inspect) == (starts, lesson.zeros)
    assert list(asked["together"][0].levels.values()) == [on, on, on, {0.5: 0.5, 1.0: 1.0}]


def test_all_arms_take_as_many_steps_from_the_same_weights_and_train_as_one_stack(lesson, replayed):
    start, kinds = list(lesson.mlp(TASK).parameters()), {}
    for recipe in (each for asked in replayed.asked.values() for one in asked for each in one.recipes):
        steps, given = recipe.epochs * -(-recipe.examples // recipe.batch_size), settings(recipe)
        assert steps == (3200 if recipe.epochs == 800 else 320)
        torch.manual_seed(0)
        model = recipe.model(TASK)
        model = model.members[0] if isinstance(model, lesson.Ensemble) else model
        if model[1].out_features == 256:
            same(model.parameters(), [float(given.get("model.start", 1)) * p if p.ndim > 1 else p for p in start])
        kinds[" ".join(given[name] for name in ("model", "optimizer", "loss", "after_step", "after_epoch"))] = recipe
    assert len(kinds) == 11
    for name, recipe in kinds.items():
        ((arrays, _),) = fit(replace(recipe, epochs=3, evaluations=1), [0, 1], inspect=lesson.zeros)
        assert (arrays["seconds"][2]["alone"], np.isfinite(arrays["test_loss"][1]).all()) == ("", True), name
    for experiment in RECORD["experiments"].values():
        assert all(each["data_vars"]["seconds"]["attrs"]["alone"] == "" for each in experiment["studies"])
    assert study(RECORD, "line_up").train_accuracy.sel(technique="none").min() > 97  # learned, a fifth of them wrong


def table(experiment, which=0, metric="test_accuracy"):
    """Means over seeds, computed from the stored numbers, by the labels of the arms."""
    values = study(RECORD, experiment, which)[metric]
    dims = [each for each in values.dims if each != "seed"]
    keys = product(*(values[each].values.tolist() for each in dims))
    return {" ".join(map(str, key)): values.sel(dict(zip(dims, key, strict=True))).values.mean() for key in keys}


def test_the_claims_are_the_differences_that_they_name(replayed):
    """Computed once more from the stored numbers, by other means; and from which value on a claim would hold."""
    runs = study(RECORD, "detect").sel(patience=0).transpose("labels", "seed", "epoch")
    accuracy, lowest = runs.test_accuracy_curve.values, runs.validation_loss_curve.values.argmin(2)[..., None]
    wrong, right = (accuracy[..., -1:] - np.take_along_axis(accuracy, lowest, 2)).mean((1, 2))
    stop, arm, sgd, zeros = (table("detect"), table("line_up"), table("penalties"), table("penalties", 1, "zeros"))
    mirror, one, on = table("augmentation", 1), table("ensembles"), table("together")
    loss = table("ensembles", metric="test_loss")
    own = study(RECORD, "augmentation").test_accuracy.transpose("kind", "labels", "times", "seed").values.mean(3)
    right_gain, wrong_gain = own[1] - own[0]  # each with few images, and with more
    single = on["on off off"] + on["off on off"] + on["off off on"]
    pairs = on["on on off"] + on["on off on"] + on["off on on"]
    expected = {
        "detect-1": (wrong, "< -0.5 points"),
        "detect-2": (stop["wrong 4"] - stop["wrong 0"], "> -0.5 points"),
        "detect-3": (right, "< -0.5 points"),
        "detect-4": (stop["right 4"] - stop["right 0"], "> -0.5 points"),
        "detect-5": (stop["right 1"] - stop["right 16"], "< 0 points"),
        "line_up-1": ((arm["decay"] + arm["dropout"]) / 2 - arm["none"], "> 3 points"),
        "line_up-2": ((arm["smoothing"] + arm["mixup"]) / 2 - arm["none"], "> 3 points"),
        "line_up-3": ((arm["decay"] + arm["dropout"]) / 2 - arm["lower rate"], "> 1 points"),
        "penalties-1": (sgd["usual 0.0001"] - sgd["usual 0.0"], "> 1 points"),
        "penalties-2": (sgd["usual 0.01"] - sgd["usual 0.0"], "> 5 points"),
        "penalties-3": (zeros["subgradient"], "> 10 points"),
        "penalties-4": (zeros["proximal"], "> 10 points"),
        "augmentation-1": (right_gain.mean(), "> 0 points"),
        "augmentation-2": (wrong_gain.mean(), "> 0 points"),
        "augmentation-3": ((right_gain[0] - right_gain[1] + wrong_gain[0] - wrong_gain[1]) / 2, "> 3 points"),
        "augmentation-4": (mirror["mirrored 0.0 1"] - mirror["none 0.0 1"], "< -0.5 points"),
        "ensembles-1": (one["10"] - one["1"], "> 2 points"),
        "ensembles-2": (loss["10"] - loss["1, 10 × epochs"], "< 0 nats"),
        "ensembles-3": (one["10"] - one["1, 10 × width"], "> 1 points"),
        "together-1": ((2 * single - pairs) / 3 - on["off off off"], "> 0 points"),
        "together-2": (on["on on on"] - on["on off off"], "> 5 points"),
    }
    assert replayed.printed == {name: RECORD["experiments"][name]["printed"] for name in replayed.figures}
    for claims in (RECORD["claims"], replayed.judged):
        assert {each["id"]: each["expected"] for each in claims} == {name: text for name, (_, text) in expected.items()}
        means = [each["estimate"]["mean"] for each in claims]
        assert means == pytest.approx([value for value, _ in expected.values()], abs=1e-3)
