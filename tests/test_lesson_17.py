import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from conftest import ROOT, load_lesson, load_script
from torch import nn

from common.data import Batch, Task, load, make_split
from common.training import fit

TASK = Task((1, 8, 8), 10)
SHAPE = (5, 8, 4, 3)
THEIRS = {
    "batch norm": nn.BatchNorm2d(8),
    "layer norm": nn.LayerNorm(SHAPE[1:]),
    "instance norm": nn.InstanceNorm2d(8),
    "group norm": nn.GroupNorm(4, 8),
    "RMS norm": nn.RMSNorm(SHAPE[1:], eps=1e-5),
}


@pytest.fixture
def lesson():
    return load_lesson("17_batch_normalization_detailed")


@pytest.fixture
def padding():
    return load_script("further/padding_and_batch_statistics.py")


@pytest.fixture
def cost():
    return load_script("further/cost_of_norms.py")


@pytest.mark.parametrize("name", THEIRS)
def test_each_norm_is_torchs_in_output_and_gradient(lesson, name):
    x = 3 * torch.randn(SHAPE, dtype=torch.float64) + 1
    weights = torch.randn(SHAPE, dtype=torch.float64)
    seen = []
    for norm in (lesson.FROM_SCRATCH[name], THEIRS[name].double().train()):
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (out * weights).sum().backward()
        seen.append((out, inputs.grad))
    for mine, its in zip(*seen, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", THEIRS)
def test_each_norm_passes_gradcheck(lesson, name):
    x = torch.randn(3, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lesson.FROM_SCRATCH[name], x)


def test_the_two_ends_of_group_norm_are_layer_norm_and_instance_norm(lesson):
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(lesson.group_norm(x, 1), lesson.FROM_SCRATCH["layer norm"](x))
    torch.testing.assert_close(lesson.group_norm(x, 8), lesson.FROM_SCRATCH["instance norm"](x))
    assert not torch.allclose(lesson.group_norm(x, 2), lesson.group_norm(x, 1), atol=1e-3)
    wide = torch.randn(4, 16, 4, 4)
    torch.testing.assert_close(nn.GroupNorm(1, 16)(wide), lesson.NORMS["layer norm"](16)(wide))
    torch.testing.assert_close(nn.GroupNorm(16, 16)(wide), lesson.NORMS["instance norm"](16)(wide))


def test_rms_norm_leaves_the_mean_and_layer_norm_does_not(lesson):
    x = torch.randn(SHAPE) + 2
    layer, root = lesson.FROM_SCRATCH["layer norm"](x), lesson.FROM_SCRATCH["RMS norm"](x)
    assert layer.mean((1, 2, 3)).abs().max() < 1e-5
    assert root.mean((1, 2, 3)).min() > 0.5
    torch.testing.assert_close(root.square().mean((1, 2, 3)), torch.ones(5), atol=1e-4, rtol=0)


def test_eps_keeps_a_constant_feature_finite(lesson):
    x = torch.randn(4, 2, 3, 3)
    x[:, 0] = 7.0
    assert not lesson.FROM_SCRATCH["batch norm"](x)[:, 0].any()
    assert lesson.normalise(x, (0, 2, 3), eps=0.0)[:, 0].isnan().all()


def test_the_picture_shows_what_is_normalised_together(lesson):
    expected = {name: np.zeros((4, 8), bool) for name in lesson.FROM_SCRATCH}
    expected["batch norm"][:, 0] = True
    expected["layer norm"][0] = expected["RMS norm"][0] = True
    expected["instance norm"][0, 0] = True
    expected["group norm"][0, :2] = True
    for name, norm in lesson.FROM_SCRATCH.items():
        assert ((lesson.touched(norm) > 0).numpy() == expected[name]).all(), name


def test_the_table_of_defaults_is_torchs(lesson):
    layers = {
        "batch": nn.BatchNorm2d(4),
        "layer": nn.LayerNorm(4),
        "instance": nn.InstanceNorm2d(4),
        "group": nn.GroupNorm(2, 4),
        "RMS": nn.RMSNorm(4),
    }
    lines = Path(lesson.__file__).read_text(encoding="utf-8").splitlines()
    for name, layer in layers.items():
        (row,) = [line for line in lines if line.startswith(f"# | {name} | ") and line.count("|") == 8]
        *_, affine, eps, running = (cell.strip() for cell in row.strip("# |").split("|"))
        assert affine == str(getattr(layer, "affine", getattr(layer, "elementwise_affine", None))), name
        assert (None if eps == "None" else float(eps)) == layer.eps, name
        assert running.split(", ")[0] == str(getattr(layer, "track_running_stats", "–")), name
        assert (float(running.split(", ")[1]) == layer.momentum) if name == "batch" else "," not in running


def test_the_loop_to_copy_learns_and_says_so(lesson, capsys):
    built = []

    def norm(channels):
        built.append(nn.GroupNorm(1, channels))
        return built[-1]

    losses = lesson.train("layer norm", norm)
    assert [layer.num_channels for layer in built] == [16, 16]
    assert all(layer.bias.detach().any() for layer in built)  # both learned
    (line,) = capsys.readouterr().out.splitlines()
    assert losses[-1] < losses[0] - 0.5
    assert line.split()[:2] == ["layer", "norm"]
    assert line.endswith(f"{losses[0]:.2f}, after ten epochs {losses[-1]:.2f}")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("norm", ["batch norm", "layer norm", "instance norm", "group norm", "no norm"])
def test_the_convolutional_network_takes_any_image(lesson, shape, norm):
    model = lesson.conv_net(Task(shape, 7), lesson.NORMS[norm])
    assert model(torch.randn(4, *shape)).shape == (4, 7)
    assert model[:-3](torch.randn(2, *shape)).shape == (2, 16, shape[1] // 2, shape[2] // 2)
    kinds = [type(layer).__name__ for layer in model]
    assert sum("Norm" in kind for kind in kinds) == (0 if norm == "no norm" else 2)


@pytest.mark.parametrize("norm", ["batch norm", "layer norm", "no norm"])
def test_the_network_of_vectors(lesson, norm):
    model = lesson.vector_net(Task((3, 5, 5), 7), lesson.VECTOR_NORMS[norm])
    assert model(torch.randn(4, 3, 5, 5)).shape == (4, 7)
    kinds = [type(layer).__name__ for layer in model]
    assert sum("Norm" in kind for kind in kinds) == (0 if norm == "no norm" else 2)


def test_each_knob_turns_what_its_name_says(lesson):
    """Names, places and settings: a norm behind both hidden layers, or only at the input."""
    expected = {
        "default": (2, True, 0.1, 1e-5),
        "affine False": (2, False, 0.1, 1e-5),
        "momentum 0.01": (2, True, 0.01, 1e-5),
        "momentum 0.5": (2, True, 0.5, 1e-5),
        "input, default": (1, True, 0.1, 1e-5),
        "input, eps 0.1": (1, True, 0.1, 0.1),
    }
    assert list(lesson.KNOBS) == list(expected)
    for name, (count, affine, momentum, eps) in expected.items():
        recipe = lesson.turned(lesson.KNOBS[name], 0.01)
        assert (recipe.batch_size, recipe.optimizer.keywords["lr"]) == (4, 0.02)
        layers = [type(layer).__name__ for layer in recipe.model(TASK)]
        norms = [layer for layer in recipe.model(TASK) if isinstance(layer, nn.BatchNorm1d)]
        assert [(each.affine, each.momentum, each.eps) for each in norms] == count * [(affine, momentum, eps)]
        assert (layers.index("BatchNorm1d") < layers.index("Linear")) == (count == 1)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 128])
