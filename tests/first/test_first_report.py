import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from first_recipes import DIVERGES, SMALL, noisy
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from common.first import report
from common.first.experiment import Comparison, SameProcess, Tuning, compare
from common.first.plotting import (
    BASELINE,
    colours,
    heat_map,
    log_ticks,
    new_figure,
    plot_curves,
    plot_dots,
    plot_estimates,
    plot_grid,
    plot_reliability,
    shared_legend,
)
from common.first.report import Table
from common.first.statistics import NOT_JUDGED, Claim, Estimate, above
from common.first.training import Run

LONG_NAME = "an arm with a rather long name"


@pytest.fixture(scope="module")
def runs() -> Comparison:
    arms = {"plain": SMALL, LONG_NAME: replace(SMALL, model=noisy), "rate 1e3": DIVERGES}
    return compare(arms, "plain", [0, 1], SameProcess())


def printed(table: Table) -> str:
    stream = io.StringIO()
    report.print_table(Console(file=stream, width=80), table)
    return stream.getvalue()


def test_tables_fit_80_columns_and_lose_no_number(runs):
    for table in (report.loss_table(runs), report.summary_table(runs)):
        text = printed(table)
        assert all(len(line) <= 80 for line in text.splitlines())
        assert "…" not in text
        for row in table.rows:
            assert all(cell in text for cell in row[1:])


def test_a_claim_wraps_by_words_and_keeps_its_numbers():
    effect = Estimate(-4.25, -5.5, -3.0, 10)
    claim = Claim(
        "x-1", "A statement of many words " * 4, "A source 2014", "x", above(0.5), effect, "points", 10, NOT_JUDGED
    )
    text = printed(report.claims_table([report.claim_json(claim)]))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "-4.2 [-5.5, -3.0]" in text
    assert "…" not in text


def test_losses_of_arms_that_train_for_different_times_share_no_epoch_heading(runs):
    heads = report.loss_table(runs).columns
    assert heads[-1] == "100 % of\ntraining"
    equal = Comparison(runs.seeds, {"plain": SMALL}, {"plain": "plain"}, {"plain": runs.runs["plain"]})
    assert report.loss_table(equal).columns[-1] == "epoch\n3"


def test_losses_stand_at_the_share_of_each_arms_own_training(runs):
    long, short = replace(SMALL, epochs=100), replace(SMALL, epochs=10)

    def row(epochs: list[int]) -> list[Run]:
        values = [float(epoch) for epoch in epochs]
        return [Run(0, {"epoch": epochs, "train_loss": values, "validation_loss": values})]

    rows = {"long": row([0, 25, 50, 75, 100]), "short": row([0, 5, 10]), "lost": row([0, 25])}
    arms = {"long": long, "short": short, "lost": long}
    table = report.loss_table(Comparison([0], arms, dict.fromkeys(arms, "long"), rows))
    assert table.rows[0][3] == "50.00/50.00"
    assert [table.rows[1][i] for i in (1, 3, 5)] == ["0.00/0.00", "5.00/5.00", "10.00/10.00"]
    assert table.rows[2][2:] == ["25.00/25.00", "–/–", "–/–", "–/–"]


def test_losses_leave_out_shares_of_training_at_which_nothing_was_measured():
    arms = {"a": replace(SMALL, epochs=10), "b": replace(SMALL, epochs=20)}
    rows = {
        arm: [Run(0, {"epoch": [0, recipe.epochs], "train_loss": [2.0, 1.0], "validation_loss": [2.0, 1.0]})]
        for arm, recipe in arms.items()
    }
    table = report.loss_table(Comparison([0], arms, dict.fromkeys(arms, "a"), rows))
    assert table.columns == ["arm", "0 % of\ntraining", "100 % of\ntraining"]
    assert table.rows == [["a", "2.00/2.00", "1.00/1.00"], ["b", "2.00/2.00", "1.00/1.00"]]


@pytest.mark.parametrize("epochs", [(3, 3), (3, 5)])
@pytest.mark.parametrize("history", [{}, {"epoch": [0], "train_loss": [2.3], "validation_loss": [2.3]}])
def test_tables_survive_when_every_run_diverges_at_the_start(epochs, history):
    arms = {str(i): replace(SMALL, epochs=each) for i, each in enumerate(epochs)}
    lost = Run(0, history, diverged_at=0)
    table = report.loss_table(Comparison([0], arms, dict.fromkeys(arms, "0"), {arm: [lost] for arm in arms}))
    assert len(table.rows) == 2
    assert all(len(row) == len(table.columns) for row in table.rows)
    printed(table)


