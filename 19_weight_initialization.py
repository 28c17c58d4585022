# %% [markdown]
# # Lesson 19: Weight initialisation
#
# **The question.** Before its first step a network is random numbers. Which should they be for
# which activation and depth? Does a bad choice prevent training? What makes the choice unimportant?
#
# **Afterwards you can** derive the variances of LeCun, Xavier and He; initialise a network of your
# own; tell vanishing, exploding and symmetric networks apart; say when PyTorch's default will do.
#
# **Time**: 30 minutes of reading (1,572 words at 200 a minute, 268 lines of code at 12), an hour
# with a run, which takes a minute on two CPU cores. **You need** a training loop, lesson 16 for
# batch norm. **Papers**: Glorot & Bengio 2010, He et al. 2015, LeCun et al. 1998.

# %%
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Split, Task, load, make_split
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe
from further.first_aid import first_aid

lesson = Lesson("19_weight_initialization", "Lesson 19: Weight initialisation")
GUIDE, ADVICE, PAPER = "study guide", "common advice", "He et al."

# %% [markdown]
# ## Why
#
# A network is a chain of products. Multiply a vector fifty times by a random matrix, and see what
# is left of it. (The first experiment runs this.) How exact, do you think, must the scale be?


# %%
def fifty_products() -> None:
    """How large are 100 numbers after fifty products with matrices of normal numbers?"""
    for deviation in (0.01, 0.05, 0.1, 0.2, 1.0):
        x = torch.randn(100).double()
        for _ in range(50):
            x = deviation * torch.randn(100, 100).double() @ x
        print(f"weights of deviation {deviation}: after fifty products {x.std():.0e}")


# %% [markdown]
# Half the right deviation, and nothing is left; twice, and it explodes. Right is 0.1 = 1 / √100.
# Why? Let n be the number of a unit's inputs (fan-in), m of the units that an input goes to (fan-
# out), all independent. The steps are in variances; `normal_` wants a deviation, the root.
#
#     1  forwards    a unit adds n products w · x   variance n · Var(w) · E[x²], if mean(w) = 0
#     2  mean zero   else all units share a part    n · mean(w) · mean(x), which says little
#     3  LeCun       Var(w) = 1/n                   the sum's variance is E[x²]: size is kept
#     4  He          ReLU sets half to 0: E[x²]/2   so twice the variance, 2/n
#     5  Xavier      backwards, m gradients add up  kept by 1/m; between both: 2/(n + m)
#     6  PyTorch's   U(−1/√n, 1/√n)                 variance 1/(3n), a sixth of He's
#
# ## From scratch


# %%
def fans(weight: Tensor) -> tuple[int, int]:
    """Fan-in, fan-out of weights (out, in) or (out, in, height, width): each pixel counts."""
    return weight[0].numel(), weight[:, 0].numel()


def lecun(weight: Tensor) -> Tensor:
    """Variance 1/n."""
    return nn.init.normal_(weight, std=sqrt(1 / fans(weight)[0]))


def xavier(weight: Tensor) -> Tensor:
    """Variance 2/(n + m)."""
    return nn.init.normal_(weight, std=sqrt(2 / sum(fans(weight))))


def he(weight: Tensor) -> Tensor:
    """Variance 2/n."""
    return nn.init.normal_(weight, std=sqrt(2 / fans(weight)[0]))


