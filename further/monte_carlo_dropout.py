# %% [markdown]
# # Further: Monte-Carlo dropout
#
# **The question.** Leave dropout on when the network is used, predict many times, and average the
# probabilities. Gal and Ghahramani read this as an approximate Bayesian prediction. Does the
# average know better than one pass in eval mode how sure it may be?
#
# **Time**: 11 minutes of reading (626 words at 200 a minute, 95 lines of code at 12). **You
# need** lesson 14. **Paper**: Gal & Ghahramani 2016, *Dropout as a Bayesian approximation* (arXiv
# 1506.02142).

# %%
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Split, Task
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe

lesson = Lesson("monte_carlo_dropout", "Further: Monte-Carlo dropout")
ADVICE, PAPER = "common advice", "Srivastava et al."


# %% [markdown]
# ## From scratch
#
# The whole method is one line: the mean of the softmax outputs of many passes in training mode.


# %%
@torch.no_grad()
def average(model: nn.Module, x: Tensor, passes: int) -> Tensor:
    """Class probabilities (N, classes) of images x, averaged over passes with dropout on."""
    model.train()
    return sum(model(x).softmax(1) for _ in range(passes)) / passes


@torch.no_grad()
def one_pass(model: nn.Module, x: Tensor) -> Tensor:
    """Class probabilities (N, classes) of images x, from one pass in eval mode."""
    return model.eval()(x).softmax(1)


def mlp(task: Task, p: float) -> nn.Module:
    """Two hidden layers of 128 units with dropout: images (N, C, H, W) to logits (N, classes)."""
    first = [nn.Flatten(), nn.Linear(prod(task.shape), 128), nn.ReLU(), nn.Dropout(p)]
    second = [nn.Linear(128, 128), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*first, *second, nn.Linear(128, task.classes))


def network(labels: float, epochs: int, p: float = 0.5) -> Recipe:
    """Lesson 14's network on 200 images, a share `labels` of them wrongly labelled."""
    adam = partial(torch.optim.Adam, lr=5e-3, fused=True)
    return Recipe(partial(mlp, p=p), adam, epochs=epochs, examples=200, label_noise=labels)


# %% [markdown]
# ## 1. Eval mode or many passes
#
# A prediction is honest if it is as sure as it is right. The loss on the test set (the negative
# log-likelihood) rewards that; the calibration error measures it: in ten bins by confidence, how
# far the mean confidence is from the share of right answers. Averaging makes a prediction less
# sure. Is that better? Labels are right or wrong, training is short or long: guess for which of the
# four.