def test_every_batch_size_learns_its_training_images(lesson, size):
    recipe = lesson.network(nn.LayerNorm, 0.0016, lesson.vector_net, size)
    assert (recipe.batch_size, recipe.examples) == (size, 128)
    assert recipe.optimizer.keywords["lr"] == pytest.approx(0.0016 * size**0.5)
    ((arrays, _),) = fit(recipe, [0, 1])
    assert arrays["train_accuracy"][1].min() >= 98


def test_the_changes_of_light(lesson, monkeypatch):
    seen = []
    monkeypatch.setattr(lesson, "accuracy_of", lambda model, x, y: seen.append(x) or 7.0)
    x = torch.randn(60, 1, 8, 8)
    split = SimpleNamespace(test=(x, None))
    found = lesson.under_changes(None, split)
    assert found["change"] == ("change", ["as it is", "brightness", "contrast"])
    assert found["accuracy"] == ("change", [7.0, 7.0, 7.0], {"unit": "%", "long_name": "test accuracy"})
    same, brighter, sharper = seen
    assert torch.equal(same, x)
    assert (brighter - x).flatten(1).std(1).max() < 1e-5
    assert (brighter - x).flatten(1).mean(1).unique().numel() == 60
    assert 1.5 < (brighter - x).max() <= 2
    assert -2 <= (brighter - x).min() < -1.5
    mean = x.mean((1, 2, 3), keepdim=True)
    factor = (sharper - mean) / (x - mean)
    assert factor.flatten(1).std(1).max() < 1e-2
    assert 0.24 < factor.min() < 0.32
    assert 3.2 < factor.max() < 4.1
    lesson.under_changes(None, split)
    assert torch.equal(seen[-1], sharper)


