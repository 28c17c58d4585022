"""Every lesson as a reader runs it: a process of its own, from another folder, through to its files."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import FURTHER_SCRIPTS, LESSONS, ROOT, load_lesson, load_script
from PIL import Image

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


FURTHER = [f"further/{path.stem}" for path in FURTHER_SCRIPTS]


def start(part: str, folder: Path, *words: str) -> subprocess.Popen:
    """Start a lesson, or a script of further/ as a module, in a process group of its own, as a shell would."""
    script = [str(ROOT / f"{part}.py")] if part in LESSONS else ["-m", part.replace("/", ".")]
    command = [sys.executable, *script, "--out", str(folder / "out"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if part in LESSONS else {"PYTHONPATH": str(ROOT)})
    # A background job of a shell ignores Ctrl-C, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL) if os.name == "posix" else None
    return subprocess.Popen(command, cwd=folder, start_new_session=True, env=environment, preexec_fn=heed, **pipes)


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def group_is_gone(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return True
    return False


def strict(path: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def assert_not_blank(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
        low, high = image.convert("L").getextrema()
        assert image.width >= 600
        assert high - low > 100


def test_the_lessons_are_numbered_without_a_gap():
    numbers = [int(lesson[:2]) for lesson in LESSONS]
    assert numbers == list(range(14, 14 + len(numbers)))
    assert numbers
    for lesson in LESSONS:
        assert load_lesson(lesson).lesson.name == lesson


def without_progress(err: str) -> str:
    """What stands on stderr but for the lines that tell on a slow machine how far the trainings are."""
    return re.sub(r"^\w+: \d+ of \d+ trainings\n", "", err, flags=re.MULTILINE)


@pytest.mark.parametrize("part", LESSONS + FURTHER)
def test_quick_run_from_another_folder(part, tmp_path):
    process = start(part, tmp_path, "--quick")
    out, err = process.communicate(timeout=600)
    assert (process.returncode, without_progress(err)) == (0, "")
    shown = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, shown)) <= 80
    assert len(out.splitlines()) <= 250
    experiments, _, closing = out.rpartition("\n\n")  # the run's last two lines belong to no experiment
    assert "rules of thumb" in closing
    assert len(closing.splitlines()) == 2
    for block in re.split(r"^\d+ of \d+: .*$", experiments, flags=re.MULTILINE)[1:]:
        assert len(block.strip().splitlines()) <= 30, block
    name = part.rpartition("/")[2]
    folder = tmp_path / "out" / name
    record = strict(folder / "results.json")
    assert record["lesson"] == name
    assert list(record["experiments"]) == list(load_script(f"{part}.py").lesson.experiments)
    for entry in record["experiments"].values():
        assert entry["question"].endswith("?")
        assert entry["figures"]
        for figure in entry["figures"]:
            assert_not_blank(folder / figure)
        assert entry["printed"] or not entry["studies"]
        assert all(study["data_vars"]["test_accuracy"]["data"] for study in entry["studies"])
    assert all(claim["verdict"] == "not judged" for claim in record["claims"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def half_way(tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    """Start lesson 14's default run and return when its first experiment is on disk and the second is training."""
    process = start("14_dropout_regularization", tmp_path)
    folder = tmp_path / "out" / "14_dropout_regularization"
    wait_for(lambda: (folder / "summary.md").exists() or process.poll() is not None)
    time.sleep(0.7)
    assert process.poll() is None
    return process, folder


def assert_finished_experiments_are_whole(folder: Path, tidy: bool = True) -> None:
    """Every finished experiment is there, with its figures; and, if the process could tidy up, nothing half-written."""
    record = strict(folder / "results.json")
    assert "your_own_loop" in record["experiments"]
    assert len(record["experiments"]) < 6
    for entry in record["experiments"].values():
        for figure in entry["figures"]:
            assert_not_blank(folder / figure)
    assert not tidy or not [path for path in folder.iterdir() if path.name.startswith(".")]


