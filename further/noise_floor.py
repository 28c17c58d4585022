# %% [markdown]
# # Further: The noise floor
#
# **The question.** At a constant learning rate the loss falls, and then gets stuck. Where, and what
# does a smaller rate change? Each step goes a little wrong by the noise of its batch. The loss
# stays where the pull to the minimum and the noise balance: higher up, the larger the rate.
#
# **Time**: 12 minutes of reading (653 words at 200 a minute, 107 lines of code at 12). **You need**
# lesson 18. **Papers**: Mandt et al. 2017 (arXiv 1704.04289), Gürbüzbalaban et al. 2015 (arXiv
# 1510.08560), Polyak & Juditsky 1992.

# %%
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import derive
from common.lab import Lab
from common.lesson import Lesson
from common.training import split_for

lesson = Lesson("noise_floor", "Further: The noise floor")
MANDT, SHUFFLE, POLYAK = "Mandt et al.", "Gürbüzbalaban et al.", "Polyak & Juditsky"
GUIDE = "study guide"

# %% [markdown]
# ## From scratch
#
# To see a floor you must know the minimum. One linear layer has one. Its inputs are principal
# components of 1,000 images, all of variance 1, so that no direction is slow. The laboratory trains
# by epochs, but the theory wants each batch drawn anew: so here is plain SGD by hand. R rates and S
# seeds train at once: their losses are summed, which mixes no gradients.


# %%
def data(lab: Lab, wrong: float, kept: int) -> tuple[Tensor, Tensor]:
    """Components (S, N, kept) of each seed's images; labels, some wrong, as 0 and 1 (S, N, K)."""
    options, size = lab.options, 1000  # an epoch ends where `sgd` looks: --larger is left out
    torch.manual_seed(derive(options.seeds[0], "batches"))  # all that is drawn from here on
    train = split_for(options.dataset, tuple(options.seeds), size, wrong, "cpu").train
    x = train.x.flatten(2)
    u, _, _ = torch.linalg.svd(x - x.mean(1, keepdim=True), full_matrices=False)
    return u[..., :kept] * size**0.5, F.one_hot(train.y).float()


def batches(x: Tensor, size: int, shuffled: bool = False) -> Iterator[Tensor]:
    """Without end, which examples of each seed make a batch, (S, size): epochs, or drawn anew."""
    while True:
        epoch = torch.rand(x.shape[:2]).argsort(1)
        anew = torch.randint(x.shape[1], x.shape[:2])
        yield from (epoch if shuffled else anew).split(size, 1)


