import math

import numpy as np
import pytest
from scipy import stats

from common.first.statistics import (
    FAILS,
    HOLDS,
    UNCLEAR,
    Estimate,
    above,
    below,
    calibration_error,
    estimate,
    estimates,
    judge,
    paired_difference,
    points,
    proportion,
    reliability,
    within,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_interval_equals_scipys(n):
    values = RNG.normal(3, 2, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert estimate(values) == pytest.approx(Estimate(values.mean(), low, high, n))


def test_paired_interval_agrees_with_scipys_paired_test():
    arm, baseline = RNG.normal(1, 1, 10), RNG.normal(0, 1, 10)
    expected = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    effect = paired_difference(arm, baseline)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))


def test_pairing_removes_what_the_seeds_share():
    shared = RNG.normal(0, 100, 10)
    effect = paired_difference(shared + 1, shared)
    assert effect.low == pytest.approx(1)
    assert effect.high == pytest.approx(1)


def test_diverged_runs_are_counted_not_averaged():
    assert estimate([1.0, math.nan, 3.0]).mean == 2
    assert estimate([1.0, math.nan, 3.0]).n == 2
    assert estimate([1.0, math.inf, 3.0]).n == 2
    assert paired_difference([1, math.nan, 3], [0, 0, math.nan]).n == 1
    assert estimate([]).n == 0
    assert math.isnan(estimate([math.nan]).mean)
    one = estimate([5.0])
    assert one.mean == 5
    assert math.isnan(one.low)


def test_unequal_lengths_are_an_error():
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1, 2], [1])


def test_estimates_go_by_column_and_points_are_hundredths():
    columns = estimates(np.array([[0.0, 1.0], [0.2, 1.0]]))
    assert [each.mean for each in columns] == [0.1, 1.0]
    assert points(columns[0]).mean == pytest.approx(10)
    assert points(columns[0]).n == 2


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [
        (0.1, 0.3, above(0), HOLDS),
        (-0.1, 0.3, above(0), UNCLEAR),
        (-0.3, -0.1, above(0), FAILS),
        (0.1, 0.3, above(0.5), FAILS),  # an effect, but none worth the name
        (0.4, 0.8, above(0.5), UNCLEAR),
        (0.6, 0.8, above(0.5), HOLDS),
        (-3, -2, below(-1), HOLDS),
        (-3, 0, below(-1), UNCLEAR),
        (-0.5, 4, below(-1), FAILS),
        (-0.5, 0.5, within(1), HOLDS),
        (-0.5, 1.5, within(1), UNCLEAR),
        (1.2, 1.5, within(1), FAILS),
        (-2, 2, within(1), UNCLEAR),
        (math.nan, math.nan, above(0), UNCLEAR),
        (0, 0, above(0), FAILS),  # ten seeds, no difference at all
    ],
)
def test_verdicts(low, high, expected, verdict):
    assert judge(Estimate((low + high) / 2, low, high, 10), expected, seeds=10) == verdict


def test_survivors_of_diverged_runs_decide_nothing():
    assert judge(Estimate(1, 0.9, 1.1, 9), above(0), seeds=10) == UNCLEAR


def test_ranges_read_as_words():
    assert [str(each) for each in (above(0.5), below(-1), within(2))] == ["> 0.5", "< -1", "-2 to 2"]


def test_calibration_of_a_known_case():
    confidence = np.array([0.95, 0.95, 0.55, 0.55, 1.0])
    table = reliability(confidence, np.array([True, True, True, False, False]))
    assert table[0].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    expected = (abs(1.1 - 1) + abs(2.9 - 2)) / 5
    assert calibration_error(table) == pytest.approx(expected)


@pytest.mark.parametrize(("true", "n"), [(0, 10), (1, 10), (9, 10), (10, 10), (3, 7)])
def test_proportion_is_scipys_exact_interval(true, n):
    interval = stats.binomtest(true, n).proportion_ci(0.95, method="exact")
    found = proportion([True] * true + [False] * (n - true))
    assert found == pytest.approx((true / n, interval.low, interval.high, n), abs=1e-9)
