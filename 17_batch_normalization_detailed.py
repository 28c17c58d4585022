# %% [markdown]
# # Lesson 17: Batch normalisation's relatives
#
# **The question.** Batch, layer, instance, group, RMS: five norms that subtract a mean and divide by a deviation (one
# does not even subtract). They differ in *which numbers are normalised together*. Which one for which batch, image or
# sequence, and is the table that everybody repeats true?
#
# **You will learn** to write all five with one function of axes; what small batches do to each; what each norm keeps
# and throws away of an image; what batch statistics make of sequences with padding; what `momentum`, `eps` and `affine`
# do; what each norm costs.
#
# **You need** lesson 16. The data are 1,797 handwritten digits that come with scikit-learn. A run takes about a minute
# on two CPU cores; see `results/` for the reference run.
#
# **Papers.** Ba et al. 2016, *Layer normalization* (arXiv 1607.06450); Ulyanov et al. 2016, *Instance normalization*
# (arXiv 1607.08022); Wu & He 2018, *Group normalization* (arXiv 1803.08494); Zhang & Sennrich 2019, *Root mean square
# layer normalization* (arXiv 1910.07467); Ioffe & Szegedy 2015, *Batch normalization* (arXiv 1502.03167).

# %%
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import pi, prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from common.first.cli import run_lesson
from common.first.data import Split, Task
from common.first.experiment import Comparison
from common.first.lab import Lab, Larger
from common.first.plotting import BASELINE as BLACK
from common.first.plotting import COLOURS, colours, log_ticks, new_figure, plot_dots, plot_estimates, shared_legend
from common.first.report import Table, interval, number
from common.first.statistics import (
    FAILS,
    HOLDS,
    UNCLEAR,
    Estimate,
    Range,
    above,
    below,
    estimate,
    estimates,
    paired_difference,
    points,
    within,
)
from common.first.training import Recipe, evaluate

LESSON = "17_batch_normalization_detailed"
TITLE = "Lesson 17: Batch normalisation's relatives"

# %% [markdown]
# ## The mechanism, from scratch
#
# One function does them all. A tensor of images has four axes: the image in the batch N, the channel C, height H, width
# W. The axes that the mean is taken over are the whole difference. (Each layer of PyTorch then scales by a learned gain
# and adds a learned shift, as in lesson 16; only batch norm, which looks at other images, needs running statistics.)


# %%
def normalise(x: Tensor, axes: int | tuple[int, ...], eps: float = 1e-5, centre: bool = True) -> Tensor:
    """Subtract the mean over `axes` (if `centre`), then divide by the root of the mean square over them, plus eps."""
    if centre:
        x = x - x.mean(axes, keepdim=True)
    return x / (x.square().mean(axes, keepdim=True) + eps).sqrt()


def batch_norm(x: Tensor) -> Tensor:
    """Images (N, C, H, W): each channel over all images and pixels, in training. Ioffe & Szegedy 2015."""
    return normalise(x, (0, 2, 3))


def layer_norm(x: Tensor) -> Tensor:
    """Images (N, C, H, W): each image over all its channels and pixels. Ba et al. 2016."""
    return normalise(x, (1, 2, 3))


def instance_norm(x: Tensor) -> Tensor:
    """Images (N, C, H, W): each channel of each image over its pixels. Ulyanov et al. 2016."""
    return normalise(x, (2, 3))


def group_norm(x: Tensor, groups: int) -> Tensor:
    """Images (N, C, H, W): each of `groups` equal groups of channels of each image. Wu & He 2018."""
    return normalise(x.reshape(len(x), groups, -1), 2).view_as(x)


def rms_norm(x: Tensor) -> Tensor:
    """Images (N, C, H, W): each image over all its channels and pixels, no mean taken off. Zhang & Sennrich 2019."""
    return normalise(x, (1, 2, 3), centre=False)


# %% [markdown]
# ## What is held fixed
#
# A convolutional network of two layers with 16 channels, SGD with momentum, 40 steps, right labels. Every arm gets the
# learning rate that is best for it on validation, on seeds that no result uses; the grid is printed. Where a rate is
# shared, the text says so. Layer norm on images is `nn.GroupNorm` with one group: it spans channels and pixels alike,
# with a gain for each channel, as the others have. From here on the layers are PyTorch's.


# %%
def conv_net(task: Task, norm: Callable[[int], nn.Module] | None = None, channels: int = 16) -> nn.Module:
    """Two blocks Conv (stride 2, then 1) → norm → ReLU, 2 × 2 maxima, a linear layer: (N, C, H, W) to (N, classes)."""
    layers: list[nn.Module] = []
    inputs = task.shape[0]
    for stride in (2, 1):
        conv = nn.Conv2d(inputs, channels, 3, stride, padding=1)
        layers += [conv, *([norm(channels)] if norm else []), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * channels, task.classes))


NONE, BATCH, LAYER, INSTANCE, GROUP, RMS = "none", "batch", "layer", "instance", "group", "RMS"
NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    BATCH: nn.BatchNorm2d,
    LAYER: partial(nn.GroupNorm, 1),
    INSTANCE: partial(nn.InstanceNorm2d, affine=True),
    GROUP: partial(nn.GroupNorm, 4),
    NONE: None,
}
SGD = partial(torch.optim.SGD, momentum=0.9, fused=True)
ADAM = partial(torch.optim.Adam, fused=True)
BASELINE = Recipe(
    model=conv_net, optimizer=partial(SGD, lr=0.03), epochs=10, batch_size=32, examples=128, evaluations=1
)
# On every data set but the digits: so many times as many training images and epochs, and the seeds of a run. At 1 and 1
# nothing but the data differs; set them higher if you have the time, or a GPU.
LARGER = Larger(examples=1, epochs=1, seeds=10)
GRID = (0.01, 0.03, 0.1)
BA, ULYANOV, WU, ZHANG = "Ba et al. 2016", "Ulyanov et al. 2016", "Wu & He 2018", "Zhang & Sennrich 2019"
GUIDE, ADVICE = "study guide", "common advice"


