# %% [markdown]
# # Further: L1 for feature selection
#
# **The question.** Many tables hold columns that say nothing: a serial number, a broken sensor. L1
# sets weights to zero and so, one reads, finds out which inputs matter. Does it? What is gained?
#
# **Time**: 12 minutes of reading (678 words at 200 a minute, 106 lines of code at 12). **You need**
# lesson 15. **Papers**: Ng 2004, *Feature selection, L1 vs. L2 regularization, and rotational
# invariance* (ICML); Scardapane et al. 2017 (group lasso; arXiv 1607.00485).

# %%
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from common.data import Split, Task
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe, State

lesson = Lesson("l1_feature_selection", "Further: L1 for feature selection")
NG, GUIDE, ADVICE = "Ng", "study guide", "common advice"


# %% [markdown]
# ## From scratch
#
# Our useless inputs say nothing about the digit, but an image has the same ones each time, so they
# can be learned by heart. Each is the sine of a huge random mix of the pixels, and comes out quite
# different for images that look alike. After each step of SGD the weights of the first layer are
# changed. L1 shortens each weight by rate times strength; the proximal step stops at zero, the
# subgradient steps over it. Group lasso shortens all weights of an input as one vector.


# %%
class UselessInputs(nn.Module):
    """Adds useless inputs of mean 0 and variance 1: flat images (N, pixels) to (N, inputs)."""

    def __init__(self, pixels: int, useless: int) -> None:
        super().__init__()
        self.register_buffer("mix", 1000 * torch.randn(pixels, useless))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 2**0.5 * torch.sin(x @ self.mix)], 1)


@torch.no_grad()
def change(state: State, technique: str, setting: float) -> None:
    """Change the first layer's weights w (units, inputs) after a step."""
    w, by = state.model[2].weight, setting * state.learning_rate
    if technique == "weight decay":
        w.mul_(1 - by)
    elif technique == "L1 subgradient":
        w.sub_(by * w.sign())
    elif technique == "L1":
        w.copy_(w.sign() * (w.abs() - by).clamp_min(0))
    elif technique == "group lasso":
        w.mul_((1 - by / w.norm(dim=0)).clamp_min(0))
    elif technique == "pruning" and 2 * state.epoch > state.epochs:
        length, kept = w.norm(dim=0), round(setting * state.split.train.x[0].numel())
        w.mul_(length >= length.topk(kept).values[-1])


SETTINGS = {
    "lower rate": (0.03, 0.01, 0.003, 0.001, 0.0003),
    "weight decay": (0.1, 0.3, 1, 3, 10),
    "L1 subgradient": (0.01, 0.03, 0.1, 0.3, 1),
    "L1": (0.01, 0.03, 0.1, 0.3, 1),
    "group lasso": (0.03, 0.1, 0.3, 1, 3),
    "pruning": (1, 0.75, 0.5, 0.25, 0.12),  # inputs kept, for each pixel
}
ARMS = ("none", "weight decay", "L1", "group lasso", "pruning")


def build(task: Task, useless: int, hidden: int) -> nn.Module:
    """Images to logits, with `useless` useless inputs for each pixel, and hidden units or none."""
    pixels = prod(task.shape)
    inputs = pixels * (1 + useless)
    layers = [nn.Flatten(), UselessInputs(pixels, useless * pixels)]
    if hidden:
        layers += [nn.Linear(inputs, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden or inputs, task.classes))


def network(technique: str, level: int, useless: int, hidden: int, wrong: float) -> Recipe:
    """A network on 200 images, of whose labels a share is wrong; level: which of the SETTINGS."""
    setting = SETTINGS[technique][level - 1] if technique in SETTINGS else None
    hook = partial(change, technique=technique, setting=setting) if setting else None
    rate = setting if technique == "lower rate" else 0.05
    sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, fused=True)
    model = partial(build, useless=0 if technique == "pixels only" else useless, hidden=hidden)
    return Recipe(
        model, sgd, epochs=40, examples=200, label_noise=wrong, evaluations=1, after_step=hook
    )


# %% [markdown]
# ## 1. Who selects?
#
# A hidden layer, 64 pixels, 192 useless inputs, right labels. The level of each technique is chosen
# on validation images. Pruning needs no penalty: from half-time on it keeps only the inputs with
# the longest weights. Of a useless input and a pixel, how often is the pixel ahead, with the longer
# weights (50 % is chance)? In the picture pixels are on top, long weights dark, zeros white. Guess!


# %%
@torch.no_grad()
def selection(model: nn.Module, split: Split) -> dict:
    """What the weights say of useless inputs, and of pixels whose deviation is above 0.5."""
    length, x = model[2].weight.norm(dim=0), split.train.x
    pixels, useless = length[: x[0].numel()], length[x[0].numel() :]
    pixels = pixels[x.flatten(1).std(0) > 0.5]
    ahead = (pixels[:, None] > useless) + 0.5 * (pixels[:, None] == useless)
    rows = length.view(-1, x.shape[-1])
    notes = {"row": ("row", range(len(rows))), "length": (("row", "column"), rows)}
    for name, share in {"off": useless == 0, "ahead": ahead}.items():
        notes[name] = ((), 100 * share.float().mean(), {"unit": "%"})
    return notes


