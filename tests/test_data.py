from pathlib import Path

import numpy as np
import pytest
import torch

from common import data
from common.data import Batch, Dataset, LessonError, Task, derive, load, make_split, mislabel, stratified_order

DIGITS = load("digits")


def test_digits_are_the_real_ones():
    assert DIGITS.x.shape == (1797, 1, 8, 8)
    assert DIGITS.task == ((1, 8, 8), 10)
    assert DIGITS.x.min() == 0
    assert DIGITS.x.max() == 16
    from sklearn.datasets import load_digits

    found = load_digits()
    assert (DIGITS.x[:, 0] == found.images).all()
    assert (DIGITS.y == found.target).all()


def raw(batch: Batch, split) -> set[bytes]:
    """Each image as bytes that do not depend on the standardisation of the split."""
    x = batch.x.flatten(1)
    lowest, highest = (torch.cat([b.x.flatten() for b in split]).aminmax()) if split else (0, 1)
    return {((row - lowest) / (highest - lowest) * 16).round().numpy().tobytes() for row in x}


def test_parts_are_disjoint_and_stratified():
    split = make_split(DIGITS, seed=3)
    assert [len(part.y) for part in split] == [1000, 397, 400]
    train, validation, test = (raw(part, split) for part in split)
    assert not train & test
    assert not train & validation
    assert not validation & test
    for part in split:
        counts = torch.bincount(part.y, minlength=10) / len(part.y)
        assert (counts - torch.bincount(torch.tensor(DIGITS.y)) / 1797).abs().max() < 0.01


def test_standardised_by_the_training_part():
    split = make_split(DIGITS, seed=0, examples=150)
    assert split.train.x.mean().item() == pytest.approx(0, abs=1e-5)
    assert split.train.x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert split.test.x.mean().abs() > 1e-4


def test_larger_training_sets_contain_smaller_ones_and_leave_the_test_set_alone():
    small, large = make_split(DIGITS, 1, examples=100), make_split(DIGITS, 1, examples=300)
    assert torch.equal(small.train.y, large.train.y[:100])
    assert torch.equal(small.test.y, large.test.y)
    # the same pixels, but for the training sets' own mean and deviation
    a, b = small.test.x.flatten(), large.test.x.flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99999


def test_seed_draws_the_split():
    assert torch.equal(make_split(DIGITS, 5).test.x, make_split(DIGITS, 5).test.x)
    assert not torch.equal(make_split(DIGITS, 5).train.y, make_split(DIGITS, 6).train.y)
    assert not torch.equal(make_split(DIGITS, 5).validation.y, make_split(DIGITS, 6).validation.y)


def test_no_seed_ever_trains_or_chooses_on_a_test_image():
    a, b = make_split(DIGITS, 5), make_split(DIGITS, 6)
    test = raw(a.test, a)
    assert test == raw(b.test, b)
    for split in (a, b):
        assert not test & (raw(split.train, split) | raw(split.validation, split))


def test_label_noise_is_exact_and_on_training_labels_only():
    clean, wrong = make_split(DIGITS, 2, 200), make_split(DIGITS, 2, 200, label_noise=0.25)
    assert (clean.train.y != wrong.train.y).sum() == 50
    assert torch.equal(clean.train.x, wrong.train.x)
    assert torch.equal(clean.validation.y, wrong.validation.y)
    assert torch.equal(clean.test.y, wrong.test.y)


def test_mislabel_leaves_its_argument_alone_and_stays_among_the_classes():
    y = np.arange(10).repeat(20)
    noisy = mislabel(y, 0.5, 10, np.random.default_rng(0))
    assert (noisy != y).sum() == 100
    assert set(noisy) <= set(range(10))
    assert (y == np.arange(10).repeat(20)).all()


def test_every_stretch_of_the_order_is_stratified():
    y = np.repeat([0, 1], [300, 100])
    order = stratified_order(y, np.random.default_rng(0))
    assert sorted(order) == list(range(400))
    for start in range(0, 400, 40):
        assert abs(y[order[start : start + 40]].sum() - 10) <= 1


def test_the_only_example_of_a_class_may_stand_anywhere():
    """Else it would be held out for validation every time."""
    y = np.array([0] * 99 + [1])
    places = [stratified_order(y, np.random.default_rng(seed)).argmax() for seed in range(30)]
    assert min(places) < 30
    assert max(places) > 70


@pytest.mark.parametrize("examples", [0, 1001, -5])
def test_impossible_training_size_is_one_clear_line_that_names_a_way_out(examples):
    way_out = "take a smaller --larger, or another --dataset"
    with pytest.raises(LessonError, match=f"^{examples} training examples asked for.* 1 to 1000; {way_out}$"):
        make_split(DIGITS, 0, examples)