def at_rate(recipe: Recipe, rate: float, optimizer: Callable[..., torch.optim.Optimizer] = SGD) -> Recipe:
    """The recipe with another learning rate."""
    return replace(recipe, optimizer=partial(optimizer, lr=rate))


def at_best_rate(
    lab: Lab, arms: dict[str, Recipe], rates: Sequence[float] = GRID, optimizer: Callable[..., Any] = SGD
) -> dict[str, Recipe]:
    """Each arm at the learning rate that is best for it on validation; prints the grid."""
    grids = {arm: {rate: at_rate(recipe, rate, optimizer) for rate in rates} for arm, recipe in arms.items()}
    tuning = lab.tune("Learning rate", grids, count=2)
    return {arm: grids[arm][tuning.best(arm)] for arm in arms}


# %% [markdown]
# ## 1. Five norms, one function
#
# First ours beside PyTorch's. Then a picture that is measured, not drawn: we change one number of a batch (framed: in
# the first image, first channel) and see which outputs change. Those are the numbers that are normalised together.
# Last the defaults, read from PyTorch as it is installed, so that the table cannot go stale.

# %%
IMAGES = (4, 8, 6, 6)  # of the mechanism: N, C, H, W
OURS: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
    "batch": (batch_norm, nn.BatchNorm2d(8)),
    "layer": (layer_norm, nn.LayerNorm(IMAGES[1:])),
    "instance": (instance_norm, nn.InstanceNorm2d(8)),
    "group (4)": (partial(group_norm, groups=4), nn.GroupNorm(4, 8)),
    "RMS": (rms_norm, nn.RMSNorm(IMAGES[1:], eps=1e-5)),
}


def against_torch(name: str) -> list[str]:
    """A row of the table: the largest difference between our norm and PyTorch's, in output and in gradient."""
    draw = torch.Generator().manual_seed(0)
    x, weights = (3 * torch.randn(IMAGES, generator=draw) + 1 for _ in range(2))
    seen = []
    for norm in OURS[name]:
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (weights * out).sum().backward()
        seen.append((out.detach(), inputs.grad))
    return [name, *(f"{float((a - b).abs().max()):.0e}" for a, b in zip(*seen, strict=True))]


def touched(norm: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Which outputs change when the first number of the first image and channel does: their share, (N, C)."""
    x = torch.randn(IMAGES, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    return (norm(x) != norm(changed)).float().mean((2, 3)).numpy()


def defaults(name: str, layer: nn.Module) -> list[str]:
    """A row of the table: what PyTorch's layer has by default."""
    cells = [str(getattr(layer, key, "–")) for key in ("momentum", "eps")]
    affine = getattr(layer, "affine", getattr(layer, "elementwise_affine", "–"))
    running = getattr(layer, "track_running_stats", "–")
    return [name, *cells, str(affine), str(running), str(sum(p.numel() for p in layer.parameters()))]


def mechanism(lab: Lab) -> None:
    """How do five norms differ, if one function of axes does them all?"""
    rows = [against_torch(name) for name in OURS]
    lab.table(Table("The largest difference, ours − PyTorch's", ["norm", "output", "gradient"], rows))
    layers = {
        "BatchNorm2d(16)": nn.BatchNorm2d(16),
        "LayerNorm((16, 8, 8))": nn.LayerNorm((16, 8, 8)),
        "InstanceNorm2d(16)": nn.InstanceNorm2d(16),
        "GroupNorm(4, 16)": nn.GroupNorm(4, 16),
        "RMSNorm((16, 8, 8))": nn.RMSNorm((16, 8, 8)),
    }
    heads = ["layer", "momentum", "eps", "affine", "running\nstatistics", "parameters"]
    lab.table(Table(f"Defaults in PyTorch {torch.__version__}", heads, [defaults(*each) for each in layers.items()]))

    figure, axes = new_figure("Which numbers are normalised together?", 5)
    for ax, (name, (norm, _)) in zip(axes, OURS.items(), strict=True):
        share = touched(norm)
        ax.pcolormesh(share, cmap="Blues", vmin=-0.15, vmax=1.6, edgecolors="white", linewidth=1.5)
        ax.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2.5))
        ax.invert_yaxis()
        ax.set(title=name, xlabel="channel", xticks=[], yticks=[])
        ax.grid(False)
        lab.finding(
            f"{name}: one number changes the outputs of {(share > 0).sum()} of {share.size} channels in the batch."
        )
    axes[0].set_ylabel("image in the batch")
    lab.figure("mechanism", figure)


# %% [markdown]
# ## 2. Batch size
#
# Wu and He's figure, at home: test error against batch size for five networks. They trained a ResNet-50 on ImageNet,
# and batch norm at batch size 2 lost 10.6 points to group norm. Every size gets 32 steps over the same 64 digits; small
# batches are noisy for any network, so *none* is the control. Every norm at every size has its own rate.
#
# How many numbers go into one of batch norm's means? In a convolutional network, N images times H × W pixels; in a
# network of vectors only N. So sizes 2, 8 and 64 once more, for a network of two hidden layers without pixels.