@linux_only
@pytest.mark.parametrize(("to_group", "number", "code"), [(True, signal.SIGINT, 130), (False, signal.SIGTERM, 143)])
def test_interrupted_half_way(tmp_path, to_group, number, code):
    process, folder = half_way(tmp_path)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code
    if code == 130:
        assert re.fullmatch(r"\n?interrupted; your_own_loop(, \w+)* finished, in .*\n", without_progress(err))
    wait_for(lambda: group_is_gone(process.pid), 10)
    assert_finished_experiments_are_whole(folder)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@linux_only
def test_a_killed_worker_is_one_line(tmp_path):
    process, folder = half_way(tmp_path)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert without_progress(err) == "error: a worker process ended by signal 9 (Killed); out of memory? try --jobs 1\n"
    wait_for(lambda: group_is_gone(process.pid), 10)
    assert_finished_experiments_are_whole(folder)


@linux_only
def test_a_killed_parent_leaves_no_orphans(tmp_path):
    process, folder = half_way(tmp_path)
    process.kill()
    process.communicate(timeout=300)
    wait_for(lambda: group_is_gone(process.pid), 10)
    assert_finished_experiments_are_whole(folder, tidy=False)


@pytest.mark.parametrize("part", [LESSONS[0], LESSONS[3], LESSONS[5], "further/first_aid"])  # all are built alike
def test_in_a_notebook_each_experiment_runs_in_its_own_cell(part, tmp_path):
    jupytext, nbclient = notebook_tools()
    notebook = jupytext.read(ROOT / f"{part}.py")
    made = next(cell for cell in notebook.cells if "lesson = Lesson(" in cell.source)
    made.source += f"\nlesson.arguments = ['--quick', '--out', {str(tmp_path)!r}]"
    place = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    name = part.rpartition("/")[2]
    record = strict(tmp_path / name / "results.json")
    assert list(record["experiments"]) == list(load_script(f"{part}.py").lesson.experiments)
    for experiment, entry in record["experiments"].items():
        (cell,) = [cell for cell in notebook.cells if f"def {experiment}(lab" in cell.source]
        text = "".join(output["text"] for output in cell.outputs if output.output_type == "stream")
        assert entry["question"] in " ".join(text.split())
        assert set(entry["printed"].splitlines()) <= set(text.splitlines())
        claims = [claim for claim in record["claims"] if claim["experiment"] == experiment]
        assert all(claim["statement"] in " ".join(text.split()) for claim in claims)
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(shown) == len(entry["figures"])
    last = "".join(output["text"] for output in notebook.cells[-1].outputs)
    assert f"{len(record['claims'])} rules of thumb (not judged" in last
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))


RUN = f"""
import torch
torch.set_num_threads(2)
torch.manual_seed(3)
wanted = torch.rand(3)
torch.manual_seed(3)
%run {ROOT}/{LESSONS[0]}.py --quick --only wrong_mode --out "{{out}}"
print("threads", torch.get_num_threads(), "random", bool((torch.rand(3) == wanted).all()))
"""


def test_in_a_notebook_a_lesson_can_be_run_with_options_and_leaves_the_kernel_as_it_was(tmp_path):
    jupytext, nbclient = notebook_tools()
    notebook = jupytext.reads("# %%" + RUN.format(out=tmp_path), fmt="py:percent")
    notebook.cells[0].source = RUN.format(out=tmp_path).strip()
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert list(strict(tmp_path / LESSONS[0] / "results.json")["experiments"]) == ["wrong_mode"]
    text = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "\nthreads 2 random True\n" in text


def notebook_tools():
    reason = "a development extra: pip install -r requirements-dev.txt"
    pytest.importorskip("ipykernel", reason=reason)
    return pytest.importorskip("jupytext", reason=reason), pytest.importorskip("nbclient", reason=reason)


@pytest.mark.parametrize("lesson", LESSONS)
def test_no_constant_is_set_twice(lesson):
    """A second assignment further down would change the experiments above it without a word."""
    names = []
    for node in ast.parse((ROOT / f"{lesson}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [
                each.id
                for target in targets
                for each in ast.walk(target)
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            ]
    assert names
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
