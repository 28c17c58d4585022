"""The command line that all lessons share, on a lesson small enough to run in a moment."""

import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from recipes import DIVERGES, SMALL, tensors

from common import data
from common import lab as laboratory
from common import lesson as command_line
from common.data import Dataset, load, make_split
from common.lab import Lab
from common.lesson import Lesson, parse
from common.training import Recipe, fit, split_for
from docs import record
from docs.sources import read_file
from readers import downloads
from runner import notebooks
from runner import workers as workers_module
from runner.workers import warm_up, workers

NAME = Path(__file__).stem


def network(rate: float = 0.1) -> Recipe:
    return replace(SMALL, optimizer=partial(torch.optim.SGD, lr=rate))


def first(lab: Lab) -> None:
    """What does the first
    experiment ask?

    No reader sees this paragraph in the list of experiments.
    """
    runs = lab.study(network, rate=(0.1, 0.01))
    lab.table({"test accuracy": runs.test_accuracy, "gain": lab.gain(runs.test_accuracy, rate=0.1)}, rows="rate")
    lab.curves(runs.validation_loss_curve, hue="rate")
    lab.claim("Training helps", "everybody", runs.test_accuracy.sel(rate=0.1), above=20)


def second(lab: Lab) -> None:
    """And the second?"""
    lab.claim("One is more than nothing", "nobody", lab.study(network).train_loss, above=0)


def third(lab: Lab) -> None:
    """Is there a third?"""
    lab.say("There is.")


def diverges(lab: Lab) -> None:
    """What if every run diverges?"""
    lab.study(lambda technique: DIVERGES, technique=("none",), inspect=tensors)


def lesson_of(*experiments) -> Lesson:
    lesson = Lesson("a name for notebooks", "A fake lesson")
    for experiment in experiments:
        lesson.experiment(experiment)
    return lesson


