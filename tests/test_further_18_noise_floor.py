from argparse import Namespace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

from common.data import load, make_split


@pytest.fixture
def noise():
    return load_script("further/noise_floor.py")


class FakeLab:
    """What the experiments need of a Lab; keeps what is claimed."""

    def __init__(self, seeds=(0, 1, 2)):
        self.options = Namespace(seeds=list(seeds), dataset="digits", quick=True, longer=1)
        self.claims, self.entry = {}, {"question": "Why?"}
        from common import plotting

        self.plotting = plotting

    def claim(self, statement, source, effect, above=-np.inf, below=np.inf):
        assert effect.dims == ("seed",)
        self.claims[statement] = (effect.values, above, below)

    def table(self, values, rows, columns=None):
        pass

    def sweep(self, *arrays, x, hue):
        pass

    def say(self, text):
        pass

    def figure(self, figure):
        pass


def test_the_inputs_are_principal_components_of_variance_1(noise):
    x, y = noise.data(FakeLab(), wrong=0.3, kept=8)
    assert (x.shape, y.shape) == ((3, 1000, 8), (3, 1000, 10))
    assert torch.allclose(x.mT @ x / 1000, torch.eye(8).expand(3, 8, 8), atol=1e-4)
    assert torch.allclose(x.mean(1), torch.zeros(3, 8), atol=1e-4)
    for seed in range(3):
        train = make_split(load("digits"), seed, 1000, 0.3).train
        right = make_split(load("digits"), seed, 1000, 0.0).train
        assert torch.equal(y[seed].argmax(1), train.y)
        assert (train.y != right.y).sum() == 300
        images = train.x.flatten(1).double()
        values, vectors = torch.linalg.eigh((images - images.mean(0)).T.cov())
        first = (images - images.mean(0)) @ vectors[:, -8:].flip(1) / values[-8:].flip(0).sqrt()
        assert torch.allclose((first * x[seed]).mean(0).abs(), torch.ones(8, dtype=torch.float64), atol=2e-3)


def test_a_shuffled_epoch_takes_each_example_once_and_drawn_anew_is_with_replacement(noise):
    torch.manual_seed(0)
    x = torch.zeros(3, 40, 2)
    epochs = [*islice(noise.batches(x, 5, shuffled=True), 16)]
    assert all(batch.shape == (3, 5) for batch in epochs)
    for epoch in (torch.cat(epochs[:8], 1), torch.cat(epochs[8:], 1)):
        assert torch.equal(epoch.sort(1).values, torch.arange(40).expand(3, -1))
        assert not torch.equal(epoch[0], epoch[1])
    assert not torch.equal(torch.cat(epochs[:8], 1), torch.cat(epochs[8:], 1))
    anew = torch.cat([*islice(noise.batches(x, 5), 800)], 1)  # 4,000 draws: each example about 100 times
    counts = torch.stack([row.bincount(minlength=40) for row in anew])
    assert counts.min() > 60
    assert counts.max() < 150
    first = anew[:, :40]
    assert all(len(row.unique()) < 35 for row in first)