def test_instance_norm_takes_contrast_and_brightness_out(lesson):
    """Of a change that multiplies the image and adds a constant nothing is left, except at the borders and by eps."""
    x, norm = torch.randn(6, 3, 8, 8), lesson.FROM_SCRATCH["instance norm"]
    torch.testing.assert_close(norm(3 * x + 2), norm(x), atol=1e-3, rtol=1e-3)


def test_the_label_is_the_factor(lesson):
    x = torch.ones(500, 1, 2, 2)
    changed, label = lesson.multiplied(x)
    factors = torch.tensor([0.5, 1, 2, 4])
    assert set(label.tolist()) == set(range(4))
    torch.testing.assert_close(changed[:, 0, 0, 0], factors[label])

    class Reader(nn.Module):
        """Reads the factor off an image of ones."""

        def forward(self, images):
            return -100 * (images.mean((1, 2, 3))[:, None] - factors).abs()

    found = lesson.factor_accuracy(Reader(), SimpleNamespace(test=SimpleNamespace(x=x)))
    assert found["accuracy"][:2] == ((), 100)
    assert lesson.factor_loss(Reader(), x, None) < 1e-2
    assert lesson.factor_task(nn.BatchNorm2d).loss is lesson.factor_loss
    assert lesson.factor_task(nn.BatchNorm2d).optimizer.keywords["lr"] == pytest.approx(4 * 0.0064)


def test_the_rows_of_groups_lead_from_layer_norm_to_instance_norm(lesson):
    x = torch.randn(4, 16, 4, 4)
    for name in ("layer norm", "instance norm"):
        torch.testing.assert_close(nn.GroupNorm(lesson.GROUPS[name], 16)(x), lesson.NORMS[name](16)(x))
    assert list(lesson.GROUPS.values()) == [1, 2, 4, 8, 16]


def test_layer_norm_sees_a_factor_only_beside_a_bias(lesson):
    """As the lesson says: without the convolutions' biases a factor leaves the output as it is, but for eps."""
    x = torch.randn(6, 1, 8, 8)
    torch.manual_seed(0)
    for name, bias, hidden in (
        ("layer norm", True, False),
        ("layer norm", False, True),
        ("instance norm", True, True),
        ("batch norm", False, False),
        ("no norm", False, False),
    ):
        model = lesson.conv_net(TASK, lesson.NORMS[name])
        if not bias:
            nn.init.zeros_(model[0].bias)
        close = torch.allclose(model[:3](4 * x), model[:3](x), atol=1e-3)
        if name != "batch norm":  # which hides a factor that all images of the batch share
            assert close == hidden, (name, bias)
    one = torch.cat([4 * x[:3], x[3:]])
    model = lesson.conv_net(TASK, lesson.NORMS["batch norm"])
    assert not torch.allclose(model[:3](one), model[:3](x), atol=1e-1)


def test_accuracy_under_changes(lesson):
    split = make_split(load("digits"), 0, 100)
    model = lesson.conv_net(TASK, lesson.NORMS["batch norm"])
    model(split.train.x)
    found = lesson.under_changes(model, split)
    right = (model.eval()(split.test.x).argmax(1) == split.test.y).float().mean().item()
    assert found["accuracy"][1][0] == pytest.approx(100 * right)
    assert len(found["accuracy"][1]) == 3


@pytest.mark.parametrize("net", ["Recurrent", "Transformer"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.Identity])
def test_sequence_networks_train_as_one_stack(lesson, net, norm):
    model = getattr(lesson, net)(Task((3, 6, 5), 4), norm)
    assert model(torch.randn(7, 3, 6, 5)).shape == (7, 4)
    recipe = lesson.on_rows(getattr(lesson, net), norm, 0.006)
    results = fit(replace(recipe, epochs=1), [0, 1])
    assert len(results) == 1
    assert results[0][0]["seconds"][2]["alone"] == ""