def initialise(module: nn.Module, how: Callable[[Tensor], Any]) -> None:
    """For model.apply, which calls this with each part of a model."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        how(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# %% [markdown]
# ## In your own loop
#
# To copy: eight hidden layers as PyTorch makes them, or with one line more. How will they differ?


# %%
def train(name: str, with_he: bool) -> tuple[list[float], list[float]]:
    """Train a network from one of two initialisations: losses on training and new images."""
    (x, y), (x_new, y_new), _ = make_split(load("digits"), seed=0, examples=400)
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    if with_he:  # by hand: how=he, which draws the same numbers
        model.apply(partial(initialise, how=nn.init.kaiming_normal_))
    torch.manual_seed(1)  # the same batches for both
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    training, validation = [], []
    for epoch in range(1, 11):
        model.train()
        for batch in torch.randperm(len(y)).split(20):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            training.append(F.cross_entropy(model(x), y).item())
            validation.append(F.cross_entropy(model(x_new), y_new).item())
        print(f"{name}, epoch {epoch:2}: loss {training[-1]:.2f}, validation {validation[-1]:.2f}")
    return training, validation


@lesson.experiment
def your_own_loop(lab: Lab) -> None:
    """How exact must weights be, and what does one line change in an ordinary loop?"""
    torch.manual_seed(0)
    fifty_products()
    figure, (ax,) = lab.plotting.new_figure("What does He's initialisation change?")
    for name in ("PyTorch's", "He"):
        training, validation = train(name, with_he=name == "He")
        colour = lab.plotting.TECHNIQUES[name]
        ax.plot(range(1, 11), training, "--", color=colour)
        ax.plot(range(1, 11), validation, color=colour, label=name)
    ax.set(xlabel="epoch", ylabel="validation loss (nats)\n(dashed: training loss)", ylim=(0, None))
    ax.legend(frameon=False)
    lab.figure(figure)


# %% [markdown]
# At this rate PyTorch's stays at log 10, the loss of guessing. One line, and it falls.
#
# ## How to use it
#
# | what | variance | said to be for | in `nn.init` | what we measured on digits [verdict] |
# | :-- | :-- | :-- | :-- | :-- |
# | He | 2/n | ReLU | `kaiming_normal_(w)` | trains 20 layers [depth-2 holds] |
# | Xavier | 2/(n+m) | tanh | `xavier_normal_(w)` | tanh: like He's [activations-2 does not hold] |
# | LeCun | 1/n | SELU | `normal_(w, std=n**-0.5)` | SELU: like He's [activations-3 does not hold] |
# | PyTorch's | 1/(3n) | all | `kaiming_uniform_(w, 5**0.5)` | two layers [depth-4 holds] |
# | zeros | 0 | nothing | `zeros_(w)` | harmless in the last layer [symmetry-3 does not hold] |
#
# In short: He's for ReLU, zeros for biases; with batch norm or skips PyTorch's own will do, too.
#
# ## What all experiments share
#
# 400 digits; ten hidden layers of 64 ReLU units, unless said; biases of zero, except in PyTorch's
# own; SGD with momentum 0.9, 256 steps in batches of 25; ten seeds, each arm at its own learning
# rate, chosen on other seeds' images. In all layers but the last n = m, and Xavier's is LeCun's.


# %%
Init = Callable[[Tensor], Any] | None  # fills a weight matrix; None leaves PyTorch's own
SMALL, LARGE = partial(nn.init.normal_, std=0.01), partial(nn.init.normal_, std=0.5)
UNSCALED, CONSTANT = nn.init.normal_, partial(nn.init.constant_, val=1 / 64)


def mlp(
    task: Task, how: Init, depth: int = 10, activation: Any = nn.ReLU, norm: Any = nn.Identity
) -> nn.Module:
    """Hidden layers of 64 units: images (N, C, H, W) to logits (N, classes)."""
    layers, inputs = [nn.Flatten()], prod(task.shape)
    for _ in range(depth):
        layers += [nn.Linear(inputs, 64), norm(64), activation()]
        inputs = 64
    model = nn.Sequential(*layers, nn.Linear(inputs, task.classes))
    return model.apply(partial(initialise, how=how)) if how else model


def network(
    how: Init, rate: float, depth: int = 10, activation: Any = nn.ReLU, epochs: int = 16
) -> Recipe:
    """The recipe of every training run."""
    model = partial(mlp, how=how, depth=depth, activation=activation)
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9, fused=True)
    return Recipe(model, optimizer, epochs=epochs, batch_size=25, examples=400, evaluations=4)


# %% [markdown]
# ## 1. Signal and gradient through 50 layers
#
# First the derivation, in numbers. Then 50 layers before training: how much do a layer's outputs
# differ from image to image (the signal), and how large is the loss's gradient there, in decades
# (powers of ten)? Guess: which weights make tanh's gradients vanish, small ones or large ones?


# %%
def derivation() -> str:
    """What the steps of the section Why predict, and what random numbers give."""
    x, gradient = torch.randn(4000, 64), torch.randn(4000, 256)  # n = 64 inputs, m = 256 units
    w, relu, between = torch.randn(256, 64), x.relu(), xavier(torch.empty(256, 64))
    steps = {
        "1. Var(w) = 1: variance of the sum": (64.0, (x @ w.T).var()),
        "2. mean(w) = 0.1, behind a ReLU: mean": (2.55, (relu @ (w / 8 + 0.1).T).mean()),
        "3. Var(w) = 1/n (LeCun): variance": (1.0, (x @ w.T / 8).var()),
        "4. Var(w) = 1/n, behind a ReLU: variance": (0.5, (relu @ w.T / 8).var()),
        "   Var(w) = 2/n (He), behind a ReLU: variance": (1.0, (relu @ w.T / sqrt(32)).var()),
        "5. Var(w) = 1/n, backwards: variance": (4.0, (gradient @ w / 8).var()),
        "   Xavier, forwards: variance": (0.4, (x @ between.T).var()),
        "   Xavier, backwards: variance": (1.6, (gradient @ between).var()),
        "6. PyTorch's: variance of the sum": (1 / 3, nn.Linear(64, 256, bias=False)(x).var()),
    }
    lines = [f"{name:50}{a:10.2f}{b:10.2f}" for name, (a, b) in steps.items()]
    return "\n".join([f"{'derivation, n = 64, m = 256':50} predicted  measured", *lines])


def flow(model: nn.Module, split: Split) -> dict[str, Any]:
    """How much each hidden layer's outputs differ between images; the loss's gradient there."""
    x, outputs = split.train.x.double(), []  # double: 1e40 does not overflow
    for layer in deepcopy(model).double():
        x = layer(x)
        if isinstance(layer, nn.Linear):
            outputs.append(x)
    gradients = torch.autograd.grad(F.cross_entropy(x, split.train.y), outputs)[:-1]
    signal = torch.stack([each.var(0).mean().sqrt().log10() for each in outputs[:-1]])
    gradient = torch.stack([each.square().mean().sqrt().log10() for each in gradients])
    layer = list(range(1, len(signal) + 1))
    return {"layer": ("layer", layer), "signal": ("layer", signal), "gradient": ("layer", gradient)}


@lesson.experiment
def signal(lab: Lab) -> None:
    """How large are signal and gradient in each of 50 layers, before any training?"""
    torch.manual_seed(0)
    lab.say(derivation())
    how = {"PyTorch's": None, "Xavier": xavier, "He": he, "0.5": LARGE}
    kinds = {"ReLU": nn.ReLU, "tanh": nn.Tanh}
    recipe = partial(network, rate=0.0, depth=50, epochs=0)
    runs = lab.study(recipe, how=how, activation=kinds, inspect=flow).rename(how="initialisation")
    for name in kinds:
        forwards, backwards = runs.signal.sel(activation=name), runs.gradient.sel(activation=name)
        forwards = forwards.assign_attrs(long_name=f"log10 of the signal, {name}")
        backwards = backwards.assign_attrs(long_name=f"log10 of the gradient, {name}")
        lab.curves(forwards, backwards, x="layer", hue="initialisation")
    back = runs.gradient.sel(layer=1) - runs.gradient.sel(layer=50)
    back = back.assign_attrs(unit="decades", long_name="gradient, layer 50 to 1")
    lab.table(back, rows="initialisation", columns="activation")
    signal = runs.signal.sel(layer=50) - runs.signal.sel(layer=1)
    kept = signal.sel(initialisation="He", activation="ReLU").assign_attrs(unit="decades")
    lab.claim("He's keeps 50 ReLU layers' signal to two decades", PAPER, kept, above=-2, below=2)
    large = back.sel(initialisation="0.5", activation="tanh")
    lab.claim("Large weights make tanh's gradients vanish", ADVICE, large, below=-1)


# %% [markdown]
# **What we saw.** With ReLU each layer multiplies: straight lines (till, beside biases, a double's
# digits end: 1e-17). Only He's is level: sizes stay, differences lose 0.81 decades [signal-1 holds]
# as ReLU makes images alike. PyTorch's gradient loses 19.21. Large weights saturate tanh, yet its
# gradients explode, by 9.07 [signal-2 does not hold]: what few units pass, large weights multiply.
# **How far it carries.** Nothing is trained here, so longer training changes nothing.
#
# ## 2. What trains?
#
# The critical experiment: eight initialisations, each at the best rate of its grid. A run *trains*
# if it ends with half of its training digits right. `first_aid(model, x, y)`, from `further/`,
# looks at each before and names a fault. Poor weights, says a guide: "won't train. Period." True?


# %%
INITIALISATIONS: dict[str, tuple] = {  # what each does, and the learning rates to try
    "zeros": (nn.init.zeros_, (0.01, 0.1, 1.0)),
    "all 1/64": (CONSTANT, (0.01, 0.03, 0.1)),
    "0.01": (SMALL, (0.01, 0.1, 1.0)),
    "PyTorch's": (None, (0.01, 0.1, 1.0)),
    "Xavier": (xavier, (0.003, 0.01, 0.03)),
    "He": (he, (0.002, 0.006, 0.02)),
    "unscaled": (UNSCALED, (1e-11, 1e-10, 1e-9)),
    "unscaled × 10": (partial(nn.init.normal_, std=10.0), (1e-20, 1e-19, 1e-18)),
}


def at_own_rate(initialisation: tuple, level: int) -> Recipe:
    """Ten ReLU layers from an initialisation, at a learning rate of its own grid."""
    how, rates = initialisation
    return network(how, rates[level])


@lesson.experiment
def trains(lab: Lab) -> None:
    """From which initialisation do ten layers train, each at its own learning rate?"""
    levels, found = {"level": (0, 1, 2)}, []
    runs = lab.study(at_own_rate, initialisation=INITIALISATIONS, tune=levels)
    lab.curves(runs.train_accuracy_curve, runs.test_accuracy_curve, hue="initialisation")
    losses = {"training loss": runs.train_loss, "train accuracy": runs.train_accuracy}
    lab.table(losses | {"test accuracy": runs.test_accuracy}, rows="initialisation")
    digits = make_split(load("digits"), seed=0, examples=400)
    torch.manual_seed(0)
    for name, (how, _) in INITIALISATIONS.items():
        cause = first_aid(mlp(load("digits").task, how), *digits.train).cause
        rate = float(runs.learning_rate.sel(initialisation=name).mean())
        found.append(f"{name} {rate:.0e} ({cause})")
    lab.say(f"learning rate (first aid on untrained digits networks): {', '.join(found)}")
    works = runs.train_accuracy.fillna(0) >= 50
    default, unscaled = works.sel(initialisation="PyTorch's"), works.sel(initialisation="unscaled")
    lab.claim("Ten ReLU layers train from PyTorch's weights", GUIDE, default, above=50)
    lab.claim("Ten layers of unscaled weights do not train", GUIDE, unscaled, below=50)
    gain = lab.gain(runs.test_accuracy, initialisation="He").sel(initialisation="unscaled")
    lab.claim("Unscaled weights cost 10 points beside He's", ADVICE, gain, below=-10)


# %% [markdown]
# **What we saw.** From PyTorch's weights ten layers stay at chance, up to a rate of 1 [trains-1
# does not hold], and first aid says why: vanishing. Unscaled weights train, at a rate of 1e-10
# [trains-2 does not hold], but end 46.8 points behind He's on the test [trains-3 holds]. Ten times
# larger ones, whose line hides theirs, are the same network in other units, at 1e-19. With outputs
# of millions the loss asks what is right, not how surely; perhaps they learn by heart for that.
# **How far it carries.** To `--longer 4`, where Xavier's does as well as He's, and fresh seeds.
#
# ## 3. Symmetry
#
# "Zeros: all neurons identical" is the story of a constant: equal units get equal gradients. With
# ReLU zeros are worse: no signal, no gradient for a weight; a sigmoid of zero is a half. From
# zeros, 1/64, zeros in the output layer only, and Xavier's: how many different units has one layer?


# %%
def zero_output(weight: Tensor) -> Tensor:
    """Xavier's in the hidden layer, zeros in the output layer, which has other than 64 units."""
    return xavier(weight) if len(weight) == 64 else nn.init.zeros_(weight)