def test_diverged_runs_show_in_the_table_and_in_words(runs):
    row = report.summary_table(runs).rows[2]
    assert row[0] == "rate 1e3"
    assert row[1] == row[4] == row[5] == "–"
    assert row[6] == "2"
    line = report.diverged_lines(runs)[0]
    assert line.startswith("rate 1e3: 2 of 2 runs diverged at step")


def test_json_is_strict_and_complete(runs, tmp_path):
    report.write_json(tmp_path / "r.json", {"arms": report.arms_json(runs), "array": np.array([1.0, math.nan])})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert read["array"] == [1.0, None]
    lost = read["arms"]["rate 1e3"]["runs"][0]
    assert lost["diverged_at"] >= 1
    assert lost["test"] == {"loss": None, "accuracy": None}
    kept = read["arms"]["plain"]["runs"][0]
    assert set(kept) >= {"seed", "seconds", "diverged_at", "train", "validation", "test", "history"}
    wanted = {"epoch", "train_loss", "validation_loss", "validation_accuracy", "learning_rate"}
    assert wanted <= set(kept["history"])
    assert read["arms"]["plain"]["summary"]["test_accuracy"]["n"] == 2
    assert read["arms"]["rate 1e3"]["difference"]["test_accuracy"] == {"mean": None, "low": None, "high": None, "n": 0}


def test_numbers_read_well():
    assert [report.number(x, 2) for x in (0.0, 1.234, 12345.6, 1e-5, math.nan)] == [
        "0.00",
        "1.23",
        "1.2e+04",
        "1.0e-05",
        "–",
    ]
    assert [report.loss(x) for x in (0.001, 0.0, 0.5)] == ["<0.01", "0.00", "0.50"]
    assert report.interval(Estimate(1, -2, 4, 3)) == "+1.0 [-2.0, +4.0]"
    assert report.interval(Estimate(1, math.nan, math.nan, 1)) == "+1.0"


