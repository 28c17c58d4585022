"""Your own images, from an .npz file or from a folder of images by class."""

import math
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.data import Dataset, LessonError, reason

LIMIT = 4 * 2**30  # bytes in 32-bit numbers: every process that trains holds copies, and a laptop has 16 GiB
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision
HIDDEN = (".", "__MACOSX")  # how names begin that systems and archives put beside yours
SMALLEST, LARGEST, SIDE = 8, 64, 32  # images of one square size between the first two keep it; others get the third
X, Y, RELABELLED = "d['x']", "d['y']", "np.unique(d['y'].ravel(), return_inverse=True)[1]"
FILE = "numpy.savez('mine.npz', x=np.stack(images), y=np.unique(labels, return_inverse=True)[1]), or a folder of images"
ARRAYS = "x (N, H, H) or (N, C, H, H), numbers, H ≥ 8; y (N,), a whole number for each image: 0, 1, 2, …"


def load_own(path: Path) -> Dataset:
    """Your own images and their classes: see `read_npz` and `read_folder`. A fifth, at most 1,000, is held out for
    validation; a fifth, at most 2,000, for the test. Raises LessonError, of one line, for anything else.
    """
    try:
        with warnings.catch_warnings():
            for kind in (UserWarning, RuntimeWarning):  # what numpy and Pillow find odd in a file
                warnings.simplefilter("error", kind)
            x, y, classes = read_folder(path) if path.is_dir() else read_npz(path)
            check_pixels(path, x)
            check_counts(path, y, classes)
    except LessonError:
        raise
    except Exception as error:  # a file may be broken in any way
        raise refused(path, f"cannot be read ({reason(error)})", FILE) from None
    fifth = len(y) // 5
    return Dataset(x, y, validation=min(fifth, 1000), test=min(fifth, 2000))


def refused(path: Path, found: str, wanted: str, x: str = X, y: str = Y) -> LessonError:
    """The error, one line, for a file or folder. Where its arrays `d` hold what is wanted in another form, `x` and `y`
    are the expressions that make it, and the line ends in the command that does; where not, one of the two is empty.
    """
    command = ""
    if x and y and (x, y) != (X, Y):
        code = f"import numpy as np; d = np.load({path.as_posix()!r}); np.savez('fixed.npz', x={x}, y={y})"
        for_any_shell = not set('"$`\\!') & set(code)
        command = "; this makes it: python -c " + (f'"{code}"' if for_any_shell else shlex.quote(code))
    text = f"argument --dataset: {path}: {found}; wanted {wanted}{command}"
    return LessonError(" ".join(text.splitlines()))  # a name can hold anything


def check_size(path: Path, size: int) -> None:
    """Raise LessonError for more bytes than LIMIT."""
    if size > LIMIT:
        raise refused(path, f"{size / 2**30:,.1f} GiB of images", f"at most {LIMIT >> 30}: fewer, or smaller ones")


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, C, H, H), labels (N,) int64 and the classes' names, from a file that numpy.savez wrote, of any name:
    `x` (N, H, H) or (N, C, H, H), H ≥ 8, of any kind of real numbers, or true and false; `y` (N,), whole numbers from
    0, of which each occurs. Nothing in it is unpickled. Raises LessonError, or anything that numpy and zipfile raise.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is a device or a pipe")
    with np.lib.npyio.NpzFile(path) as arrays:  # np.load would take any other file for a pickle
        check_names(path, arrays.files)
        members = [each for each in arrays.zip.infolist() if each.filename in ("x.npy", "y.npy")]
        check_size(path, sum(each.file_size for each in members))  # no more than this is ever unpacked
        x, y = np.asarray(arrays["x"]), np.asarray(arrays["y"])
    check_size(path, 4 * x.size)
    ways = way_to_images(x, y), way_to_labels(y)
    if ways != (X, Y):
        found = f"x {x.shape} {x.dtype} and y {y.shape} {y.dtype}, which begins with {y.flat[:3].tolist()!s:.60}"
        raise refused(path, found, ARRAYS, *ways)
    x = x.astype(np.uint8) if x.dtype == bool else x
    return x[:, None] if x.ndim == 3 else x, y.astype(np.int64), list(map(str, range(int(y.max()) + 1)))


def check_names(path: Path, names: list[str]) -> None:
    """Raise LessonError if arrays of these names are not x and y; those of Keras, or a pair, can become them."""
    if {"x", "y"} <= set(names):
        return
    x, y = (f"d[{name!r}]" for name in names) if len(names) == 2 else ("", "")
    if {"x_train", "y_train", "x_test", "y_test"} <= set(names):
        x, y = (f"np.concatenate([d['{each}_train'], d['{each}_test']])" for each in "xy")
    raise refused(path, f"the arrays {', '.join(map(repr, names[:6]))}", "two, 'x' (images) and 'y' (labels)", x, y)


