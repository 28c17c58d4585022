"""The four kinds of figure: sweep, curves, dots, heat. Means over seeds, 95 % intervals; one colour, one meaning."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.statistics import interval
from common.training import check_value

# Okabe & Ito's colour-blind-safe palette for techniques, the same throughout the level; the baseline is black.
TECHNIQUES = dict.fromkeys(["none", "no dropout", "no norm", "plain", "constant", "PyTorch's"], "black")
TECHNIQUES |= {"dropout": "#D55E00", "weight decay": "#E69F00", "StepLR": "#332288", "Xavier": "#882255"}
TECHNIQUES |= {"batch norm": "#0072B2", "layer norm": "#009E73", "instance norm": "#CC79A7", "He": "#44AA99"}
TECHNIQUES |= {"lower rate": "#56B4E9", "right labels": "#999999", "group norm": "#994F00", "RMS norm": "#999933"}
TECHNIQUES |= {"masked batch norm": "#661100", "cosine": "#6699CC", "one-cycle": "#AA4499", "plateau": "#117733"}
OTHERS = ["#117733", "#AA4499", "#44AA99", "#661100", "#6699CC", "#DDCC77", "#332288"]  # Paul Tol's muted palette


def words(name: object) -> str:
    """A label, or the name of a dimension, as a reader would write it."""
    text = {"True": "yes", "False": "no"}.get(str(name), str(name).replace("_", " "))
    return f"{name:g}" if isinstance(name, float) else text


def label_of(values: xr.DataArray) -> str:
    """What was measured, and its unit."""
    unit = values.attrs.get("unit")
    return values.attrs.get("long_name", words(values.name)) + (f" ({unit})" if unit else "")


def new_figure(title: str, columns: int = 1, height: float = 3.9, share: str = "") -> tuple[Figure, list[Axes]]:
    """A figure whose title asks the question, and its axes from left to right, which `share` "x", "y", "xy" or none."""
    width = {1: 7.0, 2: 9.6}.get(columns, 4.0 * columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(fill(title, round(9 * width)), fontsize=12, fontweight="bold")
    axes = figure.subplots(1, columns, squeeze=False, sharex="x" in share, sharey="y" in share).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def check_labels(arrays: Sequence[xr.DataArray], dims: Sequence[str | None]) -> None:
    """Raise LessonError unless arrays that share an axis, rows or a legend have the same labels in the same order."""
    for dim in filter(None, dims):
        for labels in (each[dim].values.tolist() for each in arrays):
            wanted = arrays[0][dim].values.tolist()
            check_value(f"{dim}, which several arrays share,", labels, f"{wanted} in all of them", labels == wanted)


def by_hue(values: xr.DataArray, hue: str | None) -> list[tuple[str, object, xr.Dataset]]:
    """For each value of `hue`, or the whole: label, colour (a technique's own; numbers pale to dark), interval."""
    if hue is None:
        return [("", "black", interval(values))]
    labels = values[hue].values.tolist()
    own = [TECHNIQUES.get(label) for label in labels]
    others = iter([colour for colour in OTHERS if colour not in own] * len(labels))
    colours = [colour or next(others) for colour in own]
    if all(isinstance(label, (int, float)) for label in labels):
        colours = colormaps["viridis_r"](np.linspace(0.2, 1, len(labels))).tolist()
    return [(words(each), colours[i], interval(values.sel({hue: each}))) for i, each in enumerate(labels)]


def lines(
    title: str, arrays: Sequence[xr.DataArray], x: str, hue: str | None, dashed: xr.DataArray | None, even: bool
) -> Figure:
    """Each array (x, hue, seed) in a panel of its own, means as lines, intervals as bands, against x; `dashed` is added
    to the first. even: the values of x evenly spaced, a marker at each; else in proportion.
    """
    check_labels(arrays, [hue])
    one_unit = len({values.attrs.get("unit") for values in arrays}) == 1
    figure, axes = new_figure(title, len(arrays), share="y" if one_unit else "")
    for ax, values in [*([(axes[0], dashed)] if dashed is not None else []), *zip(axes, arrays, strict=True)]:
        places = np.arange(values[x].size) if even else values[x].values
        for label, colour, line in by_hue(values, hue):
            there = line["mean"].notnull().values
            look = {"linestyle": "--"} if values is dashed else {"label": label, "marker": "o" if even else ""}
            ax.plot(places[there], line["mean"][there], color=colour, linewidth=1.8, markersize=4, **look)
            ax.fill_between(places[there], line["low"][there], line["high"][there], color=colour, alpha=0.15, lw=0)
        scale = " (not to scale)" if even and values[x].dtype.kind in "if" else ""
        ax.set(xlabel=words(x) + scale, ylabel=fill(label_of(values), 36))
        if even:
            ax.set_xticks(places, map(words, values[x].values.tolist()))
    if dashed is not None:
        axes[0].set_ylabel(f"{label_of(arrays[0])}\n(dashed: {dashed.attrs['long_name']})")
    return finish(figure, axes, arrays, "axhline", hue)


def dots(title: str, arrays: Sequence[xr.DataArray], y: str, hue: str | None) -> Figure:
    """Each array (y, hue, seed) in a panel of its own: a dot with its interval for each value of y, top to bottom."""
    check_labels(arrays, [y, hue])
    one_unit = len({values.attrs.get("unit") for values in arrays}) == 1
    figure, axes = new_figure(title, len(arrays), 1.9 + 0.4 * arrays[0][y].size, "xy" if one_unit else "y")
    for ax, values in zip(axes, arrays, strict=True):
        for i, (label, colour, effect) in enumerate(by_hue(values, hue)):
            places = np.arange(values[y].size) + 0.16 * (i - (values[hue].size - 1) / 2 if hue else 0)
            error = [effect["mean"] - effect["low"], effect["high"] - effect["mean"]]
            ax.errorbar(effect["mean"], places, xerr=error, fmt="os^Dv*Px"[i % 8], color=colour, capsize=3, label=label)
        ax.set_yticks(range(values[y].size), map(words, values[y].values.tolist()))
        ax.set(xlabel=label_of(values), ylim=(max(values[y].size, 1) - 0.5, -0.5))
    return finish(figure, axes, arrays, "axvline", hue)


def heat(title: str, arrays: Sequence[xr.DataArray], x: str, y: str) -> Figure:
    """Each array (y, x, seed) in a panel of its own, its means as colours and numbers, the first y at the bottom."""
    figure, axes = new_figure(title, len(arrays))
    for ax, values in zip(axes, arrays, strict=True):
        cells = values.mean("seed").transpose(y, x)
        image = ax.imshow(cells, cmap="viridis", aspect="auto", origin="lower")
        for (i, j), cell in np.ndenumerate(cells.values):
            colour = "white" if sum(image.cmap(image.norm(cell))[:3]) < 1.5 else "black"
            ax.text(j, i, f"{cell:.1f}" if np.isfinite(cell) else "–", ha="center", va="center", color=colour)
        ax.grid(False)
        ax.set_xticks(range(cells[x].size), map(words, cells[x].values.tolist()))
        ax.set_yticks(range(cells[y].size), map(words, cells[y].values.tolist()))
        ax.set(xlabel=words(x), ylabel=words(y), title=label_of(values))
    return figure


def finish(figure: Figure, axes: Sequence[Axes], arrays: Sequence[xr.DataArray], line: str, hue: str | None) -> Figure:
    """The figure with a `line` at zero where gains are shown, and one legend, below all panels."""
    for ax, values in zip(axes, arrays, strict=True):
        if values.attrs.get("unit") == "points":
            getattr(ax, line)(0, color="black", linewidth=1)
    if hue:
        named, columns = axes[0].get_legend_handles_labels(), 5 if len(axes) > 1 else 4
        figure.legend(*named, loc="outside lower center", ncols=columns, frameon=False, title=words(hue))
    return figure
