# %% [markdown]
# # Lesson 19: Weight initialisation
#
# **The question.** Before the first step a network is random numbers. Does it matter which? For a shallow network with
# a tuned rate hardly; for a deep one it can decide whether anything is learned at all. Which start for which
# activation, down to which depth, and what makes the choice unimportant?
#
# **You will learn** to write every common start in a line and to derive its scale; to follow the signal forwards and
# the gradient backwards through 50 layers, until they overflow or vanish; what zeros and constants really do; which
# rules ("ReLU → He", "the default is already good") hold in training; why orthogonal matrices are special; when batch
# norm, skip connections or Adam relieve you of all this; and to examine a sick network with one function.
#
# **You need** a first PyTorch training loop (levels 1 and 2); lesson 16 helps with batch norm. The data are 1,797
# handwritten digits that come with scikit-learn. A run takes about a minute on two CPU cores; see `results/` for the
# reference run.
#
# **Papers.** Glorot & Bengio 2010, *Understanding the difficulty of training deep feedforward neural networks*; He et
# al. 2015, *Delving deep into rectifiers* (arXiv 1502.01852); LeCun et al. 1998, *Efficient backprop*; Saxe et al.
# 2014, *Exact solutions to the nonlinear dynamics of learning in deep linear neural networks* (arXiv 1312.6120);
# Klambauer et al. 2017, *Self-normalizing neural networks* (arXiv 1706.02515); Schoenholz et al. 2017, *Deep
# information propagation* (arXiv 1611.01232); Zhang et al. 2019, *Fixup initialization* (arXiv 1901.09321).

