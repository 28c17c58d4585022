# %% [markdown]
# # Further: padding and batch statistics
#
# **The question.** Sequences of unequal length are filled up with zeros to make a batch. Attention
# can leave the padding out by a mask; batch norm averages over it, unless it gets the mask, too.
# What does that cost, and is it the reason to use layer norm?
#
# **Time**: 12 minutes of reading (502 words at 200 a minute, 112 lines of code at 12). **You need**
# lesson 17.

# %%
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Split, Task
from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe

lesson = Lesson("padding_and_batch_statistics", "Further: padding and batch statistics")
GUIDE, ADVICE = "study guide", "common advice"

# %% [markdown]
# ## From scratch
#
# Batch norm of sequences averages each feature over all sequences and all times. Given a mask of
# the times that are real, it averages over those alone, and the padding changes nothing.


# %%
class BatchNorm(nn.BatchNorm1d):
    """Batch norm of sequences (N, T, F); if `masked`, its statistics are of real times only."""

    def __init__(self, features: int, masked: bool) -> None:
        super().__init__(features)
        self.masked = masked

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        if not self.masked or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        weight = real[..., None].to(x.dtype)  # (N, T, 1): 1 for real times, 0 for padding
        n = weight.sum()
        mean = (weight * x).sum((0, 1)) / n
        var = (weight * (x - mean).square()).sum((0, 1)) / n
        with torch.no_grad():
            self.running_mean.add_(self.momentum * (mean - self.running_mean))
            self.running_var.add_(self.momentum * (var * n / (n - 1) - self.running_var))
        return self.weight * (x - mean) / (var + self.eps).sqrt() + self.bias


