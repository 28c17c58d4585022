# %% [markdown]
# # Further: what norms cost
#
# **The question.** Layer norm is said to be slightly slower than batch norm, RMS norm cheaper than
# layer norm, and all of them are said to cost next to nothing. Is that so where you run them?
#
# **Time**: 11 minutes of reading (541 words at 200 a minute, 101 lines of code at 12). **You need**
# lesson 17. **Paper**: Zhang & Sennrich 2019, *Root mean square layer normalization* (arXiv
# 1910.07467).

# %%
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.lab import Lab
from common.lesson import Lesson

lesson = Lesson("cost_of_norms", "Further: what norms cost")
GUIDE, ADVICE, PAPER = "study guide", "common advice", "Zhang & Sennrich"

# %% [markdown]
# ## A stopwatch
#
# Timings are treacherous: the first call is slow, other programs interrupt, and a GPU returns
# before the work is done. So: warm up; time the norms in turn, not one after another; wait for the
# GPU; take the median of several times; and compare norms within one run. What is reported are
# ratios. The intervals are over repetitions on one machine; on another the ratios differ.


# %%
def seconds(work: Callable[[], Any], device: str) -> float:
    """How long one call of `work` takes; on a GPU until it has finished."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def timed(lab: Lab, works: dict[str, Callable[[], Any]], rounds: int) -> Any:
    """Time of each work in ms (norm, seed): for each seed the median of several rounds."""
    medians = []
    for _ in range(1 + len(lab.options.seeds)):  # the first time is a warm-up
        table = []
        for _ in range(rounds):
            table.append([1000 * seconds(work, lab.options.device) for work in works.values()])
        medians.append(torch.tensor(table).median(0).values.tolist())
    from xarray import DataArray

    places = {"norm": list(works), "seed": lab.options.seeds}
    about = {"unit": "ms", "long_name": "time"}
    return DataArray(medians[1:], places, ("seed", "norm"), attrs=about).transpose("norm", "seed")


def ratio(times: Any, norm: str) -> Any:
    """The times as multiples of one norm's, repetition by repetition."""
    about = {"unit": "times", "long_name": f"time, {norm} = 1"}
    return (times / times.sel(norm=norm)).assign_attrs(about)


# %% [markdown]
# ## 1. The layer alone
#
# Five norms on 32 images of 64 maps with 16 × 16 pixels, forward and backward. Layer norm stands
# twice: as `nn.LayerNorm`, and as `nn.GroupNorm` with one group, which has a gain for each channel
# instead of each element. All read each number once or twice and write it once. How far can they be
# apart?


# %%
def layers(device: str) -> dict[str, nn.Module]:
    """The norms of 64 maps with 16 × 16 pixels."""
    norms = {
        "batch norm": nn.BatchNorm2d(64),
        "layer norm": nn.LayerNorm((64, 16, 16)),
        "layer norm, one group": nn.GroupNorm(1, 64),
        "instance norm": nn.InstanceNorm2d(64, affine=True),
        "group norm": nn.GroupNorm(4, 64),
        "RMS norm": nn.RMSNorm((64, 16, 16)),
    }
    return {name: norm.to(device) for name, norm in norms.items()}


def passes(lab: Lab, norms: dict[str, nn.Module], x: Tensor) -> tuple[Any, Any]:
    """Times of the forward and of the backward pass of each norm on x: two arrays (norm, seed)."""
    forward, backward = {}, {}
    for name, norm in norms.items():
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        wanted = [inputs, *norm.parameters()]
        forward[name] = lambda norm=norm, inputs=inputs: norm(inputs)
        backward[name] = lambda out=out, wanted=wanted: torch.autograd.grad(
            out, wanted, torch.ones_like(out), retain_graph=True
        )
    return timed(lab, forward, 25), timed(lab, backward, 25)


