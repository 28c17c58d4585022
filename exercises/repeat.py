"""Repeat the run behind the answer to an exercise: `python -m exercises.repeat 14 1`."""

import argparse
import hashlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from common.data import LessonError
from docs.record import ROOT, write_whole
from docs.sources import experiments_in, sources

FOLDER = ROOT / "exercises"
OUT = ROOT / "outputs" / "exercises"


class Exercise(NamedTuple):
    """A question, the lines to change as (before, after), and the words of the command that then runs the lesson."""

    lesson: str
    number: int
    question: str
    changes: list[tuple[str, str]]
    words: list[str]


def hunks(diff: str) -> list[tuple[str, str]]:
    """A diff's hunks, divided by blank lines, as the text before and after the change."""
    pairs = []
    for hunk in re.split(r"\n\n+", diff.strip("\n")):
        lines = hunk.split("\n")
        before, after = ("\n".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        pairs.append((before, after))
    return pairs


def exercises(lesson: str) -> list[Exercise]:
    """The exercises of a lesson, as its page in exercises/ says."""
    text = (FOLDER / f"{lesson}.md").read_text(encoding="utf-8")
    pattern = r"^## (\d)\. ([^\n]+)\n\n```diff\n(.*?)\n```\n\n```bash\npython \S+ ([^\n]+)\n```"
    found = re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)
    return [
        Exercise(lesson, int(number), question, hunks(diff), words.split()) for number, question, diff, words in found
    ]


def changed(text: str, exercise: Exercise) -> str:
    """The lesson's text with the exercise's lines changed. Raises LessonError unless each is there, once."""
    for before, after in exercise.changes:
        lines = re.compile(f"^{re.escape(before)}\n", re.MULTILINE)
        if len(lines.findall(text)) != 1:
            raise LessonError(f"exercise {exercise.number}: the script does not have this, once:\n{before}")
        new = f"{after}\n" if after else ""
        text = lines.sub(lambda _, new=new: new, text)
    return text


def pick(number: str, which: int) -> Exercise:
    """Exercise `which` of the lesson that begins with `number`. Raises LessonError if there is none."""
    lessons = [path.stem for path in sorted(FOLDER.glob("[0-9][0-9]_*.md"))]
    found = [each for lesson in lessons if lesson[:2] == number for each in exercises(lesson) if each.number == which]
    if not found:
        raise LessonError(f"there is no exercise {number} {which}; lessons: {', '.join(each[:2] for each in lessons)}")
    return found[0]


def run(exercise: Exercise, more: list[str]) -> tuple[int, Path]:
    """Run a changed copy of the lesson; returns the exit code and the folder that it and its results are in."""
    folder = OUT / f"{exercise.lesson[:2]}-{exercise.number}"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{exercise.lesson}.py"
    text = (ROOT / script.name).read_text(encoding="utf-8")
    script.write_text(changed(text, exercise), encoding="utf-8")
    sys.argv = [str(script), *exercise.words, "--out", str(folder), *more]
    sys.path[:0] = [str(ROOT)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0, folder
    finally:
        del sys.path[0]
    return 0, folder


def source_of(exercise: Exercise) -> str:
    """A hash of the code that decides the numbers of the experiments that an exercise runs, before its change."""
    text = (ROOT / f"{exercise.lesson}.py").read_bytes()
    names = [name for name in experiments_in(text) if name in exercise.words] or experiments_in(text)
    return hashlib.sha256(json.dumps(sources(names, text)).encode()).hexdigest()


def keep(exercise: Exercise, folder: Path) -> None:
    """File the run's summary in exercises/runs, without its figures and what the lesson says of its own run."""
    summary = (folder / exercise.lesson / "summary.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\n\n", "", summary, flags=re.MULTILINE)
    text = re.sub(r"^\*The lesson says.*?(?=^<|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    head = f"# Exercise {exercise.number} of lesson {exercise.lesson[:2]}: {exercise.question}"
    end = f"\nThe script before the change: source {source_of(exercise)}.\n"
    path = FOLDER / "runs" / f"{exercise.lesson[:2]}-{exercise.number}.md"
    write_whole(path, lambda aside: aside.write_text(f"{head}\n\n#{text}{end}", encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exercises.repeat", description=__doc__)
    parser.add_argument("lesson", help="14 to 19")
    parser.add_argument("number", type=int, help="the exercise's number")
    parser.add_argument("--keep", action="store_true", help="file the summary in exercises/runs, for the answer")
    options, more = parser.parse_known_args(arguments)
    try:
        exercise = pick(options.lesson, options.number)
        if options.keep and more:
            raise LessonError(f"--keep files the run that the page names; leave out: {' '.join(more)}")
        code, folder = run(exercise, more)
    except (LessonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the lesson began, which says so itself
        print("interrupted", file=sys.stderr)
        return 130
    if options.keep and code == 0:
        keep(exercise, folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
