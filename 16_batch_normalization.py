# %% [markdown]
# # Lesson 16: Batch normalisation
#
# **The question.** Subtract the mean of the batch, divide by its deviation: two lines, put between the layers of a
# network. They are said to make training faster, larger learning rates safe, the start unimportant and deep networks
# possible. Which of these is true, for which network, and is there no other way to get it?
#
# **You will learn** how batch norm works in training and in eval mode, down to the variance that goes where; what
# depth, learning rate and starting weights do with and without it; where to put it; what goes wrong with small batches,
# with `eval()` forgotten and with dropout beside it; and what is known of why it works.
#
# **You need** lesson 14 for `model.train()` and `model.eval()`. The data are 1,797 handwritten digits that come with
# scikit-learn. A run takes about a minute on two CPU cores; see `results/` for the reference run.
#
# **Papers.** Ioffe & Szegedy 2015, *Batch normalization* (arXiv 1502.03167); Santurkar et al. 2018, *How does batch
# normalization help optimization?* (arXiv 1805.11604); Yang et al. 2019, *A mean field theory of batch normalization*
# (arXiv 1902.08129); Hoffer et al. 2017, *Train longer, generalize better* (ghost batch norm, arXiv 1705.08741); Li et
# al. 2019, *Understanding the disharmony between dropout and batch normalization* (arXiv 1801.05134); van Laarhoven
# 2017, *L2 regularization versus batch and weight normalization* (arXiv 1706.05350).

# %%
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import log10, nan, prod, sqrt
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from common.first.cli import run_lesson
from common.first.data import Batch, Split, Task, load, make_split
from common.first.experiment import Comparison
from common.first.lab import Lab, Larger
from common.first.plotting import BASELINE as BLACK
from common.first.plotting import (
    COLOURS,
    colours,
    log_ticks,
    new_figure,
    plot_curves,
    plot_dots,
    plot_estimates,
    shared_legend,
)
from common.first.report import Table, interval, number
from common.first.statistics import (
    Estimate,
    above,
    below,
    estimate,
    estimates,
    paired_difference,
    points,
    proportion,
    within,
)
from common.first.training import Recipe, State, cross_entropy, evaluate, totals

LESSON = "16_batch_normalization"
TITLE = "Lesson 16: Batch normalisation"

# %% [markdown]
# ## The mechanism, from scratch
#
# In training, each feature (or each channel of an image) is normalised with the mean and variance that it has in this
# batch, then scaled by gamma and shifted by beta, which are learned. In eval mode there may be no batch, so the layer
# uses running statistics that it collected on the way. Two variances are in play: the *biased* one (divide by n)
# normalises the batch, the *unbiased* one (divide by n − 1) goes into the running statistics. And `momentum = 0.1` is
# the weight of the NEW value, not of the old one as in an optimiser.


# %%
class BatchNorm(nn.Module):
    """Batch normalisation of vectors (N, F) or images (N, C, H, W), per feature or channel. Ioffe & Szegedy 2015.

    momentum: the weight of the newest batch in the running statistics; None averages all batches alike.
    Raises ValueError for a training batch with one value per feature: it has no variance.
    """

    def __init__(self, features: int, momentum: float | None = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.gamma, self.beta = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]  # all but the features'
        shape = [1, -1, *[1] * (x.ndim - 2)]
        mean, var = self.running_mean, self.running_var
        if self.training:
            n = x.numel() // x.shape[1]
            if n == 1:
                raise ValueError(f"one value per feature in {tuple(x.shape)}: a batch needs two to have a variance")
            mean, var = x.mean(axes), x.var(axes, correction=0)
            self.batches += 1
            weight = 1 / self.batches if self.momentum is None else self.momentum
            self.running_mean += weight * (mean.detach() - self.running_mean)
            self.running_var += weight * (var.detach() * n / (n - 1) - self.running_var)
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return self.gamma.view(shape) * x + self.beta.view(shape)


# %% [markdown]
# Our layer and PyTorch's do the same (the first table of the run says how exactly), so from here on we use PyTorch's,
# which is faster. The network is a stack of blocks: Linear → BatchNorm → ReLU. All networks of one seed start from the
# same weights, whatever stands between their layers: the start has a random stream of its own.


# %%
def start(model: nn.Module, scale: float) -> nn.Module:
    """Draw the weights from N(0, scale² · 2 / fan-in), biases zero; scale 1 is He's start (lesson 19)."""
    stream = torch.Generator().manual_seed(torch.initial_seed())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale * sqrt(2 / layer.in_features), generator=stream)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def mlp(
    task: Task,
    norm: Callable[[int], nn.Module] | None = None,
    depth: int = 3,
    width: int = 64,
    order: str = "LNA",
    activation: Callable[[], nn.Module] = nn.ReLU,
    scale: float | None = 1.0,
    bias: bool = True,
    p: float = 0.0,
    last_p: float = 0.0,
) -> nn.Module:
    """`depth` hidden blocks: (N, C, H, W) to logits (N, classes).

    order: of L(inear), N(orm) and A(ctivation) in a block. scale: of the start; None leaves PyTorch's default.
    p: dropout at the end of each block; last_p: only after the last.
    """
    blocks: list[nn.Module] = [nn.Flatten()]
    inputs = prod(task.shape)
    for _ in range(depth):
        parts = {"L": nn.Linear(inputs, width, bias), "A": activation()}
        if norm:
            parts["N"] = norm(inputs if order.startswith("N") else width)
        block = [parts[each] for each in order if each in parts]
        blocks.append(nn.Sequential(*block, nn.Dropout(p)) if p else nn.Sequential(*block))
        inputs = width
    model = nn.Sequential(*blocks, *([nn.Dropout(last_p)] if last_p else []), nn.Linear(inputs, task.classes))
    return model if scale is None else start(model, scale)