# %%
STEPS = 32
RATES = {  # by batch size
    2: (0.001, 0.003, 0.01, 0.03),
    4: (0.003, 0.01, 0.03),
    8: (0.01, 0.03, 0.1),
    16: (0.01, 0.03, 0.1),
    32: (0.01, 0.03, 0.1, 0.3),
    64: (0.01, 0.03, 0.1, 0.3),
}
SIZES, VECTOR_SIZES = tuple(RATES), (2, 8, 64)
VECTOR_NORMS = {BATCH: nn.BatchNorm1d, LAYER: nn.LayerNorm, NONE: None}


def vector_net(task: Task, norm: Callable[[int], nn.Module] | None = None, width: int = 64) -> nn.Module:
    """Two hidden blocks Linear → norm → ReLU: (N, C, H, W) to logits (N, classes)."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = prod(task.shape)
    for _ in range(2):
        layers += [nn.Linear(inputs, width), *([norm(width)] if norm else []), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, task.classes))


def at_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with batches of `size`, and STEPS of them."""
    return replace(recipe, batch_size=size, examples=64, epochs=STEPS * size // 64)


def error(runs: Comparison, arm: str) -> Estimate:
    """Test error of the arm in %."""
    return estimate(100 - 100 * runs.values("test_accuracy", arm))


def batch_size(lab: Lab) -> None:
    """Does batch norm fail with small batches, and do its relatives not?"""
    nets = {name: (partial(conv_net, norm=norm), SIZES) for name, norm in NORMS.items()}
    nets |= {f"{n} (vectors)": (partial(vector_net, norm=norm), VECTOR_SIZES) for n, norm in VECTOR_NORMS.items()}
    grids = {}
    for name, (model, sizes) in nets.items():
        for size in sizes:
            recipe = at_size(replace(BASELINE, model=model), size)
            grids[f"{name} {size}"] = {rate: at_rate(recipe, rate) for rate in RATES[size]}
    tuning = lab.tune("Learning rate", grids, count=2)
    by_size = sorted(grids, key=lambda arm: ("vectors" in arm, int(arm.split()[-1])))
    arms = {arm: grids[arm][tuning.best(arm)] for arm in by_size}
    runs = lab.compare(arms, {arm: " ".join([BATCH, *arm.split()[1:]]) for arm in arms})
    errors = {arm: error(runs, arm) for arm in arms}
    rows = [
        [name, *(number(errors[arm].mean, 1) if (arm := f"{name} {size}") in arms else "" for size in SIZES)]
        for name in nets
    ]
    lab.table(Table("Test error (%) by batch size", ["norm", *map(str, SIZES)], rows))

    figure, axes = new_figure("Does batch norm fail with small batches?", 2)
    for name, colour in colours(list(NORMS), BATCH).items():
        plot_estimates(axes[0], SIZES, [errors[f"{name} {size}"] for size in SIZES], name, colour)
        if name in VECTOR_NORMS:
            plot_estimates(
                axes[1], VECTOR_SIZES, [errors[f"{name} (vectors) {size}"] for size in VECTOR_SIZES], name, colour
            )
    for ax, kind in zip(axes, ("convolutions", "vectors"), strict=True):
        log_ticks(ax, SIZES)
        ax.set(xlabel=f"batch size ({kind})", ylabel="test error (%)", ylim=(0, 92))
    shared_legend(figure, axes[0], 5)
    lab.figure("batch_size", figure)

    def suffers(kind: str) -> Estimate:
        """What batches of 2 cost batch norm in accuracy, beyond what they cost a network without norm."""
        lost = {
            name: runs.values("test_accuracy", f"{name}{kind} 64") - runs.values("test_accuracy", f"{name}{kind} 2")
            for name in (BATCH, NONE)
        }
        return points(paired_difference(lost[BATCH], lost[NONE]))

    for kind, words in (("", "convolutions"), (" (vectors)", "vectors")):
        lab.finding(
            f"{words}, batches of 2 instead of 64: batch norm loses {interval(suffers(kind))} points more than none."
        )
        lab.claim(
            f"Batch norm fails with small batches: 2 cost more than without ({words})", GUIDE, suffers(kind), above(0.5)
        )
        gain = runs.gain(f"{LAYER}{kind} 2", f"{BATCH}{kind} 2")
        lab.claim(f"Batches of 2: layer norm beats batch norm ({words})", BA, gain, above(0.5))
    lab.claim(
        "Group norm for small batches: beats batch norm (2, convolutions)", WU, runs.gain(f"{GROUP} 2"), above(0.5)
    )
    lab.claim(
        "Group norm for small batches: beats batch norm (4, convolutions)", WU, runs.gain(f"{GROUP} 4"), above(0.5)
    )
    for name in (LAYER, INSTANCE, GROUP):
        gain = runs.gain(f"{BATCH} 64", f"{name} 64")
        lab.claim(f"Batch norm is best for images in large batches: beats {name} (64)", GUIDE, gain, above(0.5))
    lab.claim(
        "Any norm beats none (convolutions, 64): group", ADVICE, runs.gain(f"{GROUP} 64", f"{NONE} 64"), above(0.5)
    )


# %% [markdown]
# ## 3. Groups
#
# Group norm has a number to choose: from one group, which is layer norm on images, to as many as there are channels,
# which is instance norm (a test of this project shows both equalities). All share the rate that is best for 4 groups.

# %%
GROUPS = (1, 2, 4, 8, 16)


def groups(lab: Lab) -> None:
    """Does the number of groups matter, and is the best one in the middle?"""
    grouped = {n: replace(BASELINE, model=partial(conv_net, norm=partial(nn.GroupNorm, n))) for n in GROUPS}
    optimizer = at_best_rate(lab, {"groups: 4": grouped[4]})["groups: 4"].optimizer
    arms = {f"groups: {n}": replace(recipe, optimizer=optimizer, evaluations=2) for n, recipe in grouped.items()}
    runs = lab.compare(arms, "groups: 4")
    figure, axes = new_figure("How many groups?")
    plot_estimates(
        axes[0], GROUPS, [points(runs.estimate("test_accuracy", arm)) for arm in arms], "group norm", COLOURS[0]
    )
    log_ticks(axes[0], GROUPS)
    axes[0].set(xlabel="groups of the 16 channels (1: layer norm, 16: instance norm)", ylabel="test accuracy (%)")
    lab.figure("groups", figure)
    names = list(arms)
    best, worst = runs.best(names), min(names, key=lambda arm: runs.estimate("validation_accuracy", arm).mean)
    spread = runs.gain(best, worst)
    lab.finding(f"On validation {best} is best and {worst} worst; on the test set {interval(spread)} points apart.")
    lab.claim("Group norm, one more hyperparameter: best and worst half a point apart", GUIDE, spread, above(0.5))
    middle, end = runs.best(names[1:-1]), runs.best([names[0], names[-1]])
    lab.claim("Group norm, the middle ground: beats both ends", GUIDE, runs.gain(middle, end), above(0))


# %% [markdown]
# ## 4. Contrast and style
#
# The test images are changed, each in its own way, while the network has only seen them as they are: brighter or
# darker, with more or less contrast, with a ramp of light in the background. A norm that looks at one image at a time
# can take such a change out; batch norm, in eval mode, divides by what it has seen in training.
#
# What can be taken out can also be lost. In a second task the label *is* the contrast: every image is multiplied by one
# of ten factors, and the network must say by which, at the rate chosen for the digits. No table of losses there: those
# would be about the digits.

# %%
WEAKEST, STRONGER, FACTORS = 0.4, 1.4, 10  # contrast times 0.4, 0.4 × 1.4, 0.4 × 1.4², …


def changes(x: Tensor) -> dict[str, Tensor]:
    """The images (N, C, H, W) as they are and changed in three ways, by an amount of its own for each image."""
    draw = torch.Generator().manual_seed(0)
    brightness, contrast, turn = (torch.rand(len(x), 1, 1, 1, generator=draw).to(x.device) for _ in range(3))
    mean = x.mean((1, 2, 3), keepdim=True)
    down, right = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:])
    angle = 2 * pi * turn
    ramp = angle.sin() * down[:, None] + angle.cos() * right
    return {
        "as it is": x,
        "brightness": x + 4 * brightness - 2,
        "contrast": mean + (x - mean) * 4 ** (2 * contrast - 1),
        "background": x + 1.5 * ramp,
    }


