"""Numbers and tables as text."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from tabulate import tabulate

from common.plotting import check_labels, words
from common.statistics import interval
from runner.terminal import wrapped


def number(value: float, unit: str = "", sign: str = "") -> str:
    """A number with the decimals that suit its unit; a dash where there is none. sign: "+" shows it always."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e4 or (0 < abs(value) < 0.001 and not unit):
        return re.sub(r"e\+?(-?)0?", r"e\1", f"{value:{sign}.0e}")
    return f"{value:{sign}.{1 if unit in ('%', 'points', 'epochs', 'steps') else 2}f}"


def span(effect: Mapping[str, Any], unit: str = "", sign: str = "+") -> str:
    """A mean with its interval: +5.2 [+4.1, +6.3]."""
    mean, low, high = (number(float(effect[name]), unit, sign) for name in ("mean", "low", "high"))
    return mean if low == "–" else f"{mean} [{low}, {high}]"


def cells(values: xr.DataArray, spans: bool = False) -> list[str]:
    """The mean over seeds, with its interval if `spans`, at each place of an array (…, seed)."""
    unit, effect, found = values.attrs.get("unit", ""), interval(values), []
    for place in np.ndindex(effect["mean"].shape):
        here, sign = {name: each.values[place] for name, each in effect.items()}, "+" if unit == "points" else ""
        found.append(span(here, unit, sign) if spans else number(here["mean"], unit, sign))
    return found


def table(
    title: str, columns: Mapping[str, xr.DataArray], rows: Sequence[str], spans: bool = False, width: int = 80
) -> str:
    """A table of means over seeds, with intervals if `spans`: an array (*rows, seed) for each column. It fits `width`
    columns: the names of the rows are wrapped by words, numbers never; columns that leave too little room for the
    names follow in a table below.
    """
    check_labels(list(columns.values()), rows)
    labels = product(*(next(iter(columns.values()))[row].values.tolist() for row in rows))
    head, names = ", ".join(map(words, rows)), [", ".join(map(words, each)) for each in labels]
    lines = [f"{head}__", *names]  # tabulate widens a head by two
    least = min(max(map(len, lines)), max(12, *map(len, " ".join(lines).split())))
    tables, rooms = [], []
    for name, values in columns.items():
        name, column = wrapped(name, width - 16), cells(values.transpose(*rows, "seed"), spans)
        wide = 2 + max(map(len, [*column, *(f"{line}__" for line in name.split("\n"))]))
        if not tables or rooms[-1] - wide < least:
            tables.append({head: names})
            rooms.append(width)
        tables[-1][name] = column
        rooms[-1] -= wide
    for i, (shown, room) in enumerate(zip(tables, rooms, strict=True)):
        room, align = max(8, room), ["left"] + ["right"] * (len(shown) - 1)
        fit = {"maxcolwidths": [room], "maxheadercolwidths": [room - 2]}
        tables[i] = tabulate(shown, "keys", "simple", colalign=align, disable_numparse=True, **fit)
    return "\n".join(["", wrapped(title, width), "\n\n".join(tables)])


def choice_lines(runs: xr.Dataset, tuned: Sequence[str]) -> list[str]:
    """What was chosen on validation, a winner at its grid's edge told; and why seeds trained one at a time, if so."""
    alone = runs.seconds.attrs["alone"]
    lines = [f"trained one seed at a time: {alone}"] if alone else []
    for name in tuned:
        grid, chosen = runs[name].values.tolist(), runs[f"chosen_{name}"]
        labels = product(*(chosen[dim].values.tolist() for dim in chosen.dims))
        picks = {each: pick for each, pick in zip(labels, chosen.values.ravel().tolist(), strict=True) if pick in grid}
        edge = " at its edge" if len(grid) > 2 and {grid[0], grid[-1]} & set(picks.values()) else ""
        picked = (f"{words(pick)} for {', '.join(map(words, each))}" for each, pick in picks.items())
        said = "; ".join(each.removesuffix(" for ") for each in picked) or "no difference"
        lines.append(f"{words(name)}, chosen on validation{edge} from {', '.join(map(words, grid))}: {said}")
    return lines


def measured(claim: Mapping[str, Any]) -> str:
    """A claim's effect with its interval and unit; a share of seeds as 9 of 10."""
    effect = {name: math.nan if value is None else value for name, value in claim["estimate"].items()}
    if effect["unit"] == "% of seeds":
        return f"{effect['mean'] * effect['n'] / 100:.0f} of {effect['n']:.0f} seeds"
    lost = "" if claim["seeds"] == effect["n"] else f" ({effect['n']:.0f} of {claim['seeds']} seeds)"
    return f"{span(effect, effect['unit'])} {effect['unit']}".strip() + lost