class LayerNorm(nn.LayerNorm):
    """Layer norm of sequences (N, T, F): it looks at one time, so it ignores which are real."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return super().forward(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "masked batch norm": partial(BatchNorm, masked=True),
    "batch norm": partial(BatchNorm, masked=False),
    "layer norm": LayerNorm,
}


class Transformer(nn.Module):
    """A pre-norm block on the rows of images (N, C, H, W) as tokens; rows of zeros are padding."""

    def __init__(self, task: Task, norm: Callable[[int], nn.Module], width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(task.shape[0] * task.shape[2], width)
        self.place = nn.Parameter(0.1 * torch.randn(task.shape[1], width))
        self.norms = nn.ModuleList([norm(width), norm(width), norm(width)])
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)
        real = rows.ne(0).any(2)
        x = self.embed(rows) + self.place
        h = self.norms[0](x, real)
        x = x + self.attention(h, h, h, key_padding_mask=~real, need_weights=False)[0]
        x = x + self.mlp(self.norms[1](x, real))
        weight = real[..., None].to(x.dtype)
        return self.head((self.norms[2](x, real) * weight).sum(1) / weight.sum(1))


# %% [markdown]
# ## 1. Batches of mixed and of equal lengths
#
# Training images keep their first 2 to 8 rows, anew at every step; the rest is padding, which
# attention and the average at the end leave out. Two ways to make batches: *mixed*, every batch
# with all lengths, so that the share of padding is about the same in each; and *equal*, one length
# drawn for each batch, as is usual to save work, so that it is not. The test images have 2, 4, 6
# and 8 rows; the table shows the mean over the four. The learning rate is chosen for each on whole
# validation images.
#
# Then 400 test images are one batch in training mode, and we score the first 200, all whole. The
# other 200 are whole, too, or have two rows: what comes out should not depend on who else is there.
# Where does padding do harm?


# %%
def cut(x: Tensor, lengths: Tensor) -> Tensor:
    """Images (N, C, H, W) with all rows after the first `lengths` (N,) set to zero."""
    rows = torch.arange(x.shape[2], device=x.device)
    return x * (rows < lengths[:, None])[:, None, :, None]


def cut_loss(model: nn.Module, x: Tensor, y: Tensor, mixed: bool) -> Tensor:
    """Cross-entropy on images cut to random lengths, one for each image or one for all."""
    lengths = torch.randint(2, x.shape[2] + 1, (len(x) if mixed else 1,), device=x.device)
    return F.cross_entropy(model(cut(x, lengths.expand(len(x)))), y)


def network(norm: Callable[[int], nn.Module], mixed: bool, rate: float) -> Recipe:
    """The transformer on 200 digits of random length."""
    adam = partial(torch.optim.Adam, lr=rate, fused=True)
    model, loss = partial(Transformer, norm=norm), partial(cut_loss, mixed=mixed)
    how = {"epochs": 60, "batch_size": 25, "examples": 200, "evaluations": 1}
    return Recipe(model, adam, loss=loss, **how)


@torch.no_grad()
def accuracy_of(model: nn.Module, x: Tensor, y: Tensor, count: int) -> float:
    """Accuracy in % on the first `count` of the images x, all of which the network is shown."""
    return 100 * (model(x).argmax(1) == y)[:count].float().mean().item()


def by_length(model: nn.Module, split: Split) -> dict[str, Any]:
    """Test accuracy by length; and of 200 whole images in training mode, by their neighbours."""
    (x, y), rows = split.test, split.test.x.shape[2]
    every, whole = torch.full_like(y, rows), torch.arange(len(y), device=y.device) < 200
    lengths = [rows // 4, rows // 2, 3 * rows // 4, rows]
    model.eval()
    accuracy = [accuracy_of(model, cut(x, every * n // rows), y, len(y)) for n in lengths]
    beside = []
    for shortest in (rows, 2):
        mixed = torch.where(whole, rows, shortest)
        beside.append(accuracy_of(deepcopy(model).train(), cut(x, mixed), y, 200))
    about = {"unit": "%", "long_name": "test accuracy"}
    return {
        "rows_kept": ("rows_kept", lengths),
        "accuracy": ("rows_kept", accuracy, about),
        "neighbours": ("neighbours", ["whole", "two rows"]),
        "accuracy_beside": ("neighbours", beside, about),
    }


@lesson.experiment
def padding(lab: Lab) -> None:
    """What does padding do to batch statistics?"""
    ways, choices = {"mixed": True, "equal": False}, {"rate": (0.0004, 0.002, 0.01)}
    runs = lab.study(network, norm=NORMS, mixed=ways, tune=choices, inspect=by_length)
    runs = runs.rename(mixed="batches")
    accuracy, beside = runs.accuracy.mean("rows_kept", keep_attrs=True), runs.accuracy_beside
    panels = []
    for way in ways:
        named = {"long_name": f"test accuracy, {way} batches"}
        panels.append(runs.accuracy.sel(batches=way).assign_attrs(named))
    lab.sweep(*panels, x="rows_kept", hue="norm")
    lab.table(accuracy, rows="norm", columns="batches")
    lead = lab.gain(accuracy, norm="batch norm")
    mask = lead.sel(batches="mixed", norm="masked batch norm")
    lab.claim("Padding costs batch norm 3 points (mixed)", ADVICE, mask, above=3)
    for way in ways:
        layer = lead.sel(batches=way, norm="layer norm")
        statement = f"Layer norm beats batch norm by 5 points ({way})"
        lab.claim(statement, GUIDE, layer, above=5)
    change = lab.gain(beside, neighbours="whole").sel(batches="equal", neighbours="two rows")
    plain, masked = change.sel(norm="batch norm"), change.sel(norm="masked batch norm")
    statement = "In training mode short neighbours cost accuracy (equal)"
    lab.claim(statement, ADVICE, plain, below=-1)
    statement = "In training mode short neighbours cost less with a mask (equal)"
    lab.claim(statement, ADVICE, masked - plain, above=0)


# %% [markdown]
# **What we saw.** Little, in eval mode. The mask adds 0.8 points in mixed batches, not to be told
# from 0 [padding-1 does not hold]. Layer norm is 1.8 behind batch norm in mixed batches [padding-2
# does not hold], and 1.6 ahead in equal ones [padding-3 does not hold], by its images of two rows.
# Trained on equal batches and tested in training mode, batch norm loses 4.5 points by short
# neighbours [padding-4 holds], less with the mask [padding-5 holds]. Layer norm never looks at
# them.
#
# **How far it carries.** To sequences of eight rows whose every length is met in training. In eval
# mode nothing depends on the neighbours: call `model.eval()`.


# %%
if __name__ == "__main__":
    lesson.main()