@lesson.experiment
def layer_alone(lab: Lab) -> None:
    """What does each norm cost in time and in parameters?"""
    device = lab.options.device
    norms = layers(device)
    forward, backward = passes(lab, norms, torch.randn(32, 64, 16, 16, device=device))
    total = ratio((forward + backward).assign_attrs(unit="ms"), "batch norm")
    lab.dots(total, y="norm")
    lab.table({"forward": forward, "backward": backward, "both, batch norm = 1": total}, "norm")
    for name, norm in norms.items():
        lab.say(f"{name}: {sum(each.numel() for each in norm.parameters()):,} parameters")

    slower = total.sel(norm="layer norm")
    lab.claim("Layer norm takes longer than batch norm", GUIDE, slower, above=1)
    both = (forward + backward).assign_attrs(unit="ms")
    cheaper = ratio(both, "layer norm").sel(norm="RMS norm")
    lab.claim("RMS norm takes less time than layer norm", PAPER, cheaper, below=1)


# %% [markdown]
# **What we saw.** On this CPU `LayerNorm` takes 0.45 of batch norm's time [layer_alone-1 does not
# hold]. `RMSNorm`, which leaves the mean out, takes 11.20 times as long as `LayerNorm`
# [layer_alone-2 does not hold], most of it in the backward pass. `GroupNorm` with one group has 128
# parameters, `LayerNorm` 32,768.
#
# **How far it carries.** As far as this machine and this version of PyTorch: such ratios say how
# well a layer is implemented, not how much there is to compute. Run it where you train; with
# `--device cuda` the order may be another.
#
# ## 2. A step of training
#
# A network is more than its norms. Here is a whole step, forward, backward and optimiser, of a
# convolutional network with three layers of 64 channels, on 32 images of 16 × 16 pixels, with each
# norm and without. What share does the norm take?


# %%
def conv_net(norm: Callable[[], nn.Module]) -> nn.Module:
    """Three convolutions with 64 channels, each followed by a norm, then logits for ten classes."""
    blocks: list[nn.Module] = []
    for inputs in (1, 64, 64):
        blocks += [nn.Conv2d(inputs, 64, 3, padding=1), norm(), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Step:
    """One step of training on the same batch, each time it is called."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model.train(), x, y
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


@lesson.experiment
def whole_step(lab: Lab) -> None:
    """What does a norm add to a whole step of training?"""
    device = lab.options.device
    x, y = torch.randn(32, 1, 16, 16, device=device), torch.arange(32, device=device) % 10
    norms = {"no norm": nn.Identity, "batch norm": partial(nn.BatchNorm2d, 64)}
    norms |= {"layer norm": partial(nn.LayerNorm, (64, 16, 16))}
    norms |= {"group norm": partial(nn.GroupNorm, 4, 64)}
    norms |= {"RMS norm": partial(nn.RMSNorm, (64, 16, 16))}
    steps = {name: Step(conv_net(norm).to(device), x, y) for name, norm in norms.items()}
    times = timed(lab, steps, 7)
    share = ratio(times, "no norm")
    lab.table({"a step": times, "no norm = 1": share}, rows="norm")
    lab.dots(share, y="norm")

    little = share.sel(norm="batch norm")
    lab.claim("Batch norm adds less than 5 % to a step's time", ADVICE, little, below=1.05)
    slowest = share.max("norm")
    lab.claim("Even the slowest norm does not double a step's time", ADVICE, slowest, below=2)


# %% [markdown]
# **What we saw.** A norm is not free: with batch norm a step takes 1.18 times as long as without
# [whole_step-1 does not hold]. But none doubles it, not even RMS norm, the slowest on this machine
# with 1.71 [whole_step-2 holds]: the convolutions take most of the time.
#
# **How far it carries.** To networks of convolutions like these, on a CPU. Where the layers are
# smaller or the machine multiplies faster, a norm's share may be larger; measure yours.

# %%
if __name__ == "__main__":
    lesson.main()
