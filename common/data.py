"""Data sets as tensors in memory, and the split that a seed draws from them."""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
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
    """Raw images (N, C, H, W) and labels (N,), how many to hold out for validation and for the test, and how many of
    the last images are the data set's own test part, from which the test is taken (0: it has none).
    """

    x: np.ndarray
    y: np.ndarray
    validation: int
    test: int
    own_test: int = 0

    @property
    def task(self) -> Task:
        return Task(tuple(self.x.shape[1:]), int(self.y.max()) + 1)


def digest(dataset: Dataset) -> str:
    """What a data set is known by, whatever it is called: SHA-256 of its images, labels and numbers held out."""
    kinds = [(array.shape, array.dtype.str) for array in dataset[:2]]
    found = hashlib.sha256(repr((kinds, dataset[2:])).encode())
    for array in dataset[:2]:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def load_digits() -> Dataset:
    """The 1,797 real handwritten digits, 8 × 8 pixels in 0…16, that ship inside scikit-learn."""
    folder = Path(find_spec("sklearn").origin).parent / "datasets" / "data"  # to import sklearn.datasets takes 0.7 s
    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",")
    x, y = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1]
    return Dataset(x.astype(np.float32), y.astype(np.int64), validation=397, test=400)


TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DATASETS = ("digits", *TORCHVISION)
FOLDER = Path(__file__).resolve().parent.parent / "data"


def reason(error: BaseException) -> str:
    """The last line of what an error says, or its name if it says nothing."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


kept: dict[str, Dataset] = {}


def load(name: str, folder: Path = FOLDER) -> Dataset:
    """The data set called `name`, one of DATASETS or the path of your own, read once in each process until `forget`."""
    if name not in kept:
        from readers import downloads, own  # they import this module

        kept.clear()
        if name in TORCHVISION:
            kept[name] = downloads.load_torchvision(name, folder)
        else:
            kept[name] = load_digits() if name == "digits" else own.load_own(Path(os.path.expanduser(name)))
    return kept[name]


def forget() -> None:
    """Read each data set anew when it is asked for again: its files may have changed."""
    kept.clear()


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


@np.errstate(all="ignore")  # what is not finite is refused
def make_split(
    dataset: Dataset, seed: int, examples: int | None = None, label_noise: float = 0.0, device: str = "cpu"
) -> Split:
    """Split a data set: a test part that is the same for every seed, so that nothing tuned with any seed has seen it;
    a validation part that the seed draws; and the first `examples` of the rest, in the seed's order, to train on.

    All parts are stratified. A larger training set contains the smaller ones of the same seed. `label_noise` is the
    share of TRAINING labels replaced by a wrong class. Pixels are standardised per channel with the training part's
    statistics; a constant one stays at zero. Raises LessonError when the data set has fewer than `examples` left for
    training, and when what a network would see is not finite.
    """
    available = len(dataset.y) - dataset.validation - (dataset.own_test or dataset.test)
    examples = available if examples is None else examples
    if not 0 < examples <= available:
        asked = f"{examples} training examples asked for, of a data set that has 1 to {available}"
        raise LessonError(f"{asked}; take a smaller --larger, or another --dataset")
    everything = stratified_order(dataset.y, np.random.default_rng(derive(0, "test")))
    if dataset.own_test:
        own = everything >= len(dataset.y) - dataset.own_test
        test, others = everything[own][: dataset.test], everything[~own]
    else:
        test, others = everything[: dataset.test], everything[dataset.test :]
    generator = np.random.default_rng(derive(seed, "split"))
    others = others[stratified_order(dataset.y[others], generator)]
    validation, train = others[: dataset.validation], others[dataset.validation :][:examples]
    pixels = dataset.x[train].astype(np.float32)
    mean, deviation, spread = (f(pixels, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std, np.ptp))
    first = pixels[:1, :, :1, :1]
    constant = (spread <= 1e-6 * np.abs(first)) | (deviation == 0)  # but for rounding
    mean[constant], deviation[constant] = first[constant], 1
    labels = mislabel(dataset.y[train], label_noise, dataset.task.classes, generator)

    def batch(part: np.ndarray, y: np.ndarray) -> Batch:
        x = torch.from_numpy((dataset.x[part].astype(np.float32) - mean) / deviation)
        if not (x.isfinite().all() and np.isfinite(deviation).all()):
            raise LessonError("images that hold NaN, infinity or too large numbers: mend them, or scale them to 0…1")
        return Batch(x.to(device), torch.from_numpy(y).to(device))

    return Split(batch(train, labels), batch(validation, dataset.y[validation]), batch(test, dataset.y[test]))
