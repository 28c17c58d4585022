"""Figures: seed mean with its band, the baseline always black, colours that colour-blind readers can tell apart."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.first.experiment import Comparison, Tuning
from common.first.statistics import Estimate, estimates

BASELINE = "black"
# Okabe & Ito's colour-blind-safe palette without its yellow, too pale for a line; a purple and a grey added
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#999999"]


def new_figure(title: str, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure whose title asks the question, and its axes, row by row. It needs no display and no pyplot."""
    width = {1: 7.0, 2: 9.6, 3: 12.0}.get(columns, 3.2 * columns)
    figure = Figure(figsize=(width, 3.9 * rows if columns < 4 else 2.9 * rows), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def colours(arms: Sequence[str], baseline: str | None = None) -> dict[str, str]:
    """A colour for each arm: black for the baseline, the palette for the others."""
    others = [arm for arm in arms if arm != baseline]
    palette = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(others)}
    return {baseline: BASELINE, **palette} if baseline in arms else palette


def plot_estimates(
    ax: Axes, x: Sequence[float], estimates: Sequence[Estimate], label: str, colour: str, style: str = "-"
) -> None:
    """Line of means with a band for the 95 % interval; a point where every run diverged is left out."""
    mean, low, high, _ = np.array(estimates, dtype=float).T
    ax.plot(x, mean, style, color=colour, label=label, marker="o", markersize=3.5, linewidth=1.8)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def plot_history(
    ax: Axes, epochs: Sequence[float], values: np.ndarray, label: str, colour: str, style: str = "-", diverged: int = 0
) -> None:
    """Mean over seeds of `values` (seeds, measurements) by epoch, with its 95 % band.

    Where runs `diverged` the label counts them, and a cross marks each epoch after which one was lost.
    """
    if diverged:
        label = f"{label} ({diverged} of {len(values)} diverged)"
    mean, low, high, n = np.array(estimates(values) or np.empty((0, 4)), dtype=float).T
    ax.plot(epochs, mean, style, color=colour, label=label, linewidth=1.8)
    ax.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    if diverged:
        lost = np.flatnonzero(n > np.append(n[1:], len(values) - diverged))
        ax.plot(np.array(epochs)[lost], mean[lost], "x", color=colour, markersize=9, markeredgewidth=2.5)


def plot_curves(
    ax: Axes, runs: Comparison, metric: str, style: str = "-", unit: float = 1.0, legend: bool = True
) -> None:
    """A `plot_history` for every arm of a comparison, the baseline black; named in the legend or not."""
    for arm, colour in colours(list(runs.arms), next(iter(runs.baseline.values()))).items():
        diverged = sum(run.diverged_at is not None for run in runs.runs[arm])
        plot_history(
            ax,
            runs.epochs(arm),
            unit * runs.history(metric, arm),
            arm if legend else f"_{arm}",
            colour,
            style,
            diverged,
        )
    ax.set_xlabel("epoch")


def plot_reliability(ax: Axes, tables: np.ndarray, label: str, colour: str, least: int = 20) -> None:
    """Accuracy against confidence, in %, from `reliability` tables of several seeds (seeds, 3, bins), pooled.

    Bins with fewer than `least` predictions are left out.
    """
    count, confidence, right = np.nansum(tables, axis=0)
    kept = count >= least
    ax.plot(100 * confidence[kept] / count[kept], 100 * right[kept] / count[kept], "o-", color=colour, label=label)


def shared_legend(figure: Figure, ax: Axes, columns: int = 4) -> None:
    """One legend below all panels, from the labels of `ax`, where it can cover no data."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def plot_dots(ax: Axes, effects: dict[str, Estimate], colour: str, label: str = "") -> None:
    """A dot with its 95 % interval for each name, from top to bottom."""
    mean, low, high, _ = np.array(list(effects.values()), dtype=float).T
    places = np.arange(len(effects))
    ax.errorbar(mean, places, xerr=[mean - low, high - mean], fmt="o", color=colour, capsize=3, label=label)
    ax.set_yticks(places, list(effects))
    ax.set_ylim(len(effects) - 0.5, -0.5)


def heat_map(
    ax: Axes,
    cells: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    stars: Sequence[int],
) -> None:
    """Numbers as colours, (rows, columns), from `low` to `high`, the first row at the bottom; a star marks one column
    of each row.
    """
    ax.imshow(cells, cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower")
    for i, j in np.ndindex(cells.shape):
        star = "*" if j == stars[i] else ""
        colour = "white" if cells[i, j] <= (low + 2 * high) / 3 else "black"
        text = f"{cells[i, j]:.1f}{star}" if np.isfinite(cells[i, j]) else "–"
        ax.text(j, i, text, ha="center", va="center", color=colour)
    ax.grid(False)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)


def plot_grid(ax: Axes, tuning: Tuning, low: float, high: float) -> None:
    """A heat map of accuracies in %, rows by shared candidates, coloured from `low` to `high`; a star marks the best
    of each row.
    """
    rows = list(tuning.scores)
    candidates = list(tuning.scores[rows[0]])
    cells = np.array([[100 * tuning.mean(row, each) for each in candidates] for row in rows])
    stars = [candidates.index(tuning.best(row)) for row in rows]
    heat_map(ax, cells, rows, [f"{each:g}" for each in candidates], low, high, stars)


def log_ticks(ax: Axes, x: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at these values and no others."""
    ax.set_xscale("log")
    ax.set_xticks(x, [f"{each:g}" for each in x])
    ax.minorticks_off()
