"""further/first_aid.py: what it finds in sick and healthy networks, that it leaves no trace, and what it survives."""

import math
import random
import threading
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from common.data import Split, Task, load, make_split
from common.training import fit

TASK = Task((1, 8, 8), 10)


@pytest.fixture
def aid():
    return load_script("further/first_aid.py")


def batch(count: int = 100):
    x, y = make_split(load("digits"), 0, 400).train
    return x[:count], y[:count]


def he(layer: nn.Module, gain: float = 1.0) -> None:
    nn.init.kaiming_normal_(layer.weight)
    layer.weight.data *= gain


START = {
    "healthy": he,
    "vanishing": partial(he, gain=0.4),
    "exploding": lambda layer: nn.init.normal_(layer.weight),
    "symmetric": lambda layer: nn.init.constant_(layer.weight, 0.02),
    "dead units": he,
}


def patient(fault: str, depth: int = 20, width: int = 64, activation: type = nn.ReLU, convolutions: bool = False):
    """A network with a fault that was put in, and the layers in which it was."""
    new, inputs = (partial(nn.Conv2d, kernel_size=3, padding=1), 1) if convolutions else (nn.Linear, 64)
    layers = []
    for _ in range(depth):
        layers.append(new(inputs, width))
        inputs = width
    layers.append(nn.Linear(width * (64 if convolutions else 1), 10))
    for layer in layers:
        START[fault](layer)
        nn.init.zeros_(layer.bias)
    if fault == "dead units":
        nn.init.constant_(layers[depth // 2].bias, -10.0)
    elif fault == "healthy":
        layers[-1].weight.data *= 0.1
    flow = [module for layer in layers[:-1] for module in (layer, activation())]
    return nn.Sequential(*([] if convolutions else [nn.Flatten()]), *flow, nn.Flatten(), layers[-1])


BODIES = {
    "of the thresholds": {},
    "shallower": {"depth": 10},
    "deeper": {"depth": 40},
    "narrow": {"width": 16},
    "GELU": {"activation": nn.GELU},
    "convolutions": {"convolutions": True, "width": 8, "depth": 12},
}


@pytest.mark.parametrize("fault", list(START))
@pytest.mark.parametrize("body", list(BODIES))
def test_the_fault_that_was_put_in_is_named_first(aid, body, fault):
    for seed in range(2):
        torch.manual_seed(seed)
        report = aid.first_aid(patient(fault, **BODIES[body]), *batch())
        assert report.cause == fault
        assert (list(report.findings) == ["healthy"]) == (fault == "healthy")


def test_the_layer_is_named(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=4)
    nn.init.constant_(model[3].bias[:60], -100.0)  # all but 4 of 64 units of the second layer
    report = aid.first_aid(model, *batch())
    assert report.cause == "dead units"
    assert report.findings["dead units"].startswith("Layer 5 gets only zeros.")  # the layer that gets zeros
    assert 60 / 64 <= report.layers[2].dead < 1
    model = patient("healthy", depth=4)
    for layer in (model[1], model[3]):
        nn.init.constant_(layer.weight, 0.1)
    report = aid.first_aid(model, *batch())
    assert report.findings["symmetric"].startswith("Layer 1: equal units.")
    assert report.layers[0].distinct == 1 / 64
    assert report.layers[1].distinct == 1  # their gradients differ: they will part


def test_other_faults(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=3)
    model[-1].weight.data *= 200
    assert list(aid.first_aid(model, *batch()).findings) == ["overconfident"]
    for activation in (nn.Tanh, nn.Sigmoid):
        full = patient("healthy", depth=2, activation=activation)
        for layer in (full[1], full[3]):
            layer.weight.data *= 1000
        assert aid.first_aid(full, *batch()).cause == "saturated"
    assert aid.first_aid(patient("exploding", depth=60), *batch()).cause == "exploding"  # overflows
    zeros = patient("healthy", depth=3)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    assert aid.first_aid(zeros, *batch()).cause == "symmetric"
    x, y = batch()
    broken = x.clone()
    broken[3, 0, 2, 2] = math.nan
    model = patient("healthy", depth=3)
    for inputs, labels in ((broken, y), (x[:1].expand(100, -1, -1, -1), y), (x, torch.zeros_like(y))):
        assert aid.first_aid(model, inputs, labels).cause == "bad batch"


def test_starts_that_are_zero_on_purpose_are_healthy(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=4)
    nn.init.zeros_(model[-1].weight)
    assert aid.first_aid(model, *batch()).cause == "healthy"
    x, y = batch()
    binary = (x > 0).float()
    assert aid.first_aid(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), binary, y).cause == "healthy"


def test_the_step_is_that_of_the_optimiser_and_both_stay_as_they_are(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=2)
    x, y = batch()
    adam = torch.optim.Adam(model.parameters(), lr=0.003)
    F.cross_entropy(model(x), y).backward()  # gradients, and a state, that a loop has left
    adam.step()
    weights, state, gradients = deepcopy((model.state_dict(), adam.state_dict(), [p.grad for p in model.parameters()]))
    for rate, cause in ((1e-3, "healthy"), (1e-9, "rate"), (1.0, "rate")):
        adam.param_groups[0]["lr"] = rate
        assert aid.first_aid(model, x, y, adam).cause == cause
        make = partial(torch.optim.Adam, lr=rate)
        assert aid.first_aid(model, x, y, make).cause == cause
    adam.param_groups[0]["lr"] = 0.003
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert str(adam.state_dict()) == str(state)
    assert all(torch.equal(p.grad, each) for p, each in zip(model.parameters(), gradients, strict=True))
    told = aid.first_aid(model, x, y, partial(torch.optim.SGD, lr=50.0)).findings["rate"]
    vector = torch.nn.utils.parameters_to_vector
    before = vector(model.parameters()).detach()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    moved = 50 * vector([p.grad for p in model.parameters()]).norm() / before.norm()
    assert f"by {moved:.0e} of" in told


def test_the_numbers_are_what_they_are_called(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=2)
    x, y = batch()
    report = aid.first_aid(model, x, y)
    z1 = model[1](x.flatten(1))
    z2 = model[3](z1.relu())
    logits = model[-1](z2.relu())
    loss = F.cross_entropy(logits, y)
    gradients = torch.autograd.grad(loss, [z1, z2, logits])
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert report.guessing == pytest.approx(math.log(10))
    assert [layer.name for layer in report.layers] == ["1", "3", "6"]
    inputs = [x.flatten(1), z1.relu(), z2.relu()]
    for layer, h, gradient in zip(report.layers, inputs, gradients, strict=True):
        assert layer.difference == pytest.approx(h.var(0, correction=0).mean().sqrt().item(), rel=1e-4)
        inner = h is not inputs[0]
        assert layer.dead == pytest.approx(inner * (h == 0).all(0).float().mean().item())
        low, high = ((each < 0.0125 * (h.max() - h.min())).float().mean() for each in (h - h.min(), h.max() - h))
        assert layer.flat == pytest.approx((low + high).item() if inner and min(low, high) > 0.05 else 0, abs=1e-3)
        assert layer.gradient == pytest.approx(gradient.norm(dim=1).mean().item(), rel=1e-4)
        assert layer.distinct == 1


def test_sparse_activations_are_not_saturated(aid):
    """More than nine tenths of the ReLU's outputs are zero, which is one end of their range; none is at the other."""
    torch.manual_seed(0)
    model = patient("healthy", depth=2)
    nn.init.constant_(model[1].bias, -2.2)
    x, y = batch()
    hidden = model[2](model[1](model[0](x)))
    assert 0.9 < (hidden == 0).float().mean() < 0.99
    assert aid.first_aid(model, x, y).layers[1].flat == 0
    assert "saturated" not in aid.first_aid(model, x, y).findings


def test_inputs_that_nobody_standardised_are_named(aid):
    torch.manual_seed(0)
    x, y = batch()
    assert aid.first_aid(patient("healthy"), 100 * x, y).cause == "input scale"
    assert aid.first_aid(patient("healthy"), 10 * x, y).cause != "input scale"


class ByRow(nn.Module):
    """A recurrent network whose first state is zero, as it should be, and whose first row says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.state, self.out = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        nn.init.orthogonal_(self.state.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(len(x), 32)
        for row in x.squeeze(1).unbind(1):
            h = torch.tanh(self.rows(row) + self.state(h))
        return self.out(h)


class TwoBranches(nn.Module):
    """Two layers that see the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.out(torch.cat([self.left(x), self.right(x)], 1).relu())


def test_inputs_that_no_weight_decides_are_no_faults(aid):
    torch.manual_seed(0)
    x, y = batch()
    blank = x.clone()
    blank[:, :, 0] = 0.0
    assert aid.first_aid(ByRow(), blank, y).cause == "healthy"
    one_hot = F.one_hot(torch.randint(64, (len(x),)), 64).float()
    for images in ((x > 0).float(), one_hot):
        assert aid.first_aid(TwoBranches(), images, y).cause == "healthy"


class Mixed(nn.Module):
    """What a learner may bring: a norm, in-place activations, dropout, frozen, shared and unused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), nn.ReLU(inplace=True))
        self.first.requires_grad_(False)
        self.frozen = nn.Conv2d(8, 16, 3).requires_grad_(False)
        self.shared, self.unused, self.out = nn.Linear(256, 256), nn.Linear(3, 3), nn.Linear(256, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.frozen(input=self.first(x)), inplace=True).flatten(1)
        x = self.shared(x).relu_()
        x = self.shared(x).relu_()
        self.unused(x[:, :3])
        return self.out(self.dropout(x))


def test_a_mixed_network_is_examined_and_keeps_no_trace(aid):
    torch.manual_seed(0)
    model = Mixed().eval()
    model.first[1].register_forward_hook(lambda *_: None)
    before, state = deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.no_grad():
        report = aid.first_aid(model, *batch())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [layer.name for layer in report.layers] == ["first.0.0", "frozen", "shared", "shared", "out"]
    assert report.cause == "healthy"
    torch.manual_seed(0)
    expected = F.cross_entropy(deepcopy(model).train()(batch()[0]), batch()[1])
    torch.manual_seed(0)
    assert aid.first_aid(model, *batch()).loss == pytest.approx(expected.item(), rel=1e-5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.into, self.encoder, self.out = nn.Linear(8, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder(self.into(x[:, 0])).mean(1))


def test_networks_with_attention_are_healthy(aid):
    torch.manual_seed(0)
    report = aid.first_aid(Attention().eval(), *batch())
    assert report.cause == "healthy"
    assert len(report.layers) == 6  # the projections of attention are called as functions: they are not seen


def test_other_shapes(aid):
    torch.manual_seed(0)
    x, y = batch()
    rows = nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 32), nn.SiLU(), nn.Flatten(), nn.Linear(256, 10))
    assert aid.first_aid(rows, x, y).cause == "healthy"
    assert aid.first_aid(deepcopy(rows).double(), x.double(), y).cause == "healthy"
    pixels = aid.first_aid(nn.Conv2d(1, 10, 1), x, y[:, None, None].expand(-1, 8, 8))
    assert [layer.name for layer in pixels.layers] == [""]


class Returns(nn.Module):
    """Ten logits an image, and what a function makes of them."""

    def __init__(self, make=lambda logits: logits) -> None:
        super().__init__()
        self.flat, self.out, self.make = nn.Flatten(), nn.Linear(64, 10), make

    def forward(self, x: torch.Tensor):
        return self.make(self.out(self.flat(x)))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(64, 10), nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.layer(x.flatten(1))
        return x.flatten(1) * self.scale


class Locked(nn.Flatten):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def fail(*_):
    raise ZeroDivisionError("two\nlines")


def test_what_cannot_be_examined_is_said_in_one_line(aid):
    """Each wrong input: one line that says what was found and what is wanted."""
    x, y = batch()
    flat, good = nn.Flatten(), Returns()
    one = nn.Sequential(flat, nn.Linear(64, 1))
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(good.parameters(), 0.1), 1)
    for arguments, words in (
        ((nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 10)), x, y), ["(100, 8, 10)", "(100, 10)", "(100,)"]),
        ((nn.Sequential(flat, nn.Linear(64, 5)), x, y), ["labels from 0 to 9", "wanted 0 to 4"]),
        ((one, x, torch.zeros_like(y)), ["(100, 1)", "two classes"]),
        ((nn.Sequential(one, nn.Flatten(0)), x, y), ["(100,)", "logits (N, classes, …)"]),
        ((nn.Sequential(flat, nn.LSTM(64, 10)), x, y), ["returns a tuple", "logits (N, classes, …)"]),
        ((Returns(lambda logits: {"logits": logits}), x, y), ["returns a dict", "logits (N, classes, …)"]),
        ((Returns(lambda logits: None), x, y), ["returns a NoneType"]),
        ((Returns(lambda logits: logits[0]), x, y), ["(10,)"]),
        ((Returns(fail), x, y), ["the network fails on x (100, 1, 8, 8)", "ZeroDivisionError: two lines"]),
        ((Returns(torch.Tensor.detach), x, y), ["no linear or convolutional layer"]),
        ((good, x, y.float()), ["torch.float32", "torch.int64"]),
        ((good, x, y.int()), ["torch.int32", "torch.int64"]),
        ((good, x, y > 4), ["torch.bool", "torch.int64"]),
        ((good, x, y - 1), ["labels from -1 to 8", "wanted 0 to 9"]),
        ((good, x, y + 1), ["labels from 1 to 10", "wanted 0 to 9"]),
        ((good, x, torch.full_like(y, -100)), ["labels from -100", "wanted 0 to 9"]),
        ((good, x, F.one_hot(y)), ["(100, 10)", "want labels (100,)"]),
        ((good, x, y[:, None]), ["(100, 1)", "want labels (100,)"]),
        ((good, x, y[:50]), ["100 inputs", "50 labels"]),
        ((good, x[:0], y[:0]), ["0 inputs"]),
        ((good, x.numpy(), y), ["x: found ndarray (100, 1, 8, 8)", "tensor"]),
        ((good, x, y.tolist()), ["y: found list", "tensor"]),
        ((good, x, y[0]), ["y: found Tensor ()", "(N, …)"]),
        ((good, x.double(), y), ["torch.float64", "dtype"]),
        ((deepcopy(good).to("meta"), x, y), ["meta"]),
        ((good, x[..., :7], y), ["(100, 1, 8, 7)", "shapes"]),
        ((F.relu, x, y), ["found function", "nn.Module"]),
        ((good, x, y, "adam"), ["optimizer: found str"]),
        ((good, x, y, scheduler), ["optimizer: found StepLR"]),
        ((good, x, y, lambda _: None), ["the optimiser fails"]),
        ((good, x, y, fail), ["the optimiser fails: ZeroDivisionError: two lines"]),
        ((nn.Sequential(Locked(), nn.Linear(64, 10)), x, y), ["cannot be copied", "lock"]),
        (
            (nn.Sequential(flat, nn.Linear(64, 32), nn.BatchNorm1d(32), good.out), x[:1], y[:1]),
            ["(1, 1, 8, 8)", "more than 1"],
        ),
        ((Unused(), x, y), ["the loss depends on no linear or convolutional layer"]),
        ((nn.Sequential(flat, nn.LayerNorm(64)), x, y), ["no linear or convolutional layer"]),
        ((flat, x, y), ["no linear or convolutional layer"]),
        ((Bare(), x, y), ["no linear or convolutional layer", "not seen: Bare"]),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]{20,300}$") as caught:
            aid.first_aid(*arguments)
        for each in words:
            assert each in str(caught.value), each


def named(report) -> list[str]:
    return list(report.findings)


def test_an_illness_of_the_batch_or_of_the_whole_network_is_named(aid):
    torch.manual_seed(0)
    x, y = batch()
    model = patient("healthy", depth=3)
    assert named(aid.first_aid(model, x[:1], y[:1])) == ["bad batch"]
    assert "one input" in aid.first_aid(model, x[:1], y[:1]).findings["bad batch"]
    assert named(aid.first_aid(model, x[:1].expand(100, -1, -1, -1), y)) == ["bad batch"]
    for where in ("1.bias", "3.weight"):
        broken = deepcopy(model)
        broken.get_parameter(where).data[0] = math.nan
        report = aid.first_aid(broken, x, y)
        assert named(report) == ["bad weights"]
        assert where in report.findings["bad weights"]
    all_nan = deepcopy(model)
    all_nan[3].weight.data.fill_(math.nan)
    assert named(aid.first_aid(all_nan, x, y)) == ["bad weights"]
    frozen = deepcopy(model).requires_grad_(False)
    assert named(aid.first_aid(frozen, x, y)) == ["frozen"]
    assert named(aid.first_aid(frozen, x, y, partial(torch.optim.SGD, lr=0.1))) == ["frozen"]
    frozen[-1].requires_grad_(True)  # a head is trained
    assert named(aid.first_aid(frozen, x, y, partial(torch.optim.SGD, lr=0.003))) == ["healthy"]
    for last in (nn.Softmax(1), nn.Sigmoid()):
        assert named(aid.first_aid(nn.Sequential(model, last), x, y)) == ["probabilities"]
    assert named(aid.first_aid(nn.Sequential(model, nn.LogSoftmax(1)), x, y)) == ["healthy"]


class Root(nn.Module):
    """Changes nothing; its gradient is 0 × ∞."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * (0 * x).sqrt() + x


def test_a_gradient_that_is_not_finite_is_named(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=3)
    model.insert(2, Root())
    report = aid.first_aid(model, *batch())
    assert named(report) == ["bad gradients"]
    assert "1.weight" in report.findings["bad gradients"]


def test_an_optimiser_that_trains_nothing_is_named(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=3)
    x, y = batch()
    assert named(aid.first_aid(model, x, y, torch.optim.Adam(model.parameters(), lr=0.0))) == ["rate"]
    other = torch.optim.Adam(deepcopy(model).parameters())
    assert named(aid.first_aid(model, x, y, other)) == ["optimiser"]
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert "rate" not in named(aid.first_aid(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1)))


