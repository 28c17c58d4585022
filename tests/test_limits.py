"""The limits of every part: what a learner with an hour has to bear."""

import ast
import json
import re

import pytest
from conftest import FURTHER_SCRIPTS, LESSONS, ROOT

from common.report import measured
from common.statistics import FAILS, HOLDS, UNCLEAR

FURTHER = [f"further/{path.stem}" for path in FURTHER_SCRIPTS]
HELPERS = [f"further/{path.stem}" for path in sorted((ROOT / "further").glob("_[a-z]*.py"))]  # no scripts
PARTS = [*LESSONS, *FURTHER]
READ = [*PARTS, *HELPERS]
MOST_LINES = dict.fromkeys(LESSONS, 520) | dict.fromkeys([*FURTHER, *HELPERS], 200)
MOST_LINES["14_dropout_regularization"] = 480
MOST_CLAIMS = dict.fromkeys(LESSONS, 20) | dict.fromkeys(FURTHER, 8)
MOST_CLAIMS |= {"14_dropout_regularization": 16, "15_regularization_techniques_detailed": 24}
WORDS, CODE = 200, 12  # read in a minute: words of prose, lines of code
LONGER, FRESH = "longer-4", "fresh-seeds"


def source(part: str) -> str:
    return (ROOT / f"{part}.py").read_text(encoding="utf-8")


def stored(part: str, *folders: str) -> dict:
    path = ROOT.joinpath("results", *folders, part.rpartition("/")[2], "results.json")
    return json.loads(path.read_text(encoding="utf-8"))


def cells(part: str) -> list[tuple[str, str]]:
    """Each cell of a script: the text of a Markdown cell, or the code of another."""
    found = []
    for cell in re.split(r"^# %%", source(part), flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        found.append((re.sub(r"^# ?", "", body, flags=re.MULTILINE), "") if "[markdown]" in head else ("", body))
    return found


def functions(part: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source(part))) if isinstance(node, ast.FunctionDef)]


def experiments(part: str) -> list[ast.FunctionDef]:
    return [each for each in functions(part) if "lesson.experiment" in map(ast.unparse, each.decorator_list)]