def test_the_recurrent_network_is_torchs_where_there_is_no_norm(lesson):
    model = lesson.Recurrent(TASK, nn.Identity, width=16)
    theirs = nn.RNN(8, 16, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(model.input.weight)
        theirs.bias_ih_l0.copy_(model.input.bias)
        theirs.weight_hh_l0.copy_(model.hidden.weight)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(x), model.head(theirs(x[:, 0])[0][:, -1]))


def test_the_transformer_is_a_pre_norm_block_of_torchs(lesson):
    model = lesson.Transformer(TASK, nn.LayerNorm)
    block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    block.self_attn.load_state_dict(model.attention.state_dict())
    for theirs, ours in ((block.norm1, 0), (block.norm2, 1)):
        with torch.no_grad():
            model.norms[ours].weight.normal_()
        theirs.load_state_dict(model.norms[ours].state_dict())
    block.linear1.load_state_dict(model.mlp[0].state_dict())
    block.linear2.load_state_dict(model.mlp[2].state_dict())
    x = torch.randn(3, 1, 8, 8)
    tokens = model.embed(x[:, 0]) + model.place
    expected = model.head(model.norms[2](block(tokens)).mean(1))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_batch_norm_in_the_transformer_is_over_all_images_and_rows(lesson):
    model = lesson.Transformer(TASK, nn.BatchNorm1d)
    x = torch.randn(5, 1, 8, 8)
    model(x)
    tokens = (model.embed(x[:, 0]) + model.place).reshape(40, 32)
    torch.testing.assert_close(model.norms[0].running_mean, 0.1 * tokens.mean(0))


