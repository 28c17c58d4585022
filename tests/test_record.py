"""The files of a run: written whole or not at all, strict JSON, and a page that holds everything."""

import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from recipes import DIVERGES, SMALL

from common.data import FOLDER, forget
from common.lab import Lab
from common.training import Recipe
from docs import record
from docs.record import all_numbers, plain, prose, read_record, set_aside, summary, write_record, write_whole
from runner import notebooks
from runner.notebooks import Script

LONG = "a technique with a longer name"

SCRIPT = '''# %% [markdown]
# # A title
#
# ## How to use it
#
# A table | of advice.

# %%
def network():
    return 1


# %% [markdown]
# ## 1. The first question
#
# Guess first.


# %%
@lesson.experiment
def first(lab: Lab) -> None:
    """Which?"""
    lab.study(network)


# %% [markdown]
# **What we saw.** Two lines of what
# was seen [first-1 holds].
#
# **How far it carries.** Not far.
#
# ## 2. The second question
#
# Guess again.


# %%
def helper():
    """Not an experiment."""


# %%
@lesson.experiment
def second(lab: Lab) -> None:
    """And then?"""


# %% [markdown]
# **What we saw.** Nothing.
#
# ## Exercises
#
# None.
'''


def network(technique: str, rate: float) -> Recipe:
    if technique == "diverges":
        return DIVERGES
    return replace(SMALL, optimizer=partial(torch.optim.SGD, lr=rate), epochs=4)


def first(lab: Lab) -> None:
    """Which of them
    is it?

    This is not part of the question.
    """
    techniques = ("none", LONG, "diverges")
    runs = lab.study(network, technique=techniques, tune={"rate": (1e-6, 0.001, 0.01, 0.1, 0.2, 0.3)})
    lab.table({"test accuracy": runs.test_accuracy}, rows="technique")
    lab.curves(runs.validation_loss_curve, hue="technique")
    gain = lab.gain(runs.test_accuracy, technique="none")
    lab.claim("A long name helps", "somebody", gain.sel(technique=LONG), above=0.5)
    lab.claim("A rate | a bar | hurts", "nobody", gain.sel(technique="diverges"), below=-0.5)


