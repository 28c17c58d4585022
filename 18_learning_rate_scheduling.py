# %% [markdown]
# # Lesson 18: Learning-rate scheduling
#
# **The question.** The learning rate is the hyperparameter that everybody tunes first. Should it change while a network
# trains; along which curve; and what does that buy over one constant rate that was chosen as carefully?
#
# **You will learn** to write ten schedules as formulas of a line or two; what each buys in 100 epochs, in 10, and when
# you do not know how many there will be; where the floor comes from that a constant rate cannot get below; how to
# find a rate in one short run; what the rate means to SGD, RMSprop and Adam; who needs warm-up; and six ways to connect
# a scheduler wrongly.
#
# **You need** a first PyTorch training loop (levels 1 and 2). The data are 1,797 handwritten digits that come with
# scikit-learn. A run takes about a minute on two CPU cores; see `results/` for the reference run.
#
# **Papers.** Loshchilov & Hutter 2017, *SGDR* (arXiv 1608.03983); Smith 2017, *Cyclical learning rates* (arXiv
# 1506.01186); Smith & Topin 2018, *Super-convergence* (arXiv 1708.07120); He et al. 2016, *Deep residual learning*
# (arXiv 1512.03385); Mandt et al. 2017, *Stochastic gradient descent as approximate Bayesian inference* (arXiv
# 1704.04289); Kingma & Ba 2015, *Adam* (arXiv 1412.6980); Loshchilov & Hutter 2019, *AdamW* (arXiv 1711.05101);
# Goyal et al. 2017, *Accurate, large minibatch SGD* (arXiv 1706.02677); Xiong et al. 2020, *On layer normalization in
# the transformer architecture* (arXiv 2002.04745).
#
# **A promise.** Every rate in a figure was read from the optimiser at the step that used it, never from the formula.

# %%
import math
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import ceil, cos, inf, pi, prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from common.first.cli import run_lesson
from common.first.data import Split, Task, derive, load, make_split, minibatches
from common.first.experiment import AllDivergedError, Comparison, Tuning, tuning_seeds
from common.first.lab import Lab, Larger
from common.first.plotting import BASELINE as BLACK
from common.first.plotting import (
    COLOURS,
    colours,
    log_ticks,
    new_figure,
    plot_dots,
    plot_estimates,
    plot_grid,
    plot_history,
    shared_legend,
)
from common.first.report import Table, interval, number
from common.first.statistics import (
    Range,
    above,
    below,
    estimate,
    estimates,
    paired_difference,
    points,
    proportion,
    within,
)
from common.first.training import Recipe, State, cross_entropy, evaluate

LESSON = "18_learning_rate_scheduling"
TITLE = "Lesson 18: Learning-rate scheduling"

# %% [markdown]
# ## The mechanism, from scratch
#
# A schedule is a formula: the factor on the rate at step t = 0, 1, …, T − 1. Here they are, all of them, with the
# settings that the experiments use. The rate you give the optimiser is the *peak*: no factor exceeds 1.


# %%
def part(total: int, share: float) -> int:
    """A share of the steps, at least one."""
    return max(1, round(share * total))


