"""What a run shows: on any output, at any width, whatever the reader has set in matplotlib."""

import codecs
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr
from conftest import LESSONS, ROOT
from replay import replay

from common import lesson as command_line
from common import report
from common.data import load
from common.lab import Lab
from common.lesson import Lesson
from docs import record
from runner import workers
from runner.terminal import Output, any_output, own_settings, plain_matplotlib, width, wrapped
from runner.workers import wait_for

PRINTED = "× · – − “quoted” ‘one’ √ ± → ← ≤ ≥ 10² 10⁵ λ β ü é … 中"


class Ended(io.StringIO):
    """An output whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


class Bare:
    """An output that can only write, in the characters of a code page that it does not name."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text.encode("cp1252").decode("cp1252")


def says(lab: Lab) -> None:
    """Does ≥ “this” × λ² get through …?"""
    lab.say(PRINTED)
    sys.stderr.write(PRINTED + "\n")
    lab.claim("10² ≥ 10 × 10 – always", "“√ & co”", xr.DataArray([1.0, 2.0], dims="seed"), above=0)


def main(folder: Path, *words: str, experiments=(says,)) -> int:
    lesson = Lesson("fake", "A fake lesson: λ ≤ 1")
    for each in experiments:
        lesson.experiment(each)
    try:
        lesson.main(["--out", str(folder), "--seeds", "2", "--jobs", "1", *words])
    except SystemExit as error:
        return error.code or 0
    return 0


