"""Means with intervals, paired differences, and what they say of a claim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, stdtrit  # the quantiles of the beta and of Student's t distribution

HOLDS, FAILS, UNCLEAR, NOT_JUDGED = "holds here", "does not hold here", "unclear", "not judged"


class Estimate(NamedTuple):
    """A mean with its 95 % t-interval [low, high] over n values; NaN where n is too small to tell."""

    mean: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> "Estimate":
        """The same estimate in another unit, a positive `factor` times finer (100: from shares to points)."""
        return Estimate(factor * self.mean, factor * self.low, factor * self.high, self.n)


def points(effect: Estimate) -> Estimate:
    """A share, or a difference of two, in percentage points."""
    return effect.scaled(100)


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and 95 % t-interval of the values that are numbers. NaN marks a diverged run: n says how many were left."""
    kept = np.asarray(values, dtype=float)
    kept = kept[np.isfinite(kept)]
    n = len(kept)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(kept.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(stdtrit(n - 1, 0.975) * kept.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def proportion(outcomes: Sequence[bool] | np.ndarray) -> Estimate:
    """Share (0…1) of the outcomes that are true, with its exact 95 % interval. Clopper & Pearson 1934."""
    n, true = len(outcomes), int(np.sum(outcomes))
    low = float(betaincinv(true, n - true + 1, 0.025)) if true else 0.0
    high = float(betaincinv(true + 1, n - true, 0.975)) if true < n else 1.0
    return Estimate(true / n, low, high, n)


def estimates(values: np.ndarray) -> list[Estimate]:
    """The estimate of each column of (seeds, columns)."""
    return [estimate(column) for column in values.T]


def paired_difference(arm: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> Estimate:
    """Estimate of arm minus baseline, seed by seed; a seed on which either diverged counts in neither.

    Raises ValueError unless both hold the same number of seeds.
    """
    arm, baseline = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    if arm.shape != baseline.shape:
        raise ValueError(f"pairs need equal lengths, got {arm.shape} and {baseline.shape}")
    return estimate(arm - baseline)


class Range(NamedTuple):
    """The open range of effects for which a claim would be true."""

    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"> {self.low:g}"
        return f"< {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"


def above(margin: float) -> Range:
    """Expected: an effect larger than `margin`, the smallest one worth the name."""
    return Range(margin, math.inf)


def below(margin: float) -> Range:
    """Expected: an effect smaller than `margin`."""
    return Range(-math.inf, margin)


def within(margin: float) -> Range:
    """Expected: no effect worth the name, one nearer to zero than `margin` on either side."""
    return Range(-margin, margin)


def judge(effect: Estimate, expected: Range, seeds: int) -> str:
    """The verdict: the whole interval inside the expected range, the whole interval outside it, or neither.

    Where the effect was measured on fewer than all `seeds`, the survivors decide nothing: unclear.
    """
    if effect.n < seeds or not math.isfinite(effect.low):
        return UNCLEAR
    if expected.low < effect.low and effect.high < expected.high:
        return HOLDS
    if effect.high <= expected.low or effect.low >= expected.high:
        return FAILS
    return UNCLEAR


@dataclass(frozen=True)
class Claim:
    """A rule of thumb put to the test: the statement, who says so, what was measured and what that says of it."""

    id: str
    statement: str
    source: str
    experiment: str
    expected: Range
    effect: Estimate
    unit: str
    seeds: int
    verdict: str


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> np.ndarray:
    """Predictions by confidence (N,) in 0…1, in equal bins: (number, sum of confidences, number right), (3, bins)."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.stack([np.bincount(index, weights, bins) for weights in (np.ones_like(confidence), confidence, right)])


def calibration_error(table: np.ndarray) -> float:
    """Expected calibration error (0…1) of a `reliability` table: |confidence − accuracy|, weighed by predictions.

    Guo et al. 2017, arXiv 1706.04599.
    """
    count, confidence, right = table
    return float(np.abs(confidence - right).sum() / count.sum())