def loss(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy (R, S) of ReLU layers with weights w, each (R, S, inputs, outputs)."""
    for hidden in w[:-1]:
        x = (x @ hidden).relu()
    return -(y * (x @ w[-1]).log_softmax(-1)).sum(-1).mean(-1)


def sgd(w: list[Tensor], x: Tensor, y: Tensor, rates: Tensor, order: Iterable) -> list[list]:
    """Plain SGD from w with rates (steps, R) on batches in this order: w after every 50 steps."""
    seen, seed = [], torch.arange(len(x))[:, None]
    for step, (rate, i) in enumerate(zip(rates[..., None, None, None], order, strict=False), 1):
        w = [each.detach().requires_grad_() for each in w]
        slopes = torch.autograd.grad(loss(w, x[seed, i], y[seed, i]).sum(), w)
        w = [each.detach() - rate * slope for each, slope in zip(w, slopes, strict=True)]
        if step % 50 == 0:
            seen.append(w)
    return seen


def minimum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest loss of a linear layer, by descent without noise; and there tr Σ / 4: (S,)."""
    everything, rates = [torch.arange(x.shape[1])] * 400, torch.full((400, 1), 3.0)
    (w,) = sgd([torch.zeros(1, len(x), x.shape[2], y.shape[2])], x, y, rates, everything)[-1]
    squares = x.square().sum(-1) * ((x @ w[0]).softmax(-1) - y).square().sum(-1)
    return loss([w], x, y), squares.mean(-1) / 4


# %% [markdown]
# ## 1. The floor
#
# The theory, for plain SGD at a small rate: the loss stays above its minimum by rate / batch size ×
# tr Σ / 4. tr Σ is the variance of one example's gradient there, summed over all weights. 30 % of
# the labels are wrong. How large is a small rate? And what if batches come from shuffled epochs?

# %%
RATES, SIZES = (0.1, 0.2, 0.4, 0.8), {"5": 5, "20": 20, "50": 50, "20, shuffled": 20}


def floors(lab: Lab) -> Any:
    """The loss above its minimum, as a ratio to the theory: (batch, quarter, rate, seed)."""
    from xarray import DataArray

    x, y = data(lab, wrong=0.3, kept=8)
    (lowest, theory), zero, ratios = minimum(x, y), torch.zeros(1, len(x), 8, y.shape[2]), []
    rates = torch.tensor([RATES] * (200 if lab.options.quick else 4000 * lab.options.longer))
    for name, size in SIZES.items():
        seen = sgd([zero], x, y, rates, batches(x, size, shuffled=name == "20, shuffled"))
        above = torch.stack([loss(w, x, y) - lowest for w in seen])
        ratios.append((above * size / rates[0, :, None] / theory).unflatten(0, (4, -1)).mean(1))
    places = {"batch": [*SIZES], "quarter": [1, 2, 3, 4], "rate": [*RATES]}
    about = {"long_name": "loss above the minimum / theory"}
    return DataArray(torch.stack(ratios), places, (*places, "seed"), attrs=about)


@lesson.experiment
def floor(lab: Lab) -> None:
    """Where does a constant rate get stuck?"""
    third, last = floors(lab).sel(quarter=[3, 4]).transpose("quarter", ...)
    lab.sweep(last, x="rate", hue="batch")
    lab.table(last, rows="batch", columns="rate")
    change = 100 * (last.mean("seed") / third.mean("seed") - 1)
    lab.say(f"from the third to the last quarter: {change.min():+.1f} to {change.max():+.1f} %")
    anew, shuffled = last.sel(batch=["5", "20", "50"]), last.sel(batch="20, shuffled", rate=0.4)
    rate = (anew.sel(rate=0.8) / anew.sel(rate=0.1)).mean("batch")
    lab.claim("The floor is in proportion to the rate, to 20 %", MANDT, rate, 0.8, 1.2)
    batch = (anew.sel(batch="50") / anew.sel(batch="5")).mean("rate")
    lab.claim("The floor is in proportion to 1 / batch size, to 20 %", MANDT, batch, 0.8, 1.2)
    small = anew.sel(rate=0.1).mean("batch")
    lab.claim("At a rate of 0.1 the theory of the floor is right to 10 %", MANDT, small, 0.9, 1.1)
    lab.claim("Shuffled epochs end below half the floor (rate 0.4)", SHUFFLE, shuffled, below=0.5)


# %% [markdown]
# **What we saw.** The floor is in proportion to the rate [floor-1 holds] and to 1 / batch size
# [floor-2 holds]; at 0.1 it is the theory's [floor-3 holds], at 0.8 with batches of 5 it is 1.22
# times that. At the end of a shuffled epoch, as a `DataLoader` makes it, it is far lower, 0.23 at a
# rate of 0.4 [floor-4 holds]: every image has had its turn, and most of the noise has cancelled.
#
# **How far it carries.** The verdicts stay after four times the training and on fresh seeds.
#
# ## 2. Off the floor
#
# Half-way we lower a rate of 0.4 to a tenth. Or we take the mean of all weights seen since: if they
# only wander about the minimum, it lies in their midst. Which gets lower? Then the same with room
# to learn all labels by heart: right labels, 40 components, 64 hidden units, a rate of 0.1. Each
# example's gradient dies out, and its noise too. Will a tenth of the rate help the training loss?


# %%
def remedies(lab: Lab, rate: float, w: list[Tensor], x: Tensor, y: Tensor, lowest: Any) -> Any:
    """Thousandths of a nat above the lowest loss, for each remedy from w: (step, run, seed)."""
    from xarray import DataArray

    half, above, mean = 100 if lab.options.quick else 2000 * lab.options.longer, [], w
    rates = rate * torch.tensor([[1, 1, 0.1]] * half + [[1, 0.1, 0.1]] * half)
    for n, three in enumerate(sgd(w, x, y, rates, batches(x, 5)), 1 - half // 50):
        one = [layer[:1] for layer in three]  # at the constant rate
        mean = one if n <= 1 else [m + (w - m) / n for m, w in zip(mean, one, strict=True)]
        above.append(1000 * (torch.cat([loss(three, x, y), loss(mean, x, y)]) - lowest))
    runs = ["constant", "rate / 10", "rate / 10 from the start", "mean of weights"]
    places = {"step": [50 * (i + 1) for i in range(len(above))], "run": runs}
    about = {"long_name": "training loss above its minimum (nats / 1000)"}
    return DataArray(torch.stack(above), places, (*places, "seed"), attrs=about)


@lesson.experiment
def drop_the_rate(lab: Lab) -> None:
    """What does a smaller rate change, with a floor (left) and without (right)?"""
    x, y = data(lab, wrong=0.3, kept=8)
    zero, lowest = torch.zeros(1, len(x), 8, y.shape[2]), minimum(x, y)[0]
    stuck = remedies(lab, 0.4, [zero], x, y, lowest)
    x, y = data(lab, wrong=0.0, kept=40)
    w = [torch.randn(1, len(x), 40, 64) / 20**0.5, torch.randn(1, len(x), 64, y.shape[2]) / 8]
    free = remedies(lab, 0.1, w, x, y, 0.0)
    title, panels = lab.entry["question"], (stuck, free)
    figure = lab.plotting.lines(title, panels, "step", "run", None, even=False)
    figure.axes[0].set_yscale("log")
    lab.figure(figure)
    stuck, free = (each.coarsen(step=each.step.size // 4).mean() for each in panels)
    lab.table({"a floor:\nnats / 1000": stuck[3], "no floor:\nnats / 1000": free[3]}, rows="run")
    tenth, constant = stuck[3].sel(run="rate / 10"), free.sel(run="constant")
    ratio = tenth / stuck[3].sel(run="constant")
    lab.claim("A tenth of the rate leaves a tenth of the floor", MANDT, ratio, 0.07, 0.13)
    ratio = stuck[3].sel(run="mean of weights") / tenth
    lab.claim("Averaging weights beats a tenth of the rate", POLYAK, ratio, below=1)
    ratio = constant[3] / constant[2]
    lab.claim("With room for all labels a constant rate gets stuck", GUIDE, ratio, above=0.9)
    ratio = free[3].sel(run="rate / 10") / constant[3]
    lab.claim("With room for all labels a tenth of the rate lowers the loss", GUIDE, ratio, below=1)


# %% [markdown]
# **What we saw.** On the left a tenth of the rate leaves a tenth of the floor [drop_the_rate-1
# holds]; from the start it ends as low, but falls slowly. The mean of the weights gets lower still
# [drop_the_rate-2 holds], at almost no cost. On the right nothing is stuck [drop_the_rate-3 does
# not hold]: a smaller rate is only slower, and its loss ends 1.82 times as high [drop_the_rate-4
# does not hold]. So lower the rate when noise holds the loss up, not because a schedule says so.
#
# **How far it carries.** The verdicts stay after four times the training and on fresh seeds. This
# is training loss: on test images a floor may do no harm.

# %%
if __name__ == "__main__":
    lesson.main()
