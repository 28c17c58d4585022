# %% [markdown]
# # Lesson 15: Regularisation techniques, compared fairly
#
# **The question.** A network that is large enough learns its training set by heart, mistakes included. There are a
# dozen weapons against that. Which of them pays, how strong must it be, and at what price?
#
# **You will learn** to detect overfitting and to tell it from a loss that rises for another reason; to write, in a few
# lines each, an L2 penalty, decoupled weight decay, an L1 step that makes real zeros, label smoothing, mixup,
# augmentation, early stopping and an ensemble; to choose a strength; and what happens when you use several at once.
#
# **You need** lesson 14 (dropout, which takes part here) and the data that it used: 1,797 handwritten digits that come
# with scikit-learn. A run takes about a minute on two CPU cores; see `results/` for the reference run.
#
# **Papers.** Loshchilov & Hutter 2019, *Decoupled weight decay regularization* (arXiv 1711.05101); Prechelt 1998,
# *Early stopping, but when?*; Zhang et al. 2018, *mixup* (arXiv 1710.09412); Szegedy et al. 2016, *Rethinking the
# Inception architecture* (label smoothing, arXiv 1512.00567); Lakshminarayanan et al. 2017, *Simple and scalable
# predictive uncertainty estimation using deep ensembles* (arXiv 1612.01474); Zhang et al. 2017, *Understanding deep
# learning requires rethinking generalization* (arXiv 1611.03530).

# %%
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import inf, nan, prod, radians
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from common.first.cli import run_lesson
from common.first.data import Batch, Dataset, Split, Task, load, make_split, minibatches
from common.first.experiment import Comparison
from common.first.lab import Lab, Larger
from common.first.plotting import BASELINE as BLACK
from common.first.plotting import (
    COLOURS,
    log_ticks,
    new_figure,
    plot_curves,
    plot_dots,
    plot_estimates,
    plot_grid,
    shared_legend,
)
from common.first.report import Table, interval, loss, number, signed
from common.first.statistics import (
    above,
    below,
    calibration_error,
    estimate,
    estimates,
    paired_difference,
    points,
    reliability,
)
from common.first.training import Recipe, State, cross_entropy, evaluate

LESSON = "15_regularization_techniques_detailed"
TITLE = "Lesson 15: Regularisation techniques, compared fairly"

# %% [markdown]
# ## The mechanisms, from scratch
#
# A technique can enter a training step at four places, and a `Recipe` has a slot for each: the **loss** (a penalty,
# other labels, other images), the **optimiser** (decay), what is done **after a step** (the proximal step of L1), what
# is done **after an epoch** (early stopping); and there is the **model** itself (dropout, an ensemble).
#
# First the penalties. L2 adds λ/2 · ‖w‖² to the loss, so that its gradient adds λw. Weight decay instead takes a share
# of each weight off, next to the step. For plain SGD these are the same; for Adam they are not, because Adam divides
# the penalty's gradient, too, by the size of recent gradients. Experiment 4 shows both.


