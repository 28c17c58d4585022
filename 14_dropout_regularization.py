# %% [markdown]
# # Lesson 14: Dropout
#
# **The question.** Switching units off at random while a network learns sounds like sabotage. When
# does it make the network better, how many units should go, and which of the rules that everybody
# repeats survive a measurement?
#
# **Afterwards you can** put dropout into your own training loop; say what `model.train()` and
# `model.eval()` change; detect overfitting from curves; choose p; tell when dropout helps or hurts.
#
# **Time**: 28 minutes of reading (1,922 words at 200 a minute, 225 lines of code at 12), an hour
# with a run, its tables and its figures. A run takes 20 seconds on two CPU cores and downloads
# nothing: the data are 1,797 real handwritten digits of 8 × 8 pixels, from scikit-learn. **You
# need** one PyTorch training loop behind you. **Paper**: Srivastava et al. 2014, *Dropout* (JMLR).

# %%
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Split, Task, load, make_split
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe

lesson = Lesson("14_dropout_regularization", "Lesson 14: Dropout")
GUIDE, ADVICE = "study guide", "common advice"  # sources: what this course grew from; hearsay

# %% [markdown]
# ## Why
#
# A network with more weights than images can learn its training images by heart, wrong labels
# included, and then it predicts new images badly: it overfits. The idea of dropout is that hidden
# units learn by heart in teams, relying on one another for one particular image. So break up the
# teams: at every step each hidden unit is switched off with probability p.
#
# While the network trains, the output h of a hidden unit becomes
#
#     h · mask / (1 − p),     mask = 0 with probability p, else 1,
#
# with a new mask for every image and every step. Dividing by 1 − p keeps the mean of h as it was,
# so the next layer sees inputs of the usual size. In use nothing is switched off:
#
#     model.train():   image → Linear → ReLU → h · mask / (1 − p) → Linear → logits
#     model.eval():    image → Linear → ReLU → h                  → Linear → logits
#
# PyTorch's p is the probability to DROP a unit, the paper's is the probability to KEEP it.
#
# ## From scratch


# %%
def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element of x (any shape) with probability p < 1 and divide the others by 1 − p.

    In eval mode x comes back unchanged. Srivastava et al. 2014, section 4, in PyTorch's form.
    """
    if not training or p == 0:
        return x
    keep = torch.rand_like(x) >= p
    return x * keep / (1 - p)


class Dropout(nn.Module):
    """`dropout` as a layer: `self.training` is what `model.train()` and `model.eval()` set."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


# %% [markdown]
# For p < 1 it does what `nn.Dropout` does; the tests compare the two, gradients included.
#
# ## In your own loop
#
# Everything you need to copy, in ordinary PyTorch: `nn.Dropout` behind each hidden layer,
# `model.train()` before the steps, `model.eval()` before measuring. The data are 200 digits, a
# fifth of them wrongly labelled; validation and test labels are right. How do the curves differ?


# %%
def train(p: float) -> tuple[list[float], list[float]]:
    """Train a network with dropout p: training and validation losses (in nats) after each epoch."""
    digits = make_split(load("digits"), seed=0, examples=200, label_noise=0.2)
    x, y = digits.train
    x_new, y_new = digits.validation
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Dropout(p),  # behind each hidden layer, not behind the last
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    training, validation = [], []
    for epoch in range(1, 13):
        model.train()  # dropout on
        for batch in torch.randperm(len(y)).split(10):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()  # dropout off, for both losses
        with torch.no_grad():
            training.append(F.cross_entropy(model(x), y).item())
            validation.append(F.cross_entropy(model(x_new), y_new).item())
        losses = f"training loss {training[-1]:.2f}, validation loss {validation[-1]:.2f}"
        print(f"p = {p}, epoch {epoch:2}: {losses}")
    return training, validation


@lesson.experiment
def your_own_loop(lab: Lab) -> None:
    """What do two lines of dropout change in an ordinary training loop?"""
    figure, (ax,) = lab.plotting.new_figure("What do two lines of dropout change?")
    for p, colour in {0.0: "black", 0.5: "#D55E00"}.items():
        training, validation = train(p)
        ax.plot(range(1, 13), training, "--", color=colour, label=f"p = {p}, training")
        ax.plot(range(1, 13), validation, color=colour, label=f"p = {p}, validation")
    ax.set(xlabel="epoch", ylabel="loss: cross-entropy (nats)")
    ax.legend(frameon=False)
    lab.figure(figure)