def length(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("part", READ)
def test_a_script_is_short_and_narrow(part):
    lines = source(part).splitlines()
    assert len(lines) <= MOST_LINES[part]
    assert max(map(len, lines)) <= 100
    assert ".squeeze()" not in source(part)  # of one seed it would take the dimension, too
    assert max(map(length, experiments(part)), default=0) <= 25
    assert len(experiments(part)) <= 8


def test_the_plumbing_is_short():
    paths = sorted((ROOT / "common").glob("*.py"))
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= 1300
    assert max(len(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(("folder", "most"), [("readers", 300), ("runner", 400)])
def test_what_meets_the_outside_is_short(folder, most):
    """The reading of files, and processes and terminals."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).glob("*.py"))]
    assert 0 < sum(len(text.splitlines()) for text in texts) <= most
    assert max(len(line) for text in texts for line in text.splitlines()) <= 120


@pytest.mark.parametrize("part", READ)
def test_the_code_is_slow_reading(part):
    """Few comprehensions, none in another; no f-string with a condition."""
    tree = ast.parse(source(part))
    kinds = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
    comprehensions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert len(comprehensions) <= 0.05 * len(source(part).splitlines())
    for node in comprehensions:
        assert sum(isinstance(each, kinds) for each in ast.walk(node)) == 1, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            assert not [each for each in ast.walk(node) if isinstance(each, ast.IfExp)], ast.unparse(node)


TAKES_APART = ("rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix", "isdigit")


def apart(text: str) -> list[str]:
    """Where a script takes text apart to find out its meaning: a tensor's `split` has a number, a string's has not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            strings = [each for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if node.func.attr in TAKES_APART or (node.func.attr == "split" and (strings or not node.args)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            found += [ast.unparse(node)] if isinstance(node.left, ast.Constant) else []
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None), *(each.name for each in node.names)]
            found += [ast.unparse(node)] if "re" in modules else []
    return found


@pytest.mark.parametrize("part", READ)
def test_no_name_is_taken_apart(part):
    assert apart(source(part)) == []


def test_a_name_taken_apart_is_noticed():
    assert apart("x.split(50)\norder.split(size, 1)") == []
    for text in ("a.split()", "a.split(' ')", "a.startswith(b)", "'He' in name", "import re", "from re import match"):
        assert len(apart(text)) == 1, text


def loops(tree: ast.AST) -> list[ast.FunctionDef]:
    """The functions with an ordinary training loop: an epoch's loop around a batch's, and what belongs into them."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        nested = [
            inner
            for outer in ast.walk(function)
            if isinstance(outer, ast.For)
            for inner in ast.walk(outer)
            if isinstance(inner, ast.For) and inner is not outer
        ]
        text = ast.unparse(function)
        wanted = ("nn.Sequential(", "model.train()", "model.eval()", "torch.no_grad()", "print(")
        step = ("zero_grad()", "backward()", "optimizer.step()")
        inside = any(all(word in ast.unparse(each) for word in step) for each in nested)
        if inside and all(word in text for word in wanted) and "fit(" not in text and "Recipe" not in text:
            found.append(function)
    return found


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_shows_an_ordinary_training_loop_before_anything_else(lesson):
    (loop,) = loops(ast.parse(source(lesson)))
    assert length(loop) <= 45
    first = experiments(lesson)[0]
    assert loop.name in ast.unparse(first)
    assert loop.lineno < 130
    assert not loops(ast.parse("def train():\n    for epoch in range(3):\n        fit(network, [0])"))


@pytest.mark.parametrize("part", PARTS)
def test_the_minutes_in_the_header_are_counted(part):
    words, code = 0, 0
    for text, body in cells(part):
        words += len(re.sub(r"[|#]", "", text).split())
        if body:
            for node in ast.walk(ast.parse(body)):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                    words += len(ast.get_docstring(node).split())
            without = re.sub(r'^ *""".*?"""$', "", body, flags=re.MULTILINE | re.DOTALL)
            code += sum(bool(line.strip()) for line in without.splitlines())
    header = cells(part)[0][0].replace("\n", " ")
    counted = re.search(r"\*\*Time\*\*: (\d+) minutes of reading \(([\d,]+) words at 200 a minute, (\d+) lines", header)
    told = [int(each.replace(",", "")) for each in counted.groups()]
    assert told[0] == round(words / WORDS + code / CODE)
    assert told[1:] == pytest.approx([words, code], abs=10)


def told(part: str) -> dict[str, tuple[str, str]]:
    """For each experiment what was seen and how far it carries, as the lesson says."""
    found, name = {}, ""
    for text, body in cells(part):
        if match := re.search(r"^@lesson\.experiment\ndef (\w+)", body, re.MULTILINE):
            name = match[1]
        elif name and "**What we saw.**" in text:
            seen, _, carries = re.split(r"^#", text, flags=re.MULTILINE)[0].partition("**How far it carries.**")
            found[name], name = (seen.partition("**What we saw.**")[2], carries), ""
    return found


@pytest.mark.parametrize("part", PARTS)
def test_every_experiment_says_what_was_seen_and_how_far_it_carries(part):
    names = [each.name for each in experiments(part)]
    judged = {claim["experiment"] for claim in stored(part)["claims"]}
    assert list(told(part)) == [name for name in names if name in judged]
    for seen, carries in told(part).values():
        assert 30 <= len(seen.split()) <= 130
        assert 8 <= len(carries.split()) <= 60


@pytest.mark.parametrize("part", PARTS)
def test_each_verdict_that_the_text_names_is_the_reference_runs(part):
    text = re.sub(r"\s+", " ", " ".join(markdown for markdown, _ in cells(part)))
    verdicts = {claim["id"]: claim["verdict"] for claim in stored(part)["claims"]}
    named = re.findall(r"\[(\w+-\d+) ([^\]]+)\]", text)
    for id, verdict in named:
        assert verdicts[id] == verdict, id
    assert {id for id, _ in named} == set(verdicts)


@pytest.mark.parametrize("part", PARTS)
def test_each_number_that_was_seen_stands_in_the_reference_run(part):
    record = stored(part)
    for name, (seen, _) in told(part).items():
        claims = [measured(claim) for claim in record["claims"] if claim["experiment"] == name]
        printed = " ".join([record["experiments"][name]["printed"], *claims])
        there = set(re.findall(r"\d+\.\d+", printed))
        missing = set(re.findall(r"\d+\.\d+", seen)) - there
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("part", PARTS)
def test_claims_are_few_and_decided(part):
    claims = stored(part)["claims"]
    assert 4 <= len(claims) <= MOST_CLAIMS[part]
    assert sum(claim["verdict"] == UNCLEAR for claim in claims) <= 0.1 * len(claims)
    for claim in claims:
        assert not re.search(r"\b(it|its|they|them)\b", claim["statement"]), claim["statement"]
        assert claim["source"]


def verdicts(part: str, folder: str) -> list[tuple[str, str]]:
    """The decided verdicts of a reference run, each with that of the run in another folder."""
    pairs = zip(stored(part)["claims"], stored(part, folder)["claims"], strict=True)
    return [(a["verdict"], b["verdict"]) for a, b in pairs if a["verdict"] in (HOLDS, FAILS)]


@pytest.mark.parametrize("folder", [LONGER, FRESH])
@pytest.mark.parametrize("part", PARTS)
def test_verdicts_outlive_four_times_the_training_and_fresh_seeds(part, folder):
    record, reference = stored(part, folder), stored(part)
    longer = (4, 0) if folder == LONGER else (1, 100)
    assert (record["settings"]["longer"], record["settings"]["seeds"][0]) == longer
    for name, entry in record["experiments"].items():
        assert entry["source"] == reference["experiments"][name]["source"], name
    decided = verdicts(part, folder)
    assert sum(a == b for a, b in decided) >= 0.95 * len(decided)
    assert not [pair for pair in decided if set(pair) == {HOLDS, FAILS}]
