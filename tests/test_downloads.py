"""The data sets that torchvision reads, from tiny files in the real formats, and what goes wrong with them."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import data
from common.data import LessonError, make_split
from docs.record import read_record
from readers.downloads import load_torchvision

TRAIN, TEST = 60, 20
REAL_URLOPEN = urllib.request.urlopen
IDX = {"train": TRAIN, "t10k": TEST}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


def idx(values: np.ndarray) -> bytes:
    """An array of bytes in the IDX format: a magic number, the sizes, the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def images(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Images whose first pixel tells which they are."""
    x = np.random.default_rng(count).integers(0, 256, (count, *shape))
    x.reshape(count, -1)[:, 0] = np.arange(count)
    return x


def mnist_files() -> dict[str, bytes]:
    files = {}
    for part, count in IDX.items():
        files[f"{part}-images-idx3-ubyte"] = idx(images(count, (28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    return files


def write_mnist(folder: Path, place: str = "FashionMNIST") -> Path:
    raw = folder / place / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist_files().items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever asks for the network is told that there is none."""

    def refuse(*arguments, **settings):
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def archives(monkeypatch) -> dict[str, bytes]:
    """Fashion-MNIST's archives, small, with the checksums that torchvision now expects."""
    from torchvision.datasets import FashionMNIST

    made = {f"{name}.gz": gzip.compress(content) for name, content in mnist_files().items()}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in made.items()]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return made


@pytest.fixture
def mirror(monkeypatch, tmp_path, archives, no_network) -> Iterator[Path]:
    """A mirror of the archives that can be reached, on this machine."""
    from torchvision.datasets import FashionMNIST

    place = tmp_path / "mirror"
    place.mkdir()
    for name, content in archives.items():
        (place / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=place))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(urllib.request, "urlopen", REAL_URLOPEN)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    yield place
    server.shutdown()
    server.server_close()


def cifar_batch(count: int, seed: int) -> bytes:
    x = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    x[:, 1024] = 7  # the first green pixel
    return pickle.dumps({"data": x, "labels": [i % 10 for i in range(count)]})


