"""Small networks, recipes, losses and hooks that several tests train."""

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from common.data import Split, Task, derive
from common.training import Recipe, State, cross_entropy


class Convert(nn.Module):
    """Images in the precision in which the tests compute."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.get_default_dtype())


def linear(task: Task) -> nn.Module:
    return nn.Sequential(Convert(), nn.Flatten(), nn.Linear(prod(task.shape), task.classes))


def noisy(task: Task, p: float = 0.5) -> nn.Module:
    """A network that draws random numbers in training, from the same start as `linear`."""
    *others, layer = linear(task)
    return nn.Sequential(*others, nn.Dropout(p), layer)


def mlp(task: Task, width: int = 16) -> nn.Module:
    return nn.Sequential(
        Convert(), nn.Flatten(), nn.Linear(prod(task.shape), width), nn.ReLU(), nn.Linear(width, task.classes)
    )


def batch_norm(task: Task) -> nn.Module:
    flat = nn.Sequential(Convert(), nn.Flatten(), nn.Linear(prod(task.shape), 16))
    return nn.Sequential(*flat, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, task.classes))


def layer_norm(task: Task) -> nn.Module:
    flat = nn.Sequential(Convert(), nn.Flatten(), nn.Linear(prod(task.shape), 16))
    return nn.Sequential(*flat, nn.LayerNorm(16), nn.GELU(), nn.Linear(16, task.classes))


def convolution(task: Task) -> nn.Module:
    first = nn.Sequential(Convert(), nn.Conv2d(task.shape[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, task.classes))


class Rows(nn.Module):
    """A network that reads an image row by row: by attention, or by a module of its own."""

    def __init__(self, task: Task, block: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.convert, self.read = Convert(), nn.Linear(task.shape[-1], width)
        self.block, self.out = block, nn.Linear(width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.read(self.convert(x).flatten(1, 2)))
        return self.out((h[0] if isinstance(h, tuple) else h).mean(1))


def transformer(task: Task) -> nn.Module:
    return Rows(task, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))


def lstm(task: Task) -> nn.Module:
    return Rows(task, nn.LSTM(8, 8, batch_first=True))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.convert, self.read = Convert(), nn.Linear(prod(task.shape), 16)
        self.first, self.second, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, task.classes)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.read(self.convert(x).flatten(1))).relu()))


def frozen(task: Task) -> nn.Module:
    model = mlp(task)
    model[2].weight.requires_grad_(False)
    return model


class Counting(nn.Module):
    """A network that counts its steps and knows which seed it is, so that a loss can break one seed at one step."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("chosen", torch.tensor(torch.initial_seed() == derive(seed, "start")))
        self.layers = nn.Sequential(nn.Linear(prod(task.shape), 16), nn.Linear(16, 16), nn.Linear(16, task.classes))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return self.layers(x.to(torch.get_default_dtype()).flatten(1))


class Replacing(Counting):
    """The same, but each count is a new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
        return self.layers(x.to(torch.get_default_dtype()).flatten(1)) + 0.1 * self.count


class Drawing(nn.Module):
    """A network with a constant of its own that is no buffer: in a stack it would be the first seed's."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layers = linear(task)
        self.scale = torch.rand(())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