@contextmanager
def a_thread(jobs: int, dataset: str, folder: Path):
    load(dataset, folder)
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """No worker has to be forked, and the terminal of whoever runs the tests has no say."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(command_line, "workers", a_thread)


def page(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding, errors, newline="")


def shown(stream: io.TextIOWrapper) -> str:
    return stream.buffer.getvalue().decode(stream.encoding)


# Any character


@pytest.mark.parametrize("words", [[], ["--help"], ["--list"], ["--dataset", "λ≥.txt"], ["--bogus", "中"]])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "cp932", "latin-1", "utf-8", "utf-16"])
def test_any_code_page_shows_everything(encoding, words, tmp_path, monkeypatch):
    out, err = page(encoding), page(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = main(tmp_path, *words)
    assert (sys.stdout, sys.stderr) == (out, err)
    assert code == (2 if words and words[0] in ("--dataset", "--bogus") else 0)
    if encoding == "cp1252" and not words:
        assert "× · – - “quoted” ‘one’ sqrt  ± -> <- <= >= 10² 10^5 lambda beta ü é … \\u4e2d" in shown(out)
    if encoding == "ascii" and not words:
        for stream in (out, err):
            told = "x * - - \"quoted\" 'one' sqrt  +/- -> <- <= >= 10^2 10^5 lambda beta u e ... \\u4e2d"
            assert told in shown(stream)
    if encoding.startswith("utf"):
        assert (PRINTED in shown(out)) == (not words)


@pytest.mark.parametrize("errors", ["strict", "backslashreplace", "replace"])
def test_what_a_page_lacks_is_replaced_readably_whatever_the_stream_does_with_it(errors):
    stream = page("cp1252", errors)
    Output(stream).write("a ≤ b ≥ c²")
    stream.flush()
    assert shown(stream) == "a <= b >= c²"


def test_a_path_that_is_no_text_is_shown_too():
    stream = page("utf-8")
    Output(stream).write("caf\udce9\n")
    assert shown(stream) == "caf\\udce9\n"


@pytest.mark.parametrize(
    "stream", [None, io.StringIO, Bare, Ended, "closed", lambda: codecs.getwriter("ascii")(io.BytesIO())]
)
def test_any_kind_of_stream_in_the_place_of_both(stream, tmp_path, monkeypatch):
    made = stream() if callable(stream) else stream
    if stream == "closed":
        made = io.StringIO()
        made.close()
    monkeypatch.setattr(sys, "stderr", made)
    assert main(tmp_path, "--dataset", "λ≥.txt") == 2
    assert main(tmp_path) == 0
    if stream is not Ended:
        monkeypatch.setattr(sys, "stdout", made)
        assert main(tmp_path) == 0
    assert sys.stderr is made


def test_a_reader_that_is_gone_ends_the_run_and_its_error_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Ended())
    monkeypatch.setattr(sys, "stderr", Ended())
    kept = os.dup(1)
    try:
        assert main(tmp_path) == 1
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_each_line_is_shown_at_once(monkeypatch):
    stream = page("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with any_output():
        print("first")
        assert shown(stream) == "first\n"
    print("second")
    assert shown(stream) == "first\n"  # the reader's own again


NAMES = ["[final]", "[/y]", "100%", "{x}", "a\nb", "-dash", "__init__", "`tick`", "<b>"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name, tmp_path, capsys):
    assert main(tmp_path / name) == 0
    assert (
        f"All tables, figures and numbers: {tmp_path / name / 'test_output' / 'summary.md'}" in capsys.readouterr().out
    )
    assert main(tmp_path, f"--dataset={name}.npz") == 2
    assert f"{name}.npz".replace("\n", " ") in capsys.readouterr().err  # one line


# Markdown


def test_names_and_settings_do_not_break_the_page(tmp_path):
    nasty = "|`<b>*_[x](y)~&lt;$\nnew"
    options = {name: nasty if name == "dataset" else 1 for name in record.SETTINGS} | {"seeds": [0]}
    claim = {
        "statement": nasty,
        "source": nasty,
        "experiment": "__x__",
        "expected": "> 0",
        "verdict": "holds",
        "id": "x-1",
    }
    claim |= {"seeds": 1, "estimate": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1, "unit": ""}}
    entry = {"question": nasty, "figures": ["x.png"], "printed": "a\n```\n# b\n````\n", "studies": []}
    found = {"title": nasty, "settings": options, "experiments": {"__x__": entry}, "claims": [claim]}
    text = record.summary(found, "")
    safe = "\\|\\`\\<b>\\*\\_\\[x\\](y)\\~\\&lt;\\$ new"
    assert text.splitlines()[0] == f"# {safe}"
    assert f"dataset {safe}, " in text
    assert f"*{safe}*\n\n![{safe}](x.png)" in text
    assert "## \\_\\_x\\_\\_" in text
    assert f"| {safe} ({safe}) |" in text
    assert "`````text\na\n```\n# b\n````\n`````\n" in text
    assert len(text.splitlines()[-1].replace("\\|", "").split("|")) == 7


# Width


def terminal(monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))


@pytest.mark.parametrize(("columns", "wanted"), [(20, 60), (60, 60), (72, 72), (80, 80), (200, 80), ("x", 80), (0, 80)])
def test_the_width_is_the_terminals_from_60_to_80(columns, wanted, monkeypatch):
    terminal(monkeypatch, columns)
    assert width() == wanted


def test_without_a_terminal_it_is_80(monkeypatch):
    assert width() == 80
    for stream in (None, Bare()):
        monkeypatch.setattr(sys, "stdout", stream)
        assert width() == 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((66, 24)))
    assert width() == 66


def test_long_lines_are_wrapped_by_words_and_short_ones_left_alone():
    text = "one two three " * 8 + "\n   a   table   \nend"
    first, *others = wrapped(text, 60).split("\n")
    assert len(first) <= 60
    assert others[-2:] == ["   a   table   ", "end"]
    assert wrapped("  x  ", 60) == "  x  "


@pytest.mark.parametrize("lesson", [LESSONS[1], LESSONS[3]])  # these have the widest tables
def test_a_lesson_fits_60_columns_and_files_80(lesson, monkeypatch, capsys):
    found = record.read_record(ROOT / "results" / lesson / "results.json")
    terminal(monkeypatch, 60)
    filed = "".join(replay(found).printed.values())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60, [line for line in lines if len(line) > 60]
    assert 60 < max(map(len, filed.splitlines())) <= 80


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/1*/summary.md")), ids=lambda path: path.parent.name)
def test_all_numbers_fit_60_columns_and_are_filed_for_80(path):
    page = path.read_text(encoding="utf-8")
    for entry in record.read_record(path.with_name("results.json"))["experiments"].values():
        for study in entry["studies"]:
            assert max(map(len, record.all_numbers(study, 60).splitlines())) <= 60
            assert record.all_numbers(study) in page


def array(columns: int, rows: list[str]) -> dict[str, xr.DataArray]:
    values = np.random.default_rng(0).normal(50, 9, (columns, len(rows), 5))
    coords = {"technique": rows, "seed": range(5)}
    return {f"measure {i}\n%": xr.DataArray(each, coords, attrs={"unit": "%"}) for i, each in enumerate(values)}


ROWS = ["none", "decoupled weight decay and label smoothing", "StepLR"]


@pytest.mark.parametrize("columns", [60, 66, 80])
@pytest.mark.parametrize("many", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("spans", [True, False])
def test_a_wide_table_becomes_several_each_with_whole_words_in_its_first_column(columns, many, spans):
    arrays = array(many, ROWS)
    text = report.table("A title of many words " * 5, arrays, ["technique"], spans, columns)
    assert max(map(len, text.splitlines())) <= columns
    for word in " ".join(ROWS).split():
        assert text.split().count(word) == text.split().count("technique") * " ".join(ROWS).split().count(word)
    for each in arrays.values():
        for cell in report.cells(each, spans):
            assert cell in text
    rules = [line for line in text.splitlines() if line.startswith("---")]
    assert len(rules) == text.split().count("technique")
    assert all(len(rule.split()[0]) >= 12 for rule in rules)
    assert len(rules) == 1 or many > 1


def test_a_name_without_spaces_is_broken_rather_than_a_number():
    text = report.table("Title", array(2, ["x" * 90]), ["technique"], True, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("x") % 90 == 0


def asks(lab: Lab) -> None:
    """Does a question of a great many words, many more than a line of sixty columns has room for, fit all the same?"""
    lab.table(array(4, ROWS), rows="technique")
    lab.say("A sentence that is longer than sixty columns are wide, and for that matter than eighty columns.")
    effect = xr.DataArray(np.random.default_rng(0).normal(0, 1e3, 2), dims="seed", attrs={"unit": "points"})
    lab.claim("A statement of a great many words " * 4, "a source", effect, above=-1234.5, below=1234.5)
    lab.claim("A statement", "a source", effect.astype(bool), above=50)


def test_a_run_on_60_columns_prints_60_and_files_80(tmp_path, monkeypatch, capsys):
    main(tmp_path / "wide", "--verbose", experiments=[asks])
    wide = capsys.readouterr().out
    terminal(monkeypatch, 60)
    main(tmp_path / "narrow", "--verbose", experiments=[asks])
    narrow = capsys.readouterr().out
    for text, most in ((wide, 80), (narrow, 60)):
        lines = [line for line in text.splitlines() if str(tmp_path) not in line]
        assert max(map(len, lines)) <= most
        assert max(map(len, lines)) > most - 4
    pages = [(tmp_path / name / "test_output" / "summary.md").read_text() for name in ("wide", "narrow")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("word", ["--help", "--list"])
@pytest.mark.parametrize("columns", [60, 200])
def test_help_and_list_fit_too(word, columns, monkeypatch, capsys, tmp_path):
    terminal(monkeypatch, columns)
    assert main(tmp_path, word, experiments=[asks]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= min(columns, 80)


# Progress


def nap(seconds: float = 0.05) -> None:
    time.sleep(seconds)


def test_without_a_terminal_lines_on_stderr_tell_how_far_the_trainings_are(monkeypatch, capsys):
    monkeypatch.setattr(workers, "EVERY", 0.12)
    with ThreadPoolExecutor(1) as pool:
        wait_for([pool.submit(nap) for _ in range(12)], "trains")
        wait_for([pool.submit(nap, 0.5)], "trains")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 2 <= len(lines) <= 10
    assert all(line.startswith("trains: ") for line in lines)
    assert "trains: 0 of 1 trainings" in lines  # one that takes long gives a sign of life


def test_a_short_study_is_silent(capsys):
    with ThreadPoolExecutor(1) as pool:
        wait_for([pool.submit(nap) for _ in range(3)], "trains")
    assert capsys.readouterr() == ("", "")


def test_under_a_terminal_there_is_a_bar_and_no_line(monkeypatch):
    monkeypatch.setattr(workers, "EVERY", 0.05)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with any_output(), ThreadPoolExecutor(1) as pool:
        wait_for([pool.submit(nap) for _ in range(5)], "trains")
    assert "/5" in sys.stderr.getvalue()
    assert "trainings" not in sys.stderr.getvalue()


def test_the_first_training_that_fails_ends_the_wait():
    with ThreadPoolExecutor(2) as pool:
        start = time.monotonic()
        slow, failed = pool.submit(nap, 1.5), pool.submit(int, "x")
        with pytest.raises(ValueError, match="invalid literal"):
            wait_for([slow, failed], "trains")
        assert time.monotonic() - start < 1


# Matplotlib


def draws(lab: Lab) -> None:
    """What does it look like?"""
    lab.sweep(
        xr.DataArray(np.arange(8.0).reshape(4, 2), {"p": [0.0, 0.1, 0.2, 0.3], "seed": [0, 1]}, name="loss"), x="p"
    )


def figure(folder: Path) -> bytes:
    assert main(folder, experiments=[draws]) == 0
    return (folder / "test_output" / "draws.png").read_bytes()


OTHER = {"text.usetex": True, "font.size": 30, "savefig.bbox": "tight", "savefig.format": "pdf", "figure.dpi": 30}
OTHER |= {"interactive": True, "axes.facecolor": "red", "savefig.transparent": True, "font.family": ["no such font"]}


def test_a_figure_is_the_same_whatever_is_set_and_the_settings_stay(tmp_path):
    usual = figure(tmp_path / "usual")
    with matplotlib.rc_context(OTHER):
        before = dict(matplotlib.rcParams)
        assert figure(tmp_path / "other") == usual
        assert dict(matplotlib.rcParams) == before
    assert matplotlib.rcParams["text.usetex"] is False


def fails() -> None:
    with own_settings():
        assert matplotlib.rcParams["font.size"] == 10
        raise RuntimeError


def test_the_settings_are_put_back_after_a_failure():
    with matplotlib.rc_context(OTHER):
        with pytest.raises(RuntimeError):
            fails()
        assert matplotlib.rcParams["font.size"] == 30


IMPORT = """
import os, sys
from runner.terminal import own_settings, plain_matplotlib
before, folder = dict(os.environ), os.getcwd()
with plain_matplotlib():
    from common import plotting
