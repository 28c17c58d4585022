"""A reader's own images: what is taken, and the one line for everything else, with the command that mends it."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import urllib.request
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from common import data
from common.data import DATASETS, LessonError, Task, load, make_split
from common.lesson import parse
from readers import own
from readers.own import load_own

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(200, 3, 8, 8)), np.arange(200) % 4
BYTES = RNG.integers(0, 256, (60, 16, 16, 3), np.uint8)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "mine.npz"


def refusal(path: Path) -> str:
    """The one line that a file is refused in, without what all of them begin with."""
    with pytest.raises(LessonError) as error:
        load_own(path)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    start = f"argument --dataset: {' '.join(str(path).splitlines())}"
    assert text.startswith(start)
    assert "; wanted " in text
    return text.removeprefix(start)


def mend(message: str, folder: Path) -> Path:
    """Run the command that a message ends in; returns the file that it made."""
    command = message.partition("; this makes it: python -c ")[2]
    assert command, message
    with contextlib.chdir(folder):
        exec(*shlex.split(command), {})
    return folder / "fixed.npz"


# What is taken


@pytest.mark.parametrize(
    ("x", "y", "task"),
    [
        (X, Y, ((3, 8, 8), 4)),
        (X[:, 0], Y, ((1, 8, 8), 4)),
        (RNG.integers(0, 256, (60, 3, 9, 9), np.uint8), np.arange(60) % 2, ((3, 9, 9), 2)),
        (RNG.random((60, 33, 33)), np.arange(60) % 2, ((1, 33, 33), 2)),
        (RNG.random((60, 10, 8, 8)).astype(np.float16), np.arange(60) % 2, ((10, 8, 8), 2)),
        (RNG.random((500, 1, 8, 8)), np.arange(500) % 100, ((1, 8, 8), 100)),
        (RNG.random((500, 1, 8, 8)), (np.arange(500) % 100).astype(np.int8), ((1, 8, 8), 100)),
        (RNG.random((1280, 1, 8, 8)), (np.arange(1280) % 128).astype(np.int8), ((1, 8, 8), 128)),
        (RNG.random((2560, 1, 8, 8)), (np.arange(2560) % 256).astype(np.uint8), ((1, 8, 8), 256)),
        (RNG.random((1000, 8, 8)), (np.arange(1000) % 66 == 0).astype(np.uint64), ((1, 8, 8), 2)),  # 1.6 %
        (RNG.random((60, 8, 8)) > 0.5, np.arange(60) % 2, ((1, 8, 8), 2)),
        (RNG.random((60, 8, 8)), np.arange(60) % 2 == 0, ((1, 8, 8), 2)),
        (RNG.integers(-(2**31), 2**31, (60, 8, 8)), np.arange(60) % 2, ((1, 8, 8), 2)),
        (RNG.random((60, 8, 8)).astype(">f8"), (np.arange(60) % 2).astype(">i2"), ((1, 8, 8), 2)),
        (np.asfortranarray(X), Y, ((3, 8, 8), 4)),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_and_labels_of_many_kinds_are_taken_as_they_are(file, x, y, task, save):
    save(file, x=x, y=y)
    found = load_own(file)
    assert found.task == Task(*task)
    assert type(found.task.classes) is int
    assert found.y.dtype == np.int64
    np.testing.assert_array_equal(found.x.reshape(x.shape), x)
    np.testing.assert_array_equal(found.y, y)
    fifth = len(y) // 5
    split = make_split(found, 0)
    assert [len(part.y) for part in split] == [len(y) - 2 * fifth, fifth, fifth]
    for part in split:
        assert part.x.dtype == torch.float32
        assert part.x.isfinite().all()
        assert len(part.y.unique()) == task[1]


def test_a_fifth_is_held_out_up_to_a_limit(file):
    found = load_own(saved(file, x=RNG.random((12_000, 8, 8)), y=np.arange(12_000) % 4))
    assert (found.validation, found.test) == (1000, 2000)


@pytest.mark.parametrize("constant", [255, 0])
def test_a_constant_channel_is_taken_where_others_vary(file, constant):
    """An alpha channel, or an empty blue one."""
    x = np.concatenate([BYTES.transpose(0, 3, 1, 2), np.full((60, 1, 16, 16), constant, np.uint8)], 1)
    assert load_own(saved(file, x=x, y=np.arange(60) % 3)).task == ((4, 16, 16), 3)


@pytest.mark.parametrize(
    "name", ["own data [final].npz", "数字 – é.npz", "it's $HOME `x`!.npz", "MINE.NPZ", "mine.data"]
)
def test_a_file_may_have_any_name_and_its_command_still_works(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as stream:  # numpy.savez would add an ending
        np.savez(stream, x=X, y=Y + 1)
    command = refusal(path).partition("; this makes it: python ")[2]
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True, cwd=tmp_path)
    assert load_own(tmp_path / "fixed.npz").task == ((3, 8, 8), 4)


def test_a_name_on_two_lines_is_told_on_one(tmp_path):
    assert "No such file" in refusal(tmp_path / "one\ntwo.npz")


# What has another form, and the command that makes the wanted one


@pytest.mark.parametrize(
    ("x", "y", "found", "task"),
    [
        (BYTES, np.arange(60) % 3, r"x (60, 16, 16, 3) uint8 and y (60,) int64", ((3, 16, 16), 3)),
        (BYTES[..., :1], np.arange(60) % 3, "x (60, 16, 16, 1) uint8", ((1, 16, 16), 3)),
        (BYTES[:, :, :10], np.arange(60) % 3, "x (60, 16, 10, 3) uint8", ((3, 10, 10), 3)),
        (RNG.random((60, 16, 16, 10)), np.arange(60) % 3, "x (60, 16, 16, 10)", ((10, 16, 16), 3)),
        (BYTES.transpose(1, 2, 3, 0), np.arange(60) % 3, "x (16, 16, 3, 60)", ((3, 16, 16), 3)),
        (BYTES[..., 0].transpose(1, 2, 0), np.arange(60) % 3, "x (16, 16, 60)", ((1, 16, 16), 3)),
        (BYTES[..., 0].reshape(60, -1), np.arange(60) % 3, "x (60, 256)", ((1, 16, 16), 3)),
        (BYTES.transpose(0, 3, 1, 2).reshape(60, -1), np.arange(60) % 3, "x (60, 768)", ((3, 16, 16), 3)),
        (RNG.random((200, 8, 11)), Y, "x (200, 8, 11)", ((1, 8, 8), 4)),
        (RNG.random((200, 3, 14, 9)), Y, "x (200, 3, 14, 9)", ((3, 9, 9), 4)),
        (RNG.random((200, 3, 4, 4)), Y, "x (200, 3, 4, 4)", ((3, 8, 8), 4)),
        (RNG.random((200, 3, 7, 5)), Y, "x (200, 3, 7, 5)", ((3, 10, 10), 4)),
        (X, Y + 1, "y (200,) int64, which begins with [1, 2, 3]", ((3, 8, 8), 4)),
        (X, Y * 2, "begins with [0, 2, 4]", ((3, 8, 8), 4)),
        (X, Y - 1, "begins with [-1, 0, 1]", ((3, 8, 8), 4)),
        (X, Y * 1.0, "y (200,) float64, which begins with [0.0, 1.0, 2.0]", ((3, 8, 8), 4)),
        (X, Y + 4006381333931, "begins with [4006381333931,", ((3, 8, 8), 4)),
        (X, Y.astype(np.uint64) + np.uint64(2**64 - 9), "y (200,) uint64", ((3, 8, 8), 4)),
        (X, np.array(["cat", "dog", "eel", "fly"])[Y], "y (200,) <U3, which begins with ['cat', 'dog', 'eel']", None),
        (X, np.array([b"cat", b"dog", b"eel", b"fly"])[Y], "y (200,) |S3", ((3, 8, 8), 4)),
        (X, Y[:, None], "y (200, 1) int64, which begins with [0, 1, 2]", ((3, 8, 8), 4)),
        (X, Y[:, None] + 1.0, "y (200, 1) float64", ((3, 8, 8), 4)),
        (X, np.eye(4)[Y], "y (200, 4) float64", ((3, 8, 8), 4)),
        (X, np.eye(4, dtype=bool)[Y], "y (200, 4) bool", ((3, 8, 8), 4)),
        (X.transpose(0, 2, 3, 1), Y[:, None] + 1, "x (200, 8, 8, 3) float64 and y (200, 1) int64", ((3, 8, 8), 4)),
    ],
)
def test_the_line_ends_in_the_command_that_makes_what_is_wanted(file, tmp_path, x, y, found, task):
    message = refusal(saved(file, x=x, y=y))
    assert found in message
    assert "wanted x (N, H, H) or (N, C, H, H), numbers, H ≥ 8; y (N,), a whole number for each image" in message
    for _ in range(2):  # a second fault of shape shows when the first is mended
        made = mend(message, tmp_path)
        try:
            dataset = load_own(made)
            break
        except LessonError as error:
            message = str(error)
    assert dataset.task == (task or ((3, 8, 8), 4))
    counts = np.bincount(dataset.y)
    assert counts.tolist() == [len(dataset.y) // len(counts)] * len(counts)


def test_commands_put_every_pixel_and_label_where_it_belongs(file, tmp_path):
    y = RNG.permutation(np.arange(60) % 3)
    words = np.array(["b", "c", "a"])[y]
    found = load_own(mend(refusal(saved(file, x=BYTES, y=words)), tmp_path))
    np.testing.assert_array_equal(found.x, BYTES.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(np.array(["a", "b", "c"])[found.y], words)
    flat = load_own(mend(refusal(saved(file, x=BYTES[..., 0].reshape(60, -1), y=y)), tmp_path))
    np.testing.assert_array_equal(flat.x[:, 0], BYTES[..., 0])
    crop = load_own(mend(refusal(saved(file, x=BYTES[:, :10, :, 0], y=y)), tmp_path))
    np.testing.assert_array_equal(crop.x[:, 0], BYTES[:, :10, 3:13, 0])
    last = load_own(mend(refusal(saved(file, x=BYTES[..., 0].transpose(1, 2, 0), y=y)), tmp_path))
    np.testing.assert_array_equal(last.x[:, 0], BYTES[..., 0])


def test_arrays_of_other_names(file, tmp_path):
    parts = {"x_train": BYTES[:40, ..., 0], "y_train": Y[:40], "x_test": BYTES[40:, ..., 0], "y_test": Y[40:60]}
    message = refusal(saved(file, **parts))
    assert "the arrays 'x_train', 'y_train', 'x_test', 'y_test'; wanted two, 'x' (images) and 'y' (labels)" in message
    found = load_own(mend(message, tmp_path))
    np.testing.assert_array_equal(found.x[:, 0], BYTES[..., 0])
    np.testing.assert_array_equal(found.y, Y[:60])
    np.savez(file, X, Y)
    message = refusal(file)
    assert "the arrays 'arr_0', 'arr_1'; wanted" in message
    assert load_own(mend(message, tmp_path)).task == ((3, 8, 8), 4)
    assert refusal(saved(file, x=X)).endswith("the arrays 'x'; wanted two, 'x' (images) and 'y' (labels)")
    assert "the arrays 'a0', 'a1', 'a2', 'a3', 'a4', 'a5'; wanted" in refusal(
        saved(file, **{f"a{i}": Y for i in range(9)})
    )


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (X * 1e200, "in 32 bits no longer told apart"),
        (X * 1e30, "pixels from -"),  # whose squares float32 cannot hold
        ((X * 1e30).astype(np.float32), "in 32 bits no longer told apart"),
        (X * 1e-40, "in 32 bits no longer told apart"),
        ((X * 1e-40).astype(np.float32), "in 32 bits no longer told apart"),
        (X + 1e9, "in 32 bits no longer told apart"),
        (X * np.array([1, 1, 1e-40]).reshape(3, 1, 1), None),  # one channel would vanish
        (np.where(X > 2, np.nan, X), "images with NaN or infinity; wanted finite numbers"),
        (np.where(X > 2, np.inf, X), "images with NaN or infinity"),
        (np.where(X > 2, -np.inf, X).astype(np.float16), "images with NaN or infinity"),
    ],
)
def test_what_the_network_would_see_is_finite_and_not_lost(file, tmp_path, x, found):
    message = refusal(saved(file, x=x, y=Y))
    assert (found or "") in message
    if found:
        split = make_split(load_own(mend(message, tmp_path)), 0)
        for part in split:
            assert part.x.isfinite().all()
            assert 0.5 < part.x.std() < 2


@pytest.mark.parametrize("scale", [1e12 / 6, 1e-11])
def test_pixels_within_the_bounds_stay_finite_wherever_an_odd_one_is(file, scale):
    """One odd pixel, in the validation or the test part as likely as in the training part."""
    for odd in range(20):
        x = np.where(np.arange(200) == odd, 5e11, scale * X[:, 0].T).T
        for part in make_split(load_own(saved(file, x=x, y=Y)), 0):
            assert part.x.isfinite().all()


# What cannot be mended by a command


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"y": Y[:199]}, "x (200, 3, 8, 8) float64 and y (199,) int64"),
        ({"x": RNG.random((200, 65))}, "x (200, 65)"),
        ({"x": RNG.random((200, 1, 1, 8, 8))}, "x (200, 1, 1, 8, 8)"),
        ({"x": np.float64(3)}, "x () float64"),
        ({"x": np.zeros((0, 8, 8)), "y": np.zeros(0, int)}, "x (0, 8, 8) float64 and y (0,) int64"),
        ({"x": np.zeros((200, 0, 8, 8))}, "x (200, 0, 8, 8)"),
        ({"x": X + 1j}, "complex128"),
        ({"x": np.full((200, 8, 8), "a")}, "<U1"),
        ({"x": np.zeros((200, 8, 8), "M8[s]")}, "datetime64[s]"),
        ({"x": np.zeros((200, 8, 8), [("r", "u1"), ("g", "u1")])}, "[('r', 'u1'), ('g', 'u1')]"),
        ({"y": np.zeros(200, [("class", "i4")])}, "[('class', '<i4')]"),
        ({"y": Y + 0.5}, "float64, which begins with [0.5, 1.5, 2.5]"),
        ({"y": np.where(Y == 1, np.nan, Y)}, "float64, which begins with [0.0, nan, 2.0]"),
        ({"y": RNG.random((200, 4))}, "y (200, 4) float64"),
        ({"y": np.maximum(np.eye(4)[Y], np.eye(4)[0])}, "y (200, 4) float64, which begins with [1.0, 0.0, 0.0]"),
        ({"y": np.float64(3)}, "y () float64"),
        ({"x": np.full((200, 8, 8), 7, np.uint8)}, "pixels from 7 to 7, in each channel all the same; wanted images"),
        ({"x": np.ones((200, 2, 8, 8)) * [[[0.0]], [[1.0]]]}, "pixels from 0 to 1, in each channel all the same"),
        ({"y": np.zeros(200, int)}, "1 classes, and 200 of its 200 images are of class 0; wanted two classes or more"),
        (
            {"y": np.r_[Y[:-4] % 2, 2, 2, 2, 2]},
            "4 of its 200 images are of class 2; wanted two classes or more, 5 images",
        ),
        ({"y": np.arange(200)}, "200 classes, and 1 of its 200 images are of class 0"),
        ({"x": X[:4], "y": Y[:4] % 2}, "2 of its 4 images are of class 0"),
        ({"x": np.zeros((9000, 8, 8)), "y": np.arange(9000) < 8}, "all the same"),
        ({"x": np.arange(9000).repeat(64).reshape(-1, 8, 8), "y": np.arange(9000) < 8}, "9 images or more of each"),
    ],
)
def test_a_file_that_holds_something_else_is_one_line(file, arrays, found):
    message = refusal(saved(file, **({"x": X, "y": Y} | arrays)))
    assert found in message
    assert "python -c" not in message


@pytest.mark.parametrize("name", ["x", "y"])
def test_python_objects_are_not_loaded(file, tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "loaded",))

    message = refusal(saved(file, **({"x": X, "y": Y} | {name: np.array([Bomb()] * 200)})))
    assert "cannot be read (Object arrays cannot be loaded" in message
    way_out = "numpy.savez('mine.npz', x=np.stack(images), y=np.unique(labels, return_inverse=True)[1])"
    assert f"wanted {way_out}, or a folder of images" in message
    assert not (tmp_path / "loaded").exists()


def test_no_file_no_archive_and_damaged_ones(file, tmp_path):
    message = refusal(file)
    assert "cannot be read ([Errno 2] No such file or directory" in message
    assert "wanted numpy.savez('mine.npz', x=" in message
    np.savez_compressed(file, x=X, y=Y)
    small = file.read_bytes()
    whole = saved(file, x=X, y=Y).read_bytes()
    holes = [content[:n] + bytes(50) + content[n + 50 :] for content in (small, whole) for n in (100, 2000)]
    for content in (b"", b"hello", b"PK\x03\x04 and no more", whole[:-9], whole[: len(whole) // 2], small[:-9], *holes):
        file.write_bytes(content)
        assert "cannot be read (" in refusal(file)
    np.save(tmp_path / "x.npy", X)
    assert "cannot be read (File is not a zip file); wanted numpy.savez(" in refusal(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("1,2")
    assert "cannot be read (File is not a zip file)" in refusal(tmp_path / "x.csv")
    assert "cannot be read (" in refusal(Path("null\0.npz"))
    assert "cannot be read (" in refusal(Path("a" * 300 + ".npz"))
    assert "<U5000" in refusal(saved(file, x=X, y=np.full(200, "a" * 5000)))


@pytest.mark.parametrize("seed", range(100))
def test_any_damage_is_one_line_or_none(file, seed):
    rng = np.random.default_rng(seed)
    (np.savez, np.savez_compressed)[seed % 2](file, x=BYTES[..., 0], y=Y[:60])
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    from_end = rng.random() < 0.5  # the directory of the archive is at its end, the heads of the arrays at the start
    places = rng.integers(0, 400, 4)
    content[-1 - places if from_end else places] = rng.integers(0, 256, 4)
    file.write_bytes(content.tobytes())
    message = ""
    try:
        load_own(file)
    except LessonError as error:
        message = str(error)
    assert "\n" not in message


def archive(file: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(f"{name}.npy", content)
    return file


def npy(shape: str, dtype: str, content: bytes = b"") -> bytes:
    """A file of numpy.save whose head says what it likes."""
    head = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


@pytest.mark.parametrize(
    "head",
    [
        npy("(1000000, 3, 1000, 1000)", "'<f8'"),  # 24 TB
        npy("(4294967296, 4294967296)", "'<f8'"),
        npy("(-1, 8, 8)", "'<f8'", bytes(512)),
        npy("(10, 8, 8)", "'<f8'", bytes(512)),
        npy("(1, 8, 8)", "'|O'", b"cos\nsystem\n(S'true'\ntR."),
        npy("(" * 3000, "'<f8'"),
        npy("(1,)", "'nonsense'"),
        npy("(1L, 8L, 8L)", "'<f8'", bytes(512)),  # as Python 2 wrote it: numpy warns
        b"no array",
        b"",
    ],
)
def test_a_head_that_lies_is_one_line(file, head):
    labels = npy("(10,)", "'<i8'", np.arange(10).tobytes())
    assert refusal(archive(file, x=head, y=labels))
    images = npy("(10, 8, 8)", "'<f8'", bytes(5120))
    assert refusal(archive(file, x=images, y=head))


def test_a_head_of_python_2_is_one_line_however_warnings_are_set(file):
    images, labels = npy("(10L, 8L, 8L)", "'<f8'", bytes(5120)), npy("(10,)", "'<i8'", np.arange(10).tobytes())
    warnings.simplefilter("default")
    assert "required additional header parsing" in refusal(archive(file, x=images, y=labels))


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_bomb_is_not_unpacked(file, monkeypatch, name):
    """The archive's directory says how much would be unpacked, and zipfile unpacks no more than that."""
    content = bytearray(saved(file, **({"x": X, "y": Y} | {name: X})).read_bytes())
    place = content.index(f"{name}.npy".encode(), content.index(b"PK\x01\x02")) - 46
    content[place + 24 : place + 28] = (2**32 - 2).to_bytes(4, "little")
    file.write_bytes(content)
    monkeypatch.setattr(np, "asarray", None)
    assert ": 4.0 GiB of images; wanted at most 4: fewer, or smaller ones" in refusal(file)


