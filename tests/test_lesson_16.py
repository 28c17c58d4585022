import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.data import Split, Task, load, make_split
from common.training import State, fit

TASK = Task((1, 8, 8), 10)


def test_batch_norm_of_vectors_is_torchs_in_output_and_gradients(lesson16):
    x = 3 * torch.randn(12, 5, dtype=torch.float64) + 1
    gamma, beta, weights = torch.rand(5).double() + 0.5, torch.randn(5).double(), torch.randn(12, 5).double()
    theirs = nn.BatchNorm1d(5).double()
    with torch.no_grad():
        theirs.weight.copy_(gamma)
        theirs.bias.copy_(beta)
    seen = []
    for function in (lambda x: lesson16.batch_norm(x, gamma, beta), theirs):
        inputs = x.clone().requires_grad_()
        out = function(inputs)
        (out * weights).sum().backward()
        seen.append((out, inputs.grad))
    for mine, its in zip(*seen, strict=True):
        torch.testing.assert_close(mine, its)
    assert torch.autograd.gradcheck(lesson16.batch_norm, (x.requires_grad_(), gamma.requires_grad_(), beta))


def pair(lesson16, momentum):
    """Our layer for images and PyTorch's, with the same gain and shift, neither of which is the default."""
    ours = lesson16.BatchNorm2d(5, momentum).double()
    theirs = nn.BatchNorm2d(5, momentum=momentum).double()
    with torch.no_grad():
        for mine, its in ((ours.gamma, theirs.weight), (ours.beta, theirs.bias)):
            its.copy_(torch.rand_like(its) + 0.5)
            mine.copy_(its[:, None, None])
    return ours, theirs


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_batch_norm_of_images_is_torchs(lesson16, momentum):
    """Output, gradients and running statistics over several batches of different sizes, then eval mode."""
    ours, theirs = pair(lesson16, momentum)
    for size in (6, 2, 7):
        x = 3 * torch.randn(size, 5, 4, 3, dtype=torch.float64) + 1
        seen = []
        for layer in (ours, theirs):
            inputs = x.clone().requires_grad_()
            out = layer.train()(inputs)
            (out * torch.arange(out.numel()).view_as(out).double().sin()).sum().backward()
            seen.append((out, inputs.grad, layer.running_mean.flatten(), layer.running_var.flatten()))
        for mine, its in zip(*seen, strict=True):
            torch.testing.assert_close(mine, its)
    torch.testing.assert_close(ours.gamma.grad.flatten(), theirs.weight.grad)
    torch.testing.assert_close(ours.beta.grad.flatten(), theirs.bias.grad)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    before = ours.running_mean.clone()
    ours(x + 5)
    assert torch.equal(ours.running_mean, before)


def test_batch_norm_of_images_passes_gradcheck_and_is_saved_whole(lesson16):
    layer = lesson16.BatchNorm2d(3).double()
    assert torch.autograd.gradcheck(layer, torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True))
    assert set(layer.state_dict()) == {"gamma", "beta", "running_mean", "running_var"}
    assert len(list(layer.parameters())) == 2


def test_the_example_by_hand_is_what_comes_out(lesson16):
    """The numbers of the section Why: normalised by the biased variance; the running one is the unbiased."""
    x = torch.tensor([[1.0, 10.0], [1.0, 20.0], [4.0, 30.0]])
    normalised = lesson16.batch_norm(x, torch.ones(2), torch.zeros(2))
    expected = torch.tensor([[-0.71, -1.22], [-0.71, 0.0], [1.41, 1.22]])
    torch.testing.assert_close(normalised, expected, atol=0.006, rtol=0)
    layer = nn.BatchNorm1d(2, momentum=1.0)
    layer(x)
    assert layer.running_var[1].item() == pytest.approx(100)
    assert x[:, 1].var(correction=0).item() == pytest.approx(200 / 3)
    assert nn.BatchNorm1d(2).momentum == 0.1  # the weight of the new value:
    layer = nn.BatchNorm1d(2)
    layer(x)
    assert layer.running_mean[1].item() == pytest.approx(0.1 * 20)


def test_a_training_batch_of_one_vector_is_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))
    assert nn.BatchNorm1d(3).eval()(torch.randn(1, 3)).shape == (1, 3)