def test_an_optimiser_may_want_a_closure_or_have_a_scheduler_around_its_step(aid):
    torch.manual_seed(0)
    model = patient("healthy", depth=2)
    x, y = batch()
    for optimizer in (torch.optim.LBFGS(model.parameters(), lr=1e-3), partial(torch.optim.LBFGS, lr=1e-3)):
        assert named(aid.first_aid(model, x, y, optimizer)) == ["healthy"]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.optim.lr_scheduler.StepLR(sgd, 1)  # its wrapper steps the optimiser that it was made for
    F.cross_entropy(model(x), y).backward()
    before = deepcopy(model.state_dict())
    assert named(aid.first_aid(model, x, y, sgd)) == ["healthy"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_convolutions_of_a_wide_normal_are_exploding_with_the_layer_named(aid):
    for depth in (3, 4, 6):
        torch.manual_seed(0)
        model = patient("healthy", depth=depth, width=32, convolutions=True)
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.5)
        model[-1].weight.data *= 10
        report = aid.first_aid(model, *batch(50))
        assert report.cause == "exploding"
        assert "6 × He's" in report.findings["exploding"]


class Checkpointed(nn.Module):
    """Two segments that are checkpointed, with dropout in them and a layer that is called twice."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.out, self.reentrant = nn.Linear(64, 64), nn.Linear(64, 10), reentrant
        again = nn.Linear(64, 64)
        self.a = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), again, nn.Dropout(0.2))
        self.b = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), again, nn.ReLU(), nn.Linear(64, 64), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).relu()
        for part in (self.a, self.b):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return self.out(x)


def test_a_checkpointed_network_has_the_report_of_a_plain_one(aid):
    reports = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        reports.append(str(aid.first_aid(Checkpointed(reentrant), *batch())))
    assert [line.split()[0] for line in reports[0].splitlines()[2:9]] == [
        "first",
        "a.0",
        "a.2",
        "b.0",
        "a.2",
        "b.4",
        "out",
    ]
    assert reports[1:] == reports[:1] * 2


class Adapted(nn.Linear):
    """A layer with two others inside, the second of which starts at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


