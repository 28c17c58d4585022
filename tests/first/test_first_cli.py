"""The command line, the laboratory and the files it leaves, on a lesson small enough to run in a second."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from first_recipes import DIVERGES, SMALL

from common.first import cli, data, report
from common.first.cli import available_cores, choose_device, choose_jobs, run_lesson
from common.first.data import Dataset, LessonError
from common.first.experiment import workers
from common.first.lab import Lab, Larger
from common.first.plotting import new_figure, plot_curves
from common.first.statistics import above


def first(lab: Lab) -> None:
    """What does the first
    experiment ask?

    No reader sees this paragraph in the table of contents.
    """
    runs = lab.compare({"plain": SMALL, "diverges": DIVERGES}, "plain")
    figure, (ax,) = new_figure("Does it?")
    plot_curves(ax, runs, "validation_loss")
    lab.figure("first", figure)
    lab.claim("Rates of 1e3 help", "nobody", runs.gain("diverges"), above(0))
    lab.claim("Training helps", "everybody", runs.estimate("test_accuracy", "plain"), above(0.01), "")


def second(lab: Lab) -> None:
    """And the second?"""
    lab.table(report.Table("A mechanism", ["layer", "zeros"], [["a", "0.5"]]))


def everything_diverges(lab: Lab) -> None:
    """Does a lesson survive when nothing is left to look at?"""
    runs = lab.compare({"diverges": DIVERGES}, "diverges")
    runs.notes("accuracy", "diverges")


def same_arm_twice(lab: Lab) -> None:
    """Can an arm be lost behind another of the same name?"""
    for _ in range(2):
        lab.compare({"plain": SMALL}, "plain")


EXPERIMENTS = [first, second, everything_diverges]
ONES = Larger()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the fake lesson with these words; returns (exit code, stdout, stderr, its folder)."""
    shutil.copytree(ROOT / "common", tmp_path / "common")
    (tmp_path / "99_fake.py").write_text("X = 1\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def call(*words: str, larger: Larger = ONES):
        code = 0
        try:
            run_lesson("99_fake", "A fake lesson", EXPERIMENTS, larger, ["--out", str(tmp_path / "out"), *words])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err, tmp_path / "out" / "99_fake"

    return call


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_results_summary_and_figures(run):
    code, out, err, folder = run("--seeds", "2", "--jobs", "1")
    assert (code, err) == (0, "")
    record = read(folder)
    assert list(record["experiments"]) == ["first", "second", "everything_diverges"]
    entry = record["experiments"]["first"]
    assert entry["question"] == "What does the first experiment ask?"
    assert set(entry["varies"]) >= {"model", "optimizer.lr", "optimizer.momentum"}
    assert entry["baseline"] == "plain"
    assert entry["figures"] == ["first.png"]
    assert record["experiments"]["second"]["table"][0]["rows"] == [["a", "0.5"]]
    assert "arms" not in record["experiments"]["second"]
    assert record["settings"] == {"dataset": "digits", "seeds": [0, 1], "device": "cpu", "quick": False, "jobs": 1}
    assert set(record["environment"]) == {"python", "torch", "numpy", "platform", "cpu", "device_name", "source"}
    assert "The experiment ends here: every run diverged" in out
    summary = (folder / "summary.md").read_text()
    assert "![first](first.png)" in summary
    for line in ("diverges: 2 of 2 runs diverged at step", "| Training helps (everybody) |", "## second"):
        assert line in summary
    assert sorted(path.name for path in folder.iterdir()) == ["first.png", "results.json", "summary.md"]


def test_sizes_for_the_larger_data_sets_are_set_in_one_place(run, monkeypatch):
    """Made-up images stand in for a download; what the lesson says of larger sets leaves the digits alone."""
    rng = np.random.default_rng(0)
    made_up = Dataset(rng.integers(0, 256, (600, 1, 8, 8), np.uint8), np.arange(600) % 10, 100, 100)
    monkeypatch.setattr(data, "load_torchvision", lambda name, folder: made_up)
    larger = Larger(examples=3, epochs=2, seeds=4)

    def last_epochs_and_seeds(*words: str) -> tuple[list[float], list[int], str]:
        code, out, _, folder = run("--jobs", "1", "--only", "first", *words, larger=larger)
        assert code == 0
        runs = read(folder)["experiments"]["first"]["arms"]["plain"]["runs"]
        return runs[0]["history"]["epoch"][-1], [each["seed"] for each in runs], out

    epoch, seeds, out = last_epochs_and_seeds("--dataset", "mnist")
    assert (epoch, seeds) == (2 * SMALL.epochs, [0, 1, 2, 3])
    assert "examples=300" in out
    epoch, seeds, out = last_epochs_and_seeds("--dataset", "mnist", "--seeds", "2")
    assert seeds == [0, 1]
    epoch, seeds, out = last_epochs_and_seeds("--dataset", "mnist", "--quick")
    assert (epoch, seeds) == (1, [0, 1])
    assert "examples=100" in out
    monkeypatch.setattr(data, "kept", {})
    epoch, seeds, out = last_epochs_and_seeds()
    assert (epoch, seeds) == (SMALL.epochs, list(range(10)))
    assert "examples=100" in out


def test_all_there_is_stays_all_there_is(run, monkeypatch):
    """A recipe that takes every example still does on a larger set."""
    settings = SimpleNamespace(larger=Larger(examples=3, epochs=2))
    lab = SimpleNamespace(quick=False, settings=settings)
    sized = Lab.sized(lab, {"a": replace(SMALL, examples=None)})
    assert (sized["a"].examples, sized["a"].epochs) == (None, 2 * SMALL.epochs)


def test_claims_are_judged_by_the_run_and_by_no_quick_run(run):
    *_, folder = run("--seeds", "3", "--only", "first")
    helps = {claim["statement"]: claim for claim in read(folder)["claims"]}
    assert helps["Training helps"]["verdict"] == "holds here"
    assert helps["Training helps"]["estimate"]["n"] == 3
    assert helps["Rates of 1e3 help"]["verdict"] == "unclear"
    assert helps["Rates of 1e3 help"]["estimate"] == {"mean": None, "low": None, "high": None, "n": 0, "unit": "points"}
    *_, folder = run("--quick", "--only", "first")
    assert {claim["verdict"] for claim in read(folder)["claims"]} == {"not judged"}
    assert read(folder)["settings"]["seeds"] == [0, 1]


def test_only_renews_one_experiment_and_keeps_the_others(run):
    run("--seeds", "2", "--only", "first", "second")
    *_, folder = run("--seeds", "2", "--only", "second", "--jobs", "1")
    assert list(read(folder)["experiments"]) == ["first", "second"]
    assert len(read(folder)["claims"]) == 2
    assert not list(folder.glob("previous*"))
    experiments = read(folder)["experiments"]
    assert read(folder)["seconds"] == pytest.approx(sum(entry["seconds"] for entry in experiments.values()), rel=1e-4)


def test_a_run_with_other_settings_sets_the_one_before_aside(run):
    run("--seeds", "2", "--only", "first")
    *_, folder = run("--seeds", "1", "--only", "second")
    assert list(read(folder)["experiments"]) == ["second"]
    assert list(read(folder / "previous-1")["experiments"]) == ["first"]
    assert (folder / "previous-1" / "first.png").exists()
    assert not (folder / "first.png").exists()
    run("--quick", "--only", "second")
    assert list(read(folder / "previous-1")["experiments"]) == ["first"]
    assert read(folder / "previous-2")["settings"]["seeds"] == [0]


def test_a_figure_without_results_is_no_earlier_run(run):
    *_, folder = run("--seeds", "1", "--only", "first")
    (folder / "results.json").unlink()
    run("--seeds", "2", "--only", "second")
    assert not list(folder.glob("previous*"))


def test_in_a_notebook_no_earlier_run_is_continued(run, monkeypatch):
    run("--seeds", "1", "--only", "first", "--jobs", "1")
    monkeypatch.setattr("common.first.lab.in_notebook", lambda: True)
    *_, folder = run("--seeds", "1", "--only", "second", "--jobs", "1")
    assert list(read(folder)["experiments"]) == ["second"]
    assert list(read(folder / "previous-1")["experiments"]) == ["first"]


def test_a_changed_script_sets_its_old_results_aside(run, tmp_path):
    run("--seeds", "1", "--only", "first")
    (tmp_path / "99_fake.py").write_text("X = 2\n")
    *_, folder = run("--seeds", "1", "--only", "second")
    assert list(read(folder)["experiments"]) == ["second"]
    assert list(read(folder / "previous-1")["experiments"]) == ["first"]


def test_a_broken_results_file_is_set_aside_too(run):
    *_, folder = run("--seeds", "1", "--only", "second")
    (folder / "results.json").write_text('{"half')
    code, *_ = run("--seeds", "1", "--only", "second")
    assert code == 0
    assert list(read(folder)["experiments"]) == ["second"]
    assert (folder / "previous-1" / "results.json").read_text() == '{"half'


def test_workers_start_with_the_usual_sigterm_and_it_is_put_back(run, monkeypatch):
    """A forked worker that inherits a handler of Python's may lose the SIGTERM that is to end it, and hang."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def noting(*arguments):
        seen.append(signal.getsignal(signal.SIGTERM))
        return workers(*arguments)

    def look(lab: Lab) -> None:
        """Who listens now?"""
        seen.append(signal.getsignal(signal.SIGTERM))
        lab.table(report.Table("A", ["a"], [["b"]]))

    monkeypatch.setattr(cli, "workers", noting)
    monkeypatch.setitem(globals(), "EXPERIMENTS", [look])
    assert run("--jobs", "2", "--seeds", "1")[0] == 0
    assert seen[0] == before
    assert seen[1] != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_file_of_ones_own_that_is_not_there_is_one_line(run):
    code, out, err, folder = run("--dataset", "no-such-file.npz")
    assert (code, out) == (2, "")
    assert err == "error: argument --dataset: there is no file no-such-file.npz\n"
    assert not list(folder.iterdir())


def test_list_names_the_questions_and_runs_nothing(run):
    code, out, _, folder = run("--list")
    assert code == 0
    assert "first: What does the first experiment ask?\n" in out
    assert "No reader" not in out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "imagenet"], "'imagenet' is not one of digits"),
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--seeds", "ten"], "'ten' is not a whole number"),
        (["--seeds", "2.5"], "'2.5' is not a whole number"),
        (["--first-seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["--jobs", "0"], "'0' is not a whole number of at least 1"),
        (["--only", "third"], "no experiment 'third'; there are first, second, everything_diverges"),
        (["--only"], "expected at least one argument"),
        (["--device", "tpu"], "'tpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        (["--device", "cuda:x"], "'cuda:x' is not one of"),
        (["--device", "cpu:1"], "'cpu:1' is not one of"),
        (["--device", "cpu:"], "'cpu:' is not one of"),
        (["--device", "cuda:"], "'cuda:' is not one of"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_wrong_words_get_one_line_and_exit_code_2(run, words, message):
    code, out, err, folder = run(*words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not folder.exists()


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(LessonError, match="no CUDA device here; use --device cpu"):
        choose_device("cuda")
    with pytest.raises(LessonError, match="no MPS device here"):
        choose_device("mps")
    assert choose_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == "cuda:0"
    with pytest.raises(LessonError, match="1 CUDA devices are here"):
        choose_device("cuda:1")


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err, _ = run("--out", str(tmp_path / "file"))
    assert code == 2
    assert "cannot write to" in err
    assert err.count("\n") == 1


def test_a_full_disk_is_one_line(run, monkeypatch):
    *_, folder = run("--seeds", "1", "--only", "second")
    before = (folder / "results.json").read_text()

    def full(path: Path, text: str, encoding: str) -> None:
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err, _ = run("--seeds", "1", "--only", "second")
    assert code == 1
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert (folder / "results.json").read_text() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_two_arms_of_one_name_are_refused(run, monkeypatch):
    monkeypatch.setattr("test_first_cli.EXPERIMENTS", [same_arm_twice])
    code, _, err, _ = run("--seeds", "1")
    assert code == 2
    assert err == "error: two comparisons of one experiment share the arm plain\n"


def test_too_few_examples_is_one_line(run, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr("test_first_cli.SMALL", replace(SMALL, examples=5000))
    code, _, err, _ = run("--only", "first", "--seeds", "1")
    assert code == 2
    assert "5000 training examples asked for" in err
    assert err.count("\n") == 1


def test_jobs_by_device_and_place(monkeypatch):
    assert choose_jobs(None, "cpu") == available_cores()
    assert choose_jobs(5, "cpu") == 5
    assert choose_jobs(5, "cuda") == 1
    monkeypatch.setattr("common.first.cli.in_notebook", lambda: True)
    monkeypatch.setattr("sys.platform", "darwin")
    assert choose_jobs(5, "cpu") == 1


def test_cores_are_those_this_process_may_use():
    assert 1 <= available_cores() <= 1024


def tunes(lab: Lab) -> None:
    """Which rate does validation choose?"""
    rates = {rate: replace(SMALL, optimizer=partial(torch.optim.SGD, lr=rate)) for rate in (1e-6, 0.1)}
    best = lab.tune("Rate", {"plain": rates}).best("plain")
    lab.compare({"chosen": rates[best]}, "chosen")


def test_tuning_is_printed_and_kept_and_is_no_arm(run, monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "EXPERIMENTS", [tunes])
    code, out, err, folder = run()
    assert (code, err) == (0, "")
    entry = json.loads((folder / "results.json").read_text())["experiments"]["tunes"]
    grid = entry["table"][0]
    assert grid["title"] == "Rate, chosen (*) by validation accuracy in %, seeds 1000000 to 1000003"
    assert grid["columns"] == ["arm", "1e-6", "0.1"]
    assert grid["rows"][0][2].endswith("*")
    assert grid["title"] in " ".join(out.split())
    assert list(entry["arms"]) == ["chosen"]
    assert not {run["seed"] for run in entry["arms"]["chosen"]["runs"]} & set(range(1_000_000, 1_000_004))