@lesson.experiment
def who_selects(lab: Lab) -> None:
    """Which technique finds out which inputs matter?"""
    arms, levels = ("none", *SETTINGS, "pixels only"), (1, 2, 3, 4, 5)
    mlp = partial(network, useless=3, hidden=256, wrong=0)
    runs = lab.study(mlp, technique=arms, tune={"level": levels}, inspect=selection)
    accuracy, ahead = runs.test_accuracy, runs.ahead
    shown = {"test accuracy": accuracy, "useless off": runs.off, "pixel ahead": ahead}
    lab.table(shown, rows="technique")
    figure, axes = lab.plotting.new_figure("Which inputs are left?", len(ARMS))
    figure.set_size_inches(8, 4.8)
    for ax, arm in zip(axes, ARMS, strict=True):
        length = runs.length.sel(technique=arm)[0]
        ax.imshow(length.where(length > 0), cmap="viridis_r")
        ax.axhline(len(length) / 4 - 0.5, color="black")
        ax.set(title=arm, xticks=[], yticks=[])
    lab.figure(figure)
    gain = lab.gain(accuracy, technique="weight decay").sel(technique="L1")
    lab.claim("L1 beats weight decay by 5 points (three useless inputs a pixel)", NG, gain, above=5)
    off = runs.off.sel(technique="L1")
    lab.claim("L1 switches off nine of ten useless inputs", GUIDE, off, above=90)
    better = lab.gain(ahead, technique="none").sel(technique="L1")
    lab.claim("L1 ranks inputs better than no penalty does", GUIDE, better, above=0)
    gain = lab.gain(accuracy, technique="pruning").sel(technique="group lasso")
    lab.claim("With right labels group lasso beats pruning", ADVICE, gain, above=1)


# %% [markdown]
# **What we saw.** L1 is 9.7 points ahead of weight decay [who_selects-1 holds], which gains next to
# nothing, like a lower rate. But L1 works on single weights: only 19.4 % of the useless inputs lose
# all of theirs [who_selects-2 does not hold]. Group lasso switches off 78.0 %, and pixels, too: of
# neighbours that say the same, one is enough. And who knows best what matters? The network without
# a penalty: the pixel is ahead in 96.8 % of the pairs, with L1 in 93.9 % [who_selects-3 does not
# hold]. It knows, and uses the useless inputs all the same. So pruning is enough: group lasso does
# not beat it [who_selects-4 does not hold].
#
# **How far it carries.** The verdicts stay after four times the training and on fresh seeds. Weight
# decay and lower rates are chosen at the edge of their settings: none of these gains much.
#
# ## 2. More useless inputs, and wrong labels
#
# Ng shows for logistic regression (no hidden layer): with L1 the images needed grow only with the
# logarithm of the number of useless inputs, with weight decay they can grow with the number itself.
# Now a fifth of the labels is wrong, as in lesson 15; useless inputs help to learn these by heart.
# From none to nine useless inputs for each pixel: who keeps the accuracy?


# %%
@lesson.experiment
def more_useless(lab: Lab) -> None:
    """Who keeps the accuracy when useless inputs are added?"""
    linear, levels = partial(network, hidden=0, wrong=0.2), (1, 2, 3, 4, 5)
    runs = lab.study(linear, technique=ARMS, useless=(0, 1, 3, 9), tune={"level": levels})
    accuracy = runs.test_accuracy
    lab.sweep(accuracy.rename(useless="useless per pixel"), x="useless per pixel", hue="technique")
    lab.table(accuracy, rows="technique", columns="useless")
    lost = lab.gain(accuracy, useless=0).sel(technique="L1", useless=9)
    lab.claim("Nine useless inputs a pixel cost L1 less than 10 points", NG, lost, above=-10)
    gain = lab.gain(accuracy, technique="weight decay").sel(technique="L1", useless=9)
    lab.claim("L1 beats weight decay by 5 points (nine useless inputs a pixel)", NG, gain, above=5)
    gain = lab.gain(accuracy, technique="pruning").sel(technique="group lasso", useless=1)
    statement = "Group lasso beats pruning by 3 points (wrong labels, one useless input a pixel)"
    lab.claim(statement, ADVICE, gain, above=3)


# %% [markdown]
# **What we saw.** Without useless inputs weight decay is best. With nine a pixel it has 47.0 %, and
# L1 20.8 points more [more_useless-2 holds]: Ng is right about the winner. But L1 pays, too: 18.2
# points [more_useless-1 does not hold]. Group lasso keeps 79.2 %. And pruning is not always enough:
# with one useless input a pixel it is 9.3 points behind [more_useless-3 holds]. So few inputs have
# to carry all that is learned by heart; probably their weights get long, and pixels are pruned.
#
# **How far it carries.** The verdicts stay in both other runs. Weight decay for nine is at the
# edge: no level helps. Look at a plain network's weights; with wrong labels try group lasso.

# %%
if __name__ == "__main__":
    lesson.main()