def step_decay(t: int, total: int) -> float:
    """StepLR: a tenth after every 30 % of the steps."""
    return 0.1 ** (t // part(total, 0.3))


def multi_step(t: int, total: int) -> float:
    """MultiStepLR: a tenth at half the steps, again at three quarters. He et al. 2016."""
    return 0.1 ** sum(t >= part(total, share) for share in (0.5, 0.75))


def exponential(t: int, total: int) -> float:
    """ExponentialLR: the same factor at every step, a hundredth at the end."""
    return 0.01 ** (t / total)


def linear(t: int, total: int) -> float:
    """LinearLR: a straight line to zero."""
    return 1 - t / total


def cosine(t: float, total: float) -> float:
    """CosineAnnealingLR: half a cosine, from 1 to zero. Loshchilov & Hutter 2017."""
    return (1 + cos(pi * t / total)) / 2


def warm_restarts(t: int, total: int) -> float:
    """CosineAnnealingWarmRestarts: three cosines, each twice as long as the one before. Loshchilov & Hutter 2017."""
    period = ceil(total / 7)
    while t >= period:
        t, period = t - period, 2 * period
    return cosine(t, period)


def warm_up_cosine(t: int, total: int) -> float:
    """LinearLR, then CosineAnnealingLR, by SequentialLR: a line from a hundredth up to 1, then a cosine."""
    up = part(total, 0.1)
    return 0.01 + 0.99 * t / up if t < up else cosine(t - up, total - up)


def one_cycle(t: int, total: int, start: float = 1 / 25, top: float = 1.0, end: float = 1 / 25e4) -> float:
    """OneCycleLR: half a cosine up in 30 % of the steps, half a cosine down in the rest. Smith & Topin 2018.

    With start, top, end = 0.95, 0.85, 0.95 it is the momentum, high where the rate is low.
    """
    turn = 0.3 * total - 1
    a, b, share = (start, top, t / turn) if t <= turn else (top, end, (t - turn) / (total - 1 - turn))
    return b + (a - b) * cosine(share, 1)


def triangle(t: int, total: int) -> float:
    """OneCycleLR in three phases, linear: up in 45 % of the steps, down in 45 %, then down to next to nothing."""
    return float(np.interp(t, [0, 0.45 * total - 1, 0.9 * total - 2, total - 1], [1 / 25, 1, 1 / 25, 1 / 25e4]))


def reduce_on_plateau(state: State, patience: int = 10, mode: str = "min", factor: float = 0.1) -> None:
    """ReduceLROnPlateau, after each epoch: once more than `patience` epochs have gone by since the validation loss was
    last better (by 0.01 % of its size; lower if `mode` is "min"), the rate is multiplied by `factor`, down to 1e-6.
    """
    loss, _ = evaluate(state.model, state.split.validation)
    score = loss if mode == "min" else -loss
    best = state.notes.get("best score")
    if best is None or score < best - 1e-4 * abs(best):
        state.notes |= {"best score": score, "waited": 0}
    else:
        state.notes["waited"] += 1
    if state.notes["waited"] > patience:
        state.notes["waited"] = 0
        for group in state.optimizer.param_groups:
            group["lr"] = max(factor * group["lr"], 1e-6)
    state.notes.setdefault("watched", []).append(loss)


def adam_step(
    weight: Tensor, mean: Tensor, square: Tensor, t: int, rate: float, betas: tuple[float, float] = (0.9, 0.999)
) -> None:
    """One step of Adam (t = 1, 2, …) in place: running means of the gradient and of its square, their start at zero
    corrected, then a step of about `rate` for every weight, however large its gradient. Kingma & Ba 2015.
    """
    mean.lerp_(weight.grad, 1 - betas[0])
    square.lerp_(weight.grad.square(), 1 - betas[1])
    step = (mean / (1 - betas[0] ** t)) / ((square / (1 - betas[1] ** t)).sqrt() + 1e-8)
    weight.data -= rate * step


# %% [markdown]
# The same in PyTorch: each function gets the optimiser, whose rate is the peak, and the number of steps. All of them
# are stepped after every batch here; to count epochs instead is as right, if everything counts epochs (experiment 9).


# %%
def torch_step(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `step_decay`."""
    return lr_scheduler.StepLR(optimizer, part(total, 0.3), 0.1)


def torch_multi_step(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `multi_step`."""
    return lr_scheduler.MultiStepLR(optimizer, [part(total, 0.5), part(total, 0.75)], 0.1)


def torch_exponential(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `exponential`."""
    return lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / total))


def torch_linear(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `linear`."""
    return lr_scheduler.LinearLR(optimizer, 1, 0, total)


def torch_cosine(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `cosine`."""
    return lr_scheduler.CosineAnnealingLR(optimizer, total)


def torch_warm_restarts(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `warm_restarts`."""
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, ceil(total / 7), T_mult=2)


def torch_warm_up_cosine(optimizer: Optimizer, total: int) -> LRScheduler:
    """PyTorch's `warm_up_cosine`."""
    up = part(total, 0.1)
    both = [lr_scheduler.LinearLR(optimizer, 0.01, 1, up), lr_scheduler.CosineAnnealingLR(optimizer, total - up)]
    return lr_scheduler.SequentialLR(optimizer, both, [up])


def torch_one_cycle(optimizer: Optimizer, total: int, triangle: bool = False) -> LRScheduler:
    """PyTorch's `one_cycle`, the default; or its `triangle`."""
    peak = optimizer.param_groups[0]["lr"]
    if triangle:
        return lr_scheduler.OneCycleLR(
            optimizer, peak, total, pct_start=0.45, anneal_strategy="linear", three_phase=True
        )
    return lr_scheduler.OneCycleLR(optimizer, peak, total)


# %% [markdown]
# ## What is held fixed
#
# 100 digits in batches of 50, a hidden layer of 32 units with He's start, SGD with momentum. Two things were chosen to
# make the effects visible. *Noise*: in training every pixel gets noise of its own, anew at each step, as large as the
# pixels vary. It is augmentation, and it keeps the task from ever being learnt by heart. (Experiment 2 shows what is
# left of the effects without it.) *Size*: small enough for 100 epochs, ten schedules and ten seeds in a minute.
#
# The peak rate that is best for one schedule is not the best for another. So every arm gets its own, chosen on
# validation with seeds that no result uses; the grid is printed. Where a rate is shared, the text says so.


# %%
def mlp(task: Task, width: int = 32) -> nn.Module:
    """One hidden ReLU layer with He's start: (N, C, H, W) to logits (N, classes)."""
    hidden = nn.Linear(prod(task.shape), width)
    nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(width, task.classes))


def noisy_images(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (nats) on standardised images x (N, C, H, W) with noise of deviation 1 on each pixel."""
    return F.cross_entropy(model(x + torch.randn_like(x)), y)


def note_rate(state: State) -> None:
    """Note the rate and the momentum that the step just done was taken with."""
    group = state.optimizer.param_groups[0]
    state.notes.setdefault("rate", []).append(float(group["lr"]))
    state.notes.setdefault("momentum", []).append(float(group.get("momentum", math.nan)))


SGD = partial(torch.optim.SGD, momentum=0.9, fused=True)
ADAM = partial(torch.optim.Adam, fused=True)
BASELINE = Recipe(
    model=mlp,
    optimizer=partial(SGD, lr=0.03),
    schedule_every="batch",
    loss=noisy_images,
    epochs=100,
    batch_size=50,
    examples=100,
    evaluations=1,
    after_step=note_rate,
)
# On every data set but the digits: so many times as many training images and epochs, and the seeds of a run. At 1 and 1
# nothing but the data differs; set them higher if you have the time, or a GPU.
LARGER = Larger(examples=1, epochs=1, seeds=10)
CONSTANT, STEP, MULTI, EXPONENTIAL, LINEAR = "constant", "StepLR", "MultiStepLR", "ExponentialLR", "linear"
COSINE, RESTARTS, WARM_UP, ONE_CYCLE, PLATEAU = "cosine", "warm restarts", "warm-up + cosine", "one-cycle", "plateau"
BY_HAND = {
    STEP: step_decay,
    MULTI: multi_step,
    EXPONENTIAL: exponential,
    LINEAR: linear,
    COSINE: cosine,
    RESTARTS: warm_restarts,
    WARM_UP: warm_up_cosine,
    ONE_CYCLE: one_cycle,
}
IN_TORCH = {
    STEP: torch_step,
    MULTI: torch_multi_step,
    EXPONENTIAL: torch_exponential,
    LINEAR: torch_linear,
    COSINE: torch_cosine,
    RESTARTS: torch_warm_restarts,
    WARM_UP: torch_warm_up_cosine,
    ONE_CYCLE: torch_one_cycle,
}
LINE_UP = {CONSTANT: BASELINE}
LINE_UP |= {name: replace(BASELINE, schedule=schedule) for name, schedule in IN_TORCH.items()}
LINE_UP[PLATEAU] = replace(BASELINE, after_epoch=reduce_on_plateau)
MIDDLE = (0.03, 0.1, 0.3)  # grids of peak rates
HIGH, WIDE = (*MIDDLE, 1.0), (0.003, 0.01, *MIDDLE)
SGDR, SMITH, TOPIN, MANDT = "Loshchilov & Hutter 2017", "Smith 2017", "Smith & Topin 2018", "Mandt et al. 2017"
XIONG, GOYAL = "Xiong et al. 2020", "Goyal et al. 2017"
GUIDE, ADVICE = "study guide", "common advice"


def at_rate(recipe: Recipe, rate: float, optimizer: Callable[..., Optimizer] = SGD) -> Recipe:
    """The recipe with another peak rate."""
    return replace(recipe, optimizer=partial(optimizer, lr=rate))


def rate_of(recipe: Recipe) -> float:
    """The peak rate of the recipe."""
    return recipe.optimizer.keywords["lr"]


def steps_of(recipe: Recipe) -> int:
    """How many steps the recipe takes."""
    return recipe.epochs * ceil(recipe.examples / recipe.batch_size)


def applied(runs: Comparison, arm: str, what: str = "rate", run: int = 0) -> list[float]:
    """The rate (or the momentum) of every step, as the arm's first run (or another) took it."""
    return runs.runs[arm][run].notes.get(what, [])


def gain_over_time(runs: Comparison, arm: str) -> np.ndarray:
    """Change of validation accuracy in points over the second half of the training, (seeds,); NaN if diverged."""
    history = runs.history("validation_accuracy", arm)
    return 100 * (runs.values("validation_accuracy", arm) - history[:, history.shape[1] // 2])


def tune_rates(
    lab: Lab, arms: dict[str, Recipe], rates: dict[str, Sequence[float]]
) -> tuple[Tuning, dict[str, Recipe]]:
    """The grid of peak rates, for each arm its own, printed; and each arm at the one that is best on validation."""
    grids = {arm: {rate: at_rate(recipe, rate) for rate in rates[arm]} for arm, recipe in arms.items()}
    tuning = lab.tune("Peak rate", grids, count=3)
    return tuning, {arm: grids[arm][tuning.best(arm)] for arm in arms}


# %% [markdown]
# ## 1. Shapes
#
# Each schedule trains a network with one seed while the rate is read from the optimiser at every step; the formula lies
# over it. Is OneCycleLR a triangle, as many tables say? PyTorch's default is two halves of a cosine; the triangle of
# the paper takes three arguments. Either way it moves the momentum against the rate. Cosine annealing ends at zero and
# does not restart; with warm restarts it does.
#
# Adam is here, too, because experiment 7 needs it: the six lines above, against `torch.optim.Adam`, over 20 steps.


# %%
def adam_against_torch(steps: int = 20) -> float:
    """The largest difference between weights trained by `adam_step` and by torch.optim.Adam."""
    draw = torch.Generator().manual_seed(0)
    x, target = (torch.randn(8, 5, generator=draw) for _ in range(2))
    theirs = torch.randn(5, 5, generator=draw).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    mean, square = torch.zeros(2, 5, 5)
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    for t in range(1, steps + 1):
        for weight in (ours, theirs):
            weight.grad = None
            (x @ weight - target).square().sum().backward()
        adam_step(ours, mean, square, t, 0.1)
        optimizer.step()
    return float((ours - theirs).abs().max().detach())


def plateau_in_torch(peak: float, losses: Sequence[float]) -> list[float]:
    """The rate that PyTorch's ReduceLROnPlateau sets in each epoch if it is shown these losses."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-6)
    rates = []
    for loss in losses:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step(loss)
    return rates


def furthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference between two sequences, as far as both go."""
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=False)), default=math.nan)


def shapes(lab: Lab) -> None:
    """Does the optimiser take the rates that the formulas say?"""
    by_hand = BY_HAND | {"triangle": triangle}
    arms = LINE_UP | {"triangle": replace(BASELINE, schedule=partial(torch_one_cycle, triangle=True))}
    arms = {name: replace(at_rate(recipe, 0.1), epochs=40) for name, recipe in arms.items() if name != CONSTANT}
    arms = lab.sized(arms)
    runs = lab.train(arms, COSINE, lab.settings.seeds[:1])
    rates = {name: np.array(applied(runs, name)) for name in arms}
    total = steps_of(arms[COSINE])
    expected = {name: [0.1 * by_hand[name](t, total) for t in range(total)] for name in by_hand}
    watched = runs.runs[PLATEAU][0].notes.get("watched", [])
    expected[PLATEAU] = np.repeat(plateau_in_torch(0.1, watched), total // arms[PLATEAU].epochs).tolist()
    momentum = [one_cycle(t, total, 0.95, 0.85, 0.95) for t in range(total)]
    rows = []
    for name in arms:
        shown = [rates[name][int(share * (len(rates[name]) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        rows.append([name, *(f"{each:.1e}" for each in shown), f"{furthest(rates[name], expected[name]):.0e}"])
    off = furthest(applied(runs, ONE_CYCLE, "momentum"), momentum)
    heads = ["schedule", "first", "25 %", "50 %", "75 %", "last", "off the\nformula"]
    lab.table(Table(f"Rate applied in {total} steps, peak 0.1", heads, rows))

    figure, axes = new_figure("Which rate does each schedule apply?", 4, 3)
    for ax, name in zip(axes, arms, strict=False):
        ax.plot(rates[name], color=COLOURS[5], linewidth=5, label="applied")
        ax.plot(expected[name], color=BLACK, linewidth=1.2, linestyle="--", label="formula")
        ax.set_title(name)
    axes[10].plot(applied(runs, ONE_CYCLE, "momentum"), color=COLOURS[5], linewidth=5)
    axes[10].plot(momentum, color=BLACK, linewidth=1.2, linestyle="--")
    axes[10].set_title("one-cycle: momentum")
    axes[11].axis("off")
    axes[11].legend(*axes[0].get_legend_handles_labels(), loc="center")
    for ax in axes[8:11]:
        ax.set_xlabel("step")
    for ax in axes[::4]:
        ax.set_ylabel("learning rate")
    lab.figure("shapes", figure)
    apart = furthest(rates[ONE_CYCLE], rates["triangle"]) / 0.1
    lab.finding(f"OneCycleLR by default and the triangle differ by up to {100 * apart:.0f} % of the peak.")
    lab.finding(f"Its momentum is off the formula by {off:.0e}.")
    lab.finding(f"Adam by hand and torch.optim.Adam: weights {adam_against_torch():.0e} apart after 20 steps.")


# %% [markdown]
# ## 2. A hundred epochs
#
# The same budget for all: 200 steps. Every schedule at its own best peak rate, and once more the constant rate at the
# peak that is best for the *cosine*: one rate for both is the comparison that comes to mind first, and it is unfair to
# the constant. At last two *clean* arms, without noise on the images, where the network learns every digit by heart.
#
# Two claims: a schedule is worth 5 to 10 points; and a constant rate reaches a plateau (here: less than half a point of
# validation accuracy gained in the second half) where a schedule goes on improving.
#
# And with fewer epochs? Constant, cosine and one-cycle with 5, 10, 20 and 50, each again at its own best peak.
# One-cycle promises speed, *super-convergence*: ten times fewer steps to the same accuracy.

# %%
SHARED, CLEAN = "constant, cosine's peak", "clean: "
BUDGETS, CONTENDERS = (5, 10, 20, 50, 100), (CONSTANT, COSINE, ONE_CYCLE)


def hundred_epochs(lab: Lab) -> None:
    """What does a schedule buy in 100 epochs, over a constant rate that was tuned as well?"""
    arms = {name: replace(recipe, evaluations=6) for name, recipe in LINE_UP.items()}
    arms |= {CLEAN + name: replace(arms[name], loss=cross_entropy) for name in (CONSTANT, COSINE)}
    rates = dict.fromkeys(arms, MIDDLE) | {EXPONENTIAL: HIGH}
    rates |= dict.fromkeys((CONSTANT, PLATEAU, CLEAN + CONSTANT, CLEAN + COSINE), WIDE)
    tuning, best = tune_rates(lab, arms, rates)
    best = {CONSTANT: best[CONSTANT], SHARED: at_rate(best[CONSTANT], rate_of(best[COSINE])), **best}
    runs = lab.compare(best, {arm: CLEAN + CONSTANT if CLEAN in arm else CONSTANT for arm in best})
    schedules = [name for name in LINE_UP if name != CONSTANT]

    figure, axes = new_figure("What does a schedule buy in 100 epochs?", 3)
    shown = [CONSTANT, SHARED, STEP, COSINE, ONE_CYCLE, PLATEAU]
    for arm, colour in colours(shown, CONSTANT).items():
        plot_history(axes[0], runs.epochs(arm), runs.history("validation_loss", arm), arm, colour)
    late = [runs.history("validation_loss", arm)[:, np.array(runs.epochs(arm)) >= 8] for arm in shown]
    lows, highs = ([f(np.nanmean(each, 0)) for each in late if each.size] for f in (np.nanmin, np.nanmax))
    axes[0].set(xlabel="epoch", ylabel="validation loss (nats)", xlim=(0 if lab.quick else 8, None))
    if lows:
        axes[0].set_ylim(0.9 * min(lows), 1.1 * max(highs))
    axes[0].legend(fontsize=8)
    plot_dots(axes[1], {arm: runs.gain(arm) for arm in [SHARED, *schedules]}, BLACK)
    axes[1].axvline(0, color="grey", linewidth=1)
    axes[1].set(xlabel="test accuracy against the constant rate (points)")
    for arm, colour in colours([CONSTANT, EXPONENTIAL, STEP, COSINE, ONE_CYCLE], CONSTANT).items():
        axes[2].plot(rates[arm], [100 * tuning.mean(arm, rate) for rate in rates[arm]], "o-", color=colour, label=arm)
    axes[2].set(xlabel="peak rate", ylabel="validation accuracy (%), tuning seeds", xscale="log")
    axes[2].legend(fontsize=8)
    lab.figure("hundred_epochs", figure)

    winner = runs.best(schedules)
    lab.finding(f"Best schedule on validation: {winner}, {interval(runs.gain(winner))} points over constant.")
    lab.finding(
        f"Constant at the cosine's peak rate, {rate_of(best[COSINE]):g}, instead of its own, "
        f"{rate_of(best[CONSTANT]):g}: {interval(runs.gain(SHARED))} points."
    )
    lab.claim(f"Scheduling gains 5 to 10 points (the best, {winner})", GUIDE, runs.gain(winner), above(5))
    lab.claim("Scheduling gains 5 to 10 points (cosine, clean images)", GUIDE, runs.gain(CLEAN + COSINE), above(5))
    lab.claim(
        "Cosine beats constant where both get the peak that is best for cosine",
        ADVICE,
        runs.gain(COSINE, SHARED),
        above(0.5),
    )
    lab.claim("Cosine beats constant (100 epochs, each its own peak)", ADVICE, runs.gain(COSINE), above(0.5))
    lab.claim("Decay tenfold every 30 epochs: StepLR beats constant", GUIDE, runs.gain(STEP), above(0.5))
    for arm, words in {CONSTANT: "its own", SHARED: "the cosine's peak", CLEAN + CONSTANT: "clean"}.items():
        lab.claim(f"A constant rate plateaus ({words})", GUIDE, estimate(gain_over_time(runs, arm)), below(0.5))
    lab.claim(
        "With a schedule it goes on improving (cosine)", GUIDE, estimate(gain_over_time(runs, COSINE)), above(0.5)
    )
    rest = runs.best([name for name in schedules if name != COSINE])
    lab.claim(
        f"Cosine, the default: no worse than the best other ({rest})", GUIDE, runs.gain(COSINE, rest), above(-0.5)
    )
    fewer_epochs(lab, runs)


def fewer_epochs(lab: Lab, hundred: Comparison) -> None:
    """Constant, cosine and one-cycle with smaller budgets, each with its own peak rate, beside the hundred epochs."""
    arms = {
        f"{name}, {epochs}": replace(LINE_UP[name], epochs=epochs) for epochs in BUDGETS[:-1] for name in CONTENDERS
    }
    rates = {arm: HIGH if recipe.epochs <= 10 else MIDDLE for arm, recipe in arms.items()}
    rates |= {f"{CONSTANT}, {epochs}": (0.01, *MIDDLE) for epochs in (20, 50)}
    best = tune_rates(lab, arms, rates)[1]
    runs = lab.compare(best, {arm: f"{CONSTANT}, {arm.split(', ')[1]}" for arm in best})
    figure, axes = new_figure("Which schedule for how many epochs?")
    for name, colour in colours(CONTENDERS, CONSTANT).items():
        accuracy = [points(runs.estimate("test_accuracy", f"{name}, {epochs}")) for epochs in BUDGETS[:-1]]
        accuracy.append(points(hundred.estimate("test_accuracy", name)))
        plot_estimates(axes[0], BUDGETS, accuracy, name, colour)
    log_ticks(axes[0], BUDGETS)
    axes[0].set(xlabel="epochs", ylabel="test accuracy (%)")
    axes[0].legend(loc="lower right")
    lab.figure("fewer_epochs", figure)
    for epochs in (5, 20, 50):
        lab.claim(
            f"Cosine beats constant ({epochs} epochs, each its own peak)",
            SGDR,
            runs.gain(f"{COSINE}, {epochs}"),
            above(0.5),
        )
    for epochs in (10, 20, 50):
        accuracies = (runs.values("test_accuracy", f"{ONE_CYCLE}, {epochs}"), hundred.values("test_accuracy", CONSTANT))
        statement = f"Super-convergence: one-cycle in {epochs} epochs is as good as constant in 100"
        lab.claim(statement, TOPIN, points(paired_difference(*accuracies)), above(-0.5))


# %% [markdown]
# ## 3. The noise floor
#
# Why a large constant rate gets stuck. Near the minimum each step goes wrong by the noise of its batch; the rate
# decides how much of that is kept. The theory (Mandt et al. 2017) for plain SGD and a small rate: the loss stays above
# its minimum by rate / batch size × tr Σ / 4, Σ being the covariance of one example's gradient. A convex problem makes
# that visible, because there the minimum is known: multinomial logistic regression on 8 principal components of all the
# training digits, scaled to variance 1, no momentum. No network, but the last layer of one. 30 % of the labels are
# wrong; that was chosen to get to the floor within 480 steps: a problem with a flat minimum takes longer to get down.
#
# Learnt by heart, every example has gradient zero, and so has the noise: then there is no floor, and a constant rate
# goes down for ever. That is the pair of arms without noise in experiment 2.

# %%
FLOOR_RATES, FLOOR_BATCHES, FLOOR_STEPS, FLOOR_LOOKS = (0.2, 0.4, 0.8), (5, 20, 80), 480, 40


def components(split: Split, kept: int = 8) -> Tensor:
    """The training images' first principal components, scaled to variance 1, and a constant: (N, kept + 1)."""
    x = split.train.x.flatten(1)
    u, _, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return torch.cat([u[:, :kept] * len(x) ** 0.5, torch.ones_like(u[:, :1])], 1)


def regression_loss(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats (R,) of each of R weights (R, D, K) for x (N, D) and y (N,)."""
    return torch.stack([F.cross_entropy(x @ each, y) for each in weights])


def minimum(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """The weights (1, D, K) with the lowest loss, and tr Σ there: the variance of one example's gradient, summed."""
    weights = torch.zeros(1, x.shape[1], int(y.max()) + 1, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = regression_loss(weights, x, y).sum()
        loss.backward()
        return loss

    solver.step(closure)
    residual = (x @ weights[0].detach()).softmax(1) - F.one_hot(y, weights.shape[2])
    return weights.detach(), float((x.square().sum(1) * residual.square().sum(1)).mean())


def sgd_excess(x: Tensor, y: Tensor, best: Tensor, rates: Tensor, batch: int, draw: torch.Generator) -> np.ndarray:
    """Plain SGD from zero on R copies at once, with the rates (R, steps): loss above that of the `best` weights, in
    nats, (R, FLOOR_LOOKS).
    """
    lowest = regression_loss(best, x, y)
    weights = torch.zeros_like(best).repeat(len(rates), 1, 1)
    targets = F.one_hot(y, best.shape[2])
    seen = []
    drawn = torch.randint(len(x), (rates.shape[1], batch), generator=draw).to(x.device)
    for t, i in enumerate(drawn):
        residual = (x[i] @ weights).softmax(2) - targets[i]
        weights -= rates[:, t, None, None] * (x[i].T @ residual) / batch
        if (t + 1) % (rates.shape[1] // FLOOR_LOOKS) == 0:
            seen.append(regression_loss(weights, x, y) - lowest)
    return torch.stack(seen, 1).cpu().numpy()


def floors(seed: int, steps: int, dataset: str, device: str) -> tuple[list[np.ndarray], float]:
    """For one seed: `sgd_excess` for each of FLOOR_BATCHES, with the rates FLOOR_RATES and, last, the largest of them,
    divided by ten half-way; and what the theory multiplies rate / batch size by.
    """
    split = make_split(load(dataset), seed, label_noise=0.3, device=device)
    x, y = components(split), split.train.y
    best, variance = minimum(x, y)
    rates = torch.tensor(FLOOR_RATES, device=device)[:, None].repeat(1, steps)
    dropped = rates[-1:].clone()
    dropped[:, steps // 2 :] /= 10
    rates = torch.cat([rates, dropped])
    order = derive(seed, "batches")
    seen = [sgd_excess(x, y, best, rates, batch, torch.Generator().manual_seed(order)) for batch in FLOOR_BATCHES]
    return seen, variance / 4


def noise_floor(lab: Lab) -> None:
    """Where does a constant rate get stuck, and what does a smaller one change?"""
    settings = lab.settings
    steps = FLOOR_LOOKS if lab.quick else FLOOR_STEPS
    of_seed = partial(floors, steps=steps, dataset=settings.dataset, device=settings.device)
    seen, predicted = zip(*lab.executor.map(of_seed, settings.seeds), strict=True)
    over_time = dict(zip(FLOOR_BATCHES, np.swapaxes(seen, 0, 1), strict=True))  # each (seeds, rates, looks)
    floor = {batch: each[:, :, -FLOOR_LOOKS // 4 :].mean(2) for batch, each in over_time.items()}
    rows = []
    for batch in FLOOR_BATCHES:
        for i, rate in enumerate(FLOOR_RATES):
            theory = rate / batch * estimate(predicted).mean
            rows.append([str(batch), f"{rate:g}", number(floor[batch][:, i].mean(), 4), number(theory, 4)])
    lab.table(Table("Loss above the minimum, last quarter", ["batch size", "rate", "measured", "theory"], rows))

    figure, axes = new_figure("Where does a constant rate get stuck?", 2)
    looks = (np.arange(FLOOR_LOOKS) + 1) * (steps // FLOOR_LOOKS)
    small = over_time[FLOOR_BATCHES[0]]
    for i, rate in enumerate(FLOOR_RATES):
        plot_history(axes[0], looks, small[:, i], f"rate {rate:g}", COLOURS[i])
    plot_history(axes[0], looks, small[:, -1], f"{FLOOR_RATES[-1]:g}, then a tenth", BLACK)
    axes[0].set(
        xlabel=f"step (batches of {FLOOR_BATCHES[0]})",
        ylabel="loss above the minimum (nats)",
        yscale="log",
        ylim=(0.015, 0.7),
    )
    axes[0].legend(fontsize=8, loc="lower left")
    for batch, colour in zip(FLOOR_BATCHES, COLOURS, strict=False):
        ratios = [rate / batch for rate in FLOOR_RATES]
        plot_estimates(axes[1], ratios, estimates(floor[batch][:, :-1]), f"batches of {batch}", colour)
    ends = np.array([FLOOR_RATES[0] / FLOOR_BATCHES[-1], FLOOR_RATES[-1] / FLOOR_BATCHES[0]])
    axes[1].plot(ends, ends * estimate(predicted).mean, ":", color="grey", label="theory")
    axes[1].set(xlabel="rate / batch size", ylabel="floor (nats)", xscale="log", yscale="log")
    axes[1].legend(fontsize=8)
    lab.figure("noise_floor", figure)

    logs = {batch: np.log(np.maximum(floor[batch], 1e-12)) for batch in FLOOR_BATCHES}
    by_rate = np.polyfit(np.log(FLOOR_RATES), logs[FLOOR_BATCHES[0]][:, :-1].T, 1)[0]
    by_batch = np.polyfit(np.log(FLOOR_BATCHES), np.array([logs[b][:, -2] for b in FLOOR_BATCHES]), 1)[0]
    ratio = floor[FLOOR_BATCHES[0]][:, -1] / floor[FLOOR_BATCHES[0]][:, -2]
    quarters = small[:, :-1].reshape(len(small), -1, 4, FLOOR_LOOKS // 4).mean(3)
    change = 100 * (quarters[:, :, 3] / quarters[:, :, 2] - 1).mean(1)
    lab.finding(f"The floor grows with the rate to the power {interval(estimate(by_rate), 2)}.")
    lab.finding(f"It falls with the batch size to the power {interval(estimate(by_batch), 2)}.")
    lab.claim("The floor is proportional to the rate: power 1", MANDT, estimate(by_rate), Range(0.8, 1.2), "")
    lab.claim("The floor goes as 1 / batch size: power −1", MANDT, estimate(by_batch), Range(-1.2, -0.8), "")
    lab.claim("A constant rate gets stuck: the last quarter is as the third", ADVICE, estimate(change), within(10), "%")
    lab.claim("A tenth of the rate halves the floor at least", ADVICE, estimate(100 * ratio), below(50), "%")


# %% [markdown]
# ## 4. Ten epochs
#
# Time is short: the whole line-up with 20 steps, each at its own best peak rate.


# %%
def ten_epochs(lab: Lab) -> None:
    """Which schedule for ten epochs, and does one-cycle win?"""
    arms = {name: replace(recipe, epochs=10) for name, recipe in LINE_UP.items()}
    tuning, best = tune_rates(lab, arms, dict.fromkeys(arms, HIGH))
    runs = lab.compare(best, CONSTANT)
    figure, axes = new_figure("Which schedule for ten epochs?", 2)
    plot_dots(axes[0], {arm: points(runs.estimate("test_accuracy", arm)) for arm in arms}, BLACK)
    axes[0].set(xlabel="test accuracy (%)")
    plot_grid(axes[1], tuning, 20, 90)
    axes[1].invert_yaxis()  # the order of the dots
    axes[1].set(xlabel="peak rate")
    axes[1].set_title("validation accuracy (%), tuning seeds", fontsize=10)
    lab.figure("ten_epochs", figure)
    order = sorted(arms, key=lambda arm: -runs.estimate("validation_accuracy", arm).mean)
    lab.finding(f"By validation accuracy: {' > '.join(order)}.")
    rest = runs.best([arm for arm in arms if arm != ONE_CYCLE])
    lab.claim("Time is short: one-cycle beats constant", GUIDE, runs.gain(ONE_CYCLE), above(0.5))
    lab.claim(f"Time is short: one-cycle beats the best other ({rest})", GUIDE, runs.gain(ONE_CYCLE, rest), above(0))
    lab.claim(
        "Quick experiments: StepLR is as good as the best", GUIDE, runs.gain(STEP, runs.best(list(arms))), above(-0.5)
    )
    lab.claim("Cosine beats constant (10 epochs, each its own peak)", SGDR, runs.gain(COSINE), above(0.5))


# %% [markdown]
# ## 5. The range test
#
# One short run in which the rate grows at every step, from far too small to far too large; the loss, smoothed, falls
# and then explodes. Read off a rate where it falls fastest (*steepest*), or a tenth of the rate at its minimum. The run
# costs 60 steps. We do it with the two tuning seeds, take the geometric mean, train with it, and compare with the rate
# that the whole grid finds best; for SGD, for Adam, and for one-cycle, whose peak the test was meant for.

# %%
SWEEP = np.geomspace(1e-5, 10, 60)
WIDE_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
CYCLE = "SGD one-cycle"


def range_test(recipe: Recipe, seed: int, dataset: str, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Train with a growing rate: rates and losses (nats), one per step, up to where the loss explodes. Smith 2017."""
    data = load(dataset)
    split = make_split(data, seed, recipe.examples, recipe.label_noise, device)
    torch.manual_seed(derive(seed, "start"))
    model = recipe.model(data.task).to(device).train()
    optimizer = recipe.optimizer(model.parameters())
    batch_order = torch.Generator().manual_seed(derive(seed, "batches"))
    losses: list[Tensor] = []
    while len(losses) < len(SWEEP):
        for x, y in minibatches(split.train, recipe.batch_size, batch_order):
            for group in optimizer.param_groups:
                group["lr"] = SWEEP[min(len(losses), len(SWEEP) - 1)]
            optimizer.zero_grad()
            loss = recipe.loss(model, x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return until_explosion(SWEEP, torch.stack(losses[: len(SWEEP)]).cpu().double().numpy())


def until_explosion(rates: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rates and losses up to the first loss that is four times the lowest before it; one that is not finite is out."""
    exploded = ~(losses < 4 * np.minimum.accumulate(np.nan_to_num(losses, nan=inf)))
    end = int(np.argmax(exploded)) if exploded.any() else len(losses)
    end += end < len(losses) and bool(np.isfinite(losses[end]))
    return rates[:end], losses[:end]


def smooth(losses: np.ndarray, memory: float = 0.8) -> np.ndarray:
    """Running mean that forgets: each loss weighs `memory` times the one after it; unbiased at the start."""
    steps = np.arange(len(losses))
    weights = np.tril(memory ** np.abs(steps[:, None] - steps))
    return weights @ losses / weights.sum(1)


def suggestions(rates: np.ndarray, losses: np.ndarray, skip: int = 10) -> dict[str, float]:
    """Two rates read off a range test: where the smoothed loss falls fastest, and a tenth of where it is lowest. The
    first steps, in which the running mean is still a mean of few, are skipped.

    Raises AllDivergedError if the loss exploded before there was anything to read.
    """
    if len(losses) < skip + 2:
        raise AllDivergedError(f"the range test exploded within {skip + 2} steps")
    rates, smoothed = rates[skip:], smooth(losses)[skip:]
    lowest = int(np.argmin(smoothed))
    falling = int(np.argmin(np.gradient(smoothed)[: lowest + 1]))
    return {"steepest": float(rates[falling]), "minimum / 10": float(rates[lowest] / 10)}


def range_tests(lab: Lab) -> None:
    """How far from the best rate is the one that a single short run suggests?"""
    settings, seeds = lab.settings, tuning_seeds(lab.settings.seeds, 2)
    short = replace(BASELINE, epochs=20)
    kinds = {"SGD": (short, SGD), "Adam": (short, ADAM), CYCLE: (replace(short, schedule=torch_one_cycle), SGD)}
    grids = {
        kind: {rate: at_rate(recipe, rate, optimizer) for rate in WIDE_GRID}
        for kind, (recipe, optimizer) in kinds.items()
    }
    tuning = lab.tune("Peak rate", grids, count=len(seeds))
    everyone = [*settings.seeds, *seeds]
    tests = {}
    for kind, (recipe, optimizer) in kinds.items():
        sweep = partial(range_test, at_rate(recipe, 1.0, optimizer), dataset=settings.dataset, device=settings.device)
        tests[kind] = dict(zip(everyone, lab.executor.map(sweep, everyone), strict=True))
    arms, found = {}, {}
    for kind, (recipe, optimizer) in kinds.items():
        best = tuning.best(kind)
        advice = {seed: suggestions(*test) for seed, test in tests[kind].items()}
        arms[f"{kind}, grid"] = grids[kind][best]
        for way in ("steepest", "minimum / 10"):
            found[kind, way] = np.array([math.log10(advice[seed][way] / best) for seed in settings.seeds])
            rate = float(f"{np.exp(np.mean([math.log(advice[seed][way]) for seed in seeds])):.2g}")
            arms[f"{kind}, {way}"] = at_rate(recipe, rate, optimizer)
    runs = lab.compare(arms, {arm: f"{arm.split(',')[0]}, grid" for arm in arms})
    rows = [
        [arm, f"{rate_of(recipe):g}", number(100 * runs.estimate("test_accuracy", arm).mean, 1)]
        for arm, recipe in arms.items()
    ]
    lab.table(Table("The rates, and what they lead to", ["", "peak rate", "test acc. %"], rows))

    figure, axes = new_figure("Which rate does a range test suggest?", 2)
    for kind, colour in (("SGD", COLOURS[0]), ("Adam", COLOURS[1])):
        rates, losses = tests[kind][settings.seeds[0]]
        axes[0].plot(rates, losses, ".", color=colour, alpha=0.4, markersize=4)
        axes[0].plot(rates, smooth(losses), color=colour, label=kind)
        for way, style in (("steepest", "--"), ("minimum / 10", ":")):
            axes[0].axvline(suggestions(rates, losses)[way], color=colour, linestyle=style, label=f"{kind}: {way}")
        accuracy = [100 * tuning.mean(kind, rate) for rate in WIDE_GRID]
        axes[1].plot(WIDE_GRID, accuracy, "o-", color=colour, label=f"{kind}, grid")
        for way, style in (("steepest", "--"), ("minimum / 10", ":")):
            axes[1].axvline(rate_of(arms[f"{kind}, {way}"]), color=colour, linestyle=style)
    axes[0].set(xlabel="rate of the step (first seed)", ylabel="loss of the batch (nats)", xscale="log", ylim=(0, 6))
    axes[1].set(xlabel="constant rate", ylabel="validation accuracy (%), tuning seeds", xscale="log")
    shared_legend(figure, axes[0], 3)
    lab.figure("range_tests", figure)
    for (kind, way), decades in found.items():
        lab.finding(f"{kind}, {way}: {interval(estimate(decades), 2)} decades from the grid's best, by seed.")
    for kind in kinds:
        for way, source in (("steepest", SMITH), ("minimum / 10", ADVICE)):
            gain = runs.gain(f"{kind}, {way}")
            lab.claim(f"A range test finds a rate as good as the grid's ({kind}, {way})", source, gain, above(-1))


# %% [markdown]
# ## 6. ReduceLROnPlateau at work
#
# It waits until the validation loss has stopped improving, then divides the rate by ten. 60 epochs, all with peak rate
# 0.1, where a constant rate is noisy and there is something to gain (experiment 2 gives it its own). *Never improves*
# is a common slip: `mode="max"` for a loss, so that the first epoch is the best for ever.
#
# Its case is the unknown budget: cosine has to be told beforehand. So the same for 30 epochs: a cosine planned for 30,
# a cosine planned for 60 and cut off half-way, and one planned for 15 and run on, which is another slip: PyTorch's
# cosine does not stay at zero, it comes back up. Plateau has patience 3 here.


# %%
def planned(optimizer: Optimizer, total: int, share: float) -> LRScheduler:
    """A cosine planned for a share of the steps that are really taken."""
    return torch_cosine(optimizer, part(total, share))


def drops(rates: Sequence[float]) -> list[int]:
    """The steps at which the rate went down."""
    return [t for t in range(1, len(rates)) if rates[t] < rates[t - 1]]


def plateau(lab: Lab) -> None:
    """When does ReduceLROnPlateau fire, and what does it save when the budget is unknown?"""
    long = replace(at_rate(BASELINE, 0.1), epochs=60, evaluations=2)
    half = replace(long, epochs=30)
    never = "never improves"
    waits = {f"patience {n}": partial(reduce_on_plateau, patience=n) for n in (0, 10, 25)}
    waits[never] = partial(reduce_on_plateau, mode="max")
    arms = {CONSTANT: long} | {name: replace(long, after_epoch=hook) for name, hook in waits.items()}
    arms[COSINE] = replace(long, schedule=torch_cosine)
    arms["30: cosine, planned"] = replace(half, schedule=partial(planned, share=1.0))
    arms["30: cosine, cut off"] = replace(half, schedule=partial(planned, share=2.0))
    arms["30: cosine, comes back"] = replace(half, schedule=partial(planned, share=0.5))
    arms["30: plateau"] = replace(half, after_epoch=partial(reduce_on_plateau, patience=3))
    arms["30: constant"] = half
    runs = lab.compare(arms, {arm: "30: cosine, planned" if "30: " in arm else CONSTANT for arm in arms})
    per_epoch = steps_of(long) // long.epochs
    rows = []
    for arm in waits:
        fired = [drops(run.notes.get("rate", [])) for run in runs.runs[arm]]
        first = [each[0] // per_epoch for each in fired if each]
        final = np.exp(np.mean([math.log(run.notes["rate"][-1]) for run in runs.runs[arm]]))
        never_fired = sum(not each for each in fired)
        rows.append(
            [
                arm,
                number(float(np.mean([len(each) for each in fired])), 1),
                number(estimate(first).mean, 0),
                str(never_fired),
                f"{final:.0e}",
            ]
        )
    heads = ["", "times\nfired", "first in\nepoch", "seeds where\nnever", "rate at\nthe end"]
    lab.table(Table("When it fires (means over seeds)", heads, rows))

    figure, axes = new_figure("When does ReduceLROnPlateau fire, and what is it worth?", 2)
    for arm, colour in colours(list(waits)).items():
        for run in range(len(runs.seeds)):
            rates = applied(runs, arm, run=run)
            epochs = np.arange(len(rates)) / per_epoch
            axes[0].plot(epochs, rates, color=colour, alpha=0.5, linewidth=1, label=arm if run == 0 else f"_{arm}")
    axes[0].set(xlabel="epoch", ylabel="rate applied (a line for each seed)", yscale="log")
    plot_dots(axes[1], {arm: points(runs.estimate("test_accuracy", arm)) for arm in arms}, BLACK)
    axes[1].set(xlabel="test accuracy (%)")
    shared_legend(figure, axes[0], 5)
    lab.figure("plateau", figure)
    for epochs, names in ((60, [arm for arm in arms if ": " not in arm]), (30, [arm for arm in arms if ": " in arm])):
        order = sorted(names, key=lambda arm: -runs.estimate("validation_accuracy", arm).mean)
        lab.finding(f"{epochs} epochs, by validation accuracy: {' > '.join(arm.split(': ')[-1] for arm in order)}.")
    lab.claim(
        "Patience too small (0) costs accuracy, against 10", ADVICE, runs.gain("patience 0", "patience 10"), below(-0.5)
    )
    lab.claim(
        "Patience too large (25) costs accuracy, against 10",
        ADVICE,
        runs.gain("patience 25", "patience 10"),
        below(-0.5),
    )
    lab.claim("A metric that never improves costs accuracy", ADVICE, runs.gain(never, "patience 10"), below(-0.5))
    lab.claim("When unsure: plateau (10) beats a constant rate", GUIDE, runs.gain("patience 10"), above(0.5))
    lab.claim(
        "Budget unknown: plateau beats a cosine cut off half-way",
        GUIDE,
        runs.gain("30: plateau", "30: cosine, cut off"),
        above(0.5),
    )
    lab.claim("Budget known: a planned cosine beats plateau", ADVICE, runs.gain("30: plateau"), below(-0.5))
    lab.claim("A cosine that comes back up costs accuracy", ADVICE, runs.gain("30: cosine, comes back"), below(-0.5))


# %% [markdown]
# ## 7. Adaptive methods
#
# What does a rate mean? To SGD it multiplies the gradient; to Adam it is nearly the size of a step. Six optimisers with
# 12 rates over four decades, 20 epochs each: the U-curves. Then each at its best rate against a cosine from its best
# peak, looked for around it; and the famous starting values, 1e-3 for Adam and 1e-1 for SGD, against the best.

# %%
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, fused=True),
    "momentum": SGD,
    "Nesterov": partial(SGD, nesterov=True),
    "RMSprop": torch.optim.RMSprop,
    "Adam": ADAM,
    "AdamW": partial(torch.optim.AdamW, fused=True),
}
STARTS = {"Adam": 1e-3, "SGD": 0.1, "momentum": 0.1}
TRIED = (3e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)


def optimizers(lab: Lab) -> None:
    """Which rate for which optimiser, and does an adaptive one still need a schedule?"""
    short = replace(BASELINE, epochs=20)
    grids = {name: {rate: at_rate(short, rate, optimizer) for rate in TRIED} for name, optimizer in OPTIMIZERS.items()}
    wide = lab.tune("Constant rate", grids, count=2)
    peaks = {}
    for name, optimizer in OPTIMIZERS.items():
        i = TRIED.index(wide.best(name))
        near = TRIED[max(0, i - 1) : i + 4]
        falling = replace(short, schedule=torch_cosine)
        peaks[name] = {rate: at_rate(falling, rate, optimizer) for rate in near}
    narrow = lab.tune("Peak of the cosine", peaks, count=2)
    arms = {}
    for name in OPTIMIZERS:
        arms[name] = grids[name][wide.best(name)]
        arms[f"{name}, cosine"] = peaks[name][narrow.best(name)]
        if name in STARTS:
            arms[f"{name} at {STARTS[name]:g}"] = grids[name][STARTS[name]]
    runs = lab.compare(arms, {arm: arm.split(",")[0].split(" at")[0] for arm in arms})

    figure, axes = new_figure("Which rate for which optimiser?", 2)
    for name, colour in colours(list(OPTIMIZERS)).items():
        accuracy = [100 * wide.mean(name, rate) for rate in TRIED]
        axes[0].plot(TRIED, accuracy, "o-", color=colour, label=name, markersize=4)
    axes[0].set(xlabel="constant rate", ylabel="validation accuracy (%), tuning seeds", xscale="log")
    shared_legend(figure, axes[0], 6)
    plot_dots(axes[1], {arm: runs.gain(arm) for arm in arms if arm not in OPTIMIZERS}, BLACK)
    axes[1].axvline(0, color="grey", linewidth=1)
    axes[1].set(xlabel="test accuracy against the best constant rate (points)")
    lab.figure("optimizers", figure)
    for name in OPTIMIZERS:
        top = max(wide.mean(name, rate) for rate in TRIED)
        good = [rate for rate in TRIED if wide.mean(name, rate) > top - 0.02]
        lab.finding(
            f"{name}: within 2 points of its best from {good[0]:g} to {good[-1]:g}." if good else f"{name}: none."
        )
    for name, start in STARTS.items():
        lab.claim(
            f"Start at {start:g} ({name}): as good as the best rate",
            GUIDE,
            runs.gain(f"{name} at {start:g}"),
            above(-0.5),
        )
    for name in ("momentum", "Adam", "AdamW"):
        lab.claim(f"A cosine beats the best constant rate ({name})", ADVICE, runs.gain(f"{name}, cosine"), above(0.5))
    lab.claim("Adam beats SGD with momentum, both tuned", ADVICE, runs.gain("Adam", "momentum"), above(0.5))
    lab.claim("Nesterov is better than plain momentum", ADVICE, runs.gain("Nesterov", "momentum"), above(0.5))


# %% [markdown]
# ## 8. Warm-up
#
# A transformer's residual blocks with the norm *after* the addition (post-norm) are known not to train without
# warm-up (Xiong et al. 2020). Twelve such blocks, without the attention, 24 steps, on 200 images without noise. Adam
# with rate 0.03, and with 0.01; the rate grows in a line over 0, 2, 5 or 10 steps, and stays. SGD for comparison. A run
# counts as trained when it gets half of its training digits right; chance is a tenth.


# %%
class PostNorm(nn.Module):
    """norm(x + MLP(x)): a residual block of the first transformers, without the attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(x))


def post_norm_net(task: Task, blocks: int = 12, width: int = 32) -> nn.Module:
    """A linear layer, post-norm blocks, a linear layer: (N, C, H, W) to logits (N, classes)."""
    layers = [nn.Flatten(), nn.Linear(prod(task.shape), width), *(PostNorm(width) for _ in range(blocks))]
    return nn.Sequential(*layers, nn.Linear(width, task.classes))


def warm_up(optimizer: Optimizer, total: int, steps: int) -> LRScheduler:
    """The rate in a line up to the peak, which is reached after `steps`, then constant."""
    return lr_scheduler.LambdaLR(optimizer, partial(ramp, steps=steps))


def ramp(t: int, steps: int) -> float:
    """The factor on the rate at step t."""
    return min(1.0, (t + 1) / (steps + 1))


def trained(runs: Comparison, arm: str) -> np.ndarray:
    """Which runs got half of their training images right, (seeds,); a diverged one did not."""
    return np.nan_to_num(runs.values("train_accuracy", arm)) >= 0.5


def warmup(lab: Lab) -> None:
    """Who needs warm-up, and how long?"""
    deep = replace(BASELINE, model=post_norm_net, loss=cross_entropy, epochs=6, examples=200)
    cases = [("Adam", ADAM, 0.03, (0, 2, 5, 10)), ("Adam", ADAM, 0.01, (0, 5)), ("SGD", SGD, 0.1, (0, 5))]
    arms = {}
    for name, optimizer, rate, lengths in cases:
        for steps in lengths:
            schedule = partial(warm_up, steps=steps)
            arms[f"{name} {rate:g}, {steps} steps"] = replace(at_rate(deep, rate, optimizer), schedule=schedule)
    runs = lab.compare(arms, {arm: f"{arm.split(',')[0]}, 0 steps" for arm in arms})
    shares = {arm: proportion(trained(runs, arm)) for arm in arms}
    lab.table(
        Table(
            "Seeds that train", ["arm", "share"], [[arm, f"{100 * share.mean:.0f} %"] for arm, share in shares.items()]
        )
    )
    figure, axes = new_figure("How long a warm-up?", 2)
    for name, rate, lengths, colour in [(n, r, s, COLOURS[i]) for i, (n, _, r, s) in enumerate(cases)]:
        accuracy = [points(runs.estimate("test_accuracy", f"{name} {rate:g}, {steps} steps")) for steps in lengths]
        plot_estimates(axes[0], lengths, accuracy, f"{name}, rate {rate:g}", colour)
    axes[0].set(xlabel="steps of warm-up, of 24", ylabel="test accuracy (%)", ylim=(0, 100))
    axes[0].legend()
    for steps, colour in zip(cases[0][3], [BLACK, *COLOURS], strict=False):
        axes[1].plot(applied(runs, f"Adam 0.03, {steps} steps"), color=colour, label=f"{steps} steps")
    axes[1].set(xlabel="step", ylabel="rate applied")
    axes[1].legend()
    lab.figure("warmup", figure)
    bare = shares["Adam 0.03, 0 steps"]
    longest = [f"Adam 0.03, {steps} steps" for steps in cases[0][3]]
    best = runs.best(longest)
    lab.finding(f"Adam, rate 0.03: best on validation {best.split(', ')[1]} of warm-up.")
    lab.claim("Without warm-up it does not train (Adam, 0.03)", XIONG, bare, below(0.5), "")
    lab.claim("With warm-up it does (Adam, 0.03, 10 steps)", XIONG, shares["Adam 0.03, 10 steps"], above(0.5), "")
    lab.claim(
        "Too short is not enough: 2 steps are worse than 10",
        ADVICE,
        runs.gain("Adam 0.03, 2 steps", "Adam 0.03, 10 steps"),
        below(-0.5),
    )
    lab.claim(
        "At a smaller rate nothing is left to gain (Adam, 0.01, 5 steps)",
        ADVICE,
        runs.gain("Adam 0.01, 5 steps"),
        within(1),
    )
    lab.claim("SGD gains from it, too (0.1, 5 steps)", GOYAL, runs.gain("SGD 0.1, 5 steps"), above(0.5))
    lower, higher = runs.best(["Adam 0.01, 0 steps"]), best
    lab.claim("What it allows is better than a smaller rate without it", ADVICE, runs.gain(higher, lower), above(0.5))


# %% [markdown]
# ## 9. Traps
#
# Six slips that raise no error. 100 digits in batches of 10, so that an epoch is 10 steps, and 10 epochs; one rate for
# all. Each figure shows the rate that was applied in grey, and dashed the one that was meant.
#
# 1. *Per batch*: a cosine that counts 10 epochs, stepped after every batch. It is at zero after 10 batches, comes back
#    up, and so on.
# 2. *Per epoch*: a one-cycle that counts 100 batches, stepped after every epoch. It never gets beyond its warm-up.
# 3. *Plotted first*: the scheduler is stepped through to draw it, then given to the training, exhausted.
# 4. *Two schedulers*: a StepLR and a cosine on one optimiser. Each multiplies what it finds, so their factors do, too.
#    (OneCycleLR computes its rate afresh, and wins over whatever was stepped before it.)
# 5. *Step first*: `scheduler.step()` before `optimizer.step()`. The first rate is skipped, and PyTorch says so.
# 6. *Resumed*: training is interrupted half-way and taken up from a checkpoint that holds model and optimiser, but not
#    the scheduler. With the scheduler's state it goes on as if nothing had happened: the same weights, exactly.

# %%
TRAP = replace(BASELINE, epochs=10, batch_size=10)


def counting_epochs(optimizer: Optimizer, total: int, epochs: int = TRAP.epochs) -> LRScheduler:
    """A cosine made for so many epochs, whatever is counted."""
    return torch_cosine(optimizer, epochs)


def counting_batches(optimizer: Optimizer, total: int, batches: int = steps_of(TRAP)) -> LRScheduler:
    """A one-cycle made for so many batches, whatever is counted."""
    return torch_one_cycle(optimizer, batches)


def plotted_first(optimizer: Optimizer, total: int) -> LRScheduler:
    """A StepLR that has been stepped through to draw its curve. (The optimiser's steps have no gradients yet and do
    nothing; they are what keeps PyTorch from complaining.)
    """
    scheduler = torch_step(optimizer, total)
    for _ in range(total):
        optimizer.step()
        scheduler.step()
    return scheduler


def two_schedulers(optimizer: Optimizer, total: int) -> LRScheduler:
    """A StepLR and a cosine, both stepped after every batch."""
    both = [torch_step(optimizer, total), torch_cosine(optimizer, total)]
    return lr_scheduler.ChainedScheduler(both, optimizer)


def wrong_order(total: int = 5) -> tuple[list[float], list[float], str]:
    """Rates of an exponential schedule in the right order and in the wrong one, and PyTorch's warning."""
    rates: list[list[float]] = [[], []]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first, seen in zip((False, True), rates, strict=True):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
            for _ in range(total):
                if first:
                    scheduler.step()
                seen.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if not first:
                    scheduler.step()
    return *rates, str(caught[0].message).split(". ")[0] if caught else "nothing"


EVERYTHING = ("model", "optimizer", "schedule", "order")


def train_part(
    recipe: Recipe,
    seed: int,
    epochs: int,
    checkpoint: dict[str, Any] | None = None,
    keep: Sequence[str] = EVERYTHING,
    dataset: str = "digits",
    device: str = "cpu",
) -> tuple[dict[str, Any], list[float], float]:
    """Train for some epochs as `fit` does, from the start or from a checkpoint of which only the parts in `keep` are
    loaded. Returns a checkpoint, the rate of each step and the test accuracy (0…1).
    """
    data = load(dataset)
    split = make_split(data, seed, recipe.examples, recipe.label_noise, device)
    torch.manual_seed(derive(seed, "start"))
    model = recipe.model(data.task).to(device)
    optimizer = recipe.optimizer(model.parameters())
    schedule = recipe.schedule(optimizer, steps_of(recipe))
    order = torch.Generator().manual_seed(derive(seed, "batches"))
    if checkpoint:
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            if name in keep:
                part.load_state_dict(deepcopy(checkpoint[name]))
        order.set_state(checkpoint["order"])
    rates = []
    for _ in range(epochs):
        for x, y in minibatches(split.train, recipe.batch_size, order):
            optimizer.zero_grad()
            recipe.loss(model, x, y).backward()
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = {name: deepcopy(part.state_dict()) for name, part in parts.items()} | {"order": order.get_state()}
    return saved, rates, evaluate(model, split.test)[1]


WAYS = {"with the scheduler": EVERYTHING, "without the scheduler": ("model", "optimizer")}


def interrupt(recipe: Recipe, seed: int, dataset: str, device: str) -> dict[str, tuple[float, list[float], float]]:
    """Train without a break, and with one after half the epochs, resumed in each of WAYS: the test accuracy (0…1), the
    rates of all steps, and the largest difference of a weight from the unbroken run's.
    """
    train = partial(train_part, recipe, seed, dataset=dataset, device=device)
    half = recipe.epochs // 2
    whole, rates, right = train(recipe.epochs)
    ended = {"uninterrupted": (right, rates, 0.0)}
    broken, first, _ = train(half)
    for way, keep in WAYS.items():
        end, second, right = train(recipe.epochs - half, checkpoint=broken, keep=keep)
        apart = [float((end["model"][name] - whole["model"][name]).abs().max()) for name in whole["model"]]
        ended[way] = right, first + second, max(apart)
    return ended


def traps(lab: Lab) -> None:
    """Which slips with a scheduler raise no error, and what do they cost?"""
    by_batch = replace(TRAP, schedule_every="batch")
    by_epoch = replace(TRAP, schedule_every="epoch")
    trained = lab.sized({"": TRAP})[""]
    for_epochs = partial(counting_epochs, epochs=trained.epochs)
    for_batches = partial(counting_batches, batches=steps_of(trained))
    meant = {
        "per batch": "right: cosine",
        "per epoch": "right: one-cycle",
        "plotted first": "right: StepLR",
        "two schedulers": "right: StepLR",
    }
    arms = {
        "right: cosine": replace(by_epoch, schedule=for_epochs),
        "per batch": replace(by_batch, schedule=for_epochs),
        "right: one-cycle": replace(by_batch, schedule=for_batches),
        "per epoch": replace(by_epoch, schedule=for_batches),
        "right: StepLR": replace(by_batch, schedule=torch_step),
        "two schedulers": replace(by_batch, schedule=two_schedulers),
        "plotted first": replace(by_batch, schedule=plotted_first),
    }
    runs = lab.compare(arms, {arm: meant.get(arm, arm) for arm in arms})
    recipe = replace(TRAP, schedule=torch_cosine, loss=cross_entropy, epochs=2 if lab.quick else 6)
    broken = partial(interrupt, recipe, dataset=lab.settings.dataset, device=lab.settings.device)
    ended = list(lab.executor.map(broken, lab.settings.seeds))
    resumed = {way: [each[way][0] for each in ended] for way in ended[0]}
    resumed_rates = {way: ended[0][way][1] for way in ended[0]}
    moved = {way: max(each[way][2] for each in ended) for way in ended[0]}
    rows = [
        [way, number(100 * each.mean, 1), f"{moved[way]:.0e}"]
        for way, each in ((way, estimate(values)) for way, values in resumed.items())
    ]
    heads = ["", "test\nacc. %", "largest difference\nof a weight"]
    lab.table(Table("Interrupted half-way (means over seeds)", heads, rows))
    right, wrong, warning = wrong_order()
    rows = [[name, *(f"{each:g}" for each in rates)] for name, rates in (("right", right), ("step first", wrong))]
    lab.table(Table("Step first: the rates applied", ["order", *map(str, range(1, len(right) + 1))], rows))

    figure, axes = new_figure("Which slips with a scheduler raise no error?", 3, 2)
    for ax, (name, right_way) in zip(axes, meant.items(), strict=False):
        ax.plot(applied(runs, name), color=COLOURS[7], linewidth=4, label="applied")
        ax.plot(applied(runs, right_way), color=BLACK, linestyle="--", linewidth=1.2, label="meant")
        ax.set_title(name)
    axes[4].plot(resumed_rates["without the scheduler"], color=COLOURS[7], linewidth=4)
    axes[4].plot(resumed_rates["uninterrupted"], color=BLACK, linestyle="--", linewidth=1.2)
    axes[4].set_title("resumed without its state")
    for ax in axes[:5]:
        ax.set(xlabel="step", ylabel="rate applied")
    costs = {name: runs.gain(name) for name in meant}
    costs["resumed"] = points(paired_difference(resumed["without the scheduler"], resumed["uninterrupted"]))
    plot_dots(axes[5], costs, BLACK)
    axes[5].axvline(0, color="grey", linewidth=1)
    axes[5].set(xlabel="test accuracy against the right way (points)")
    shared_legend(figure, axes[0])
    lab.figure("traps", figure)

    lab.finding(f"Step first: PyTorch warns: {warning}.")
    lab.finding(f"Resumed with the scheduler's state: weights differ by {moved['with the scheduler']:.0e}.")
    for name, cost in costs.items():
        lab.claim(f"The slip costs accuracy ({name})", ADVICE, cost, below(-0.5))


# %% [markdown]
# ## What we saw, where it fails
#
# The run ends with a list of all claims by verdict, each with the effect that decided it. It is computed, not written:
# change a setting, run again, and read whether it still says the same.
#
# ## Exercises
#
# Each is one changed line; the answers, each from a run, are in `exercises/18_learning_rate_scheduling.md`.
#
# 1. Twice the noise: `F.cross_entropy(model(x + 2 * torch.randn_like(x)), y)` in `noisy_images`, then `--only
#    hundred_epochs`. Does a schedule gain more where the floor is higher?
# 2. Is it the warm-up that holds one-cycle back in ten epochs? `OneCycleLR(optimizer, peak, total, pct_start=0.1)` in
#    the last line of `torch_one_cycle`, then `--only ten_epochs`.
# 3. Give the optimisers 100 epochs: `short = replace(BASELINE, epochs=100)` in `optimizers`, then `--only optimizers`.
#    Is 1e-3 a good start for Adam now?
# 4. Norm first: `return x + self.mlp(self.norm(x))` in `PostNorm`, then `--only warmup`. Who needs warm-up now?

# %%
EXPERIMENTS = [shapes, hundred_epochs, noise_floor, ten_epochs, range_tests, plateau, optimizers, warmup, traps]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the lesson; in a notebook, `main(["--quick"])` is a smoke run."""
    run_lesson(LESSON, TITLE, EXPERIMENTS, LARGER, arguments)


if __name__ == "__main__":
    main()