def second(lab: Lab) -> None:
    """And then?"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """The folder and the script of a run of two experiments."""
    folder = tmp_path_factory.mktemp("run")
    script = folder.parent / "99_fake.py"
    script.write_text(SCRIPT)
    options = {"dataset": "digits", "seeds": [5, 6], "device": "cpu", "quick": False, "longer": 1, "larger": 1}
    options |= {"verbose": False, "only": None, "list": False, "jobs": 0, "first_seed": 5, "data_dir": FOLDER}
    with ThreadPoolExecutor(1) as pool:
        lab = Lab(
            "99_fake",
            "A fake lesson",
            Script(script, SCRIPT),
            argparse.Namespace(**options, out=folder),
            ["first", "second"],
        )
        lab.executor = pool
        lab.run(first)
        lab.run(second)
    return folder, script


# JSON


def test_what_is_no_number_becomes_null_and_numbers_have_six_digits():
    value = {1: math.nan, "a": (1.23456789, math.inf, -math.inf), "b": {"c": [True, None, 3, "x", 1e-20]}}
    assert plain(value) == {"1": None, "a": [1.23457, None, None], "b": {"c": [True, None, 3, "x", 1e-20]}}
    assert plain(np.float64(0.1)) == 0.1


def test_results_are_strict_json_and_complete(run):
    folder, _ = run

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert set(found) == {"lesson", "title", "settings", "seconds", "environment", "experiments", "claims"}
    assert set(found["environment"]) == {"python", "torch", "machine", "data"}
    assert set(found["settings"]) == {"dataset", "seeds", "device", "quick", "longer", "larger"}
    assert list(found["experiments"]) == ["first", "second"]
    entry = found["experiments"]["first"]
    assert set(entry) == {"question", "varies", "figures", "studies", "printed", "seconds", "source"}
    study = entry["studies"][0]
    assert set(study["data_vars"]) >= {"test_accuracy", "train_loss_curve", "best_epoch", "grid", "chosen_rate"}
    assert study["data_vars"]["test_accuracy"]["dims"] == ["technique", "seed"]
    assert study["data_vars"]["test_accuracy"]["data"][2] == [None, None]
    assert study["data_vars"]["test_accuracy"]["attrs"]["unit"] == "%"
    assert study["coords"]["technique"]["data"] == ["none", LONG, "diverges"]
    wanted = {"id", "statement", "source", "experiment", "expected", "seeds", "verdict", "estimate"}
    assert all(set(claim) == wanted for claim in found["claims"])
    assert set(found["claims"][0]["estimate"]) == {"mean", "low", "high", "n", "unit"}
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["experiments"].values()), rel=1e-4)


def test_a_page_made_anew_is_the_same(run, tmp_path):
    folder, script = run
    write_record(tmp_path, read_record(folder / "results.json"), script.read_text())
    for name in ("results.json", "summary.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# Whole or not at all


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("old")

    def breaks(aside: Path) -> None:
        assert aside.parent == tmp_path
        aside.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, breaks)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_at_once_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def write(aside: Path) -> None:
        assert aside.suffix == ".png"  # by which matplotlib chooses the format
        aside.write_text("new")
        assert path.read_text() == "old"

    write_whole(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_put_in_place_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(*names) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(record, "PAUSES", ())
    with pytest.raises(PermissionError) as error:
        write_whole(path, lambda aside: aside.write_text("new"))
    assert error.value.filename == str(path)
    assert error.value.strerror == "Permission denied (open in another program?)"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def locked(monkeypatch):
    """Lock a file for the next so many tries, as a viewer or a virus scanner on Windows does; returns the tries."""
    tries, real = [], os.replace
    monkeypatch.setattr(record, "PAUSES", (0.0, 0.0, 0.0))

    def lock(path: Path, times: int) -> list[Path]:
        def replace(source: Path, target: Path) -> None:
            tries.append(target)
            if path in (source, target) and tries.count(target) <= times:
                raise PermissionError(13, "Permission denied", str(source))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        return tries

    return lock


def test_a_file_that_is_locked_for_a_moment_is_tried_again(tmp_path, locked):
    path = tmp_path / "a.png"
    path.write_text("old")
    tries = locked(path, times=3)
    write_whole(path, lambda aside: aside.write_text("new"))
    assert path.read_text() == "new"
    assert len(tries) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_that_stays_locked_is_saved_under_another_name(tmp_path, locked):
    """And no training is lost."""
    path = tmp_path / "a.png"
    path.write_text("old")
    locked(path, times=99)
    found = record.write_figure(path, Figure())
    assert found == tmp_path / "a_new.png"
    assert found.read_bytes().startswith(b"\x89PNG")
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, found]


def test_an_earlier_runs_file_that_is_locked_for_a_moment_is_set_aside_all_the_same(tmp_path, locked):
    (tmp_path / "results.json").write_text("{}")
    locked(tmp_path / "results.json", times=2)
    set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["previous-1"]


def test_two_writes_of_one_file_at_once_do_not_meet(tmp_path):
    path, asides = tmp_path / "a.txt", []

    def write(aside: Path) -> None:
        asides.append(aside)
        aside.write_text("outer")
        if len(asides) == 1:
            write_whole(path, write)
        assert aside.read_text() == "outer"

    write_whole(path, write)
    assert len(set(asides)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_unfinished_is_swept_up_and_nothing_else(tmp_path):
    old, new, other = tmp_path / ".a.0.part.png", tmp_path / ".b.1.part.json", tmp_path / ".mine.png"
    for path in (old, new, other):
        path.write_text("")
        os.utime(path, (0, 0))
    os.utime(new)
    record.sweep_up(tmp_path)
    assert sorted(tmp_path.iterdir()) == [new, other]


@pytest.mark.parametrize("content", [b'{"half', b"[1, 2]", b"null", b"3", b'"text"', b"\xff\xfe", b""])
def test_a_file_that_is_no_record_is_none(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    assert read_record(tmp_path / "results.json") == {}


def test_no_file_is_no_record(tmp_path):
    assert read_record(tmp_path / "results.json") == {}
    assert read_record(tmp_path) == {}


def leave(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(name)


def test_an_earlier_run_is_moved_whole_and_nothing_else(tmp_path):
    leave(tmp_path, "results.json", "summary.md", "a.png", "a_2.png", "notes.txt")
    set_aside(tmp_path)
    names = sorted(path.name for path in (tmp_path / "previous-1").iterdir())
    assert names == ["a.png", "a_2.png", "results.json", "summary.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous-1"]


@pytest.mark.parametrize(
    ("there", "number"), [([], 1), ([1], 2), ([1, 2], 3), ([2], 3), ([9, 10], 11), (["x", "2b", 3], 4)]
)
def test_an_earlier_run_is_numbered_above_all_that_are_there(tmp_path, there, number):
    for each in there:
        (tmp_path / f"previous-{each}").mkdir()
    leave(tmp_path, "results.json")
    set_aside(tmp_path)
    assert (tmp_path / f"previous-{number}" / "results.json").read_text() == "results.json"
    assert len(list(tmp_path.iterdir())) == len(there) + 1


def test_a_figure_without_results_is_no_earlier_run(tmp_path):
    leave(tmp_path, "a.png", "summary.md")
    set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "summary.md"]


# A run that goes on with an earlier one


ORDER = ["first", "second", "third"]
DEFINITION = """@lesson.experiment
def {name}(lab):
    lab.study(network, p=({p},))
