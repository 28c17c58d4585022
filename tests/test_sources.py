"""What decides the numbers of an experiment, and what does not."""

import os
import shutil

import pytest
from conftest import FURTHER_SCRIPTS, LESSONS, ROOT

from docs.sources import Place, experiments_in, reached, read, sources

CODE = '''"""Doc."""

import math
from functools import partial

from common.lab import Lab
from common.lesson import Lesson
from common.training import Recipe
from further.first_aid import mlp

lesson = Lesson("99_fake", "A fake lesson")
RATE = 0.1
GRID = {}
GRID["rate"] = (RATE, load(1))
for each in (RATE,):
    GRID[each.__name__] = 17
OTHER = 3


# A comment.
def f(x: int) -> int:
    """Doc."""
    # Another.
    for i in range(3):
        x += i  # a third
        x *= 2
    if x > 1000:
        raise ValueError("too large")
    return math.sqrt(x) + 0.1


class Net(nn.Module):
    def forward(self, x):
        return f(x) - 7

    @property
    def extent(self):
        return 5

    @extent.setter
    def extent(self, value):
        pass


MODELS = {}


def add_to(models):
    return lambda function: models.setdefault(function.__name__, function)


@add_to(MODELS)
def by_name(x):
    return 11


@torch.no_grad()
def only_second(x):
    return 19


def load(x):
    check_and_clip(x)


def check_and_clip(x):
    x += 13


def network(rate: float) -> Recipe:
    return Recipe(Net(), partial(f, rate))


@lesson.experiment
def first(lab: Lab) -> None:
    """Which?"""
    runs = lab.study(network, **GRID)
    lab.sweep(runs.test_accuracy, x="rate")
    lab.claim("All is well", "somebody", runs.test_accuracy, above=3)


@lesson.experiment
def second(lab: Lab) -> None:
    """And then?"""
    lab.study(mlp, gain=(OTHER, only_second(2)))


if __name__ == "__main__":
    lesson.main()
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of the modules that a script may import."""
    for folder in ("common", "further"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def hashes(text: str, root=ROOT) -> tuple[str, str]:
    found = sources(["first", "second"], text, (root,))
    return found["first"], found["second"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Doc."""\n\nimport', '"""Other\n\nwords."""\n\nimport'),
        ('    """Doc."""\n', '    """Other words: f(x) == 3."""\n'),
        ('    """Doc."""\n', ""),
        ("# A comment.", "# Another comment.\n# And a third."),
        ("  # a third", "  # a fourth"),
        ("\n# A", "\n\n\n# A"),
        ("range(3)", "range( 3 )"),
        ("math.sqrt(x) + 0.1", "(\n        math.sqrt(x) + 0.1\n    )"),
        ("x: int", "x: float"),
        ("-> int:", "-> float:"),
        ("too large", "larger than 1,000"),
        ("@lesson.experiment\ndef second", "def third():\n    return 0\n\n\n@lesson.experiment\ndef second"),
        ("\n", "\r\n"),
        ('"""Doc."""\n\nimport', '\ufeff"""Doc."""\n\nimport'),
    ],
)
def test_what_decides_no_number_leaves_the_hashes_be(old, new):
    assert old in CODE
    assert hashes(CODE.replace(old, new).encode()) == hashes(CODE)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("+ 0.1", "+ 0.2", [True, False]),
        ("range(3)", "range(4)", [True, False]),
        ("RATE = 0.1", "RATE = 0.2", [True, True]),
        ("OTHER = 3", "OTHER = 4", [False, True]),
        (
            "    runs = lab.study(network, **GRID)",
            "    OTHER = lab.study(network, **GRID)\n    runs = OTHER",
            [True, False],
        ),
        ("- 7", "- 8", [True, False]),  # in a method that torch will call
        ("return 5", "return 6", [True, False]),
        ("return 19", "return 20", [False, True]),
        ("return 11", "return 12", [True, True]),  # a decorator may have put that anywhere
        ("load(1)", "load(2)", [True, True]),
        ("x += 13", "x += 14", [True, True]),
        ("    check_and_clip(x)", "    x", [True, True]),
        ("= 17", "= 18", [True, True]),
        ("    lesson.main()", "    RATE = 3\n    lesson.main()", [True, True]),
        ("above=3", "above=4", [True, False]),
        ("All is well", "All is good", [True, False]),
        ('x="rate"', 'x="epoch"', [True, False]),  # else the figure that is on file would be another
        ("import math", "import cmath as math", [True, False]),
        ("import mlp", "import network as mlp", [False, True]),
        ("        x *= 2", "    x *= 2", [True, False]),  # moved out of the loop
        ("> 1000:\n", "> 1000:\n        x = 0\n", [True, False]),
        ("OTHER = 3\n", "OTHER = 3\nprint(RATE)\n", [True, True]),  # what runs with the script may change anything
    ],
)
def test_code_changes_the_hashes_of_what_it_reaches(old, new, changed):
    assert CODE.count(old) == 1
    assert [a != b for a, b in zip(hashes(CODE), hashes(CODE.replace(old, new)), strict=True)] == changed


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        ("common/training.py", "losses.sum().backward()", "(2 * losses.sum()).backward()", [True, True]),
        ("common/statistics.py", "0.975", "0.995", [True, False]),
        ("common/data.py", "(0, 2, 3)", "(0,)", [True, True]),
        ("common/lab.py", "TUNING_SEEDS = 3", "TUNING_SEEDS = 4", [True, True]),
        ("common/lab.py", "Draw each array", "Plot each array", [False, False]),
        ("common/lab.py", "even=True", "even=None", [False, False]),  # in `sweep`
        ("common/plotting.py", "linewidth=1.8", "linewidth=2", [False, False]),
        ("common/report.py", "simple", "grid", [False, False]),
        ("common/data.py", "digits.csv.gz", "digits.csv", [False, False]),  # what is read is known by its content
        ("further/first_aid.py", "std=gain * (2", "std=gain * (3", [False, True]),
    ],
)
def test_the_projects_own_modules_are_part_of_the_hash_as_far_as_they_are_reached(copy, module, old, new, changed):
    before, path = hashes(CODE, copy), copy / module
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert [a != b for a, b in zip(before, hashes(CODE, copy), strict=True)] == changed


def test_a_module_of_the_readers_own_is_part_of_the_hash_as_far_as_it_is_reached(tmp_path):
    text = CODE.replace("import math\n", "import helpers\nimport math\n\nfrom tools import WIDTH\n", 1)
    text = text.replace("- 7", "- WIDTH - helpers.deep(x)")
    (tmp_path / "tools.py").write_text("WIDTH = 16\nOTHER = 2\n")
    (tmp_path / "helpers.py").write_text("def deep(x):\n    return 3\n")
    folders = (tmp_path, ROOT)
    before = sources(["first", "second"], text, folders)
    for name, new, changes in (("tools", "WIDTH = 16\nOTHER = 3\n", False), ("tools", "WIDTH = 8\n", True)):
        (tmp_path / f"{name}.py").write_text(new)
        os.utime(tmp_path / f"{name}.py", ns=(0, len(new)))
        now = sources(["first", "second"], text, folders)
        assert (now["first"] != before["first"], now["second"] != before["second"]) == (changes, False)
    (tmp_path / "helpers.py").write_text("def deep(x):\n    return 4\n")
    os.utime(tmp_path / "helpers.py", ns=(0, 1))
    assert sources(["first", "second"], text, folders)["first"] != now["first"]


@pytest.mark.parametrize("part", [*LESSONS, *(f"further/{path.stem}" for path in FURTHER_SCRIPTS)])
def test_every_experiment_that_trains_reaches_the_training_loop(part):
    text = (ROOT / f"{part}.py").read_bytes()
    script, names = read("", text), experiments_in(text)
    assert len(set(sources(names, text).values())) == len(names) > 0
    for name in names:
        trains = "study" in script.pieces[Place("", name)].attributes
        assert trains <= (Place("common.training", "Training.train_step") in reached(name, script)), name