@pytest.mark.parametrize("limit", [60 * 256, 2 * 60 * 256])
def test_more_than_memory_is_one_line(file, monkeypatch, limit):
    """Before anything is unpacked, or when bytes would become numbers of four bytes each."""
    monkeypatch.setattr(own, "LIMIT", limit)
    assert "GiB of images; wanted at most 0: fewer, or smaller ones" in refusal(saved(file, x=BYTES[..., 0], y=Y[:60]))


def test_no_memory_is_one_line(file, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(own, "check_pixels", full)
    assert "cannot be read (MemoryError)" in refusal(saved(file, x=X, y=Y))


@pytest.mark.parametrize("offset", [10, 8], ids=["compression", "encryption"])
def test_an_archive_that_zipfile_cannot_unpack(file, offset):
    content = bytearray(saved(file, x=X, y=Y).read_bytes())
    for mark, start in ((b"PK\x03\x04", offset - 2), (b"PK\x01\x02", offset)):
        place = content.find(mark)
        while place >= 0:
            content[place + start] = 99 if offset == 10 else content[place + start] | 1
            place = content.find(mark, place + 1)
    file.write_bytes(content)
    assert "cannot be read (" in refusal(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_and_a_device_are_not_waited_for(file):
    os.mkfifo(file)
    assert "cannot be read (it is a device or a pipe)" in refusal(file)
    assert "cannot be read (it is a device or a pipe)" in refusal(Path("/dev/zero"))


def test_no_permission(file, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", str(file))

    saved(file, x=X, y=Y)
    monkeypatch.setattr(zipfile, "ZipFile", forbidden)  # whoever runs tests as root may read everything
    assert "cannot be read ([Errno 13] Permission denied" in refusal(file)


# A folder of images


def drawn(folder: Path, counts: dict[str, int], size: tuple[int, int] = (16, 16), kind: str = "png") -> Path:
    """A folder of images by class; the first pixel numbers each."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (*size[::-1], 3), np.uint8)
            pixels[0, 0] = number, i, 7
            Image.fromarray(pixels).save(folder / name / f"{i:03}.{kind}")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return drawn(tmp_path / "pictures", {"dogs": 6, "Cats": 8, "eels": 5})


def test_images_of_one_square_size_are_taken_as_they_are(folder):
    from torchvision.datasets import ImageFolder

    found, reference = load_own(folder), ImageFolder(folder)
    assert found.task == ((3, 16, 16), 3)
    assert found.y.tolist() == reference.targets
    assert (found.x.dtype, found.x.flags.c_contiguous) == (np.uint8, True)
    for x, (image, _) in zip(found.x, reference, strict=True):
        np.testing.assert_array_equal(x, np.asarray(image).transpose(2, 0, 1))
    assert (found.validation, found.test) == (3, 3)


@pytest.mark.parametrize("size", [(40, 50), (7, 7), (65, 65), (300, 2)])
def test_others_become_squares_of_32(tmp_path, size):
    assert load_own(drawn(tmp_path, {"a": 5, "b": 5}, size)).task == ((3, 32, 32), 2)


def test_sizes_may_differ_and_the_middle_is_kept(tmp_path):
    drawn(tmp_path, {"a": 5, "b": 5}, (64, 64))
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = BYTES[0].repeat(2, 0).repeat(2, 1)
    Image.fromarray(wide).save(tmp_path / "a" / "000.png")
    found = load_own(tmp_path)
    assert found.task == ((3, 32, 32), 2)
    np.testing.assert_array_equal(found.x[0].transpose(1, 2, 0), wide[:, 32:64])
    drawn(tmp_path / "squares", {"a": 5}, (16, 16))
    assert load_own(drawn(tmp_path / "squares", {"b": 5}, (12, 12))).task == ((3, 32, 32), 2)


def test_every_format_of_torchvision_in_upper_and_lower_case(tmp_path):
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(own.SUFFIXES) == set(IMG_EXTENSIONS)
    drawn(tmp_path, {"a": 5, "b": 5})
    for ending in IMG_EXTENSIONS:
        image = Image.fromarray(BYTES[0])
        (image.convert("L") if ending == ".pgm" else image).save(tmp_path / "a" / f"new{ending}")
        shutil.copy(tmp_path / "a" / f"new{ending}", tmp_path / "b" / f"new{ending.upper()}")
    assert np.bincount(load_own(tmp_path).y).tolist() == [14, 14]


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGB", "I;16"])
def test_images_without_colour_have_one_channel(tmp_path, mode):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            grey = np.random.default_rng([ord(name), i]).integers(0, 256, (8, 8), np.uint8)
            image = Image.fromarray(grey if mode != "I;16" else grey * np.uint16(256) + 77)
            (image if mode == "I;16" else image.convert(mode)).save(tmp_path / name / f"{i}.png")
    found = load_own(tmp_path)
    assert found.task == ((1, 8, 8), 2)
    expected = np.where(grey > 127, 255, 0) if mode == "1" else grey
    if mode != "1":
        np.testing.assert_array_equal(found.x[-1, 0], expected)
    drawn(tmp_path / "more", {"a": 1}, (8, 8))
    shutil.move(tmp_path / "more" / "a" / "000.png", tmp_path / "a" / "colour.png")
    (tmp_path / "more" / "a").rmdir()
    (tmp_path / "more").rmdir()
    mixed = load_own(tmp_path)
    assert mixed.task == ((3, 8, 8), 2)
    np.testing.assert_array_equal(mixed.x[-1], found.x[-1].repeat(3, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Black letters on nothing, whose hidden colour is black, would be black on black."""
    drawn(tmp_path, {"a": 5, "b": 5})
    if mode == "P":
        image = Image.new("P", (16, 16))
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((3, 3), 1)
        image.save(tmp_path / "a" / "000.png", transparency=b"\x00\xff")  # Pillow warns of such a palette
    else:
        image = Image.new(mode, (16, 16))
        image.putpixel((3, 3), (0, 255) if mode == "LA" else (0, 0, 0, 255))
        image.save(tmp_path / "a" / "000.png")
    x = load_own(tmp_path).x[0]
    assert x[:, 3, 3].tolist() == ([255, 0, 0] if mode == "P" else [0, 0, 0])
    assert x.sum() == 255 * (3 * 255 + (mode == "P"))


def test_images_are_turned_as_the_camera_noted(tmp_path):
    drawn(tmp_path, {"a": 5, "b": 5})
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.fromarray(BYTES[0]).save(tmp_path / "a" / "000.png", exif=exif)
    np.testing.assert_array_equal(load_own(tmp_path).x[0].transpose(1, 2, 0), np.rot90(BYTES[0], -1))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_32_bits_are_refused(folder, mode):
    Image.new(mode, (16, 16)).save(folder / "dogs" / "new.tif")
    with pytest.raises(LessonError, match=r"new\.tif: cannot be read \(pixels of 32 bits; wanted 8 or 16\)"):
        load_own(folder)


def test_what_systems_put_beside_images_is_left_out(folder):
    before = load_own(folder)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._000.png", ".hidden.png", "photo.gif", "movie.mp4"):
        (folder / name).write_bytes(b"something")
        (folder / "dogs" / name).write_bytes(b"something")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(folder / "Cats", folder / name)
        shutil.copytree(folder / "Cats", folder / "dogs" / name)
    (folder / "000.png").write_bytes(b"loose")
    (folder / "dogs" / "folder.png").mkdir()
    found = load_own(folder)
    np.testing.assert_array_equal(found.x, before.x)
    np.testing.assert_array_equal(found.y, before.y)


def test_folders_in_a_class_are_of_the_class(folder):
    (folder / "dogs" / "large" / "brown").mkdir(parents=True)
    shutil.move(folder / "dogs" / "001.png", folder / "dogs" / "large" / "brown")
    assert np.bincount(load_own(folder).y).tolist() == [8, 6, 5]


def test_links(folder, tmp_path):
    """A link to an image or to a class is followed; a circle of them ends."""
    (folder / "dogs" / "circle").symlink_to(folder / "dogs")
    (folder / "dogs" / "self.png").symlink_to(folder / "dogs" / "self.png")
    (folder / "dogs" / "gone.png").symlink_to(folder / "dogs" / "nothing.png")
    (folder / "dogs" / "more.png").symlink_to(folder / "Cats" / "000.png")
    shutil.move(folder / "eels", tmp_path / "elsewhere")
    (folder / "eels").symlink_to(tmp_path / "elsewhere")
    assert np.bincount(load_own(folder).y).tolist() == [8, 7, 5]
    (folder / "pipe").symlink_to(folder)  # a "class" that holds all others
    assert "pipe" not in str(load_own(folder).y)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", BYTES.tobytes(), b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0 jpeg", b"P6\n9999999 9"],
)
def test_a_damaged_image_is_named(folder, content):
    (folder / "dogs" / "bad.png").write_bytes(content)
    with pytest.raises(
        LessonError, match=r"^argument --dataset: .*bad\.png: cannot be read \(.*\); wanted a whole"
    ) as error:
        load_own(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "bmp"])
