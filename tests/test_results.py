"""The committed reference runs and the README that quotes them: fresh, complete, and saying what is claimed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FURTHER_SCRIPTS, LESSONS, ROOT, load_lesson, load_script
from PIL import Image

from common.lesson import parse
from common.statistics import FAILS, HOLDS, UNCLEAR, interval, judge
from docs import editorial, readme, record
from docs.sources import experiments_in, sources

RESULTS = readme.load_results()
FASHION = readme.load_results(dataset=readme.FASHION)
README = (ROOT / "README.md").read_text(encoding="utf-8")

# How many times as many clothes as digits in the reference runs: with lesson 14's 200 images 10,000.
LARGER = dict.fromkeys(LESSONS, 2) | {"14_dropout_regularization": 50}

# What the README and the lessons lean on. A new reference run that overturns one of these must be told, not slipped in.
HEADLINES = {
    "14_dropout_regularization": {
        "Adding dropout improves generalisation": HOLDS,
        "Weight decay on top of dropout gains accuracy": FAILS,
        "Testing in training mode costs accuracy": HOLDS,
        "In a shallow network a p from 0.1 to 0.2 beats every other p": FAILS,
        "With 800 images dropout gains more where labels are wrong": HOLDS,
        "Losing half of the hidden units costs less after dropout": HOLDS,
    },
    "15_regularization_techniques_detailed": {
        "Accuracy falls once validation loss rises (wrong)": HOLDS,
        "Accuracy falls once validation loss rises (right)": FAILS,
        "Early stopping is free at a high rate (right)": FAILS,
        "Decay and dropout gain 3 points at a high rate": HOLDS,
        "Smoothing, mixup gain 3 points at a high rate": FAILS,
        "Decay and dropout beat a lower rate by 1 point": FAILS,
        "Augmentation adds to a tuned rate (wrong)": HOLDS,
        "SGD at a high rate: decay 1e-4 gains 1 point": FAILS,
        "L1 makes a tenth of the weights zero (proximal)": HOLDS,
        "L1 makes a tenth of the weights zero (subgradient)": FAILS,
        "Pairs of techniques gain less than their sum": HOLDS,
    },
    "16_batch_normalization": {
        "10 plain layers do not train (PyTorch's start)": HOLDS,
        "20 layers train with batch norm": HOLDS,
        "20 layers fail with He's start": FAILS,
        "With batch norm twice the learning rate works, or more": HOLDS,
        "With batch norm ten times He's start costs nothing": FAILS,
        "Batch norm makes a sigmoid network 14 times as fast": FAILS,
        "Batch norm is as good after the ReLU as before": FAILS,
        "A forgotten eval() costs accuracy (10 random images)": HOLDS,
        "A forgotten eval() costs accuracy (one image a class)": FAILS,
    },
    "17_batch_normalization_detailed": {
        "Batches of 2 images cost batch norm 3 points": FAILS,
        "In batches of 2 group norm leads batch norm by 3 points": FAILS,
        "In batches of 2 vectors layer norm beats batch norm by 10 points": HOLDS,
        "In batches of 4 vectors layer norm beats batch norm by 10 points": FAILS,
        "Changed contrast costs instance norm nothing": HOLDS,
        "Instance norm hides by what factor images are multiplied": HOLDS,
        "Layer norm beats batch norm by 2 points (transformer)": FAILS,
    },
    "18_learning_rate_scheduling": {
        "Schedules gain 5 points on a tuned constant rate": FAILS,
        "A cosine gains 3 points on a constant rate of 0.1": HOLDS,
        "Half-way a tuned constant rate stops improving": FAILS,
        "After half-way a cosine goes on improving": HOLDS,
        "In few epochs one-cycle gains 2 points on a constant rate": FAILS,
        "One-cycle in half the epochs is as good as constant": HOLDS,
        "A patience of 0 costs accuracy against 3": HOLDS,
        "A rate of 0.001 is within 3 points of the best (Adam)": HOLDS,
        "A rate of 0.1 is within 3 points of the best (momentum)": FAILS,
        "Warm-up gains 20 points at a rate of 0.03": HOLDS,
        "At the best rates warm-up gains a point": FAILS,
        "A cosine of epochs, stepped per batch, costs accuracy": HOLDS,
        "A scheduler used up by a plot costs 10 points": HOLDS,
    },
    "19_weight_initialization": {
        "Large weights make tanh's gradients vanish": FAILS,
        "Ten ReLU layers train from PyTorch's weights": FAILS,
        "Ten layers of unscaled weights do not train": FAILS,
        "Unscaled weights cost 10 points beside He's": HOLDS,
        "From zeros a sigmoid layer learns nothing": FAILS,
        "A zero output layer costs 2 points": FAILS,
        "Six tanh layers: Xavier's gains 5 points over He's": FAILS,
        "Six sigmoid layers train from Xavier's": FAILS,
        "50 ReLU layers do not train from Xavier's": HOLDS,
        "20 ReLU layers train from He's": HOLDS,
        "From He's 50 ReLU layers learn as well as 5": FAILS,
        "Two ReLU layers learn as well from PyTorch's weights": HOLDS,
        "With skips He's weights beat PyTorch's": FAILS,
        "Adam trains ten layers from N(0, 0.01²)": FAILS,
    },
}


def sources_of(found: dict) -> dict[str, str]:
    return {name: entry["source"] for name, entry in found["experiments"].items()}


def sources_now(script: Path) -> dict[str, str]:
    text = script.read_bytes()
    return sources(experiments_in(text), text)


def test_every_lesson_has_its_reference_run():
    assert sorted(RESULTS) == LESSONS
    assert sorted(HEADLINES) == LESSONS


@pytest.mark.parametrize("lesson", LESSONS)
def test_results_come_from_the_code_as_it_stands(lesson):
    fresh = f"results/{lesson} is older than the code; run: python {lesson}.py --out results"
    now = sources_now(ROOT / f"{lesson}.py")
    assert sources_of(RESULTS[lesson]) == now, fresh
    again = f"python {lesson}.py --dataset fashion-mnist --out results/fashion-mnist"
    assert sources_of(FASHION[lesson]) == now, again


@pytest.mark.parametrize("script", FURTHER_SCRIPTS, ids=lambda script: script.stem)
def test_results_of_further_come_from_the_code_as_it_stands(script):
    found = record.read_record(ROOT / "results" / script.stem / "results.json")
    fresh = f"python -m further.{script.stem} --out results"
    assert sources_of(found) == sources_now(script), fresh
    assert found["settings"]["seeds"] == list(range(10))
    assert list(found["experiments"]) == list(load_script(f"further/{script.name}").lesson.experiments)
    folder = ROOT / "results" / script.stem
    assert (folder / "summary.md").read_text(encoding="utf-8") == record.summary(
        found, script.read_text(encoding="utf-8")
    )


def summary(lesson: str, folder: Path) -> str:
    """The page that is made of results.json."""
    found = record.read_record(folder / "results.json")
    return record.summary(found, (ROOT / f"{lesson}.py").read_text(encoding="utf-8"))


def names(lesson: str) -> list[str]:
    return list(load_lesson(lesson).lesson.experiments)


@pytest.mark.parametrize("lesson", LESSONS)
def test_fashion_mnist_is_a_whole_run_of_the_same_claims(lesson):
    found, digits = FASHION[lesson], RESULTS[lesson]
    assert found["settings"]["dataset"] == readme.FASHION
    assert not found["settings"]["quick"]
    assert len(found["settings"]["seeds"]) >= 3
    assert found["settings"]["larger"] >= LARGER[lesson]
    assert list(found["experiments"]) == list(digits["experiments"])
    ids = [[claim["id"] for claim in each["claims"]] for each in (found, digits)]
    assert ids[0] == ids[1]
    folder = ROOT / "results" / readme.FASHION / lesson
    assert (folder / "summary.md").read_text(encoding="utf-8") == summary(lesson, folder)
    for entry in found["experiments"].values():
        assert all((folder / figure).exists() for figure in entry["figures"])


def made_up(id: str, verdict: str, mean: float, statement: str = "") -> dict:
    estimate = {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 10, "unit": "points"}
    words = {"id": id, "statement": statement or f"claim {id}", "expected": "> 0 points", "seeds": 10}
    return words | {"estimate": estimate, "verdict": verdict, "source": "somebody"}


DIGITS = {"lesson": "14_x", "claims": [made_up("a-1", HOLDS, 5), made_up("a-2", UNCLEAR, 0), made_up("b-1", HOLDS, 3)]}
CLOTHES = {
    "lesson": "14_x",
    "claims": [made_up("a-1", HOLDS, 4), made_up("a-2", FAILS, -2), made_up("b-1", FAILS, -3, "claim b-1 (B)")],
}


def test_the_board_has_every_claim_with_both_verdicts():
    lines = readme.board(DIGITS, CLOTHES).splitlines()
    assert len(lines) == 5
    same, decided, opposite = lines[2:]
    assert same == (
        "| claim a-1 | somebody | > 0 points | +5.0 [+4.0, +6.0] points: holds | +4.0 [+3.0, +5.0] points: holds |"
    )
    assert decided.endswith("points: **unclear** | -2.0 [-3.0, -1.0] points: **does not hold** |")
    assert opposite.startswith("| claim b-1; on clothes: claim b-1 (B) |")
    assert readme.counts({"14_x": DIGITS}, {"14_x": CLOTHES}).splitlines()[2:] == [
        "| [14 Dropout](#14-dropout) | 3 | 2 / 0 / 1 | 1 / 2 / 0 | 1 | 1 | 1 |",
        "| **all** | 3 | 2 / 0 / 1 | 1 / 2 / 0 | 1 | 1 | 1 |",
    ]
    turned = readme.opposites({"14_x": DIGITS}, {"14_x": CLOTHES}).splitlines()[2:]
    assert len(turned) == 1
    assert turned[0].startswith("| 14 | claim b-1 | > 0 points | +3.0 [+2.0, +4.0] points: holds | -3.0")
    assert readme.opposites({"14_x": DIGITS}, {"14_x": DIGITS}) == "None."
    assert readme.totals({"14_x": DIGITS}) == ("Of 3 claims 2 hold on the digits, 0 do not, and 1 are unclear.")


@pytest.mark.parametrize("number", sorted(lesson[:2] for lesson in LESSONS))
def test_the_whole_board_is_in_the_readme(number):
    """Every claim of the level, its source, its effect and verdict on both data sets: nothing is left out."""
    lesson = next(each for each in LESSONS if each.startswith(number))
    section = README.partition(f"<!-- begin: board {number} -->")[2].partition("<!-- end -->")[0]
    for found in (RESULTS[lesson], FASHION[lesson]):
        for claim in found["claims"]:
            for text in (claim["statement"], readme.measured(claim)):
                assert text.replace("|", "\\|") in section
    assert section.count("\n| ") == len(RESULTS[lesson]["claims"]) + 2


def test_a_sentence_whose_verdict_turned_is_refused():
    assert readme.supported(DIGITS, {"claim a-1": HOLDS, "claim a-2": UNCLEAR}) == DIGITS["claims"][:2]
    with pytest.raises(ValueError, match="lesson 14_x: a sentence needs 'claim a-1' to be: does not hold"):
        readme.supported(DIGITS, {"claim a-1": FAILS})
    with pytest.raises(LookupError, match="2 claims of lesson 14_x begin with 'claim a'"):
        readme.supported(DIGITS, {"claim a": HOLDS})
    with pytest.raises(LookupError, match="0 claims"):
        readme.beginning(DIGITS, "no such claim")


def test_the_cheat_sheet_stands_on_verdicts():
    settings = ["dropout p", "weight decay", "learning rate", "batch size", "norm", "start", "schedule", "all together"]
    assert [advice.setting for advice in editorial.CHEAT_SHEET] == settings
    for advice in editorial.CHEAT_SHEET:
        assert sum(map(len, advice.rests_on.values())) >= 3
    overturned = json.loads(json.dumps(RESULTS))
    for claim in overturned["19_weight_initialization"]["claims"]:
        if claim["statement"].startswith("Six tanh layers"):
            claim["verdict"] = HOLDS
    with pytest.raises(ValueError, match="Six tanh layers"):
        readme.cheat_sheet(overturned, FASHION)


def test_every_lesson_has_three_findings_and_a_headline():
    for lesson in LESSONS:
        assert len(editorial.FINDINGS[lesson[:2]]) == 3
        assert readme.beginning(RESULTS[lesson], editorial.LESSONS[lesson[:2]].headline)
        text = (ROOT / f"{lesson}.py").read_text(encoding="utf-8")
        for finding in editorial.FINDINGS[lesson[:2]]:
            assert finding.rests_on
        assert f"`python {lesson}.py`" in README
        assert text.startswith("# %% [markdown]")


@pytest.mark.parametrize("lesson", LESSONS)
def test_results_are_a_whole_default_run(lesson):
    found, folder = RESULTS[lesson], ROOT / "results" / lesson
    settings = found["settings"]
    assert settings["seeds"] == list(range(10))
    assert (settings["dataset"], settings["quick"]) == ("digits", False)
    assert (settings["longer"], settings["larger"]) == (1, 1)
    assert list(found["experiments"]) == names(lesson)
    for entry in found["experiments"].values():
        for figure in entry["figures"]:
            with Image.open(folder / figure) as image:
                image.load()
        for study in entry["studies"]:
            assert study["coords"]["seed"]["data"] == settings["seeds"]
    assert (folder / "summary.md").read_text(encoding="utf-8") == summary(lesson, folder)
    assert len(found["claims"]) >= 10
    assert found["seconds"] == pytest.approx(sum(entry["seconds"] for entry in found["experiments"].values()), rel=1e-4)


@pytest.mark.parametrize("lesson", LESSONS)
def test_verdicts_follow_from_the_estimates(lesson):
    """Expected is "> 0.5 points" or "> -1 and < 1 points"."""
    for claim in RESULTS[lesson]["claims"]:
        words = claim["expected"].removesuffix(claim["estimate"]["unit"]).replace("and", "").split()
        limits = {">": float("-inf"), "<": float("inf")}
        limits |= dict(zip(words[::2], map(float, words[1::2]), strict=True))
        effect = {name: float("nan") if value is None else value for name, value in claim["estimate"].items()}
        assert claim["verdict"] == judge(effect, limits[">"], limits["<"], claim["seeds"]), claim["statement"]


def dataset(study: dict):
    """A study of results.json as the data set that it was."""
    import xarray as xr

    return xr.Dataset.from_dict({name: study[name] for name in ("coords", "dims", "attrs", "data_vars")})


def test_claims_follow_from_the_stored_runs():
    """What a reader can do with results.json alone: choose, subtract seed by seed, and find the lesson's numbers."""
    found = RESULTS["14_dropout_regularization"]
    claims = {claim["id"]: claim["estimate"] for claim in found["claims"]}

    def same(id: str, effect) -> None:
        expected = [float(value) for value in interval(effect).values()]
        assert [claims[id][name] for name in ("mean", "low", "high", "n")] == pytest.approx(expected, abs=1e-3), id

    (study,) = found["experiments"]["overfitting"]["studies"]
    runs = dataset(study)
    accuracy = runs.test_accuracy.astype(float)
    gain = accuracy - accuracy.sel(technique="no dropout")
    same("overfitting-2", gain.sel(technique="dropout"))
    same("overfitting-3", gain.sel(technique="both") - gain.sel(technique="lower rate"))
    (study,) = found["experiments"]["which_p"]["studies"]
    accuracy = dataset(study).test_accuracy.astype(float).sel(hidden_layers="shallow")
    same("which_p-4", accuracy.sel(p=0.5) - accuracy.sel(p=0.2))
    scores = runs.grid.mean("tuning_seed").sel(technique="both + decay")
    best = scores.argmax(["rate", "decay"])
    for name, place in best.items():
        assert float(runs[f"chosen_{name}"].sel(technique="both + decay")) == float(scores[name][int(place)])