def under_changes(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test accuracy under each of the changes."""
    changed = changes(split.test.x)
    return {"changed": [evaluate(model, split.test._replace(x=x))[1] for x in changed.values()]}


def multiplied(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each image times a factor drawn at random, and which of the FACTORS it was, (N,)."""
    label = torch.randint(FACTORS, (len(x),), device=x.device)
    return x * (WEAKEST * STRONGER**label)[:, None, None, None], label


def contrast_net(task: Task, norm: Callable[[int], nn.Module] | None) -> nn.Module:
    """`conv_net` with a logit for each factor, however few the classes."""
    return conv_net(task._replace(classes=max(task.classes, FACTORS)), norm)


def contrast_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the task whose label is the contrast; the digit's own label y is not used."""
    changed, label = multiplied(x)
    return F.cross_entropy(model(changed), label)


@torch.no_grad()
def contrast_accuracy(model: nn.Module, split: Split) -> dict[str, float]:
    """Accuracy on the test images of the task whose label is the contrast."""
    torch.manual_seed(0)
    changed, label = multiplied(split.test.x)
    return {"contrast": float((model.eval()(changed).argmax(1) == label).float().mean())}


def style(lab: Lab) -> None:
    """Which norm keeps its accuracy when the light changes, and what does it throw away for that?"""
    nets = {name: replace(BASELINE, model=partial(conv_net, norm=norm)) for name, norm in NORMS.items()}
    best = at_best_rate(lab, nets)
    runs = lab.compare(best, BATCH, under_changes)
    told = lab.train(
        lab.sized(
            {
                name: replace(recipe, model=partial(contrast_net, norm=NORMS[name]), loss=contrast_loss)
                for name, recipe in best.items()
            }
        ),
        BATCH,
        lab.settings.seeds,
        contrast_accuracy,
    )
    kinds = ["as it is", "brightness", "contrast", "background"]
    accuracy = {name: runs.notes("changed", name) for name in nets}
    contrast = {name: told.notes("contrast", name) for name in nets}
    rows = [
        [name, *(number(100 * each.mean, 1) for each in [*estimates(accuracy[name]), estimate(contrast[name])])]
        for name in nets
    ]
    lab.table(
        Table("Test accuracy (%), images changed; contrast as the label", ["norm", *kinds, "label:\ncontrast"], rows)
    )

    figure, axes = new_figure("Which norm keeps its accuracy when the light changes?", 2)
    shift = dict(zip(nets, np.linspace(-0.24, 0.24, len(nets)), strict=True))
    for name, colour in colours(list(nets), BATCH).items():
        dots = [points(each) for each in estimates(accuracy[name])]
        bars = [[dot.mean - dot.low for dot in dots], [dot.high - dot.mean for dot in dots]]
        places = np.arange(len(kinds)) + shift[name]
        axes[0].errorbar(places, [dot.mean for dot in dots], bars, fmt="o", color=colour, capsize=3, label=name)
    axes[0].set_xticks(range(len(kinds)), kinds)
    axes[0].set(xlabel="test images", ylabel="test accuracy (%)")
    plot_dots(axes[1], {name: points(estimate(contrast[name])) for name in nets}, BLACK)
    axes[1].axvline(100 / FACTORS, color="grey", linewidth=1, linestyle=":")
    axes[1].set(xlabel="accuracy when the label is the contrast (%, dotted: chance)", xlim=(0, 102))
    shared_legend(figure, axes[0], 5)
    lab.figure("style", figure)

    for i, kind in enumerate(kinds[1:], start=1):
        kept = max(nets, key=lambda name: accuracy[name][:, i].mean())
        lab.finding(f"{kind} changed: {kept} is the most accurate, {100 * accuracy[kept][:, i].mean():.1f} %.")
    lost = {name: points(paired_difference(accuracy[name][:, 2], accuracy[name][:, 0])) for name in nets}
    lab.claim("Instance norm removes an image's contrast: nothing lost", ULYANOV, lost[INSTANCE], above(-1))
    lab.claim("Batch norm loses accuracy when contrast changes", ADVICE, lost[BATCH], below(-0.5))
    for i, kind in ((2, "contrast"), (3, "background")):
        gain = points(paired_difference(accuracy[INSTANCE][:, i], accuracy[BATCH][:, i]))
        lab.claim(f"Instance norm for style: beats batch norm ({kind} changed)", GUIDE, gain, above(0.5))
    left = points(estimate(contrast[INSTANCE] - 1 / FACTORS))
    lab.claim("Instance norm throws contrast away: left at chance", ULYANOV, left, within(2))
    for name in (INSTANCE, LAYER):
        thrown = points(paired_difference(contrast[name], contrast[BATCH]))
        lab.claim(
            f"{name.capitalize()} norm throws contrast away: learns it less than batch norm", ADVICE, thrown, below(-5)
        )


# %% [markdown]
# ## 5. Sequences
#
# The digits as eight rows in time: for a recurrent network with a norm in its step, and for a transformer with one
# pre-norm block. Layer norm and RMS norm look at one time step of one sequence; batch norm takes its statistics over
# all sequences and all times. Adam here, and a grid of rates for each. RMS norm leaves out the mean; is it missed?


# %%
class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch norm of sequences (N, T, F), each feature over all sequences and times; if `masked`, in training over those
    times only that a `mask` (N, T) marks as real.
    """

    def __init__(self, features: int, masked: bool = False) -> None:
        super().__init__(features)
        self.masked = masked

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.masked or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        real = mask[..., None].to(x.dtype)
        n = real.sum()
        mean = (real * x).sum((0, 1)) / n
        var = (real * (x - mean).square()).sum((0, 1)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return self.weight * (x - mean) / (var + self.eps).sqrt() + self.bias


class Pointwise(nn.Module):
    """A norm that looks at one time step only, with the interface of `SequenceBatchNorm`: it ignores the mask."""

    def __init__(self, norm: Callable[[int], nn.Module], features: int) -> None:
        super().__init__()
        self.norm = norm(features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(x)


SEQUENCE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    LAYER: partial(Pointwise, nn.LayerNorm),
    RMS: partial(Pointwise, nn.RMSNorm),
    BATCH: SequenceBatchNorm,
    NONE: partial(Pointwise, nn.Identity),
}


class Recurrent(nn.Module):
    """h = tanh(norm(W x + U h)) over the rows of an image from top to bottom, then a linear layer on the last h."""

    def __init__(self, task: Task, norm: Callable[[int], nn.Module], width: int = 64) -> None:
        super().__init__()
        self.input = nn.Linear(task.shape[0] * task.shape[2], width)
        self.hidden = nn.Linear(width, width, bias=False)
        self.norm, self.head = norm(width), nn.Linear(width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.input(x.transpose(1, 2).flatten(2))
        h = torch.zeros_like(rows[:, 0])
        for t in range(rows.shape[1]):
            h = self.norm((rows[:, t] + self.hidden(h))[:, None])[:, 0].tanh()
        return self.head(h)


class Transformer(nn.Module):
    """One pre-norm block, attention and MLP, over the rows of an image as tokens; rows of zeros are padding."""

    def __init__(self, task: Task, norm: Callable[[int], nn.Module], width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(task.shape[0] * task.shape[2], width)
        self.place = nn.Parameter(0.1 * torch.randn(task.shape[1], width))
        self.heads = heads
        self.before_attention, self.before_mlp, self.last = norm(width), norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, task.classes)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)
        mask = rows.ne(0).any(2)
        x = self.embed(rows) + self.place
        x = x + self.attend(self.before_attention(x, mask), mask)
        x = x + self.mlp(self.before_mlp(x, mask))
        real = mask[..., None].to(x.dtype)
        return self.head((self.last(x, mask) * real).sum(1) / real.sum(1))


ROWS = replace(BASELINE, optimizer=partial(ADAM, lr=0.01), epochs=5, batch_size=50, examples=400)


def sequences(lab: Lab) -> None:
    """Which norm for a recurrent network, and which for a transformer?"""
    nets = {"RNN": Recurrent, "transformer": Transformer}
    grid = {
        f"{net}, {name}": replace(ROWS, model=partial(build, norm=norm))
        for net, build in nets.items()
        for name, norm in SEQUENCE_NORMS.items()
    }
    best = at_best_rate(lab, grid, (0.003, 0.01, 0.03), ADAM)
    runs = lab.compare(best, {arm: f"{arm.split(',')[0]}, {LAYER}" for arm in best})
    figure, axes = new_figure("Which norm for sequences?", 2)
    for ax, net in zip(axes, nets, strict=True):
        dots = {name: points(runs.estimate("test_accuracy", f"{net}, {name}")) for name in SEQUENCE_NORMS}
        plot_dots(ax, dots, BLACK)
        ax.set(xlabel=f"test accuracy (%) of the {net}")
    lab.figure("sequences", figure)
    for net in nets:
        layer = f"{net}, {LAYER}"
        order = sorted(SEQUENCE_NORMS, key=lambda name: -runs.estimate("validation_accuracy", f"{net}, {name}").mean)
        lab.finding(f"{net}, by validation accuracy: {' > '.join(order)}.")
        lab.claim(
            f"Layer norm for sequences: beats none ({net})", GUIDE, runs.gain(layer, f"{net}, {NONE}"), above(0.5)
        )
        lab.claim(
            f"Layer norm for sequences: beats batch norm ({net})",
            GUIDE,
            runs.gain(layer, f"{net}, {BATCH}"),
            above(0.5),
        )
        lab.claim(f"RMS norm is as good as layer norm ({net})", ZHANG, runs.gain(f"{net}, {RMS}"), within(1))


# %% [markdown]
# ## 6. Padding
#
# Sequences of unequal length are filled up with zeros to make a batch. Here training images keep their first 2 to 8
# rows and the rest is padding; the network is tested on images of 2, 4, 6 and 8 rows. Attention and the average at the
# end leave the padding out. Batch norm does not, unless it is told to: its mean and variance are then over the padding
# as well, and depend on how much of it there is. Two ways to make batches: *mixed*, every batch with all lengths, so
# that the share of padding is always about the same; and *sorted*, one length per batch, so that it is not. Layer norm
# never looks at the padding. The transformer again, one shared rate.
#
# Then the same hundred full-length test images twice in training mode: with full-length neighbours in the batch, and
# with neighbours of two rows. What comes out for an image should not depend on who else is there.

# %%
SHORTEST = 2


def cut(x: Tensor, lengths: Tensor) -> Tensor:
    """Images (N, C, H, W) with all rows after the first `lengths` (N,) set to zero."""
    rows = torch.arange(x.shape[2], device=x.device)
    return x * (rows < lengths[:, None])[:, None, :, None]


def cut_loss(model: nn.Module, x: Tensor, y: Tensor, mixed: bool) -> Tensor:
    """Cross-entropy on images cut to random lengths, one for each image (mixed) or one for the whole batch."""
    lengths = torch.randint(SHORTEST, x.shape[2] + 1, (len(x) if mixed else 1,), device=x.device)
    return F.cross_entropy(model(cut(x, lengths.expand(len(x)))), y)


def by_length(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test accuracy for images cut to 2, 4, 6, 8 rows; and for 100 full ones in training mode, by their neighbours."""
    x = split.test.x
    lengths = range(SHORTEST, x.shape[2] + 1, 2)
    tests = [split.test._replace(x=cut(x, torch.full((len(x),), n, device=x.device))) for n in lengths]
    accuracies = [evaluate(model, test)[1] for test in tests]
    neighbours = []
    for shortest in (x.shape[2], SHORTEST):
        kept = torch.where(torch.arange(len(x), device=x.device) < 100, x.shape[2], shortest)
        with torch.no_grad():
            right = deepcopy(model).train()(cut(x, kept)).argmax(1) == split.test.y
        neighbours.append(float(right[:100].float().mean()))
    return {"by length": accuracies, "neighbours": neighbours}


def padding(lab: Lab) -> None:
    """What does padding do to batch statistics?"""
    told, blind = "BN, told", "BN, blind"
    norms = {told: partial(SequenceBatchNorm, masked=True), blind: SequenceBatchNorm, LAYER: SEQUENCE_NORMS[LAYER]}
    arms = {
        f"{way}, {name}": replace(
            ROWS, model=partial(Transformer, norm=norm), loss=partial(cut_loss, mixed=way == "mixed")
        )
        for way in ("mixed", "sorted")
        for name, norm in norms.items()
    }
    runs = lab.compare(arms, {arm: f"{arm.split(',')[0]}, {told}" for arm in arms}, by_length)
    accuracy = {arm: 100 * runs.notes("by length", arm) for arm in arms}
    lengths = [SHORTEST + 2 * i for i in range(accuracy[f"mixed, {told}"].shape[1])]
    rows = [[arm, *(number(each.mean, 1) for each in estimates(accuracy[arm]))] for arm in arms]
    lab.table(Table("Test accuracy (%) by rows kept", ["batches, norm", *map(str, lengths)], rows))
    company = {arm: 100 * runs.notes("neighbours", arm) for arm in arms}
    rows = [[arm, *(number(each.mean, 1) for each in estimates(company[arm]))] for arm in arms]
    title = "Accuracy (%) for 100 full images in training mode, by their neighbours"
    lab.table(Table(title, ["batches, norm", "full length", f"{SHORTEST} rows"], rows))
    figure, axes = new_figure("What does padding do to batch statistics?", 2)
    for ax, way in zip(axes, ("mixed", "sorted"), strict=True):
        for name, colour in colours(list(norms), told).items():
            plot_estimates(ax, lengths, estimates(accuracy[f"{way}, {name}"]), name, colour)
        ax.set(xlabel=f"rows kept of a test image ({way} batches)", ylabel="test accuracy (%)", ylim=(20, 95))
    shared_legend(figure, axes[0])
    lab.figure("padding", figure)
    overall = {arm: accuracy[arm].mean(1) for arm in arms}
    for way in ("mixed", "sorted"):
        means = ", ".join(f"{name} {estimate(overall[f'{way}, {name}']).mean:.1f} %" for name in norms)
        lab.finding(f"{way} batches, mean over the lengths: {means}.")
        spoiled = paired_difference(overall[f"{way}, {blind}"], overall[f"{way}, {told}"])
        lab.claim(f"Padding spoils batch statistics ({way} batches)", ADVICE, spoiled, below(-0.5))
        gain = paired_difference(overall[f"{way}, {LAYER}"], overall[f"{way}, {blind}"])
        lab.claim(f"Unequal lengths: layer norm beats batch norm ({way} batches)", GUIDE, gain, above(0.5))
    for name in norms:
        lost = estimate(company[f"sorted, {name}"][:, 1] - company[f"sorted, {name}"][:, 0])
        statement = f"In training mode the neighbours' padding costs an image accuracy (sorted; {name})"
        lab.claim(statement, ADVICE, lost, below(-0.5))


# %% [markdown]
# ## 7. The knobs
#
# `affine`: the learned gain and shift. `momentum`: how fast the running statistics follow, in batches of 8. `eps`: what
# is added to the variance; it is there for constant features. A pixel that is blank in all training images has variance
# zero and is divided by √eps, and the first image that has ink there gets a value hundreds of times larger than any
# other. That needs batch norm at the input of a network of vectors, few images (50 here), and running statistics that
# have forgotten that they start at variance 1: after 48 steps momentum 0.5 has, 0.1 would take some hundred steps.
# Shared rates.

# %%
EPS, MOMENTA = (1e-5, 1e-8, 1e-3, 0.1), (0.1, 0.01, 0.5)


class InputNorm(nn.Module):
    """A network of vectors whose first layer is batch norm of the pixels, with this eps."""

    def __init__(self, task: Task, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(prod(task.shape), eps=eps, momentum=0.5)
        self.rest = vector_net(task)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(x.flatten(1)))


@torch.no_grad()
def largest_input(model: nn.Module, split: Split) -> dict[str, float]:
    """The largest value behind the norm at the input, on training and on test images."""
    if not isinstance(model, InputNorm):
        return {}
    sizes = [float(model.norm.eval()(part.x.flatten(1)).abs().max()) for part in (split.train, split.test)]
    return {"largest, train": sizes[0], "largest, test": sizes[1]}


def knobs(lab: Lab) -> None:
    """What do affine, momentum and eps do?"""
    pixels = replace(BASELINE, batch_size=25, examples=50, epochs=24)
    small = replace(BASELINE, batch_size=8, examples=96, epochs=4)
    arms = {"affine on": replace(BASELINE, model=partial(conv_net, norm=nn.BatchNorm2d))}
    arms["affine off"] = replace(BASELINE, model=partial(conv_net, norm=partial(nn.BatchNorm2d, affine=False)))
    for value in MOMENTA:
        norm = partial(nn.BatchNorm2d, momentum=value)
        arms[f"momentum {value:g}"] = replace(small, model=partial(conv_net, norm=norm))
    for value in EPS:
        arms[f"eps {value:g}"] = replace(pixels, model=partial(InputNorm, eps=value))
    first = {"affine": "affine on", "momentum": f"momentum {MOMENTA[0]:g}", "eps": f"eps {EPS[0]:g}"}
    runs = lab.compare(arms, {arm: first[arm.split()[0]] for arm in arms}, largest_input)
    rows = []
    for value in EPS:
        largest = [estimate(runs.notes(f"largest, {part}", f"eps {value:g}")).mean for part in ("train", "test")]
        rows.append([f"eps {value:g}", *(number(each, 1) for each in largest)])
    lab.table(Table("Largest value behind batch norm of the pixels", ["", "training images", "test images"], rows))
    figure, axes = new_figure("What do the knobs of batch norm do?")
    plot_dots(axes[0], {arm: points(runs.estimate("test_accuracy", arm)) for arm in arms}, BLACK)
    axes[0].set(xlabel="test accuracy (%)")
    lab.figure("knobs", figure)
    worst = estimate(runs.notes("largest, test", "eps 1e-05")).mean
    lab.finding(f"With eps 1e-05 the largest test input is {worst:.0f} deviations of the training set.")
    lab.claim("The learned gain and shift pay (affine)", GUIDE, runs.gain("affine on", "affine off"), above(0.5))
    lab.claim("Momentum 0.01 is too slow (48 steps)", ADVICE, runs.gain("momentum 0.01"), below(-0.5))
    lab.claim("Momentum 0.5 is too jumpy (batches of 8)", ADVICE, runs.gain("momentum 0.5"), below(-0.5))
    lab.claim("eps is a detail: 0.1 does as well as 1e-5 (blank pixels)", GUIDE, runs.gain("eps 0.1"), within(1))
    blown_up = runs.difference("test_loss", "eps 1e-08")
    lab.claim("Too small an eps blows up the test loss: 1e-8 (blank pixels)", ADVICE, blown_up, above(0), "nats")


# %% [markdown]
# ## 8. Cost
#
# Milliseconds for a forward and a backward pass of the layer alone, on 64 feature maps of 16 × 16 for 32 images, as
# often as there are seeds, the norms in turn, each time the median of several. Timings differ from machine to machine,
# and the rest of a network costs more than its norms.

# %%
COSTED = {
    BATCH: nn.BatchNorm2d(64),
    LAYER: nn.LayerNorm((64, 16, 16)),
    "layer, as one group": nn.GroupNorm(1, 64),
    INSTANCE: nn.InstanceNorm2d(64, affine=True),
    GROUP: nn.GroupNorm(4, 64),
    RMS: nn.RMSNorm((64, 16, 16)),
}


def milliseconds(layer: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """Median time of a forward and of a backward pass, in ms."""
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        out = layer(x)
        wait_for(x)
        middle = time.perf_counter()
        out.backward(x)
        wait_for(x)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return 1000 * float(np.median(forward)), 1000 * float(np.median(backward))


def wait_for(x: Tensor) -> None:
    """On a GPU, wait until the work that was asked for is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def cost(lab: Lab) -> None:
    """What does each norm cost in time and in parameters?"""
    device = lab.settings.device
    x = torch.randn(32, 64, 16, 16, device=device, requires_grad=True)
    layers = {name: layer.to(device) for name, layer in COSTED.items()}
    repeats = 2 if lab.quick else 8
    times = {name: [] for name in layers}
    for _ in range(len(lab.settings.seeds) + 1):
        for name, layer in layers.items():
            times[name].append(milliseconds(layer, x, repeats))
    total = {name: np.array(times[name])[1:].sum(1) for name in layers}  # the first round warms up
    rows = []
    for name, layer in layers.items():
        forward, backward = np.array(times[name])[1:].mean(0)
        ratio = estimate(total[name] / total[BATCH]).mean
        count = sum(p.numel() for p in layer.parameters())
        rows.append([name, number(forward, 2), number(backward, 2), number(ratio, 2), str(count)])
    heads = ["norm", "forward\nms", "backward\nms", "total over\nbatch's", "parameters"]
    lab.table(Table(f"Cost on {device}, {torch.get_num_threads()} thread(s)", heads, rows))
    figure, axes = new_figure("What does each norm cost?")
    plot_dots(axes[0], {name: estimate(total[name] / total[BATCH]) for name in layers}, BLACK)
    axes[0].set(xlabel="time forward and backward, batch norm = 1", xlim=(0, None))
    lab.figure("cost", figure)
    cheapest = min(layers, key=lambda name: total[name].mean())
    lab.finding(f"Cheapest here: {cheapest}.")
    slower = estimate(total[LAYER] / total[BATCH])
    lab.claim("Layer norm is slightly slower: by 0 to 50 % (PyTorch's, here)", GUIDE, slower, Range(1, 1.5), "times")
    cheaper = estimate(total[RMS] / total[LAYER])
    lab.claim("RMS norm is cheaper than layer norm (PyTorch's, here)", ZHANG, cheaper, below(1), "times")


# %% [markdown]
# ## 9. Which one?
#
# The table that everybody repeats, row by row: how many of the claims above, made for each piece of advice, hold here.

# %%
ADVICES = {  # what is said of each norm, and how the claims about it begin
    "batch norm: for images, large batches": "Batch norm is best",
    "batch norm: fails with small batches": "Batch norm fails",
    "layer norm: for sequences": "Layer norm for sequences",
    "layer norm: unequal lengths": "Unequal lengths",
    "layer norm: slightly slower": "Layer norm is slightly slower",
    "instance norm: for style": "Instance norm for style",
    "instance norm: takes contrast out": "Instance norm removes",
    "group norm: for small batches": "Group norm for small",
    "group norm: a middle ground": "Group norm, the middle",
    "group norm: one more hyperparameter": "Group norm, one more",
    "RMS norm: as good as layer norm": "RMS norm is as good",
    "RMS norm: cheaper": "RMS norm is cheaper",
}


def which_one(lab: Lab) -> None:
    """Which norm should you use, as far as these runs tell?"""
    verdicts = {
        advice: [claim["verdict"] for claim in lab.record["claims"] if claim["statement"].startswith(words)]
        for advice, words in ADVICES.items()
    }
    kinds = [HOLDS, FAILS, UNCLEAR]
    counts = np.array([[each.count(kind) for kind in kinds] for each in verdicts.values()])
    rows = [[advice, *map(str, row)] for advice, row in zip(ADVICES, counts, strict=True)]
    lab.table(Table("What is said, and how many of its claims hold", ["advice", *kinds], rows))
    figure, axes = new_figure("How much of what is said of each norm holds here?")
    left = np.zeros(len(ADVICES))
    for count, kind, colour in zip(counts.T, kinds, (COLOURS[2], COLOURS[1], COLOURS[7]), strict=True):
        axes[0].barh(list(ADVICES), count, left=left, color=colour, label=kind)
        left += count
    axes[0].invert_yaxis()
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="claims")
    shared_legend(figure, axes[0])
    lab.figure("which_one", figure)
    sums = counts.sum(1)
    if not counts.any():
        lab.finding("Nothing has been judged yet: run the whole lesson, without --quick.")
    for words, column in (("Every claim holds", 0), ("No claim holds, all are refuted", 1)):
        named = [advice for advice, row, total in zip(ADVICES, counts, sums, strict=True) if 0 < total == row[column]]
        lab.finding(f"{words}: {'; '.join(named) or 'of none'}.")


# %% [markdown]
# ## What we saw, where it fails
#
# The run ends with a list of all claims by verdict, each with the effect that decided it. It is computed, not written:
# change a setting, run again, and read whether it still says the same.
#
# ## Exercises
#
# Each is one changed line; the answers, each from a run, are in `exercises/17_batch_normalization_detailed.md`.
#
# 1. Fewer pixels to average over: `for stride in (4, 1):` in `conv_net`, then `--only batch_size`. What does batch norm
#    lose with batches of 2 now?
# 2. In `InputNorm`, leave out `momentum=0.5`, then `--only knobs`. Where has the effect of eps gone, and is all well?
# 3. Train the sequences four times as long (`epochs=20` in `ROWS`), then `--only sequences`. Does layer norm catch up?
# 4. Make the contrast harder to see, `WEAKEST, STRONGER, FACTORS = 1.0, 1.1, 10`, then `--only style`. Who still can?

# %%
EXPERIMENTS = [mechanism, batch_size, groups, style, sequences, padding, knobs, cost, which_one]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the lesson; in a notebook, `main(["--quick"])` is a smoke run."""
    run_lesson(LESSON, TITLE, EXPERIMENTS, LARGER, arguments)


if __name__ == "__main__":
    main()