# %%
def l2_penalised(model: nn.Module, x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Cross-entropy plus strength / 2 times the squared norm of all parameters, biases included, as torch.optim's
    `weight_decay` does it for SGD and Adam.
    """
    return cross_entropy(model, x, y) + strength / 2 * sum(p.square().sum() for p in model.parameters())


@torch.no_grad()
def shrink(optimizer: Optimizer, *_: Any) -> None:
    """Take lr × decay of itself off every parameter: decoupled weight decay, as torch.optim.AdamW does it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.mul_(1 - group["lr"] * group["decay"])


def decoupled(params: Iterable[nn.Parameter], base: Callable[..., Optimizer], decay: float) -> Optimizer:
    """The optimiser `base`, with decoupled decay right before each of its steps. Loshchilov & Hutter 2019, with
    PyTorch's convention that the decay is multiplied by the learning rate. A parameter group may set its own "decay".
    """
    optimizer = base(params)
    for group in optimizer.param_groups:
        group.setdefault("decay", decay)
    optimizer.register_step_pre_hook(shrink)
    return optimizer


def weights_only(params: Iterable[nn.Parameter], base: Callable[..., Optimizer], decay: float) -> Optimizer:
    """`decoupled`, but biases and the gains of norms, which have one axis, are in a parameter group without decay."""
    params = list(params)
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return decoupled([{"params": matrices}, {"params": vectors, "decay": 0.0}], base, decay)


def l1_penalised(model: nn.Module, x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Cross-entropy plus strength times the sum of |w| over the weight matrices: autograd takes its subgradient."""
    return cross_entropy(model, x, y) + strength * sum(p.abs().sum() for p in model.parameters() if p.ndim > 1)


def soft_threshold(w: Tensor, threshold: float) -> Tensor:
    """Move each element (any shape) towards zero by `threshold`, and stop there: the proximal operator of |w|."""
    return w.sign() * (w.abs() - threshold).clamp_min(0)


@torch.no_grad()
def proximal_l1(state: State, strength: float) -> None:
    """After a step on the plain loss: soft-threshold the weight matrices by lr × strength."""
    for p in state.model.parameters():
        if p.ndim > 1:
            p.copy_(soft_threshold(p, state.optimizer.param_groups[0]["lr"] * strength))


# %% [markdown]
# Then what changes labels and images. Label smoothing mixes the label with the uniform distribution; mixup mixes
# whole examples, images and labels alike; augmentation moves, turns and adds noise, with another draw for each image,
# all of it in a few tensor operations on the batch's device.


# %%
def smoothed(model: nn.Module, x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Cross-entropy against labels of which a share `strength` is spread over all classes. Szegedy et al. 2016."""
    log_p = model(x).log_softmax(1)
    return (1 - strength) * F.nll_loss(log_p, y) - strength * log_p.mean()


def mixup(model: nn.Module, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Cross-entropy on images mixed pairwise, share · x + (1 − share) · x′, and on labels mixed likewise; one share for
    the batch, drawn from Beta(alpha, alpha). Zhang et al. 2018.
    """
    share = float(Beta(alpha, alpha).sample())
    partner = torch.randperm(len(y), device=y.device)
    logits = model(share * x + (1 - share) * x[partner])
    return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[partner])


def augment(x: Tensor, shift: float = 0.0, turn: float = 0.0, noise: float = 0.0, mirror: bool = False) -> Tensor:
    """A changed copy of square images x (N, C, H, W), another draw for each image.

    shift: pixels, at most, in each direction. turn: degrees, at most, either way. noise: standard deviation of Gaussian
    noise, in the images' own unit. mirror: flip half of the images left to right. What comes in from outside has the
    image's darkest value: on standardised images zero would be grey.
    """
    n, _, _, width = x.shape
    if mirror:
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    if shift or turn:
        angle = radians(turn) * (2 * torch.rand(n, device=x.device) - 1)
        move = 2 / width * shift * (2 * torch.rand(n, 2, device=x.device) - 1)  # a grid spans −1…1
        cos, sin = angle.cos(), angle.sin()
        rows = torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)
        grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
        background = x.amin((2, 3), keepdim=True)
        x = F.grid_sample(x - background, grid, align_corners=False) + background
    return x + noise * torch.randn_like(x) if noise else x


def augmented(model: nn.Module, x: Tensor, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Cross-entropy on changed images."""
    return cross_entropy(model, change(x), y)


def jitter(x: Tensor, strength: float) -> Tensor:
    """Shift, turn and noise in one number: at strength 1 up to a pixel, up to 15°, and a deviation of 0.3."""
    return augment(x, shift=strength, turn=15 * strength, noise=0.3 * strength)


# %% [markdown]
# Early stopping looks at validation data after each epoch, keeps a copy of the best weights, and puts them back.
# The copy must be deep: `state_dict()` returns the very tensors that the optimiser goes on changing, and a shallow copy
# of the dictionary would restore the LAST weights without an error. An ensemble trains several networks, each from its
# own start, and averages their probabilities.


# %%
def stop_early(state: State, patience: int) -> bool:
    """After an epoch: stop once the validation loss has had no new minimum for `patience` epochs, or at the last one,
    and restore the weights of the minimum.
    """
    notes = state.notes
    validation_loss, _ = evaluate(state.model, state.split.validation)
    if validation_loss < notes.get("lowest", inf):
        notes |= {"lowest": validation_loss, "kept": state.epoch, "weights": deepcopy(state.model.state_dict())}
    stop = state.epoch - notes.get("kept", 0) >= patience or state.epoch == state.epochs
    if stop and "weights" in notes:
        state.model.load_state_dict(notes.pop("weights"))
    return stop


class Ensemble(nn.Module):
    """Networks from `build` that share nothing but the batches; the first has the start that it would have alone."""

    def __init__(self, build: Callable[[], nn.Module], members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(build() for _ in range(members))

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the members' mean probabilities, (N, classes): these serve as logits."""
        return torch.stack([member(x).softmax(1) for member in self.members]).mean(0).clamp_min(1e-30).log()


def each_alone(
    model: Ensemble, x: Tensor, y: Tensor, loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
) -> Tensor:
    """The sum of the members' own losses: no member feels the others."""
    return sum(loss(member, x, y) for member in model.members)


def mlp(task: Task, width: int = 256, p: float = 0.0) -> nn.Module:
    """One hidden ReLU layer of `width` units, with dropout if p > 0: (N, C, H, W) to logits (N, classes)."""
    hidden = [nn.Flatten(), nn.Linear(prod(task.shape), width), nn.ReLU()]
    return nn.Sequential(*hidden, *([nn.Dropout(p)] if p else []), nn.Linear(width, task.classes))


def ensemble(task: Task, members: int, p: float = 0.0) -> nn.Module:
    """An `Ensemble` of networks of the usual kind."""
    return Ensemble(partial(mlp, task, p=p), members)


# %% [markdown]
# ## What is held fixed
#
# 200 training digits, a fifth of them with a wrong label, and a network that has room for all of them. As in lesson 14,
# size and label noise were chosen to make overfitting visible; validation and test labels are right. So was the rate:
# with 1e-2 most wrong labels are learned by heart when a run ends. All arms share it, except where experiments 1 and 3
# to 6 say otherwise. What was cut to fit ten experiments into a minute: networks have one hidden layer, runs have 48
# steps, strengths are chosen from three or four candidates with four seeds. Verdicts are about this budget.

# %%
RATE, STEPS, SIZE = 1e-2, 48, 200
ADAM = partial(torch.optim.Adam, lr=RATE, fused=True)
BASELINE = Recipe(
    model=mlp, optimizer=ADAM, epochs=STEPS * 50 // SIZE, batch_size=50, examples=SIZE, label_noise=0.2, evaluations=4
)
# On every data set but the digits: so many times as many training images and epochs, and the seeds of a run. At 1 and 1
# nothing but the data differs; set them higher if you have the time, or a GPU.
LARGER = Larger(examples=1, epochs=1, seeds=10)
GUIDE, ADVICE = "study guide", "common advice"  # rules that come without a measurement
ADAMW, PRECHELT = "Loshchilov & Hutter 2019", "Prechelt 1998"
DEEP_ENSEMBLES, MIXUP = "Lakshminarayanan et al. 2017", "Zhang et al. 2018"


def at_size(size: int) -> Recipe:
    """The baseline with another number of training examples and the same number of steps."""
    return replace(BASELINE, examples=size, epochs=STEPS * 50 // size)


def adam(rate: float) -> partial:
    """Adam at another rate."""
    return partial(torch.optim.Adam, lr=rate, fused=True)


# %% [markdown]
# ## 1. Detect it
#
# "Training loss down, validation loss up: overfitting." We look for the epoch at which the validation loss turns, seed
# by seed, and ask what happens to *accuracy* from there. The two need not agree: cross-entropy punishes a wrong answer
# the more, the surer it was, and a network that separates its training set goes on getting surer. The third curve was
# chosen, with other seeds, to show that: few digits, rightly labelled, a high rate, twice as many steps.


# %%
SIZES, WIDTHS = (50, 100, 200, 400, 800), (4, 16, 64, 256)


def turning_epoch(history: dict[str, list[float]], patience: int = 3) -> float:
    """The epoch of the lowest validation loss, if at least `patience` measurements follow and the training loss
    is lower at the end than there; NaN if the run did not overfit by this rule.
    """
    train, validation = history["train_loss"], history["validation_loss"]
    turn = int(np.argmin(validation))
    overfits = len(validation) - 1 - turn >= patience and train[-1] < train[turn]
    return float(history["epoch"][turn]) if overfits else nan


def since_best(runs: Comparison, metric: str, arm: str) -> np.ndarray:
    """How much the metric has changed since the epoch of the lowest validation loss, (seeds,)."""
    return runs.values(metric, arm) - runs.values(f"best_{metric}", arm)


def detect(lab: Lab) -> None:
    """When does a network begin to overfit, is it then worse, and how does the gap depend on data and width?"""
    wrong, right, rising = "wrong labels", "right labels", "right, 100, rate 0.03"
    curves = {
        wrong: BASELINE,
        right: replace(BASELINE, label_noise=0.0),
        rising: replace(BASELINE, label_noise=0.0, examples=100, epochs=48, optimizer=adam(0.03)),
    }
    arms = {arm: replace(recipe, evaluations=min(recipe.epochs, 24)) for arm, recipe in curves.items()}
    by_size = {wrong if size == SIZE else f"{size} images": size for size in SIZES}
    by_width = {wrong if width == 256 else f"width {width}": width for width in WIDTHS}
    arms |= {arm: at_size(size) for arm, size in by_size.items() if arm != wrong}
    arms |= {arm: replace(BASELINE, model=partial(mlp, width=width)) for arm, width in by_width.items() if arm != wrong}
    runs = lab.compare(arms, wrong)

    turns = {arm: [turning_epoch(run.history) for run in runs.runs[arm] if run.history] for arm in curves}
    title = "The epoch from which validation loss rises, by seed (–: it does not)"
    rows = [[arm, *(number(turn, 0) for turn in each)] for arm, each in turns.items()]
    lab.table(Table(title, ["arm", *map(str, lab.settings.seeds)], rows))
    for arm, each in turns.items():
        rise = estimate(since_best(runs, "validation_loss", arm))
        change = points(estimate(since_best(runs, "test_accuracy", arm)))
        lab.finding(
            f"{arm}: {sum(turn == turn for turn in each)} of {len(each)} runs turn. Since its minimum, validation "
            f"loss has risen by {interval(rise, 2)} nats, and test accuracy changed by {interval(change)} points."
        )

    figure, axes = new_figure("When does it overfit, and is it then worse?", 2, 2)
    shown = Comparison(runs.seeds, {arm: arms[arm] for arm in curves}, dict.fromkeys(curves, wrong), runs.runs)
    plot_curves(axes[0], shown, "train_loss", "--", legend=False)
    plot_curves(axes[0], shown, "validation_loss")
    plot_curves(axes[1], shown, "validation_accuracy", unit=100)
    axes[0].set(ylabel="loss in nats (dashed: training)", ylim=(0, 1.4))
    axes[1].set(ylabel="validation accuracy (%)", ylim=(60, 100))
    axes[1].legend(frameon=False, loc="lower right")
    for ax, group, label in ((axes[2], by_size, "training examples"), (axes[3], by_width, "hidden units")):
        x = list(group.values())
        errors = [estimate(1 - runs.values("test_accuracy", arm)) for arm in group]
        plot_estimates(ax, x, [runs.estimate("gap", arm) for arm in group], "gap (nats)", COLOURS[1])
        plot_estimates(ax, x, errors, "test errors (share)", COLOURS[0])
        log_ticks(ax, x)
        ax.set(xlabel=f"{label} (wrong labels)", ylabel="gap in nats, share of errors")
        ax.legend(frameon=False)
    lab.figure("detect", figure)

    for arm in curves:
        change = points(estimate(since_best(runs, "test_accuracy", arm)))
        lab.claim(f"Train loss ↓ + validation loss ↑ = worse predictions ({arm})", GUIDE, change, below(-0.5))
    lab.claim(f"Validation loss ↑, yet accuracy still improves ({rising})", ADVICE, change, above(0))
    gap = runs.difference("gap", "800 images", "50 images")
    lab.claim("More data, a smaller gap (800 against 50 images)", GUIDE, gap, below(0), "nats")
    gap = runs.difference("gap", wrong, "width 4")
    lab.claim("A wider network, a larger gap (256 against 4)", ADVICE, gap, above(0), "nats")
    worse = runs.gain(wrong, "width 16")
    lab.claim("The wider network predicts worse (256 against 16)", ADVICE, worse, below(-0.5))


# %% [markdown]
# ## 2. The line-up
#
# Every technique gets the strength that validation prefers, from a printed grid and with seeds that are not reported;
# then all meet on the same splits, starts and batches. An ensemble has no strength but a price, and five members. Time
# in training counts everything that happens in it: early stopping pays for its looks at validation data. Mind that it
# also profits from them: 397 rightly labelled images are more than it trains on. Experiment 7 takes them away.
#
# One row is no technique but a control. The baseline's rate was chosen because it overfits; a lower one learns less by
# heart in 48 steps. What can a technique do that this cannot?


# %%
MEMBERS = 5
GRIDS = {
    "L2 penalty": {s: replace(BASELINE, loss=partial(l2_penalised, strength=s)) for s in (0.01, 0.03, 0.1, 0.3)},
    "weight decay": {
        s: replace(BASELINE, optimizer=partial(decoupled, base=ADAM, decay=s)) for s in (1.0, 3.0, 10.0, 30.0)
    },
    "L1, proximal": {s: replace(BASELINE, after_step=partial(proximal_l1, strength=s)) for s in (0.03, 0.1, 0.3, 1.0)},
    "dropout": {p: replace(BASELINE, model=partial(mlp, p=p)) for p in (0.3, 0.5, 0.7, 0.9)},
    "early stopping": {n: replace(BASELINE, after_epoch=partial(stop_early, patience=n)) for n in (1, 2, 4, 8)},
    "augmentation": {
        s: replace(BASELINE, loss=partial(augmented, change=partial(jitter, strength=s)))
        for s in (0.25, 0.5, 0.75, 1.0)
    },
    "smoothing": {s: replace(BASELINE, loss=partial(smoothed, strength=s)) for s in (0.3, 0.6, 0.9, 0.95)},
    "mixup": {a: replace(BASELINE, loss=partial(mixup, alpha=a)) for a in (1.0, 4.0, 16.0, 64.0)},
    "lower rate": {rate: replace(BASELINE, optimizer=adam(rate)) for rate in (0.0003, 0.001, 0.003, 0.01)},
}
# What validation chose from these grids with the default settings; experiments 4, 8 and 10 go on with it.
STRENGTH = {"weight decay": 3.0, "dropout": 0.7, "augmentation": 0.75, "early stopping": 8}


def inference_time(model: nn.Module, split: Split) -> dict[str, Any]:
    """The shortest of 20 passes over the test images, in seconds."""
    model.eval()
    taken = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            model(split.test.x).argmax(1).tolist()  # tolist waits for a GPU
            taken.append(time.perf_counter() - start)
    return {"inference": min(taken)}


def line_up(lab: Lab) -> None:
    """Which technique helps most, each at its best strength, and what does it cost?"""
    tuning = lab.tune("Strength", GRIDS)
    chosen = {technique: tuning.best(technique) for technique in GRIDS}
    arms = {"none": BASELINE} | {technique: GRIDS[technique][best] for technique, best in chosen.items()}
    several = f"ensemble of {MEMBERS}"
    arms[several] = replace(BASELINE, model=partial(ensemble, members=MEMBERS), loss=each_alone)
    runs = lab.compare(arms, "none", inference_time)

    seconds = {arm: runs.estimate("seconds", arm).mean for arm in arms}
    inference = {arm: estimate(runs.notes("inference", arm)).mean for arm in arms}
    rows = []
    for arm in arms:
        losses = [loss(runs.estimate(metric, arm).mean) for metric in ("train_loss", "validation_loss")]
        accuracy = number(100 * runs.estimate("test_accuracy", arm).mean, 1)
        gain = "baseline" if arm == "none" else interval(runs.gain(arm))
        price = [number(times[arm] / times["none"], 1) + "×" for times in (seconds, inference)]
        strength = f"{chosen[arm]:g}" if arm in chosen else "–"
        rows.append([arm, strength, *losses, signed(runs.estimate("gap", arm).mean), accuracy, gain, *price])
    heads = ["technique", "at", "train\nloss", "val.\nloss", "gap", "test\nacc. %", "gain over\nnone, points"]
    lab.table(Table("What it brings, what it costs", [*heads, "train\ntime", "test\ntime"], rows))
    others = [arm for arm in arms if arm != "none"]
    best = runs.best(others)
    lab.finding(f"Best on validation: {best}, {interval(runs.gain(best))} points on test.")

    figure, (left, right) = new_figure("Which weapon pays, and at what price?", 2)
    order = sorted(others, key=lambda arm: -np.nan_to_num(runs.gain(arm).mean))
    plot_dots(left, {arm: runs.gain(arm) for arm in order}, COLOURS[0])
    left.axvline(0, color=BLACK, linewidth=1)
    left.set(xlabel="gain over none (points of test accuracy)")
    for times, shift, label in ((seconds, -0.2, "training"), (inference, 0.2, "inference")):
        bars = [times[arm] / times["none"] for arm in order]
        right.barh(np.arange(len(order)) + shift, bars, 0.4, color=COLOURS[1 if shift < 0 else 2], label=label)
    right.axvline(1, color=BLACK, linewidth=1)
    right.set_yticks(range(len(order)), [""] * len(order))
    right.set(ylim=left.get_ylim(), xlabel="time, as a multiple of none's")
    right.legend(frameon=False)
    lab.figure("line_up", figure)

    for arm, statement, source in (
        ("L2 penalty", "L2, the default choice, helps", GUIDE),
        ("weight decay", "Decoupled weight decay helps", ADAMW),
        ("L1, proximal", "L1 helps", GUIDE),
        ("dropout", "Dropout helps a large network", GUIDE),
        ("early stopping", "Early stopping helps", GUIDE),
        ("augmentation", "Data augmentation helps", GUIDE),
        ("smoothing", "Label smoothing helps", "Szegedy et al. 2016"),
        ("mixup", "mixup helps", MIXUP),
        (several, "An ensemble helps", DEEP_ENSEMBLES),
    ):
        lab.claim(statement, source, runs.gain(arm), above(0.5))
    learned = points(runs.difference("train_accuracy", "mixup"))
    lab.claim("mixup holds back the memorising of wrong labels", MIXUP, learned, below(-0.5))
    better = runs.gain("weight decay", "L2 penalty")
    lab.claim("With Adam, decoupled decay beats the L2 penalty, each at its best", ADAMW, better, above(0))
    best = runs.best([arm for arm in others if arm != "lower rate"])
    control = runs.gain(best, "lower rate")
    lab.claim("The best technique beats a mere lowering of the rate", ADVICE, control, above(0.5))
    table = np.array([[runs.values(metric, arm) for arm in arms] for metric in ("gap", "test_accuracy")])
    correlations = estimate([np.corrcoef(*table[:, :, i])[0, 1] for i in range(len(runs.seeds))])
    statement = "The smaller the gap, the better the technique (correlation over the arms)"
    lab.claim(statement, GUIDE, correlations, below(-0.5), "")


# %% [markdown]
# ## 3. Weight decay
#
# The usual scale says: small is 1e-5 to 1e-4, a default start; medium is 1e-3 to 1e-2; 0.1 and more is rarely used. A
# strength means little without the learning rate and the number of steps: each step takes lr × λ off a weight, so that
# over a run, if nothing else acted, (1 − lr × λ) to the power of the number of steps would be left. The scale is judged
# with plain SGD, where penalty and decay are one, at a rate at which this network overfits; once from the usual
# starting weights and once from four times larger ones.


# %%
SGD_RATE, STARTS = 0.5, {"usual": 1.0, "large": 4.0}
SCALE = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
SGD = partial(torch.optim.SGD, lr=SGD_RATE)


def scaled_start(task: Task, scale: float) -> nn.Module:
    """The usual network, its weight matrices `scale` times as large."""
    model = mlp(task)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.ndim > 1 else 1)
    return model


def weight_norm(model: nn.Module, _: Split | None = None) -> dict[str, float]:
    """The Euclidean norm of all weight matrices together."""
    return {"norm": float(torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1]).norm())}


def weight_decay(lab: Lab) -> None:
    """How strong should weight decay be, for small and for large weights?"""
    names = {f"{start}, {s:g}": (start, s) for start in STARTS for s in SCALE}
    arms = {
        name: replace(
            BASELINE, model=partial(scaled_start, scale=STARTS[start]), optimizer=partial(decoupled, base=SGD, decay=s)
        )
        for name, (start, s) in names.items()
    }
    runs = lab.compare(arms, {name: f"{start}, 0" for name, (start, _) in names.items()}, weight_norm)
    torch.manual_seed(0)
    task = load(lab.settings.dataset).task
    rows = []
    for start, scale in STARTS.items():
        norms = [estimate(runs.notes("norm", f"{start}, {s:g}")).mean for s in SCALE]
        norms.insert(0, weight_norm(scaled_start(task, scale))["norm"])
        rows.append([start, *(number(norm, 1) for norm in norms)])
    heads = ["weights", "at the\nstart", *(f"at end,\nλ={s:g}" for s in SCALE)]
    lab.table(Table("Norm of the weights", heads, rows))
    left = ", ".join(f"{100 * (1 - SGD_RATE * s) ** STEPS:.3g} % for λ = {s:g}" for s in SCALE[1:])
    lab.finding(f"What decay would leave of a weight by the end, if nothing else acted: {left}.")
    for start in STARTS:
        best = runs.best([f"{start}, {s:g}" for s in SCALE])
        lab.finding(f"{start} weights, best λ on validation: {best.split()[1]}, {interval(runs.gain(best))} points.")

    figure, axes = new_figure("How strong should weight decay be?", 2)
    for (start, scale), colour in zip(STARTS.items(), COLOURS, strict=False):
        label = f"{start} weights (× {scale:g} at the start)"
        for ax, metric, unit in ((axes[0], "test_accuracy", 100), (axes[1], "gap", 1)):
            effects = [estimate(unit * runs.values(metric, f"{start}, {s:g}")) for s in SCALE]
            plot_estimates(ax, SCALE[1:], effects[1:], label, colour)
            ax.axhline(effects[0].mean, color=colour, linestyle=":")
    for ax, label in ((axes[0], "test accuracy (%)"), (axes[1], "gap: validation − training loss (nats)")):
        log_ticks(ax, SCALE[1:])
        ax.set(xlabel="strength λ (dotted: no decay)", ylabel=label)
    axes[0].legend(frameon=False, loc="lower left")
    lab.figure("weight_decay", figure)

    small = runs.gain("usual, 0.0001")
    lab.claim("Small weight decay, 1e-4, a default start: it helps", GUIDE, small, above(0.5))
    for start in STARTS:
        medium, large = runs.gain(f"{start}, 0.01"), runs.gain(f"{start}, 0.1")
        lab.claim(f"Medium weight decay, 1e-2, helps ({start} weights)", GUIDE, medium, above(0.5))
        lab.claim(f"Large weight decay, 0.1, is too much ({start} weights)", GUIDE, large, below(-0.5))


# %% [markdown]
# ## 4. Penalty or decay, and which parameters
#
# First twenty steps with each, from the same start: for SGD no weight differs beyond rounding; for Adam they differ.
# The paper says that decoupling separates the choice of the decay from that of the learning rate. Its decay is *not*
# multiplied by the rate, PyTorch's is. So we take the best strength at a low rate to a rate ten times higher, and
# compare with the best strength there: for the penalty, for PyTorch's λ, and for the paper's lr × λ.
#
# PyTorch decays every parameter it is given, biases and the gains of norms included, unless a parameter group says
# otherwise. Does it matter?


# %%
RATES, PENALTIES, DECAYS = (0.003, 0.01, 0.03), (0.01, 0.03, 0.1, 0.3), (1.0, 3.0, 10.0, 30.0)


def weights_after(
    data: Dataset, optimizer: Callable[..., Optimizer], objective: Callable[..., Tensor] = cross_entropy
) -> Tensor:
    """All parameters (P,) after twenty steps, from a fixed start and with fixed batches."""
    torch.manual_seed(0)
    model, train = mlp(data.task), make_split(data, seed=0, examples=800).train
    rule = optimizer(model.parameters())
    for x, y in minibatches(train, 40, torch.Generator().manual_seed(0)):
        rule.zero_grad()
        objective(model, x, y).backward()
        rule.step()
    return parameters_to_vector(model.parameters()).detach()


def penalty_against_decay(data: Dataset, name: str, base: Callable[..., Optimizer], strength: float) -> list[str]:
    """A row of the table: the largest differences that an L2 penalty and decoupled decay make to any weight."""
    plain = weights_after(data, base)
    penalised = weights_after(data, base, partial(l2_penalised, strength=strength))
    decayed = weights_after(data, partial(decoupled, base=base, decay=strength))
    pairs = (penalised, plain), (decayed, plain), (penalised, decayed)
    return [f"{name}, λ = {strength:g}", *(number(float((a - b).abs().max())) for a, b in pairs)]


def with_penalty(rate: float, strength: float) -> Recipe:
    """Adam on the L2-penalised loss."""
    return replace(BASELINE, optimizer=adam(rate), loss=partial(l2_penalised, strength=strength))


def with_decay(rate: float, strength: float) -> Recipe:
    """Adam with decoupled decay."""
    return replace(BASELINE, optimizer=partial(decoupled, base=adam(rate), decay=strength))


def normed(task: Task) -> nn.Module:
    """The usual network with batch norm, whose gain and shift are parameters that decay may or may not touch."""
    flat, first, relu, last = mlp(task)
    return nn.Sequential(flat, first, nn.BatchNorm1d(first.out_features), relu, last)


def decoupling(lab: Lab) -> None:
    """Is weight decay an L2 penalty, must its strength follow the rate, and should it spare biases and norms?"""
    data = load(lab.settings.dataset)
    rows = [penalty_against_decay(data, name, base, 0.1) for name, base in (("SGD", SGD), ("Adam", ADAM))]
    heads = ["optimiser", "penalty\nagainst none", "decay\nagainst none", "penalty\nagainst decay"]
    lab.table(Table("Largest difference in any weight after 20 steps", heads, rows))
    tunings = {}
    for name, recipe, strengths in (("L2 penalty", with_penalty, PENALTIES), ("decay", with_decay, DECAYS)):
        grid = {f"lr {rate}": {s: recipe(rate, s) for s in strengths} for rate in RATES}
        tunings[name] = lab.tune(f"Adam + {name} by strength", grid)
        best = ", ".join(f"{tunings[name].best(f'lr {rate}'):g} at lr {rate}" for rate in RATES)
        lab.finding(f"Adam + {name}, best strength by rate: {best}.")

    low, high = RATES[0], RATES[-1]
    kept, own = ([tuning.best(f"lr {rate}") for tuning in tunings.values()] for rate in (low, high))
    arms = {
        "L2, own best": with_penalty(high, own[0]),
        "L2, λ kept": with_penalty(high, kept[0]),
        "decay, own best": with_decay(high, own[1]),
        "decay, λ kept": with_decay(high, kept[1]),
        "decay, lr × λ kept": with_decay(high, kept[1] * low / high),
    }
    baselines = {arm: f"{arm.split(',')[0]}, own best" for arm in arms}
    for name, model in (("biases", mlp), ("norm", normed)):
        for which, rule in (("decayed", decoupled), ("left out", weights_only)):
            optimizer = partial(rule, base=ADAM, decay=STRENGTH["weight decay"])
            arms[f"{name} {which}"] = replace(BASELINE, model=model, optimizer=optimizer)
            baselines[f"{name} {which}"] = f"{name} decayed"
    runs = lab.compare(arms, baselines)

    figure, axes = new_figure("Must the strength follow the learning rate?", 2)
    for ax, (name, tuning) in zip(axes, tunings.items(), strict=True):
        plot_grid(ax, tuning, 50, 90)
        ax.set(xlabel="strength λ (*: best at this rate)", title=f"Adam + {name}: validation accuracy (%)")
    lab.figure("decoupling", figure)

    for arm, statement in (
        ("L2, λ kept", "Adam + L2: λ must be chosen anew at another rate"),
        ("decay, λ kept", "PyTorch's AdamW: λ must be chosen anew at another rate"),
        ("decay, lr × λ kept", "The paper's AdamW: lr × λ must be chosen anew at another rate"),
    ):
        lab.claim(statement, ADAMW if "L2" in arm else ADVICE, runs.gain(arm), below(-0.5))
    accuracy = {arm: runs.values("test_accuracy", arm) for arm in arms}
    lost = {arm: accuracy[arm] - accuracy[baselines[arm]] for arm in arms}
    spared = points(paired_difference(lost["decay, lr × λ kept"], lost["L2, λ kept"]))
    lab.claim("Decoupling (the paper's) separates strength from rate: less is lost", ADAMW, spared, above(0))
    lab.claim("Biases left out of decay: better", ADVICE, runs.gain("biases left out"), above(0.5))
    statement = "Biases and norm parameters left out of decay: better (with batch norm)"
    lab.claim(statement, ADVICE, runs.gain("norm left out"), above(0.5))


# %% [markdown]
# ## 5. L1 makes zeros, with the right step
#
# "L1 forces weights to zero." The gradient of |w| is the sign of w, of the same size however small w is: plain gradient
# descent steps over zero and back, and never lands on it. The proximal step stops at zero. We count exact zeros for
# both, and also round small weights of the subgradient's network to zero afterwards: perhaps that is all one needs.


# %%
L1S = (1e-3, 3e-3, 1e-2)
ROUND = SGD_RATE * L1S[-1]  # the length of the longest subgradient step


def sparsity(model: nn.Module, split: Split) -> dict[str, float]:
    """Shares of exact zeros and of weights below ROUND, and test accuracy once those are rounded to zero."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    size = torch.cat([w.detach().flatten() for w in weights]).abs()
    with torch.no_grad():
        for w in weights:
            w.mul_(w.abs() >= ROUND)
    shares = {"zeros": float((size == 0).float().mean()), "small": float((size < ROUND).float().mean())}
    return shares | {"rounded": evaluate(model, split.test)[1]}


def l1(lab: Lab) -> None:
    """Does L1 make weights exactly zero, and what does sparsity cost?"""
    plain = replace(BASELINE, optimizer=SGD)
    arms = {"none": plain}
    arms |= {f"subgradient, {s:g}": replace(plain, loss=partial(l1_penalised, strength=s)) for s in L1S}
    arms |= {f"proximal, {s:g}": replace(plain, after_step=partial(proximal_l1, strength=s)) for s in L1S}
    runs = lab.compare(arms, "none", sparsity)
    share = {arm: [points(estimate(runs.notes(name, arm))) for name in ("zeros", "small", "rounded")] for arm in arms}
    accuracy = {arm: points(runs.estimate("test_accuracy", arm)) for arm in arms}
    rows = []
    for arm, (zeros, small, rounded) in share.items():
        rows.append([arm, *(number(each.mean, 1) for each in (zeros, small, accuracy[arm], rounded))])
    heads = ["step, strength", "exactly\nzero, %", f"below\n{ROUND:g}, %", "test\nacc. %", "rounded,\ntest acc. %"]
    lab.table(Table("Weights at zero, and near it", heads, rows))
    middle = f"{L1S[1]:g}"
    rounded, exact = share[f"subgradient, {middle}"], share[f"proximal, {middle}"]
    lab.finding(
        f"λ = {middle}: the proximal step leaves {exact[0].mean:.0f} % of the weights at zero; the subgradient leaves "
        f"{rounded[1].mean:.0f} % below {ROUND:g}, and rounding those changes its accuracy by "
        f"{rounded[2].mean - accuracy[f'subgradient, {middle}'].mean:+.1f} points."
    )

    figure, axes = new_figure("Does L1 make zeros, and what do they cost?", 2)
    for step, colour in (("subgradient", COLOURS[1]), ("proximal", COLOURS[0])):
        zeros = [share[f"{step}, {s:g}"][0] for s in L1S]
        plot_estimates(axes[0], L1S, zeros, step, colour)
        on_test = [accuracy[f"{step}, {s:g}"].mean for s in L1S]
        axes[1].plot([each.mean for each in zeros], on_test, "o-", color=colour, label=step)
    rounded = [[each.mean for each in share[f"subgradient, {s:g}"][1:]] for s in L1S]
    axes[1].plot(*np.transpose(rounded), "s--", color=COLOURS[1], label="subgradient, rounded")
    axes[1].axhline(accuracy["none"].mean, color=BLACK, label="no L1")
    log_ticks(axes[0], L1S)
    axes[0].set(xlabel="strength λ", ylabel="weights exactly zero (%)")
    axes[1].set(xlabel="weights exactly zero (%)", ylabel="test accuracy (%)")
    for ax in axes:
        ax.legend(frameon=False)
    lab.figure("l1", figure)

    for step in ("proximal", "subgradient"):
        statement = f"L1 forces weights to zero: at least a tenth of them ({step} step)"
        lab.claim(statement, GUIDE, share[f"{step}, {middle}"][0], above(10), "%")
    sparse = runs.gain(f"proximal, {middle}")
    lab.claim("The sparse network is no less accurate than the full one", ADVICE, sparse, above(-0.5))


# %% [markdown]
# ## 6. L1 for feature selection
#
# Each image gets as many useless inputs as it has pixels (64): a fixed, very rough function of the image, which to a
# learner is noise. Some border pixels are useless as they are: they never change over the training set. How much of the
# first layer's weight, summed as |w|, does each method leave where nothing can be learned?
#
# Labels are right here, at first. Noise is just what a network needs to tell the wrongly labelled digits from the
# others, so that with wrong labels these inputs are not useless at all: the last two arms show it.


# %%
KINDS = ("useful", "constant", "useless")


class UselessInputs(nn.Module):
    """Appends as many inputs in −√2…√2, of variance 1, to the flattened images: (N, C, H, W) to (N, 2 · C·H·W).

    They are sines of large random multiples of the image: the same image always gets the same ones, so they can be
    learned by heart, but images alike get quite different ones, so they say nothing of the class.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # its own: the starting weights must not depend on it
        self.register_buffer("directions", 1e3 * torch.randn(pixels, pixels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([x, 2**0.5 * torch.sin(x @ self.directions)], 1)


def with_useless_inputs(task: Task, p: float = 0.0) -> nn.Module:
    """The usual network on the pixels and the useless inputs."""
    pixels = prod(task.shape)
    return nn.Sequential(UselessInputs(pixels), *mlp(Task((1, 1, 2 * pixels), task.classes), p=p))


def weight_by_input(model: nn.Module, split: Split) -> dict[str, list[float]]:
    """How the first layer's sum of |w|, and the inputs themselves, divide among KINDS: useful pixels, those constant
    over the training set, and the inputs appended (shares that sum to 1).
    """
    by_input = next(p for p in model.parameters() if p.ndim > 1).detach().abs().sum(0)
    pixels = split.train.x.flatten(1)
    kind = torch.full_like(by_input, 2)
    kind[: pixels.shape[1]] = (pixels.amax(0) == pixels.amin(0)).float()
    total = by_input.sum().clamp_min(1e-12)
    shares = [float(by_input[kind == i].sum() / total) for i in range(3)]
    return {"weight": shares, "inputs": [float((kind == i).float().mean()) for i in range(3)]}


def feature_selection(lab: Lab) -> None:
    """Which method takes its weights off useless inputs?"""
    plain = replace(BASELINE, optimizer=SGD, model=with_useless_inputs, label_noise=0.0)
    grids = {
        "decay": {s: replace(plain, optimizer=partial(decoupled, base=SGD, decay=s)) for s in (0.01, 0.03, 0.1)},
        "proximal L1": {s: replace(plain, after_step=partial(proximal_l1, strength=s)) for s in L1S},
        "dropout": {p: replace(plain, model=partial(with_useless_inputs, p=p)) for p in (0.3, 0.5, 0.7)},
    }
    tuning = lab.tune("Strength", grids)
    arms = {"none": plain} | {method: grid[tuning.best(method)] for method, grid in grids.items()}
    arms["subgradient L1"] = replace(plain, loss=partial(l1_penalised, strength=tuning.best("proximal L1")))
    baselines = dict.fromkeys(arms, "none")
    for method in ("none", "proximal L1"):
        arms[f"wrong labels: {method}"] = replace(arms[method], label_noise=BASELINE.label_noise)
        baselines[f"wrong labels: {method}"] = "wrong labels: none"
    runs = lab.compare(arms, baselines, weight_by_input)
    weight = {arm: 100 * runs.notes("weight", arm) for arm in arms}
    shares = {"(the inputs themselves)": 100 * runs.notes("inputs", "none")} | weight
    left = {name: [each.mean for each in estimates(table)] for name, table in shares.items()}
    rows = [[name, *(number(each, 1) for each in row)] for name, row in left.items()]
    lab.table(Table("Where the first layer's weight lies (%)", ["method", *KINDS], rows))
    best = min(list(grids), key=lambda method: left[method][2])
    lab.finding(f"{best} leaves least on the useless inputs: {left[best][2]:.0f} %; none, {left['none'][2]:.0f} %.")

    figure, (ax,) = new_figure("Which method takes its weights off useless inputs?")
    edge = np.zeros(len(left))
    for kind, widths, colour in zip(KINDS, np.transpose(list(left.values())), (2, 7, 1), strict=True):
        ax.barh(range(len(left)), widths, left=edge, color=COLOURS[colour], label=kind)
        edge += widths
    ax.set_yticks(range(len(left)), list(left))
    ax.set(xlabel="share of the first layer's weight (%)", ylim=(len(left) - 0.5, -1.4))
    ax.legend(frameon=False, ncols=3, loc="upper left")
    lab.figure("feature_selection", figure)

    for arm, other, statement in (
        ("proximal L1", "none", "L1 selects features: less weight on useless inputs than without"),
        ("proximal L1", "decay", "L1 selects features better than weight decay"),
        ("decay", "none", "Weight decay, too, takes weight off useless inputs"),
        ("wrong labels: proximal L1", "wrong labels: none", "L1 selects features where labels are wrong, too"),
    ):
        less = paired_difference(weight[arm][:, 2], weight[other][:, 2])
        lab.claim(statement, GUIDE if "L1" in statement else ADVICE, less, below(-5))


# %% [markdown]
# ## 7. Early stopping
#
# "Always; it is free." Each run goes on to the end and notes all losses after every epoch; then we ask each criterion
# where it would have stopped, and take the test accuracy at the lowest validation loss up to there. Patience waits so
# many epochs for a new minimum. Prechelt's criteria work in percent and over strips of five epochs: GL stops when
# the loss is more than α above its minimum; PQ when GL is more than α times the progress of training; UP when the loss
# has risen over s strips in a row.
#
# Is it free? Our validation set is large and rightly labelled. So once more with what a reader would really have: 160
# of the 200 digits to train on and 40 held out, with as many wrong labels as the rest, against training on all 200.


# %%
LONG, STRIP, HELD_OUT = 30, 5, 40
PATIENCES, ALPHAS, QUOTIENTS, RISES = (1, 2, 4, 8, 16), (1.0, 5.0, 20.0), (0.05, 0.1, 0.5), (1, 2, 3)


def by_patience(validation: Sequence[float], patience: int) -> int:
    """The epoch (from 1) at which `patience` epochs have passed without a new minimum; the last one if none does."""
    lowest = 0
    for i, value in enumerate(validation):
        lowest = i if value < validation[lowest] else lowest
        if i - lowest >= patience:
            return i + 1
    return len(validation)


def generalisation_loss(validation: Sequence[float]) -> np.ndarray:
    """Prechelt's GL after each epoch (E,): by how many percent the loss exceeds its minimum so far."""
    return 100 * (np.asarray(validation) / np.minimum.accumulate(validation) - 1)


def by_gl(validation: Sequence[float], alpha: float) -> int:
    """The first epoch with GL > alpha; the last one if there is none."""
    over = np.flatnonzero(generalisation_loss(validation) > alpha)
    return int(over[0]) + 1 if len(over) else len(validation)


def by_pq(train: Sequence[float], validation: Sequence[float], alpha: float, k: int = STRIP) -> int:
    """The first end of a strip of k epochs with GL / P > alpha, where P = 1000 · (mean / minimum of the strip's
    training losses − 1) is the progress of training; the last epoch if there is none.
    """
    gl = generalisation_loss(validation)
    for end in range(k, len(train) + 1, k):
        strip = np.asarray(train[end - k : end])
        if gl[end - 1] > alpha * 1000 * (strip.mean() / strip.min() - 1):
            return end
    return len(train)


def by_up(validation: Sequence[float], s: int, k: int = STRIP) -> int:
    """The first end of a strip of k epochs at which the loss has risen from strip to strip s times in a row; the last
    epoch if there is none.
    """
    rises = 0
    for end in range(2 * k, len(validation) + 1, k):
        rises = rises + 1 if validation[end - 1] > validation[end - 1 - k] else 0
        if rises == s:
            return end
    return len(validation)


CRITERIA: dict[str, Callable[[Sequence[float], Sequence[float]], int]] = {
    **{f"patience {n}": (lambda train, validation, n=n: by_patience(validation, n)) for n in PATIENCES},
    **{f"GL {a:g}": (lambda train, validation, a=a: by_gl(validation, a)) for a in ALPHAS},
    **{f"PQ {a:g}": (lambda train, validation, a=a: by_pq(train, validation, a)) for a in QUOTIENTS},
    **{f"UP {s}": (lambda train, validation, s=s: by_up(validation, s)) for s in RISES},
}


def held_out(split: Split, label_noise: float) -> Batch:
    """Forty validation images, a share `label_noise` of them with a wrong label, as in the training set."""
    x, y = (part[:HELD_OUT] for part in split.validation)
    wrong = torch.arange(len(y), device=y.device) < round(label_noise * len(y))
    return Batch(x, torch.where(wrong, (y + 1) % (int(split.validation.y.max()) + 1), y))


def note_losses(state: State, label_noise: float) -> None:
    """After an epoch: note training, validation and held-out loss, and test accuracy, which chooses nothing."""
    split = state.split
    parts = split.train, split.validation, held_out(split, label_noise), split.test
    measured = [evaluate(state.model, part) for part in parts]
    state.notes.setdefault("curve", []).append([*(value for value, _ in measured[:3]), measured[3][1]])


def stopped_at(curve: np.ndarray, stop: int, column: int = 1) -> float:
    """Test accuracy at the lowest loss of the column up to epoch `stop`, for the (epochs, 4) of `note_losses`."""
    return float(curve[int(np.argmin(curve[:stop, column])), 3])


def early_stopping(lab: Lab) -> None:
    """Which stopping criterion pays, does stopping always help, and is it free?"""
    arms, baselines, noises = {}, {}, {"wrong": BASELINE.label_noise, "right": 0.0}
    for labels, noise in noises.items():
        long = replace(BASELINE, epochs=LONG, label_noise=noise, after_epoch=partial(note_losses, label_noise=noise))
        arms[f"{labels}, to the end"] = long
        arms[f"{labels}, patience 4"] = replace(long, after_epoch=partial(stop_early, patience=4))
        arms[f"{labels}, 160 images"] = replace(long, examples=SIZE - HELD_OUT)
        baselines |= dict.fromkeys(list(arms)[-3:], f"{labels}, to the end")
    runs = lab.compare(arms, baselines)

    epochs, accuracy, gain, honest = {}, {}, {}, {}
    for labels in noises:
        curves = runs.notes("curve", f"{labels}, to the end")
        end = curves[:, -1, 3]
        for name, criterion in CRITERIA.items():
            stops = [criterion(curve[:, 0], curve[:, 1]) for curve in curves]
            epochs[labels, name] = estimate(stops).mean
            accuracy[labels, name] = np.array([stopped_at(*each) for each in zip(curves, stops, strict=True)])
            gain[labels, name] = points(paired_difference(accuracy[labels, name], end))
        curves = runs.notes("curve", f"{labels}, 160 images")
        found = [stopped_at(curve, by_patience(curve[:, 2], 4), column=2) for curve in curves]
        honest[labels] = points(paired_difference(found, end))
    rows = []
    for name in CRITERIA:
        cells = [[number(epochs[labels, name], 1), interval(gain[labels, name])] for labels in noises]
        rows.append([name, *cells[0], *cells[1]])
    breaks = frozenset(np.cumsum([len(PATIENCES), len(ALPHAS), len(QUOTIENTS)]).tolist())
    heads = ["criterion", "wrong labels:\nepochs", "gain over\nthe end", "right labels:\nepochs", "gain over\nthe end"]
    lab.table(Table("Where each criterion stops, and what that brings (points)", heads, rows, breaks))
    for labels, effect in honest.items():
        lab.finding(
            f"{labels} labels, 160 images to train on and 40 to stop with: {interval(effect)} points over training on "
            "all 200 to the end."
        )

    figure, axes = new_figure("Where do the criteria stop, and what does it bring?", 2)
    for ax, labels in zip(axes, noises, strict=True):
        for family, marker, colour in zip(("patience", "GL", "PQ", "UP"), "os^D", COLOURS, strict=False):
            names = [name for name in CRITERIA if name.startswith(family)]
            mean, low, high, _ = np.array([gain[labels, name] for name in names]).T
            spent = [epochs[labels, name] for name in names]
            ax.errorbar(spent, mean, [mean - low, high - mean], fmt=f"{marker}-", color=colour, capsize=3, label=family)
        ax.axhline(0, color=BLACK, linewidth=1)
        ax.set(xlabel="epochs spent", ylabel="gain over training to the end (points)", title=f"{labels} labels")
    shared_legend(figure, axes[0])
    lab.figure("early_stopping", figure)

    slow, fast = f"patience {PATIENCES[-1]}", f"patience {PATIENCES[0]}"
    for labels in noises:
        statement = f"Early stopping: always ({labels} labels, patience 4 against {LONG} epochs)"
        lab.claim(statement, GUIDE, gain[labels, "patience 4"], above(0.5))
        statement = f"It is free: better even with 40 of the 200 images held out for it ({labels} labels)"
        lab.claim(statement, GUIDE, honest[labels], above(0.5))
        better = points(paired_difference(accuracy[labels, slow], accuracy[labels, fast]))
        statement = f"Slower criteria generalise better: {slow} against {PATIENCES[0]} ({labels} labels)"
        lab.claim(statement, PRECHELT, better, above(0))


# %% [markdown]
# ## 8. Augmentation
#
# "Create more training data." A digit moved by less than a pixel, turned by a few degrees or with a little noise is
# still the same digit; a mirrored one may be none. All sizes take the same number of steps, and each image is changed
# anew each time it is seen; the strength is the one that validation chose for 200. Mirroring is tried on wrong labels
# and on right ones: what makes images harder to learn by heart may help against wrong labels, sense or no sense.


# %%
AUGMENTED_SIZES = (50, 200, 800)


def mosaic(rows: dict[str, Tensor]) -> Tensor:
    """Rows of images, each (N, 1, H, W), as one picture with a margin of one pixel."""
    return torch.cat([F.pad(row[:, 0], (1, 1, 1, 1), value=nan).permute(1, 0, 2).flatten(1) for row in rows.values()])


def augmentation(lab: Lab) -> None:
    """How much does augmentation gain, for how large a training set, and what does a wrong one cost?"""
    strength = STRENGTH["augmentation"]
    changes = {
        "shift": partial(augment, shift=strength),
        "turn": partial(augment, turn=15 * strength),
        "noise": partial(augment, noise=0.3 * strength),
        "all three": partial(jitter, strength=strength),
        "mirror": partial(augment, mirror=True),
    }
    groups = {str(size): at_size(size) for size in AUGMENTED_SIZES}
    groups["right labels"] = replace(BASELINE, label_noise=0.0)
    arms, baselines = {}, {}
    for group, plain in groups.items():
        kinds = {"200": list(changes), "right labels": ["all three", "mirror"]}.get(group, ["all three"])
        arms[f"{group}, none"] = plain
        arms |= {f"{group}, {kind}": replace(plain, loss=partial(augmented, change=changes[kind])) for kind in kinds}
        baselines |= dict.fromkeys([f"{group}, {kind}" for kind in ("none", *kinds)], f"{group}, none")
    runs = lab.compare(arms, baselines)
    gain = {arm: runs.gain(arm) for arm in arms}

    split = make_split(load(lab.settings.dataset), lab.settings.seeds[0], SIZE)
    torch.manual_seed(0)
    labels = split.train.y.numpy()
    images = split.train.x[[int(np.argmax(labels == c)) for c in (2, 3, 4, 5, 7, 7, 7, 7)]]  # the first of each class
    rows = {"as they are": images} | {kind: change(images) for kind, change in changes.items()}
    figure, (ax,) = new_figure("What does augmentation do to an image?")
    ax.imshow(mosaic(rows).numpy(), cmap="gray_r", vmin=float(images.min()), vmax=float(images.max()))
    side = images.shape[2] + 2
    ax.set_yticks([side * (i + 0.5) - 0.5 for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    lab.figure("augmented_images", figure)

    figure, axes = new_figure("When does augmentation help?", 2)
    by_size = [gain[f"{size}, all three"] for size in AUGMENTED_SIZES]
    plot_estimates(axes[0], AUGMENTED_SIZES, by_size, "all three", COLOURS[0])
    axes[0].axhline(0, color=BLACK, linewidth=1)
    log_ticks(axes[0], AUGMENTED_SIZES)
    axes[0].set(xlabel="training examples", ylabel="gain of all three (points of test accuracy)")
    shown = {kind: gain[f"200, {kind}"] for kind in changes}
    plot_dots(
        axes[1],
        shown | {f"{k},\nright labels": gain[f"right labels, {k}"] for k in ("all three", "mirror")},
        COLOURS[0],
    )
    axes[1].axvline(0, color=BLACK, linewidth=1)
    axes[1].set(xlabel="gain with 200 examples (points of test accuracy)")
    lab.figure("augmentation", figure)

    alone = runs.best([f"200, {kind}" for kind in ("shift", "turn", "noise")])
    lab.finding(f"The best single kind on validation: {alone.split(', ')[1]}, {interval(gain[alone])} points on test.")
    for group, name in (("50", "50 images"), ("200", "200 images"), ("800", "800 images"), ("right labels",) * 2):
        lab.claim(f"More data = less overfitting: it helps ({name})", GUIDE, gain[f"{group}, all three"], above(0.5))
    few, many = (
        runs.values("test_accuracy", f"{size}, all three") - runs.values("test_accuracy", f"{size}, none")
        for size in (AUGMENTED_SIZES[0], AUGMENTED_SIZES[-1])
    )
    statement = "The fewer data, the larger the gain (50 against 800 images)"
    lab.claim(statement, ADVICE, points(paired_difference(few, many)), above(0.5))
    for group, labels in (("200", "wrong labels"), ("right labels",) * 2):
        cost = gain[f"{group}, mirror"]
        lab.claim(f"Mirroring costs accuracy ({labels})", ADVICE, cost, below(-0.5))
    better = runs.gain("200, all three", alone)
    lab.claim("Shift, turn and noise together beat the best of them alone", ADVICE, better, above(0.5))


# %% [markdown]
# ## 9. Ensembles
#
# Ten networks, ten starts, the same data. Averaged, are they better than one: more accurate, more likely, better
# calibrated? And is it the averaging, or could the same parameters have made one larger network, or the same training
# time one longer run? Ten small networks trained side by side take about six times as long as one (see the column of
# seconds), so the longer run gets six times the epochs. We look at the first 1, 2, … 10 members; disagreement is how
# often two of them differ. All members see the same wrong labels; a second ensemble learns from right ones.


# %%
TEN, AS_LONG = 10, 6


def scores(probabilities: Tensor, y: Tensor) -> list[float]:
    """Accuracy, negative log-likelihood in nats and expected calibration error of probabilities (N, classes)."""
    confidence, guess = (each.cpu().numpy() for each in probabilities.max(1))
    right = guess == y.cpu().numpy()
    likelihood = F.nll_loss(probabilities.clamp_min(1e-12).log(), y)
    return [float(right.mean()), float(likelihood), calibration_error(reliability(confidence, right))]


@torch.no_grad()
def growth(model: nn.Module, split: Split) -> dict[str, Any]:
    """For the first m = 1, 2, … members: `scores` of their mean, and mean pairwise disagreement, (members, 4)."""
    x, y = split.test
    model.eval()
    members = model.members if isinstance(model, Ensemble) else [model]
    each = torch.stack([member(x).softmax(1) for member in members])
    guesses = each.argmax(2)
    differ = (guesses[:, None] != guesses).float().mean(2)
    rows = []
    for m in range(1, len(members) + 1):
        pairwise = differ[:m, :m].sum().item() / (m * (m - 1)) if m > 1 else 0.0
        rows.append([*scores(each[:m].mean(0), y), pairwise])
    return {"growth": rows, "parameters": sum(p.numel() for p in model.parameters())}


def ensembles(lab: Lab) -> None:
    """What does each further network add, and is an ensemble better than one larger or longer trained network?"""
    ten = replace(BASELINE, model=partial(ensemble, members=TEN), loss=each_alone)
    arms = {
        "one network": BASELINE,
        "ten networks": ten,
        "one, ten times wider": replace(BASELINE, model=partial(mlp, width=TEN * 256)),
        "one, six times longer": replace(BASELINE, epochs=AS_LONG * BASELINE.epochs),
        "one, right labels": replace(BASELINE, label_noise=0.0),
        "ten, right labels": replace(ten, label_noise=0.0),
    }
    runs = lab.compare(arms, {arm: "one, right labels" if "right" in arm else "one network" for arm in arms}, growth)
    grown = {arm: runs.notes("growth", arm) for arm in arms}
    rows = []
    for arm, table in grown.items():
        for m in (2, 3, 5, TEN) if table.shape[1] == TEN else (1,):
            accuracy, likelihood, error, differ = (estimate(column).mean for column in table[:, m - 1].T)
            cells = number(100 * accuracy, 1), number(likelihood), number(100 * error, 1), number(100 * differ, 1)
            parameters = estimate(runs.notes("parameters", arm)).mean * m / table.shape[1]
            rows.append([arm if m == 1 else f"{arm}: the first {m}", f"{parameters:,.0f}", *cells])
    heads = ["network(s)", "parameters", "test\nacc. %", "NLL,\nnats", "calibr.\nerror %", "disagree-\nment %"]
    lab.table(Table("One to ten members", heads, rows))
    for arm, labels in (("ten networks", "wrong"), ("ten, right labels", "right")):
        differ, gain = points(estimate(grown[arm][:, -1, 3])), interval(runs.gain(arm))
        lab.finding(
            f"{labels} labels: two members differ on {differ.mean:.1f} % of the images; all ten gain {gain} points."
        )

    figure, axes = new_figure("What does each further network add?", 2, 2)
    labels = "test accuracy (%)", "negative log-likelihood (nats)", "calibration error (%)", "disagreement (%)"
    for i, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        unit, first = 1 if i == 1 else 100, 1 if i == 3 else 0
        for arm, colour in (("ten networks", COLOURS[0]), ("ten, right labels", COLOURS[2])):
            values = [estimate(unit * column) for column in grown[arm][:, first:, i].T]
            plot_estimates(ax, range(first + 1, TEN + 1), values, arm, colour)
        if i < 3:
            for arm, colour in (("one, ten times wider", COLOURS[1]), ("one, six times longer", COLOURS[3])):
                ax.axhline(unit * estimate(grown[arm][:, 0, i]).mean, color=colour, linestyle="--", label=arm)
        ax.set(xlabel="members", ylabel=label)
    shared_legend(figure, axes[0])
    lab.figure("ensembles", figure)

    for one, many, labels in (
        ("one network", "ten networks", "wrong labels"),
        ("one, right labels", "ten, right labels", "right labels"),
    ):
        single, several = grown[one][:, 0], grown[many][:, -1]
        accuracy, likelihood, calibration = (paired_difference(several[:, i], single[:, i]) for i in range(3))
        lab.claim(f"Ten networks are more accurate ({labels})", DEEP_ENSEMBLES, points(accuracy), above(0.5))
        lab.claim(f"Ten networks have a better likelihood ({labels})", DEEP_ENSEMBLES, likelihood, below(0), "nats")
        lab.claim(f"Ten networks are better calibrated ({labels})", DEEP_ENSEMBLES, points(calibration), below(0))
        later = several[:, 1] - grown[many][:, 4, 1]
        most = estimate(grown[many][:, 4, 1] - single[:, 1] - later)
        statement = f"Five members give most of it: more likelihood than the other five ({labels})"
        lab.claim(statement, ADVICE, most, below(0), "nats")
    for arm, statement in (
        ("one, ten times wider", "Ten networks are more accurate than one with as many parameters"),
        ("one, six times longer", "Ten networks are more accurate than one trained for as long a time"),
    ):
        lab.claim(statement, ADVICE, runs.gain("ten networks", arm), above(0.5))


# %% [markdown]
# ## 10. Together
#
# "These techniques often work in combination." We add one at a time. Each strength is the one that validation chose in
# the line-up for the technique ALONE, which is likely too much in company. So every combination is tuned, too: all its
# strengths are multiplied by one factor, chosen on validation from a printed grid (a grid with one axis for each
# technique would be better, and cost far more). For pairs we ask how much of the two gains overlaps:
# gain(A) + gain(B) − gain(A and B).

# %%
DECAY, DROPOUT, AUGMENTATION, STOPPING = STRENGTH
FACTORS = (0.25, 0.5, 1.0)


def combined(parts: Iterable[str], factor: float = 1.0, members: int = 1) -> Recipe:
    """The baseline with the named techniques at `factor` times their STRENGTH (patience aside), as an ensemble if
    members > 1.
    """
    parts = set(parts)
    p = factor * STRENGTH[DROPOUT] if DROPOUT in parts else 0.0
    change = partial(jitter, strength=factor * STRENGTH[AUGMENTATION])
    objective = partial(augmented, change=change) if AUGMENTATION in parts else cross_entropy
    decayed = partial(decoupled, base=ADAM, decay=factor * STRENGTH[DECAY])
    stop = partial(stop_early, patience=STRENGTH[STOPPING])
    return replace(
        BASELINE,
        model=partial(ensemble, members=members, p=p) if members > 1 else partial(mlp, p=p),
        optimizer=decayed if DECAY in parts else ADAM,
        loss=partial(each_alone, loss=objective) if members > 1 else objective,
        after_epoch=stop if STOPPING in parts else None,
    )


def together(lab: Lab) -> None:
    """Do the techniques add up, and which of them do the same work twice?"""
    three = (DECAY, DROPOUT, AUGMENTATION)
    pairs = {"decay, dropout": three[:2], "decay, augm.": (DECAY, AUGMENTATION), "dropout, augm.": three[1:]}
    groups = pairs | {"all three": three}
    grid = {name: {factor: combined(parts, factor) for factor in FACTORS} for name, parts in groups.items()}
    tuning = lab.tune("Factor on all strengths", grid)
    factor = tuning.best("all three")
    steps = {
        "none": combined([]),
        "+ decay": combined([DECAY]),
        "+ dropout": grid["decay, dropout"][tuning.best("decay, dropout")],
        "+ augmentation": grid["all three"][factor],
        "+ early stopping": combined([*three, STOPPING], factor),
        "+ ensemble": combined([*three, STOPPING], factor, MEMBERS),
    }
    arms = steps | {f"only {part}": combined([part]) for part in (DROPOUT, AUGMENTATION, STOPPING)}
    arms |= {f"only {name}": grid[name][tuning.best(name)] for name in list(pairs)[1:]}
    arms["three, full strength"] = combined(three)
    runs = lab.compare(arms, "none")

    single = {DECAY: "+ decay"} | {part: f"only {part}" for part in (DROPOUT, AUGMENTATION)}
    both = {name: "+ dropout" if name == "decay, dropout" else f"only {name}" for name in pairs}
    accuracy = {arm: runs.values("test_accuracy", arm) for arm in arms}
    overlap, rows = {}, []
    for name, (a, b) in pairs.items():
        gains = [accuracy[arm] - accuracy["none"] for arm in (single[a], single[b], both[name])]
        overlap[name] = points(estimate(gains[0] + gains[1] - gains[2]))
        rows.append([name, *(number(100 * estimate(gain).mean, 1) for gain in gains), interval(overlap[name])])
    heads = ["pair", "gain of\nthe first", "gain of\nthe second", "gain of\nboth", "overlap,\npoints"]
    lab.table(Table("Where two do the same work", heads, rows))
    ones = [*single.values(), f"only {STOPPING}"]
    for which, names in (("all", list(arms)), ("those with one technique", ones)):
        best = runs.best(names)
        lab.finding(f"Best on validation of {which}: {best}, {interval(runs.gain(best))} points over none on test.")

    figure, axes = new_figure("Do the techniques add up?", 2)
    plot_dots(axes[0], {arm: points(runs.estimate("test_accuracy", arm)) for arm in steps}, COLOURS[0])
    axes[0].set(xlabel="test accuracy (%), one added at a time")
    for i, (a, b) in enumerate(pairs.values()):
        total = runs.gain(single[a]).mean + runs.gain(single[b]).mean
        axes[1].plot(total, i, "D", color=COLOURS[1], label="_" * i + "sum of the two gains")
    plot_dots(axes[1], {name: runs.gain(both[name]) for name in pairs}, COLOURS[0], "gain of both")
    axes[1].set(xlabel="gain over none (points of test accuracy)", xlim=(0, None), ylim=(3, -0.5))
    axes[1].legend(frameon=False, loc="lower left")
    lab.figure("together", figure)

    for before, after in pairwise(steps):
        source = GUIDE if after != "+ ensemble" else DEEP_ENSEMBLES
        lab.claim(f"Added one at a time: {after} helps", source, runs.gain(after, before), above(0.5))
    alone = runs.best(list(single.values()))
    pays = runs.gain("+ augmentation", alone)
    lab.claim("Decay, dropout and augmentation together beat the best of them alone", GUIDE, pays, above(0.5))
    worse = runs.gain("three, full strength", "+ augmentation")
    lab.claim("Together they need less strength than each alone", ADVICE, worse, below(-0.5))
    for name, effect in overlap.items():
        lab.claim(f"Two gains overlap: {name}", ADVICE, effect, above(0.5))


# %% [markdown]
# ## What we saw, where it fails
#
# The run ends with a list of all claims by verdict, each with the effect that decided it. It is computed, not written:
# change a setting, run again, and read whether it still says the same.
#
# ## Exercises
#
# Each is a changed line or two; the answers, each from a run, are in
# `exercises/15_regularization_techniques_detailed.md`.
#
# 1. Set `label_noise=0.0` in `BASELINE` and run `--only line_up`. Which weapons are left?
# 2. In `stop_early`, write `dict(state.model.state_dict())` instead of the deep copy and run `--only line_up`. What
#    happens to early stopping, and does an error say so?
# 3. Let each member of an ensemble see half of each batch: in `each_alone`, begin with
#    `halves = [torch.randperm(len(y))[: len(y) // 2] for _ in model.members]` and pass `x[half], y[half]` on. Does
#    `--only ensembles` come out differently?
# 4. Set `RATE = 1e-3` and run `--only line_up`. What does a low rate leave for the others to do?

# %%
EXPERIMENTS = [
    detect,
    line_up,
    weight_decay,
    decoupling,
    l1,
    feature_selection,
    early_stopping,
    augmentation,
    ensembles,
    together,
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the lesson; in a notebook, `main(["--quick"])` is a smoke run."""
    run_lesson(LESSON, TITLE, EXPERIMENTS, LARGER, arguments)


if __name__ == "__main__":
    main()