# %% [markdown]
# Without dropout the training loss keeps falling, while the validation loss turns near epoch 7 and
# rises again: the network overfits. With dropout it settles near 0.6. (One run, one seed.)
#
# ## How to use it
#
# The last column gives away what the experiments measured, and in brackets the verdicts behind it.
#
# | you set | usual advice | what we measured on digits [verdict] |
# | :-- | :-- | :-- |
# | p, shallow | 0.1 to 0.2 | wrong labels: too low, 0.7 was best [which_p-1 does not hold] |
# | p, deep | 0.3 to 0.5 | wrong labels: right [which_p-2 holds] |
# | where | hidden layers, never the output | there it did no harm [wrong_mode-2 does not hold] |
# | mode | `eval()` before testing | forgotten, it costs accuracy [wrong_mode-1 holds] |
# | when | always | wrong labels: yes [when_it_helps-2 holds]; tiny: no [when_it_helps-3 holds] |
#
# ## What all experiments share
#
# The function `network` describes every training run; what an experiment does not vary keeps its
# default. `lab.study` trains it for every combination of the values it is given, on ten seeds, and
# returns an xarray dataset: `.sel(p=0.5)` picks results by name. A seed fixes images, starting
# weights and the order of batches, so two networks of one shape are compared seed by seed. Printed
# are what `varies`, means over seeds with 95 % intervals in brackets, and verdicts: a rule of thumb
# holds if the whole interval is as expected, does not hold if none of it is, else it is unclear. A
# gain below 0.5 points does not count. At the rate used, 40 epochs without dropout teach the
# network all its labels, wrong ones included.


# %%
def mlp(task: Task, width: int, hidden_layers: int, p: float, output_p: float) -> nn.Module:
    """Hidden ReLU layers, each followed by dropout: images (N, C, H, W) to logits (N, classes)."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = prod(task.shape)
    for _ in range(hidden_layers):
        layers += [nn.Linear(inputs, width), nn.ReLU(), Dropout(p)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, task.classes), Dropout(output_p))


def network(
    p: float = 0.0,
    output_p: float = 0.0,
    hidden_layers: int = 2,
    width: int = 128,
    images: int = 200,
    wrong_labels: float = 0.2,
    rate: float = 5e-3,
    decay: float = 0.0,
    epochs: int = 40,
) -> Recipe:
    """The recipe of every training run; AdamW without weight decay is Adam."""
    return Recipe(
        model=partial(mlp, width=width, hidden_layers=hidden_layers, p=p, output_p=output_p),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=decay, fused=True),
        epochs=epochs,
        batch_size=50,
        examples=images,
        label_noise=wrong_labels,
        evaluations=8,
    )


# %% [markdown]
# ## 1. The wrong mode
#
# `model.eval()` is easily forgotten, and nothing complains. What does it cost to test a network
# with half of its hidden units switched off: 1 point of accuracy, 10, or 50? Two more slips: the
# paper's original dropout does not divide by 1 − p in training but multiplies by 1 − p afterwards,
# and who forgets that scales every layer up by 1 / (1 − p); and some put dropout behind the output
# layer, too.


# %%
@torch.no_grad()
def three_ways(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test scores of a trained network in three ways, each as (dimension, values, attributes)."""
    x, y = split.test
    logits = {"eval mode": model.eval()(x), "training mode": model.train()(x)}
    h = x
    for layer in model.eval():
        h = layer(h)
        if isinstance(layer, Dropout):
            h = h / (1 - layer.p)  # as if training had not divided
    logits["eval, not scaled"] = h
    accuracy, loss = [], []
    for each in logits.values():
        accuracy.append(100 * (each.argmax(1) == y).float().mean().item())
        loss.append(F.cross_entropy(each, y).item())
    return {
        "mode": ("mode", list(logits)),
        "accuracy": ("mode", accuracy, {"unit": "%", "long_name": "test accuracy"}),
        "loss": ("mode", loss, {"unit": "nats", "long_name": "test loss"}),
    }


@lesson.experiment
def wrong_mode(lab: Lab) -> None:
    """What does it cost to test a network with dropout in the wrong mode?"""
    runs = lab.study(network, p=(0.5,), output_p=(0.0, 0.5), inspect=three_ways)
    usual = runs.sel(p=0.5, output_p=0.0)
    lab.table({"test accuracy": usual.accuracy, "test loss": usual.loss}, rows="mode")
    lab.dots(usual.accuracy, usual.loss, y="mode")

    cost = lab.gain(usual.accuracy, mode="eval mode").sel(mode="training mode")
    lab.claim("Testing in training mode costs accuracy", ADVICE, cost, below=-0.5)
    output = lab.gain(runs.test_accuracy, output_p=0.0).sel(p=0.5, output_p=0.5)
    lab.claim("Dropout on the output layer, too, costs accuracy", ADVICE, output, below=-0.5)


