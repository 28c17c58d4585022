# %% [markdown]
# # Further: First aid
#
# **The question.** A network does not learn. Before you change anything, look at it: one batch, no
# training. `print(first_aid(model, x, y))` names a cause and a remedy. Is it right?
#
# **Time**: 13 minutes of reading (332 words at 200 a minute, 135 lines of code at 12). **You need**
# lesson 19. For your own network: `from further.first_aid import first_aid`.

# %%
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import log, nan, prod
from types import SimpleNamespace

import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parameters_to_vector as vector

from common.data import Split, Task
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe

lesson = Lesson("first_aid", "Further: First aid")
ADVICE = "common advice"
HEAD = "layer                             difference     dead    flat  gradient distinct"
ROW = "{name:33.33}{difference:11.0e}{dead:9.0%}{flat:8.0%}{gradient:10.0e}{distinct:9.0%}"


@dataclass
class Report:
    """What `first_aid` found; `findings`: cause → what to do, in the order of the checks."""

    cause: str
    findings: dict[str, str]
    loss: float
    guessing: float
    layers: list[SimpleNamespace]  # see `watch`

    def __str__(self) -> str:
        rows = [ROW.format(**vars(layer)) for layer in self.layers]
        rows = rows if len(rows) <= 20 else [*rows[:10], "…", *rows[-9:]]
        told = [f"{cause}: {what}"[:80] for cause, what in self.findings.items()]
        loss = f"loss {self.loss:.3g}; guessing costs {self.guessing:.3g}"
        return "\n".join([loss, HEAD, *rows, *told])


def first_aid(model: nn.Module, x: Tensor, y: Tensor, optimizer: object = None) -> Report:
    """Examine a copy of a classifier in training mode on a batch x (N, …), y (N, …), and a step of
    its optimiser's copy, or of one that `optimizer` makes. Raises ValueError without logits
    (N, classes, …) for the labels, or without a layer that the loss depends on."""
    model, optimizer = deepcopy((model, optimizer))
    calls, step = watch(model.train()), 1e-3
    with torch.enable_grad(), torch.random.fork_rng():
        logits = model(x.detach())
        fits = isinstance(logits, Tensor) and logits.ndim > 1 and not y.is_floating_point()
        if not fits or (len(logits), *logits.shape[2:]) != y.shape or y.max() >= logits.shape[1]:
            raise ValueError(f"wanted logits (N, classes, …) that fit labels {tuple(y.shape)}")
        loss, guessing = nn.functional.cross_entropy(logits, y), log(logits.shape[1])
        if loss.requires_grad:
            loss.backward()
        layers = [call for call in calls if call.gradient is not None]
        if not layers:
            raise ValueError("the loss depends on no linear or convolutional layer")
        if optimizer:
            before = vector(model.parameters()).detach()
            (optimizer(model.parameters()) if callable(optimizer) else optimizer).step()
            step = (vector(model.parameters()).detach() - before).norm() / before.norm()
    findings = diagnose(layers, x, y, loss.item() / guessing, step)
    return Report(next(iter(findings)), findings, loss.item(), guessing, layers)