class Around(nn.Linear):
    """Has no weights of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.inner = nn.Linear(inputs, outputs)
        del self.weight, self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple:
        return super().forward(x), None


class First(nn.Module):
    def forward(self, pair: tuple) -> torch.Tensor:
        return pair[0]


class Single(nn.Module):
    """Calls a layer on one image after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layer(each) for each in x])


def test_layers_of_unusual_kinds_survive(aid):
    torch.manual_seed(0)
    x, y = batch()
    for hidden, names, unseen in (
        ([Adapted(64, 64)], ["1", "3"], ["1.down", "1.up"]),
        ([Around(64, 64)], ["1.inner", "3"], []),
        ([Pair(64, 64), First()], ["1", "4"], []),
        ([nn.LazyLinear(64)], ["1", "3"], []),
        ([Single()], ["3"], ["1.layer"]),
    ):
        model = nn.Sequential(nn.Flatten(), *hidden, nn.ReLU(inplace=True), nn.Linear(64, 10))
        report = aid.first_aid(model, x, y)
        assert [layer.name for layer in report.layers] == names
        assert report.unseen == unseen
        assert report.cause == ("not seen" if names == ["3"] else "healthy")
    uninitialised = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    aid.first_aid(uninitialised, x, y, torch.optim.SGD)
    assert isinstance(uninitialised[1], nn.LazyLinear)