class Skip(nn.Module):
    """x + f(x) with f of two layers, the second of which starts at zero: the block starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        nn.init.zeros_(self.branch[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def skip_net(task: Task, depth: int, width: int = 64) -> nn.Module:
    """A network of `depth` hidden layers without norms, in which every two layers are bridged by a skip connection."""
    first = [nn.Flatten(), nn.Linear(prod(task.shape), width), nn.ReLU()]
    blocks = [Skip(width) for _ in range((depth - 1) // 2)]
    rest = [nn.Linear(width, width), nn.ReLU()] if depth % 2 == 0 else []
    return nn.Sequential(*first, *blocks, *rest, nn.Linear(width, task.classes))


# %% [markdown]
# ## What is held fixed
#
# 400 digits with right labels, three hidden layers, SGD with momentum, 32 steps; experiments 2 and 12 use deeper
# networks, in which there is more to see. So few steps are a choice: batch norm is about how fast and how reliably a
# network trains, and given time enough many networks arrive. Verdicts are about this budget.
#
# The best learning rate depends on what is compared, so every arm gets its own: the one that is best on validation, on
# seeds that no result uses. The grid is printed first. Where a rate is shared, the text says so.

# %%
SGD = partial(torch.optim.SGD, momentum=0.9, fused=True)
BASELINE = Recipe(model=mlp, optimizer=partial(SGD, lr=0.03), epochs=8, batch_size=100, examples=400, evaluations=2)
# On every data set but the digits: so many times as many training images and epochs, and the seeds of a run. At 1 and 1
# nothing but the data differs; set them higher if you have the time, or a GPU.
LARGER = Larger(examples=1, epochs=1, seeds=10)
NORM = nn.BatchNorm1d
WITH = replace(BASELINE, model=partial(mlp, norm=NORM))
PLAIN, BN = "plain", "BN"
GRID = (0.01, 0.03, 0.1, 0.3)
IOFFE, SANTURKAR, LI = "Ioffe & Szegedy 2015", "Santurkar et al. 2018", "Li et al. 2019"
GUIDE, ADVICE = "study guide", "common advice"


def at_rate(recipe: Recipe, rate: float) -> Recipe:
    """The recipe with another learning rate."""
    return replace(recipe, optimizer=partial(SGD, lr=rate))


def at_best_rate(lab: Lab, arms: dict[str, Recipe], rates: Sequence[float] = GRID) -> dict[str, Recipe]:
    """Each arm at the learning rate that is best for it on validation; prints the grid."""
    grids = {arm: {rate: at_rate(recipe, rate) for rate in rates} for arm, recipe in arms.items()}
    tuning = lab.tune("Learning rate", grids, count=2)
    return {arm: grids[arm][tuning.best(arm)] for arm in arms}


def curves_and_dots(lab: Lab, runs: Comparison, title: str) -> None:
    """The experiment's figure: validation loss by epoch, and test accuracy, whose labels are the legend of both."""
    figure, axes = new_figure(title, 2)
    plot_curves(axes[0], runs, "validation_loss", legend=False)
    axes[0].set(ylabel="validation loss (nats)", ylim=(0, 2.5))
    plot_dots(axes[1], {arm: points(runs.estimate("test_accuracy", arm)) for arm in runs.arms}, BLACK)
    axes[1].set(xlabel="test accuracy (%)")
    palette = colours(list(runs.arms), next(iter(runs.baseline.values())))
    for label in axes[1].get_yticklabels():
        label.set_color(palette[label.get_text()])
    lab.figure(lab.name, figure)


# %% [markdown]
# ## 1. Mechanism
#
# First the layer alone, beside PyTorch's. Then what arrives at the ReLU of the second hidden layer while a network
# trains, with a shared rate: without batch norm the distribution wanders and widens, with it the quantiles stay.


