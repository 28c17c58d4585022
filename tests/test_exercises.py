"""The exercises: their changes fit the scripts, and their answers quote runs that are committed and fresh."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LESSONS, ROOT, load_lesson

from common.data import LessonError
from common.lesson import parse
from docs.record import read_record
from exercises import repeat as exercises
from exercises.repeat import Exercise, changed, hunks, main, pick

ALL = [each for lesson in LESSONS for each in exercises.exercises(lesson)]
IDS = [f"{each.lesson[:2]}-{each.number}" for each in ALL]


def page(lesson: str) -> str:
    return (ROOT / "exercises" / f"{lesson}.md").read_text(encoding="utf-8")


def kept_run(exercise: Exercise) -> Path:
    return ROOT / "exercises" / "runs" / f"{exercise.lesson[:2]}-{exercise.number}.md"


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_lesson_has_exercises_and_the_script_asks_them(lesson):
    numbers = [each.number for each in ALL if each.lesson == lesson]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 3 <= len(numbers) <= 5
    text = (ROOT / f"{lesson}.py").read_text(encoding="utf-8").partition("# ## Exercises")[2]
    assert [int(number) for number in re.findall(r"^# (\d)\. ", text, re.MULTILINE)] == numbers
    assert f"`exercises/{lesson}.md`" in text
    assert page(lesson).count("<summary>The answer</summary>") == len(numbers)
    assert page(lesson).count("<summary>A hint</summary>") == len(numbers)


@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_the_change_fits_the_script_and_the_command_runs_what_there_is(exercise):
    before = (ROOT / f"{exercise.lesson}.py").read_text(encoding="utf-8")
    after = changed(before, exercise)
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    module = load_lesson(exercise.lesson)
    assert parse(exercise.lesson, "", list(module.lesson.experiments), exercise.words).only
    assert max(len(after.splitlines()) - len(before.splitlines()), 0) <= 2


@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_the_run_behind_the_answer_is_of_the_code_as_it_stands(exercise):
    name = f"{exercise.lesson[:2]} {exercise.number}"
    text = kept_run(exercise).read_text(encoding="utf-8")
    assert f"source {exercises.source_of(exercise)}." in text, f"run: python -m exercises.repeat {name} --keep"
    assert "10 seeds from 0" in text
    assert exercise.question in text
    for experiment in exercise.words[1:]:
        assert f'<a id="{experiment}"></a>' in text
    assert f"(runs/{kept_run(exercise).name})" in page(exercise.lesson)


def intervals(text: str) -> list[tuple[str, str, str]]:
    return re.findall(r"([+-]?\d+\.?\d*)\s\[([+-]?\d+\.?\d*),\s([+-]?\d+\.?\d*)\]", text)


def quotes(quoted: tuple[str, str, str], found: tuple[str, str, str]) -> bool:
    """Whether an interval is another, rounded, or turned round: 7 points worse are -7 points."""
    digits = len(quoted[0].partition(".")[2])
    wanted = [float(each) for each in quoted]
    mean, low, high = (float(each) for each in found)
    ways = [(mean, low, high), (-mean, -high, -low)]
    return any(all(abs(a - b) <= 0.5001 * 10**-digits for a, b in zip(wanted, way, strict=True)) for way in ways)


@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_every_interval_in_an_answer_stands_in_its_run_or_in_the_reference_run(exercise):
    answer = page(exercise.lesson).partition(f"## {exercise.number}. ")[2].partition("\n## ")[0]
    reference = ROOT / "results" / exercise.lesson / "summary.md"
    found = [each for path in (kept_run(exercise), reference) for each in intervals(path.read_text(encoding="utf-8"))]
    for quoted in intervals(answer):
        assert any(quotes(quoted, each) for each in found), quoted


def test_a_wrong_quotation_is_noticed():
    assert quotes(("7.0", "2.8", "11.2"), ("-7.0", "-11.2", "-2.8"))
    assert quotes(("55", "50", "59"), ("+54.7", "+50.2", "+59.3"))
    assert not quotes(("7.0", "2.8", "11.2"), ("7.1", "2.8", "11.2"))
    assert intervals("worse by 7.0 [2.8,\n11.2] points") == [("7.0", "2.8", "11.2")]


def test_a_diff_is_read_hunk_by_hunk():
    assert hunks(" a\n-b\n+c\n d\n\n-    e") == [("a\nb\nd", "a\nc\nd"), ("    e", "")]


def test_a_change_that_does_not_fit_is_one_clear_error():
    exercise = Exercise("14_x", 1, "?", [("b", "c")], [])
    assert changed("a\nb\nd\n", exercise) == "a\nc\nd\n"
    assert changed("a\nb\nd\n", exercise._replace(changes=[("b", "")])) == "a\nd\n"
    for text in ("a\nbb\n", "a\nb\nb\n", "a\nb\na\nb\n"):
        with pytest.raises(LessonError, match="exercise 1: the script does not have this, once"):
            changed(text, exercise)


def test_an_exercise_is_run_from_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(exercises, "OUT", tmp_path)
    assert pick("14", 3).lesson == LESSONS[0]
    words = ["14", "3", "--quick", "--jobs", "1", "--only", "redundancy"]
    assert main(words) == 0
    folder = tmp_path / "14-3" / LESSONS[0]
    script = (tmp_path / "14-3" / f"{LESSONS[0]}.py").read_text(encoding="utf-8")
    assert "    return x * keep\n" in script
    assert list(read_record(folder / "results.json")["experiments"]) == ["wrong_mode", "overfitting", "redundancy"]
    capfd.readouterr()
    assert main(["14", "9"]) == 2
    assert capfd.readouterr().err == "error: there is no exercise 14 9; lessons: 14, 15, 16, 17, 18, 19\n"
    assert main(["14", "1", "--only", "nothing"]) == 2


@pytest.mark.parametrize(("words", "code", "kept"), [([], 0, 0), (["--keep"], 0, 1), (["--keep"], 2, 0)])
def test_only_a_whole_run_is_kept_and_only_when_asked(tmp_path, monkeypatch, words, code, kept):
    calls = []
    monkeypatch.setattr(exercises, "run", lambda exercise, more: (code, tmp_path))
    monkeypatch.setattr(exercises, "keep", lambda *arguments: calls.append(arguments))
    assert main(["14", "1", *words]) == code
    assert calls == kept * [(ALL[0], tmp_path)]


def test_no_other_run_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(exercises, "run", lambda exercise, more: pytest.fail("it ran"))
    assert main(["14", "1", "--keep", "--quick"]) == 2
    assert capsys.readouterr().err == "error: --keep files the run that the page names; leave out: --quick\n"


def test_ctrl_c_is_no_traceback(monkeypatch):
    def interrupted(exercise, more):
        raise KeyboardInterrupt

    monkeypatch.setattr(exercises, "run", interrupted)
    assert main(["14", "1"]) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups are POSIX's")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_whoever_ends_the_command_ends_the_lesson(number, code, tmp_path):
    text = f"import sys; from pathlib import Path; from exercises import repeat; repeat.OUT = Path({str(tmp_path)!r})"
    command = [sys.executable, "-c", f"{text}; sys.exit(repeat.main(['14', '1', '--longer', '50', '--jobs', '2']))"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **how) as process:
        while "overfitting ---" not in process.stdout.readline():
            pass
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in err
    deadline = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(exercises, "OUT", tmp_path / "file")
    assert main(["14", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_is_kept_without_its_figures(tmp_path, monkeypatch):
    exercise = ALL[0]
    folder = tmp_path / exercise.lesson
    folder.mkdir()
    (folder / "summary.md").write_text("# T\n\nData.\n\n## a\n\n![a](a.png)\n\n![b](b.png)\n\nEnd\n", encoding="utf-8")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(exercises, "FOLDER", tmp_path)
    exercises.keep(exercise, tmp_path)
    text = (tmp_path / "runs" / "14-1.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Exercise 1 of lesson 14: {exercise.question}\n\n## T\n\nData.\n\n## a\n\nEnd\n")
    assert text.endswith(f"source {exercises.source_of(exercise)}.\n")