def distinct_units(model: nn.Module, split: Split) -> dict[str, Any]:
    """How many different hidden units there are: first aid finds out."""
    return {"distinct_units": 64 * first_aid(model, *split.train).layers[0].distinct}


@lesson.experiment
def symmetry(lab: Lab) -> None:
    """What do zeros and constants do to the units of a layer?"""
    how = {"zeros": nn.init.zeros_, "all 1/64": CONSTANT}
    how |= {"zero output": zero_output, "random": xavier}
    kinds, tune = {"ReLU": nn.ReLU, "sigmoid": nn.Sigmoid}, {"rate": (0.02, 0.1, 0.5)}
    recipe = partial(network, depth=1)
    runs = lab.study(recipe, how=how, activation=kinds, tune=tune, inspect=distinct_units)
    runs = runs.rename(how="initialisation")
    accuracy = runs.test_accuracy
    lab.dots(accuracy, y="initialisation", hue="activation")
    lab.table(runs.distinct_units, rows="activation", columns="initialisation")
    lab.table(accuracy, rows="activation", columns="initialisation")
    units = runs.distinct_units.assign_attrs(unit="units")
    constant = units.sel(initialisation="all 1/64", activation="ReLU")
    lab.claim("From one constant 64 ReLU units stay copies", GUIDE, constant, below=4)
    zeros = accuracy.sel(initialisation="zeros", activation="sigmoid")
    lab.claim("From zeros a sigmoid layer learns nothing", GUIDE, zeros, below=15)
    cost = lab.gain(accuracy, initialisation="random").sel(initialisation="zero output")
    lab.claim("A zero output layer costs 2 points", ADVICE, cost.sel(activation="ReLU"), below=-2)