import matplotlib
assert dict(os.environ) == before and os.getcwd() == folder
assert "matplotlib.pyplot" not in sys.modules
with own_settings():
    figure, axes = plotting.new_figure("Which?")
    axes[0].plot([1, 2])
    figure.savefig("figure.png")
    print(matplotlib.rcParams["font.size"], matplotlib.rcParams["text.usetex"])
print(matplotlib.rcParams["font.size"], matplotlib.rcParams["text.usetex"], matplotlib.get_backend(auto_select=False))
"""


@pytest.mark.parametrize(
    ("rc", "variables", "after"),
    [
        (b"font.size: 20\ntext.usetex: True\n", {"MPLBACKEND": "svg"}, "20.0 True svg"),
        (b"", {"MPLBACKEND": "nonsense"}, "10.0 False None"),
        (b"", {"MPLBACKEND": "module://no_such_module.inline"}, "10.0 False module://no_such_module.inline"),
        (b"no key: 3\nno colon\nfont.size: big\nfont.size: 20\n", {}, "20.0 False None"),
        (b"\xff\xfe\x00", {"MPLCONFIGDIR": os.devnull, "MPLBACKEND": "agg"}, "10.0 False None"),
        (None, {"HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}, "10.0 False None"),
    ],
    ids=["settings", "backend", "module", "keys", "encoding", "folder"],
)
def test_no_settings_of_the_readers_end_or_disturb_the_import(rc, variables, after, tmp_path):
    if rc is None:
        (tmp_path / "matplotlibrc").mkdir()
    else:
        place = "other" if "font.size" in rc.decode(errors="ignore") else "matplotlibrc"
        (tmp_path / place).write_bytes(rc)
    set_up = {"PYTHONPATH": str(ROOT), "MATPLOTLIBRC": str(tmp_path / "other")} | variables
    command = [sys.executable, "-W", "error", "-c", IMPORT]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | set_up, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["10.0 False", after]
    assert (tmp_path / "figure.png").exists()


def test_where_matplotlib_is_imported_already_nothing_is_touched(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    with matplotlib.rc_context({"font.size": 20}):
        with plain_matplotlib():
            assert os.environ["MPLBACKEND"] == "nonsense"
        assert matplotlib.rcParams["font.size"] == 20
