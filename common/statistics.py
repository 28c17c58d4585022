"""Results as labelled arrays, their means with intervals over seeds, and what these say of a claim."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import betaincinv, stdtrit  # the quantiles of the beta and of Student's t distribution

from common.training import Results

SHARE = "% of seeds"  # the unit of what is true or false of a seed
HOLDS, FAILS, UNCLEAR, NOT_JUDGED = "holds", "does not hold", "unclear", "not judged"


def assemble(labels: Mapping[str, Sequence[Any]], cells: list[list[Results]]) -> xr.Dataset:
    """All results, the last factor's label fastest, as a data set of factors × seed × their own dimensions, or NaN."""

    def join(parts: list[xr.Dataset], dim: str) -> xr.Dataset:
        how = {"data_vars": "all", "coords": "minimal", "join": "outer", "combine_attrs": "override"}
        return xr.concat(parts, dim, **how)

    each, reasons = [], set()
    for parts in cells:
        arrays = join([xr.Dataset(arrays) for arrays, _ in parts], "seed")
        notes = [xr.Dataset(note) for _, every_seed in parts for note in every_seed]
        for flag in (note[name] for note in notes for name in note if note[name].dtype == bool):
            flag.attrs["unit"] = SHARE
        each.append(arrays.merge(join(notes, arrays.seed)) if any(map(len, notes)) else arrays)
        reasons.add(arrays.seconds.attrs["alone"])
    flat, data = join(each, "cell"), {}
    for name, values in flat.items():
        values = values.transpose("cell", "seed", ...)
        shape = [*map(len, labels.values()), *values.shape[1:]]
        about = {"unit": "", "long_name": name.replace("_", " ")} | values.attrs
        data[name] = ((*labels, *values.dims[1:]), values.values.reshape(shape), about)
    data["seconds"][2]["alone"] = "; ".join(sorted(reasons - {""}))
    return xr.Dataset(data, {name: list(each) for name, each in labels.items()} | dict(flat.coords))


def interval(values: xr.DataArray) -> xr.Dataset:
    """Mean, low, high and n over seeds, along the other dimensions: the mean of the values that are numbers, its 95 %
    t-interval, and how many they are (NaN marks a diverged run). Low and high are NaN where n is below 2.

    Of true and false values: the share that is true, in %, with its exact interval. Clopper & Pearson 1934.
    """
    table = values.transpose("seed", ...)
    found = np.where(np.isfinite(table.values), table.values, np.nan)
    n, total = np.isfinite(found).sum(0), np.nansum(found, 0)
    if values.dtype == bool or (values.attrs.get("unit") == SHARE and np.isin(np.nan_to_num(found), (0, 1)).all()):
        mean = 100 * total / np.where(n > 0, n, np.nan)
        low = np.nan_to_num(100 * betaincinv(total, n - total + 1, 0.025), nan=0)
        high = np.nan_to_num(100 * betaincinv(total + 1, n - total, 0.975), nan=100)
    else:
        mean, freedom = total / np.where(n > 0, n, np.nan), np.where(n > 1, n - 1, np.nan)
        half = stdtrit(freedom, 0.975) * np.sqrt(np.nansum((found - mean) ** 2, 0) / freedom / n)
        low, high = mean - half, mean + half
    shape = table.isel(seed=0, drop=True)
    named = {"mean": mean, "low": low, "high": high, "n": n}
    return xr.Dataset({name: shape.copy(data=each) for name, each in named.items()})


def judge(estimate: Mapping[str, float], above: float, below: float, seeds: int) -> str:
    """The verdict on an estimate (low, high, n) expected between `above` and `below`: its whole interval lies inside,
    outside, or neither. Where fewer than all `seeds` were measured, the survivors decide nothing: unclear.
    """
    low, high = estimate["low"], estimate["high"]
    if estimate["n"] < seeds or not math.isfinite(low):
        return UNCLEAR
    if above < low and high < below:
        return HOLDS
    return FAILS if high <= above or low >= below else UNCLEAR
