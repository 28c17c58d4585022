"""The training loop, and the recipe that decides what it does."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.first.data import Batch, Split, Task, derive, load, make_split, minibatches


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the model's logits for images x (N, C, H, W) and labels y (N,)."""
    return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run except its seed and its device.

    model: builds a fresh network for a Task.
    optimizer: builds the optimiser for the network's parameters.
    schedule: builds a learning-rate scheduler from the optimiser and the number of times it will be stepped;
        `schedule_every` says whether that is once a "batch" or once an "epoch".
    loss: what a step minimises, from (model, x, y): penalties, smoothing and augmentation go here. What is
        REPORTED is always the plain cross-entropy.
    examples, label_noise: size of the training set (None: all there is) and the share of its labels made wrong.
    evaluations: at how many epochs to measure; the start (epoch 0) is always measured too.
    after_step, after_epoch: called with the State; when after_epoch returns True, training stops. What is called in
        every step (loss and after_step) should leave tensors where they are: a float of one makes a GPU wait.
    """

    model: Callable[[Task], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None
    schedule_every: str = "epoch"
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
    epochs: int = 30
    batch_size: int = 50
    examples: int | None = None
    label_noise: float = 0.0
    evaluations: int = 25
    after_step: Callable[["State"], None] | None = None
    after_epoch: Callable[["State"], bool | None] | None = None


@dataclass
class State:
    """What a hook of the recipe may look at: the run so far, `epoch` of at most `epochs`; and `notes`, where it may
    leave plain data for the Run, or tensors, which become arrays when the run ends.
    """

    model: nn.Module
    optimizer: Optimizer
    split: Split
    epochs: int
    epoch: int = 0
    step: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One training run as plain data: numbers and small arrays, no model.

    history: lists of equal length: epoch, train_loss, train_accuracy, validation_loss, validation_accuracy,
        learning_rate. Losses are mean cross-entropies in nats, accuracies shares of right answers (0…1).
    final: the last of these, with test_loss and test_accuracy; every value is NaN if the run diverged.
    best: the same at the epoch of the lowest validation loss. The test set chooses nothing.
    diverged_at: the first step (from 1) whose loss was not finite; the history ends there.
    seconds: time spent in training, the recipe's hooks included, the evaluations for the history left out.
    notes: whatever the recipe's hooks and `inspect` left.
    """

    seed: int
    history: dict[str, list[float]] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    diverged_at: int | None = None
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """A number of this run: `train_loss`, `test_accuracy`, …, `gap` (validation loss minus training loss),
        `seconds`, or any of these at the best epoch (`best_test_accuracy`, `best_epoch`). NaN if it diverged.
        """
        if self.diverged_at is not None:
            return math.nan
        if metric == "seconds":
            return self.seconds
        if metric == "gap":
            return self.final["validation_loss"] - self.final["train_loss"]
        return self.best[metric[5:]] if metric.startswith("best_") else self.final[metric]


