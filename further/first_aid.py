# %% [markdown]
# # Further: First aid
#
# **The question.** A network does not learn. Before you change anything, look at it: one batch, no
# training. `print(first_aid(model, x, y))` names a cause and a remedy. Is it right?
#
# **Time**: 11 minutes of reading (306 words at 200 a minute, 119 lines of code at 12). **You need**
# lesson 19. For your own network: `from further.first_aid import first_aid`. It looks at a copy:
# `_watching.py` says how.

# %%
from dataclasses import dataclass, field
from functools import partial
from math import nan, prod
from textwrap import wrap
from types import SimpleNamespace

from torch import Tensor, nn, optim

from common.data import Split, Task
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe
from further._watching import Seen, examine

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
    layers: list[SimpleNamespace]  # each call of a layer, see `look` in _watching.py
    unseen: list[str] = field(default_factory=list)  # modules that were not looked at

    def __str__(self) -> str:
        rows = [ROW.format(**vars(layer)) for layer in self.layers]
        rows = rows if len(rows) <= 20 else [*rows[:10], "…", *rows[-9:]]
        lines = [f"loss {self.loss:.3g}; guessing costs {self.guessing:.3g}", HEAD, *rows]
        for cause, what in self.findings.items():
            lines += wrap(f"{cause}: {what}", 80, subsequent_indent="  ")
        more = f", … ({len(self.unseen)})" if len(self.unseen) > 4 else ""
        told = f"not seen: {', '.join(self.unseen[:4])}{more}"
        return "\n".join(lines + (wrap(told, 80, subsequent_indent="  ") if self.unseen else []))


def first_aid(model: nn.Module, x: Tensor, y: Tensor, optimizer: object = None) -> Report:
    """Examine a copy of a classifier in training mode on a batch x (N, …), y (N, …), and a step of
    its optimiser's copy, or of one that `optimizer` makes. Raises ValueError, one line, without
    logits (N, classes, …) for the labels or a layer that the loss depends on, or if it fails."""
    seen = examine(model, x, y, optimizer)
    findings = diagnose(seen, x, y)
    cause = next(iter(findings))
    return Report(cause, findings, seen.loss, seen.guessing, seen.layers, seen.unseen)


def bad_batch(x: Tensor, y: Tensor) -> str:
    """What is wrong with a batch, or nothing."""
    if not x.isfinite().all():
        return "Inputs are not finite."
    if len(x) == 1:
        return "There is one input only."
    if (x == x[:1]).all():
        return "All inputs are equal."
    return "All labels are equal." if (y == y[:1]).all() else ""


def diagnose(seen: Seen, x: Tensor, y: Tensor) -> dict[str, str]:
    """The findings of a Report, the first of which is its cause."""
    layers, loss, step = seen.layers, seen.loss / seen.guessing, seen.step
    first, hidden = layers[0], layers[:-1] or layers
    start = next((layer.difference for layer in layers if layer.difference), 1.0)
    signal = layers[-1].difference / start
    back = first.gradient / hidden[-1].gradient if hidden[-1].gradient else nan
    change = f"Difference × {signal:.0e} on the way, gradient × {back:.0e} back."
    alike = min(hidden, key=lambda layer: layer.distinct)
    dead, flat = max(layers, key=lambda each: each.dead), max(layers, key=lambda each: each.flat)
    large = max(hidden, key=lambda each: each.gain)
    most = max(signal, back if first.gradient > 10 * layers[-1].gradient else 0)
    grows = most > 1e3 or (most > 10 and loss > 2 and large.gain > 4)
    bad, broken = bad_batch(x, y), ", ".join(seen.not_finite[:3])
    lost = ", ".join(seen.lost[:3]) if loss < 1e9 else ""
    larger = f"{change} Layer {large.name}'s weights are {large.gain:.1g} × He's. Start smaller."
    moves = f"{step:.0e} of their size; 1e-5 to 0.1 is usual"
    checks = [
        ("bad batch", bad, f"{bad} Look at the data."),
        ("bad weights", broken, f"Not finite: {broken}. Start again, at a lower rate."),
        ("frozen", seen.frozen, "No parameter has requires_grad=True. Nothing can be learnt."),
        ("probabilities", seen.probabilities, "The loss wants logits. Leave out the softmax."),
        ("input scale", first.difference > 30, "Inputs differ by much. Standardise the data."),
        ("symmetric", alike.distinct < 0.5, f"Layer {alike.name}: equal units. Start at random."),
        ("dead units", dead.dead > 0.9, f"Layer {dead.name} gets only zeros. Mind biases, rate."),
        ("exploding", not loss < 1e9 or grows, larger),
        ("saturated", flat.flat > 0.9 > flat.dead, f"Layer {flat.name} gets ±1. Start smaller."),
        ("bad gradients", lost, f"Not finite: those of {lost}. Mind √0, 0/0, log 0."),
        ("vanishing", min(signal, back) < 1e-3, f"{change} Start larger."),
        ("overconfident", loss > 2, "Start the output layer smaller; or all, if differences grow."),
        ("optimiser", seen.stranger, "It trains no weight of this network. Make it anew."),
        ("rate", step < 1e-5 or step > 0.1, f"A step moves the weights by {moves}."),
        ("not seen", seen.unseen_share > 0.5, "Most weights lie in layers not looked into."),
    ]
    if bad or broken:
        checks = checks[:2]  # the rest may follow from them
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