# %% [markdown]
# **What we saw.** Tested in training mode, the network loses 9.0 points: every prediction is made
# by a random half of it [wrong_mode-1 holds]. Forgotten scaling hides better: accuracy stays at
# 84.5 %, as the largest logit mostly stays the largest, but the loss more than doubles: the network
# is far too sure of itself. Dropout behind the output layer gained 2.0 points [wrong_mode-2 does
# not hold]: one more disturbance that makes wrong labels harder to learn.
#
# **How far it carries.** Both verdicts stay after four times the training. But on 10,000 images of
# clothes dropout behind the output layer costs 17.0 points: do not count on it.
#
# ## 2. Overfitting, with and without
#
# The first network learns the wrong labels by heart: its learning rate is high. Remedies: dropout;
# a lower learning rate, with which training ends before that; both; and both with weight decay, the
# usual third step. Rate and decay are chosen for each on validation images, on seeds that are not
# reported. The last network has right labels: so much there is to gain. In the figure overfitting
# is a solid line that climbs away from its dashed one (it starts below, because validation labels
# are right). Which remedy will win?


# %%
def remedy(technique: str, rate: float, decay: float) -> Recipe:
    """The network with one of several remedies against overfitting."""
    settings: dict[str, dict[str, float]] = {
        "no dropout": {},
        "dropout": {"p": 0.5},
        "lower rate": {"rate": rate},
        "both": {"p": 0.5, "rate": rate},
        "both + decay": {"p": 0.5, "rate": rate, "decay": decay},
        "right labels": {"wrong_labels": 0.0},
    }
    return replace(network(**settings[technique]), evaluations=10)


@lesson.experiment
def overfitting(lab: Lab) -> None:
    """Does a large network learn wrong labels by heart, and what prevents it?"""
    techniques = ("no dropout", "dropout", "lower rate", "both", "both + decay", "right labels")
    choices = {"rate": (1e-4, 3e-4, 1e-3, 3e-3), "decay": (0.03, 0.3, 3.0)}
    runs = lab.study(remedy, technique=techniques, tune=choices)
    gain = lab.gain(runs.test_accuracy, technique="no dropout")
    end, turn = runs.test_accuracy, runs.best_test_accuracy
    lab.table({"at the end": end, "at lowest\nvalidation loss": turn, "gain": gain}, "technique")
    validation = (runs.validation_loss_curve, runs.validation_accuracy_curve)
    lab.curves(*validation, hue="technique", dashed=runs.train_loss_curve)

    fall = (end - turn).sel(technique="no dropout")
    lab.claim("Without dropout accuracy falls once validation loss turns", GUIDE, fall, below=-0.5)
    dropout = gain.sel(technique="dropout")
    lab.claim("Adding dropout improves generalisation", GUIDE, dropout, above=0.5)
    further = gain.sel(technique="both") - gain.sel(technique="lower rate")
    lab.claim("Dropout does more than a lower learning rate", ADVICE, further, above=0.5)
    last = gain.sel(technique="both + decay") - gain.sel(technique="both")
    lab.claim("Weight decay on top of dropout gains accuracy", GUIDE, last, above=0.5)


# %% [markdown]
# **What we saw.** Without dropout the validation loss turns within about ten epochs, and from there
# to the end test accuracy falls by 6.7 points [overfitting-1 holds]. Dropout gains 7.2 points
# [overfitting-2 holds]. But a lower learning rate alone gains 10.4; what dropout adds to it, 0.6,
# cannot be told from nothing [overfitting-3 unclear], and weight decay adds nothing to both
# [overfitting-4 does not hold]. Fewer wrong labels are learned; right ones give 92.9 %. An early
# end helps, too: at its lowest validation loss the plain network has 84.2 %.
#
# **How far it carries.** The verdicts stay after four times the training; dropout then gains only
# 4.2 points. On 10,000 images of clothes it costs accuracy at this rate, and adds as little to a
# lower one. Before you praise a regulariser, ask what a lower rate or an earlier end would do.
#
# ## 3. Which p?
#
# The usual table says: 0.1 to 0.2 for shallow networks, 0.3 to 0.5 for deep ones; above 0.7 the
# network underfits; start at 0.2 and raise it. We found no source for
# it. Each rule becomes a difference in test accuracy; the best p inside a range, and the best
# outside, are chosen on validation images. Draw the two curves before you look.