def test_no_image_of_a_data_sets_own_test_part_counts_as_one_to_train_on():
    x = np.random.default_rng(0).random((600, 1, 8, 8))
    dataset = Dataset(x, np.arange(600) % 10, validation=50, test=100, own_test=300)
    assert [len(part.y) for part in make_split(dataset, 0)] == [250, 50, 100]
    assert len(make_split(dataset, 0, 250).train.y) == 250
    with pytest.raises(LessonError, match="251 training examples asked for, of a data set that has 1 to 250;"):
        make_split(dataset, 0, 251)


def test_purposes_and_seeds_have_streams_of_their_own():
    seeds = {derive(seed, purpose) for seed in range(50) for purpose in ("split", "start", "batches", "masks")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def saved(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def own_images(n: int = 200, shape: tuple[int, ...] = (3, 8, 8), classes: int = 4) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(n, *shape)), "y": np.arange(n) % classes}


@pytest.mark.parametrize(("shape", "channels"), [((3, 8, 8), 3), ((12, 12), 1)])
def test_your_own_images_come_from_a_file(tmp_path, monkeypatch, shape, channels):
    monkeypatch.setattr(data, "kept", {})
    arrays = own_images(shape=shape)
    dataset = load(saved(tmp_path / "own.npz", **arrays))
    assert dataset.task == Task((channels, *shape[-2:]), 4)
    assert (dataset.validation, dataset.test) == (40, 40)
    split = make_split(dataset, 0)
    assert [len(part.y) for part in split] == [120, 40, 40]
    assert split.train.x.dtype == torch.float32
    np.testing.assert_array_equal(dataset.x.reshape(arrays["x"].shape), arrays["x"])


def test_a_fifth_is_held_out_up_to_a_limit(tmp_path):
    dataset = data.load_npz(Path(saved(tmp_path / "own.npz", **own_images(12_000, (8, 8)))))
    assert (dataset.validation, dataset.test) == (1000, 2000)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((20, 8, 8))}, r"x and y, as numpy.savez writes them, cannot be read from .*'y is not a file"),
        (own_images() | {"y": np.arange(199) % 4}, r"has x \(200, 3, 8, 8\) and y \(199,\)"),
        (own_images(shape=(8, 9)), "wanted"),
        (own_images(shape=(4, 4)), "H ≥ 8"),
        (own_images(shape=(64,)), "wanted"),
        (own_images() | {"y": np.arange(200) % 4 + 1}, "must be whole numbers 0, 1, 2"),
        (own_images() | {"y": np.arange(200) % 4 * 1.0}, "must be whole numbers"),
        (own_images(classes=1), "must be whole numbers"),
        (own_images() | {"x": np.full((200, 8, 8), np.nan)}, "hold NaN, infinity, or a channel of one colour"),
        (own_images() | {"x": np.where(np.arange(64).reshape(8, 8) == 9, np.inf, own_images()["x"])}, "hold NaN, inf"),
        (own_images() | {"x": own_images()["x"] * [[[1]], [[0]], [[1]]]}, "or a channel of one colour"),
        (own_images() | {"x": np.full((200, 8, 8), 7, np.uint8)}, "or a channel of one colour"),
        (own_images() | {"x": own_images()["x"] * 1e30}, "hold NaN, infinity"),  # whose squares are no float32
        (own_images() | {"x": own_images()["x"] * 1e300}, "hold NaN, infinity"),
        ({"x": np.zeros((0, 8, 8)), "y": np.zeros(0, int)}, r"has x \(0, 1, 8, 8\) and y \(0,\); wanted"),
        ({"x": np.zeros((20, 0, 8, 8)), "y": np.arange(20) % 4}, r"has x \(20, 0, 8, 8\) and y \(20,\); wanted"),
        (own_images() | {"x": np.full((200, 8, 8), "a")}, "wanted"),
        ({"x": np.array([{}]), "y": np.array([0])}, "cannot be read from .* allow_pickle"),
    ],
)
def test_a_file_that_holds_something_else_is_one_clear_line(tmp_path, arrays, message):
    with pytest.raises(LessonError, match=message) as error:
        data.load_npz(Path(saved(tmp_path / "own.npz", **arrays)))
    assert "\n" not in str(error.value)


def test_no_file_and_no_archive_are_one_clear_line(tmp_path):
    with pytest.raises(LessonError, match=r"cannot be read from .*No such file"):
        data.load_npz(tmp_path / "own.npz")
    whole = Path(saved(tmp_path / "own.npz", **own_images(20))).read_bytes()
    for content in (b"", b"hello", b"PK\x03\x04 and no more", whole[:-9], whole[:2000] + bytes(50) + whole[2050:]):
        (tmp_path / "own.npz").write_bytes(content)
        with pytest.raises(LessonError, match=r"as numpy\.savez writes them, cannot be read from") as error:
            data.load_npz(tmp_path / "own.npz")
        assert "\n" not in str(error.value)
    with pytest.raises(LessonError, match="Is a directory"):
        data.load_npz(tmp_path)