"""


def own(path: Path, shift: int = 0) -> None:
    """A file of one's own."""
    np.savez(path, x=np.random.default_rng(shift).normal(size=(60, 8, 8)), y=np.arange(60) % 2)


def begin(script: Path | None, folder: Path, **others) -> dict:
    usual = {"dataset": "digits", "seeds": [0], "device": "cpu", "quick": True, "longer": 1, "larger": 1}
    folder.mkdir(exist_ok=True)
    forget()
    options = argparse.Namespace(**usual | others, out=folder, data_dir=FOLDER)
    text = script and Script(script, script.read_text())
    return record.begin("99_fake", "A fake lesson", text, options, ORDER)


def file(begun: dict, script: Path | None, name: str, printed: str = "", seconds: float = 1.0) -> None:
    """Finish an experiment, as a Lab does."""
    entry = {"question": "Which?", "printed": printed, "varies": [], "figures": [], "studies": [], "seconds": seconds}
    estimate = {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 2, "unit": "points"}
    claim = {"id": f"{name}-1", "statement": printed, "source": "somebody", "experiment": name, "expected": "> 0"}
    claim |= {"seeds": 2, "verdict": "holds", "estimate": estimate}
    record.renew(begun, ORDER)
    record.add(begun, name, entry, [claim], ORDER)


def filed(folder: Path) -> dict[str, str]:
    """What was printed by each experiment that is on file, which is also what its claim states."""
    found = read_record(folder / "results.json")
    printed = {name: entry["printed"] for name, entry in found["experiments"].items()}
    assert [(claim["experiment"], claim["statement"]) for claim in found["claims"]] == list(printed.items())
    assert found["seconds"] == sum(entry["seconds"] for entry in found["experiments"].values())
    assert "folder" not in found
    return printed


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "99_fake.py"
    path.write_text(SCRIPT)
    return path


def test_a_run_goes_on_only_with_the_data_that_a_file_of_ones_own_still_holds(script, tmp_path):
    """Whatever its name, its folder and how it is compressed."""
    file_name, out = str(tmp_path / "own.npz"), tmp_path / "out"
    own(file_name)
    file(begin(script, out, dataset=file_name), script, "first")
    with np.load(file_name) as arrays:
        np.savez_compressed(file_name, **arrays)
    file(begin(script, out, dataset=file_name), script, "second")
    assert list(filed(out)) == ["first", "second"]
    own(file_name, shift=1)
    file(begin(script, out, dataset=file_name), script, "third")
    assert list(filed(out)) == ["third"]
    assert list(filed(out / "previous-1")) == ["first", "second"]


