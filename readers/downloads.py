"""The data sets that torchvision downloads."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from common.data import TORCHVISION, Dataset, LessonError, reason


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