class Weakened(nn.Module):
    """A linear network with a setting that a hook may change."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.out, self.strength = nn.Linear(prod(task.shape), task.classes), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.strength * self.out(x.to(torch.get_default_dtype()).flatten(1))


def halve_inner(module: nn.Module, inner: tuple, outer: tuple) -> tuple:
    return tuple(gradient / 2 for gradient in inner)


def halve_outer(module: nn.Module, outer: tuple) -> tuple:
    return tuple(gradient / 2 for gradient in outer)


def halve(gradient: Tensor) -> Tensor:
    return gradient / 2


def halve_accumulated(parameter: Tensor) -> None:
    parameter.grad.div_(2)


def hooked(task: Task, hook: str) -> nn.Module:
    """A network with a hook that halves a gradient; the hook is the same function for each network."""
    model = mlp(task)
    layer = model[4]
    register = {
        "backward": partial(layer.register_full_backward_hook, halve_inner),
        "backward_pre": partial(layer.register_full_backward_pre_hook, halve_outer),
        "parameter": partial(layer.weight.register_hook, halve),
        "accumulated": partial(layer.weight.register_post_accumulate_grad_hook, halve_accumulated),
    }
    register[hook]()
    return model


def clipping(parameters, when: str) -> optim.Optimizer:
    """SGD with a hook that clips the norm of each gradient before a step, or of each parameter after it."""
    optimizer = optim.SGD(parameters, lr=0.1)

    @torch.no_grad()
    def clip(optimizer: optim.Optimizer, *others) -> None:
        for p in optimizer.param_groups[0]["params"]:
            tensor = p.grad if when == "pre" else p
            tensor.mul_(0.1 / tensor.norm())

    (optimizer.register_step_pre_hook if when == "pre" else optimizer.register_step_post_hook)(clip)
    return optimizer


class Patient(nn.Module):
    """Batch norm, and a number of epochs after which to stop that differs from seed to seed."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layers = batch_norm(task)
        stops = {derive(seed, "start"): epoch for seed, epoch in {0: 3, 1: 1, 2: 6}.items()}
        self.register_buffer("stop", torch.tensor(stops.get(torch.initial_seed(), 99)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Traced(nn.Module):
    """A linear network with buffers in which a loss and a layer leave what they were given: batch, and mask."""

    def __init__(self, task: Task, p: float = 0.0) -> None:
        super().__init__()
        self.out, self.p = nn.Linear(prod(task.shape), task.classes), p
        self.register_buffer("x", torch.zeros(25, *task.shape))
        self.register_buffer("y", torch.zeros(25, dtype=torch.long))
        self.register_buffer("mask", torch.zeros(25, prod(task.shape)))
        self.register_buffer("start", self.out.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.out(x.flatten(1))
        mask = F.dropout(torch.ones_like(x.flatten(1)), self.p)
        self.mask.copy_(mask)
        return self.out(x.flatten(1) * mask)


def traced(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.x.copy_(x)
    model.y.copy_(y)
    return cross_entropy(model, x, y)


def note_the_trace(state: State) -> None:
    state.notes["start"] = state.model.start
    for name in ("x", "y", "mask"):
        state.notes.setdefault(name, []).append(getattr(state.model, name).clone())


def exploding(task: Task) -> nn.Module:
    """Three linear layers: at a rate of 1e3 their product overflows within a few steps."""
    layers = nn.Linear(prod(task.shape), 32), nn.Linear(32, 32), nn.Linear(32, task.classes)
    return nn.Sequential(Convert(), nn.Flatten(), *layers)


class Elementwise(optim.Optimizer):
    """A reader's own optimiser: the sign of each gradient. It says that it may be stacked."""

    elementwise = True

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * self.direction(p.grad)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


class Normed(Elementwise):
    """A reader's own optimiser that looks at each gradient as a whole."""

    elementwise = False

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


def weights_apart(parameters, decay: float = 0.3) -> optim.Optimizer:
    """AdamW that decays weights, not biases."""
    parameters = list(parameters)
    weights = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay}
    others = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02}
    assert weights["params"]
    assert others["params"]
    return optim.AdamW([weights, others], lr=0.01)


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model, x, y) + 0.01 * sum(p.square().sum() for p in model.parameters())


def breaks_at_6(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a Counting network: infinite for its seed from step 6 on."""
    loss = cross_entropy(model, x, y)  # a forward pass, which counts
    return loss * torch.where(model.chosen & (model.count >= 6), torch.inf, 1.0)


def tensors(model: nn.Module, split: Split) -> dict:
    """What `inspect` returns: every parameter and buffer, running statistics included."""
    found = {}
    for name, value in model.state_dict().items():
        found[name] = ([f"{name}_{i}" for i in range(value.ndim)], value)
    return found


SGD = partial(optim.SGD, lr=0.1)
SMALL = Recipe(model=linear, optimizer=SGD, epochs=3, batch_size=25, examples=100, evaluations=3)
HUGE_RATE = partial(optim.SGD, lr=1e3, momentum=0.9)
DIVERGES = Recipe(model=exploding, optimizer=HUGE_RATE, epochs=4, batch_size=25, examples=100, evaluations=4)