# %%
@lesson.experiment
def which_p(lab: Lab) -> None:
    """Which p is best for a shallow and for a deep network?"""
    depths = {"shallow": 1, "deep": 4}
    runs = lab.study(network, hidden_layers=depths, p=(0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9))
    accuracy = runs.test_accuracy
    lab.sweep(accuracy, runs.best_test_accuracy, x="p", hue="hidden_layers")
    lab.table(accuracy, rows="hidden_layers", columns="p")
    lab.table(runs.best_test_accuracy, rows="hidden_layers", columns="p")

    for depth, rule in {"shallow": [0.1, 0.2], "deep": [0.3, 0.5]}.items():
        validation = runs.validation_accuracy.mean("seed").sel(hidden_layers=depth)
        inside = validation.sel(p=rule).idxmax("p")
        outside = validation.drop_sel(p=rule).idxmax("p")
        test = accuracy.sel(hidden_layers=depth)
        statement = f"In a {depth} network a p from {rule[0]} to {rule[1]} beats every other p"
        lab.claim(statement, GUIDE, test.sel(p=inside) - test.sel(p=outside), above=0)
    shallow = accuracy.sel(hidden_layers="shallow")
    high = shallow.sel(p=0.9) - shallow.sel(p=0.5)
    lab.claim("In a shallow network p = 0.9 underfits, worse than p = 0.5", GUIDE, high, below=-0.5)
    more = shallow.sel(p=0.5) - shallow.sel(p=0.2)
    lab.claim("In a shallow network raising p from 0.2 to 0.5 helps", GUIDE, more, above=0.5)


# %% [markdown]
# **What we saw.** The shallow network wants far more than 0.1 or 0.2: p = 0.7 is 7.6 points better
# [which_p-1 does not hold], and even p = 0.9 is no worse than 0.5 [which_p-3 does not hold]. With
# four hidden layers the rule is right: p between 0.3 and 0.5 is best [which_p-2 holds]; at p = 0.7
# accuracy falls to 44.1 %, at 0.9 to chance. Going from 0.2 to 0.5 helps [which_p-4 holds]. The
# second table shows an early end: at its lowest validation loss the deep network has 82.2 % without
# dropout, not 75.2, and 84.7 with p = 0.5.
#
# **How far it carries.** The verdicts stay after four times the training. Right labels, a lower
# rate (exercises 1, 4) and clothes turn some of them: there p = 0.9 leaves 10.2 %.
#
# ## 4. When it helps, when it hurts
#
# The gain is the difference in test accuracy, p = 0.5 minus no dropout. Three things vary: the
# number of training images, whether their labels are right, and the network's width. The paper
# reports no gain on its smallest training sets; a network too small to learn by heart should need
# no cure. Where do you expect the largest gain, and where a loss?


# %%
EPOCHS = {50: 160, 200: 40, 800: 25}  # 160 steps or more, until learning by heart sets in


def by_images(images: int, labels: float, p: float) -> Recipe:
    """A network of 64 units a layer on training sets of several sizes."""
    return network(p=p, width=64, images=images, wrong_labels=labels, epochs=EPOCHS[images])


@lesson.experiment
def when_it_helps(lab: Lab) -> None:
    """When does dropout, p = 0.5, gain accuracy: how many images, which labels, which width?"""
    labels = {"right": 0.0, "20 % wrong": 0.2}
    runs = lab.study(by_images, images=tuple(EPOCHS), labels=labels, p=(0.0, 0.5))
    gain = lab.gain(runs.test_accuracy, p=0.0).sel(p=0.5)
    lab.sweep(gain, x="images", hue="labels")
    lab.table(gain, rows="labels", columns="images")
    runs = lab.study(network, width=(4, 16, 64), p=(0.0, 0.5))
    by_width = lab.gain(runs.test_accuracy, p=0.0)
    lab.sweep(by_width.sel(p=0.5), x="width")
    lab.table(runs.test_accuracy, rows="p", columns="width")

    many = gain.sel(images=800)
    clean = many.sel(labels="right")
    lab.claim("With 800 right labels dropout still helps", GUIDE, clean, above=0.5)
    more = many.sel(labels="20 % wrong") - clean
    lab.claim("With 800 images dropout gains more where labels are wrong", ADVICE, more, above=0.5)
    tiny = by_width.sel(p=0.5, width=4)
    lab.claim("A network of 4 units a layer is hurt by dropout", ADVICE, tiny, below=-0.5)