def test_the_loop_to_copy_learns_says_so_and_learns_faster_with_norm(lesson16, capsys):
    model, plain = lesson16.train(norm=False)
    assert [type(layer).__name__ for layer in model].count("Identity") == 2
    model, normed = lesson16.train(norm=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(plain) + len(normed) == 16
    assert lines[-1].endswith(f"validation loss {normed[-1]:.2f}")
    assert all(a < b for a, b in zip(normed, plain, strict=True))  # the lesson says: after every epoch
    for i, kind, layer in ((1, nn.BatchNorm2d, 0), (6, nn.BatchNorm1d, 5)):
        assert isinstance(model[i], kind)
        assert model[layer].bias is None
    assert model[-1].bias is not None
    x, y = make_split(load("digits"), 0, 200).validation
    with torch.no_grad():  # measured in eval mode
        assert nn.functional.cross_entropy(model.eval()(x), y).item() == pytest.approx(normed[-1], rel=1e-4)


def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def built(lesson16, **options):
    torch.manual_seed(3)
    return lesson16.mlp(TASK, **options)


def test_networks_of_a_seed_start_from_the_same_weights_with_or_without_norm(lesson16):
    for scale in (0.0, 1.0):
        plain = linears(built(lesson16, norm="no norm", scale=scale))
        normed = linears(built(lesson16, norm="batch norm", scale=scale))
        for mine, its in zip(plain, normed, strict=True):
            assert torch.equal(mine.weight, its.weight)
        assert len(plain) == 4
        assert not torch.equal(plain[1].weight, plain[2].weight)


def test_the_start_is_hes_times_the_scale_and_the_output_layer_starts_as_ever(lesson16):
    wide = linears(built(lesson16, norm="no norm", width=400, scale=3.0))
    assert wide[1].weight.std().item() == pytest.approx(3 * (2 / 400) ** 0.5, rel=0.02)
    assert not wide[1].bias.any()
    assert wide[-1].weight.std().item() == pytest.approx((1 / 1200) ** 0.5, rel=0.05)
    default = linears(built(lesson16, norm="no norm", width=400, scale=0.0))
    assert default[1].weight.std().item() == pytest.approx((1 / 1200) ** 0.5, rel=0.02)


def test_the_norm_stands_before_each_activation_and_has_the_momentum_asked_for(lesson16):
    model = built(lesson16, norm="batch norm", depth=2, norm_momentum=0.3, activation=nn.Sigmoid)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Flatten"] + ["Linear", "BatchNorm1d", "Sigmoid"] * 2 + ["Linear"]
    assert model[2].momentum == 0.3
    assert not [layer for layer in built(lesson16, norm="no norm") if isinstance(layer, nn.BatchNorm1d)]


@pytest.mark.parametrize("depth", [2, 5, 20])
def test_a_skip_net_has_the_depth_asked_for_and_starts_as_one_layer(lesson16, depth):
    torch.manual_seed(0)
    model = lesson16.SkipNet(TASK, depth)
    assert len(linears(model)) == depth + 1
    with torch.no_grad():
        for layer in model.hidden:
            layer.bias.zero_()
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model(x), model.last(model.first(x.flatten(1)).relu()))


def test_every_technique_has_as_many_layers_and_its_own_start(lesson16):
    asked = {}

    def study(recipe, **factors):
        asked.update(factors)
        raise StopIteration

    with pytest.raises(StopIteration):
        lesson16.depth(SimpleNamespace(study=study))
    assert list(asked["technique"]) == ["no norm", "batch norm", "He start", "skips"]
    for name, technique in asked["technique"].items():
        recipe = lesson16.deep(technique, 5, 0.5)
        assert recipe.optimizer.keywords["lr"] == pytest.approx(0.1)
        torch.manual_seed(0)
        model = recipe.model(TASK)
        assert len(linears(model)) == 6
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]
        assert len(norms) == (5 if name == "batch norm" else 0)
        deviation = linears(model)[2].weight.std().item()
        wanted = {"He start": (2 / 64) ** 0.5, "skips": 0}.get(name, (1 / 192) ** 0.5)
        assert deviation == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("place", "kinds"),
    [
        ("no norm", ["Conv2d", "ReLU"]),
        ("before", ["Conv2d", "BatchNorm2d", "ReLU"]),
        ("before, no bias", ["Conv2d", "BatchNorm2d", "ReLU"]),
        ("after", ["Conv2d", "ReLU", "BatchNorm2d"]),
    ],
)
def test_the_place_of_the_norm(lesson16, place, kinds):
    for task in (TASK, Task((3, 28, 28), 4)):
        model = lesson16.conv_net(task, place)
        assert [type(layer).__name__ for layer in model][: len(kinds)] == kinds
        assert model(torch.randn(5, *task.shape)).shape == (5, task.classes)
        assert (model[0].bias is None) == (place == "before, no bias")