def test_an_image_cut_short_is_named(tmp_path, kind):
    drawn(tmp_path, {"a": 5, "b": 5}, kind=kind)
    bad = tmp_path / "b" / f"003.{kind}"
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    with pytest.raises(LessonError, match=rf"003\.{kind}: cannot be read \(.*\); wanted a whole image, or none$"):
        load_own(tmp_path)


@pytest.mark.parametrize("side", [9_500, 14_000])
def test_a_bomb_of_an_image_is_named(folder, side):
    """Pillow warns of the smaller one and refuses the larger one."""
    Image.new("1", (side, side)).save(folder / "dogs" / "bomb.png")
    warnings.simplefilter("default")  # as readers have it
    with pytest.raises(LessonError, match=r"bomb\.png: cannot be read \(.*could be decompression bomb DOS attack"):
        load_own(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_among_images_is_not_waited_for(folder):
    os.mkfifo(folder / "dogs" / "pipe.png")
    assert len(load_own(folder).y) == 19


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train", "val"), ("Training", "Testing"), ("train", "valid", "x")]
)
def test_a_folder_of_parts_is_no_folder_of_classes(folder, tmp_path, names):
    for name in names:
        shutil.copytree(folder, tmp_path / "parts" / name)
    message = refusal(tmp_path / "parts")
    assert f"the folders {', '.join(sorted(names))}; wanted one folder for each class: --dataset" in message
    assert message.endswith(f"--dataset {tmp_path / 'parts' / names[0]}")
    assert load_own(Path(message.rpartition(" ")[2])).task.classes == 3