@pytest.mark.parametrize("lesson", LESSONS)
def test_headline_claims_hold(lesson):
    verdict = {claim["statement"]: claim["verdict"] for claim in RESULTS[lesson]["claims"]}
    for statement, expected in HEADLINES[lesson].items():
        assert verdict[statement] == expected, statement
    assert set(verdict.values()) <= {HOLDS, FAILS, UNCLEAR}


def test_readme_says_what_results_say():
    assert readme.fill(README, readme.blocks(RESULTS, FASHION)) == README, "out of date; run: python -m docs.readme"
    assert re.findall(r"<!-- begin: (.+?) -->", README)


def test_a_stale_readme_is_noticed():
    stale = re.sub(r"\+\d\.\d", "+99.9", README, count=1)
    assert readme.fill(stale, readme.blocks(RESULTS, FASHION)) == README


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text: those written, and those of its headings, as GitHub makes them."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    written = set(re.findall(r'<a id="(\w+)"></a>', outside))
    return written | {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("exercises/**/*.md")), *sorted(ROOT.glob("results/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_a_dead_anchor_is_noticed():
    assert anchors("# A title\n## 14 Dropout, again\n```\n# no heading\n```") == {"a-title", "14-dropout-again"}


def test_commands_in_the_readme_name_what_there_is():
    """Every script, module, experiment and option that the README tells the reader to type."""
    for lesson, words in re.findall(r"python (\d\d_\w+)\.py([^`\n&]*)", README):
        parse(lesson, "", [*names(lesson), "mine"], words.partition("#")[0].replace("mine.npz", "digits").split())
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert module in ("pytest", "venv") or (ROOT / f"{module.replace('.', '/')}.py").exists()


def test_the_example_of_an_own_model_runs_in_the_lesson(tmp_path):
    """The README's block, put into a copy of lesson 14 above its last cell, as a reader would."""
    code = README.partition("## Your own model")[2].partition("```python\n")[2].partition("```")[0]
    lesson = (ROOT / "14_dropout_regularization.py").read_text(encoding="utf-8")
    script = tmp_path / "14_dropout_regularization.py"
    script.write_text(lesson.replace("# %%\nif __name__", f"# %%\n{code}\n\n# %%\nif __name__"), encoding="utf-8")
    command = [sys.executable, str(script), "--quick", "--only", "mine", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found = record.read_record(tmp_path / "14_dropout_regularization" / "results.json")
    assert found["experiments"]["mine"]["studies"][0]["coords"]["name"]["data"] == ["lesson", "mine"]


def test_the_checklist_of_the_level_is_whole():
    items = re.findall(r"^- \[ \] \*\*(.+?)\*\*(.*?)(?=^- |\Z|^$)", README, re.MULTILINE | re.DOTALL)
    assert len(items) == 7
    for _, text in items:
        assert "/summary.md#" in text


def test_quick_start_is_two_command_lines():
    section = README.partition("## Quick start")[2]
    block = re.search(r"```\w*\n(.*?)```", section, flags=re.DOTALL)[1]
    first, second = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert first.endswith("python 14_dropout_regularization.py")
    assert second.endswith("python -m pytest")


def test_the_readme_generator_knows_every_experiment():
    made = readme.blocks(RESULTS, FASHION)
    for lesson, found in RESULTS.items():
        for name in found["experiments"]:
            lines = made[f"excerpt {lesson[:2]} {name}"].splitlines()
            assert all(len(line) <= 80 for line in lines)
    with pytest.raises(KeyError):
        readme.fill("<!-- begin: nothing -->\n<!-- end -->", made)


def test_results_hold_nothing_of_this_machines_paths():
    for path in (ROOT / "results").rglob("*.*"):
        if path.suffix in (".md", ".json"):
            assert str(Path.home()) not in path.read_text(encoding="utf-8")
            assert str(ROOT) not in path.read_text(encoding="utf-8")