def test_a_relative_name_is_another_file_in_another_folder(script, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for name, shift in {"a": 0, "b": 1, "c": 1}.items():
        (tmp_path / name).mkdir()
        own(tmp_path / name / "own.npz", shift)
    for name, there in {"a": ["first"], "b": ["second"], "c": ["second", "third"]}.items():
        monkeypatch.chdir(tmp_path / name)
        file(begin(script, out, dataset="own.npz"), script, there[-1])
        assert list(filed(out)) == there


def test_a_file_in_the_home_folder_is_found(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own(tmp_path / "own.npz")
    assert len(begin(script, tmp_path / "out", dataset="~/own.npz")["environment"]["data"]) == 64


def test_an_experiment_whose_code_is_unchanged_goes_on_when_another_changes(script, tmp_path):
    """And what is no longer so is kept beside it."""
    out = tmp_path / "out"
    for name in ("first", "second"):
        file(begin(script, out), script, name, "old")
    script.write_text(SCRIPT.replace("lab.study(network)", "lab.study(network, rate=(1, 2))"))
    file(begin(script, out), script, "third", "new")
    assert filed(out) == {"second": "old", "third": "new"}
    assert filed(out / "previous-1") == {"first": "old", "second": "old"}


@pytest.mark.parametrize("others", [{"seeds": [1]}, {"dataset": "own.npz"}, {"longer": 2}])
def test_a_run_with_other_settings_begins_anew(script, tmp_path, others, monkeypatch):
    out = tmp_path / "out"
    own(tmp_path / "own.npz")
    monkeypatch.chdir(tmp_path)
    file(begin(script, out), script, "first")
    file(begin(script, out, **others), script, "second")
    assert list(filed(out)) == ["second"]
    assert list(filed(out / "previous-1")) == ["first"]


def test_a_script_without_a_file_is_never_gone_on_with(tmp_path):
    for _ in range(2):
        file(begin(None, tmp_path), None, "first")
    assert list(filed(tmp_path / "previous-1")) == list(filed(tmp_path)) == ["first"]


def test_cells_of_a_notebook_that_change_make_their_experiments_obsolete(tmp_path, monkeypatch):
    """And leave those of other cells alone."""
    cells = [DEFINITION.format(name="first", p=1), DEFINITION.format(name="second", p=2)]
    monkeypatch.setattr(record, "in_notebook", lambda: True)
    monkeypatch.setattr(record, "cells", lambda: "\n".join(cells))
    begun = begin(None, tmp_path)
    for name in ("first", "second"):
        file(begun, None, name, "old")
    cells.append(DEFINITION.format(name="first", p=3))
    file(begun, None, "third", "new")
    assert filed(tmp_path) == {"second": "old", "third": "new"}
    assert filed(tmp_path / "previous-1") == {"first": "old", "second": "old"}


def test_the_cells_of_a_kernel_are_their_definitions(monkeypatch):
    interactive = pytest.importorskip("IPython.core.interactiveshell", reason="needs requirements-dev.txt")
    shell = interactive.InteractiveShell()
    for cell in ("%matplotlib inline\nx = 1", "def f():\n    return x", "1 +", "print(2)", "!ls", "x = 1", "import os"):
        shell.user_ns["In"].append(cell)
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    assert notebooks.cells() == "def f():\n    return x\nx = 1\nimport os"


# The page


def test_prose_is_the_heading_and_the_text_below_an_experiment(run):
    seen = "**What we saw.** Two lines of what\nwas seen [first-1 holds].\n\n**How far it carries.** Not far."
    expected = {
        "first": ("1. The first question", seen),
        "second": ("2. The second question", "**What we saw.** Nothing."),
    }
    assert prose(SCRIPT) == expected
    assert prose("") == {}


def test_prose_finds_every_experiment_of_the_rewritten_lessons():
    from conftest import LESSONS, load_lesson

    for lesson in LESSONS:
        found = prose((ROOT / f"{lesson}.py").read_text(encoding="utf-8"))
        assert list(found) == list(load_lesson(lesson).lesson.experiments)
        assert all(heading for heading, _ in found.values())


def test_the_page_holds_everything(run):
    folder, _ = run
    page, found = (folder / "summary.md").read_text(encoding="utf-8"), read_record(folder / "results.json")
    assert page.startswith("# A fake lesson\n\n2 seeds from 5; dataset digits, device cpu, quick False, ")
    assert "longer 1, larger 1" in page
    wanted = [
        '<a id="first"></a>',
        "## 1. The first question",
        "*Which of them is it?*",
        "![Which of them is it?](first.png)",
        f"```text\n{found['experiments']['first']['printed'].strip()}\n```",
        "A long name helps (somebody)",
        "**What we saw.** Two lines of what\nwas seen [first-1 holds].",
        "**How far it carries.** Not far.",
        "<details>\n<summary>All numbers</summary>",
        all_numbers(found["experiments"]["first"]["studies"][0]),
        "</details>",
        "## 2. The second question",
        "*And then?*",
        "**What we saw.** Nothing.",
    ]
    places = [page.index(each) for each in wanted]
    assert places == sorted(places)
    assert "not part of the question" not in page
    assert page.count("<details>") == 1  # the second experiment has no numbers to fold away
    assert "nan" not in page


def test_the_table_of_verdicts_has_claim_expected_measured_verdict_and_id(run):
    page = (run[0] / "summary.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")] for line in rows]
    assert cells[0] == ["claim", "expected", "measured", "verdict", "id"]
    assert cells[2][:2] == ["A long name helps (somebody)", "> 0.5 points"]
    assert cells[2][2] == "+0.0 [+0.0, +0.0] points"
    assert cells[2][3:] == ["does not hold", "first-1"]
    assert cells[3][1:] == ["< -0.5 points", "– points (0 of 2 seeds)", "unclear", "first-2"]
    assert len({len(row) for row in cells}) == 1


