"""Intervals against scipy, and the verdicts that follow from them."""

import math

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from common.statistics import FAILS, HOLDS, SHARE, UNCLEAR, interval, judge

RNG = np.random.default_rng(0)


def array(values, *others: str) -> xr.DataArray:
    """An array whose last dimension is seed."""
    return xr.DataArray(np.asarray(values), dims=[*others, "seed"], attrs={"unit": "%"})


def numbers(values: xr.DataArray) -> tuple[float, ...]:
    return tuple(float(each) for each in interval(values).values())


@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_interval_equals_scipys(n):
    values = RNG.normal(3, 2, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert numbers(array(values)) == pytest.approx((values.mean(), low, high, n))
    assert list(interval(array(values))) == ["mean", "low", "high", "n"]


def test_paired_interval_agrees_with_scipys_paired_test():
    arm, baseline = RNG.normal(1, 1, 10), RNG.normal(0, 1, 10)
    expected = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    assert numbers(array(arm) - array(baseline))[1:3] == pytest.approx((expected.low, expected.high))


def test_pairing_removes_what_the_seeds_share():
    shared = RNG.normal(0, 100, 10)
    assert numbers(array(shared + 1) - array(shared)) == pytest.approx((1, 1, 1, 10))


@pytest.mark.parametrize(("true", "n"), [(0, 10), (1, 10), (9, 10), (10, 10), (3, 7), (1, 1), (0, 1)])
def test_a_share_is_scipys_exact_interval(true, n):
    exact = stats.binomtest(true, n).proportion_ci(0.95, method="exact")
    expected = 100 * true / n, 100 * exact.low, 100 * exact.high, n
    assert numbers(array([True] * true + [False] * (n - true))) == pytest.approx(expected, abs=1e-7)


def test_a_share_of_which_some_runs_diverged_is_that_of_the_others():
    """Then true and false have become 1, 0 and NaN."""
    flags = array([1.0, 0.0, 1.0, math.nan]).assign_attrs(unit=SHARE)
    assert numbers(flags) == numbers(array([True, False, True]))


def test_a_difference_of_flags_is_no_share_and_has_a_t_interval():
    values = np.array([1.0, 0.0, -1.0, 1.0, 1.0])
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert numbers(array(values).assign_attrs(unit=SHARE)) == pytest.approx((values.mean(), low, high, 5))


def test_zeros_and_ones_of_another_unit_are_no_share():
    low, high = stats.t.interval(0.95, 2, loc=2 / 3, scale=stats.sem([1, 0, 1]))
    assert numbers(array([1.0, 0.0, 1.0])) == pytest.approx((2 / 3, low, high, 3))


def test_diverged_runs_are_counted_not_averaged():
    assert numbers(array([1.0, math.nan, 3.0]))[::3] == (2, 2)
    assert numbers(array([1.0, math.inf, 3.0]))[::3] == (2, 2)
    assert numbers(array([1.0, math.nan, 3.0])) == numbers(array([1.0, 3.0]))
    assert numbers(array([1.0, math.nan, 3.0]) - array([0, 0, math.nan]))[3] == 1


def test_one_value_has_a_mean_and_no_interval_and_none_has_nothing():
    np.testing.assert_equal(numbers(array([5.0])), (5, math.nan, math.nan, 1))
    np.testing.assert_equal(numbers(array([5.0, math.nan])), (5, math.nan, math.nan, 1))
    np.testing.assert_equal(numbers(array([math.nan, math.nan])), (math.nan, math.nan, math.nan, 0))


def test_every_place_of_an_array_has_an_interval_of_its_own():
    values = RNG.normal(0, 1, (3, 4, 5))
    values[1, 2, 3], values[0, 0] = math.nan, math.nan
    whole = array(values, "p", "width").assign_coords(p=[0.1, 0.2, 0.3])
    found = interval(whole)
    assert found["mean"].dims == ("p", "width")
    assert found.p.values.tolist() == [0.1, 0.2, 0.3]
    for i, j in np.ndindex(3, 4):
        np.testing.assert_equal(numbers(whole[i, j]), tuple(float(each[i, j]) for each in found.values()))
    assert found["n"].values.tolist() == [[0, 5, 5, 5], [5, 5, 4, 5], [5, 5, 5, 5]]
    xr.testing.assert_identical(interval(whole.transpose("seed", "width", "p")).transpose("p", "width"), found)


def test_whole_numbers_will_do():
    assert numbers(array([1, 2, 3])) == numbers(array([1.0, 2.0, 3.0]))


def verdict(low: float, high: float, above: float = -math.inf, below: float = math.inf, n: int = 10) -> str:
    return judge({"mean": (low + high) / 2, "low": low, "high": high, "n": n}, above, below, 10)


@pytest.mark.parametrize(
    ("low", "high", "expected", "found"),
    [
        (0.1, 0.3, {"above": 0}, HOLDS),
        (-0.1, 0.3, {"above": 0}, UNCLEAR),
        (-0.3, -0.1, {"above": 0}, FAILS),
        (0.1, 0.3, {"above": 0.5}, FAILS),  # an effect, but none worth the name
        (0.4, 0.8, {"above": 0.5}, UNCLEAR),
        (0.6, 0.8, {"above": 0.5}, HOLDS),
        (-3, -2, {"below": -1}, HOLDS),
        (-3, 0, {"below": -1}, UNCLEAR),
        (-0.5, 4, {"below": -1}, FAILS),
        (-0.5, 0.5, {"above": -1, "below": 1}, HOLDS),
        (-0.5, 1.5, {"above": -1, "below": 1}, UNCLEAR),
        (1.2, 1.5, {"above": -1, "below": 1}, FAILS),
        (-1.5, -1.2, {"above": -1, "below": 1}, FAILS),
        (-2, 2, {"above": -1, "below": 1}, UNCLEAR),
        (math.nan, math.nan, {"above": 0}, UNCLEAR),
        (0, 0, {"above": 0}, FAILS),  # ten seeds, no difference at all
        (0, 0, {"below": 0}, FAILS),
    ],
)
def test_verdicts(low, high, expected, found):
    assert verdict(low, high, **expected) == found


def test_survivors_of_diverged_runs_decide_nothing():
    assert verdict(0.9, 1.1, above=0) == HOLDS
    assert verdict(0.9, 1.1, above=0, n=9) == UNCLEAR
    assert verdict(0.9, 1.1, above=5, n=9) == UNCLEAR