# %% [markdown]
# **What we saw.** Zeros learn nothing with ReLU, 10.0 %, but 37.6 % with sigmoids [symmetry-2 does
# not hold]: what one unit can, or two, probably through rounding that differs and grows; the others
# stay copies, as from 1/64 with ReLU [symmetry-1 holds]. Zeros in the output layer cost nothing
# [symmetry-3 does not hold]: after one step that layer passes gradients to units that differ.
# **How far it carries.** To `--longer 4` (70.7 % for sigmoids); other processors round otherwise.
#
# ## 4. Which initialisation for which activation?
#
# ReLU → He, tanh and sigmoid → Xavier, SELU → LeCun, say the tables. By how much, in six layers?


# %%
@lesson.experiment
def activations(lab: Lab) -> None:
    """Which variance of the weights suits which activation?"""
    how, rates = {"1/(3n)": None, "1/n": lecun, "2/n": he}, (0.003, 0.01, 0.03, 0.1)
    kinds = {"ReLU": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "SELU": nn.SELU}
    recipe = partial(network, depth=6)
    runs = lab.study(recipe, how=how, activation=kinds, tune={"rate": rates}).rename(how="variance")
    early = runs.train_loss_curve.sel(epoch=4, method="nearest")
    early = early.assign_attrs(long_name="training loss after 64 steps")
    lab.heat(runs.test_accuracy, early, x="variance", y="activation")
    lab.table(runs.test_accuracy, rows="activation", columns="variance")
    ahead = early.sel(variance="1/(3n)") > early.sel(variance="2/n")
    relu = ahead.sel(activation="ReLU")
    lab.claim("Six ReLU layers learn faster from He's than PyTorch's", ADVICE, relu, above=50)
    gain = lab.gain(runs.test_accuracy, variance="2/n").sel(variance="1/n")
    tanh, selu = gain.sel(activation="tanh"), gain.sel(activation="SELU")
    lab.claim("Six tanh layers: Xavier's gains 5 points over He's", GUIDE, tanh, above=5)
    lab.claim("Six SELU layers: LeCun's gains 5 points over He's", GUIDE, selu, above=5)
    works = runs.train_accuracy.fillna(0) >= 50
    sigmoid = works.sel(activation="sigmoid", variance="1/n")
    lab.claim("Six sigmoid layers train from Xavier's", GUIDE, sigmoid, above=50)