class Keeps(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x)
        self.all = [*getattr(self, "all", []), {"output": self.kept}]
        return self.kept


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_kept_activations_and_weights_that_are_computed_survive(aid):
    x, y = batch()
    for wrap in (
        lambda layer: Keeps(64, 64),
        utils.weight_norm,
        utils.spectral_norm,
        utils.parametrizations.weight_norm,
        utils.parametrizations.spectral_norm,
        utils.parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.random_structured(layer, "weight", 0.3, dim=0),
    ):
        torch.manual_seed(0)
        layer = wrap(nn.Linear(64, 64))
        model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(64, 10))
        model(x)
        before, kept = deepcopy(model.state_dict()), getattr(layer, "kept", None)
        report = aid.first_aid(model, x, y, torch.optim.SGD(model.parameters(), lr=0.01))
        assert (report.cause, len(report.layers), report.unseen) == ("healthy", 2, [])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert getattr(layer, "kept", None) is kept
        assert len(getattr(layer, "all", [0])) == 1
        torch.manual_seed(0)
        expected = F.cross_entropy(model(x), y).item()
        assert report.loss == pytest.approx(expected, rel=0.02)  # spectral norm estimates anew


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_compiled_networks_survive_called_or_not(aid):
    x, y = batch()
    compiled = partial(torch.compile, backend="eager")
    for called in (False, True):
        for how in ("whole", "layer", "in place"):
            torch.manual_seed(0)
            plain = patient("healthy", depth=2)
            expected, model = str(aid.first_aid(plain, x, y)), plain
            if how == "whole":
                model = compiled(plain)
            elif how == "layer":
                plain[3] = compiled(plain[3])
            else:
                plain.compile(backend="eager")
            if called:
                model(x)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            assert str(aid.first_aid(model, x, y, optimizer)) == expected
            assert hasattr(model, "_orig_mod") == (how == "whole")
            assert hasattr(plain[3], "_orig_mod") == (how == "layer")
            assert model(x).shape == (100, 10)