@pytest.mark.parametrize("hidden", [(), (7,)])
def test_the_descent_is_torch_optim_sgds_for_each_rate_and_seed(noise, hidden):
    torch.manual_seed(1)
    x, y = torch.randn(2, 30, 4), F.one_hot(torch.randint(3, (2, 30)), 3).float()
    sizes = [4, *hidden, 3]
    start = [torch.randn(1, 2, a, b) for a, b in pairwise(sizes)]
    rates = torch.tensor([[0.1, 0.5]] * 60 + [[0.3, 0.05]] * 40)
    order = [*islice(noise.batches(x, 6), 100)]
    seen = noise.sgd(start, x, y, rates, order)
    assert len(seen) == 2
    for r in range(2):
        for s in range(2):
            layers = []
            for each in start:
                linear = nn.Linear(*each.shape[2:], bias=False)
                linear.weight.data = each[0, s].T.clone()
                layers += [linear, nn.ReLU()]
            model = nn.Sequential(*layers[:-1])
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            for step, (rate, places) in enumerate(zip(rates, order, strict=True), 1):
                optimizer.param_groups[0]["lr"] = float(rate[r])
                optimizer.zero_grad()
                F.cross_entropy(model(x[s, places[s]]), y[s, places[s]].argmax(1)).backward()
                optimizer.step()
                if step % 50 == 0:
                    found = [each[r, s].T for each in seen[step // 50 - 1]]
                    for mine, theirs in zip(found, model.parameters(), strict=True):
                        assert torch.allclose(mine, theirs, atol=1e-4)
            whole = F.cross_entropy(model(x[s]), y[s].argmax(1))
            assert noise.loss(seen[-1], x, y)[r, s].item() == pytest.approx(whole.item(), rel=1e-4)


def test_the_minimum_is_lbfgs_s_and_the_trace_that_of_the_gradients_covariance(noise):
    x, y = noise.data(FakeLab([4]), wrong=0.3, kept=8)
    lowest, theory = noise.minimum(x, y)
    x, labels = x[0].double(), y[0].argmax(1)
    w = torch.zeros(8, 10, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = F.cross_entropy(x @ w, labels)
        value.backward()
        return value

    solver.step(closure)
    assert lowest.item() == pytest.approx(closure().item(), abs=1e-5)

    def of_one(w, x, label):
        return F.cross_entropy(x @ w, label)

    gradients = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(w.detach(), x, labels).flatten(1)
    assert theory.item() == pytest.approx(gradients.T.cov(correction=0).trace().item() / 4, rel=1e-3)


def test_the_floor_is_measured_above_the_minimum_and_beside_the_theory(noise, monkeypatch):
    """Weights that stay where they are: the ratio is their excess loss by rate / batch size × tr Σ / 4."""
    monkeypatch.setattr(noise, "sgd", lambda w, x, y, rates, order: [[w[0].expand(4, -1, -1, -1)]] * 4)
    monkeypatch.setattr(noise, "minimum", lambda x, y: (torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 4.0])))
    found = noise.floors(FakeLab())
    assert found.dims == ("batch", "quarter", "rate", "seed")
    excess = np.log(10) - np.array([1.0, 2.0, 0.5])
    for name, size in {"5": 5, "20": 20, "50": 50, "20, shuffled": 20}.items():
        for rate in (0.1, 0.2, 0.4, 0.8):
            expected = excess / (rate / size * np.array([1.0, 2.0, 4.0]))
            for quarter in (1, 4):
                here = found.sel(batch=name, rate=rate, quarter=quarter)
                np.testing.assert_allclose(here.values, expected, rtol=1e-5)


def test_one_batch_order_is_shuffled_and_each_has_its_size(noise, monkeypatch):
    asked = []
    monkeypatch.setattr(noise, "batches", lambda x, size, shuffled=False: asked.append((size, shuffled)))
    monkeypatch.setattr(noise, "sgd", lambda w, x, y, rates, order: [[w[0].expand(4, -1, -1, -1)]] * 4)
    monkeypatch.setattr(noise, "minimum", lambda x, y: (torch.ones(3), torch.ones(3)))
    noise.floors(FakeLab())
    assert asked == [(5, False), (20, False), (50, False), (20, True)]


def test_the_claims_of_the_floor_compare_rates_and_batches(noise, monkeypatch):
    from xarray import DataArray

    places = {"batch": ["5", "20", "50", "20, shuffled"], "quarter": [1, 2, 3, 4], "rate": [0.1, 0.2, 0.4, 0.8]}
    values = np.ones((4, 4, 4, 3))
    values[:3, 3, 3] = 1.5  # at the highest rate the floor is too high
    values[2, 3] *= 0.5  # with batches of 50 too low
    values[3, 3, 2] = 0.3
    values[:, 2] = 7.0  # the third quarter is in no claim
    monkeypatch.setattr(noise, "floors", lambda lab: DataArray(values, places, (*places, "seed")))
    lab = FakeLab()
    noise.floor(lab)
    rate, batch, theory, shuffled = [effect[0] for effect, _, _ in lab.claims.values()]
    assert (rate, batch) == pytest.approx((1.5, 0.5))
    assert theory == pytest.approx((1 + 1 + 0.5) / 3)
    assert shuffled == pytest.approx(0.3)


def test_the_remedies_are_the_runs_that_their_names_say(noise):
    """Half of the 200 steps at the rate; then a tenth of it, or the mean of what is seen at the rate."""
    lab = FakeLab()
    x, y = noise.data(lab, wrong=0.3, kept=8)
    w, lowest = [torch.zeros(1, 3, 8, 10)], torch.tensor([1.4, 1.5, 1.6])
    torch.manual_seed(5)
    found = noise.remedies(lab, 0.4, w, x, y, lowest)
    assert found.step.values.tolist() == [50, 100, 150, 200]
    torch.manual_seed(5)
    order = [*islice(noise.batches(x, 5), 200)]
    rates = {"constant": [0.4] * 200, "rate / 10": [0.4] * 100 + [0.04] * 100, "rate / 10 from the start": [0.04] * 200}
    for name, rate in rates.items():
        seen = noise.sgd(w, x, y, torch.tensor(rate)[:, None], order)
        expected = torch.cat([1000 * (noise.loss(each, x, y) - lowest) for each in seen])
        np.testing.assert_allclose(found.sel(run=name).values, expected.numpy(), rtol=1e-3)
    seen = noise.sgd(w, x, y, torch.full((200, 1), 0.4), order)
    means = [seen[0][0], seen[1][0], seen[2][0], (seen[2][0] + seen[3][0]) / 2]
    expected = torch.cat([1000 * (noise.loss([each], x, y) - lowest) for each in means])
    np.testing.assert_allclose(found.sel(run="mean of weights").values, expected.numpy(), rtol=1e-3)


def test_the_claims_of_the_drop_are_ratios_of_the_last_quarter(noise, monkeypatch):
    from xarray import DataArray

    asked = []

    def remedies(lab, rate, w, x, y, lowest):
        asked.append((rate, [each.shape[2:] for each in w], (y.argmax(2)).shape, lowest))
        places = {"step": [50, 100, 150, 200], "run": ["constant", "rate / 10", "rate / 10 from the start"]}
        places["run"].append("mean of weights")
        stuck, free = [100, 8, 9, 4], [3, 6, 60, 4]
        values = np.full((4, 4, 3), 500.0)
        values[3] = np.array(stuck if rate == 0.4 else free)[:, None]
        values[2, 0] = 5.0
        return DataArray(values, places, (*places, "seed"))

    monkeypatch.setattr(noise, "remedies", remedies)
    lab = FakeLab()
    noise.drop_the_rate(lab)
    assert [effect[0] for effect, _, _ in lab.claims.values()] == pytest.approx([0.08, 0.5, 0.6, 2.0])
    (high, one, _, lowest), (low, two, _, none) = asked
    assert (high, one) == (0.4, [(8, 10)])
    assert (low, two, none) == (0.1, [(40, 64), (64, 10)], 0.0)
    assert ((lowest > 1) & (lowest < 2)).all()


def test_near_the_minimum_plain_sgd_has_the_theorys_floor_and_shuffled_epochs_less(noise):
    x, y = noise.data(FakeLab(range(10)), wrong=0.3, kept=8)
    lowest, theory = noise.minimum(x, y)
    floors = []
    for shuffled in (False, True):
        order = noise.batches(x, 20, shuffled)
        seen = noise.sgd([torch.zeros(1, 10, 8, 10)], x, y, torch.full((1600, 1), 0.4), order)
        above = torch.stack([noise.loss(w, x, y)[0] - lowest for w in seen[12:]]).mean(0)
        floors.append((above / (0.4 / 20 * theory)).mean().item())
    assert floors[0] == pytest.approx(1.05, abs=0.15)
    assert floors[1] == pytest.approx(0.23, abs=0.1)


def test_the_mean_of_the_weights_is_over_all_that_was_seen_since_half_way(noise):
    lab = FakeLab([0])
    lab.options.quick = False
    x, y = noise.data(lab, wrong=0.3, kept=2)
    w = [torch.zeros(1, 1, 2, 10)]
    torch.manual_seed(5)
    found = noise.remedies(lab, 0.4, w, x, y, 0.0)
    torch.manual_seed(5)
    seen = noise.sgd(w, x, y, torch.full((4000, 1), 0.4), noise.batches(x, 5))
    mean = torch.stack([each for (each,) in seen[40:]]).mean(0)
    expected = 1000 * noise.loss([mean], x, y).item()
    assert found.sel(run="mean of weights").values[-1].item() == pytest.approx(expected, rel=1e-4)