# %% [markdown]
# **What we saw.** From He's ReLU outpaces PyTorch's in 10 of 10 seeds [activations-1 holds]. tanh
# gains nothing by Xavier's [activations-2 does not hold], SELU 0.7 points by LeCun's, not five
# [activations-3 does not hold]. Sigmoids train from none [activations-4 does not hold]: their
# slope, a quarter at most, shrinks the signal (exercise 2). Six layers hardly feel a factor of two
# in variance; a sixth slows ReLU. **How far it carries.** `--longer 4`: ReLU gets 95 % from all.
#
# ## 5. How deep?
#
# He et al. trained 22 layers from both, but 30 from He's only. We take 5, 20 and 50. And PyTorch's
# own in shallow networks, with two layers, or three.


# %%
def deep(initialisation: Init, depth: int, scale: float) -> Recipe:
    """A network whose learning rate is a scale divided by its depth: a grid for each depth."""
    return network(initialisation, scale / depth, depth)


@lesson.experiment
def depth(lab: Lab) -> None:
    """How deep do Xavier's and He's carry, and when is PyTorch's own enough?"""
    both, own = {"Xavier": xavier, "He": he}, {"PyTorch's": None, "He": he}
    low, usual = {"scale": (0.02, 0.1, 0.5)}, {"scale": (0.02, 0.06, 0.2)}
    runs = lab.study(deep, initialisation=both, depth=(5, 20, 50), tune=low)
    few = lab.study(deep, initialisation=own, depth=(2, 3), tune=usual)
    lab.sweep(runs.train_accuracy, runs.test_accuracy, x="depth", hue="initialisation")
    lab.table(runs.test_accuracy, rows="initialisation", columns="depth")
    lab.table(few.test_accuracy, rows="initialisation", columns="depth")
    works = runs.train_accuracy.fillna(0) >= 50
    xavier_50 = works.sel(initialisation="Xavier", depth=50)
    he_20 = works.sel(initialisation="He", depth=20)
    lab.claim("50 ReLU layers do not train from Xavier's", PAPER, xavier_50, below=50)
    lab.claim("20 ReLU layers train from He's", PAPER, he_20, above=50)
    cost = lab.gain(runs.test_accuracy, depth=5).sel(initialisation="He", depth=50)
    lab.claim("From He's 50 ReLU layers learn as well as 5", ADVICE, cost, above=-2)
    gain = lab.gain(few.test_accuracy, initialisation="He").sel(initialisation="PyTorch's", depth=2)
    lab.claim("Two ReLU layers learn as well from PyTorch's weights", GUIDE, gain, above=-1)