@contextmanager
def a_thread(jobs: int, dataset: str, folder: Path):
    """Instead of workers, where a test does not ask for them: no process has to be forked."""
    warm_up(dataset, folder)
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the fake lesson with these words; returns (exit code, stdout, stderr, its folder)."""
    monkeypatch.setattr(command_line, "workers", a_thread)

    def call(*words: str, experiments=(first, second, third), out: Path | str = tmp_path / "out"):
        code = 0
        try:
            lesson_of(*experiments).main(["--out", str(out), *words])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err, Path(out) / NAME

    return call


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# What a run leaves


def test_a_run_leaves_results_summary_and_figures(run):
    code, out, err, folder = run("--seeds", "2")
    assert (code, err) == (0, "")
    found = read(folder)
    assert (found["lesson"], found["title"]) == (NAME, "A fake lesson")
    assert list(found["experiments"]) == ["first", "second", "third"]
    entry = found["experiments"]["first"]
    assert entry["question"] == "What does the first experiment ask?"
    assert entry["varies"] == ["optimizer.lr"]
    assert entry["figures"] == ["first.png"]
    settings = {"dataset": "digits", "seeds": [0, 1], "device": "cpu", "quick": False, "longer": 1, "larger": 1}
    assert found["settings"] == settings
    assert [claim["id"] for claim in found["claims"]] == ["first-1", "second-1"]
    assert sorted(path.name for path in folder.iterdir()) == ["first.png", "results.json", "summary.md"]
    assert "![What does the first experiment ask?](first.png)" in (folder / "summary.md").read_text()
    assert "2 rules of thumb (" in out
    assert str(folder / "summary.md") in out


def test_a_run_prints_at_most_80_columns_and_no_escape_codes(run, tmp_path):
    _, out, _, _ = run("--seeds", "2", "--verbose")
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)
    assert "\x1b" not in out


def test_defaults_are_ten_seeds_and_two_for_a_quick_run(tmp_path):
    words = ["--out", str(tmp_path)]
    assert parse("99_fake", "A title", ["first"], words).seeds == list(range(10))
    assert parse("99_fake", "A title", ["first"], [*words, "--quick"]).seeds == [0, 1]
    assert parse("99_fake", "A title", ["first"], [*words, "--quick", "--seeds", "3"]).seeds == [0, 1, 2]
    assert parse("99_fake", "A title", ["first"], [*words, "--first-seed", "7", "--seeds", "2"]).seeds == [7, 8]
    options = parse("99_fake", "A title", ["first"], words)
    assert options.out == tmp_path / "99_fake"
    assert 1 <= options.jobs <= 1024
    assert (options.longer, options.larger, options.device, options.dataset) == (1, 1, "cpu", "digits")


def test_numbers_below_a_million_will_do(tmp_path):
    words = ["--first-seed", "999999", "--longer", "999999", "--larger", "999999"]
    options = parse("99_fake", "A title", ["first"], ["--out", str(tmp_path), *words])
    assert (options.first_seed, options.longer, options.larger) == (999_999, 999_999, 999_999)


def test_only_may_be_said_more_than_once(run):
    *_, folder = run("--seeds", "1", "--only", "second", "--only", "third")
    assert list(read(folder)["experiments"]) == ["second", "third"]


def test_a_tilde_is_the_home_folder_and_nobodys_is_a_name_like_any_other(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("--seeds", "1", "--only", "third", out="~")[0] == 0
    assert list(read(tmp_path / "home" / NAME)["experiments"]) == ["third"]
    monkeypatch.chdir(tmp_path)
    assert run("--seeds", "1", "--only", "third", "--data-dir", "~nosuchuser", out="~nosuchuser")[0] == 0
    assert list(read(tmp_path / "~nosuchuser" / NAME)["experiments"]) == ["third"]
    code, _, err, _ = run("--seeds", "1", "--dataset", "~nosuchuser/own.npz")
    assert code == 2
    assert_one_line(err)


def test_a_quick_run_judges_nothing(run):
    _, out, _, folder = run("--quick", "--only", "first", "second")
    assert {claim["verdict"] for claim in read(folder)["claims"]} == {"not judged"}
    assert read(folder)["experiments"]["first"]["studies"][0]["coords"]["epoch"]["data"] == [0, 1]
    assert "2 rules of thumb (not judged: 2)" in out


def test_the_first_seed_is_the_first(run):
    *_, folder = run("--seeds", "2", "--first-seed", "40", "--only", "second")
    assert read(folder)["settings"]["seeds"] == [40, 41]
    assert read(folder)["experiments"]["second"]["studies"][0]["coords"]["seed"]["data"] == [40, 41]


@pytest.mark.parametrize("option", ["--longer", "--larger"])
def test_longer_and_larger_are_recorded_and_make_another_run(run, option):
    run("--seeds", "1", "--only", "second")
    *_, folder = run("--seeds", "1", "--only", "second", option, "2")
    assert read(folder)["settings"][option[2:]] == 2
    assert read(folder / "previous-1")["settings"][option[2:]] == 1


def test_verbose_prints_more(run):
    out = run("--seeds", "1", "--only", "second")[1]
    verbose = run("--seeds", "1", "--only", "second", "--verbose")[1]
    assert "held: model=linear" not in out
    assert "held: model=linear" in verbose
    assert "After the last epoch (means over seeds)" in verbose


def test_list_names_the_questions_and_runs_nothing(run):
    code, out, err, folder = run("--list")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "first: What does the first experiment ask?",
        "second: And the second?",
        "third: Is there a third?",
    ]
    assert not folder.parent.exists()


def test_help_says_what_each_option_does(run):
    code, out, err, folder = run("--help")
    assert (code, err) == (0, "")
    for word in ("--quick", "--seeds", "--longer", "--larger", "--only", "--dataset", "--device", "--jobs", "--out"):
        assert word in out
    assert not folder.parent.exists()


# One run after another


def test_only_renews_one_experiment_and_keeps_the_others(run):
    run("--seeds", "2", "--only", "third", "first", "second")
    *_, folder = run("--seeds", "2", "--only", "second", "--jobs", "1")
    assert list(read(folder)["experiments"]) == ["first", "second", "third"]
    assert [claim["id"] for claim in read(folder)["claims"]] == ["first-1", "second-1"]
    assert not list(folder.glob("previous*"))
    assert (folder / "first.png").exists()
    experiments = read(folder)["experiments"]
    assert read(folder)["seconds"] == pytest.approx(sum(entry["seconds"] for entry in experiments.values()), rel=1e-4)


def meanwhile(lab: Lab) -> None:
    """What if another run begins meanwhile?"""
    words = ["--out", str(lab.options.out.parent), "--seeds", "2", "--only", "third"]
    with pytest.raises(SystemExit, match="2"):
        lesson_of(meanwhile, second, third).main(words)


def test_a_second_run_into_one_folder_is_refused_in_one_line(run):
    """And the first goes on; when it has ended, others may."""
    code, _, err, folder = run("--seeds", "1", experiments=(meanwhile, third))
    assert code == 0
    assert err == f"error: another run writes to {folder}; wait for its end, or choose another place with --out\n"
    assert list(read(folder)["experiments"]) == ["meanwhile", "third"]
    assert run("--seeds", "1", "--only", "third", experiments=(meanwhile, third))[0] == 0
    assert list(read(folder)["experiments"]) == ["meanwhile", "third"]
    assert not list(folder.glob("previous*"))
    assert not (folder / ".lock").exists()


def test_two_runs_into_one_folder_from_two_processes(tmp_path):
    """The first is killed in the middle: its claim ends with it."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW, encoding="utf-8")
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--jobs", "1"]
    around = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=around, stdout=subprocess.PIPE, text=True) as one:
        while "slow ---" not in one.stdout.readline():
            pass
        two = subprocess.run(command, env=around, capture_output=True, text=True)
        assert two.returncode == 2
        assert two.stderr.startswith("error: another run writes to ")
        assert two.stderr.count("\n") == 1
        one.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # its worker ends when it notices that its parent is gone
        three = subprocess.run([*command, "--only", "fast"], env=around, capture_output=True, text=True)
        if three.returncode == 0:
            break
    assert three.returncode == 0, three.stderr