# %%
def against_torch(name: str, ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """A row of the table: the largest difference between the layers after three training batches of `shape`."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = [(3 * torch.randn(shape, generator=draw) + 1).requires_grad_()]
        x.append(x[0].detach().clone().requires_grad_())
        weights = torch.randn(shape, generator=draw)
        out = [layer.train()(each) for layer, each in zip((ours, theirs), x, strict=True)]
        for each in out:
            (weights * each).sum().backward()
    pairs = [out, [each.grad for each in x], [ours.running_mean, theirs.running_mean]]
    pairs += [[ours.running_var, theirs.running_var], [layer.eval()(x[0]) for layer in (ours, theirs)]]
    return [name, *(f"{float((a - b).detach().abs().max()):.0e}" for a, b in pairs)]


def which_variance(n: int) -> list[str]:
    """A row of the table: variances of n numbers, and what nn.BatchNorm1d keeps of them with momentum 1."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(n))
    layer = NORM(1, momentum=1.0)
    normalised = layer(x).detach()
    variances = x.var(correction=0), x.var(), layer.running_var, normalised.var(correction=0)
    return [str(n), *(number(float(each)) for each in variances)]


HIDDEN = 2  # the hidden block that we look into
EDGES = np.linspace(-8, 8, 65)
LOOKS = tuple(range(4, 33, 4))


def over_looks(table: np.ndarray) -> np.ndarray:
    """The mean over the looks, axis 1, of a note (seeds, looks, …); NaN for a run that diverged before the first."""
    return np.ma.masked_invalid(table).mean(1).filled(nan)


def before_activation(model: nn.Module, x: Tensor) -> Tensor:
    """What arrives at the activation of block HIDDEN, (N, width), for images x."""
    return model[HIDDEN][:-1](model[:HIDDEN](x))


@torch.no_grad()
def note_quantiles(state: State) -> None:
    """Note the 15, 50 and 85 % quantiles of what arrives at one layer's activation, averaged over its units."""
    x = state.split.validation.x
    table = state.notes.setdefault("quantiles", torch.full((len(LOOKS), 3), nan, device=x.device))
    if state.step in LOOKS:
        arriving = before_activation(state.model.eval(), x)
        quantiles = torch.linspace(0.15, 0.85, 3, device=x.device)
        table[LOOKS.index(state.step)] = arriving.quantile(quantiles, 0).mean(1)
        state.model.train()


@torch.no_grad()
def note_histogram(model: nn.Module, split: Split) -> dict[str, Any]:
    """The distribution of what arrives at one layer's activation after training, as shares of the bins of EDGES."""
    arriving = before_activation(model.eval(), split.validation.x).cpu().numpy()
    counts, _ = np.histogram(np.clip(arriving, EDGES[0], EDGES[-1]), EDGES)
    return {"histogram": counts / counts.sum(), "deviation": float(arriving.std(0).mean())}


def mechanism(lab: Lab) -> None:
    """What does batch norm do to a batch, and what does it do to the numbers that arrive at a hidden layer?"""
    heads = ["ours − PyTorch's", "output", "gradient", "running\nmean", "running\nvariance", "output,\neval"]
    rows = [
        against_torch("vectors (50, 64)", BatchNorm(64), NORM(64), (50, 64)),
        against_torch("images (50, 8, 6, 6)", BatchNorm(8), nn.BatchNorm2d(8), (50, 8, 6, 6)),
        against_torch("vectors, momentum None", BatchNorm(64, None), NORM(64, momentum=None), (50, 64)),
    ]
    lab.table(Table("The largest difference after three batches", heads, rows))
    heads = ["batch size", "variance,\nbiased", "variance,\nunbiased", "running\nvariance", "variance\nof output"]
    lab.table(Table("Which variance goes where (momentum 1)", heads, [which_variance(n) for n in (2, 4, 16, 128)]))
    try:
        NORM(64)(torch.randn(1, 64))
    except ValueError as error:
        lab.finding(f"A training batch of one: {type(error).__name__}: {error}")
    lab.finding("Leave out a last batch of one (DataLoader's drop_last), or use another norm (lesson 17).")

    arms = {arm: replace(recipe, after_step=note_quantiles) for arm, recipe in {PLAIN: BASELINE, BN: WITH}.items()}
    runs = lab.compare(arms, PLAIN, note_histogram)
    figure, axes = new_figure("What arrives at the second hidden layer's ReLU?", 2)
    for arm, colour in colours(list(arms), PLAIN).items():
        quantiles = runs.notes("quantiles", arm)
        for i, style in enumerate(("--", "-", "--")):
            plot_estimates(axes[0], LOOKS, estimates(quantiles[:, :, i]), arm if i == 1 else f"_{arm}", colour, style)
        shares = [100 * each.mean for each in estimates(runs.notes("histogram", arm))]
        axes[1].stairs(shares, EDGES, color=colour, label=arm, linewidth=1.8)
        wide = runs.notes("deviation", arm)
        lab.finding(f"{arm}: after training, a unit's deviation over the images is {estimate(wide).mean:.2f}.")
    axes[0].set(xlabel="step", ylabel="median (dashed: 15 and 85 % quantiles)")
    axes[1].set(xlabel="input of the ReLU after training (outermost bins: all beyond)", ylabel="share (%)")
    shared_legend(figure, axes[0])
    lab.figure("mechanism", figure)
    moves = {arm: np.abs(np.diff(runs.notes("quantiles", arm), axis=1)).mean((1, 2)) for arm in arms}
    statement = "Layer inputs are stabler: their quantiles move less from step to step"
    lab.claim(statement, IOFFE, paired_difference(moves[BN], moves[PLAIN]), below(0), "")


# %% [markdown]
# ## 2. Depth
#
# The famous experiment: a deep network does not train, add batch norm and it does. Two questions are seldom asked. Is
# batch norm *necessary*, or would a better start (He's, lesson 19) or skip connections have done as well? And does it
# go on working as the network gets deeper? Yang et al. predict that it does not: at the start, the gradient grows
# exponentially from the last layer to the first, and batch norm itself is the cause.
#
# Four networks: with PyTorch's default start, plain and with batch norm (BN); with He's start; with skip connections.
# Each gets its own rate: the best at 5 layers, also used for 2; at 10; at 20, also used for 40. A run counts as trained
# when it gets half of its training digits right; chance is a tenth. The claims are about the share of seeds that train.

# %%
DEPTHS = (2, 5, 10, 20, 40)
DEFAULT, HE, SKIP = "default", "He", "skips"
NETWORKS = {DEFAULT: partial(mlp, scale=None), BN: partial(mlp, norm=NORM, scale=None), HE: mlp, SKIP: skip_net}


def share_that_trains(runs: Comparison, arm: str) -> Estimate:
    """Share of the runs, in %, that get half of their training images right; a diverged one does not."""
    return points(proportion(np.nan_to_num(runs.values("train_accuracy", arm)) >= 0.5))


def gradient_growth(network: Callable[..., nn.Module], depth: int, dataset: str, seed: int) -> float:
    """At the start: the gradient's norm in the first hidden layer over that in the last, as a power of ten."""
    data = load(dataset)
    torch.manual_seed(seed)
    model = network(data.task, depth=depth)
    x, y = make_split(data, seed, BASELINE.examples).train
    cross_entropy(model, x[: BASELINE.batch_size], y[: BASELINE.batch_size]).backward()
    norms = [float(layer.weight.grad.norm()) for layer in model.modules() if isinstance(layer, nn.Linear)]
    kept = [norm for norm in norms[1:-1] if norm > 0]  # the second layer of a skip starts at zero, and blocks the first
    return log10(kept[0] / kept[-1]) if kept else nan


def depth(lab: Lab) -> None:
    """Do deep networks need batch norm to train, and is batch norm enough?"""

    def recipe(name: str, n: int) -> Recipe:
        return replace(BASELINE, model=partial(NETWORKS[name], depth=n), evaluations=4)

    arms, baseline = {}, {}
    for tuned, depths in {5: (2, 5), 10: (10,), 20: (20, 40)}.items():
        best = at_best_rate(lab, {f"{name}, {tuned} layers": recipe(name, tuned) for name in NETWORKS}, GRID[:3])
        for n in depths:
            for name in NETWORKS:
                optimizer = best[f"{name}, {tuned} layers"].optimizer
                arms[f"{name} {n}"] = replace(recipe(name, n), optimizer=optimizer)
                baseline[f"{name} {n}"] = f"{DEFAULT} {n}"
    runs = lab.compare(arms, baseline)

    share = {arm: share_that_trains(runs, arm) for arm in arms}
    rows = [[name, *(f"{share[f'{name} {n}'].mean:.0f}" for n in DEPTHS)] for name in NETWORKS]
    heads = ["network", *(f"{n} layers" for n in DEPTHS)]
    lab.table(Table("Share of seeds that train, in %", heads, rows))
    seeds = lab.settings.seeds
    grows = {
        (name, n): estimate(list(lab.executor.map(partial(gradient_growth, net, n, lab.settings.dataset), seeds)))
        for name, net in NETWORKS.items()
        for n in (10, 20, 40)
    }
    rows = [[name, *(f"{grows[name, n].mean:+.1f}" for n in (10, 20, 40))] for name in NETWORKS]
    title = "Gradient at the start, first hidden layer over last, powers of ten"
    lab.table(Table(title, ["network", "10 layers", "20 layers", "40 layers"], rows))

    figure, axes = new_figure("Do deep networks need batch norm?", 3)
    for name, colour in colours(list(NETWORKS), DEFAULT).items():
        accuracy = [points(runs.estimate("test_accuracy", f"{name} {n}")) for n in DEPTHS]
        plot_estimates(axes[0], DEPTHS, accuracy, name, colour)
        for ax, n in zip(axes[1:], (10, 20), strict=True):
            losses = estimates(runs.history("train_loss", f"{name} {n}"))
            plot_estimates(ax, runs.epochs(f"{name} {n}"), losses, name, colour)
    log_ticks(axes[0], DEPTHS)
    axes[0].set(xlabel="hidden layers", ylabel="test accuracy (%)")
    for ax, n in zip(axes[1:], (10, 20), strict=True):
        ax.set(xlabel=f"epoch ({n} layers)", ylabel="training loss (nats)", ylim=(0, 3))
    shared_legend(figure, axes[0])
    lab.figure("depth", figure)

    for n in (10, 20, 40):
        names = [name for name in NETWORKS if share[f"{name} {n}"].mean > 50]
        lab.finding(f"{n} layers train on most seeds with: {', '.join(names) or 'none of these'}.")

    lab.claim("Two layers: nothing to gain from batch norm", ADVICE, runs.gain(f"{BN} 2"), within(1))
    lab.claim("Five layers: batch norm pays", GUIDE, runs.gain(f"{BN} 5"), above(0.5))
    for n in (10, 20):
        lab.claim(f"{n} layers fail without it (default start)", GUIDE, share[f"{DEFAULT} {n}"], below(50), "%")
        lab.claim(f"{n} layers train with it", GUIDE, share[f"{BN} {n}"], above(50), "%")
        lab.claim(f"{n} layers: necessary, He's start fails", GUIDE, share[f"{HE} {n}"], below(50), "%")
        lab.claim(f"{n} layers: necessary, skips fail", GUIDE, share[f"{SKIP} {n}"], below(50), "%")
    lab.claim("40 layers train with it", GUIDE, share[f"{BN} 40"], above(50), "%")
    short = runs.gain(f"{BN} 40", f"{SKIP} 40")
    lab.claim("40 layers: batch norm is as good as skip connections", GUIDE, short, above(-1))
    grown = grows[BN, 40]
    statement = "It makes the gradient grow, at least tenfold over 40 layers"
    lab.claim(statement, "Yang et al. 2019", grown, above(1), "powers of 10")


# %% [markdown]
# ## 3. Learning rate
#
# "Batch norm allows much higher learning rates." A grid over three decades, with and without, from the same start. A
# rate *works* for a run when validation accuracy reaches 80 % (65 % on data sets that are harder than digits, where 80
# % is out of reach in 32 steps); the width of the range is counted in decades.

# %%
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
EASY = {"digits": 0.8, "mnist": 0.8}


def good_accuracy(dataset: str) -> float:
    """The accuracy (0…1) that counts as good on a data set, for rates, starts and steps that "work"."""
    return EASY.get(dataset, 0.65)


def median(values: np.ndarray) -> Estimate:
    """Median with quartiles, for losses that span decades; a diverged run counts as infinitely bad."""
    ranked = np.percentile(np.nan_to_num(values, nan=np.inf), (50, 25, 75), method="inverted_cdf")
    return Estimate(*ranked, len(values))


def accuracy_and_loss(figure: Figure, axes: list[Axes], runs: Comparison, names: list[str], x: Sequence[float]) -> None:
    """Test accuracy and training loss of the arms "name x" against x, on a logarithmic axis."""
    for name, colour in colours(names, PLAIN).items():
        arms = [f"{name} {each:g}" for each in x]
        plot_estimates(axes[0], x, [points(runs.estimate("test_accuracy", arm)) for arm in arms], name, colour)
        plot_estimates(axes[1], x, [median(runs.values("train_loss", arm)) for arm in arms], name, colour)
    axes[0].set(ylabel="test accuracy (%)")
    axes[1].set(ylabel="training loss (nats), median", yscale="log")
    shared_legend(figure, axes[0])


def working(runs: Comparison, name: str, good: float) -> np.ndarray:
    """Which rates work, (seeds, len(RATES)): validation accuracy of at least `good` at the end."""
    arms = [f"{name} {rate:g}" for rate in RATES]
    return np.array([np.nan_to_num(runs.values("validation_accuracy", arm)) >= good for arm in arms]).T


def learning_rate(lab: Lab) -> None:
    """Does batch norm allow higher learning rates, and more of them?"""
    both = {PLAIN: BASELINE, BN: WITH}
    arms = {f"{name} {rate:g}": at_rate(recipe, rate) for name, recipe in both.items() for rate in RATES}
    runs = lab.compare(arms, {arm: f"{arm.split()[0]} 0.03" for arm in arms})
    best = {name: runs.best([f"{name} {rate:g}" for rate in RATES]) for name in both}
    widths, tops, rows = {}, {}, []
    for name in both:
        works = working(runs, name, good_accuracy(lab.settings.dataset))
        widths[name] = works.sum(1) * log10(RATES[-1] / RATES[0]) / (len(RATES) - 1)
        tops[name] = np.log10([max(np.array(RATES)[row], default=nan) for row in works])
        accuracy = points(runs.estimate("test_accuracy", best[name]))
        cells = [number(estimate(widths[name]).mean, 2), number(10 ** estimate(tops[name]).mean, 2)]
        rows.append([name, *cells, best[name].split()[1], number(accuracy.mean, 1)])
    heads = ["network", "decades\nthat work", "highest rate\nthat works", "best rate\n(validation)", "its test\nacc. %"]
    lab.table(Table("The rates that work", heads, rows))

    figure, axes = new_figure("Does batch norm allow higher learning rates?", 2)
    accuracy_and_loss(figure, axes, runs, list(both), RATES)
    for ax in axes:
        log_ticks(ax, RATES)
        ax.set_xlabel("learning rate")
    lab.figure("learning_rate", figure)

    higher = paired_difference(tops[BN], tops[PLAIN])
    lab.claim("It can use higher learning rates, by half a decade at least", IOFFE, higher, above(0.5), "decades")
    lab.finding(f"The highest rate that works is {10**higher.mean:.1f} times as high with BN.")
    wider = paired_difference(widths[BN], widths[PLAIN])
    lab.claim("More rates work", IOFFE, wider, above(0), "decades")
    lab.claim("Each at its best rate, batch norm is more accurate", GUIDE, runs.gain(best[BN], best[PLAIN]), above(0.5))


# %% [markdown]
# ## 4. The start
#
# "Less sensitive to initialisation." Twenty scales of the starting weights, from a hundredth of He's to sixty times as
# large, 16 steps, each network at the rate that is best for it at scale 1.
#
# Why should there be any sensitivity left? The *output* of a batch-normed layer does not depend on the scale of its
# weights, but its gradient does: weights ten times as large get a gradient ten times as small, and move a hundred
# times less in proportion. A large start acts like a small learning rate (van Laarhoven).

# %%
SCALES = tuple(float(f"{10 ** (i / 5):.2g}") for i in range(-10, 10))


def initial_scale(lab: Lab) -> None:
    """Does batch norm make a network insensitive to the scale of its starting weights?"""
    short = replace(BASELINE, model=mlp, epochs=4, evaluations=1)
    short = {PLAIN: short, BN: replace(short, model=partial(mlp, norm=NORM))}
    best = at_best_rate(lab, short)
    arms = {
        f"{name} {scale:g}": replace(recipe, model=partial(recipe.model, scale=scale))
        for name, recipe in best.items()
        for scale in SCALES
    }
    runs = lab.compare(arms, {arm: f"{arm.split()[0]} 1" for arm in arms})
    figure, axes = new_figure("Does batch norm make the start unimportant?", 2)
    accuracy_and_loss(figure, axes, runs, list(best), SCALES)
    for ax in axes:
        log_ticks(ax, (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60))
        ax.set_xlabel("scale of the starting weights (1: He's start)")
    lab.figure("initial_scale", figure)

    least = good_accuracy(lab.settings.dataset)
    good = {
        name: np.sum([np.nan_to_num(runs.values("test_accuracy", f"{name} {s:g}")) >= least for s in SCALES], 0)
        for name in best
    }
    for name in best:
        reached = f"{estimate(good[name]).mean:.1f} of {len(SCALES)} scales"
        lab.finding(f"{name}: {reached} reach {100 * least:.0f} % on the test set.")
    more = paired_difference(good[BN], good[PLAIN])
    lab.claim("Less sensitive to the start: more scales work", GUIDE, more, above(0), f"of {len(SCALES)} scales")
    small, large = (next(s for s in SCALES if s > limit) for limit in (0.09, 8))
    for word, scale in (("small", small), ("large", large)):
        cost = points(runs.difference("test_accuracy", f"{BN} {scale:g}"))
        lab.claim(f"With it, a start {scale:g} times He's costs nothing (too {word})", GUIDE, cost, within(1))


# %% [markdown]
# ## 5. Speed
#
# How many steps to 80 % on validation (65 % where that is a good accuracy), each network at the rate at which it is
# best? Two networks: ours, and the small one of Ioffe and Szegedy, three layers of 100 sigmoid units. A run that never
# gets there counts with the length of the run, so the ratios are lower bounds. They reported 14 times fewer steps, for
# a large network of images.

# %%
EVERY = 2


def note_arrival(state: State, target: float) -> None:
    """Note the first step, of every second one, at which validation accuracy reaches the target; NaN if none does."""
    if state.step % EVERY == 0:
        validation = state.split.validation
        enough = totals(state.model, validation)[1] >= target * len(validation.y)
        arrival = torch.where(enough, float(state.step), nan)
        state.notes["steps"] = torch.fmin(state.notes.get("steps", arrival), arrival)  # of a number and NaN the number


def speed(lab: Lab) -> None:
    """How many steps does batch norm save on the way to a given accuracy, and for which network?"""
    sigmoid = partial(mlp, width=100, activation=nn.Sigmoid, scale=sqrt(0.5))
    nets = {
        "ReLU": BASELINE,
        "ReLU, BN": WITH,
        "sigmoid": replace(BASELINE, model=sigmoid, epochs=26),
        "sigmoid, BN": replace(BASELINE, model=partial(sigmoid, norm=NORM), epochs=26),
    }
    relu, sigmoids = (dict(list(nets.items())[i : i + 2]) for i in (0, 2))
    best = at_best_rate(lab, relu) | at_best_rate(lab, sigmoids, (0.1, 0.3, 1.0))
    target = good_accuracy(lab.settings.dataset)
    noting = partial(note_arrival, target=target)
    arms = {arm: replace(recipe, after_step=noting, evaluations=4) for arm, recipe in best.items()}
    runs = lab.compare(arms, {arm: arm.split(",")[0] for arm in arms})
    steps, late, rows = {}, {}, []
    for arm, recipe in runs.arms.items():
        arrived = runs.notes("steps", arm)
        steps[arm] = np.where(np.isnan(arrived), 4 * recipe.epochs, arrived)
        late[arm] = np.isnan(arrived)
        rows.append([arm, number(estimate(steps[arm]).mean, 1), f"{late[arm].sum()} of {len(arrived)}"])
    lab.table(Table(f"Steps to {100 * target:.0f} % on validation", ["network", "steps", "never there"], rows))

    figure, axes = new_figure("How many steps does batch norm save?", 2)
    for ax, name in zip(axes, ("ReLU", "sigmoid"), strict=True):
        for arm, colour in ((name, BLACK), (f"{name}, BN", COLOURS[0])):
            accuracy = [points(each) for each in estimates(runs.history("validation_accuracy", arm))]
            plot_estimates(ax, [4 * epoch for epoch in runs.epochs(arm)], accuracy, arm, colour)
        ax.axhline(100 * target, color="grey", linewidth=1, linestyle=":")
        ax.set(xlabel="step (dotted: the target)", ylabel="validation accuracy (%)")
        ax.legend(frameon=False, loc="lower right")
    lab.figure("speed", figure)
    for name in ("ReLU", "sigmoid"):
        ratio = steps[name] / steps[f"{name}, BN"]
        lab.finding(f"{name} network: {number(estimate(ratio).mean, 1)} times fewer steps with BN.")
        lab.claim(f"Fewer steps to {100 * target:.0f} % ({name} network)", IOFFE, estimate(ratio), above(1), "times")
        ratio = np.where(late[name], nan, ratio)  # a lower bound cannot refute this
        lab.claim(f"14 times fewer steps ({name} network)", IOFFE, estimate(ratio), above(14), "times")


# %% [markdown]
# ## 6. Where to put it
#
# Before the activation (the paper's way), after it, or in front of the linear layer. And with or without the linear
# layer's bias: the mean is subtracted right after, so the bias can do nothing. Its gradient is zero but for rounding.


# %%
def bias_gradient(model: nn.Module, split: Split) -> dict[str, Any]:
    """The gradient's norm in the biases of the hidden layers over that in their weights."""
    model.train().zero_grad()
    cross_entropy(model, *split.train).backward()
    hidden = [layer for layer in model[1:-1].modules() if isinstance(layer, nn.Linear)]
    if hidden[0].bias is None:
        return {}
    bias, weight = (torch.cat([getattr(layer, name).grad.flatten() for layer in hidden]) for name in ("bias", "weight"))
    return {"bias": float(bias.norm() / weight.norm())}


def placement(lab: Lab) -> None:
    """Before the activation, after it, or before the linear layer: does the place of batch norm matter?"""
    no_bias, before, after, first = "before ReLU, no bias", "before ReLU", "after ReLU", "before Linear"
    models = {
        PLAIN: mlp,
        before: partial(mlp, norm=NORM),
        no_bias: partial(mlp, norm=NORM, bias=False),
        after: partial(mlp, norm=NORM, order="LAN"),
        first: partial(mlp, norm=NORM, order="NLA"),
    }
    recipes = {arm: replace(BASELINE, model=model) for arm, model in models.items()}
    best = at_best_rate(lab, {arm: recipe for arm, recipe in recipes.items() if arm != no_bias}, GRID[:3])
    best = {arm: replace(recipe, evaluations=4) for arm, recipe in best.items()}
    best[no_bias] = replace(best[before], model=models[no_bias])  # nothing but the bias varies
    runs = lab.compare(best, before, bias_gradient)
    rows = [[arm, number(estimate(runs.notes("bias", arm)).mean, 4)] for arm in best if arm != no_bias]
    lab.table(Table("The gradient of the hidden biases, as a share of the weights'", ["place", "share"], rows))
    curves_and_dots(lab, runs, "Where should batch norm go?")

    means = [100 * runs.estimate("test_accuracy", arm).mean for arm in (before, after, first)]
    lab.finding(f"The three places differ by {max(means) - min(means):.1f} points of test accuracy.")
    lab.claim("After the ReLU also works: better than none", GUIDE, runs.gain(after, PLAIN), above(0.5))
    lab.claim("Before and after the ReLU are equally good", GUIDE, runs.gain(after), within(1))
    lab.claim("Before the linear layer it is as good, too", ADVICE, runs.gain(first), within(1))
    lab.claim("The bias before batch norm is redundant", IOFFE, runs.gain(no_bias), within(0.5))


# %% [markdown]
# ## 7. Two modes
#
# In eval mode the layer uses its running statistics. Are they right? Three ways to evaluate one and the same network:
# with the running statistics; with statistics *recomputed* over the whole training set (what
# `torch.optim.swa_utils.update_bn` does); and with those of the batch at hand, which is what you get when you forget
# `eval()`. The last depends on the company: on how many images are in the batch, and on which.


# %%
@torch.no_grad()
def recomputed(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of the model whose running statistics are those of all images x in one batch, dropout switched off."""
    model = deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, NORM):
            layer.momentum = 1.0  # nothing of the old ones is kept
            layer.train()
    model(x)
    return model.eval()


@torch.no_grad()
def accuracy_with_batches(model: nn.Module, batch: Batch, size: int) -> float:
    """Accuracy in TRAINING mode on consecutive batches of `size`; the model is left as it was."""
    model = deepcopy(model).train()
    batches = [pair for pair in zip(batch.x.split(size), batch.y.split(size), strict=True) if len(pair[1]) > 1]
    right = sum(float((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


STEPS = (2, 4, 8, 16, 32)


def note_modes(state: State) -> None:
    """Note validation accuracy with running and with recomputed statistics after the steps of STEPS."""
    validation = state.split.validation
    table = state.notes.setdefault("modes", torch.full((len(STEPS), 2), nan, device=validation.x.device))
    if state.step in STEPS:
        models = state.model, recomputed(state.model, state.split.train.x)
        right = torch.stack([totals(model, validation)[1] for model in models])
        table[STEPS.index(state.step)] = right / len(validation.y)


COMPANY = (4, 20, 400)


def forgotten_eval(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test accuracy in eval mode, then in training mode in batches of COMPANY, then in batches of one class each."""
    by_class = torch.argsort(split.test.y, stable=True)
    sorted_test = Batch(split.test.x[by_class], split.test.y[by_class])
    mixed = [accuracy_with_batches(model, split.test, size) for size in COMPANY]
    alike = [accuracy_with_batches(model, sorted_test, size) for size in COMPANY]
    return {"eval": evaluate(model, split.test)[1], "mixed": mixed, "alike": alike}


def modes(lab: Lab) -> None:
    """How good are the running statistics, how fast must they follow, and what if eval() is forgotten?"""
    momenta = (0.1, 0.01, 0.5)
    recipe = replace(WITH, after_step=note_modes)
    arms = {
        f"momentum {momentum}": replace(recipe, model=partial(mlp, norm=partial(NORM, momentum=momentum)))
        for momentum in momenta
    }
    runs = lab.compare(arms, "momentum 0.1", forgotten_eval)
    figure, axes = new_figure("Are the running statistics right, and what if eval() is forgotten?", 2)
    rows = []
    for arm, colour in colours(list(arms), "momentum 0.1").items():
        running = estimates(100 * runs.notes("modes", arm)[:, :, 0])
        plot_estimates(axes[0], STEPS, running, arm, colour)
        rows.append([arm, *(number(each.mean, 1) for each in running)])
    fresh = estimates(100 * runs.notes("modes", "momentum 0.1")[:, :, 1])
    plot_estimates(axes[0], STEPS, fresh, "recomputed", COLOURS[2], "--")
    rows.append(["recomputed", *(number(each.mean, 1) for each in fresh)])
    lab.table(Table("Validation accuracy (%) in eval mode, by steps trained", ["statistics", *map(str, STEPS)], rows))
    log_ticks(axes[0], STEPS)
    axes[0].set(xlabel="step", ylabel="validation accuracy in eval mode (%)")
    axes[0].legend(frameon=False, loc="upper left")

    right = points(estimate(runs.notes("eval", "momentum 0.1")))
    rows = [["eval mode", *[number(right.mean, 1)] * len(COMPANY)]]
    for name, label, colour in (
        ("mixed", "training mode, mixed classes", COLOURS[0]),
        ("alike", "training mode, sorted by class", COLOURS[1]),
    ):
        accuracy = estimates(100 * runs.notes(name, "momentum 0.1"))
        plot_estimates(axes[1], COMPANY, accuracy, label, colour)
        rows.append([label, *(number(each.mean, 1) for each in accuracy)])
    lab.table(Table("Test accuracy (%) by images in the test batch", ["evaluated in", *map(str, COMPANY)], rows))
    axes[1].axhline(right.mean, color=BLACK, label="eval mode")
    log_ticks(axes[1], COMPANY)
    axes[1].set(xlabel="images in a test batch", ylabel="test accuracy (%)")
    shared_legend(figure, axes[1])
    lab.figure("modes", figure)

    table = runs.notes("modes", "momentum 0.1")
    early = points(paired_difference(table[:, 2, 0], table[:, 2, 1]))
    lab.finding(f"After {STEPS[2]} steps running statistics (0.1) are {-early.mean:.1f} points behind recomputed ones.")
    lab.claim(f"After {STEPS[2]} steps the running statistics are not ready yet", ADVICE, early, below(-0.5))
    late = points(paired_difference(table[:, -1, 0], table[:, -1, 1]))
    lab.claim(f"After {STEPS[-1]} steps they are as good as recomputed ones", ADVICE, late, within(1))
    slow = runs.gain("momentum 0.01")
    lab.claim("Momentum 0.01 is too slow for 32 steps", ADVICE, slow, below(-0.5))
    for name, size, company in (
        ("mixed", 4, "4 mixed images"),
        ("mixed", 400, "400 mixed images"),
        ("alike", 20, "20 images, sorted by class"),
    ):
        cost = runs.notes(name, "momentum 0.1")[:, COMPANY.index(size)] - runs.notes("eval", "momentum 0.1")
        lab.claim(f"eval() forgotten costs accuracy ({company})", ADVICE, points(estimate(cost)), below(-0.5))


# %% [markdown]
# ## 8. Small batches
#
# With a small batch the statistics are noisy in training, and the running ones an average of noisy ones. In a batch of
# two every unit can only say which of the two images has more of it: its normalised values are +1 and -1. Batch sizes
# from 2 to 128, two hidden layers, 128 digits, 64 steps for every size, all at a rate of 0.01 (shared, not tuned;
# lesson 17 tunes the rate for every size and every norm). If the running statistics were the trouble, recomputing them
# would mend it.

# %%
SIZES = (2, 4, 8, 32, 128)


def both_statistics(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test accuracy with the running statistics, with recomputed ones, and with those of the whole test set."""
    fresh = recomputed(model, split.train.x)
    accuracies = [evaluate(each, split.test)[1] for each in (model, fresh)]
    return {"by statistics": [*accuracies, accuracy_with_batches(model, split.test, len(split.test.y))]}


def small_batches(lab: Lab) -> None:
    """What is lost with small batches, and is it the running statistics that lose it?"""
    arms, baseline = {}, {}
    for size in SIZES:
        for name, norm in ((PLAIN, None), (BN, NORM)):
            recipe = replace(
                BASELINE, model=partial(mlp, norm=norm, depth=2), examples=128, epochs=size // 2, evaluations=1
            )
            arms[f"{name} {size}"] = replace(at_rate(recipe, 0.01), batch_size=size)
            baseline[f"{name} {size}"] = f"{PLAIN} {size}"
    runs = lab.compare(arms, baseline, both_statistics)
    tables = {size: runs.notes("by statistics", f"{BN} {size}") for size in SIZES}
    figure, axes = new_figure("What is lost with small batches?")
    plain = [points(runs.estimate("test_accuracy", f"{PLAIN} {size}")) for size in SIZES]
    plot_estimates(axes[0], SIZES, plain, PLAIN, BLACK)
    rows = [[PLAIN, *(number(each.mean, 1) for each in plain)]]
    names = "running statistics", "recomputed", "the test set's own"
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        accuracy = [points(estimate(tables[size][:, i])) for size in SIZES]
        plot_estimates(axes[0], SIZES, accuracy, f"BN, {name}", colour)
        rows.append([name, *(number(each.mean, 1) for each in accuracy)])
    lab.table(Table("Test accuracy (%) by batch size in training", ["statistics", *map(str, SIZES)], rows))
    log_ticks(axes[0], SIZES)
    axes[0].set(xlabel="batch size in training", ylabel="test accuracy (%)")
    axes[0].legend(frameon=False)
    lab.figure("small_batches", figure)
    lost, back = runs.gain(f"{BN} 2"), points(paired_difference(tables[2][:, 1], tables[2][:, 0]))
    lab.finding(f"Batches of 2: BN against plain {interval(lost)} points; recomputing gives back {interval(back)}.")
    for size in (2, 8):
        lab.claim(f"Batches of {size}: batch norm is worse than none", GUIDE, runs.gain(f"{BN} {size}"), below(-0.5))
    lab.claim("Batches of 2: recomputed statistics mend some of it", ADVICE, back, above(0.5))


# %% [markdown]
# ## 9. Why does it work? Not by stable inputs
#
# The paper's explanation was that the inputs of a layer change less from step to step while the layers below learn.
# Santurkar et al. put it to the test: they made the inputs *unstable* again, with noise after batch norm whose mean and
# scale change at every step, and the network trained as well as before. Here each unit gets a new shift from
# U(-0.5, 0.5) and a new scale from U(0.75, 1.25) at every training step (numbers of ours).
#
# "Drift" is the change of a unit's mean between two looks, in units of its deviation, at what arrives at the ReLU.


# %%
class NoisyBatchNorm(NORM):
    """Batch norm whose output is scaled and shifted at random in training, anew each step. Santurkar et al. 2018."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.training:
            return out
        shift, scale = torch.rand(2, self.num_features, device=x.device) - 0.5
        return out * (1 + scale / 2) + shift


@torch.no_grad()
def note_drift(state: State) -> None:
    """Note how far the inputs of one layer's activation move, in training mode, from one look to the next."""
    x = state.split.train.x
    table = state.notes.setdefault("drift", torch.full((len(LOOKS),), nan, device=x.device))
    if state.step not in LOOKS:
        return
    arriving = before_activation(deepcopy(state.model).train(), x)
    mean, deviation = arriving.mean(0), arriving.std(0, correction=0)
    if "mean" in state.notes:
        table[LOOKS.index(state.step)] = ((mean - state.notes["mean"]).abs() / (deviation + 1e-6)).mean()
    state.notes["mean"] = mean


def noise(lab: Lab) -> None:
    """If the inputs of every layer are shaken after batch norm, does the network still train as well?"""
    noisy = "with noise after"
    nets = {PLAIN: BASELINE, BN: WITH, noisy: replace(BASELINE, model=partial(mlp, norm=NoisyBatchNorm))}
    arms = {arm: replace(recipe, after_step=note_drift) for arm, recipe in at_best_rate(lab, nets).items()}
    runs = lab.compare(arms, PLAIN)
    figure, axes = new_figure("Are stable inputs the reason?", 2)
    plot_curves(axes[0], runs, "train_loss", legend=False)
    drift = {arm: over_looks(runs.notes("drift", arm)[:, 1:]) for arm in arms}
    for arm, colour in colours(list(arms), PLAIN).items():
        plot_estimates(axes[1], LOOKS[1:], estimates(runs.notes("drift", arm)[:, 1:]), arm, colour)
        lab.finding(f"{arm}: drift {number(estimate(drift[arm]).mean, 2)} deviations between looks.")
    axes[0].set(ylabel="training loss (nats)", ylim=(0, 2.5))
    axes[1].set(xlabel="step", ylabel="drift of the inputs (deviations)", ylim=(0, None))
    shared_legend(figure, axes[1])
    lab.figure("noise", figure)
    stabler = paired_difference(drift[BN], drift[PLAIN])
    lab.claim("Batch norm makes the inputs of a layer drift less", IOFFE, stabler, below(0), "dev.")
    unstable = paired_difference(drift[noisy], drift[PLAIN])
    lab.claim("With the noise they drift more than without batch norm", SANTURKAR, unstable, above(0), "dev.")
    lab.claim("With the noise it is as accurate as without it", SANTURKAR, runs.gain(noisy, BN), within(1))
    faster = runs.difference("train_loss", noisy)
    lab.claim("With the noise it still trains better than no batch norm", SANTURKAR, faster, below(0), "nats")


# %% [markdown]
# ## 10. Why does it work? A smoother loss
#
# Their own explanation: the loss along the gradient is smoother, so a gradient stays valid for longer. At every fourth
# step we take the gradient on one batch, walk along it, and look at two things: the range of the loss on the way, and
# how much the gradient at the other end differs from the one we walked along, as a share of it. Both networks share
# rate and start; the walks are 1 to 16 times the learning rate long.

# %%
WALKS = (1, 2, 4, 8, 16)


def along_the_gradient(model: nn.Module, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
    """Loss at the start and after each of WALKS × rate along the negative gradient, (1 + WALKS,); relative change of
    the gradient after each, (WALKS,).
    """
    model = deepcopy(model).train()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(cross_entropy(model, *batch), parameters)
    flat = parameters_to_vector(gradient)
    here = [parameter.detach().clone() for parameter in parameters]
    losses, changes = [], []
    for walk in (0, *WALKS):
        with torch.no_grad():
            for parameter, origin, slope in zip(parameters, here, gradient, strict=True):
                parameter.copy_(origin - walk * rate * slope)
        loss = cross_entropy(model, *batch)
        there = parameters_to_vector(torch.autograd.grad(loss, parameters))
        losses.append(loss.detach())
        changes.append((there - flat).norm() / flat.norm())
    return torch.stack(losses), torch.stack(changes[1:])


def note_landscape(state: State) -> None:
    """Note the loss's range and the gradient's change along the gradient, at every fourth step."""
    batch = Batch(*(each[:100] for each in state.split.train))
    table = state.notes.setdefault("landscape", torch.full((len(LOOKS), 2, len(WALKS)), nan, device=batch.x.device))
    if state.step in LOOKS:
        losses, changes = along_the_gradient(state.model, batch, state.optimizer.param_groups[0]["lr"])
        ranges = losses.cummax(0).values - losses.cummin(0).values
        table[LOOKS.index(state.step)] = torch.stack([ranges[1:], changes])


def smoothness(lab: Lab) -> None:
    """Is the loss smoother along the gradient with batch norm, so that a gradient can be trusted for longer?"""
    arms = {arm: replace(recipe, after_step=note_landscape) for arm, recipe in {PLAIN: BASELINE, BN: WITH}.items()}
    runs = lab.compare(arms, PLAIN)
    figure, axes = new_figure("Is the loss smoother with batch norm?", 2)
    means = {arm: over_looks(runs.notes("landscape", arm)) for arm in arms}  # (seeds, 2, WALKS)
    rows = []
    for arm, colour in colours(list(arms), PLAIN).items():
        for ax, i in zip(axes, (0, 1), strict=True):
            values = estimates(means[arm][:, i])
            plot_estimates(ax, WALKS, values, arm, colour)
            name = ("range of the loss", "change of the gradient")[i]
            rows.append([f"{name}, {arm}", *(number(each.mean, 2) for each in values)])
    heads = ["over the walk (mean of all looks)", *(f"{walk} × rate" for walk in WALKS)]
    lab.table(Table("Along the gradient", heads, sorted(rows)))
    axes[0].set(ylabel="range of the loss on the way (nats)")
    axes[1].set(ylabel="change of the gradient, relative")
    for ax in axes:
        log_ticks(ax, WALKS)
        ax.set_xlabel("walk along the gradient (× learning rate)")
    shared_legend(figure, axes[0])
    lab.figure("smoothness", figure)
    far = {arm: estimate(means[arm][:, 1, -1]).mean for arm in arms}
    lab.finding(
        f"After {WALKS[-1]} × rate the gradient has changed by {far[PLAIN]:.1f} of itself, with BN by {far[BN]:.1f}."
    )
    for i, statement in ((0, "The loss varies less along the gradient"), (1, "The gradient changes less along itself")):
        lower = paired_difference(means[BN][:, i, 2], means[PLAIN][:, i, 2])
        lab.claim(f"{statement} ({WALKS[2]} × rate)", SANTURKAR, lower, below(0), "nats" if i == 0 else "")


# %% [markdown]
# ## 11. Its own noise
#
# A digit is normalised with the company it happens to be in, so batch norm adds noise, more for smaller batches. Does
# the noise regularise? Changing the batch size would change the steps as well. *Ghost* batch norm does not: the batch
# of an SGD step stays at 100, and is normalised in groups. A fifth of the labels are wrong now, so that there is
# something to regularise; all groups share the rate that is best for the whole batch.


# %%
class GhostBatchNorm(NORM):
    """Batch norm of vectors that normalises each `group` examples on their own. Hoffer et al. 2017.

    Raises RuntimeError for a training batch that `group` does not divide.
    """

    def __init__(self, features: int, group: int) -> None:
        super().__init__(features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        groups = x.view(-1, self.group, x.shape[1])
        var, mean = torch.var_mean(groups, 1, correction=0, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.mean((0, 1)), self.momentum)
            self.running_var.lerp_(var.mean((0, 1)) * self.group / (self.group - 1), self.momentum)
        normalised = (groups - mean) / (var + self.eps).sqrt()
        return self.weight * normalised.view_as(x) + self.bias


GROUPS = (2, 4, 10, 100)


def own_noise(lab: Lab) -> None:
    """Does the noise of small groups regularise, as dropout would?"""
    wrong = replace(BASELINE, model=mlp, label_noise=0.2, epochs=10)
    best = at_best_rate(lab, {PLAIN: wrong, BN: replace(wrong, model=partial(mlp, norm=NORM))})
    arms = {PLAIN: best[PLAIN]} | {
        f"groups of {group}": replace(best[BN], model=partial(mlp, norm=partial(GhostBatchNorm, group=group)))
        for group in reversed(GROUPS)
    }
    whole = f"groups of {GROUPS[-1]}"
    runs = lab.compare(arms, whole)
    figure, axes = new_figure("Does batch norm's own noise regularise?", 2)
    for ax, metric, label in (
        (axes[0], "train_accuracy", "training labels learned (%)"),
        (axes[1], "test_accuracy", "test accuracy (%)"),
    ):
        values = [points(runs.estimate(metric, f"groups of {group}")) for group in GROUPS]
        plot_estimates(ax, GROUPS, values, "BN in groups", COLOURS[0])
        plain = points(runs.estimate(metric, PLAIN))
        ax.axhline(plain.mean, color=BLACK, label=PLAIN)
        ax.axhspan(plain.low, plain.high, color=BLACK, alpha=0.12, linewidth=0)
        log_ticks(ax, GROUPS)
        ax.set(xlabel="examples normalised together (of a batch of 100)", ylabel=label)
    shared_legend(figure, axes[0])
    lab.figure("own_noise", figure)
    learned = {arm: f"{100 * runs.estimate('train_accuracy', arm).mean:.0f} %" for arm in arms}
    lab.finding(f"Training labels learned: {', '.join(f'{arm} {share}' for arm, share in learned.items())}.")
    lab.claim(
        "A slight regularisation: batch norm beats none (wrong labels)", GUIDE, runs.gain(whole, PLAIN), above(0.5)
    )
    lab.claim(
        "Smaller groups regularise more: 10 beats 100", "Hoffer et al. 2017", runs.gain("groups of 10"), above(0.5)
    )
    memorised = points(runs.difference("train_accuracy", "groups of 10"))
    lab.claim("Smaller groups hold back memorising: 10 against 100", ADVICE, memorised, below(-0.5))
    lab.claim("Too small a group hurts: 2 against 10", ADVICE, runs.gain("groups of 2", "groups of 10"), below(-0.5))


# %% [markdown]
# ## 12. With dropout
#
# Two good things together. But dropout raises the variance of what the next batch norm sees in training, and is gone in
# eval mode: the running variance is then too large. Li et al. call it the variance shift, and advise dropout only after
# the last batch norm. If the shift is what costs accuracy, statistics recomputed *without* dropout must give it back.
# Again a fifth of the labels are wrong; five hidden layers. Two strengths, because the answer depends on them.


# %%
@torch.no_grad()
def variance_shift(model: nn.Module, split: Split) -> dict[str, Any]:
    """For each batch norm the running variance over the true one in eval mode (median over units, then over layers),
    and the test accuracy with recomputed statistics.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, NORM)]
    if not norms:
        return {}
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].var(0))) for layer in norms]
    model.eval()(split.train.x)
    for hook in hooks:
        hook.remove()
    ratios = [float((layer.running_var / (var + 1e-6)).median()) for layer, var in zip(norms, seen, strict=True)]
    return {"ratio": float(np.median(ratios)), "recomputed": evaluate(recomputed(model, split.train.x), split.test)[1]}


def with_dropout(lab: Lab) -> None:
    """Do batch norm and dropout go together, and where must the dropout stand?"""
    alone, weak, strong, last = (
        "dropout 0.2, no BN",
        "0.2 in every block",
        "0.5 in every block",
        "0.5 after the last BN",
    )
    models = {
        BN: partial(mlp, depth=5, norm=NORM),
        alone: partial(mlp, depth=5, p=0.2),
        weak: partial(mlp, depth=5, norm=NORM, p=0.2),
        strong: partial(mlp, depth=5, norm=NORM, p=0.5),
        last: partial(mlp, depth=5, norm=NORM, last_p=0.5),
    }
    wrong = replace(BASELINE, label_noise=0.2, epochs=10, evaluations=4)
    best = at_best_rate(lab, {arm: replace(wrong, model=model) for arm, model in models.items()}, (*GRID, 1.0))
    runs = lab.compare(best, BN, variance_shift)
    rows = []
    for arm in (BN, weak, strong, last):
        ratio, fresh = (estimate(runs.notes(name, arm)).mean for name in ("ratio", "recomputed"))
        right = runs.estimate("test_accuracy", arm).mean
        rows.append([arm, number(ratio, 2), number(100 * right, 1), number(100 * fresh, 1)])
    heads = ["network", "running variance\nover true one", "test acc. %", "test acc. %,\nrecomputed"]
    lab.table(Table("The variance shift", heads, rows))
    curves_and_dots(lab, runs, "Do batch norm and dropout go together?")

    lab.finding(f"Highest test accuracy: {runs.best(list(best), 'test_accuracy')}.")
    shift = paired_difference(runs.notes("ratio", strong), runs.notes("ratio", BN))
    lab.claim("Dropout in every block shifts the variance (0.5)", LI, shift, above(0.1), "")
    for name, arm in (("0.2", weak), ("0.5", strong)):
        lab.claim(f"In every block ({name}): worse than batch norm alone", LI, runs.gain(arm), below(-0.5))
        fresh = points(paired_difference(runs.notes("recomputed", arm), runs.values("test_accuracy", arm)))
        lab.claim(f"It is the shift ({name}): recomputed statistics give accuracy back", LI, fresh, above(0.5))
    lab.claim("After the last batch norm: better than batch norm alone", LI, runs.gain(last), above(0.5))
    lab.claim("After the last batch norm beats every block (0.5)", LI, runs.gain(last, strong), above(0.5))
    lab.claim("After the last batch norm beats every block (0.2)", LI, runs.gain(last, weak), above(0.5))


# %% [markdown]
# ## What we saw, where it fails
#
# The run ends with a list of all claims by verdict, each with the effect that decided it. It is computed, not written:
# change a setting, run again, and read whether it still says the same.
#
# ## Exercises
#
# Each is one changed line; the answers, each from a run, are in `exercises/16_batch_normalization.md`.
#
# 1. Adam instead of SGD: `SGD = partial(torch.optim.Adam, fused=True)`, with Adam's smaller rates,
#    `GRID = (0.001, 0.003, 0.01, 0.03)`, then `--only depth`. Is batch norm still needed?
# 2. In `recomputed`, leave out `layer.momentum = 1.0`. Which table of `--only modes` notices?
# 3. Four times as many steps (`epochs=32` in `BASELINE`), then `--only learning_rate`. What is left of the gain?
# 4. Let the networks use our own layer, `WITH = replace(BASELINE, model=partial(mlp, norm=BatchNorm))`, and run
#    `--only learning_rate`. Do the numbers change, and what does it cost?

# %%
EXPERIMENTS = [
    mechanism,
    depth,
    learning_rate,
    initial_scale,
    speed,
    placement,
    modes,
    small_batches,
    noise,
    smoothness,
    own_noise,
    with_dropout,
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the lesson; in a notebook, `main(["--quick"])` is a smoke run."""
    run_lesson(LESSON, TITLE, EXPERIMENTS, LARGER, arguments)


if __name__ == "__main__":
    main()
