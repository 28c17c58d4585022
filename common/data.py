"""Data sets as tensors in memory, and the split that a seed draws from them."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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


def load_torchvision(name: str, folder: Path) -> Dataset:
    """One of TORCHVISION from `folder`, downloaded into it if it is not there: pixels 0…255, 1,000 images held out for
    validation, 2,000 of the data set's own test images for the test.

    Raises LessonError when torchvision cannot be imported, or the files are damaged or neither there nor to be had.
    """
    try:
        from torchvision import datasets  # imported late: it takes 1.8 s, and the digits do not need it
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # missing, or made for another torch
        way_out = f"install the torchvision that goes with torch {torch.__version__}, or use --dataset digits"
        raise LessonError(f"--dataset {name} needs torchvision: {reason(error)}; {way_out}") from None
    build = getattr(datasets, TORCHVISION[name])
    place = getattr(build, "base_folder", build.__name__)  # where the class keeps its files
    try:
        parts = [build(folder, train=train) for train in (True, False)]
    except RuntimeError as error:
        if "not found" not in str(error):  # then it is there, but not as it should be
            raise damaged(name, folder / place, reason(error)) from None
        download(name, build, folder, place)
        parts = [build(folder, train=train) for train in (True, False)]
    except (AssertionError, EOFError, IndexError, OSError, TypeError, ValueError) as error:
        raise damaged(name, folder / place, reason(error)) from None
    x, y = (np.concatenate([np.asarray(getattr(part, what)) for part in parts]) for what in ("data", "targets"))
    if len(x) != len(y) or len(np.unique(y)) != 10:
        raise damaged(name, folder / place, f"{len(x)} images, {len(y)} labels")
    x = x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    test = len(parts[1].data)
    return Dataset(x, y.astype(np.int64), validation=min(1000, test), test=min(2000, test), own_test=test)


def damaged(name: str, folder: Path, what: str) -> LessonError:
    """The error for files that cannot be read."""
    return LessonError(f"the files of {name} in {folder} are damaged ({what}); delete that folder and run again")


def download(name: str, build: Callable[..., Any], folder: Path, place: str) -> None:
    """Let torchvision fetch the data set into a folder aside, with copies of what is already there (archives whose
    checksum is right are not fetched again), and put it in place when it is whole. Raises LessonError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".download-") as aside:
            here, archive = folder / place, folder / getattr(build, "filename", "")
            if here.is_dir():
                shutil.copytree(here, Path(aside) / place, copy_function=shutil.copyfile)
            if archive.is_file():
                shutil.copyfile(archive, Path(aside) / archive.name)
            try:
                build(aside, download=True)
            except (RuntimeError, OSError, EOFError) as error:
                way_out = "connect to a network, put its files there yourself, or use --dataset digits"
                text = f"{name} is not in {folder}, or not whole, and cannot be downloaded: {reason(error)}; {way_out}"
                raise LessonError(text) from None
            if here.exists():
                os.replace(here, Path(aside) / "replaced")
            os.replace(Path(aside) / place, here)
    except OSError as error:
        raise LessonError(f"argument --data-dir: cannot write to {folder} ({error.strerror}); choose another") from None


def load_npz(path: Path) -> Dataset:
    """Your own images, from a file that numpy.savez wrote: `x` (N, H, W) or (N, C, H, W), square, and `y` (N,), whole
    numbers from 0. A fifth, at most 1,000, is held out for validation; a fifth, at most 2,000, for the test. Raises
    LessonError for a file that is not there, cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            x, y = arrays["x"], arrays["y"]
            x = x[:, None] if x.ndim == 3 else x
    except Exception as error:  # a file may be broken in any way
        wanted = f"the arrays x and y, as numpy.savez writes them, cannot be read from {path}"
        raise LessonError(f"argument --dataset: {wanted} ({reason(error)})") from None
    square = x.ndim == 4 and x.size and x.shape[2] == x.shape[3] >= 8
    if not square or x.dtype.kind not in "uif" or y.shape != x.shape[:1]:
        shapes = f"x {x.shape} and y {y.shape}"
        raise LessonError(f"argument --dataset: {path} has {shapes}; wanted (N, H, H) or (N, C, H, H), H ≥ 8, and (N,)")
    if y.dtype.kind not in "ui" or not np.array_equal(np.unique(y), np.arange(y.max() + 1)) or y.max() < 1:
        raise LessonError(f"argument --dataset: the labels y in {path} must be whole numbers 0, 1, 2, …, each used")
    with np.errstate(all="ignore"):
        spread = x.astype(np.float32).std((0, 2, 3))
    if not (np.isfinite(spread) & (spread > 0)).all():
        raise LessonError(f"argument --dataset: the images x in {path} hold NaN, infinity, or a channel of one colour")
    fifth = len(y) // 5
    return Dataset(x, y.astype(np.int64), validation=min(fifth, 1000), test=min(fifth, 2000))


kept: dict[str, Dataset] = {}


def load(name: str, folder: Path = FOLDER) -> Dataset:
    """The data set called `name`, one of DATASETS or the path of an .npz file, read once in each process."""
    if name not in kept:
        kept.clear()
        if name.endswith(".npz"):
            kept[name] = load_npz(Path(os.path.expanduser(name)))
        else:
            kept[name] = load_digits() if name == "digits" else load_torchvision(name, folder)
    return kept[name]


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
    share of TRAINING labels replaced by a wrong class. Pixels are standardised per channel with the training part's
    statistics. Raises LessonError when the data set has fewer than `examples` left for training.
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
    mean, deviation = (f(axis=(0, 2, 3), keepdims=True) for f in (pixels.mean, pixels.std))
    labels = mislabel(dataset.y[train], label_noise, dataset.task.classes, generator)

    def batch(part: np.ndarray, y: np.ndarray) -> Batch:
        x = torch.from_numpy((dataset.x[part].astype(np.float32) - mean) / deviation)
        return Batch(x.to(device), torch.from_numpy(y).to(device))

    return Split(batch(train, labels), batch(validation, dataset.y[validation]), batch(test, dataset.y[test]))