def test_experiments_stand_in_the_lessons_order_whatever_was_run_first(run):
    run("--seeds", "1", "--only", "second")
    *_, folder = run("--seeds", "1", "--only", "first")
    assert list(read(folder)["experiments"]) == ["first", "second"]
    assert [claim["id"] for claim in read(folder)["claims"]] == ["first-1", "second-1"]


def test_a_run_with_other_settings_sets_the_one_before_aside(run):
    run("--seeds", "2", "--only", "first")
    *_, folder = run("--seeds", "1", "--only", "third")
    assert list(read(folder)["experiments"]) == ["third"]
    assert list(read(folder / "previous-1")["experiments"]) == ["first"]
    assert (folder / "previous-1" / "first.png").exists()
    assert not (folder / "first.png").exists()
    run("--quick", "--only", "third")
    assert list(read(folder / "previous-1")["experiments"]) == ["first"]
    assert read(folder / "previous-2")["settings"]["seeds"] == [0]


@pytest.mark.parametrize("content", ['{"half', "[]", '{"lesson": "another"}'])
def test_a_results_file_that_is_broken_or_foreign_is_set_aside(run, content):
    *_, folder = run("--seeds", "1", "--only", "third")
    (folder / "results.json").write_text(content)
    assert run("--seeds", "1", "--only", "third")[0] == 0
    assert list(read(folder)["experiments"]) == ["third"]
    assert (folder / "previous-1" / "results.json").read_text() == content


def test_a_claim_that_is_gone_is_gone_when_its_experiment_is_run_again(run):
    run("--seeds", "1", "--only", "second")

    def second(lab: Lab) -> None:
        """And the second, changed?"""

    *_, folder = run("--seeds", "1", "--only", "second", experiments=(first, second))
    assert read(folder)["claims"] == []


SLOW = '''"""A lesson that takes its time."""

from time import sleep

from common.lab import Lab
from common.lesson import Lesson

lesson = Lesson("slow", "A slow lesson")


@lesson.experiment
def slow(lab: Lab) -> None:
    """Is it slow?"""
    print(flush=True)
    sleep(60)


@lesson.experiment
def fast(lab: Lab) -> None:
    """Is it fast?"""


if __name__ == "__main__":
    lesson.main()
'''

SCRIPT = '''"""A lesson in a file of its own."""

from common.lab import Lab
from common.lesson import Lesson

lesson = Lesson("99_fake", "A fake lesson")


@lesson.experiment
def only_one(lab: Lab) -> None:
    """Is this the only one?"""
    lab.say("It is.")  # and says so
'''


@pytest.fixture
def run_file(tmp_path, monkeypatch, run):
    """Write a script and run it; returns the folder of all results."""
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("first", "__pycache__"))
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def call(name: str, text: str = SCRIPT) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.lesson.main(["--seeds", "1", "--out", str(tmp_path / "out")])
        return tmp_path / "out"

    return call


def test_a_renamed_copy_of_a_lesson_writes_to_a_folder_of_its_own(run_file):
    run_file("99_fake")
    out = run_file("mine", SCRIPT.replace("It is.", "Mine is."))
    assert sorted(path.name for path in out.iterdir()) == ["99_fake", "mine"]
    assert not list(out.glob("*/previous*"))
    assert "It is." in (out / "99_fake" / "summary.md").read_text()
    assert read(out / "mine")["lesson"] == "mine"


def test_a_changed_script_sets_its_old_results_aside(run_file):
    run_file("99_fake")
    out = run_file("99_fake", SCRIPT.replace("A lesson in a file", "A docstring of a file"))
    assert not list(out.glob("*/previous*"))
    run_file("99_fake", SCRIPT.replace("It is.", "It is not."))
    assert "It is not." in (out / "99_fake" / "summary.md").read_text()
    assert "It is." in (out / "99_fake" / "previous-1" / "summary.md").read_text()


def test_changed_plumbing_sets_old_results_aside(run_file, tmp_path):
    text = SCRIPT.replace("    lab.say", "    lab.sized\n    lab.say")
    run_file("99_fake", text)
    path = tmp_path / "common" / "lab.py"
    path.write_text(path.read_text(encoding="utf-8").replace("longer * recipe.epochs", "3"), encoding="utf-8")
    read_file.cache_clear()
    assert (run_file("99_fake", text) / "99_fake" / "previous-1" / "results.json").exists()


