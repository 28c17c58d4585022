"""Arms × seeds: run every recipe on every seed, and hold the results so that they can be compared pair by pair."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.first.data import FOLDER, LessonError, load
from common.first.statistics import Estimate, estimate, paired_difference, points
from common.first.training import Recipe, Run, fit


class AllDivergedError(LessonError):
    """A trained model was to be looked at, and there is none."""


class SameProcess(Executor):
    """An executor that does each task at once, where it stands."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def warm_up(dataset: str, folder: Path) -> None:
    """Pay once, before any worker is forked, for what every run needs: the data and PyTorch's optimisers."""
    torch.set_num_threads(1)  # parallel runs, each on one thread, beat one run on many at these sizes
    load(dataset, folder)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def start_worker(dataset: str, folder: Path) -> None:
    """Prepare a worker: leave Ctrl-C to the parent, end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    warm_up(dataset, folder)


@contextmanager
def workers(jobs: int, dataset: str, folder: Path = FOLDER) -> Iterator[Executor]:
    """An executor for `jobs` runs at a time on a data set kept in `folder`: this process for one, else processes.

    On Linux they are forked after `warm_up`, which costs 0.05 s; elsewhere they are spawned. If the body raises,
    Ctrl-C included, the processes are ended at once.
    """
    warm_up(dataset, folder)
    if jobs == 1:
        yield SameProcess()
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(dataset, folder))
    try:
        pool.submit(int).result()  # fork now, while this process has no other thread
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def flatten(name: str, value: Any) -> dict[str, str]:
    """A setting as a reader would write it, the arguments of partial functions included, by name:
    {"model": "mlp", "model.width": "128", …}.
    """
    if not isinstance(value, partial):
        return {name: getattr(value, "__name__", None) or str(value)}
    settings = flatten(name, value.func)
    arguments = signature(value.func).bind_partial(*value.args, **value.keywords).arguments
    for key, argument in arguments.items():
        settings |= flatten(f"{name}.{key}", argument)
    return settings


def what_varies(arms: Sequence[Recipe]) -> tuple[list[str], dict[str, str]]:
    """The names of the settings in which the recipes differ, and the settings that all of them share."""
    settings = []
    for recipe in arms:
        settings.append({})
        for each in fields(recipe):
            settings[-1] |= flatten(each.name, getattr(recipe, each.name))
    names = dict.fromkeys(name for each in settings for name in each)
    varies = [name for name in names if len({each.get(name) for each in settings}) > 1]
    return varies, {name: settings[0][name] for name in names if name not in varies}


@dataclass(frozen=True)
class Comparison:
    """The runs of every arm, in the order of `seeds`, and the arm that each arm is compared with."""

    seeds: Sequence[int]
    arms: dict[str, Recipe]
    baseline: dict[str, str]
    runs: dict[str, list[Run]]

    def values(self, metric: str, arm: str) -> np.ndarray:
        """The metric (see Run.value) of each run of the arm, (seeds,), NaN where a run diverged."""
        return np.array([run.value(metric) for run in self.runs[arm]])

    def estimate(self, metric: str, arm: str) -> Estimate:
        """Mean and 95 % interval of the metric over the arm's seeds."""
        return estimate(self.values(metric, arm))

    def difference(self, metric: str, arm: str, other: str | None = None) -> Estimate:
        """Paired difference, seed by seed, of the arm minus its baseline (or minus `other`)."""
        return paired_difference(self.values(metric, arm), self.values(metric, other or self.baseline[arm]))

    def gain(self, arm: str, other: str | None = None) -> Estimate:
        """Paired difference in test accuracy, in percentage points, of the arm over its baseline (or `other`)."""
        return points(self.difference("test_accuracy", arm, other))

    def notes(self, name: str, arm: str) -> np.ndarray:
        """A note that a hook or `inspect` left in each run of the arm, stacked: (seeds, …); NaN for diverged runs.

        Raises AllDivergedError when no run of any arm left such a note.
        """
        kept = [run.notes[name] for row in self.runs.values() for run in row if name in run.notes]
        if not kept:
            raise AllDivergedError(f"every run diverged: there is no {name!r} to look at")
        lost = np.full(np.shape(kept[0]), np.nan)
        return np.array([run.notes.get(name, lost) for run in self.runs[arm]], dtype=float)

    def history(self, metric: str, arm: str) -> np.ndarray:
        """The metric by measured epoch, (seeds, measurements); NaN from where a run diverged or stopped."""
        rows = [run.history.get(metric, []) for run in self.runs[arm]]
        table = np.full((len(rows), len(self.epochs(arm))), np.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        return table

    def epochs(self, arm: str) -> list[float]:
        """The epochs at which the arm's longest run was measured."""
        return max((run.history.get("epoch", []) for run in self.runs[arm]), key=len)

    def best(self, arms: Sequence[str], metric: str = "validation_accuracy") -> str:
        """The arm with the highest mean of the metric; one that lost a run comes last.

        Choose on validation; read the test set for the chosen.
        """
        return max(arms, key=lambda arm: np.nan_to_num(self.values(metric, arm), nan=-np.inf).mean())


def tuning_seeds(reported: Sequence[int], count: int) -> list[int]:
    """`count` seeds to choose settings with, none of which is reported on."""
    first = max(1_000_000, max(reported) + 1)
    return list(range(first, first + count))


@dataclass(frozen=True)
class Tuning:
    """A grid: in each of its rows the scores on validation by candidate, (seeds,), NaN where a run diverged."""

    metric: str
    scores: dict[str, dict[float, np.ndarray]]

    def mean(self, row: str, candidate: float) -> float:
        """The mean score over the seeds, NaN if any run diverged."""
        return float(self.scores[row][candidate].mean())

    def best(self, row: str) -> float:
        """The candidate with the best mean score: the lowest loss, or the highest accuracy. One that lost a run comes
        last; of equals the first wins.
        """
        sign = -1 if self.metric.endswith("loss") else 1
        means = {candidate: sign * self.mean(row, candidate) for candidate in self.scores[row]}
        return max(means, key=lambda candidate: np.nan_to_num(means[candidate], nan=-np.inf))


def compare(
    arms: dict[str, Recipe],
    baseline: str | dict[str, str],
    seeds: Sequence[int],
    executor: Executor,
    dataset: str = "digits",
    device: str = "cpu",
    inspect: Callable[..., dict[str, Any]] | None = None,
    advance: Callable[[Future], None] | None = None,
) -> Comparison:
    """Train every arm on every seed, on any executor whose tasks run one at a time in each process.

    baseline: the arm all others are compared with, or for each arm the name of its own.
    inspect: see `fit`. advance: called once for each run that ended.

    Raises LessonError when a recipe holds a function that no other process could find, or a baseline is no arm.
    """
    pairs = dict.fromkeys(arms, baseline) if isinstance(baseline, str) else baseline
    if unknown := (set(pairs) ^ set(arms)) | (set(pairs.values()) - set(arms)):
        raise LessonError(f"every arm needs a baseline that is an arm; look at {', '.join(sorted(unknown))}")
    try:
        pickle.dumps((arms, inspect))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LessonError(f"a recipe may hold only functions named at the top level of the script ({error})") from None
    futures: dict[str, list[Future]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, recipe in arms.items():
            future = executor.submit(fit, recipe, seed, dataset, device, inspect)
            if advance:
                future.add_done_callback(advance)
            futures[arm].append(future)
    wait([future for row in futures.values() for future in row], return_when="FIRST_EXCEPTION")
    return Comparison(seeds, arms, pairs, {arm: [future.result() for future in row] for arm, row in futures.items()})
