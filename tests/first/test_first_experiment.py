import math
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context

import numpy as np
import pytest
import torch
from first_recipes import DIVERGES, SMALL, noisy

from common.first.data import LessonError
from common.first.experiment import (
    AllDivergedError,
    Comparison,
    SameProcess,
    Tuning,
    compare,
    tuning_seeds,
    what_varies,
    workers,
)
from common.first.training import Run

ARMS = {"plain": SMALL, "noisy": replace(SMALL, model=noisy)}
SEEDS = [0, 1, 2]


def scaled(width: int, scale: float) -> None:
    """Never called: only its signature is looked at."""


def leave_note(model, split) -> dict:
    return {"note": 1}


def numbers(runs: Comparison) -> list:
    return [(run.seed, run.history, run.final, run.best, run.notes) for row in runs.runs.values() for run in row]


def test_same_numbers_for_any_number_of_jobs():
    with workers(1, "digits") as one:
        alone = compare(ARMS, "plain", SEEDS, one)
    with workers(2, "digits") as two:
        together = compare(ARMS, "plain", SEEDS, two)
    assert numbers(alone) == numbers(together)


@pytest.mark.parametrize(
    "executor", [lambda: ThreadPoolExecutor(1), lambda: ProcessPoolExecutor(1, mp_context=get_context("fork"))]
)
def test_any_executor_will_do(executor):
    with executor() as pool:
        runs = compare(ARMS, "plain", [0], pool)
    assert numbers(runs) == numbers(compare(ARMS, "plain", [0], SameProcess()))


def test_runs_keep_the_order_of_arms_and_seeds_and_each_is_announced():
    ended = []
    runs = compare(ARMS, "plain", [5, 3], SameProcess(), advance=ended.append)
    assert list(runs.runs) == ["plain", "noisy"]
    assert [run.seed for run in runs.runs["noisy"]] == [5, 3]
    assert len(ended) == 4


def test_differences_are_paired_with_each_arms_own_baseline():
    def run(seed: int, accuracy: float) -> Run:
        return Run(seed, final={"test_accuracy": accuracy})

    rows = {"a": (0.5, 0.7), "b": (0.6, 0.8), "c": (0.1, 0.3), "d": (0.2, 0.5)}
    runs = Comparison(
        [0, 1],
        dict.fromkeys(rows, SMALL),
        {"a": "a", "b": "a", "c": "c", "d": "c"},
        {arm: [run(seed, value) for seed, value in enumerate(values)] for arm, values in rows.items()},
    )
    assert runs.gain("b").mean == pytest.approx(10)
    assert runs.gain("b").low == pytest.approx(10)
    assert runs.gain("d").mean == pytest.approx(15)
    assert runs.gain("d", "a").mean == pytest.approx(-25)
    assert runs.best(["a", "b", "c"], "test_accuracy") == "b"


def test_a_diverging_arm_is_kept_and_counted():
    runs = compare({"plain": SMALL, "huge": DIVERGES}, "plain", SEEDS, SameProcess(), inspect=leave_note)
    assert runs.estimate("test_accuracy", "huge").n == 0
    assert runs.gain("huge").n == 0
    assert all(run.diverged_at for run in runs.runs["huge"])
    assert np.isnan(runs.notes("note", "huge")).all()
    assert runs.history("train_loss", "huge").shape[0] == 3
    assert runs.best(["huge", "plain"]) == "plain"
    only = compare({"huge": DIVERGES}, "huge", [0], SameProcess())
    with pytest.raises(AllDivergedError, match="every run diverged"):
        only.notes("note", "huge")


def test_history_pads_runs_that_ended_early():
    rows = {"a": [Run(0, {"epoch": [0, 1, 2], "x": [1, 2, 3]}), Run(1, {"epoch": [0], "x": [5]}, diverged_at=4)]}
    table = Comparison([0, 1], {"a": SMALL}, {"a": "a"}, rows).history("x", "a")
    assert table[0].tolist() == [1, 2, 3]
    assert table[1, 0] == 5
    assert np.isnan(table[1, 1:]).all()


def test_what_varies_is_computed_from_the_arms():
    a = replace(SMALL, model=partial(noisy), optimizer=partial(torch.optim.SGD, lr=0.1))
    b = replace(a, optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9), epochs=9)
    varies, held = what_varies([a, b])
    assert set(varies) == {"optimizer.lr", "optimizer.momentum", "epochs"}
    assert held["model"] == "noisy"
    assert held["optimizer"] == "SGD"
    assert what_varies([a, a])[0] == []
    positional = [replace(SMALL, model=partial(partial(scaled, 2), scale=scale)) for scale in (1, 3)]
    varies, held = what_varies(positional)
    assert varies == ["model.scale"]
    assert held["model.width"] == "2"
    assert what_varies([replace(SMALL, model=partial(scaled, width)) for width in (1, 2)])[0] == ["model.width"]


def test_a_function_no_worker_could_find_is_refused_in_one_line():
    with pytest.raises(LessonError, match="named at the top level"):
        compare({"a": replace(SMALL, model=lambda task: None)}, "a", [0], SameProcess())


def test_a_baseline_must_be_an_arm():
    with pytest.raises(LessonError, match="look at none"):
        compare(ARMS, "none", [0], SameProcess())


def test_an_error_in_a_run_reaches_the_caller():
    with workers(2, "digits") as pool, pytest.raises(LessonError, match="training examples"):
        compare({"a": replace(SMALL, examples=5000)}, "a", SEEDS, pool)


def test_one_seed_has_a_mean_and_no_interval():
    runs = compare(ARMS, "plain", [0], SameProcess())
    assert math.isfinite(runs.gain("noisy").mean)
    assert math.isnan(runs.gain("noisy").low)


def test_an_interruption_does_not_wait_for_the_runs_in_progress():
    start = time.monotonic()

    def interrupted() -> None:
        with workers(2, "digits") as pool:
            for _ in range(4):
                pool.submit(time.sleep, 60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 30  # not a timing: the runs would have slept for two minutes
    assert not active_children()


@pytest.mark.parametrize("reported", [range(10), [1_000_001, 1_000_002], [5]])
def test_tuning_seeds_are_none_of_those_reported(reported):
    seeds = tuning_seeds(reported, 4)
    assert len(set(seeds)) == 4
    assert not set(seeds) & set(reported)


def test_tuning_picks_the_best_mean_and_never_one_that_lost_a_run():
    scores = {0.1: np.array([0.5, 0.7]), 0.2: np.array([0.9, np.nan]), 0.3: np.array([0.8, 0.6]), 0.4: np.full(2, 0.7)}
    assert Tuning("validation_accuracy", {"row": scores}).best("row") == 0.3  # of equals the first
    assert Tuning("validation_loss", {"row": scores}).best("row") == 0.1
    assert math.isnan(Tuning("validation_loss", {"row": scores}).mean("row", 0.2))