# Wrong words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "imagenet"], "argument --dataset: 'imagenet' is not one of digits, mnist"),
        (["--seeds", "0"], "argument --seeds: wanted a whole number from 1 to 999999"),
        (["--seeds", "-3"], "argument --seeds: wanted a whole number from 1 to 999999"),
        (["--seeds", "ten"], "argument --seeds: invalid int value: 'ten'"),
        (["--seeds", "2.5"], "argument --seeds: invalid int value: '2.5'"),
        (["--first-seed", "-1"], "argument --first-seed: wanted a whole number from 0 to 999999"),
        (["--longer", "0"], "argument --longer: wanted a whole number from 1 to 999999"),
        (["--longer", "-1"], "argument --longer: wanted a whole number from 1 to 999999"),
        (["--larger", "0"], "argument --larger: wanted a whole number from 1 to 999999"),
        (["--larger", "half"], "argument --larger: invalid int value: 'half'"),
        (["--jobs", "0"], "argument --jobs: wanted a whole number from 1 to 999999"),
        (["--jobs", "-1"], "argument --jobs: wanted a whole number from 1 to 999999"),
        (["--list", "--seeds", "1000000"], "argument --seeds: wanted a whole number from 1 to 999999"),
        (["--list", "--first-seed", "1000000"], "argument --first-seed: wanted a whole number from 0 to 999999"),
        (["--list", "--longer", "1000000"], "argument --longer: wanted a whole number from 1 to 999999"),
        (["--list", "--larger", "9" * 30], "argument --larger: wanted a whole number from 1 to 999999"),
        (["--list", "--jobs", "1000000"], "argument --jobs: wanted a whole number from 1 to 999999"),
        (["--only", "fourth"], "argument --only: invalid choice: 'fourth' (choose from"),
        (["--only"], "argument --only: expected at least one argument"),
        (["--device", "tpu"], "argument --device: 'tpu' cannot be used here"),
        (["--device", "cuda:x"], "argument --device: 'cuda:x' cannot be used here"),
        (["--device", "cuda:99"], "argument --device: 'cuda:99' cannot be used here"),
        (["--device", "cuda:"], "argument --device: 'cuda:' cannot be used here"),
        (["--device", "cpu:"], "argument --device: 'cpu:' cannot be used here"),
        (["--device", "meta"], "argument --device: 'meta' cannot be used here"),
        (["--device", "hpu"], "argument --device: 'hpu' cannot be used here"),
        (["--device", ""], "argument --device: '' cannot be used here"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["first"], "unrecognized arguments: first"),
        (["--out"], "argument --out: expected one argument"),
    ],
)
def test_wrong_words_get_one_line_and_exit_code_2(run, words, message):
    code, out, err, folder = run(*words)
    assert code == 2
    assert message in err
    assert err.startswith(f"{NAME}.py: ")
    assert err.count("\n") == 1
    assert len(err) < 500
    assert out == ""
    assert not folder.parent.exists()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has what is asked for")
def test_a_device_of_another_machine_is_one_short_line(run):
    code, out, err, folder = run("--device", "mps")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "argument --device: 'mps' cannot be used here" in err
    assert len(err) < 500
    assert not folder.parent.exists()


def test_a_second_processor_is_no_other_device(run):
    """On "cpu:1" a stack would hold all seeds, in one thread: other masks, for no gain."""
    assert run("--device", "cpu:1", "--only", "third", "--seeds", "1")[0] == 2


def test_a_device_other_than_the_cpu_needs_no_processes(monkeypatch, tmp_path):
    """And a notebook has none where they are spawned: they could not import its cells."""
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(0))
    words = ["--out", str(tmp_path), "--jobs", "4"]
    assert parse("99_fake", "A title", ["first"], [*words, "--device", "cuda"]).jobs == 0
    assert parse("99_fake", "A title", ["first"], words).jobs == 4
    monkeypatch.setattr(command_line, "in_notebook", lambda: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert parse("99_fake", "A title", ["first"], words).jobs == 0


# Failures


def assert_one_line(err: str) -> None:
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_file_of_ones_own_that_is_not_there_is_one_line(run):
    code, out, err, folder = run("--dataset", "no-such-file.npz")
    assert (code, out) == (2, "")
    assert_one_line(err)
    assert "no-such-file.npz: cannot be read ([Errno 2] No such file or directory" in err
    assert not list(folder.iterdir())


def test_a_file_of_ones_own_is_trained_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "kept", {})
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.random((300, 8, 8)), y=np.arange(300) % 3)
    code, _, err, folder = run("--dataset", str(tmp_path / "own.npz"), "--seeds", "1", "--only", "second")
    assert (code, err) == (0, "")
    assert read(folder)["settings"]["dataset"] == str(tmp_path / "own.npz")
    assert len(read(folder)["environment"]["data"]) == 64