def watch(model: nn.Module) -> list[SimpleNamespace]:
    """A list to which each call of a layer will add. Inputs: difference between images, share that
    is zero for all (dead) or at either end of the range (flat: a tanh's ±1). Outputs: the loss's
    gradient for an image. Units: the share that are no copies."""
    names, calls = {layer: name for name, layer in model.named_modules()}, []

    def look(layer: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor:
        calls.append(call := SimpleNamespace(name=names[layer], gradient=None))
        given = [*inputs, *named.values()][0]
        x, inner = given.detach().cpu().double(), given.requires_grad  # inner: not the images
        call.difference = x.var(0, correction=0).mean().sqrt().item()
        call.dead = inner * (x == 0).all(0).double().mean().item()
        margin = 0.0125 * (x.max() - x.min())  # there a tanh has lost 95 % of its slope
        ends = (x < x.min() + margin).double().mean(), (x > x.max() - margin).double().mean()
        call.flat = sum(ends).item() if inner and min(ends) > 0.05 else 0.0

        def look_back(gradient: Tensor) -> None:
            gradient = gradient.cpu().double()
            call.gradient = gradient.flatten(1).norm(dim=1).mean().item()
            unit = -1 if isinstance(layer, nn.Linear) else 1
            weight, units = layer.weight.detach().cpu(), gradient[:9].movedim(unit, 0)
            parts = [1000 * part.flatten(1) / part.abs().max() for part in (weight, units)]
            rows = torch.cat(parts, 1).nan_to_num().round()
            call.distinct = len(rows.unique(dim=0)) / len(rows)

        output = output + output.new_zeros((), requires_grad=True)  # for a frozen layer
        if output.requires_grad:
            output.register_hook(look_back)
        return output

    for layer in names:
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            layer.register_forward_hook(look, with_kwargs=True)
    return calls


def diagnose(layers: list, x: Tensor, y: Tensor, loss: float, step: float) -> dict[str, str]:
    """The findings of a Report; `loss` in units of that of guessing."""
    first, hidden = layers[0], layers[:-1] or layers
    seen = next((layer.difference for layer in layers if layer.difference), 1.0)
    signal = layers[-1].difference / seen
    back = first.gradient / hidden[-1].gradient if hidden[-1].gradient else nan
    change = f"Difference × {signal:.0e} on the way, gradient × {back:.0e} back."
    alike = min(hidden, key=lambda layer: layer.distinct)
    dead, flat = max(layers, key=lambda each: each.dead), max(layers, key=lambda each: each.flat)
    bad = not x.isfinite().all() or (x == x[:1]).all() or (y == y[:1]).all()
    checks = [
        ("bad batch", bad, "Not finite, or all inputs or labels equal. Look at the data."),
        ("input scale", first.difference > 30, "Inputs differ by much. Standardise the data."),
        ("symmetric", alike.distinct < 0.5, f"Layer {alike.name}: equal units. Start at random."),
        ("dead units", dead.dead > 0.9, f"Layer {dead.name} gets only zeros. Mind biases, rate."),
        ("exploding", not loss < 1e9 or max(signal, back) > 1e3, f"{change} Start smaller."),
        ("saturated", flat.flat > 0.9 > flat.dead, f"Layer {flat.name} gets ±1. Start smaller."),
        ("vanishing", min(signal, back) < 1e-3, f"{change} Start larger."),
        ("overconfident", loss > 2, "Start the output layer smaller; or all, if differences grow."),
        ("rate", not 1e-5 < step < 0.1, f"A step moves the weights by {step:.0e} of their size."),
    ]
    return {cause: what for cause, wrong, what in checks if wrong} or {"healthy": change}


# %% [markdown]
# ## Does it know?
#
# These networks have one fault at most, scale: twelve layers, whose weights start at 0.5 to 2 times
# He's (the gain). First aid looks at 100 images; then they are trained. What will it call them?


# %%
def mlp(task: Task, gain: float, activation: type[nn.Module]) -> nn.Module:
    """Twelve layers of 64 units, weights `gain` times He's: images (N, C, H, W) to logits."""
    layers, inputs = [nn.Flatten()], prod(task.shape)
    for outputs in [64] * 12 + [task.classes]:
        layers += [nn.Linear(inputs, outputs), activation()]
        nn.init.normal_(layers[-2].weight, std=gain * (2 / inputs) ** 0.5)
        nn.init.zeros_(layers[-2].bias)
        inputs = outputs
    return nn.Sequential(*layers[:-1])


def network(gain: float, activation: type[nn.Module], rate: float = 0, epochs: int = 0) -> Recipe:
    """The network on 400 images; without epochs it is only looked at."""
    model = partial(mlp, gain=gain, activation=activation)
    return Recipe(model, partial(optim.Adam, lr=rate, fused=True), epochs=epochs, examples=400)


def look(model: nn.Module, split: Split) -> dict[str, object]:
    """Which cause first aid names on 100 images."""
    report = first_aid(model, split.train.x[:100], split.train.y[:100])
    causes = ["healthy", "vanishing", "overconfident", "exploding"]
    named = [report.cause == each for each in causes]
    return {"cause": ("cause", causes), "named": ("cause", named)}


@lesson.experiment
def does_it_train(lab: Lab) -> None:
    """Does first aid tell which networks will train?"""
    activations = {"ReLU": nn.ReLU, "tanh": nn.Tanh}
    grid = {"activation": activations, "gain": (0.5, 0.7, 1, 1.4, 2)}
    looks = lab.study(network, inspect=look, **grid)
    train, rates = partial(network, epochs=20), {"rate": (0.001, 0.004, 0.016, 0.06)}
    runs = lab.study(train, tune=rates, **grid)
    lab.sweep(runs.train_accuracy, runs.test_accuracy, x="gain", hue="activation")
    lab.table(runs.test_accuracy, rows="activation", columns="gain")
    cost = lab.gain(runs.test_accuracy, gain=1).where(looks.named)
    worst = cost.sel(cause="healthy").min("gain", keep_attrs=True)
    for name in activations:
        causes = looks.named.sel(activation=name).mean("seed").idxmax("cause")
        told = [f"{each.item()} at {each.gain.item():g}" for each in causes]
        lab.say(f"{name} is called {', '.join(told)}")
        statement = f"Healthy {name} networks lose under 10 points"
        lab.claim(statement, ADVICE, worst.sel(activation=name), above=-10)
    relu = cost.sel(activation="ReLU").mean("gain", keep_attrs=True)
    lab.claim("A vanishing start costs accuracy", ADVICE, relu.sel(cause="vanishing"), below=0)
    lab.claim("A large first loss is harmless", ADVICE, relu.sel(cause="overconfident"), above=-1)


# %% [markdown]
# **What we saw.** Trust "healthy" here with ReLU [does_it_train-1 holds], not with tanh, which caps
# signals: from a gain of 2 all looks healthy, and much is lost [does_it_train-2 does not hold]. A
# vanishing start costs 24.0 points [does_it_train-3 holds], a first loss far above guessing 10.0
# [does_it_train-4 does not hold]. **How far it carries.** To fresh seeds and also to `--longer 4`.

# %%
if __name__ == "__main__":
    lesson.main()