@pytest.mark.parametrize("masked", [True, False])
def test_batch_norm_of_sequences_without_padding_is_torchs(padding, masked):
    layer, theirs = padding.BatchNorm(3, masked), nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(6, 5, 3) * 2 + 1
        everything = torch.ones(6, 5, dtype=torch.bool)
        torch.testing.assert_close(layer(x, everything), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(layer.running_mean, theirs.running_mean)
    torch.testing.assert_close(layer.running_var, theirs.running_var)
    torch.testing.assert_close(layer.eval()(x, everything), theirs.eval()(x.transpose(1, 2)).transpose(1, 2))


def test_masked_batch_norm_looks_at_real_times_only(padding):
    x, real = torch.randn(6, 5, 3) + 2, torch.arange(5) < torch.tensor([[1], [5], [3], [2], [4], [1]])
    x[~real] = 9  # what a linear layer makes of padding need not be zero
    masked, plain, theirs = padding.BatchNorm(3, True), padding.BatchNorm(3, False), nn.BatchNorm1d(3)
    expected = theirs(x[real])
    torch.testing.assert_close(masked(x, real)[real], expected)
    torch.testing.assert_close(masked.running_mean, theirs.running_mean)
    torch.testing.assert_close(masked.running_var, theirs.running_var)
    assert not torch.allclose(plain(x, real)[real], expected, atol=0.1)
    more = torch.cat([x, torch.full((6, 4, 3), -7.0)], 1)
    longer = torch.cat([real, torch.zeros(6, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(padding.BatchNorm(3, True)(more, longer)[:, :5][real], expected)


def test_the_transformer_does_not_see_padding_if_batch_norm_is_masked(padding):
    """A cut image gives the same whatever the place vectors of its padding say."""
    x = padding.cut(torch.randn(4, 1, 8, 8), torch.tensor([3, 3, 3, 3]))
    for name, norm in padding.NORMS.items():
        torch.manual_seed(0)
        model = padding.Transformer(TASK, norm)
        before = model(x)
        with torch.no_grad():
            model.place[3:] = torch.randn(5, 32)
        assert torch.allclose(model(x), before, atol=1e-5) == (name != "batch norm")


def test_cut_and_its_loss(padding):
    x = torch.rand(300, 2, 8, 5) + 0.1
    lengths = torch.arange(300) % 7 + 2
    assert torch.equal(padding.cut(x, lengths).ne(0).all((1, 3)).sum(1), lengths)
    seen = []

    def model(images):
        seen.append(images.ne(0).any(3).any(1).sum(1))
        return torch.zeros(len(images), 10)

    loss = padding.cut_loss(model, x, torch.zeros(300, dtype=torch.long), mixed=True)
    assert loss.item() == pytest.approx(np.log(10))
    assert set(seen[0].tolist()) == set(range(2, 9))
    for _ in range(5):
        padding.cut_loss(model, x, torch.zeros(300, dtype=torch.long), mixed=False)
    assert all(len(each.unique()) == 1 for each in seen[1:])
    assert len({int(each[0]) for each in seen[1:]}) > 1


def test_accuracy_by_length_and_by_neighbours(padding):
    split = make_split(load("digits"), 0, 100)
    beside = {}
    for name in ("layer norm", "batch norm"):
        torch.manual_seed(0)
        model = padding.Transformer(TASK, padding.NORMS[name])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(15):
            optimizer.zero_grad()
            F.cross_entropy(model(split.train.x), split.train.y).backward()
            optimizer.step()
        found = padding.by_length(model, split)
        with torch.no_grad():
            right = (model.eval()(split.test.x).argmax(1) == split.test.y).float().mean().item()
        assert found["rows_kept"][1] == [2, 4, 6, 8]
        assert found["accuracy"][1][-1] == pytest.approx(100 * right)
        beside[name] = found["accuracy_beside"][1]
    assert beside["layer norm"][0] == beside["layer norm"][1]
    assert beside["batch norm"][0] != beside["batch norm"][1]


def test_networks_with_padding_train_as_one_stack(padding):
    for norm in padding.NORMS.values():
        recipe = replace(padding.network(norm, True, 0.01), epochs=20)
        ((arrays, _),) = fit(recipe, [0, 1])
        assert arrays["train_accuracy"][1].min() > 50


def test_times_are_medians_of_work_done_in_turn(cost):
    calls = []

    def slow():
        calls.append("slow")
        cost.time.sleep(0.002)

    lab = SimpleNamespace(options=SimpleNamespace(seeds=[3, 4], device="cpu"))
    times = cost.timed(lab, {"slow": slow, "fast": lambda: calls.append("fast")}, 5)
    assert calls[:4] == ["slow", "fast", "slow", "fast"]
    assert times.dims == ("norm", "seed")
    assert times.seed.values.tolist() == [3, 4]
    assert times.sel(norm="slow").min() >= 2
    assert times.sel(norm="fast").max() < 1
    assert cost.ratio(times, "fast").sel(norm="fast").values.tolist() == [1, 1]
    assert cost.ratio(times, "fast").sel(norm="slow").min() > 2

    def interrupted():
        calls.append("interrupted")
        cost.time.sleep(0.005 * (calls.count("interrupted") % 5 == 1))

    assert cost.timed(lab, {"interrupted": interrupted}, 5).max() < 2


def test_both_passes_of_every_layer_are_timed(cost):
    lab = SimpleNamespace(options=SimpleNamespace(seeds=[0], device="cpu"))
    norms = cost.layers("cpu")
    forward, backward = cost.passes(lab, norms, torch.randn(2, 64, 16, 16))
    assert list(forward.norm.values) == list(backward.norm.values) == list(norms)
    assert float(forward.min()) > 0
    assert float(backward.min()) > 0


def test_a_step_trains(cost):
    x, y = torch.randn(8, 1, 16, 16), torch.arange(8) % 10
    step = cost.Step(cost.conv_net(nn.Identity), x, y)
    before = step.model[0].weight.clone()
    step()
    assert not torch.equal(step.model[0].weight, before)


def test_the_norms_of_the_experiments_are_what_their_names_say(lesson):
    batch = lesson.NORMS["batch norm"](16)
    assert (type(batch), batch.momentum, batch.affine, batch.track_running_stats) == (nn.BatchNorm2d, 0.1, True, True)
    instance = lesson.NORMS["instance norm"](16)
    assert (type(instance), instance.affine, instance.track_running_stats) == (nn.InstanceNorm2d, True, False)
    for name, groups in {"layer norm": 1, "group norm": 4}.items():
        norm = lesson.NORMS[name](16)
        assert (type(norm), norm.num_groups, norm.affine) == (nn.GroupNorm, groups, True)
    assert isinstance(lesson.NORMS["no norm"](16), nn.Identity)
    kinds = [type(norm(64)) for norm in lesson.VECTOR_NORMS.values()]
    assert dict(zip(lesson.VECTOR_NORMS, kinds, strict=True)) == {
        "no norm": nn.Identity,
        "batch norm": nn.BatchNorm1d,
        "layer norm": nn.LayerNorm,
    }


class Probe(nn.Module):
    """A norm that does nothing but note the mode, the number of images and the least number that it sees."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append((self.training, len(x), x.min().item()))
        return x


def test_the_loop_trains_in_train_mode_and_measures_new_images_in_eval_mode(lesson):
    seen = []
    losses = lesson.train("no norm", lambda channels: Probe(seen))
    assert [each[:2] for each in seen] == 10 * (20 * [(True, 20)] + 2 * [(False, 397)])
    assert max(least for _, _, least in seen) < 0  # before the ReLU
    assert losses == lesson.train("no norm", nn.Identity)
    known = make_split(load("digits"), seed=0, examples=200).validation
    assert len(known.y) == 397


def test_the_layers_of_both_networks_in_order(lesson):
    conv = lesson.conv_net(TASK, nn.BatchNorm2d)
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [type(layer).__name__ for layer in conv] == [*block, *block, "AdaptiveMaxPool2d", "Flatten", "Linear"]
    vector = lesson.vector_net(TASK, nn.LayerNorm)
    block = ["Linear", "LayerNorm", "ReLU"]
    assert [type(layer).__name__ for layer in vector] == ["Flatten", *block, *block, "Linear"]
    for layer in (*conv, *vector):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert layer.bias is not None


def test_the_recipes_are_those_of_the_text(lesson):
    for size, steps in {2: 512, 8: 192, 32: 64, 128: 40}.items():
        recipe = lesson.network(nn.BatchNorm2d, 0.01, size=size)
        assert recipe.model.func is lesson.conv_net
        assert recipe.model.keywords == {"norm": nn.BatchNorm2d}
        assert recipe.epochs * 128 // size == steps
    assert lesson.factor_task(nn.BatchNorm2d).epochs == 32
    assert lesson.turned(lesson.KNOBS["default"], 0.03).optimizer.keywords["lr"] == pytest.approx(0.06)
    for rate in (0.001, 0.04):
        recipe = lesson.on_rows(lesson.Recurrent, nn.RMSNorm, rate)
        assert (recipe.epochs, recipe.batch_size, recipe.examples) == (40, 25, 100)
        assert recipe.optimizer.keywords["lr"] == rate
        assert recipe.model.keywords == {"norm": nn.RMSNorm}


def test_a_step_of_the_recurrent_network_norms_the_sum_before_tanh(lesson):
    model = lesson.Recurrent(TASK, nn.LayerNorm, width=16)
    nn.init.normal_(model.norm.weight)
    x = torch.randn(5, 1, 8, 8)
    h = torch.zeros(5, 16)
    for row in range(8):
        h = model.norm(model.input(x[:, 0, row]) + model.hidden(h)).tanh()
    torch.testing.assert_close(model(x), model.head(h))


def test_every_batch_norm_of_the_transformer_is_over_all_images_and_rows(lesson):
    model = lesson.Transformer(TASK, nn.BatchNorm1d)
    model(torch.randn(5, 1, 8, 8))
    assert [each.num_batches_tracked.item() for each in model.norms] == [1, 1, 1]
    assert [each.running_mean.shape for each in model.norms] == 3 * [(32,)]


def test_brightness_and_contrast_are_drawn_apart(lesson, monkeypatch):
    seen = []
    monkeypatch.setattr(lesson, "accuracy_of", lambda model, x, y: seen.append(x) or 7.0)
    x = torch.randn(200, 1, 8, 8)
    lesson.under_changes(None, SimpleNamespace(test=(x, None)))
    brightness = (seen[1] - x).mean((1, 2, 3))
    contrast = (seen[2].flatten(1).std(1) / x.flatten(1).std(1)).log()
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.5


def test_the_factors_of_the_test_images_are_always_the_same(lesson):
    model = lesson.conv_net(TASK, nn.Identity)
    split = make_split(load("digits"), 0, 100)
    assert lesson.factor_accuracy(model, split) == lesson.factor_accuracy(model, split)


def test_masked_batch_norm_has_torchs_gain_and_shift(padding):
    layer, theirs = padding.BatchNorm(3, True), nn.BatchNorm1d(3)
    for ours, its in zip(layer.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(ours)
        its.data.copy_(ours.data)
    x = torch.randn(6, 5, 3)
    everything = torch.ones(6, 5, dtype=torch.bool)
    torch.testing.assert_close(layer(x, everything), theirs(x.transpose(1, 2)).transpose(1, 2))


def test_the_padded_transformer_averages_over_real_rows(padding):
    """Where all real rows are alike, it does not matter how many there are."""
    model = padding.Transformer(TASK, padding.NORMS["layer norm"])
    nn.init.zeros_(model.place)
    x = torch.ones(1, 1, 8, 8)
    outs = [model(padding.cut(x, torch.tensor([rows]))) for rows in (3, 8)]
    torch.testing.assert_close(*outs)


def test_the_padded_recipe_is_that_of_the_text(padding):
    for mixed, rate in ((True, 0.01), (False, 0.002)):
        recipe = padding.network(padding.NORMS["batch norm"], mixed, rate)
        assert recipe.loss.func is padding.cut_loss
        assert recipe.loss.keywords == {"mixed": mixed}
        assert recipe.optimizer.keywords["lr"] == rate


def test_lengths_of_the_test_images(padding, monkeypatch):
    seen = []

    def note(model, x, y, count):
        seen.append((x.ne(0).any(3).any(1).sum(1), count))
        return 0.0

    monkeypatch.setattr(padding, "accuracy_of", note)
    images = torch.rand(400, 1, 8, 8) + 0.1
    part = Batch(images, torch.zeros(400, dtype=torch.long))
    padding.by_length(nn.Identity(), SimpleNamespace(test=part))
    assert [rows.unique().tolist() for rows, _ in seen] == [[2], [4], [6], [8], [8], [2, 8]]
    assert [count for _, count in seen] == [400, 400, 400, 400, 200, 200]
    assert seen[-1][0].tolist() == 200 * [8] + 200 * [2]


def test_times_are_medians_and_leave_the_warm_up_out(cost):
    calls = []

    def interrupted():
        calls.append(len(calls))
        cost.time.sleep(0.05 * (len(calls) <= 5 or len(calls) % 5 == 1))  # the warm-up, and one round of five

    lab = SimpleNamespace(options=SimpleNamespace(seeds=[3, 4], device="cpu"))
    assert cost.timed(lab, {"interrupted": interrupted}, 5).max() < 5


def test_what_is_timed_is_each_norms_own_pass(cost, monkeypatch):
    works = []
    monkeypatch.setattr(cost, "timed", lambda lab, each, rounds: works.append(each) or len(works))
    norms = cost.layers("cpu")
    x = torch.randn(2, 64, 16, 16)
    assert cost.passes(None, norms, x) == (1, 2)
    for name, norm in norms.items():
        torch.testing.assert_close(works[0][name](), norm(x))
        gradients = works[1][name]()
        assert [each.shape for each in gradients] == [x.shape, *(each.shape for each in norm.parameters())]
        inputs = x.clone().requires_grad_()
        norm(inputs).sum().backward()
        torch.testing.assert_close(gradients[0], inputs.grad)


def test_the_layers_that_are_timed(cost):
    norms = cost.layers("cpu")
    counts = {name: sum(each.numel() for each in norm.parameters()) for name, norm in norms.items()}
    assert counts == {
        "batch norm": 128,
        "layer norm": 32_768,
        "layer norm, one group": 128,
        "instance norm": 128,
        "group norm": 128,
        "RMS norm": 16_384,
    }
    assert [norms[name].num_groups for name in ("layer norm, one group", "group norm")] == [1, 4]


def test_the_network_that_is_timed_has_three_norms_and_each_step_is_torchs(cost):
    model = cost.conv_net(lambda: nn.GroupNorm(4, 64))
    assert sum(isinstance(layer, nn.GroupNorm) for layer in model) == 3
    x, y = torch.randn(8, 1, 16, 16), torch.arange(8) % 10
    twin = deepcopy(model)
    step = cost.Step(model.eval(), x, y)
    assert model.training
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    for _ in range(2):
        step()
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gpu_is_waited_for_before_and_after(cost, monkeypatch):
    calls = []
    monkeypatch.setattr(cost.torch.accelerator, "synchronize", lambda: calls.append("wait"))
    cost.seconds(lambda: calls.append("work"), "cuda")
    assert calls == ["wait", "work", "wait"]
    cost.seconds(lambda: calls.append("work"), "cpu")
    assert calls[3:] == ["work"]


def study(part, experiment, which=0):
    """A study of the reference run, as an xarray Dataset."""
    record = json.loads((ROOT / "results" / part / "results.json").read_text(encoding="utf-8"))
    stored = record["experiments"][experiment]["studies"][which]
    return xr.Dataset.from_dict({key: stored[key] for key in ("coords", "attrs", "dims", "data_vars")})


def judged(part):
    record = json.loads((ROOT / "results" / part / "results.json").read_text(encoding="utf-8"))
    return {claim["id"]: claim["estimate"]["mean"] for claim in record["claims"]}


def test_the_lessons_claims_are_the_differences_that_they_name():
    """Computed once more from the stored accuracies, by other means."""
    found = judged("17_batch_normalization_detailed")

    def mean(experiment, metric, which=0, **place):
        values = study("17_batch_normalization_detailed", experiment, which)[metric]
        return float(values.astype(float).sel(place).mean())

    def accuracy(experiment, **place):
        return mean(experiment, "test_accuracy", **place)

    small, large = (accuracy("batch_size", norm="batch norm", size=size) for size in (2, 128))
    learned = study("17_batch_normalization_detailed", "vectors").train_accuracy.sel(norm="batch norm", size=2) >= 90
    style = {
        change: mean("style", "accuracy", norm="instance norm", change=change) for change in ("as it is", "contrast")
    }
    expected = {
        "batch_size-1": small - large,
        "batch_size-2": accuracy("batch_size", norm="group norm", size=2) - small,
        "vectors-1": 100 * float(learned.mean()),
        "style-1": style["contrast"] - style["as it is"],
        "style-2": mean("style", "accuracy", norm="4 groups", change="as it is")
        - mean("style", "accuracy", norm="layer norm", change="as it is"),
        "style-3": mean("style", "accuracy", 1, norm="instance norm") - 25,
        "style-4": mean("style", "accuracy", 1, norm="layer norm") - 25,
        "knobs-1": accuracy("knobs", knob="default") - accuracy("knobs", knob="affine False"),
        "knobs-2": accuracy("knobs", knob="momentum 0.01") - accuracy("knobs", knob="default"),
        "knobs-3": accuracy("knobs", knob="momentum 0.5") - accuracy("knobs", knob="default"),
        "knobs-4": mean("knobs", "test_loss", knob="input, default")
        - mean("knobs", "test_loss", knob="input, eps 0.1"),
    }
    for number, size in ((2, 2), (3, 4)):
        layer, batch = (accuracy("vectors", norm=f"{name} norm", size=size) for name in ("layer", "batch"))
        expected[f"vectors-{number}"] = layer - batch
    rows = study("17_batch_normalization_detailed", "sequences").test_accuracy.astype(float).mean("seed")
    for number, net in ((1, "RNN"), (2, "transformer")):
        expected[f"sequences-{number}"] = float(
            rows.sel(norm="layer norm", net=net) - rows.sel(norm="no norm", net=net)
        )
    transformer = rows.sel(net="transformer")
    expected["sequences-3"] = float(transformer.sel(norm="layer norm") - transformer.sel(norm="batch norm"))
    expected["sequences-4"] = float(rows.sel(norm="RMS norm").mean() - rows.sel(norm="layer norm").mean())
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_claims_on_padding_are_the_differences_that_they_name():
    runs = study("padding_and_batch_statistics", "padding").astype(float)
    accuracy = runs.accuracy.mean(["rows_kept", "seed"])
    beside = runs.accuracy_beside.sel(mixed="equal").mean("seed")
    short = beside.sel(neighbours="two rows") - beside.sel(neighbours="whole")
    gain = accuracy - accuracy.sel(norm="batch norm")
    expected = {
        "padding-1": float(gain.sel(mixed="mixed", norm="masked batch norm")),
        "padding-2": float(gain.sel(mixed="mixed", norm="layer norm")),
        "padding-3": float(gain.sel(mixed="equal", norm="layer norm")),
        "padding-4": float(short.sel(norm="batch norm")),
        "padding-5": float(short.sel(norm="masked batch norm") - short.sel(norm="batch norm")),
    }
    assert judged("padding_and_batch_statistics") == pytest.approx(expected, abs=1e-3)