@torch.no_grad()
def totals(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over `batch`, and how many answers are right, in eval mode: (2,), on the model's
    device.
    """
    was_training = model.training
    model.eval()
    parts = []
    for x, y in zip(batch.x.split(2000), batch.y.split(2000), strict=True):
        logits = model(x)
        parts.append(torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()]))
    model.train(was_training)
    return torch.stack(parts).sum(0)


def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy (0…1) over `batch`, in eval mode, weighed by examples."""
    loss, right = totals(model, batch).tolist()
    return loss / len(batch.y), right / len(batch.y)


def measure(model: nn.Module, split: Split, parts: Iterable[str]) -> dict[str, float]:
    """`evaluate` on the named parts of the split, as {"train_loss": …, "train_accuracy": …, …}."""
    measured = {}
    for part in parts:
        measured[f"{part}_loss"], measured[f"{part}_accuracy"] = evaluate(model, getattr(split, part))
    return measured


def record(run: Run, state: State) -> None:
    """Append the epoch's measurements to the run's history; keep them, with the test's, if validation is best so far.

    A loss that is not finite ends the run: the last step overflowed.
    """
    state.model.eval()  # once for all parts
    measured = measure(state.model, state.split, ["train", "validation"])
    if not all(map(math.isfinite, measured.values())):
        run.diverged_at = state.step
        return
    measured = {"epoch": state.epoch, **measured, "learning_rate": float(state.optimizer.param_groups[0]["lr"])}
    for name, value in measured.items():
        run.history.setdefault(name, []).append(value)
    if not run.best or measured["validation_loss"] < run.best["validation_loss"]:
        run.best = measured | measure(state.model, state.split, ["test"])
    state.model.train()


def train_step(recipe: Recipe, state: State, x: Tensor, y: Tensor) -> Tensor:
    """One step of the optimiser on a batch; returns its loss, a scalar that stays on the device. Nothing here waits for
    a GPU.
    """
    state.step += 1
    state.optimizer.zero_grad()
    loss = recipe.loss(state.model, x, y)
    loss.backward()
    state.optimizer.step()
    if recipe.after_step:
        recipe.after_step(state)
    return loss.detach()


def train_epoch(
    recipe: Recipe, state: State, schedule: LRScheduler | None, batch_order: torch.Generator
) -> list[Tensor]:
    """One pass over the training set, a step of the optimiser for each batch; returns the loss of each step."""
    losses = []
    state.epoch += 1
    state.model.train()
    for x, y in minibatches(state.split.train, recipe.batch_size, batch_order):
        losses.append(train_step(recipe, state, x, y))
        if schedule and recipe.schedule_every == "batch":
            schedule.step()
    if schedule and recipe.schedule_every == "epoch":
        schedule.step()
    return losses


@lru_cache(maxsize=1)
def split_for(dataset: str, seed: int, examples: int | None, label_noise: float, device: str) -> Split:
    """The last split that was asked for, kept: the arms of one seed follow one another and share it. Read only."""
    return make_split(load(dataset), seed, examples, label_noise, device)


def seed_torch(seed: int, device: str) -> None:
    """Seed the generators that models and masks draw from: torch.manual_seed, without the half millisecond that it
    spends, even where there is no GPU, on noting who called it.
    """
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def off_device(note: Any) -> Any:
    """A hook's note as plain data: a tensor, or a list of them, becomes an array."""
    if isinstance(note, list) and note and isinstance(note[0], Tensor):
        note = torch.stack(note)
    return note.detach().cpu().numpy() if isinstance(note, Tensor) else note


def fit(
    recipe: Recipe,
    seed: int,
    dataset: str = "digits",
    device: str = "cpu",
    inspect: Callable[[nn.Module, Split], dict[str, Any]] | None = None,
) -> Run:
    """Train one network by the recipe and measure it; everything random comes from `seed`.

    The seed fixes the split, the starting weights, the order of the batches and the masks, each by a stream of its
    own: two recipes with one seed see the same data in the same order, whatever else they draw.
    `inspect` turns the trained model and the split into plain data for `Run.notes`.
    """
    split = split_for(dataset, seed, recipe.examples, recipe.label_noise, device)
    seed_torch(derive(seed, "start"), device)
    model = recipe.model(load(dataset).task).to(device)
    optimizer = recipe.optimizer(model.parameters())
    periods = recipe.epochs
    if recipe.schedule_every == "batch":
        periods *= math.ceil(len(split.train.y) / recipe.batch_size)
    schedule = recipe.schedule(optimizer, periods) if recipe.schedule else None
    batch_order = torch.Generator().manual_seed(derive(seed, "batches"))
    seed_torch(derive(seed, "masks"), device)

    run, state = Run(seed), State(model, optimizer, split, recipe.epochs)
    measured_epochs = set(np.linspace(0, recipe.epochs, recipe.evaluations + 1).round().astype(int).tolist())
    record(run, state)
    stop = False
    while state.epoch < recipe.epochs and not stop and run.diverged_at is None:
        start = time.perf_counter()
        losses = train_epoch(recipe, state, schedule, batch_order)
        finite = torch.stack(losses).isfinite().tolist()  # once an epoch: a look at every step would stall a GPU
        if not all(finite):
            run.diverged_at = state.step - len(finite) + 1 + finite.index(False)
            break
        stop = bool(recipe.after_epoch and recipe.after_epoch(state))
        run.seconds += time.perf_counter() - start
        if stop or state.epoch in measured_epochs:
            record(run, state)
    run.notes = {name: off_device(note) for name, note in state.notes.items()}
    if run.diverged_at is None:
        latest = {name: values[-1] for name, values in run.history.items()}
        best_is_last = run.best["epoch"] == latest["epoch"]
        run.final = dict(run.best) if best_is_last else latest | measure(model, split, ["test"])
        if inspect:
            run.notes |= inspect(model, split)
    return run
