import numpy as np
import pytest
import torch

from common import data
from common.data import (
    Batch,
    Dataset,
    LessonError,
    derive,
    digest,
    forget,
    load,
    load_digits,
    make_split,
    mislabel,
    stratified_order,
)

DIGITS = load("digits")


def test_digits_are_the_real_ones():
    assert DIGITS.x.shape == (1797, 1, 8, 8)
    assert DIGITS.task == ((1, 8, 8), 10)
    assert DIGITS.x.min() == 0
    assert DIGITS.x.max() == 16
    from sklearn import datasets

    found = datasets.load_digits()
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


def images(*channels: np.ndarray) -> Dataset:
    """200 images of 8 × 8 pixels with these channels."""
    x = np.stack([np.broadcast_to(each, (200, 8, 8)) for each in channels], 1)
    return Dataset(x, np.arange(200) % 4, validation=40, test=40)


NOISE = np.random.default_rng(0).normal(size=(200, 8, 8))


@pytest.mark.parametrize("constant", [0, 255, 0.1, 1e-9, -1e20, np.uint8(7)])
def test_a_constant_channel_stays_at_zero_and_leaves_the_others_alone(constant):
    """An alpha channel of 255, an empty blue one, and one whose mean is rounded."""
    alone, beside = make_split(images(NOISE), 0), make_split(images(NOISE, np.asarray(constant)), 0)
    for one, two in zip(alone, beside, strict=True):
        assert torch.allclose(two.x[:, :1], one.x, atol=1e-5)
        assert not two.x[:, 1].any()


def test_a_channel_that_is_constant_only_where_it_is_trained_on_is_finite():
    first = make_split(images(NOISE), 0)
    blue = np.zeros((200, 8, 8))
    split = make_split(images(NOISE, blue + (np.arange(200) == 199)[:, None, None]), 0)
    assert all(part.x.isfinite().all() for part in split)
    assert torch.allclose(split.train.x[:, :1], first.train.x, atol=1e-5)


@pytest.mark.parametrize("pixel", [np.nan, np.inf, 1e200, 1e38])
def test_what_the_network_would_see_is_finite_or_refused_in_one_line(pixel):
    noise = NOISE.copy()
    noise[:, 3, 3] = pixel
    noise[::2, 3, 3] = -pixel
    with pytest.raises(LessonError, match="NaN, infinity or too large numbers") as error:
        make_split(images(noise), 0)
    assert "\n" not in str(error.value)


def test_ordinary_images_are_standardised_as_ever():
    split, order = make_split(DIGITS, 0), make_split(DIGITS._replace(x=2 * DIGITS.x + 1), 0)
    for part, other in zip(split, order, strict=True):
        assert part.x.isfinite().all()
        assert torch.allclose(part.x, other.x, atol=1e-5)


def test_purposes_and_seeds_have_streams_of_their_own():
    seeds = {derive(seed, purpose) for seed in range(50) for purpose in ("split", "start", "batches", "masks")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_data_set_is_known_by_its_content():
    dataset = Dataset(np.arange(128.0).reshape(2, 1, 8, 8), np.arange(2), validation=1, test=1)
    known = digest(dataset)
    assert len(known) == 64
    assert digest(dataset._replace(x=np.asfortranarray(dataset.x), y=dataset.y.copy())) == known
    others = [
        dataset._replace(x=dataset.x + (dataset.x == 127)),
        dataset._replace(x=dataset.x.astype(np.float32)),
        dataset._replace(x=dataset.x.reshape(2, 4, 4, 4)),
        dataset._replace(x=dataset.x.view(np.int64)),
        dataset._replace(y=1 - dataset.y),
        dataset._replace(validation=0),
        dataset._replace(test=0),
        dataset._replace(own_test=1),
    ]
    assert len({known, *map(digest, others)}) == 9
    assert digest(DIGITS) == digest(load_digits())


def test_a_data_set_is_read_once_until_it_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "kept", {})
    path = tmp_path / "own.npz"
    labels, x = np.arange(20) % 2, np.random.default_rng(0).random((20, 8, 8))
    np.savez(path, x=x, y=labels)
    first = load(str(path))
    np.savez(path, x=x, y=1 - labels)
    assert load(str(path)) is first
    forget()
    assert (load(str(path)).y == 1 - first.y).all()


def test_many_classes_in_few_bits_are_counted_in_python():
    for kind, classes in ((np.int8, 128), (np.uint8, 256), (np.int64, 3)):
        task = Dataset(np.zeros((1, 1, 8, 8)), np.array([0, classes - 1], kind), 1, 1).task
        assert (task.classes, type(task.classes)) == (classes, int)