def test_a_changed_file_of_ones_own_sets_old_results_aside(run, tmp_path, monkeypatch):
    def go(seed: int, name: str) -> Path:
        monkeypatch.setattr(data, "kept", {})
        np.savez(tmp_path / "own.npz", x=np.random.default_rng(seed).random((50, 8, 8)), y=np.arange(50) % 3)
        return run("--dataset", str(tmp_path / "own.npz"), "--seeds", "1", "--only", name)[3]

    go(0, "third")
    assert not list(go(0, "third").glob("previous*"))
    assert (go(1, "third") / "previous-1" / "results.json").exists()


def test_sizes_for_a_larger_data_set_are_set_on_the_command_line(run, monkeypatch):
    """Made-up images stand in for a download."""
    split_for.cache_clear()
    rng = np.random.default_rng(0)
    made_up = Dataset(rng.integers(0, 256, (600, 1, 8, 8), np.uint8), np.arange(600) % 10, 100, 100)
    monkeypatch.setattr(data, "kept", {})
    monkeypatch.setattr(downloads, "load_torchvision", lambda name, folder: made_up)
    asked = []

    def noting(recipe, *others):
        asked.append((recipe.examples, recipe.epochs))
        return fit(recipe, *others)

    monkeypatch.setattr(laboratory, "fit", noting)
    words = ("--dataset", "mnist", "--larger", "3", "--longer", "2", "--seeds", "1", "--only", "second")
    code, _, _, folder = run(*words)
    assert (code, asked) == (0, [(300, 6)])
    assert read(folder)["experiments"]["second"]["studies"][0]["coords"]["epoch"]["data"] == [0, 1, 2, 3, 4, 5, 6]
    split_for.cache_clear()  # of images that no other test should meet


def test_what_is_said_to_be_held_is_what_was_trained(run):
    *_, folder = run("--seeds", "1", "--only", "second", "--longer", "2", "--larger", "3")
    held = read(folder)["experiments"]["second"]["studies"][0]["held"]
    assert (held["epochs"], held["examples"]) == ("6", "300")


def test_too_few_examples_is_one_line(run):
    code, _, err, _ = run("--seeds", "1", "--only", "second", "--larger", "50")
    assert code == 2
    assert_one_line(err)
    assert "5000 training examples asked for, of a data set that has 1 to 1000" in err
    assert "take a smaller --larger, or another --dataset" in err


def test_an_experiment_in_which_every_run_diverges_is_one_line_and_the_others_are_kept(run):
    code, _, err, folder = run("--seeds", "1", experiments=(third, diverges))
    assert code == 2
    assert_one_line(err)
    assert "diverges: every run diverged" in err
    assert list(read(folder)["experiments"]) == ["third"]


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, out, err, _ = run(out=tmp_path / "file")
    assert (code, out) == (1, "")
    assert_one_line(err)
    assert str(tmp_path / "file") in err
    assert "--out DIR" in err


def test_a_folder_in_which_no_file_can_be_made_is_told_before_the_training(run, monkeypatch):
    def refuse(dir) -> None:
        raise PermissionError(13, "Permission denied", str(dir / "tmp"))

    monkeypatch.setattr(command_line, "TemporaryFile", refuse)
    code, out, err, _ = run("--seeds", "1")
    assert (code, out) == (1, "")
    assert_one_line(err)
    assert "Permission denied" in err


def test_a_mistake_of_the_readers_own_keeps_its_traceback(run, tmp_path):
    """And is not put down to the folder of results."""

    def reads(lab: Lab) -> None:
        """What if a file of the reader's is not there?"""
        (tmp_path / "missing.txt").read_text()

    with pytest.raises(FileNotFoundError):
        run("--seeds", "1", experiments=(reads,))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", [("--list",), ("--quick", "--only", "wrong_mode")])