# %% [markdown]
# **What we saw.** Labels decide. With right labels dropout is worth a point at most at every size,
# and with 800 images it gains nothing [when_it_helps-1 does not hold]. With a fifth of them wrong
# it gains 2.6 points on 50 images, 9.2 on 200 (7.2 above, with 128 units a layer) and 6.6 on 800
# [when_it_helps-2 holds]. A network of 4 units a layer falls from 48.8 % to 28.9 % [when_it_helps-3
# holds]: it has no unit to spare.
#
# **How far it carries.** The verdicts stay after four times the training. But on 40,000 clothes, a
# fifth of them with wrong labels, dropout costs 13.0 points; and 16 units, which lose 10.8 points
# to dropout here, gain 3.0 after four times the training.
#
# ## 5. Redundancy
#
# No unit can rely on particular others, it is said. If so, a network trained with dropout should
# miss its units less when some are silenced for good. And if dropout makes units learn the same
# thing twice, their outputs should be more strongly correlated. A caution: this network was trained
# on just this injury. That it survives shows that training worked, not why it predicts better.


# %%
@torch.no_grad()
def silence(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test accuracy by share of hidden units silenced; mean |correlation|, last hidden layer."""
    generator = torch.Generator().manual_seed(0)
    shares = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]
    accuracy, correlations = [], []
    for share in shares:
        h = split.test.x
        for layer in model.eval():
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                kept = torch.rand(h.shape[1], generator=generator) >= share
                h = h * kept.to(h.device)
                last = h
        accuracy.append(100 * (h.argmax(1) == split.test.y).float().mean().item())
        used = last[:, last.std(0) > 0]  # without units that never vary
        pairs = torch.corrcoef(used.T).abs()
        correlations.append((pairs.sum() - len(pairs)) / (len(pairs) ** 2 - len(pairs)))
    return {
        "share_silenced": ("share_silenced", shares),
        "accuracy": ("share_silenced", accuracy, {"unit": "%", "long_name": "test accuracy"}),
        "correlation": correlations[0].item(),
    }


@lesson.experiment
def redundancy(lab: Lab) -> None:
    """Does dropout make hidden units replaceable, and are they then more alike?"""
    runs = lab.study(network, p={"no dropout": 0.0, "dropout": 0.5}, inspect=silence)
    lab.sweep(runs.accuracy, x="share_silenced", hue="p")
    lab.table(runs.accuracy, rows="p", columns="share_silenced")
    lab.table({"mean |correlation|": runs.correlation}, rows="p")

    lost = runs.accuracy.sel(share_silenced=0.0) - runs.accuracy.sel(share_silenced=0.5)
    spared = lost.sel(p="no dropout") - lost.sel(p="dropout")
    lab.claim("Losing half of the hidden units costs less after dropout", GUIDE, spared, above=0.5)
    alike = runs.correlation.sel(p="dropout") - runs.correlation.sel(p="no dropout")
    lab.claim("Dropout makes the hidden units more correlated", GUIDE, alike, above=0)


# %% [markdown]
# **What we saw.** With half of its hidden units silenced the network without dropout falls to 60.4
# %; the one with dropout keeps 77.3 % [redundancy-1 holds]. Its units are replaceable, but not
# copies: their outputs are slightly less correlated than without dropout, 0.27 against 0.29, not
# more [redundancy-2 does not hold].
#
# **How far it carries.** Both stay after four times the training; the second turns on clothes.
#
# ## Exercises
#
# Guess, change the line, run again. Answers: `exercises/14_dropout_regularization.md`.
#
# 1. Make all labels right: `wrong_labels: float = 0.0` in `network`. What is left of the gains?
# 2. Put dropout on the image, too: `layers = [nn.Flatten(), Dropout(0.2)]` in `mlp`. Does it help?
# 3. Forget the scaling: `return x * keep` in `dropout`. Which table shows it, and which does not?
# 4. Train all networks at a fifth of the rate: `rate: float = 1e-3`. Does dropout still help?
#
# Would a verdict last? `--longer 4` trains every study four times as long, `--first-seed 100` takes
# other seeds. Deeper: `python -m further.monte_carlo_dropout`, on how sure a prediction may be.

# %%
if __name__ == "__main__":
    lesson.main()
