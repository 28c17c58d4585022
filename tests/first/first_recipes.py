"""Small recipes that several tests train."""

from functools import partial
from math import prod

import torch
from torch import nn

from common.first.data import Task
from common.first.training import Recipe


def linear(task: Task) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(task.shape), task.classes))


def noisy(task: Task) -> nn.Module:
    """A network that draws random numbers in training, from the same start as `linear`."""
    flat, layer = linear(task)
    return nn.Sequential(flat, nn.Dropout(0.5), layer)


SGD = partial(torch.optim.SGD, lr=0.1)
SMALL = Recipe(model=linear, optimizer=SGD, epochs=3, batch_size=32, examples=100, evaluations=3)
HUGE_RATE = partial(torch.optim.SGD, lr=1e3, momentum=0.9)


def exploding(task: Task) -> nn.Module:
    """Three linear layers: at a rate of 1e3 their product overflows within a few steps."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(task.shape), 32), nn.Linear(32, 32), nn.Linear(32, task.classes))


DIVERGES = Recipe(model=exploding, optimizer=HUGE_RATE, epochs=4, batch_size=32, examples=100, evaluations=4)