def test_a_full_disk_behind_standard_output_is_told_as_such(words, tmp_path):
    command = [sys.executable, str(ROOT / "14_dropout_regularization.py"), *words, "--out", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"


def test_a_full_disk_is_one_line_and_loses_nothing(run, monkeypatch):
    *_, folder = run("--seeds", "1", "--only", "second")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path: Path, text: str, encoding: str) -> None:
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err, _ = run("--seeds", "1", "--only", "second")
    assert code == 1
    assert_one_line(err)
    assert "No space left on device" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Ended:
    """A standard output whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        """There is nothing to flush."""


@pytest.mark.parametrize("words", [["--list"], ["--seeds", "1", "--only", "third"]])
def test_a_pipe_that_ends_is_one_line_and_no_fault_of_the_folder(run, monkeypatch, words):
    monkeypatch.setattr(sys, "stdout", Ended())
    code, _, err, _ = run(*words)
    assert code not in (0, None)
    assert err.count("\n") <= 1
    assert "--out" not in err


def interrupted(lab: Lab) -> None:
    """What if Ctrl-C is pressed?"""
    raise KeyboardInterrupt


def test_an_interruption_says_what_is_finished(run):
    code, _, err, folder = run("--seeds", "1", experiments=(third, interrupted))
    assert (code, err) == (130, f"\ninterrupted; third finished, in {folder}\n")
    assert list(read(folder)["experiments"]) == ["third"]
    code, _, err, folder = run("--seeds", "1", experiments=(interrupted, third))
    assert (code, err) == (130, f"\ninterrupted; nothing finished, in {folder}\n")


def kills_a_worker(lab: Lab) -> None:
    """What if a worker is killed?"""
    lab.executor.submit(os._exit, 1).result()


def test_a_killed_worker_is_one_line(run, monkeypatch):
    monkeypatch.setattr(command_line, "workers", workers)
    code, _, err, folder = run("--seeds", "1", "--jobs", "1", experiments=(third, kills_a_worker))
    assert (code, err) == (1, "error: a worker process ended with exit code 1\n")
    assert list(read(folder)["experiments"]) == ["third"]
    assert not active_children()


# Processes


def test_the_same_numbers_for_any_number_of_jobs(run, monkeypatch, tmp_path):
    """And for a thread of this process, which the other tests use."""

    def values(*words: str) -> list:
        *_, folder = run("--seeds", "2", "--only", "first", *words, out=tmp_path / "-".join(["out", *words]))
        arrays = read(folder)["experiments"]["first"]["studies"][0]["data_vars"]
        return [arrays[name]["data"] for name in arrays if name != "seconds"]

    alone = values()
    monkeypatch.setattr(command_line, "workers", workers)
    assert values("--jobs", "1") == values("--jobs", "2") == alone


def test_workers_start_with_the_usual_sigterm_and_it_is_put_back(run, monkeypatch):
    """A forked worker that inherits a handler of Python's may lose the SIGTERM that is to end it, and hang."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    @contextmanager
    def noting(*arguments):
        seen.append(signal.getsignal(signal.SIGTERM))
        with workers(*arguments) as pool:
            seen.append(pool.submit(signal.getsignal, signal.SIGTERM).result())
            yield pool

    def look(lab: Lab) -> None:
        """Who listens now?"""
        seen.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(command_line, "workers", noting)
    assert run("--jobs", "2", "--seeds", "1", experiments=(look,))[0] == 0
    assert seen[:2] == [before, signal.SIG_DFL]
    assert seen[2] != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("words", [["--seeds", "1", "--only", "second"], ["--dataset", "no-such-file.npz"]])
def test_the_number_of_threads_and_the_signal_are_put_back_however_it_ends(run, words):
    before = signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(2)
    run(*words)
    assert torch.get_num_threads() == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_uses_one_thread_in_each_process(run, monkeypatch):
    monkeypatch.setattr(command_line, "workers", workers)
    seen = []

    def look(lab: Lab) -> None:
        """How many threads?"""
        seen.extend([torch.get_num_threads(), lab.executor.submit(torch.get_num_threads).result()])

    torch.set_num_threads(2)
    run("--jobs", "1", "--seeds", "1", experiments=(look,))
    assert seen == [1, 1]


def test_an_interruption_does_not_wait_for_the_runs_in_progress():
    start = time.monotonic()

    def interrupted_in_the_middle() -> None:
        with workers(2, "digits") as pool:
            running = [pool.submit(time.sleep, 60) for _ in range(4)]
            while not running[1].running():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_in_the_middle()
    assert time.monotonic() - start < 30  # not a timing: the runs would have slept for two minutes
    assert not active_children()


def test_no_jobs_are_a_thread_of_this_process():
    with workers(0, "digits") as pool:
        assert pool.submit(os.getpid).result() == os.getpid()


class OddError(Exception):
    """An error that cannot be made anew from its text alone, as many a library's."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"{what} ({code})")


def odd(lab: Lab) -> None:
    """What if a worker's error cannot be sent back?"""
    lab.study(raises_odd)


def raises_odd() -> Recipe:
    return replace(SMALL, loss=odd_loss)


def odd_loss(model, x, y):
    raise OddError(3, "an odd error")