class Unruly(nn.Module):
    """Draws from every generator, changes its input, counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x.mul_(1 + random.random() / 100).add_(np.random.rand() / 100).add_(torch.rand(()) / 100)
        return self.out(self.norm(self.layer(x.flatten(1))).relu_())


def test_all_that_is_the_readers_stays(aid):
    torch.manual_seed(0)
    x, y = batch()
    model, seen = Unruly(), []
    model.eval()
    model.out.requires_grad_(False)
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append("forward"))
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
        module.register_full_backward_hook(lambda *_: seen.append("backward"))
    for parameter in model.layer.parameters():
        parameter.register_hook(lambda _: seen.append("gradient"))
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    model.stream = torch.Generator()

    def state() -> list:
        draws = torch.get_rng_state(), model.stream.get_state(), np.random.get_state()[1]
        tensors = [*draws, x, y, *model.state_dict().values(), *optimizer.state_dict()["state"]]
        gradients = [(each.requires_grad, str(each.grad)) for each in model.parameters()]
        hooks = [len(each._forward_hooks) for each in model.modules()]
        modes = model.calls, model.training, torch.is_grad_enabled(), str(optimizer.state_dict())
        return [[each.tolist() for each in tensors], gradients, hooks, random.getstate(), modes]

    before = state()
    with torch.inference_mode():
        assert named(aid.first_aid(model, x, y, optimizer)) == ["healthy"]
    assert seen == []
    assert state() == before
    with pytest.raises(ValueError, match="labels"):
        aid.first_aid(model, x, y + 5, optimizer)
    assert state() == before


class Recurrent(nn.Module):
    def __init__(self, kind: type, scale: float) -> None:
        super().__init__()
        self.rnn, self.out = kind(8, 32, batch_first=True), nn.Linear(32, 10)
        for parameter in self.rnn.parameters():
            parameter.data *= scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x[:, 0])[0][:, -1])


def test_what_was_not_looked_at_is_told(aid):
    torch.manual_seed(0)
    x, y = batch()
    for kind in (nn.LSTM, nn.GRU):
        for scale in (1, 0.001):
            report = aid.first_aid(Recurrent(kind, scale), x, y)
            assert (report.cause, report.unseen) == ("not seen", ["rnn"])
            assert str(report).splitlines()[-1] == "not seen: rnn"
    up = nn.Sequential(nn.ConvTranspose2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10))
    report = aid.first_aid(up, x, y)
    assert (report.cause, report.unseen) == ("healthy", ["0"])  # 72 of 8,072 weights
    report = aid.first_aid(Attention(), x, y)
    assert report.unseen[:2] == ["encoder.layers.0.self_attn", "encoder.layers.0.self_attn.out_proj"]
    words = nn.Sequential(nn.Embedding(1000, 32), nn.Flatten(), nn.Linear(64, 10))
    report = aid.first_aid(words, torch.randint(1000, (100, 2)), y)
    assert (report.cause, report.unseen) == ("healthy", [])


def vgg11(models):
    """Its convolutions as it starts them, and a small head."""
    body = models.vgg.make_layers([64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"])
    for layer in body:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(2048, 10))


def torchvision_networks():
    models = pytest.importorskip("torchvision.models")
    names = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "densenet121", "convnext_tiny"]
    networks = {name: partial(getattr(models, name), weights=None, num_classes=10) for name in names}
    networks["googlenet"] = partial(models.googlenet, weights=None, num_classes=10, init_weights=False)
    networks["vgg11"] = partial(vgg11, models)
    vit = {"num_layers": 3, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128, "num_classes": 10}
    networks["vit"] = partial(models.VisionTransformer, image_size=64, patch_size=16, **vit)
    return networks


NETWORKS = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "densenet121", "convnext_tiny"]


@pytest.mark.parametrize("name", [*NETWORKS, "googlenet", "vgg11", "vit"])
def test_torchvisions_networks_are_healthy(aid, name):
    torch.manual_seed(0)
    model = torchvision_networks()[name]()
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
    report = aid.first_aid(model, x, y)
    assert report.cause == "healthy"
    assert len(report.layers) > 7
    assert bool(report.unseen) == (name in ("convnext_tiny", "vit"))  # layer scales; attention, embeddings


def test_a_report_is_narrow_and_short(aid):
    torch.manual_seed(0)
    for depth, rows in ((19, 20), (20, 20), (60, 20)):
        report = aid.first_aid(patient("vanishing", depth=depth), *batch(), partial(torch.optim.SGD, lr=1e-9))
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) == 2 + rows + 2
        assert lines[0] == "loss 2.3; guessing costs 2.3"
        assert ("…" in lines) == (depth > 19)
        assert [line.split()[0] for line in (lines[2], lines[21])] == ["1", str(2 * depth + 2)]
        assert [line.partition(":")[0] for line in lines[-2:]] == ["vanishing", "rate"]
    long = nn.Sequential()
    long.add_module("a_name_that_is_longer_than_any_table_is_wide", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert max(map(len, str(aid.first_aid(long, *batch())).splitlines())) <= 80
    layer = aid.SimpleNamespace(name="a.b", difference=0.25, dead=0.125, flat=0.5, gradient=3e-4, distinct=1.0)
    line = str(aid.Report("rate", {"rate": "words"}, 2.5, 2.302585, [layer])).splitlines()[2]
    assert line.split() == ["a.b", "2e-01", "12%", "50%", "3e-04", "100%"]
    long_line = f"Layer {'a' * 100} has words to the very end."
    told = str(aid.Report("rate", {"rate": long_line}, 2.5, 2.302585, [layer], [f"name{i}" for i in range(30)]))
    assert max(map(len, told.splitlines())) <= 80
    assert "to the very end.\nnot seen: name0, " in told
    heads = str(aid.Report("rate", {"rate": "words"}, 2.5, 2.302585, [layer])).splitlines()[1]
    assert heads.split() == ["layer", "difference", "dead", "flat", "gradient", "distinct"]
    assert len(heads) == len(line)


def test_each_threshold(aid):
    """Each rule alone, just within its threshold and just beyond."""
    plain = {"difference": 1.0, "dead": 0.1, "flat": 0.5, "gradient": 1.0, "distinct": 1.0, "gain": 1.0}
    x, y = batch()

    def causes(where: int = 0, loss: float = 1.0, step: float = 1e-3, share: float = 0, **changes) -> list[str]:
        layers = [aid.SimpleNamespace(name=str(i), **plain) for i in range(3)]
        vars(layers[where]).update(changes)
        seen = aid.Seen(layers, [], share, [], [], False, False, 2 * loss, 2.0, step)
        return list(aid.diagnose(seen, x, y))

    for wrong, right, cause in (
        ({"where": -1, "difference": 1.1e3}, {"where": -1, "difference": 0.9e3}, "exploding"),
        ({"where": 0, "gradient": 1.1e3}, {"where": -1, "gradient": 1e9}, "exploding"),
        ({"loss": math.nan}, {"loss": 1.9}, "exploding"),
        ({"where": -1, "difference": 0.9e-3}, {"where": -1, "difference": 1.1e-3}, "vanishing"),
        ({"where": 0, "gradient": 0.9e-3}, {"where": 0, "gradient": 1.1e-3}, "vanishing"),
        ({"where": 1, "distinct": 0.49}, {"where": 1, "distinct": 0.51}, "symmetric"),
        ({"where": 0, "distinct": 0.49}, {"where": -1, "distinct": 0.1}, "symmetric"),
        ({"where": 1, "dead": 0.91, "flat": 0.95}, {"where": 1, "dead": 0.89}, "dead units"),
        ({"where": 2, "flat": 0.91}, {"where": 2, "flat": 0.89}, "saturated"),
        ({"where": 0, "difference": 31.0}, {"where": 0, "difference": 29.0}, "input scale"),
        ({"loss": 2.1}, {"loss": 1.9}, "overconfident"),
        ({"step": 0.11}, {"step": math.nan}, "rate"),
        ({"step": 0.9e-5}, {"step": 1.1e-5}, "rate"),
        ({"share": 0.51}, {"share": 0.49}, "not seen"),
    ):
        assert causes(**wrong) == [cause], wrong
        assert causes(**right) == ["healthy"], right


def test_the_networks_of_the_experiment(aid):
    torch.manual_seed(0)
    model = aid.network(2.0, nn.Tanh).model(Task((3, 4, 8), 7))
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(96, 64), *[(64, 64)] * 11, (64, 7)]
    assert sum(isinstance(layer, nn.Tanh) for layer in model) == 12
    assert all(
        layer.weight.std().item() == pytest.approx(2 * math.sqrt(2 / layer.in_features), rel=0.1) for layer in linear
    )
    assert not any(layer.bias.any() for layer in linear)
    recipe = aid.network(1.0, nn.ReLU, 0.002, 20)
    assert (recipe.epochs, recipe.examples, recipe.optimizer.keywords["lr"]) == (20, 400, 0.002)
    assert aid.network(1.0, nn.ReLU).epochs == 0


def test_the_look_is_first_aid_on_the_first_100_images_before_training(aid):
    def look(model: nn.Module, split: Split) -> dict[str, float]:
        report = aid.first_aid(model, *(each[:100] for each in split.train))
        return aid.look(model, split) | {"cause": report.cause, "loss": report.loss}

    for recipe, cause in (
        (aid.network(0.5, nn.ReLU), "vanishing"),
        (aid.network(1.4, nn.ReLU), "overconfident"),
        (aid.network(2.0, nn.ReLU), "exploding"),
        (aid.network(1.0, nn.Tanh), "healthy"),
    ):
        ((arrays, notes),) = fit(recipe, [3, 4], inspect=look)
        assert arrays["seconds"][2]["alone"] == ""
        for note in notes:
            assert note["cause"] == cause
            assert math.isfinite(note["loss"])
        found = fit(recipe, [3], inspect=aid.look)[0][1][0]
        assert [name for name, named in zip(found["cause"][1], found["named"][1], strict=True) if named] == [cause]