@pytest.fixture
def cifar(monkeypatch, tmp_path) -> Path:
    """CIFAR-10's pickles, small, with the checksums that torchvision now expects."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: bytes) -> list[str]:
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", cifar_batch(10, i)) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", cifar_batch(20, 0))])
    name, md5 = write("batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


@pytest.mark.parametrize(
    ("name", "place"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_files_that_are_there_need_no_network(tmp_path, name, place):
    write_mnist(tmp_path, place)
    found = load_torchvision(name, tmp_path)
    assert found.task == ((1, 28, 28), 10)
    assert (found.x.dtype, len(found.x), found.own_test) == (np.uint8, TRAIN + TEST, TEST)
    assert (found.x[:TRAIN, 0] == images(TRAIN, (28, 28))).all()
    assert (found.y[TRAIN:] == np.arange(TEST) % 10).all()
    assert [path.name for path in tmp_path.iterdir()] == [place]


def test_cifar_has_three_channels(tmp_path, cifar):
    found = load_torchvision("cifar10", tmp_path / "data")
    assert found.task == ((3, 32, 32), 10)
    assert (found.x[:, 1, 0, 0] == 7).all()
    assert len(found.x) == 50 + 20


def test_the_test_is_taken_from_the_data_sets_own(tmp_path):
    write_mnist(tmp_path)
    found = load_torchvision("fashion-mnist", tmp_path)._replace(validation=15, test=10)
    splits = [make_split(found, seed, examples=40) for seed in (0, 1)]
    first = found.x[:, 0, 0, 0].astype(float)
    for split in splits:
        assert [len(part.y) for part in split] == [40, 15, 10]
        assert split.train.x.dtype == torch.float32
        assert split.train.x.mean().abs() < 1e-5
    assert torch.equal(splits[0].test.y, splits[1].test.y)
    pixels = found.x[:TRAIN].astype(float)
    low, high = pixels.min(), pixels.max()
    train = splits[0].train.x[:, 0, 0, 0]
    assert len(train.unique()) == 40  # the first pixel numbers the images of the training part: none is there twice
    assert first[:TRAIN].max() == TRAIN - 1
    assert high > low
    with pytest.raises(LessonError, match="1 to 45"):
        make_split(found, 0, examples=46)


def test_downloads_are_whole_or_absent(tmp_path, mirror):
    folder = tmp_path / "data"
    found = load_torchvision("fashion-mnist", folder)
    assert len(found.x) == TRAIN + TEST
    assert [path.name for path in folder.iterdir()] == ["FashionMNIST"]
    assert len(list((folder / "FashionMNIST" / "raw").iterdir())) == 8


def test_archives_that_are_there_are_not_fetched_again(tmp_path, archives):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in archives.items():
        (raw / name).write_bytes(content)
    assert len(load_torchvision("fashion-mnist", tmp_path).x) == TRAIN + TEST
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_network(tmp_path):
    with pytest.raises(LessonError, match=r"cannot be downloaded: .*no route to host.*use --dataset digits") as error:
        load_torchvision("mnist", tmp_path / "data")
    assert one_line(error)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("cut", [0, 3, 100])
def test_truncated_archive(tmp_path, archives, cut):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in archives.items():
        (raw / name).write_bytes(content[:cut] if "train-images" in name else content)
    before = tree(tmp_path)
    with pytest.raises(LessonError, match="not whole, and cannot be downloaded") as error:
        load_torchvision("fashion-mnist", tmp_path)
    assert one_line(error)
    assert tree(tmp_path) == before


def test_wrong_checksum_of_a_download(tmp_path, mirror):
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(LessonError, match=r"cannot be downloaded: .*corrupted") as error:
        load_torchvision("fashion-mnist", tmp_path / "data")
    assert one_line(error)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("cut", [0, 5, 20])
def test_truncated_files(tmp_path, name, cut):
    raw = write_mnist(tmp_path)
    (raw / name).write_bytes((raw / name).read_bytes()[:cut])
    with pytest.raises(LessonError, match=r"are damaged .*; delete that folder and run again") as error:
        load_torchvision("fashion-mnist", tmp_path)
    assert str(tmp_path / "FashionMNIST") in one_line(error)


def test_labels_of_other_images(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(TEST - 1) % 10))
    with pytest.raises(LessonError, match=f"{TRAIN + TEST} images, {TRAIN + TEST - 1} labels"):
        load_torchvision("fashion-mnist", tmp_path)


def test_a_damaged_pickle_is_fetched_anew_or_told(tmp_path, cifar):
    path = cifar / "data_batch_3"
    path.write_bytes(path.read_bytes()[:50])
    before = tree(tmp_path)
    with pytest.raises(LessonError, match=r"cifar10 is not in .* or not whole") as error:
        load_torchvision("cifar10", tmp_path / "data")
    assert one_line(error)
    assert tree(tmp_path) == before


def test_a_cifar_archive_that_is_there_is_unpacked(tmp_path, cifar, monkeypatch):
    from torchvision.datasets import CIFAR10

    archive = tmp_path / "data" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar, cifar.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for path in cifar.iterdir():
        path.unlink()
    assert len(load_torchvision("cifar10", tmp_path / "data").x) == 70


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LessonError, match="argument --data-dir: cannot write to"):
        load_torchvision("mnist", tmp_path)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(LessonError, match=r"argument --data-dir: cannot write to .* choose another") as error:
        load_torchvision("mnist", tmp_path / "data")
    assert one_line(error)


def run_lesson(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "14_dropout_regularization.py"), "--quick", "--only", "wrong_mode", *words]
    command += ["--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ImportError('no module named torchvision')", "no module named torchvision"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
    ],
)
def test_torchvision_that_cannot_be_imported(tmp_path, source, cause):
    """Absent, or made for another torch: one line and exit code 2; the digits do not need it."""
    fake = tmp_path / "fake" / "torchvision"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(source + "\n")
    done = run_lesson(tmp_path, "--dataset", "mnist", PYTHONPATH=str(fake.parent))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --dataset mnist needs torchvision: {cause}; install the torchvision")
    assert done.stderr.count("\n") == 1
    assert run_lesson(tmp_path, PYTHONPATH=str(fake.parent)).returncode == 0


def test_the_command_line_reads_a_folder(tmp_path):
    raw = write_mnist(tmp_path / "data")
    big = {"train": 1500, "t10k": 300}
    for part, count in big.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.random.default_rng(0).integers(0, 256, (count, 28, 28))))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    done = run_lesson(tmp_path, "--dataset", "fashion-mnist", "--jobs", "2")
    assert (done.returncode, done.stderr) == (0, "")
    found = read_record(tmp_path / "out" / "14_dropout_regularization" / "results.json")
    assert (found["settings"]["dataset"], found["settings"]["seeds"]) == ("fashion-mnist", [0, 1])


def test_a_data_set_is_read_once(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setattr(data, "kept", {})
    first = data.load("fashion-mnist", tmp_path)
    assert data.load("fashion-mnist") is first
    assert data.load("digits").task.shape == (1, 8, 8)
    assert list(data.kept) == ["digits"]