def test_an_error_of_a_worker_that_cannot_be_pickled_is_told(run, monkeypatch):
    """And is no death of the worker."""
    monkeypatch.setattr(command_line, "workers", workers)
    with pytest.raises(RuntimeError, match=r"an odd error \(3\)"):
        run("--seeds", "1", "--jobs", "1", experiments=(odd,))


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        (partial(os._exit, 3), "with exit code 3"),
        (partial(signal.raise_signal, signal.SIGKILL), "by signal 9 (Killed); out of memory? try --jobs 1"),
        (partial(signal.raise_signal, signal.SIGUSR1), "by signal 10 (User defined signal 1)"),
    ],
)
def test_a_worker_that_ends_is_told_with_its_exit_code_or_signal(ends, how):
    """Whatever happened to those beside it."""

    def go() -> None:
        with workers(2, "digits") as pool:
            pool.submit(ends).result()

    with pytest.raises(BrokenProcessPool) as error:
        go()
    assert str(error.value) == f"a worker process ended {how}"
    assert not active_children()


def test_processes_of_the_readers_own_are_left_alone():
    own = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    own.start()
    try:
        with pytest.raises(KeyboardInterrupt), workers(2, "digits"):
            raise KeyboardInterrupt
        assert active_children() == [own]
        assert own.is_alive()
    finally:
        own.kill()
        own.join()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), NotImplementedError("no semaphores")])
def test_where_no_process_can_be_started_one_training_runs_at_a_time(monkeypatch, capsys, error):
    """No shared memory, no semaphores, a limit on processes: the run goes on, and says so."""

    def refuse(*arguments, **named):
        raise error

    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", refuse)
    with workers(2, "digits") as pool:
        assert pool.submit(os.getpid).result() == os.getpid()
    told = f"no worker process can be started ({error}); one training at a time, here\n"
    assert capsys.readouterr().err == told


def test_a_worker_that_is_ended_politely_is_told_without_a_cause_that_nobody_knows():
    def go() -> None:
        with workers(2, "digits") as pool:
            pool.submit(signal.raise_signal, signal.SIGTERM).result()

    with pytest.raises(BrokenProcessPool, match="was ended by somebody, or sent what cannot be read"):
        go()