def way_to_images(x: np.ndarray, y: np.ndarray) -> str:
    """The expression that makes images (N, H, H) or (N, C, H, H) of d['x']: X if it holds them, "" if there is none."""
    if x.dtype.kind not in "buif" or x.size == 0 or x.ndim not in (2, 3, 4):
        return ""
    if x.shape[:1] != y.shape[:1]:
        return f"np.moveaxis({X}, -1, 0)" if x.shape[-1:] == y.shape[:1] else ""
    if x.ndim == 2:
        channels = 1 if math.isqrt(x.shape[1]) ** 2 == x.shape[1] else 3
        side = math.isqrt(x.shape[1] // channels)
        return f"{X}.reshape(-1, {channels}, {side}, {side})" if channels * side**2 == x.shape[1] else ""
    height, width = x.shape[-2:]
    if x.ndim == 4 and height != width and (width < SMALLEST <= height or height == x.shape[1]):
        return f"{X}.transpose(0, 3, 1, 2)"
    if height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return f"{X}[..., {top}:{top + side}, {left}:{left + side}]"
    times = math.ceil(SMALLEST / height)
    return f"{X}.repeat({times}, -1).repeat({times}, -2)" if times > 1 else X


def way_to_labels(y: np.ndarray) -> str:
    """The expression that makes labels (N,) = 0, 1, 2, … of d['y']: Y if it holds them, "" if there is none."""
    number = y.dtype.kind in "buif"
    if y.size == 0 or y.ndim not in (1, 2) or not (number or y.dtype.kind in "US"):
        return ""
    if y.ndim == 2 and y.shape[1] > 1:
        one_hot = number and (y.sum(1) == 1).all() and (y.max(1) == 1).all()
        return f"{Y}.argmax(1)" if one_hot else ""
    if y.dtype.kind == "f" and not (np.isfinite(y) & (y == np.round(y))).all():
        return ""
    values = np.unique(y).tolist()  # Python's whole numbers, which do not overflow
    return Y if y.ndim == 1 and y.dtype.kind in "bui" and values == list(range(len(values))) else RELABELLED


def check_pixels(path: Path, x: np.ndarray) -> None:
    """Raise LessonError if pixels (N, C, H, W), standardised by any part of the images, would not be finite, or zero
    everywhere, or zero in a channel that varies: float32 must hold their squares and tell a channel's pixels apart.
    """
    with np.errstate(all="ignore"):
        lowest, highest = x.min((0, 2, 3)).astype(float), x.max((0, 2, 3)).astype(float)
        size, spread = np.maximum(abs(lowest), abs(highest)), highest - lowest
    if not np.isfinite(size).all():
        way_out = f"np.nan_to_num({X}, posinf=0, neginf=0)"
        raise refused(path, "images with NaN or infinity", "finite numbers", x=way_out)
    found = f"pixels from {lowest.min():g} to {highest.max():g}"
    if (spread == 0).all():
        raise refused(path, f"{found}, in each channel all the same", "images that differ")
    if (size > 1e12).any() or (spread[spread > 0] < np.maximum(1e-12, 1e-6 * size[spread > 0])).any():
        way_out = f"({X} - {X}.min()) / ({X}.max() - {X}.min())"
        raise refused(path, f"{found}, in 32 bits no longer told apart", "pixels such as 0…1 or 0…255", x=way_out)


def check_counts(path: Path, y: np.ndarray, classes: list[str]) -> None:
    """Raise LessonError for one class, or one that is too rare to occur in training, validation and test part."""
    counts, least = np.bincount(y).tolist(), max(5, math.ceil(len(y) / 1000))
    rarest = counts.index(min(counts))
    if len(counts) < 2 or counts[rarest] < least:
        found = f"{len(counts)} classes, and {counts[rarest]} of its {len(y)} images are of class {classes[rarest]}"
        raise refused(path, found, f"two classes or more, {least} images or more of each")


def read_folder(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, C, H, H) uint8, labels (N,) int64 and the classes' names, from a folder with a folder for each class,
    numbered by name, as torchvision's ImageFolder reads it. Hidden files and links to folders in a class are left out.

    Images of one square size, 8 to 64, keep it; else all are brought to 32 × 32: the shorter side resized, the middle
    cut out. They are turned as the camera noted, what is transparent is white, 16 bits become 8, and there are three
    channels, or one where no image has a colour. Raises LessonError, which names an image that cannot be read.
    """
    folders = [each for each in path.iterdir() if each.is_dir() and not each.name.startswith(HIDDEN)]
    files = {each.name: images_in(each) for each in sorted(folders, key=attrgetter("name"))}
    check_folders(path, files)
    paths = [file for group in files.values() for file in group]
    sizes = set()
    for file in paths:
        with opened(file) as image:
            sizes.add(image.size)
    width, height = max(sizes)
    side = width if len(sizes) == 1 and SMALLEST <= width == height <= LARGEST else SIDE
    check_size(path, 4 * 3 * side**2 * len(paths))
    x = np.empty((len(paths), side, side, 3), np.uint8)
    for i, file in enumerate(paths):
        with opened(file) as image:
            x[i] = pixels(image, side)
    channels = 1 if (x == x[..., :1]).all() else 3
    y = np.repeat(np.arange(len(files)), [len(group) for group in files.values()])
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)[:, :channels]), y, list(files)


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and in those below it, by name."""
    images = [each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file()]
    images = [each for each in images if not any(part.startswith(HIDDEN) for part in each.relative_to(folder).parts)]
    return sorted(images, key=Path.as_posix)


def check_folders(path: Path, files: dict[str, list[Path]]) -> None:
    """Raise LessonError if the folders with these images are not two classes or more."""
    found = f"the folders {', '.join(list(files)[:6]) or '(none)'}"
    parts = {name.lower(): path / name for name in files}
    train = parts.get("train", parts.get("training"))
    if train and parts.keys() & {"test", "testing", "val", "valid", "validation"}:
        raise refused(path, found, f"one folder for each class: --dataset {shlex.quote(str(train))}")
    if len(files) < 2:
        raise refused(path, found, f"two or more, one for each class, such as {path / 'cats' / '1.png'}")
    for name, images in files.items():
        if not images:
            raise refused(path, f"no image in {name}", f"{', '.join(SUFFIXES)} in each folder, or no such folder")


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """An image to work on. Raises LessonError, which names its file, if that fails."""
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:  # a file may be broken in any way
        raise refused(file, f"cannot be read ({reason(error)})", "a whole image, or none") from None


def pixels(image: Image.Image, side: int) -> np.ndarray:
    """The pixels (side, side, 3) of an image, as `read_folder` says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits; wanted 8 or 16")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side)))
