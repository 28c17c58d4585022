"""Data sets as tensors in memory, and the split that a seed draws from them."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class LessonError(Exception):
    """Something the reader can mend; its message is one line that names the cause and the way out."""


class Task(NamedTuple):
    """What a model must accept and return: images of `shape` (C, H, W), one logit for each of `classes`."""

    shape: tuple[int, int, int]
    classes: int


class Batch(NamedTuple):
    """Images `x`, (N, C, H, W) float32, and their labels `y`, (N,) int64."""

    x: Tensor
    y: Tensor


class Split(NamedTuple):
    """Three disjoint parts of a data set, standardised with the training part's mean and deviation."""

    train: Batch
    validation: Batch
    test: Batch


class Dataset(NamedTuple):
    """Raw images (N, C, H, W) and labels (N,), with how many to hold out for validation and for the test."""

    x: np.ndarray
    y: np.ndarray
    validation: int
    test: int

    @property
    def task(self) -> Task:
        return Task(tuple(self.x.shape[1:]), int(self.y.max()) + 1)


def load_digits() -> Dataset:
    """The 1,797 real handwritten digits, 8 × 8 pixels in 0…16, that ship inside scikit-learn."""
    from sklearn import datasets  # imported late: it takes longer than training a network on it

    x, y = datasets.load_digits(return_X_y=True)
    return Dataset(x.reshape(-1, 1, 8, 8).astype(np.float32), y.astype(np.int64), validation=397, test=400)


# Every data set the command line offers. The larger ones (MNIST, Fashion-MNIST, …) join here,
# each a function without arguments that returns a Dataset.
LOADERS = {"digits": load_digits}


@lru_cache(maxsize=1)
def load(name: str) -> Dataset:
    """The data set called `name`, read once in each process (a forked worker inherits its parent's)."""
    return LOADERS[name]()


def derive(seed: int, purpose: str) -> int:
    """A seed for one purpose ("test", "split", "start", "batches", "masks"), so that no two share a random stream."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def stratified_order(y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random order (N,) of the examples in which every stretch holds the classes in proportion."""
    rank = np.empty(len(y))
    for label in np.unique(y):
        members = generator.permutation(np.flatnonzero(y == label))
        rank[members] = (np.arange(len(members)) + generator.random(len(members))) / len(members)
    return np.argsort(rank)


def mislabel(y: np.ndarray, share: float, classes: int, generator: np.random.Generator) -> np.ndarray:
    """A copy of labels `y` (N,) in which a `share` of them, to the nearest example, names a wrong class."""
    wrong = generator.permutation(len(y))[: round(share * len(y))]
    y = y.copy()
    y[wrong] = (y[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return y


def make_split(
    dataset: Dataset, seed: int, examples: int | None = None, label_noise: float = 0.0, device: str = "cpu"
) -> Split:
    """Split a data set: a test part that is the same for every seed, so that nothing tuned with any seed has seen it;
    a validation part that the seed draws; and the first `examples` of the rest, in the seed's order, to train on.

    All parts are stratified. A larger training set contains the smaller ones of the same seed. `label_noise` is the
    share of TRAINING labels replaced by a wrong class; validation and test labels stay right. Pixels are standardised
    per channel with the training part's statistics.

    Raises LessonError when the data set has fewer than `examples` left for training.
    """
    available = len(dataset.y) - dataset.validation - dataset.test
    examples = available if examples is None else examples
    if not 0 < examples <= available:
        raise LessonError(f"{examples} training examples asked for; this data set has 1 to {available}")
    everything = stratified_order(dataset.y, np.random.default_rng(derive(0, "test")))
    test, others = everything[: dataset.test], everything[dataset.test :]
    generator = np.random.default_rng(derive(seed, "split"))
    others = others[stratified_order(dataset.y[others], generator)]
    validation, train = others[: dataset.validation], others[dataset.validation :][:examples]
    mean = dataset.x[train].mean(axis=(0, 2, 3), keepdims=True)
    deviation = dataset.x[train].std(axis=(0, 2, 3), keepdims=True)
    labels = mislabel(dataset.y[train], label_noise, dataset.task.classes, generator)

    def batch(part: np.ndarray, y: np.ndarray) -> Batch:
        x = torch.from_numpy((dataset.x[part] - mean) / deviation)
        return Batch(x.to(device), torch.from_numpy(y).to(device))

    return Split(batch(train, labels), batch(validation, dataset.y[validation]), batch(test, dataset.y[test]))


def minibatches(batch: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """One shuffled pass over `batch` in pieces of `size` (the last may be smaller), in the generator's order."""
    order = torch.randperm(len(batch.y), generator=generator).to(batch.y.device)
    yield from map(Batch, batch.x[order].split(size), batch.y[order].split(size))