def test_a_class_may_be_called_train(tmp_path):
    assert load_own(drawn(tmp_path, {"train": 5, "bus": 5})).task.classes == 2


def test_folders_without_classes(folder, tmp_path):
    assert "the folders (none); wanted two or more, one for each class, such as " in refusal(folder / "dogs")
    assert "the folders pictures; wanted two or more, one for each class" in refusal(tmp_path)
    (folder / "apes").mkdir()
    assert "no image in apes; wanted .jpg, .jpeg, .png, " in refusal(folder)
    (folder / "apes").rmdir()
    (folder / "eels" / "004.png").unlink()
    found = "3 classes, and 4 of its 18 images are of class eels; wanted two classes or more, 5 images or more of each"
    assert found in refusal(folder)
    for file in folder.glob("*/*.png"):
        Image.new("RGB", (16, 16), "white").save(file)
    Image.new("RGB", (16, 16), "white").save(folder / "eels" / "004.png")
    assert "pixels from 255 to 255, in each channel all the same; wanted images that differ" in refusal(folder)


def test_a_folder_that_must_not_be_read(folder, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert "cannot be read ([Errno 13] Permission denied" in refusal(folder)


def test_more_images_than_memory_are_refused_before_they_are_read(folder, monkeypatch):
    monkeypatch.setattr(own, "LIMIT", 19 * 3 * 16 * 16 * 4 - 1)
    monkeypatch.setattr(own, "pixels", None)
    assert "GiB of images; wanted at most 0: fewer, or smaller ones" in refusal(folder)


# The option


def test_an_existing_file_or_folder_is_a_data_set(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (str(folder), "pictures", "pictures/", "~/pictures", "none.npz", "none.NPZ", "~nosuchuser/x.npz"):
        assert parse("99_fake", "A title", ["first"], ["--dataset", words]).dataset == words
    for words in ("pictures", "./pictures/", "~/pictures"):
        monkeypatch.setattr(data, "kept", {})
        assert load(words).task == ((3, 16, 16), 3)


@pytest.mark.parametrize("name", DATASETS)
def test_a_folder_does_not_hide_a_data_set(folder, tmp_path, monkeypatch, name):
    def no_network(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    folder.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "kept", {})
    if name == "digits":
        assert load(name).task == ((1, 8, 8), 10)
    else:
        with pytest.raises(LessonError, match=f"^{name} is not in .*no-downloads.* cannot be downloaded"):
            load(name, tmp_path / "no-downloads")
    assert load(f"./{name}").task == ((3, 16, 16), 3)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fashion_mnist", "fashion-mnist"),
        ("FashionMNIST", "fashion-mnist"),
        ("MNIST", "mnist"),
        ("cifar", "cifar10"),
        ("CIFAR-10", "cifar10"),
        ("Digits", "digits"),
        ("digit", "digits"),
        ("imagenet", None),
        ("no/such/folder", None),
        ("", None),
        ("a" * 5000, None),
        ("null\0", None),
    ],
)
def test_another_name_is_told_what_there_is(capsys, name, meant):
    with pytest.raises(SystemExit) as end:
        parse("99_fake", "A title", ["first"], ["--dataset", name])
    message = capsys.readouterr().err
    assert (end.value.code, message.count("\n")) == (2, 1)
    wanted = f"one of {', '.join(DATASETS)}, nor the path of an .npz file or of a folder of images"
    hint = f"; did you mean {meant}?" if meant else ""
    assert message == f"99_fake.py: argument --dataset: {name!r} is not {wanted}{hint} (see --help)\n"


def test_the_help_says_what_a_reader_can_give(capsys):
    with pytest.raises(SystemExit):
        parse("99_fake", "A title", ["first"], ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "or NAME.npz, or a folder with a folder of images per class" in told