# %%
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import erf, exp, inf, isfinite, log, nan, pi, prod, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.first.cli import run_lesson
from common.first.data import Batch, Split, Task, load, make_split
from common.first.experiment import Comparison, tuning_seeds
from common.first.lab import Lab, Larger
from common.first.plotting import BASELINE as BLACK
from common.first.plotting import (
    COLOURS,
    colours,
    heat_map,
    log_ticks,
    new_figure,
    plot_dots,
    plot_estimates,
    plot_history,
    shared_legend,
)
from common.first.report import Table, number, signed
from common.first.statistics import (
    Estimate,
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

LESSON = "19_weight_initialization"
TITLE = "Lesson 19: Weight initialisation"

# %% [markdown]
# ## The mechanism, from scratch
#
# A unit adds up n = fan-in products of a weight and an input. If both are independent and the weights have mean zero,
# the variance of the sum is n · Var(w) · E[x²]: with Var(w) = 1/n a linear layer hands on what it got. That is LeCun's
# start. ReLU throws half of E[x²] away, so He doubles the variance. Backwards the same sum runs over fan-out products;
# Xavier takes the average of both. All the rest is which distribution to draw from.
#
# Beware of N(0, ·): some tables give the variance, PyTorch's functions take the standard deviation.


# %%
Start = Callable[[Tensor], Any]  # fills a weight in place


def fans(weight: Tensor) -> tuple[int, int]:
    """Fan-in and fan-out of a weight (out, in) or (out, in, height, width): the number of products in a sum, forwards
    and backwards. In a convolution each pixel of the kernel counts.
    """
    area = prod(weight.shape[2:])
    return weight.shape[1] * area, weight.shape[0] * area


def normal(weight: Tensor, std: float) -> None:
    """N(0, std²), whatever the shape."""
    weight.normal_(0, std)


def xavier_normal(weight: Tensor, gain: float = 1.0) -> None:
    """N(0, gain² · 2 / (fan-in + fan-out)). Glorot & Bengio 2010."""
    weight.normal_(0, gain * sqrt(2 / sum(fans(weight))))


def xavier_uniform(weight: Tensor, gain: float = 1.0) -> None:
    """U(−b, b) with the variance of `xavier_normal`, b²/3. Glorot & Bengio 2010."""
    bound = gain * sqrt(6 / sum(fans(weight)))
    weight.uniform_(-bound, bound)


def he_normal(weight: Tensor, fan: int = 0) -> None:
    """N(0, 2 / fan-in), or with fan=1 2 / fan-out. He et al. 2015."""
    weight.normal_(0, sqrt(2 / fans(weight)[fan]))


def he_uniform(weight: Tensor, fan: int = 0) -> None:
    """U(−b, b) with the variance of `he_normal`, b²/3. He et al. 2015."""
    bound = sqrt(6 / fans(weight)[fan])
    weight.uniform_(-bound, bound)


def lecun_normal(weight: Tensor) -> None:
    """N(0, 1 / fan-in). LeCun et al. 1998."""
    weight.normal_(0, sqrt(1 / fans(weight)[0]))


def torch_default(weight: Tensor) -> None:
    """U(−b, b), b = 1/√fan-in: what nn.Linear and nn.Conv2d draw if nobody says otherwise. Variance 1 / (3 fan-in)."""
    bound = sqrt(1 / fans(weight)[0])
    weight.uniform_(-bound, bound)


def truncated_normal(weight: Tensor, std: float, cut: float = 2.0) -> None:
    """N(0, std²) without what lies beyond `cut` deviations: that is drawn again."""
    weight.normal_(0, std)
    while (far := weight.abs() > cut * std).any():
        weight.copy_(torch.where(far, torch.empty_like(weight).normal_(0, std), weight))


def orthogonal(weight: Tensor, gain: float = 1.0) -> None:
    """gain times a random matrix with orthonormal rows or columns, whichever are fewer. Saxe et al. 2014."""
    draw = torch.randn_like(weight.flatten(1))
    wide = draw.shape[0] < draw.shape[1]
    q, r = torch.linalg.qr(draw.T if wide else draw)
    q *= r.diagonal().sign()  # makes every orthogonal matrix equally likely
    weight.copy_(gain * (q.T if wide else q).reshape(weight.shape))


def zeros(weight: Tensor) -> None:
    """All zero."""
    weight.zero_()


def constant(weight: Tensor) -> None:
    """All 1 / fan-in: a layer hands on the mean of what it got."""
    weight.fill_(1 / fans(weight)[0])


def initialise(model: nn.Module, start: Start | None) -> nn.Module:
    """Fill the weights of all linear and convolutional layers by `start`, the biases with zeros.

    None leaves PyTorch's default, biases included: they are drawn like the weights.
    """
    if start is None:
        return model
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                start(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()
    return model


# %% [markdown]
# The network is a plain stack of Linear → activation, as deep as we like. All starts of one seed that draw from a
# normal distribution share their draws: He's weights are Xavier's times a number.


# %%
def mlp(
    task: Task,
    start: Start | None,
    depth: int = 8,
    widths: Sequence[int] = (64,),
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """`depth` hidden layers whose widths take turns: (N, C, H, W) to logits (N, classes)."""
    blocks: list[nn.Module] = [nn.Flatten()]
    inputs = prod(task.shape)
    for i in range(depth):
        width = widths[i % len(widths)]
        blocks += [nn.Linear(inputs, width), *([norm(width)] if norm else []), activation()]
        blocks += [nn.Dropout(dropout)] if dropout else []
        inputs = width
    return initialise(nn.Sequential(*blocks, nn.Linear(inputs, task.classes)), start)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the model, from the first to the last."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


# %% [markdown]
# ## What is held fixed
#
# 400 digits with right labels, eight hidden layers of 64 ReLU units, SGD with momentum, 32 steps. Eight plain layers
# are a choice: with two hardly anything below would show (experiment 5 looks), and today's deep networks have skip
# connections and norms (experiment 8 does). So few steps are a choice, too: some of the slow starts arrive if they are
# given more time (exercise 2). Verdicts are about this budget.
#
# The best rate depends on the start, by many powers of ten in the sick cases. So every start gets its own: the one that
# is best on validation, on seeds that no result uses. The grids are printed first.

# %%
SGD = partial(torch.optim.SGD, momentum=0.9, fused=True)
ADAM = partial(torch.optim.Adam, fused=True)
BASELINE = Recipe(
    model=partial(mlp, start=None),
    optimizer=partial(SGD, lr=0.03),
    epochs=8,
    batch_size=100,
    examples=400,
    evaluations=4,
)
# On every data set but the digits: so many times as many training images and epochs, and the seeds of a run. At 1 and 1
# nothing but the data differs; set them higher if you have the time, or a GPU.
LARGER = Larger(examples=1, epochs=1, seeds=10)
ONCE = replace(BASELINE, evaluations=1)  # where nobody looks at curves
GRID = (0.01, 0.03, 0.1)
LOWER = (0.003, *GRID[:2])  # for what is steep or deep
DEFAULT, XAVIER, HE, LECUN, ORTHOGONAL, SMALL = "default", "Xavier", "He", "LeCun", "orthogonal", "small"
UNSCALED, TIMES_TEN, ZEROS, CONSTANT = "unscaled", "× 10", "zeros", "constant"
GLOROT, HE_ET_AL, SAXE = ("Glorot & Bengio 2010", "He et al. 2015", "Saxe et al. 2014")
KLAMBAUER = "Klambauer et al. 2017"
POWERS = "powers of 10"  # a unit
GUIDE, ADVICE, PYTORCH, CS231N = "study guide", "common advice", "PyTorch's source", "CS231n"


def with_start(recipe: Recipe, start: Start | None) -> Recipe:
    """The recipe with another start."""
    return replace(recipe, model=partial(recipe.model, start=start))


def at_rate(recipe: Recipe, rate: float) -> Recipe:
    """The recipe with another learning rate."""
    return replace(recipe, optimizer=partial(recipe.optimizer, lr=rate))


def at_best_rate(
    lab: Lab, arms: dict[str, Recipe], rates: dict[str, Sequence[float]], count: int = 3
) -> dict[str, Recipe]:
    """Each arm at the one of its rates that is best for it on validation, on `count` seeds; prints the grid."""
    grids = {arm: {rate: at_rate(recipe, rate) for rate in rates[arm]} for arm, recipe in arms.items()}
    tuning = lab.tune("Learning rate", grids, count=count)
    return {arm: grids[arm][tuning.best(arm)] for arm in arms}


def share_that_trains(runs: Comparison, arm: str) -> Estimate:
    """Share of the runs, in %, that get half of their training images right; a diverged one does not."""
    return points(proportion(np.nan_to_num(runs.values("train_accuracy", arm)) >= 0.5))


# %% [markdown]
# ## 1. Formulas
#
# Every start beside its counterpart in `torch.nn.init`: under one seed the same numbers (older versions of PyTorch draw
# the truncated normal in another way). And the deviation that the formula promises beside the one that was measured,
# for a linear and for a convolutional layer.
#
# Where do the numerators come from? Feed an activation a standard normal z: what comes out has E[φ(z)²], and a weight
# deviation of *gain* / √fan-in with gain = 1/√E[φ(z)²] puts it back to 1. Backwards it is the derivative and fan-out
# that count. PyTorch's `calculate_gain` has its own list: ReLU's is exact, tanh's a little large, and SELU's is not the
# gain that its authors made it for, which is 1.

# %%
LAYERS = {"Linear": (50, 200), "Conv2d": (32, 16, 3, 3)}  # shapes of a weight


def shrinkage(cut: float) -> float:
    """The deviation of a standard normal of which nothing is left beyond ±`cut`."""
    return sqrt(1 - 2 * cut * exp(-(cut**2) / 2) / sqrt(2 * pi) / erf(cut / sqrt(2)))


class Formula(NamedTuple):
    """A start, its counterpart in torch.nn.init, and the standard deviation that it promises for a weight."""

    ours: Start
    theirs: Start
    std: Callable[[Tensor], float]


FORMULAS = {
    "Xavier, normal": Formula(xavier_normal, nn.init.xavier_normal_, lambda w: sqrt(2 / sum(fans(w)))),
    "Xavier, uniform": Formula(xavier_uniform, nn.init.xavier_uniform_, lambda w: sqrt(2 / sum(fans(w)))),
    "He, normal": Formula(he_normal, nn.init.kaiming_normal_, lambda w: sqrt(2 / fans(w)[0])),
    "He, uniform": Formula(he_uniform, nn.init.kaiming_uniform_, lambda w: sqrt(2 / fans(w)[0])),
    "He, normal, fan-out": Formula(
        partial(he_normal, fan=1), partial(nn.init.kaiming_normal_, mode="fan_out"), lambda w: sqrt(2 / fans(w)[1])
    ),
    "He, uniform, fan-out": Formula(
        partial(he_uniform, fan=1), partial(nn.init.kaiming_uniform_, mode="fan_out"), lambda w: sqrt(2 / fans(w)[1])
    ),
    "LeCun": Formula(
        lecun_normal, partial(nn.init.kaiming_normal_, nonlinearity="linear"), lambda w: sqrt(1 / fans(w)[0])
    ),
    "orthogonal": Formula(orthogonal, nn.init.orthogonal_, lambda w: sqrt(1 / max(len(w), fans(w)[0]))),
    "truncated normal": Formula(
        partial(truncated_normal, std=0.1),
        partial(nn.init.trunc_normal_, std=0.1, a=-0.2, b=0.2),
        lambda w: 0.1 * shrinkage(2),
    ),
    "PyTorch's default": Formula(
        torch_default, partial(nn.init.kaiming_uniform_, a=sqrt(5)), lambda w: sqrt(1 / (3 * fans(w)[0]))
    ),
}


def drawn(start: Start, shape: Sequence[int], seed: int) -> Tensor:
    """A weight of this shape as `start` draws it under the seed."""
    weight = torch.empty(*shape)
    torch.manual_seed(seed)
    start(weight)
    return weight


def formula_row(name: str, seeds: Sequence[int]) -> list[str]:
    """A row of the table: promised and measured deviation (mean over seeds) for each of LAYERS, and the largest
    difference to torch.nn.init.
    """
    ours, theirs, std = FORMULAS[name]
    cells, apart = [], 0.0
    for shape in LAYERS.values():
        draws = [(drawn(ours, shape, seed), drawn(theirs, shape, seed)) for seed in seeds]
        cells += [number(std(draws[0][0]), 4), number(float(np.mean([float(mine.std()) for mine, _ in draws])), 4)]
        apart = max(apart, *(float((mine - torchs).abs().max()) for mine, torchs in draws))
    return [name, *cells, f"{apart:.0e}"]


def slopes(activation: nn.Module, z: Tensor) -> Tensor:
    """The derivative of an elementwise activation at each element of z, in the shape of z."""
    z = z.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(activation.forward(z.clone()).sum(), z)[0]  # .forward: past any hook


def gains(activation: nn.Module) -> tuple[float, float]:
    """1/√E[φ(z)²] and 1/√E[φ′(z)²] for a standard normal z, by summing over a fine grid."""
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / sqrt(2 * pi) * 1e-3
    return tuple(float((values.square() * density).sum()) ** -0.5 for values in (activation(z), slopes(activation, z)))


def torch_gain(name: str) -> float:
    """What nn.init.calculate_gain says of the activation; NaN if it does not know it."""
    try:
        return nn.init.calculate_gain({"identity": "linear"}.get(name, name.lower()))
    except ValueError:
        return nan


ACTIVATIONS = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SELU": nn.SELU,
}


def formulas(lab: Lab) -> None:
    """Which numbers do the starts draw, and does PyTorch draw the same?"""
    seeds = lab.settings.seeds
    heads = ["start", *(f"{layer}\n{what}" for layer in LAYERS for what in ("formula", "measured"))]
    rows = [formula_row(name, seeds) for name in FORMULAS]
    title = f"Standard deviation, for {' and '.join(f'{layer} {shape}' for layer, shape in LAYERS.items())}"
    lab.table(Table(title, [*heads, "ours −\nPyTorch's"], rows))
    rows = [
        [name, *(number(gain) for gain in gains(activation())), number(torch_gain(name))]
        for name, activation in ACTIVATIONS.items()
    ]
    heads = ["activation", "1/√E[φ²]\n(signal)", "1/√E[φ′²]\n(gradient)", "calculate_gain\n(PyTorch)"]
    lab.table(Table("Gain: the weight deviation that keeps the size, times √fan-in (gradient: √fan-out)", heads, rows))

    figure, axes = new_figure("Which numbers do the starts draw?", 2)
    widths = (8, 16, 32, 64, 128, 256, 512)
    shown = {DEFAULT: "PyTorch's default", LECUN: "LeCun", XAVIER: "Xavier, normal", HE: "He, normal"}
    for name, colour in colours(list(shown), DEFAULT).items():
        ours, _, std = FORMULAS[shown[name]]
        measured = [[float(drawn(ours, (64, width), seed).std()) for width in widths] for seed in seeds]
        axes[0].plot(widths, np.mean(measured, 0), "o", color=colour, label=name)
        axes[0].plot(widths, [std(torch.empty(64, width)) for width in widths], color=colour, linewidth=1.2)
    log_ticks(axes[0], widths)
    axes[0].set(xlabel="fan-in (fan-out: 64)", ylabel="standard deviation (line: formula)", yscale="log")
    shapes = {
        "normal": ("He, normal", COLOURS[2]),
        "uniform": ("He, uniform", COLOURS[6]),
        "default": ("PyTorch's default", BLACK),
    }
    for name, (key, colour) in shapes.items():
        values = torch.stack([drawn(FORMULAS[key].ours, (64, 64), seed) for seed in seeds]).flatten().numpy()
        axes[1].hist(
            values, np.linspace(-0.6, 0.6, 82), density=True, histtype="step", color=colour, label=name, linewidth=1.6
        )
    axes[1].set(xlabel="weight (fan-in 64; normal, uniform: He's)", ylabel="density")
    for ax in axes:
        ax.legend(frameon=False)
    lab.figure("formulas", figure)

    lab.finding(f"A normal cut at two deviations has {shrinkage(2):.3f} of the deviation that you asked for.")
    defaults = [nn.Linear(300, 300, bias=False).weight for _ in map(torch.manual_seed, seeds)]
    variances = [float(weight.detach().var()) for weight in defaults]
    off = estimate([100 * (300 * 3 * each - 1) for each in variances])
    lab.claim("nn.Linear's variance is 1/(3 fan-in)", PYTORCH, off, within(1), "% off")
    off = estimate([100 * (300 / 2 * each - 1) for each in variances])
    statement = "kaiming_uniform_ is its code, so it is He's start for ReLU"
    lab.claim(statement, ADVICE, off, within(1), "% off")
    narrow = [drawn(partial(nn.init.trunc_normal_, std=0.02), (300, 300), seed) for seed in seeds]
    beyond = estimate([100 * float((weight.abs() > 0.04).float().mean()) for weight in narrow])
    lab.claim("trunc_normal_(w, std=0.02) cuts at two deviations", ADVICE, beyond, below(0.1), "% beyond")


# %% [markdown]
# ## 2. Signal and gradient through 50 layers
#
# One batch, 50 layers of 64 units, no training: how large are the activations at each depth, and how large the
# gradients on the way back? Multiply by 0.7 fifty times and 2·10⁻⁸ is left; by 8, and 32-bit numbers end. bfloat16's
# end there, too: it has float32's range with fewer digits (only below 10⁻³⁸, among the subnormal numbers, it ends
# sooner). float16's end much sooner. With equal widths Xavier and LeCun are one formula.
#
# Two columns deserve a second look. *Size* is the deviation over all activations of a layer. *Difference* is what tells
# one image from another: the deviation of a unit over the images. A layer may be full of numbers that are the same for
# every image; what arrives there is a signal no more.
#
# A unit is *saturated* for an image where the slope of its activation is below a twentieth of the largest, and *dead*
# if that is so for every image of the batch. Half of all ReLUs are off for any one image: that is no illness. And large
# weights saturate tanh, but that need not stop the gradient: the few units that are not saturated pass it on, times
# large weights. Schoenholz et al. call what follows chaos.

# %%
DEPTH, LOOKS, IMAGES = 50, (1, 10, 50), 40
SIGNAL_STARTS: dict[str, Start | None] = {
    DEFAULT: None,
    SMALL: partial(normal, std=0.01),
    "Xavier, LeCun": lecun_normal,
    HE: he_normal,
    ORTHOGONAL: orthogonal,
    UNSCALED: partial(normal, std=1.0),
    TIMES_TEN: partial(normal, std=10.0),
}
EDGES = {"tanh": np.linspace(-1, 1, 42), "ReLU": np.linspace(-12, 12, 49)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def flat(activation: nn.Module, z: Tensor) -> Tensor:
    """Where the activation's slope at z is below a twentieth of its largest, as booleans in the shape of z."""
    largest = slopes(activation, torch.linspace(-5, 5, 1001)).max()
    return slopes(activation, z).abs() < largest / 20


def deviation(values: Tensor, axes: Sequence[int]) -> np.ndarray:
    """Standard deviation over the axes, as a root mean square over the others but the first."""
    variance = values.double().var(tuple(axes), correction=0)
    return variance.reshape(len(values), -1).mean(1).sqrt().numpy()


def histogram(name: str, h: Tensor) -> np.ndarray:
    """Shares of the activations in the bins of EDGES, for ReLU of the power of ten of those that are not zero."""
    values = h.double().numpy().ravel()
    if name == "ReLU":
        values = np.log10(values[values > 0])
    counts, _ = np.histogram(np.clip(values, EDGES[name][0], EDGES[name][-1]), EDGES[name])
    return counts / max(1, counts.sum())


def lost(values: Tensor) -> Tensor:
    """For each layer whether all has vanished to zero, or some of it overflowed: (layers, N, units) to booleans."""
    rows = values.flatten(1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)


def flow(layers: Sequence[nn.Linear], name: str, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Send images x (N, pixels) forwards through the layers, with the activation between them, and the loss's gradient
    back. By hidden layer, (DEPTH,): the size of the signal, the difference between images, the gradient's size, the
    shares of saturated and dead units; where signal (counting up) and gradient (counting down) are lost, (2,), NaN if
    nowhere; and the histograms at LOOKS.
    """
    activation = ACTIVATIONS[name]()
    arriving, hidden = [], [x.requires_grad_()]
    for layer in layers[:-1]:
        arriving.append(layer(hidden[-1]))
        hidden.append(activation(arriving[-1]))
        hidden[-1].retain_grad()
    F.cross_entropy(layers[-1](hidden[-1]).float(), y).backward()

    signals, gradients = torch.stack(hidden[1:]).detach(), torch.stack([h.grad for h in hidden[1:]])
    off = flat(activation, torch.stack(arriving)).float()
    off[~signals.isfinite()] = nan
    signal_lost, gradient_lost = lost(signals).nonzero(), lost(gradients).nonzero()
    ends = [float(each[i]) + 1 if len(each) else nan for each, i in ((signal_lost, 0), (gradient_lost, -1))]
    return {
        "size": deviation(signals, (1, 2)),
        "difference": deviation(signals, (1,)),
        "gradient": deviation(gradients, (1, 2)),
        "saturated": off.mean((1, 2)).numpy(),
        "dead": off.amin(1).mean(1).numpy(),
        "lost": np.array(ends),
        "histogram": np.array([histogram(name, signals[i - 1]) for i in LOOKS] if name in EDGES else []),
    }


def through_layers(
    start: Start | None, dataset: str, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, np.ndarray]]:
    """The `flow` through DEPTH layers filled by `start`, for each of ACTIVATIONS, all with the same weights."""
    data = load(dataset)
    x, y = Batch(*(part[:IMAGES] for part in make_split(data, seed, BASELINE.examples).train))
    torch.manual_seed(seed)
    layers = linear_layers(mlp(data.task, start, DEPTH).to(dtype).requires_grad_(False))
    return {name: flow(layers, name, x.flatten(1).to(dtype), y) for name in ACTIVATIONS}


def powers(values: np.ndarray) -> np.ndarray:
    """Powers of ten of sizes; NaN where the size is zero or not a number."""
    values = np.asarray(values, dtype=float)
    kept = np.isfinite(values) & (values > 0)
    return np.log10(values, out=np.full(values.shape, nan), where=kept)


def plot_depth(title: str, found: dict[tuple[str, str], dict[str, np.ndarray]], key: str, label: str) -> Any:
    """A panel for each activation: the size by layer, geometric mean over seeds, a line for each start."""
    figure, axes = new_figure(title, 3, 2)
    layers = np.arange(1, DEPTH + 1)
    for ax, name in zip(axes, ACTIVATIONS, strict=True):
        for start, colour in colours(list(SIGNAL_STARTS), DEFAULT).items():
            style = "--" if start == ORTHOGONAL else "-"  # it often lies on Xavier's
            plot_history(ax, layers, np.clip(powers(found[name, start][key]), -14, 14), start, colour, style)
        ax.set(title=name, xlabel="layer", ylabel=label, ylim=(-12, 12))
    shared_legend(figure, axes[0], 7)
    return figure


def ends(found: dict[str, np.ndarray], key: str, last: int = DEPTH) -> tuple[np.ndarray, np.ndarray]:
    """A size where it sets out and where it arrives, (seeds,) each: in the first layer and in the last, or for a
    gradient the other way round.
    """
    first, last = found[key][:, 0], found[key][:, last - 1]
    return (last, first) if key == "gradient" else (first, last)


def change(found: dict[str, np.ndarray], key: str, last: int = DEPTH) -> Estimate:
    """By how many powers of ten a size changes on its way through the layers."""
    set_out, arrived = ends(found, key, last)
    return estimate(powers(arrived) - powers(set_out))


def change_table(title: str, found: dict[tuple[str, str], dict[str, np.ndarray]], key: str) -> Table:
    """The mean change for each start and activation; "over" where in any seed numbers end, "zero" where they vanish."""

    def cell(one: dict[str, np.ndarray]) -> str:
        _, arrived = ends(one, key)
        if not np.isfinite(arrived).all():
            return "over"
        return signed(change(one, key).mean, 1) if arrived.all() else "zero"

    rows = [[start, *(cell(found[name, start]) for name in ACTIVATIONS)] for start in SIGNAL_STARTS]
    return Table(title, ["start", *ACTIVATIONS], rows)


def lost_table(lab: Lab, dtype: str) -> Table:
    """For each start and activation the layer at which signal and gradient are lost in this type, on the first seed."""
    seed = lab.settings.seeds[0]
    one = partial(through_layers, dataset=lab.settings.dataset, seed=seed, dtype=DTYPES[dtype])
    rows = []
    for start, found in zip(SIGNAL_STARTS, lab.executor.map(one, SIGNAL_STARTS.values()), strict=True):
        pairs = [[number(layer, 0) for layer in found[name]["lost"]] for name in ACTIVATIONS]
        rows.append([start, *("/".join(pair) if pair != ["–", "–"] else "–" for pair in pairs)])
    return Table(f"{dtype}: the layer where signal/gradient are lost, seed {seed}", ["start", *ACTIVATIONS], rows)


def fifty_layers(lab: Lab) -> None:
    """What is left of the signal, and of the gradient, after 50 layers?"""
    seeds, dataset = lab.settings.seeds, lab.settings.dataset
    found = {}
    for start, draw in SIGNAL_STARTS.items():
        rows = list(lab.executor.map(partial(through_layers, draw, dataset), seeds))
        for name in ACTIVATIONS:
            found[name, start] = {key: np.array([row[name][key] for row in rows]) for key in rows[0][name]}
    lab.table(change_table("Size of the signal, layer 50 over layer 1, powers of ten", found, "size"))
    lab.table(change_table("Difference between images, layer 50 over layer 1, powers of ten", found, "difference"))
    lab.table(change_table("Size of the gradient, layer 1 over layer 50, powers of ten", found, "gradient"))
    rows = []
    for start in SIGNAL_STARTS:
        shares = [
            [100 * found[name, start][key][:, -1].mean() for key in ("saturated", "dead")] for name in ACTIVATIONS
        ]
        rows.append([start, *(f"{a:.0f}/{b:.0f}" if isfinite(a) else "–" for a, b in shares)])
    lab.table(Table("Saturated/dead at layer 50, in %", ["start", *ACTIVATIONS], rows))
    for dtype in DTYPES:
        lab.table(lost_table(lab, dtype))

    title = "How large is the signal at each depth?"
    lab.figure("signal", plot_depth(title, found, "size", "deviation, power of 10"))
    title = "How large is the gradient at each depth?"
    lab.figure("gradient", plot_depth(title, found, "gradient", "deviation, power of 10"))
    figure, axes = new_figure("What do the activations look like?", 3, 2)
    for i, (name, edges) in enumerate(EDGES.items()):
        for ax, j in zip(axes[3 * i : 3 * i + 3], range(3), strict=True):
            for start, colour in colours(list(SIGNAL_STARTS), DEFAULT).items():
                shares = 100 * found[name, start]["histogram"].mean(0)[j]
                ax.stairs(shares, edges, color=colour, label=start, linewidth=1.6)
            ax.set(title=f"{name}, layer {LOOKS[j]}", ylabel="share (%)", ylim=(0, 40))
            ax.set_xlabel("activation" if name == "tanh" else "power of 10 (no zeros; outermost: all beyond)")
    shared_legend(figure, axes[0], 7)
    lab.figure("histograms", figure)

    for start in (DEFAULT, HE):
        size, apart = (change(found["ReLU", start], key).mean for key in ("size", "difference"))
        lab.finding(f"{start}, ReLU: the size changes by {size:+.1f} powers of ten, the difference by {apart:+.1f}.")
    dead = 100 * estimate(found["ReLU", HE]["dead"][:, DEPTH - 1]).mean
    lab.finding(
        f"He, ReLU, layer 50: {dead:.0f} % of the units are off for all {IMAGES} images: these look alike there."
    )
    both = "Xavier, LeCun"
    kept = [
        ("He keeps ReLU's signal", HE_ET_AL, "ReLU", HE, "size"),
        ("He keeps ReLU's gradient", HE_ET_AL, "ReLU", HE, "gradient"),
        ("He keeps the difference between images (ReLU)", ADVICE, "ReLU", HE, "difference"),
        ("Xavier keeps tanh's signal", GLOROT, "tanh", both, "size"),
        ("Xavier keeps tanh's gradient", GLOROT, "tanh", both, "gradient"),
        ("Xavier keeps sigmoid's gradient", ADVICE, "sigmoid", both, "gradient"),
        ("LeCun keeps SELU's signal", KLAMBAUER, "SELU", both, "size"),
        ("The default already keeps ReLU's gradient", GUIDE, "ReLU", DEFAULT, "gradient"),
    ]
    for statement, source, name, start, key in kept:
        lab.claim(f"{statement} within a factor of ten", source, change(found[name, start], key), within(1), POWERS)
    statement = "Xavier loses ReLU's signal, a factor of more than 10⁶"
    lab.claim(statement, HE_ET_AL, change(found["ReLU", both], "size"), below(-6), POWERS)
    statement = "randn × 10 explodes, a factor of more than 10⁶ in ten layers (ReLU)"
    lab.claim(statement, GUIDE, change(found["ReLU", TIMES_TEN], "size", 10), above(6), POWERS)
    for start, source in {UNSCALED: CS231N, TIMES_TEN: ADVICE}.items():
        grown = change(found["tanh", start], "gradient")
        lab.claim(f"Large weights saturate tanh, so its gradients vanish ({start})", source, grown, below(-1), POWERS)


# %% [markdown]
# ## 3. Does it train?
#
# The study guide's experiment: a deep network, started in ten ways. "Zero → all neurons identical. Random without
# scaling → exploding gradients. He → trains successfully. A poor start → the network won't train. Period."
#
# A fair answer needs a fair rate. At a usual one the exploding starts are gone after a step or two. But their gradients
# are not wrong, only too large, by many powers of ten: so their grids go down to where the first step is of a
# reasonable size. A run counts as trained when it gets half of its training digits right; chance is a tenth.
#
# The second figure may surprise: from most starts all layers get gradients of one size. In a ReLU network without
# biases the product of a layer's weights with their gradient is the same for every layer, since each scales the output
# alike. A start that is too small starves all of them; the default, which has biases, starves the first layers most.

# %%
TRAIN_STARTS: dict[str, Start | None] = {
    DEFAULT: None,
    ZEROS: zeros,
    CONSTANT: constant,
    SMALL: partial(normal, std=0.01),
    UNSCALED: partial(normal, std=1.0),
    TIMES_TEN: partial(normal, std=10.0),
    LECUN: lecun_normal,
    XAVIER: xavier_normal,
    HE: he_normal,
    ORTHOGONAL: partial(orthogonal, gain=sqrt(2)),
}
TINY_RATES = {UNSCALED: (1e-8, 1e-7, 1e-6, 1e-2), TIMES_TEN: (1e-15, 1e-14, 1e-13, 1e-2)}
FIRST_STEPS = 8


def note_gradients(state: State) -> None:
    """Note of each layer's weights, at the first steps, the gradient's norm and how far the step moved them relative to
    their norm: two tables (FIRST_STEPS, layers).
    """
    weights = [layer.weight for layer in linear_layers(state.model)]
    for name in ("gradients", "updates"):
        state.notes.setdefault(name, torch.full((FIRST_STEPS, len(weights)), nan, device=weights[0].device))
    if state.step <= FIRST_STEPS:
        rate = state.optimizer.param_groups[0]["lr"]
        moved = [rate * state.optimizer.state[weight]["momentum_buffer"].norm() / weight.norm() for weight in weights]
        state.notes["gradients"][state.step - 1] = torch.stack([weight.grad.norm() for weight in weights])
        state.notes["updates"][state.step - 1] = torch.stack(moved).detach()


def trains(lab: Lab) -> None:
    """From which start does a network of eight layers train?"""
    recipes = {
        name: replace(with_start(BASELINE, start), after_step=note_gradients) for name, start in TRAIN_STARTS.items()
    }
    arms = at_best_rate(lab, recipes, {name: TINY_RATES.get(name, GRID) for name in recipes})
    usual = {f"{name}, 0.01": at_rate(recipes[name], 0.01) for name in TINY_RATES}
    runs = lab.compare(arms | usual, DEFAULT)
    share = {arm: share_that_trains(runs, arm) for arm in runs.arms}
    rows = []
    for arm in runs.arms:
        accuracy = [points(runs.estimate(metric, arm)).mean for metric in ("train_accuracy", "test_accuracy")]
        first, last = (runs.notes("gradients", arm)[:, 0, i] for i in (0, -1))
        rate = runs.arms[arm].optimizer.keywords["lr"]
        cells = [f"{rate:g}", f"{share[arm].mean:.0f}", *(number(each, 1) for each in accuracy)]
        rows.append([arm, *cells, *(number(10 ** estimate(powers(each)).mean, 3) for each in (first, last))])
    heads = [
        "start",
        "rate",
        "seeds that\ntrain, %",
        "train\nacc. %",
        "test\nacc. %",
        "gradient,\nfirst",
        "gradient,\nlast layer",
    ]
    lab.table(Table("Does it train? (gradients at the first step, geometric means)", heads, rows))

    figure, axes = new_figure("From which start do eight layers train?", 2)
    beyond = dict.fromkeys(TINY_RATES, COLOURS[7])  # their losses lie beyond the axis
    palette = colours([arm for arm in arms if arm not in beyond], DEFAULT) | beyond
    for arm, colour in palette.items():
        style = ":" if arm in (ZEROS, CONSTANT, SMALL) else "-"
        plot_history(axes[0], runs.epochs(arm), runs.history("train_loss", arm), arm, colour, style)
    axes[0].set(xlabel="epoch (unscaled, × 10: beyond the axis)", ylabel="training loss (nats)", ylim=(0, 4))
    plot_dots(axes[1], {arm: points(runs.estimate("test_accuracy", arm)) for arm in arms}, BLACK)
    axes[1].set(xlabel="test accuracy (%)", xlim=(0, 100))
    for label in axes[1].get_yticklabels():
        label.set_color(palette[label.get_text()])
    lab.figure("trains", figure)
    title = "How large is each layer's gradient over the first steps, against the output layer's?"
    figure, axes = new_figure(title, 5, 2)
    for ax, arm in zip(axes, arms, strict=True):
        sizes = powers(runs.notes("gradients", arm))
        table = np.array([[estimate(cell).mean for cell in row] for row in (sizes - sizes[:, :, -1:]).T])
        image = ax.imshow(table, cmap="RdBu_r", vmin=-4, vmax=4, origin="lower", aspect="auto")
        ax.set(title=arm, xlabel="step", ylabel="layer")
        ax.set_xticks(range(0, FIRST_STEPS, 2), range(1, FIRST_STEPS + 1, 2))
        ax.set_yticks(range(0, len(table), 2), range(1, len(table) + 1, 2))
        ax.grid(False)
    figure.colorbar(image, ax=axes, label="norm, power of 10", extend="both")
    lab.figure("first_steps", figure)

    trained = [arm for arm in arms if share[arm].mean > 50]
    lab.finding(f"Half of the training images right, on most seeds: from {', '.join(trained) or 'none of the starts'}.")
    for name in TINY_RATES:
        train, test = (points(runs.estimate(f"{part}_accuracy", name)).mean for part in ("train", "test"))
        rate = arms[name].optimizer.keywords["lr"]
        lab.finding(
            f"{name}, rate {rate:g}: {train:.0f} % of the training images right, {test:.0f} % of the test images."
        )
    for name in (ZEROS, CONSTANT):
        lab.claim(f"It does not train ({name})", GUIDE, share[name], below(50), "%")
    lab.claim("N(0, 0.01²) does not train a deep network", HE_ET_AL, share[SMALL], below(50), "%")
    for name in TINY_RATES:
        at_usual = share[f"{name}, 0.01"]
        lab.claim(f"It does not train at rate 0.01 ({name})", ADVICE, at_usual, below(50), "%")
        lab.claim(f"It does not train. Period. ({name}, its own rate)", GUIDE, share[name], below(50), "%")
        learned = points(runs.estimate("train_accuracy", name))
        statement = f"At its own rate, too, the network learns nothing: training accuracy under 20 % ({name})"
        lab.claim(statement, ADVICE, learned, below(20), "%")
    first = {arm: powers(runs.notes("gradients", arm)[:, 0, 0]) for arm in (UNSCALED, HE)}
    larger = paired_difference(first[UNSCALED], first[HE])
    statement = "No scaling → exploding gradients, more than a thousand times He's (first layer)"
    lab.claim(statement, GUIDE, larger, above(3), POWERS)
    lab.claim("It trains (He)", GUIDE, share[HE], above(50), "%")
    lab.claim("Default → already good: it trains", GUIDE, share[DEFAULT], above(50), "%")
    lab.claim("He beats Xavier (ReLU)", GUIDE, runs.gain(HE, XAVIER), above(0.5))
    lab.claim("Orthogonal is for RNNs only: no gain over He here", ADVICE, runs.gain(ORTHOGONAL, HE), below(0.5))
    for name in (HE, ORTHOGONAL):
        update = estimate(powers(runs.notes("updates", name)).mean((1, 2)))
        statement = f"At a good rate a step moves the weights by a thousandth, to half a power of ten ({name})"
        lab.claim(statement, CS231N, update, Range(-3.5, -2.5), POWERS)


# %% [markdown]
# ## 4. Symmetry
#
# Units that start equal get equal gradients and stay equal: a layer of 64 is a layer of one. That is the story of a
# *constant* start. All zeros are another story, and a shorter one: with ReLU no weight ever gets a gradient, and only
# the output's bias learns how frequent each class is. With sigmoid a half arrives from each hidden unit, so the output
# layer learns, and then the rest, as one unit.
#
# Distinct units are counted as different rows of a layer's weights, rounded to a thousandth of the largest weight.
# What breaks the tie must treat the units differently: noise on the images does not. And a zero *output* layer makes no
# tie: the units that feed it differ, and so do the classes; after one step its rows and columns differ, too.

# %%
TOLERANCE = 1e-3
SHALLOW = replace(BASELINE, model=partial(mlp, start=he_normal, depth=3), epochs=12, evaluations=12)


def constant_and_noise(weight: Tensor) -> None:
    """Constant, with N(0, σ²) added, σ a hundredth of He's."""
    constant(weight)
    weight += 0.01 * sqrt(2 / fans(weight)[0]) * torch.randn_like(weight)


def zero_output(task: Task) -> nn.Module:
    """He's start, but the output layer all zero."""
    model = mlp(task, he_normal, depth=3)
    nn.init.zeros_(model[-1].weight)
    return model


def noisy_images(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of images with as much noise as signal."""
    return cross_entropy(model, x + torch.randn_like(x), y)


def distinct(rows: Tensor) -> int:
    """How many different rows (units, …) has, entries rounded to TOLERANCE of the largest."""
    rows = rows.detach().flatten(1)
    largest = float(rows.abs().max())
    return len((rows / (TOLERANCE * largest)).round().unique(dim=0)) if largest > 0 else 1


def note_symmetry(state: State) -> None:
    """Note by epoch how many units of the second hidden layer are distinct, and the rank of its weights."""
    weight = linear_layers(state.model)[1].weight.detach()
    state.notes.setdefault("distinct", []).append(distinct(weight))
    rank = torch.linalg.matrix_rank(weight, rtol=TOLERANCE) if weight.any() else 0
    state.notes.setdefault("rank", []).append(int(rank))


def note_zeros(model: nn.Module, split: Split) -> dict[str, Any]:
    """Note the share of entries that are not zero in each parameter: (parameters,)."""
    return {"moved": [float((each != 0).float().mean()) for each in model.parameters()]}


def symmetry(lab: Lab) -> None:
    """What do zeros and constants do to the units of a layer, and what undoes it?"""
    alike = with_start(SHALLOW, constant)
    sigmoid = replace(SHALLOW, model=partial(mlp, start=zeros, depth=3, activation=nn.Sigmoid))
    recipes = {
        HE: SHALLOW,
        CONSTANT: alike,
        "noisy images": replace(alike, loss=noisy_images),
        "dropout": replace(alike, model=partial(alike.model, dropout=0.2)),
        "noisy weights": with_start(SHALLOW, constant_and_noise),
        ZEROS: with_start(SHALLOW, zeros),
        "zeros, sigmoid": sigmoid,
        "zero output": replace(SHALLOW, model=zero_output),
    }
    recipes = {name: replace(recipe, after_epoch=note_symmetry) for name, recipe in recipes.items()}
    arms = at_best_rate(lab, recipes, dict.fromkeys(recipes, (0.03, 0.1, 0.3)), count=2)
    runs = lab.compare(arms, HE, note_zeros)
    count = {arm: runs.notes("distinct", arm) for arm in arms}
    rank = {arm: runs.notes("rank", arm) for arm in arms}
    rows = []
    for arm in arms:
        cells = [f"{estimate(table[:, i]).mean:.0f}" for table in (count[arm], rank[arm]) for i in (0, -1)]
        rows.append([arm, *cells, number(points(runs.estimate("test_accuracy", arm)).mean, 1)])
    heads = ["arm", "distinct,\nepoch 1", "distinct,\nend", "rank,\nepoch 1", "rank,\nend", "test\nacc. %"]
    lab.table(Table("Second hidden layer: distinct units of 64, rank of its weights", heads, rows))
    names = [f"{kind} {i}" for i in (1, 2, 3, 4) for kind in ("weight", "bias")]
    moved = {arm: estimates(100 * runs.notes("moved", arm)) for arm in (ZEROS, "zeros, sigmoid")}
    rows = [[arm, *(f"{each.mean:.0f}" for each in shares)] for arm, shares in moved.items()]
    heads = ["arm", *(name.replace(" ", "\n") for name in names)]
    lab.table(Table("Share of each layer's parameters that are no longer zero, in %", heads, rows))

    figure, axes = new_figure("What do constants do to the units of a layer?", 3)
    palette = colours(list(arms), HE)
    for ax, table, label in zip(axes, (count, rank), ("distinct units, of 64", "rank of the weights"), strict=False):
        for arm, colour in palette.items():
            style = {ZEROS: ":", "zeros, sigmoid": ":", "zero output": "--", "noisy images": "--"}.get(arm, "-")
            plot_history(ax, range(1, table[arm].shape[1] + 1), table[arm], arm, colour, style)
        ax.set(xlabel="epoch", ylabel=label)
    plot_dots(axes[2], {arm: points(runs.estimate("test_accuracy", arm)) for arm in arms}, BLACK)
    axes[2].set(xlabel="test accuracy (%)", xlim=(0, 100))
    for label in axes[2].get_yticklabels():
        label.set_color(palette[label.get_text()])
    lab.figure("symmetry", figure)

    for arm, shares in moved.items():
        kept = [name for name, share in zip(names, shares, strict=True) if share.mean > 0]
        lab.finding(f"{arm}: {', '.join(kept) if len(kept) < len(names) else 'all parameters'} moved from zero.")
    final = {arm: estimate(table[:, -1]) for arm, table in count.items()}
    lab.claim("Constant: all neurons learn the same thing", ADVICE, final[CONSTANT], below(1.5), "units")
    only_bias = estimate(100 * runs.notes("moved", ZEROS)[:, :-1].max(1))
    lab.claim(
        "Zeros: the hidden neurons learn, all the same (ReLU: share of weights that move)",
        GUIDE,
        only_bias,
        above(0),
        "% moved",
    )
    lab.claim(
        "Zeros: the hidden neurons learn, all the same (sigmoid: distinct units)",
        GUIDE,
        final["zeros, sigmoid"],
        below(1.5),
        "units",
    )
    for arm, whose in {"noisy images": "noise on the images", "dropout": "dropout", "noisy weights": "noise"}.items():
        lab.claim(f"It breaks the tie: half of the units distinct ({whose})", ADVICE, final[arm], above(32), "units")
    for arm in ("dropout", "noisy weights"):
        lab.claim(f"The tie broken, it is as good as He ({arm})", ADVICE, runs.gain(arm, HE), above(-1))
    lab.claim(
        "Never start a layer at zero: it costs accuracy (the output layer)",
        ADVICE,
        runs.gain("zero output"),
        below(-0.5),
    )


# %% [markdown]
# ## 5. Start × activation
#
# "ReLU → He, tanh → Xavier, SELU → LeCun, default PyTorch → already good." Sixteen networks of eight layers, each at
# its own best rate. Hidden layers are 32 and 128 wide in turns, as in the feed-forward part of a transformer: with
# equal widths Xavier and LeCun would be one start. (GELU has no rule in the study guide; it is usually given ReLU's.
# SELU, the steepest, gets lower rates.)
#
# Then the default beside He's start, for ReLU, at depths 2 and 20.

# %%
RULES = {"tanh": XAVIER, "ReLU": HE, "GELU": HE, "SELU": LECUN}
MATRIX_STARTS: dict[str, Start | None] = {DEFAULT: None, XAVIER: xavier_normal, HE: he_normal, LECUN: lecun_normal}


def matrix(lab: Lab) -> None:
    """Which start suits which activation, and is PyTorch's default good enough?"""
    recipes = {
        f"{name} {start}": replace(ONCE, model=partial(mlp, start=draw, widths=(32, 128), activation=ACTIVATIONS[name]))
        for name in RULES
        for start, draw in MATRIX_STARTS.items()
    }
    arms = at_best_rate(lab, recipes, {arm: LOWER if arm.startswith("SELU") else GRID for arm in recipes})
    runs = lab.compare(arms, {arm: f"{arm.split()[0]} {DEFAULT}" for arm in arms})
    deep_recipes = {
        f"{start} {depth}": replace(ONCE, model=partial(mlp, start=MATRIX_STARTS[start], depth=depth))
        for depth in (2, 20)
        for start in (DEFAULT, HE)
    }
    rates = {2: (0.03, 0.1, 0.2, 0.4), 20: LOWER}
    deep_arms = at_best_rate(lab, deep_recipes, {arm: rates[int(arm.split()[1])] for arm in deep_recipes})
    deep = lab.compare(deep_arms, {arm: f"{DEFAULT} {arm.split()[1]}" for arm in deep_arms})

    cells = np.array([[100 * runs.estimate("test_accuracy", f"{a} {b}").mean for b in MATRIX_STARTS] for a in RULES])
    best = {a: runs.best([f"{a} {b}" for b in MATRIX_STARTS]).split()[1] for a in RULES}
    rows = [
        [a, *(number(cell, 1) + ("*" if b == best[a] else "") for b, cell in zip(MATRIX_STARTS, row, strict=True))]
        for a, row in zip(RULES, cells, strict=True)
    ]
    lab.table(Table("Test accuracy, % (*: best on validation)", ["activation", *MATRIX_STARTS], rows))
    figure, axes = new_figure("Which start suits which activation?", 2)
    names = list(MATRIX_STARTS)
    heat_map(axes[0], cells, list(RULES), names, 10, 95, [names.index(best[a]) for a in RULES])
    axes[0].invert_yaxis()  # the order of the table
    axes[0].set(title="test accuracy, % (*: best on validation)", xlabel="start", ylabel="8 hidden layers")
    plot_dots(axes[1], {arm: points(deep.estimate("test_accuracy", arm)) for arm in deep_arms}, BLACK)
    axes[1].set(title="ReLU, 2 and 20 layers", xlabel="test accuracy (%)", xlim=(0, 100))
    lab.figure("matrix", figure)

    for name in RULES:
        accuracy = [points(runs.estimate("test_accuracy", f"{name} {start}")).mean for start in MATRIX_STARTS]
        reached = [each for each in accuracy if isfinite(each)] or [nan]
        span = f"{min(reached):.0f} to {max(reached):.0f} % on the test set"
        lab.finding(f"{name}: {best[name]} is best on validation; the four starts reach {span}.")
    for name, start in RULES.items():
        other = runs.best([f"{name} {each}" for each in MATRIX_STARTS if each != start])
        ahead = runs.gain(f"{name} {start}", other)
        source = ADVICE if name == "GELU" else GUIDE
        lab.claim(f"{name} → {start}: beats the best other ({other.split()[1]})", source, ahead, above(0.5))
    for depth in (2, 20):
        behind = deep.gain(f"{DEFAULT} {depth}", f"{HE} {depth}")
        statement = f"PyTorch's default is already good: no worse than He (ReLU, {depth} layers)"
        lab.claim(statement, GUIDE, behind, above(-1))


# %% [markdown]
# ## 6. How deep?
#
# He et al. trained networks of 22 layers from both starts, He's the faster; at 30 layers Xavier's stalled. The reason
# is in experiment 2: Xavier halves the variance in every ReLU layer, and 2⁻³⁰ is little. Here are five depths, with
# Adam, which gets further down in a few steps than SGD does, and 48 steps: "does not train" means not in 48 (exercise 3
# gives it more). Each start and depth has its own rate, but 50 layers get that of 30.

# %%
DEPTHS = (5, 10, 20, 30, 50)
LONG = replace(BASELINE, optimizer=partial(ADAM, lr=1e-3), epochs=12, evaluations=2)
ADAM_GRIDS = dict.fromkeys(DEPTHS, (0.001, 0.003, 0.01)) | {30: (0.001, 0.003)}


def how_deep(lab: Lab) -> None:
    """Down to which depth do Xavier's and He's starts train?"""
    starts = {XAVIER: xavier_normal, HE: he_normal}
    recipes = {
        f"{name} {depth}": replace(LONG, model=partial(mlp, start=start, depth=depth))
        for depth in DEPTHS
        for name, start in starts.items()
    }
    tuned = {arm: recipe for arm, recipe in recipes.items() if not arm.endswith(" 50")}
    best = at_best_rate(lab, tuned, {arm: ADAM_GRIDS[int(arm.split()[1])] for arm in tuned}, count=2)
    arms = {
        arm: best.get(arm) or replace(recipe, optimizer=best[f"{arm.split()[0]} 30"].optimizer)
        for arm, recipe in recipes.items()
    }
    runs = lab.compare(arms, {arm: f"{XAVIER} {arm.split()[1]}" for arm in arms})
    share = {arm: share_that_trains(runs, arm) for arm in arms}
    rows = [[name, *(f"{share[f'{name} {depth}'].mean:.0f}" for depth in DEPTHS)] for name in starts]
    lab.table(Table("Share of seeds that train, in %", ["start", *(f"{depth} layers" for depth in DEPTHS)], rows))

    figure, axes = new_figure("Down to which depth do Xavier and He train?", 3)
    for name, colour in colours(list(starts), XAVIER).items():
        accuracy = [points(runs.estimate("test_accuracy", f"{name} {depth}")) for depth in DEPTHS]
        plot_estimates(axes[0], DEPTHS, accuracy, name, colour)
        for ax, depth in zip(axes[1:], (20, 30), strict=True):
            arm = f"{name} {depth}"
            plot_history(ax, runs.epochs(arm), runs.history("train_loss", arm), name, colour)
    log_ticks(axes[0], DEPTHS)
    axes[0].set(xlabel="hidden layers", ylabel="test accuracy (%)", ylim=(0, 100))
    for ax, depth in zip(axes[1:], (20, 30), strict=True):
        ax.set(title=f"{depth} layers", xlabel="epoch", ylabel="training loss (nats)", ylim=(0, 3.5))
    shared_legend(figure, axes[0])
    lab.figure("how_deep", figure)

    for name in starts:
        depths = [depth for depth in DEPTHS if share[f"{name} {depth}"].mean > 50]
        lab.finding(f"{name}: most seeds train at {', '.join(map(str, depths)) or 'none of these'} layers.")
    lab.claim("Five layers: nothing to choose between them", ADVICE, runs.gain(f"{HE} 5"), within(1))
    for depth, name in ((20, XAVIER), (20, HE), (30, HE), (50, HE)):
        source = ADVICE if depth == 50 else HE_ET_AL
        lab.claim(f"{depth} layers: {name} trains, in this budget", source, share[f"{name} {depth}"], above(50), "%")
    faster = runs.difference("train_loss", f"{HE} 20")
    lab.claim("20 layers: He is faster (training loss at the end)", HE_ET_AL, faster, below(0), "nats")
    lab.claim("30 layers: Xavier does not train, in this budget", HE_ET_AL, share[f"{XAVIER} 30"], below(50), "%")


# %% [markdown]
# ## 7. Orthogonal
#
# An orthogonal matrix changes no vector's length, and neither does a product of a hundred of them. A Gaussian one with
# the right variance does so only on average: it stretches some directions and shrinks others, and in a product this
# multiplies. Saxe et al. followed *linear* networks, in which depth changes nothing but the learning: from an
# orthogonal start the number of steps does not depend on depth, from a Gaussian one it does.
#
# First that: full-batch gradient descent on 200 digits until the training loss is below 0.5, each depth and start at
# the rate that needs the fewest steps; a run that is not there after 60 counts as 60. Then a recurrent network that
# reads a digit pixel by pixel: it multiplies by the same matrix at every step, so what is left of the gradient after 64
# steps is the matrix's doing. (Its inputs' weights are Xavier's, its biases zero; nothing is trained.)

# %%
LINEAR_DEPTHS = (2, 5, 10, 20, 40)
# each depth tries the rates for which rate × depth is from 0.08 to 2
LINEAR_RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
TARGET = 0.5


def note_learned(state: State) -> bool:
    """Note the step after which the training loss is below TARGET, and stop there."""
    learned = evaluate(state.model, state.split.train)[0] < TARGET
    if learned:
        state.notes["steps"] = state.step
    return learned


LINEAR = Recipe(
    model=partial(mlp, start=orthogonal, activation=nn.Identity),
    optimizer=partial(torch.optim.SGD, fused=True),
    epochs=60,
    batch_size=200,
    examples=200,
    evaluations=1,
    after_epoch=note_learned,
)


def steps_needed(runs: Comparison, arm: str) -> np.ndarray:
    """Steps to TARGET by seed, (seeds,), NaN where a run did not get there."""
    return np.array([run.notes.get("steps", nan) if run.diverged_at is None else nan for run in runs.runs[arm]])


def at_least(runs: Comparison, arm: str) -> np.ndarray:
    """A lower bound of the steps to TARGET by seed, (seeds,): a run that was not there at its end counts with its
    length; NaN for one that diverged.
    """
    length = [nan if run.diverged_at is not None else runs.arms[arm].epochs for run in runs.runs[arm]]
    steps = steps_needed(runs, arm)
    return np.where(np.isnan(steps), length, steps)


def fastest(lab: Lab, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Each recipe at the rate that needs the fewest steps on a seed that is not reported; prints the grid."""
    tried = {arm: [r for r in LINEAR_RATES if 0.08 <= r * int(arm.split()[1]) <= 2] for arm in recipes}
    grid = {f"{arm}, {rate}": at_rate(recipes[arm], rate) for arm, rates in tried.items() for rate in rates}
    seeds = tuning_seeds(lab.settings.seeds, 1)
    runs = lab.train(lab.sized(grid), next(iter(grid)), seeds)
    rows, chosen = [], {}
    for arm, rates in tried.items():
        means = {rate: float(steps_needed(runs, f"{arm}, {rate}").mean()) for rate in rates}
        best = min(rates, key=lambda rate: np.nan_to_num(means[rate], nan=inf))
        cells = {rate: number(mean, 1) + ("*" if rate == best else "") for rate, mean in means.items()}
        rows.append([arm, *(cells.get(rate, "") for rate in LINEAR_RATES)])
        chosen[arm] = at_rate(recipes[arm], best)
    title = f"Steps to a training loss of {TARGET} by rate (*: chosen), seed {seeds[0]}"
    lab.table(Table(title, ["arm", *map(str, LINEAR_RATES)], rows))
    return chosen


def identity(weight: Tensor) -> None:
    """The identity matrix."""
    nn.init.eye_(weight)


RECURRENT: dict[str, Start] = {
    DEFAULT: torch_default,
    "Gaussian": lecun_normal,
    HE: he_normal,
    ORTHOGONAL: orthogonal,
    "identity": identity,
}
CELLS = {"linear": nn.Identity(), "tanh": nn.Tanh()}


def through_time(cell: str, start: Start, dataset: str, seed: int, width: int = 64) -> np.ndarray:
    """h ← φ(W h + U x) over the pixels of a batch: the norm of the loss's gradient with respect to h after each pixel,
    relative to that after the last, in powers of ten, (pixels,). In 64 bits: hundreds of steps underflow 32.
    """
    data = load(dataset)
    x, y = Batch(*(part[:IMAGES] for part in make_split(data, seed, BASELINE.examples).train))
    torch.manual_seed(seed)
    recurrent, inputs, outputs = torch.empty(width, width), torch.empty(width, 1), torch.empty(data.task.classes, width)
    for weight, draw in ((inputs, xavier_normal), (outputs, xavier_normal), (recurrent, start)):
        draw(weight)
    recurrent, inputs, outputs = (weight.double() for weight in (recurrent, inputs, outputs))
    h, states = torch.zeros(len(x), width, dtype=torch.float64, requires_grad=True), []
    for pixel in x.flatten(1).double().T:
        h = CELLS[cell](h @ recurrent.T + pixel[:, None] @ inputs.T)
        h.retain_grad()
        states.append(h)
    F.cross_entropy(h @ outputs.T, y).backward()
    norms = powers([norm(state.grad) for state in states])
    return norms - norms[-1]


def norm(x: Tensor) -> float:
    """The 2-norm of numbers whose squares would underflow."""
    largest = x.abs().max()
    return float(largest * (x / largest).norm())


def orthogonality(lab: Lab) -> None:
    """Do orthogonal starts make deep linear networks fast, and do they keep a recurrent network's gradient?"""
    starts = {"Gaussian": lecun_normal, ORTHOGONAL: orthogonal}
    recipes = {
        f"{name} {depth}": replace(LINEAR, model=partial(LINEAR.model, start=start, depth=depth))
        for depth in LINEAR_DEPTHS
        for name, start in starts.items()
    }
    arms = fastest(lab, recipes)
    runs = lab.compare(arms, {arm: f"Gaussian {arm.split()[1]}" for arm in arms})
    steps = {arm: at_least(runs, arm) for arm in arms}
    rows = [[name, *(number(estimate(steps[f"{name} {n}"]).mean, 1) for n in LINEAR_DEPTHS)] for name in starts]
    heads = ["start", *(f"{depth} layers" for depth in LINEAR_DEPTHS)]
    lab.table(Table(f"Linear networks: steps to a training loss of {TARGET}", heads, rows))
    left = {
        (cell, name): np.array(
            list(lab.executor.map(partial(through_time, cell, start, lab.settings.dataset), lab.settings.seeds))
        )
        for cell in CELLS
        for name, start in RECURRENT.items()
    }
    kept = {key: estimate(table[:, 0]) for key, table in left.items()}
    rows = [[name, *(signed(kept[cell, name].mean, 1) for cell in CELLS)] for name in RECURRENT]
    pixels = left["tanh", DEFAULT].shape[1]
    title = f"Recurrent: gradient at the first of {pixels} pixels over the last, powers of ten"
    lab.table(Table(title, ["start", *CELLS], rows))

    figure, axes = new_figure("What is special about orthogonal starts?", 3)
    for name, colour in colours(list(starts), "Gaussian").items():
        means = [estimate(steps[f"{name} {depth}"]) for depth in LINEAR_DEPTHS]
        plot_estimates(axes[0], LINEAR_DEPTHS, means, name, colour)
    log_ticks(axes[0], LINEAR_DEPTHS)
    axes[0].set(title="deep linear networks", xlabel="hidden layers", ylabel=f"steps to a loss of {TARGET}")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    for ax, cell in zip(axes[1:], CELLS, strict=True):
        palette = colours(list(RECURRENT), "Gaussian") | {ORTHOGONAL: COLOURS[0], DEFAULT: COLOURS[2]}
        for name, colour in palette.items():
            plot_history(ax, range(pixels, 0, -1), left[cell, name], name, colour)
        ax.set(title=f"recurrent, {cell}", xlabel="steps back", ylabel="gradient, power of 10", ylim=(-8, 8))
        ax.legend(frameon=False, fontsize=8)
    lab.figure("orthogonality", figure)

    deepest, shallowest = LINEAR_DEPTHS[-1], LINEAR_DEPTHS[0]
    for name in starts:
        few, many = (number(estimate(steps[f"{name} {depth}"]).mean, 1) for depth in (shallowest, deepest))
        lab.finding(f"{name}, linear: {few} steps with {shallowest} layers, {many} with {deepest}.")
    steps[f"{ORTHOGONAL} {deepest}"] = steps_needed(
        runs, f"{ORTHOGONAL} {deepest}"
    )  # a lower bound would prove nothing
    for name, expected in {ORTHOGONAL: below(1.5), "Gaussian": above(1.5)}.items():
        ratio = estimate(steps[f"{name} {deepest}"] / steps_needed(runs, f"{name} {shallowest}"))
        what = "does not grow" if name == ORTHOGONAL else "grows"
        statement = f"Linear: the time to learn {what} with depth ({name}, {deepest} layers against {shallowest})"
        lab.claim(statement, SAXE, ratio, expected, "times")
    for cell in CELLS:
        statement = f"Orthogonal for RNNs: gradient kept within a factor of ten ({cell})"
        lab.claim(statement, ADVICE, kept[cell, ORTHOGONAL], within(1), POWERS)
        more = paired_difference(left[cell, ORTHOGONAL][:, 0], left[cell, DEFAULT][:, 0])
        lab.claim(f"Orthogonal for RNNs: more gradient left than by default ({cell})", ADVICE, more, above(1), POWERS)
    more = paired_difference(left["tanh", ORTHOGONAL][:, 0], left["tanh", "Gaussian"][:, 0])
    lab.claim("Orthogonal for RNNs: more gradient left than Gaussian (tanh)", ADVICE, more, above(0), POWERS)


# %% [markdown]
# ## 8. When it stops mattering
#
# Hardly anybody trains plain stacks of eight layers today. What is left of the differences between starts with batch
# norm, with skip connections (nine layers), with skip connections whose blocks start as the identity (their last layer
# at zero, as in Fixup and in batch norm with zero gamma), or with Adam? Every cell has its own rate.
#
# The *spread* of the usual three starts is the test accuracy of the one that is best on validation minus that of the
# one that is worst there, seed by seed: 90 and 70 % make 20 points. A diverged run counts as a guess. The fourth start,
# N(0, 0.01²), is there to be rescued.

# %%
SPREAD_STARTS: dict[str, Start | None] = {
    SMALL: partial(normal, std=0.01),
    DEFAULT: None,
    XAVIER: xavier_normal,
    HE: he_normal,
}
USUAL = [DEFAULT, XAVIER, HE]
RATES_FOR = {"skips": (0.003, *GRID), "Adam": (0.001, 0.003, 0.01)}


class Skip(nn.Module):
    """x + f(x) on vectors (N, width), with f two linear layers and a ReLU between them. He et al. 2016."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def skip_net(task: Task, start: Start | None, zero_last: bool = False, blocks: int = 4, width: int = 64) -> nn.Module:
    """A layer and `blocks` skip connections of two layers each: (N, C, H, W) to logits (N, classes).

    zero_last: the last layer of each block starts at zero, so that the block starts as the identity.
    """
    first = [nn.Flatten(), nn.Linear(prod(task.shape), width), nn.ReLU()]
    skips = [Skip(width) for _ in range(blocks)]
    model = initialise(nn.Sequential(*first, *skips, nn.Linear(width, task.classes)), start)
    if zero_last:
        for skip in skips:
            nn.init.zeros_(skip.branch[-1].weight)
            nn.init.zeros_(skip.branch[-1].bias)
    return model


PLAIN = "plain"
RELIEF = {
    PLAIN: ONCE,
    "batch norm": replace(ONCE, model=partial(mlp, norm=nn.BatchNorm1d)),
    "skips": replace(ONCE, model=skip_net),
    "skips, zero": replace(ONCE, model=partial(skip_net, zero_last=True)),
    "Adam": replace(ONCE, optimizer=ADAM),
}


def accuracies(runs: Comparison, arm: str, chance: float) -> np.ndarray:
    """Test accuracy of each run in %, (seeds,); that of a diverged one is what guessing gives."""
    return 100 * np.nan_to_num(runs.values("test_accuracy", arm), nan=chance)


def best_and_worst(runs: Comparison, arms: Sequence[str], chance: float) -> tuple[str, str]:
    """The arms with the best and the worst mean accuracy on validation, a diverged run counting as a guess."""
    scores = {arm: np.nan_to_num(runs.values("validation_accuracy", arm), nan=chance).mean() for arm in arms}
    return max(scores, key=scores.get), min(scores, key=scores.get)


def relief(lab: Lab) -> None:
    """What makes the choice of a start unimportant?"""
    recipes = {
        f"{name}: {start}": with_start(recipe, draw)
        for name, recipe in RELIEF.items()
        for start, draw in SPREAD_STARTS.items()
    }
    arms = at_best_rate(lab, recipes, {arm: RATES_FOR.get(arm.partition(":")[0], GRID) for arm in recipes})
    runs = lab.compare(arms, {arm: f"{arm.partition(':')[0]}: {DEFAULT}" for arm in arms})
    chance = 1 / load(lab.settings.dataset).task.classes
    accuracy = {arm: accuracies(runs, arm, chance) for arm in arms}
    cells, stars, spread, rescue, rows = [], [], {}, {}, []
    for name in RELIEF:
        usual = [f"{name}: {start}" for start in USUAL]
        best, worst = best_and_worst(runs, usual, chance)
        spread[name] = accuracy[best] - accuracy[worst]
        rescue[name] = paired_difference(accuracy[f"{name}: {SMALL}"], accuracy[best])
        cells.append([accuracy[f"{name}: {start}"].mean() for start in SPREAD_STARTS])
        stars.append(list(SPREAD_STARTS).index(best.partition(": ")[2]))
        rows.append([name, *(number(mean, 1) for mean in (*cells[-1], spread[name].mean()))])
    heads = ["network", *SPREAD_STARTS, "spread of the\nlast three"]
    lab.table(Table("Test accuracy by start, %, and its spread, points", heads, rows))

    figure, axes = new_figure("What makes the choice of a start unimportant?", 2)
    heat_map(axes[0], np.array(cells), list(RELIEF), list(SPREAD_STARTS), 10, 95, stars)
    axes[0].set(title="test accuracy, % (*: best of the usual on validation)", xlabel="start")
    axes[0].invert_yaxis()
    plot_dots(axes[1], {name: estimate(each) for name, each in spread.items()}, BLACK)
    axes[1].set(title="spread of default, Xavier, He", xlabel="test accuracy (points)")
    lab.figure("relief", figure)

    for name, apart in spread.items():
        ahead = f"{estimate(apart).mean:+.1f} points better than the one that is worst there"
        lab.finding(f"{name}: on test images the usual start that is best on validation is {ahead}.")
    for name in list(RELIEF)[1:]:
        source = GUIDE if name == "batch norm" else ADVICE
        less = paired_difference(spread[name], spread[PLAIN])
        lab.claim(f"The start matters less: smaller spread ({name})", source, less, below(-0.5))
        statement = f"The start no longer matters: the usual three within 2 points ({name})"
        lab.claim(statement, ADVICE, estimate(spread[name]), below(2))
        statement = f"It rescues even N(0, 0.01²): less than 5 points behind the best ({name})"
        lab.claim(statement, ADVICE, rescue[name], above(-5))


# %% [markdown]
# ## 9. First aid
#
# A network does not learn. Before you change anything, look at it: one batch, one step, no training. `print(first_aid(
# model, x, y))` examines a classifier on one batch, works on a copy, and says what it finds:
#
# - the loss at the start, beside log(classes), the loss of somebody who guesses;
# - for every linear or convolutional layer: the size of its inputs; their *difference* between the images (experiment 2
#   tells why this and not the size is the signal); how many of its inputs are the same for every image: behind a ReLU
#   these are dead units; how many activations after it are saturated; how many of its units are distinct, in weights or
#   at least in gradients; the gradient that arrives at it;
# - how far one step of your optimiser moves the weights, relative to their size: about a thousandth is common advice.
#
# It sees layers and activations that are modules. What it says is a hint, with thresholds that we chose: a network that
# it calls healthy may still learn slowly (second table: the ten starts of experiment 3).

# %%
ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FIRST_STEP = partial(torch.optim.SGD, lr=0.01)
CHANGED = 1e3  # diagnose: a signal or a gradient that grows or shrinks by this is ill,
DEAD, FLAT, ALIKE = (
    0.75,
    0.9,
    0.5,
)  # so are these shares of dead inputs, saturated activations, units that are not alone,
CONFIDENT, STEP = 2.0, (1e-5, 0.1)  # a loss of so many times log(classes), and updates below or above these


@dataclass
class Vitals:
    """What `first_aid` measured at one layer.

    size, difference: of its inputs, root mean square, and deviation over the batch (root mean square over inputs).
    dead: share of its inputs that are the same for the whole batch. saturated: share of the activations after it with a
    slope below a twentieth of their largest, NaN if no activation follows. gradient: norm of the loss's gradient with
    respect to its output, mean over examples. distinct: share of its units that differ, in weights or in gradients.
    update: norm of one step over norm of the weights.
    """

    name: str
    size: float
    difference: float
    dead: float
    saturated: float = nan
    gradient: float = nan
    distinct: float = nan
    update: float = nan


@dataclass
class Examination:
    """The loss at the start, that of guessing, the layers' vitals from first to last, and the diagnosis in words by
    name, the likeliest cause first.
    """

    loss: float
    guessing: float
    layers: list[Vitals]
    diagnosis: dict[str, str]

    @property
    def cause(self) -> str:
        """The name of the likeliest cause, or "healthy"."""
        return next(iter(self.diagnosis))

    def __str__(self) -> str:
        heads = ("size", "diff.", "dead %", "sat. %", "gradient", "dist. %", "update")
        lines = [f"loss {self.loss:.3g}, guessing {self.guessing:.3g}"]
        lines.append(f"{'layer':16s}" + "".join(f"{head:>9s}" for head in heads))
        for each in self.layers:
            cells = f"{each.size:9.1e}{each.difference:9.1e}{100 * each.dead:9.0f}{100 * each.saturated:9.0f}"
            cells += f"{each.gradient:9.1e}{100 * each.distinct:9.0f}{each.update:9.1e}"
            lines.append(f"{each.name[:15]:16s}{cells}")
        return "\n".join([*lines, *(f"{name}: {words}" for name, words in self.diagnosis.items())])


def first_aid(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: Callable[..., torch.optim.Optimizer] = FIRST_STEP
) -> Examination:
    """Examine a classifier on one batch of some dozens of examples, in training mode, and by one step of the optimiser.
    Works on a copy: the model and the random numbers stay as they are.

    x (N, …), labels y (N, …); the model returns logits (N, classes, …). Raises ValueError if it does not, or if it has
    no linear or convolutional layer that the loss depends on.
    """
    patient = deepcopy(model).train()
    names = {module: name for name, module in patient.named_modules()}
    trace: list[tuple[Vitals, nn.Module, Tensor]] = []  # layer by layer, in the order of the forward pass

    def look(module: nn.Module, arguments: tuple[Tensor]) -> None:
        trace.append((look_at_inputs(f"{len(trace) + 1} ({names[module]})", arguments[0].detach()), module, None))

    def tap(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        tapped = output + torch.zeros_like(output, requires_grad=True)  # has a gradient even if the layer is frozen
        if tapped.requires_grad:
            tapped.retain_grad()
        trace[-1] = (*trace[-1][:2], tapped)
        return tapped.clone()  # which the model may overwrite

    def squash(module: nn.Module, arguments: tuple[Tensor]) -> None:
        if trace:
            trace[-1][0].saturated = float(flat(module, arguments[0]).float().mean())

    for module in patient.modules():
        if isinstance(module, WEIGHTED):
            module.register_forward_pre_hook(look)
            module.register_forward_hook(tap)
        elif isinstance(module, ELEMENTWISE):
            module.register_forward_pre_hook(squash)
    with torch.enable_grad(), torch.random.fork_rng():
        logits = patient(x)
        if not isinstance(logits, Tensor) or logits.ndim < 2 or (len(logits), *logits.shape[2:]) != tuple(y.shape):
            raise ValueError(f"the model must return logits (N, classes, …) for labels {tuple(y.shape)}")
        loss = F.cross_entropy(logits, y)
        loss.backward()
    used = [(seen, layer, output.grad) for seen, layer, output in trace if output.grad is not None]
    if not used:
        raise ValueError("nothing to examine: the loss depends on no linear or convolutional layer")
    before = [layer.weight.detach().clone() for _, layer, _ in used]
    optimizer(patient.parameters()).step()
    for (seen, layer, gradient), weight in zip(used, before, strict=True):
        look_at_weights(seen, layer, gradient, weight)
    layers = [seen for seen, _, _ in used]
    guessing = log(logits.shape[1])
    return Examination(loss.item(), guessing, layers, diagnose(x, loss.item(), guessing, layers))


def look_at_inputs(name: str, x: Tensor) -> Vitals:
    """The vitals of a layer's inputs (N, …), as far as they can be seen on the way forwards."""
    x = x.double()
    difference = x.var(0, correction=0).mean().sqrt()
    same = (x == x[:1]).all(0).double().mean()
    return Vitals(name, float(x.square().mean().sqrt()), float(difference), float(same))


def look_at_weights(seen: Vitals, layer: nn.Module, gradient: Tensor, before: Tensor) -> None:
    """Add what is to be seen after a step: `gradient` of the layer's output, and its weights `before` the step."""
    weight = layer.weight.detach()
    grad = torch.zeros_like(weight) if layer.weight.grad is None else layer.weight.grad
    rows = torch.cat([each.flatten(1) / each.abs().max().clamp_min(1e-30) for each in (before, grad)], 1)
    seen.distinct = distinct(rows) / len(rows)
    seen.gradient = float(gradient.double().flatten(1).norm(dim=1).mean())
    seen.update = float((weight - before).double().norm() / before.double().norm())


def through(layers: Sequence[Vitals]) -> tuple[float, float]:
    """By what factor the difference between the examples changes from the first layer's inputs to the last layer's, and
    the gradient on the way back from the last hidden layer to the first; NaN if none arrives at either, as behind an
    output layer that starts at zero.
    """
    first, last = layers[0], (layers[:-1] or layers)[-1]
    signal = layers[-1].difference / first.difference if first.difference else 0.0
    return signal, first.gradient / last.gradient if last.gradient else nan


def diagnose(x: Tensor, loss: float, guessing: float, layers: Sequence[Vitals]) -> dict[str, str]:
    """The findings in words by name, the likeliest cause first; {"healthy": …} if there is nothing to say."""
    if not x.isfinite().all() or not all(isfinite(each.size) for each in layers[:1]):
        return {"bad batch": "it holds numbers that are not finite; look at the data"}
    signal, gradient = through(layers)
    back = f"gradient × {gradient:.0e} back" if isfinite(gradient) else "no gradient back"
    changes = f"difference × {signal:.0e} on the way, {back}"
    hidden, updates = layers[:-1] or layers, [each.update for each in layers if 0 < each.update < inf]
    alike = min(hidden, key=lambda each: each.distinct)
    dead = max(layers[1:] or layers, key=lambda each: each.dead)  # the first layer's inputs are the data's affair
    flattest = max(layers, key=lambda each: np.nan_to_num(each.saturated))
    found = {}
    if not isfinite(loss) or signal > CHANGED or gradient > CHANGED:
        found["exploding"] = f"{changes}; start smaller (ReLU: He)"
    elif alike.distinct < ALIKE:
        found["symmetric"] = f"{100 * alike.distinct:.0f} % of layer {alike.name}'s units differ; start at random"
    elif dead.dead > DEAD and len(layers) > 1:
        found["dead units"] = (
            f"{100 * dead.dead:.0f} % of layer {dead.name}'s inputs never change; look at biases, rate"
        )
    elif flattest.saturated > FLAT:
        found["saturated"] = f"{100 * flattest.saturated:.0f} % of what follows layer {flattest.name}; start smaller"
    if "exploding" not in found and (signal < 1 / CHANGED or gradient < 1 / CHANGED):
        found["vanishing"] = f"{changes}; start larger (ReLU: He)"
    if isfinite(loss) and loss > CONFIDENT * guessing:
        found["overconfident"] = f"loss {loss:.3g}, guessing {guessing:.3g}; scale inputs, start the last layer smaller"
    if updates and not found and not STEP[0] <= np.median(updates) <= STEP[1]:
        found["rate"] = f"a step moves the weights by {np.median(updates):.0e} of their size; about 1e-3 is usual"
    return found or {"healthy": changes}


def healthy(task: Task) -> nn.Module:
    """He's start for ReLU, the output layer at a tenth of it."""
    model = mlp(task, he_normal, depth=20)
    with torch.no_grad():
        model[-1].weight *= 0.1
    return model


def vanishing(task: Task) -> nn.Module:
    """PyTorch's default: variance 1/(3 fan-in) where ReLU needs 2/fan-in."""
    return mlp(task, None, depth=20)


def exploding(task: Task) -> nn.Module:
    """Random without scaling: every layer multiplies by √(64/2)."""
    return mlp(task, partial(normal, std=1.0), depth=20)


def symmetric(task: Task) -> nn.Module:
    """All weights of a layer equal."""
    return mlp(task, constant, depth=20)


def dead(task: Task) -> nn.Module:
    """He's start, but a mishap has left the biases of one layer far below zero."""
    model = mlp(task, he_normal, depth=20)
    nn.init.constant_(linear_layers(model)[9].bias, -10.0)
    return model


PATIENTS = {
    "healthy": healthy,
    "vanishing": vanishing,
    "exploding": exploding,
    "symmetric": symmetric,
    "dead units": dead,
}
STARTED = {name: partial(mlp, start=start) for name, start in TRAIN_STARTS.items()}


def examine(build: Callable[[Task], nn.Module], dataset: str, seed: int) -> Examination:
    """Build a network and examine it on the first batch."""
    data = load(dataset)
    x, y = Batch(*(part[: BASELINE.batch_size] for part in make_split(data, seed, BASELINE.examples).train))
    torch.manual_seed(seed)
    return first_aid(build(data.task), x, y)


def start_loss(dataset: str, seed: int) -> float:
    """By how much the loss of a network of 20 layers with He's start, the output layer included, exceeds guessing."""
    data = load(dataset)
    torch.manual_seed(seed)
    return evaluate(mlp(data.task, he_normal, depth=20), make_split(data, seed).validation)[0] - log(data.task.classes)


def first_aid_kit(lab: Lab) -> None:
    """Does one look at one batch tell what is wrong with a network?"""
    seeds, dataset = lab.settings.seeds, lab.settings.dataset
    found = {
        name: list(lab.executor.map(partial(examine, build, dataset), seeds))
        for name, build in (PATIENTS | STARTED).items()
    }
    rows = []
    for name in PATIENTS:
        first = found[name][0]
        changes = (f"{each:.0e}" if isfinite(each) else "–" for each in through(first.layers))
        shares = [max(each.dead for each in first.layers[1:]), min(each.distinct for each in first.layers[:-1])]
        update = np.median([each.update for each in first.layers])
        right = sum(each.cause == name for each in found[name])
        cells = [number(first.loss, 2), *changes, *(f"{100 * each:.0f}" for each in shares), f"{update:.0e}"]
        rows.append([name, *cells, f"{right}/{len(seeds)}"])
    heads = ["network", "loss", "differ-\nence", "gradient,\nback", "dead,\nmax %", "distinct,\nmin %"]
    title = f"Five networks of 20 layers, seed {seeds[0]} (guessing costs {found['healthy'][0].guessing:.2f})"
    lab.table(Table(title, [*heads, "update,\nmedian", "seeds\nright"], rows))
    rows = []
    for name in STARTED:
        causes = [each.cause for each in found[name]]
        counts = {cause: causes.count(cause) for cause in dict.fromkeys(causes)}
        rows.append([name, ", ".join(f"{cause} {count}/{len(seeds)}" for cause, count in counts.items())])
    lab.table(Table("The ten starts of experiment 3, examined", ["start", "likeliest cause"], rows))
    for name in PATIENTS:
        for diagnosis, words in found[name][0].diagnosis.items():
            lab.finding(f"{name} → {diagnosis}: {words}.")

    figure, axes = new_figure("Does one look tell what is wrong?", 2)
    for name, colour in colours(list(PATIENTS), "healthy").items():
        for ax, key in zip(axes, ("difference", "gradient"), strict=True):
            sizes = powers([[getattr(layer, key) for layer in each.layers] for each in found[name]])
            plot_history(ax, range(1, sizes.shape[1] + 1), sizes, name, colour)
    axes[0].set(ylabel="difference between images, power of 10", ylim=(-15, 15))
    axes[1].set(ylabel="gradient, power of 10 (zero: no line)", ylim=(-15, 15))
    for ax in axes:
        ax.set(xlabel="layer", xticks=range(1, 22, 4))
    shared_legend(figure, axes[0], 5)
    lab.figure("first_aid_kit", figure)

    off = list(lab.executor.map(partial(start_loss, dataset), seeds))
    statement = "The loss at the start is log(classes), within half a nat (He, 20 layers)"
    lab.claim(statement, CS231N, estimate(off), within(0.5), "nats")
    off = estimate([each.loss - each.guessing for each in found["vanishing"]])
    lab.claim("A vanishing network shows in its first loss: off log(classes) by 0.1", ADVICE, off, above(0.1), "nats")


# %% [markdown]
# ## What we saw, where it fails
#
# The run ends with a list of all claims by verdict, each with the effect that decided it. It is computed, not written:
# change a setting, run again, and read whether it still says the same.
#
# ## Exercises
#
# Each is one changed line; the answers, each from a run, are in `exercises/19_weight_initialization.md`.
#
# 1. PyTorch's gain for tanh is 5/3: write `partial(xavier_normal, gain=5 / 3)` for XAVIER in `MATRIX_STARTS`, then
#    `--only matrix`. Does tanh → Xavier hold now, and what happens to the others?
# 2. Four times the steps: `epochs=32` in `BASELINE`, then `--only trains`. Which starts were only slow?
# 3. Four times the steps: `epochs=48` in `LONG`, then `--only how_deep`. Does Xavier train 30 layers after all?
# 4. `ORTHOGONAL: partial(orthogonal, gain=1.1)` in `RECURRENT`, then `--only orthogonality`. Can a little more than
#    orthogonal keep the gradient of a tanh network?
# 5. Biases of −2 instead of −10 in `dead`, then `--only first_aid_kit`. Is a layer found that is only half dead?

# %%
EXPERIMENTS = [formulas, fifty_layers, trains, symmetry, matrix, how_deep, orthogonality, relief, first_aid_kit]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the lesson; in a notebook, `main(["--quick"])` is a smoke run."""
    run_lesson(LESSON, TITLE, EXPERIMENTS, LARGER, arguments)


if __name__ == "__main__":
    main()