def test_a_bias_before_the_norm_gets_no_gradient_one_after_the_relu_does(lesson16):
    split = make_split(load("digits"), 0, 100)
    share = {}
    for place in ("no norm", "before", "after"):
        torch.manual_seed(0)
        model = lesson16.conv_net(TASK, place)
        nn.functional.cross_entropy(model(split.train.x), split.train.y).backward()
        share[place] = (model[0].bias.grad.norm() / model[0].weight.grad.norm()).item()
    assert share["before"] < 1e-5 < 0.01 < min(share["no norm"], share["after"])


def state_of(model, step=1):
    return State(model, make_split(load("digits"), 0, 100), epochs=2, step=step)


def test_arrival_is_noted_and_ends_training(lesson16):
    split = make_split(load("digits"), 0, 100)
    nothing = built(lesson16, norm="no norm", scale=0.0)
    state = state_of(nothing.train(), step=7)
    assert lesson16.has_arrived(state) is False
    assert math.isnan(state.notes["steps"][1])
    assert nothing.training

    class Right(nn.Module):
        """Knows the labels of the validation images, of the first `wrong` of them wrongly."""

        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong

        def forward(self, x):
            y = split.validation.y.clone()
            y[: self.wrong] = (y[: self.wrong] + 1) % 10
            return nn.functional.one_hot(y, 10).float()

    few = int(0.15 * len(split.validation.y))
    for wrong, arrived in ((few, True), (few + 2, False)):
        state = state_of(Right(wrong), step=7)
        assert lesson16.has_arrived(state) is arrived
    state = state_of(Right(0), step=9)
    lesson16.has_arrived(state)
    assert state.notes["steps"][1] == 9


def test_the_race_looks_after_every_step(lesson16):
    """One batch holds all images, so that an epoch is a step, whatever the data set."""
    recipe = lesson16.race(lesson16.mlp, "batch norm", 0.5)
    ((arrays, notes),) = fit(recipe, [0, 1])
    assert arrays["seconds"][2]["alone"] == ""
    steps = [note["steps"][1] for note in notes]
    last = [epoch[~torch.tensor(curve).isnan()].max() for epoch, curve in each_curve(arrays)]
    assert steps == [int(each) for each in last]
    assert max(steps) < 40
    assert linears(recipe.model(TASK))[0].out_features == 100


def each_curve(arrays):
    epochs = torch.as_tensor(arrays["epoch"][1])
    return [(epochs, curve) for curve in arrays["validation_accuracy_curve"][1]]


def trained(lesson16):
    kept = {}
    recipe = lesson16.network("batch norm", 0.1)
    fit(recipe, [1], inspect=lambda model, split: kept.update(model=deepcopy(model), split=split) or {})
    return kept["model"], kept["split"]


def test_what_a_forgotten_eval_costs_depends_on_the_batch(lesson16):
    model, split = trained(lesson16)
    before = deepcopy(model.state_dict())
    notes = lesson16.forgotten_eval(model, split)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (_, batches), (_, sizes) = notes["batches"], notes["size"]
    table = {
        name: dict(zip(sizes, row.tolist(), strict=True))
        for name, row in zip(batches, notes["forgotten"][1], strict=True)
    }
    x, y = split.test
    with torch.no_grad():
        whole = 100 * (deepcopy(model).train()(x).argmax(1) == y).float().mean().item()
    assert [table[name][400] for name in batches] == pytest.approx([whole] * 3)
    assert table["sorted by class"][10] < 25 < 60 < table["random"][10] < table["each class in turn"][10]


def test_batches_with_each_class_in_turn_hold_each_once(lesson16):
    """Read off what arrives at the model: in batches of ten, ten different classes, but for the last few."""
    split = make_split(load("digits"), 0, 100)
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(*split.test, strict=True)}
    seen = []

    class Reads(nn.Module):
        def forward(self, x):
            seen.append([labels[image.numpy().tobytes()] for image in x])
            return torch.zeros(len(x), 10)

    lesson16.forgotten_eval(Reads(), split)
    tens = [batch for batch in seen if len(batch) == 10]
    random, turns, by_class = tens[:40], tens[40:80], tens[80:]
    assert sum(len(set(batch)) == 10 for batch in turns) > 30
    assert sum(len(set(batch)) == 10 for batch in random) < 5
    assert sum(len(set(batch)) == 1 for batch in by_class) >= 30
    for batches in (random, turns, by_class):
        assert sorted(label for batch in batches for label in batch) == sorted(split.test.y.tolist())


def test_an_experiment_survives_a_test_set_that_its_sizes_do_not_divide(lesson16):
    """A last batch of one image is no vector batch that has a variance: it is left to the one before."""
    model, split = trained(lesson16)
    odd = Split(split.train, split.validation, type(split.test)(split.test.x[:41], split.test.y[:41]))
    notes = lesson16.forgotten_eval(model, odd)
    assert torch.isfinite(torch.as_tensor(notes["forgotten"][1])).all()