def test_a_page_without_a_script_has_names_for_headings(run):
    page = summary(read_record(run[0] / "results.json"), "")
    assert "## first\n" in page
    assert "What we saw" not in page


def test_all_numbers_fit_80_columns_and_are_all_there(run):
    study = read_record(run[0] / "results.json")["experiments"]["first"]["studies"][0]
    text = all_numbers(study)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("held: ")
    assert "batch_size=25" in text
    assert "None" not in text
    for name in ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy", "test_accuracy"):
        mean = np.mean(study["data_vars"][name]["data"][0])
        assert (f"{mean:.1f}" if "accuracy" in name else f"{mean:.2f}") in text
    for candidate in np.array(study["data_vars"]["grid"]["data"])[0].astype(float).mean(-1):
        assert f"{candidate:.1f}" in text
    assert "Validation accuracy (%) on the tuning seeds by rate" in text
    assert "1e-06" in text
    assert "100.0" in text  # per cent of the third arm's runs diverged
    assert "nan" not in text


def test_all_numbers_of_many_factors_with_long_names_fit_80_columns(tmp_path):
    labels = {LONG: 0.1, f"{LONG} and one": 0.2}

    def recipe(a_factor: float, another_factor: float, rate: float) -> Recipe:
        return replace(SMALL, optimizer=partial(torch.optim.SGD, lr=a_factor * another_factor * rate), epochs=1)

    options = {"dataset": "digits", "seeds": [0], "device": "cpu", "quick": True, "longer": 1, "larger": 1}
    with ThreadPoolExecutor(1) as pool:
        given = argparse.Namespace(**options, verbose=False, out=tmp_path, data_dir=FOLDER)
        lab = Lab("fake", "A fake lesson", None, given, ["second"])
        lab.executor = pool
        lab.run(second)
        choices = {"rate": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)}
        lab.study(recipe, a_factor=labels, another_factor=labels, tune=choices)
    text = all_numbers(lab.entry["studies"][0])
    assert max(map(len, text.splitlines())) <= 80
    assert text == all_numbers(plain(lab.entry["studies"][0]))