# %%
def scores(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Loss in nats, accuracy and calibration error in %: probabilities (N, classes), labels (N,).

    Expected calibration error in ten bins: Guo et al. 2017, arXiv 1706.04599.
    """
    confidence, guess = probabilities.max(1)
    right = guess == y
    calibration = 0.0
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        surplus = confidence[inside].sum() - right[inside].sum()
        calibration += 100 * surplus.abs().item() / len(y)
    loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), y).item()
    accuracy = 100 * right.float().mean().item()
    return {"loss": loss, "accuracy": accuracy, "calibration_error": calibration}


def one_or_many(model: nn.Module, split: Split) -> dict[str, Any]:
    """What averaging changes in the scores on the test set, by the number of passes."""
    x, y = split.test
    passes = [1, 2, 5, 10, 20, 50, 100]
    one = scores(one_pass(model, x), y)
    many = [scores(average(model, x, n), y) for n in passes]
    notes: dict[str, Any] = {"passes": ("passes", passes)}
    for name, unit in {"loss": "nats", "accuracy": "points", "calibration_error": "points"}.items():
        about = {"unit": unit, "long_name": f"{name}, average minus eval mode".replace("_", " ")}
        notes[name] = ("passes", [each[name] - one[name] for each in many], about)
    return notes


@lesson.experiment
def one_or_many_passes(lab: Lab) -> None:
    """Is the average of many passes with dropout more honest than eval mode?"""
    labels = {"right": 0.0, "20 % wrong": 0.2}
    runs = lab.study(network, labels=labels, epochs=(40, 160), inspect=one_or_many)
    long = runs.sel(epochs=160)
    lab.sweep(long.loss, long.calibration_error, x="passes", hue="labels")
    lab.table(runs.calibration_error.sel(passes=100), rows="labels", columns="epochs")

    for label in labels:
        change, where = long.sel(labels=label, passes=100), f"({label} labels)"
        lab.claim(f"Averaging improves likelihood {where}", ADVICE, change.loss, below=0)
        lab.claim(f"Averaging calibrates better {where}", ADVICE, change.calibration_error, below=0)
    accuracy = long.accuracy.sel(labels="20 % wrong", passes=100)
    lab.claim("Averaging changes accuracy by less than 1 point", PAPER, accuracy, above=-1, below=1)


# %% [markdown]
# **What we saw.** After 160 epochs the networks are too sure of themselves. Averaging tempers that:
# the loss falls by 0.18 nats with right labels and by 0.34 with wrong ones [one_or_many_passes-1
# holds] [one_or_many_passes-3 holds], the calibration error by 2.4 and 6.1 points
# [one_or_many_passes-2 holds] [one_or_many_passes-4 holds]; accuracy stays as it is
# [one_or_many_passes-5 holds]. After 40 epochs it makes calibration worse, by 0.8 points with right
# labels and by 8.8 with wrong ones: probably these networks are not too sure yet, and averaging
# makes them too modest. Twenty passes do nearly all that a hundred do.
#
# **How far it carries.** With four times the training the gains are larger. Averaging helps a
# network that is far too sure of itself, and can harm one that is not: look at the calibration on
# validation images before you pay for twenty passes.
#
# ## 2. Strange inputs
#
# A network should be less sure of images unlike anything it was trained on. We show it noise,
# digits with shuffled pixels, and digits turned by 90°, and ask how often its prediction has a
# higher entropy than for a test image: 100 % is perfect, 50 % is chance. A network trained without
# dropout is asked the same: for twenty times its work we expect at least 3 points more.


# %%
def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of probabilities (N, classes): 0 when certain, log(classes) when clueless."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(1)


def told_apart(predict: Callable[[Tensor], Tensor], odd: Tensor, x: Tensor) -> float:
    """How often an odd input gets a less certain prediction than an image of x, in % of pairs."""
    return 100 * (entropy(predict(odd))[:, None] > entropy(predict(x))).float().mean().item()


def strange(model: nn.Module, split: Split) -> dict[str, Any]:
    """How well strange inputs are told apart from test images, in eval mode and by an average."""
    x = split.test.x
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x[0].numel(), generator=generator).to(x.device)
    inputs = {
        "noise": torch.randn(x.shape, generator=generator).to(x.device),
        "shuffled": x.flatten(1)[:, order].view_as(x),
        "turned": x.rot90(1, (2, 3)),
    }
    notes: dict[str, Any] = {"input": ("input", list(inputs))}
    ways = {"eval mode": partial(one_pass, model), "20 passes": partial(average, model, passes=20)}
    for name, predict in ways.items():
        apart = [told_apart(predict, odd, x) for odd in inputs.values()]
        notes[name] = ("input", apart, {"unit": "%", "long_name": f"told apart, {name}"})
    return notes


@lesson.experiment
def strange_inputs(lab: Lab) -> None:
    """Does averaging tell strange inputs from digits?"""
    networks = {"no dropout": 0.0, "dropout": 0.5}
    runs = lab.study(network, labels=(0.2,), epochs=(160,), p=networks, inspect=strange)
    runs = runs.sel(labels=0.2, epochs=160)
    lab.dots(runs["eval mode"], runs["20 passes"], y="input", hue="p")
    one, many = runs["eval mode"].mean("input"), runs["20 passes"].mean("input")
    lab.table({"eval mode": one, "20 passes": many}, rows="p")

    gain = many.sel(p="dropout") - one.sel(p="dropout")
    lab.claim("Averaging tells strange inputs better than eval mode", ADVICE, gain, above=0)
    gain = many.sel(p="dropout") - one.sel(p="no dropout")
    statement = "Averaging tells strange inputs better than no dropout, by 3 points or more"
    lab.claim(statement, ADVICE, gain, above=3)


# %% [markdown]
# **What we saw.** Averaging is a great improvement over eval mode of the same network: 19.2 points
# [strange_inputs-1 holds]. But in eval mode that network is no better than chance here. A network
# trained without dropout tells strange inputs better than the average, by 5.2 points
# [strange_inputs-2 does not hold].
#
# **How far it carries.** Four times the training brings the two level, no more.

# %%
if __name__ == "__main__":
    lesson.main()