# %% [markdown]
# **What we saw.** 20 layers train from He's [depth-2 holds], hardly from Xavier's, 20.1 %. 50
# stay at chance from Xavier's [depth-1 holds]; from He's they get 27.1 %, 67.2 points less than 5
# [depth-3 does not hold], perhaps as images get ever more alike. For two layers PyTorch's will
# do [depth-4 holds], for three nearly. **How far it carries.** With `--longer 4` 20 get 91 or 62 %.
#
# ## 6. What makes the choice unimportant?
#
# Ten ReLU layers from He's weights, and from PyTorch's and N(0, 0.01²), which failed above: now
# with batch norm, with skip connections around nine layers, or with Adam, which divides each
# gradient by its usual size. What makes up for a bad initialisation?


# %%
class Skip(nn.Sequential):
    """x + f(x), where f are its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def skip_net(task: Task, how: Init) -> nn.Module:
    """Ten hidden layers, nine of them with a skip connection."""
    skips = [Skip(nn.ReLU(), nn.Linear(64, 64)) for _ in range(9)]
    first, last = nn.Linear(prod(task.shape), 64), nn.Linear(64, task.classes)
    model = nn.Sequential(nn.Flatten(), first, *skips, nn.ReLU(), last)
    return model.apply(partial(initialise, how=how)) if how else model


RELIEF = {  # the network and the optimiser
    "batch norm": (partial(mlp, norm=nn.BatchNorm1d), network(None, 0.01).optimizer),
    "skips": (skip_net, network(None, 0.01).optimizer),
    "Adam": (mlp, partial(torch.optim.Adam, fused=True)),
}


def relieved(technique: tuple, initialisation: Init, rate: float) -> Recipe:
    """Ten ReLU layers with a technique, from an initialisation."""
    build, kind = technique
    model, optimizer = partial(build, how=initialisation), partial(kind, lr=rate)
    return replace(network(None, rate), model=model, optimizer=optimizer)


@lesson.experiment
def relief(lab: Lab) -> None:
    """With which technique does the initialisation no longer matter?"""
    how, rates = {"0.01": SMALL, "PyTorch's": None, "He": he}, (0.001, 0.003, 0.01, 0.03)
    runs = lab.study(relieved, technique=RELIEF, initialisation=how, tune={"rate": rates})
    lab.dots(runs.test_accuracy, y="technique", hue="initialisation")
    lab.table(runs.test_accuracy, rows="technique", columns="initialisation")
    gain = lab.gain(runs.test_accuracy, initialisation="He").sel(initialisation="PyTorch's")
    normed, skips = gain.sel(technique="batch norm"), gain.sel(technique="skips")
    lab.claim("With batch norm PyTorch's weights cost under 3 points", GUIDE, normed, above=-3)
    lab.claim("With skips He's weights beat PyTorch's", ADVICE, skips < 0, above=50)
    works = (runs.train_accuracy.fillna(0) >= 50).sel(technique="Adam")
    default, small = works.sel(initialisation="PyTorch's"), works.sel(initialisation="0.01")
    lab.claim("Adam trains ten layers from PyTorch's weights", ADVICE, default, above=50)
    lab.claim("Adam trains ten layers from N(0, 0.01²)", ADVICE, small, above=50)


# %% [markdown]
# **What we saw.** With batch norm PyTorch's weights are as good as He's [relief-1 holds]. With
# skips He's is worst, at 87.9 % [relief-2 does not hold]: each block adds as much variance as comes
# in, so small weights are right. Adam trains PyTorch's ten layers [relief-3 holds], to 63.0 %, not
# those from 0.01 [relief-4 does not hold]: its eps, 1e-8, dwarfs their gradients, below 1e-13.
# **How far it carries.** To `--longer 4` (Adam: 91.1 %), not to large weights (see lesson 16).
#
# ## Exercises
#
# Guess, change the line, run again. Answers: `exercises/19_weight_initialization.md`.
# Deeper: `first_aid.py`, `orthogonal_matrices.py` in `further/`.
#
# 1. `…, activation(), nn.Dropout(0.2)]` in `mlp`: does a constant train now? (`--only symmetry`)
# 2. `how(module.weight).data.mul_(4)` in `initialise`: who wants that? (`--only activations`)
# 3. `partial(torch.optim.Adam, lr=rate, fused=True)` in `network`: how deep? (`--only depth`)

# %%
if __name__ == "__main__":
    lesson.main()
