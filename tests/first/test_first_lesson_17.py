from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.first.data import Task, load, make_split
from common.first.statistics import FAILS, HOLDS, UNCLEAR
from common.first.training import evaluate

TASK = Task((1, 8, 8), 10)
SHAPE = (5, 6, 4, 3)
PAIRS = {
    "batch": ("batch_norm", nn.BatchNorm2d(6)),
    "layer": ("layer_norm", nn.LayerNorm(SHAPE[1:])),
    "instance": ("instance_norm", nn.InstanceNorm2d(6)),
    "group": ("group_norm", nn.GroupNorm(3, 6)),
    "RMS": ("rms_norm", nn.RMSNorm(SHAPE[1:], eps=1e-5)),
}


def ours(lesson, name):
    function = getattr(lesson, PAIRS[name][0])
    return partial(function, groups=3) if name == "group" else function


@pytest.mark.parametrize("name", PAIRS)
def test_each_norm_is_torchs_in_output_and_gradient(lesson17, name):
    x = 3 * torch.randn(SHAPE, dtype=torch.float64) + 1
    weights = torch.randn(SHAPE, dtype=torch.float64)
    seen = []
    for norm in (ours(lesson17, name), PAIRS[name][1].double().train()):
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (out * weights).sum().backward()
        seen.append((out, inputs.grad))
    for mine, its in zip(*seen, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", PAIRS)
def test_each_norm_passes_gradcheck(lesson17, name):
    x = torch.randn(3, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours(lesson17, name), x)


def test_the_two_ends_of_group_norm_are_layer_norm_and_instance_norm(lesson17):
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(lesson17.group_norm(x, 1), lesson17.layer_norm(x))
    torch.testing.assert_close(lesson17.group_norm(x, 6), lesson17.instance_norm(x))
    assert not torch.allclose(lesson17.group_norm(x, 2), lesson17.layer_norm(x), atol=1e-3)
    wide = torch.randn(4, 16, 4, 4)
    first, last = (nn.GroupNorm(n, 16) for n in (lesson17.GROUPS[0], lesson17.GROUPS[-1]))
    torch.testing.assert_close(first(wide), lesson17.NORMS["layer"](16)(wide))
    torch.testing.assert_close(last(wide), lesson17.NORMS["instance"](16)(wide))


def test_rms_norm_leaves_the_mean_and_the_others_do_not(lesson17):
    x = torch.randn(SHAPE) + 2
    assert lesson17.layer_norm(x).mean((1, 2, 3)).abs().max() < 1e-5
    assert lesson17.rms_norm(x).mean((1, 2, 3)).min() > 0.5
    torch.testing.assert_close(lesson17.rms_norm(x).square().mean((1, 2, 3)), torch.ones(5), atol=1e-4, rtol=0)


def test_eps_keeps_a_constant_feature_finite(lesson17):
    x = torch.randn(4, 2, 3, 3)
    x[:, 0] = 7.0
    assert not lesson17.batch_norm(x)[:, 0].any()
    assert lesson17.normalise(x, (0, 2, 3), eps=0.0)[:, 0].isnan().all()


def test_the_picture_shows_what_is_normalised_together(lesson17):
    share = {name: lesson17.touched(norm) > 0 for name, (norm, _) in lesson17.OURS.items()}
    n, c = lesson17.IMAGES[:2]
    expected = {name: np.zeros((n, c), bool) for name in share}
    expected["batch"][:, 0] = True
    expected["layer"][0] = expected["RMS"][0] = True
    expected["instance"][0, 0] = True
    expected["group (4)"][0, : c // 4] = True
    for name in share:
        assert (share[name] == expected[name]).all(), name


def test_the_tables_of_the_mechanism(lesson17):
    for name in lesson17.OURS:
        assert all(float(cell) < 1e-5 for cell in lesson17.against_torch(name)[1:])
    assert lesson17.defaults("x", nn.BatchNorm2d(16)) == ["x", "0.1", "1e-05", "True", "True", "32"]
    assert lesson17.defaults("x", nn.InstanceNorm2d(16))[3:] == ["False", "False", "0"]
    assert lesson17.defaults("x", nn.LayerNorm((16, 8, 8))) == ["x", "–", "1e-05", "True", "–", "2048"]
    assert lesson17.defaults("x", nn.GroupNorm(4, 16, eps=0.5))[2] == "0.5"


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("norm", ["batch", "layer", "instance", "group", "none"])
def test_the_convolutional_network_takes_any_image(lesson17, shape, norm):
    model = lesson17.conv_net(Task(shape, 7), lesson17.NORMS[norm])
    assert model(torch.randn(4, *shape)).shape == (4, 7)
    kinds = [type(layer).__name__ for layer in model]
    assert model[:-3](torch.randn(2, *shape)).shape == (2, 16, shape[1] // 2, shape[2] // 2)
    assert sum("Norm" in kind for kind in kinds) == (0 if norm == "none" else 2)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_the_network_of_vectors(lesson17, norm):
    model = lesson17.vector_net(Task((3, 5, 5), 7), lesson17.VECTOR_NORMS[norm])
    assert model(torch.randn(4, 3, 5, 5)).shape == (4, 7)
    assert sum("Norm" in type(layer).__name__ for layer in model) == (0 if norm == "none" else 2)


def test_every_batch_size_gets_as_many_steps(lesson17):
    for size in lesson17.SIZES:
        recipe = lesson17.at_size(lesson17.BASELINE, size)
        assert recipe.batch_size == size
        assert recipe.epochs * recipe.examples / size == lesson17.STEPS
    assert lesson17.SIZES == (2, 4, 8, 16, 32, 64)


def test_the_changes_of_light(lesson17):
    x = torch.randn(60, 1, 8, 8)
    changed = lesson17.changes(x)
    assert torch.equal(changed["as it is"], x)
    brighter = changed["brightness"] - x
    assert brighter.flatten(1).std(1).max() < 1e-5
    assert brighter.flatten(1).mean(1).unique().numel() == 60
    assert brighter.abs().max() <= 2
    centred = changed["contrast"] - x.mean((1, 2, 3), keepdim=True)
    factor = centred / (x - x.mean((1, 2, 3), keepdim=True))
    assert factor.flatten(1).std(1).max() < 1e-2
    assert 0.24 < factor.min() < 0.4
    assert 2.5 < factor.max() < 4.1
    ramp = changed["background"] - x
    assert ramp.mean((1, 2, 3)).abs().max() < 1e-5
    assert ramp.abs().amax((1, 2, 3)).min() >= 1.4
    assert torch.equal(lesson17.changes(x)["contrast"], changed["contrast"])


def test_instance_norm_takes_contrast_and_brightness_out(lesson17):
    """Of a change that multiplies the image and adds a constant nothing is left, except at the borders and by eps."""
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(lesson17.instance_norm(3 * x + 2), lesson17.instance_norm(x), atol=1e-3, rtol=1e-3)


def test_the_label_is_the_contrast(lesson17):
    x = torch.ones(500, 1, 2, 2)
    changed, label = lesson17.multiplied(x)
    assert set(label.tolist()) == set(range(10))
    factors = torch.tensor([lesson17.WEAKEST * lesson17.STRONGER**i for i in range(lesson17.FACTORS)])
    torch.testing.assert_close(changed[:, 0, 0, 0], factors[label])

    class Reader(nn.Module):
        """Reads the factor off an image of ones."""

        def forward(self, images):
            return -100 * (images.mean((1, 2, 3))[:, None] - factors).abs()

    split = SimpleNamespace(test=SimpleNamespace(x=x))
    assert lesson17.contrast_accuracy(Reader(), split) == {"contrast": 1.0}
    assert lesson17.contrast_loss(Reader(), x, None) < 1e-2


@pytest.mark.parametrize(("classes", "outputs"), [(3, 10), (10, 10), (12, 12)])
def test_the_contrast_has_a_logit_for_each_factor_and_each_class(lesson17, classes, outputs):
    net = lesson17.contrast_net(Task((1, 8, 8), classes), nn.BatchNorm2d)
    assert net(torch.randn(4, 1, 8, 8)).shape == (4, outputs)
    assert isinstance(net[1], nn.BatchNorm2d)


def test_accuracy_under_changes(lesson17):
    split = make_split(load("digits"), 0, 100)
    model = lesson17.conv_net(TASK, lesson17.NORMS["group"])
    accuracies = lesson17.under_changes(model, split)["changed"]
    assert accuracies[0] == evaluate(model, split.test)[1]
    assert len(accuracies) == 4


@pytest.mark.parametrize("masked", [True, False])
def test_sequence_batch_norm_without_padding_is_torchs(lesson17, masked):
    layer, theirs = lesson17.SequenceBatchNorm(3, masked), nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(6, 5, 3) * 2 + 1
        everything = torch.ones(6, 5, dtype=torch.bool)
        torch.testing.assert_close(layer(x, everything), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(layer.running_mean, theirs.running_mean)
    torch.testing.assert_close(layer.running_var, theirs.running_var)
    torch.testing.assert_close(layer.eval()(x, everything), theirs.eval()(x.transpose(1, 2)).transpose(1, 2))


def test_masked_batch_norm_looks_at_real_times_only(lesson17):
    x, mask = torch.randn(6, 5, 3) + 2, torch.arange(5) < torch.randint(1, 6, (6, 1))
    x[~mask] = 9  # what a linear layer makes of padding need not be zero
    masked, blind, theirs = lesson17.SequenceBatchNorm(3, True), lesson17.SequenceBatchNorm(3), nn.BatchNorm1d(3)
    expected = theirs(x[mask])
    torch.testing.assert_close(masked(x, mask)[mask], expected)
    torch.testing.assert_close(masked.running_mean, theirs.running_mean)
    torch.testing.assert_close(masked.running_var, theirs.running_var)
    assert not torch.allclose(blind(x, mask)[mask], expected, atol=0.1)
    more = torch.cat([x, torch.full((6, 4, 3), -7.0)], 1)
    longer = torch.cat([mask, torch.zeros(6, 4, dtype=torch.bool)], 1)
    again = lesson17.SequenceBatchNorm(3, True)
    torch.testing.assert_close(again(more, longer)[:, :5][mask], expected)


@pytest.mark.parametrize("net", ["Recurrent", "Transformer"])
@pytest.mark.parametrize("norm", ["layer", "RMS", "batch", "none"])
def test_sequence_networks(lesson17, net, norm):
    for task in (TASK, Task((3, 6, 5), 4)):
        model = getattr(lesson17, net)(task, lesson17.SEQUENCE_NORMS[norm])
        assert model(torch.randn(7, *task.shape)).shape == (7, task.classes)


def test_the_recurrent_network_is_torchs_where_there_is_no_norm(lesson17):
    model = lesson17.Recurrent(TASK, lesson17.SEQUENCE_NORMS["none"], width=16)
    theirs = nn.RNN(8, 16, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(model.input.weight)
        theirs.bias_ih_l0.copy_(model.input.bias)
        theirs.weight_hh_l0.copy_(model.hidden.weight)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(x), model.head(theirs(x[:, 0])[0][:, -1]))


def test_the_attention_is_torchs_and_leaves_padding_out(lesson17):
    model = lesson17.Transformer(TASK, lesson17.SEQUENCE_NORMS["layer"])
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(model.qkv.weight)
        theirs.in_proj_bias.copy_(model.qkv.bias)
        theirs.out_proj.load_state_dict(model.out.state_dict())
    x, mask = torch.randn(3, 8, 32), torch.arange(8) < torch.tensor([[8], [5], [2]])
    expected = theirs(x, x, x, key_padding_mask=~mask)[0]
    torch.testing.assert_close(model.attend(x, mask)[mask], expected[mask], atol=1e-5, rtol=1e-4)


def test_the_transformer_does_not_see_padding(lesson17):
    """A cut image gives the same whatever the place vectors of its padding say."""
    x = lesson17.cut(torch.randn(4, 1, 8, 8), torch.tensor([3, 3, 3, 3]))
    for name, same in (("layer", True), ("batch", False)):
        torch.manual_seed(0)
        model = lesson17.Transformer(TASK, lesson17.SEQUENCE_NORMS[name])
        before = model(x)
        with torch.no_grad():
            model.place[3:] = torch.randn(5, 32)
        assert torch.allclose(model(x), before, atol=1e-5) == same


def test_cut_and_its_loss(lesson17):
    x = torch.rand(300, 2, 8, 5) + 0.1
    lengths = torch.arange(300) % 7 + 2
    rows = lesson17.cut(x, lengths).ne(0).all((1, 3)).sum(1)
    assert torch.equal(rows, lengths)
    seen = []

    def model(images):
        seen.append(images.ne(0).any(3).any(1).sum(1))
        return torch.zeros(len(images), 10)

    loss = lesson17.cut_loss(model, x, torch.zeros(300, dtype=torch.long), mixed=True)
    assert loss.item() == pytest.approx(np.log(10))
    assert set(seen[0].tolist()) == set(range(lesson17.SHORTEST, 9))
    for _ in range(5):
        lesson17.cut_loss(model, x, torch.zeros(300, dtype=torch.long), mixed=False)
    assert all(len(each.unique()) == 1 for each in seen[1:])
    assert len({int(each[0]) for each in seen[1:]}) > 1


def test_accuracy_by_length_and_by_neighbours(lesson17):
    split = make_split(load("digits"), 0, 100)
    torch.manual_seed(0)
    notes = {}
    for name in ("layer", "batch"):
        model = lesson17.Transformer(TASK, lesson17.SEQUENCE_NORMS[name])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(15):
            optimizer.zero_grad()
            F.cross_entropy(model(split.train.x), split.train.y).backward()
            optimizer.step()
        accuracy = evaluate(model, split.test)[1]
        notes[name] = lesson17.by_length(model, split)
        assert notes[name]["by length"][-1] == pytest.approx(accuracy)
        assert len(notes[name]["by length"]) == 4
    same, other = notes["layer"]["neighbours"]
    assert same == other
    assert notes["batch"]["neighbours"][0] != notes["batch"]["neighbours"][1]


def test_a_blank_pixel_with_ink_is_blown_up_by_a_small_eps(lesson17):
    split = make_split(load("digits"), 0, 50)
    largest = {}
    for eps in (1e-5, 0.1):
        model = lesson17.InputNorm(TASK, eps)
        for _ in range(40):
            model.train()(split.train.x)
        notes = lesson17.largest_input(model, split)
        largest[eps] = notes["largest, test"]
        assert notes["largest, train"] < 20
    assert largest[1e-5] > 100 > 20 > largest[0.1]
    assert lesson17.largest_input(lesson17.vector_net(TASK), split) == {}


def test_milliseconds_measures_both_passes(lesson17):
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    forward, backward = lesson17.milliseconds(nn.BatchNorm2d(16), x, 3)
    assert forward > 0
    assert backward > 0
    assert x.grad is not None


def test_every_advice_has_its_claims(lesson17):
    """Each beginning in ADVICES is that of a claim of the reference run, and the table counts verdicts."""
    from docs.readme import load_results

    claims = load_results()["17_batch_normalization_detailed"]["claims"]
    for words in lesson17.ADVICES.values():
        assert any(claim["statement"].startswith(words) for claim in claims), words
    tables, findings = [], []
    begin = list(lesson17.ADVICES.values())
    record = [
        {"statement": f"{begin[0]}: a", "verdict": HOLDS},
        {"statement": f"{begin[0]}: b", "verdict": UNCLEAR},
        {"statement": f"{begin[1]}: c", "verdict": FAILS},
        {"statement": f"{begin[2]}: d", "verdict": HOLDS},
    ]
    lab = SimpleNamespace(
        record={"claims": record}, table=tables.append, finding=findings.append, figure=lambda name, figure: None
    )
    lesson17.which_one(lab)
    assert [row[1:] for row in tables[0].rows[:4]] == [["1", "0", "1"], ["0", "1", "0"], ["1", "0", "0"], ["0"] * 3]
    advices = list(lesson17.ADVICES)
    assert findings == [f"Every claim holds: {advices[2]}.", f"No claim holds, all are refuted: {advices[1]}."]