def test_markdown_tables_have_one_line_a_row():
    lines = report.markdown(Table("T", ["arm", "train\nloss"], [["a | b", "1"]])).splitlines()
    assert lines == ["**T**", "", "| arm | train loss |", "| :-- | --: |", "| a \\| b | 1 |"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def breaks(aside) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write_whole(path, breaks)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_source_hash_sees_code_and_not_words(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DECIDES_NUMBERS", ["first/training"])
    (tmp_path / "common" / "first").mkdir(parents=True)
    (tmp_path / "common" / "first" / "training.py").write_text('"""Doc."""\nEPOCHS = 3\n')
    (tmp_path / "lesson.py").write_text('def f():\n    """Doc."""\n    return 0.1  # why\n')
    before = report.source_hash("lesson")
    (tmp_path / "lesson.py").write_text('# %% other words\ndef f():\n    """Other words."""\n\n    return 0.1\n')
    assert report.source_hash("lesson") == before
    (tmp_path / "lesson.py").write_text("def f():\n    return 0.2\n")
    changed = report.source_hash("lesson")
    assert changed != before
    (tmp_path / "common" / "first" / "training.py").write_text("EPOCHS = 4\n")
    assert report.source_hash("lesson") != changed


def not_blank(path) -> bool:
    with Image.open(path) as image:
        low, high = image.convert("L").getextrema()
        return image.width >= 600 and high - low > 100


def test_curves_of_diverged_arms_are_drawn_and_labelled(runs, tmp_path):
    figure, (ax,) = new_figure("A question?")
    plot_curves(ax, runs, "validation_loss")
    shared_legend(figure, ax)
    figure.savefig(tmp_path / "a.png")
    assert not_blank(tmp_path / "a.png")
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["plain", LONG_NAME, "rate 1e3 (2 of 2 diverged)"]
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert len(crosses) == 1
    assert len(crosses[0].get_xdata()) >= 1


def test_estimates_without_numbers_leave_a_gap():
    _, (ax,) = new_figure("A question?")
    plot_estimates(
        ax,
        [1, 2, 3],
        [Estimate(1, 0, 2, 5), Estimate(math.nan, math.nan, math.nan, 0), Estimate(2, 1, 3, 5)],
        "x",
        "red",
    )
    assert np.isnan(ax.lines[0].get_ydata()[1])


def test_reliability_pools_the_seeds():
    _, (ax,) = new_figure("A question?")
    table = np.zeros((2, 3, 10))
    table[:, :, 9] = [15, 14.4, 12]
    plot_reliability(ax, table, "x", "red")
    assert ax.lines[0].get_xdata().tolist() == [pytest.approx(96)]
    assert ax.lines[0].get_ydata().tolist() == [pytest.approx(80)]


def test_the_baseline_is_always_black_and_no_two_arms_share_a_colour():
    chosen = colours(["a", "b", "base", "c"], "base")
    assert chosen["base"] == BASELINE
    assert len(set(chosen.values())) == 4
    assert isinstance(new_figure("x", 3)[0], Figure)


def test_a_tuning_table_marks_the_chosen_and_fits_80_columns():
    accuracy = {
        "decay": {1e-05: [0.5], 0.1: [0.75]},
        "dropout with a longer name": {0.2: [0.8], 0.5: [0.7], 0.9: [0.1]},
    }
    scores = {row: {key: np.array(value) for key, value in grid.items()} for row, grid in accuracy.items()}
    table = report.tuning_table("Strength", Tuning("validation_accuracy", scores), [7])
    assert table.rows == [
        ["decay", "1e-05: 50.0", "0.1: 75.0*", ""],
        ["dropout with a longer name", "0.2: 80.0*", "0.5: 70.0", "0.9: 10.0"],
    ]
    assert all(len(line) <= 80 for line in printed(table).splitlines())
    same = {row: {0.1: np.array([2.0, 1.0]), 1.0: np.array([1.0, 1.0])} for row in ("SGD", "Adam")}
    table = report.tuning_table("Rate", Tuning("validation_loss", same), [7, 8])
    assert table.columns == ["arm", "0.1", "1"]
    assert table.rows[0] == ["SGD", "1.500", "1.000*"]
    assert table.title == "Rate, chosen (*) by validation loss, seeds 7 to 8"


def test_what_diverged_is_a_dash_and_never_nan():
    runs = compare({"gone": DIVERGES, "plain": SMALL}, "plain", [0, 1], SameProcess())
    for table in (report.summary_table(runs), report.loss_table(runs)):
        cells = [cell for row in table.rows for cell in row]
        assert any("–" in cell for cell in cells)
        assert not any("nan" in cell for cell in cells)
    assert [report.signed(value) for value in (0.126, -2.0, math.nan)] == ["+0.13", "-2.00", "–"]
    assert [report.signed(value, 1) for value in (3.05e17, -2e6, 999999.0)] == ["+3e+17", "-2e+06", "+999999.0"]


def test_huge_losses_leave_room_for_the_names():
    assert [report.loss(value) for value in (0.0, 0.001, 2.3, 9999.0, 3.4e8, math.nan, math.inf)] == [
        "0.00",
        "<0.01",
        "2.30",
        "9999.00",
        "3e+08",
        "–",
        "–",
    ]
    history = {name: [3.4e19] * 6 for name in ("train_loss", "validation_loss")} | {"epoch": list(range(6))}
    runs = Comparison([0], {"arm": SMALL}, {"arm": "arm"}, {"arm": [Run(0, history)]})
    console = Console(file=io.StringIO(), width=80)
    report.print_table(console, report.loss_table(runs))
    assert "arm" in console.file.getvalue().splitlines()[-2]
    assert "…" not in console.file.getvalue()


def test_dots_are_named_from_top_to_bottom():
    figure, (ax,) = new_figure("x")
    plot_dots(ax, {"a": Estimate(1, 0, 3, 10), "b": Estimate(math.nan, math.nan, math.nan, 0)}, "black", "gain")
    figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim() == (1.5, -0.5)
    low, high = ax.containers[0][2][0].get_segments()[0][:, 0]
    assert (low, high) == (0, 3)


def test_a_grid_shows_every_cell_and_stars_the_best_of_each_row():
    scores = {
        "lr 1": {0.1: np.array([0.5]), 1.0: np.array([0.9])},
        "lr 2": {0.1: np.array([0.7]), 1.0: np.array([np.nan])},
    }
    figure, (ax,) = new_figure("x")
    plot_grid(ax, Tuning("validation_accuracy", scores), 50, 90)
    figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["50.0", "90.0*", "70.0*", "–"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.1", "1"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["lr 1", "lr 2"]


def test_a_heat_map_is_rows_by_columns_from_the_bottom():
    figure, (ax,) = new_figure("x")
    heat_map(ax, np.array([[1.0, 2.0, 3.0], [4.0, np.nan, 6.0]]), ["a", "b"], ["x", "y", "z"], 0, 10, [2, 0])
    figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["1.0", "2.0", "3.0*", "4.0*", "–", "6.0"]
    assert [text.get_position() for text in ax.texts[:4]] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y", "z"]
    assert ax.get_ylim() == (-0.5, 1.5)


def test_log_ticks_are_those_asked_for():
    figure, (ax,) = new_figure("x")
    ax.plot([50, 800], [1, 2])
    log_ticks(ax, [50, 200, 800])
    figure.canvas.draw()
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["50", "200", "800"]
    assert not ax.xaxis.get_minorticklocs().size