def test_without_processes_an_error_does_not_wait_for_what_has_not_begun():
    begun = []

    def go() -> None:
        with workers(0, "digits") as pool:
            for i in range(50):
                pool.submit(lambda i=i: (begun.append(i), time.sleep(0.05)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go()
    assert len(begun) < 10


def leaves(lab: Lab) -> None:
    """What if an experiment ends the program?"""
    sys.exit()


def test_an_experiment_that_ends_the_program_is_no_success(run):
    code, _, err, folder = run("--seeds", "1", experiments=(third, leaves))
    assert (code, err) == (1, "error: an experiment or a hook called sys.exit; third finished\n")
    assert list(read(folder)["experiments"]) == ["third"]


def test_two_experiments_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        lesson_of(third, third)
    assert capsys.readouterr().err == "error: two experiments are called third\n"


def test_a_decorated_experiment_stands_in_its_own_file(run):
    code, _, _, folder = run("--seeds", "1", experiments=(torch.no_grad()(third),))
    assert code == 0
    assert folder.name == NAME
    assert list(read(folder)["experiments"]) == ["third"]


def test_a_script_that_changes_while_it_runs_is_filed_as_it_began(run_file, tmp_path):
    """And not under the hash of code that nobody ran; one that is gone is no error."""
    text = SCRIPT.replace("    lab.say", "    Path(__file__).write_text('x = 1')\n    lab.say")
    text = text.replace("from common.lab", "from pathlib import Path\n\nfrom common.lab")
    out = run_file("99_fake", text)
    first = read(out / "99_fake")["experiments"]["only_one"]["source"]
    run_file("99_fake", text)
    assert read(out / "99_fake")["experiments"]["only_one"]["source"] == first
    assert not list(out.glob("*/previous*"))
    gone = text.replace("write_text('x = 1')", "unlink()")
    assert "It is." in (run_file("gone", gone) / "gone" / "summary.md").read_text()


def test_jobs_are_bounded_by_what_windows_allows(tmp_path):
    assert parse("lesson", "", ["a"], ["--jobs", "1000", "--out", str(tmp_path)]).jobs == 61


@pytest.mark.parametrize(("platform", "file", "jobs"), [("linux", None, 3), ("win32", None, 0), ("win32", __file__, 3)])
def test_spawned_workers_need_a_file_to_import(monkeypatch, tmp_path, platform, file, jobs):
    """A console and standard input have none."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", file, raising=False)
    assert parse("lesson", "", ["a"], ["--jobs", "3", "--out", str(tmp_path)]).jobs == jobs


SPAWNS = """
import sys
from types import SimpleNamespace

import common.lesson
import runner.workers

there = {name: getattr(sys, name) for name in ("argv", "exit", "modules", "stdout", "stderr")}
common.lesson.sys = runner.workers.sys = SimpleNamespace(platform="darwin", **there)
"""


def test_a_script_without_the_guard_runs_where_workers_are_spawned(tmp_path):
    script = tmp_path / "no_guard.py"
    text = SCRIPT.replace('lab.say("It is.")', "lab.say(str(lab.executor.submit(abs, -7).result()))")
    text = text.replace("\nlesson =", f"{SPAWNS}\nlesson =")
    script.write_text(f"{text}\nlesson.main()\n", encoding="utf-8")
    command = [sys.executable, str(script), "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out")]
    around = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=around, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n7\n" in done.stdout


# What is put back


def test_what_belongs_to_the_readers_kernel_is_put_back(run, monkeypatch):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    torch.backends.mha.set_fastpath_enabled(True)
    frozen = gc.get_freeze_count()
    monkeypatch.setattr(command_line, "workers", workers)
    for jobs in ("1", "2"):
        assert run("--seeds", "1", "--only", "first", "--jobs", jobs)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(command_line, "workers", a_thread)
        assert run("--seeds", "1", "--only", "second")[0] == 0
    assert torch.equal(torch.rand(3), wanted)
    assert torch.backends.mha.get_fastpath_enabled()
    assert gc.get_freeze_count() == frozen


def test_a_file_that_was_corrected_is_read_anew_in_the_same_process(run, tmp_path):
    seen, path = [], tmp_path / "own.npz"

    def look(lab: Lab) -> None:
        """What is in the file?"""
        own = make_split(load(lab.options.dataset), 0).train
        stacked = split_for(lab.options.dataset, (0,), None, 0.0, "cpu").train
        seen.append((own.y.unique().tolist(), stacked.y.unique().tolist()))

    for classes in (2, 3):
        np.savez(path, x=np.random.default_rng(0).normal(size=(90, 8, 8)), y=np.arange(90) % classes)
        assert run("--seeds", "1", "--dataset", str(path), experiments=(look,))[0] == 0
    assert seen == [([0, 1], [0, 1]), ([0, 1, 2], [0, 1, 2])]


# Whose the arguments are


@pytest.mark.parametrize(("program", "listed"), [(__file__, True), ("ipykernel_launcher.py", False), ("", False)])
def test_the_arguments_are_the_scripts_own_if_it_is_what_runs(tmp_path, monkeypatch, capsys, program, listed):
    """And not those of a kernel, a console or a test that imports it."""
    ran = []

    def third(lab: Lab) -> None:
        """Does this run?"""
        ran.append(lab.options)

    monkeypatch.setattr(sys, "argv", [program, "--list"])
    monkeypatch.setattr(command_line, "workers", a_thread)
    defaults = ["--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(command_line, "parse", lambda *given: parse(*given[:3], [*given[3], *defaults]))
    lesson_of(third).main()
    assert ("third: Does this run?" in capsys.readouterr().out) == listed
    assert bool(ran) != listed


# Notebooks


@pytest.fixture
def notebook(monkeypatch, tmp_path, capsys):
    """A lesson in the cells of a notebook."""
    monkeypatch.setattr(command_line, "workers", a_thread)
    for module in (command_line, notebooks):
        monkeypatch.setattr(module, "in_cell", lambda function: True)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    lesson = Lesson("99_notebook", "A fake lesson")
    lesson.arguments = ["--seeds", "1", "--out", str(tmp_path)]
    return lesson


def test_in_a_notebook_each_experiment_runs_in_its_own_cell(notebook, tmp_path, capsys):
    notebook.experiment(second)
    out = capsys.readouterr().out
    assert "And the second?" in out
    assert "rules of thumb" not in out
    notebook.experiment(third)
    assert "There is." in capsys.readouterr().out
    notebook.main()
    assert "1 rules of thumb (" in capsys.readouterr().out
    assert list(read(tmp_path / "99_notebook")["experiments"]) == ["second", "third"]
    notebook.experiment(second)  # the cell once more
    assert list(read(tmp_path / "99_notebook")["experiments"]) == ["second", "third"]
    assert not list((tmp_path / "99_notebook").glob("previous*"))


def test_in_a_notebook_no_earlier_run_is_continued(notebook, tmp_path):
    notebook.experiment(third)
    again = Lesson("99_notebook", "A fake lesson")
    again.arguments = notebook.arguments
    again.experiment(second)
    assert list(read(tmp_path / "99_notebook")["experiments"]) == ["second"]
    assert list(read(tmp_path / "99_notebook" / "previous-1")["experiments"]) == ["third"]


def test_a_figure_is_shown_below_its_cell(run, monkeypatch):
    shown = []
    display = pytest.importorskip("IPython.display", reason="a development extra: pip install -r requirements-dev.txt")
    monkeypatch.setattr(laboratory, "in_notebook", lambda: True)
    monkeypatch.setattr(display, "display", shown.append)
    run("--seeds", "1", "--only", "first")
    assert [type(image).__name__ for image in shown] == ["Image"]
