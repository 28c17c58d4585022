"""The committed reference runs and the README that quotes them: fresh, complete, and saying what is claimed."""

import re
from pathlib import Path

import pytest
from conftest import LESSONS, ROOT, load_lesson
from PIL import Image

from common import readme, report
from common.statistics import FAILS, HOLDS, UNCLEAR, Estimate, Range, judge

RESULTS = readme.load_results()
FASHION = readme.load_results(dataset=readme.FASHION)

# What the README and the lessons lean on. A new reference run that overturns one of these must be told, not slipped in.
HEADLINES = {
    "14_dropout_regularization": {
        "Add dropout: better generalisation": HOLDS,
        "Dropout narrows the gap of validation to training loss": HOLDS,
        "Evaluating in training mode costs accuracy": HOLDS,
        "Shallow: p from 0.1 to 0.2 beats any other": FAILS,
        "It gains more where labels are wrong (200 digits)": HOLDS,
        "From the lowest validation loss on, test accuracy falls, too (wrong labels)": HOLDS,
    },
    "15_regularization_techniques_detailed": {
        "Train loss ↓ + validation loss ↑ = worse predictions (wrong labels)": HOLDS,
        "Train loss ↓ + validation loss ↑ = worse predictions (right labels)": FAILS,
        "Validation loss ↑, yet accuracy still improves (right, 100, rate 0.03)": HOLDS,
        "Data augmentation helps": HOLDS,
        "Early stopping helps": HOLDS,
        "Small weight decay, 1e-4, a default start: it helps": FAILS,
        "L1 forces weights to zero: at least a tenth of them (proximal step)": HOLDS,
        "L1 forces weights to zero: at least a tenth of them (subgradient step)": FAILS,
        "L1 selects features: less weight on useless inputs than without": HOLDS,
        "It is free: better even with 40 of the 200 digits held out for it (right labels)": FAILS,
        "Mirroring, wrong for digits, costs accuracy (right labels)": HOLDS,
        "Together they need less strength than each alone": HOLDS,
        "Two gains overlap: dropout, augm.": HOLDS,
    },
    "16_batch_normalization": {
        "10 layers fail without it (default start)": HOLDS,
        "10 layers train with it": HOLDS,
        "10 layers: necessary, He's start fails": FAILS,
        "20 layers: necessary, skips fail": FAILS,
        "40 layers train with it": FAILS,
        "40 layers: batch norm is as good as skip connections": FAILS,
        "It can use higher learning rates, by half a decade at least": HOLDS,
        "Less sensitive to the start: more scales work": HOLDS,
        "Fewer steps to 80 % (sigmoid network)": HOLDS,
        "14 times fewer steps (sigmoid network)": FAILS,
        "The bias before batch norm is redundant": HOLDS,
        "eval() forgotten costs accuracy (20 images, sorted by class)": HOLDS,
        "Batches of 2: batch norm is worse than none": HOLDS,
        "With the noise it is as accurate as without it": HOLDS,
        "The gradient changes less along itself (4 × rate)": HOLDS,
        "Smaller groups regularise more: 10 beats 100": HOLDS,
        "In every block (0.5): worse than batch norm alone": HOLDS,
        "In every block (0.2): worse than batch norm alone": FAILS,
        "It is the shift (0.5): recomputed statistics give accuracy back": HOLDS,
    },
    "17_batch_normalization_detailed": {
        "Batch norm fails with small batches: 2 cost more than without (vectors)": HOLDS,
        "Batches of 2: layer norm beats batch norm (vectors)": HOLDS,
        "Group norm for small batches: beats batch norm (2, convolutions)": FAILS,
        "Instance norm removes an image's contrast: nothing lost": HOLDS,
        "Instance norm for style: beats batch norm (contrast changed)": HOLDS,
        "Instance norm throws contrast away: left at chance": HOLDS,
        "Layer norm for sequences: beats batch norm (transformer)": FAILS,
        "Padding spoils batch statistics (mixed batches)": FAILS,
        "In training mode the neighbours' padding costs an image accuracy (sorted; BN, blind)": HOLDS,
        "Too small an eps blows up the test loss: 1e-8 (blank pixels)": HOLDS,
        "Layer norm is slightly slower: by 0 to 50 %": FAILS,
    },
    "18_learning_rate_scheduling": {
        "Scheduling gains 5 to 10 points (the best, warm-up + cosine)": FAILS,
        "Scheduling gains 5 to 10 points (cosine, clean images)": FAILS,
        "A constant rate plateaus (its own)": FAILS,
        "With a schedule it goes on improving (cosine)": HOLDS,
        "Cosine, the default: no worse than the best other (warm-up + cosine)": HOLDS,
        "Cosine beats constant (5 epochs, each its own peak)": FAILS,
        "Cosine beats constant (20 epochs, each its own peak)": HOLDS,
        "Super-convergence: one-cycle in 10 epochs is as good as constant in 100": FAILS,
        "The floor is proportional to the rate: power 1": HOLDS,
        "The floor goes as 1 / batch size: power −1": HOLDS,
        "A tenth of the rate halves the floor at least": HOLDS,
        "Time is short: one-cycle beats the best other (linear)": FAILS,
        "Quick experiments: StepLR is as good as the best": FAILS,
        "Patience too small (0) costs accuracy, against 10": HOLDS,
        "A cosine that comes back up costs accuracy": HOLDS,
        "Start at 0.001 (Adam): as good as the best rate": FAILS,
        "Without warm-up it does not train (Adam, 0.03)": HOLDS,
        "With warm-up it does (Adam, 0.03, 10 steps)": HOLDS,
        "What it allows is better than a smaller rate without it": FAILS,
        "The slip costs accuracy (per batch)": HOLDS,
        "The slip costs accuracy (per epoch)": HOLDS,
        "The slip costs accuracy (plotted first)": HOLDS,
        "The slip costs accuracy (resumed)": FAILS,
    },
    "19_weight_initialization": {
        "nn.Linear's variance is 1/(3 fan-in)": HOLDS,
        "kaiming_uniform_ is its code, so it is He's start for ReLU": FAILS,
        "He keeps ReLU's gradient within a factor of ten": HOLDS,
        "The default already keeps ReLU's gradient within a factor of ten": FAILS,
        "Large weights saturate tanh, so its gradients vanish (unscaled)": FAILS,
        "It trains (He)": HOLDS,
        "Default → already good: it trains": FAILS,
        "At its own rate, too, the network learns nothing: training accuracy under 20 % (× 10)": FAILS,
        "Constant: all neurons learn the same thing": HOLDS,
        "Zeros: the hidden neurons learn, all the same (ReLU: share of weights that move)": FAILS,
        "ReLU → He: beats the best other (LeCun)": HOLDS,
        "GELU → He: beats the best other (LeCun)": HOLDS,
        "tanh → Xavier: beats the best other (He)": FAILS,
        "SELU → LeCun: beats the best other (Xavier)": UNCLEAR,
        "PyTorch's default is already good: no worse than He (ReLU, 20 layers)": FAILS,
        "30 layers: Xavier does not train, in this budget": HOLDS,
        "30 layers: He trains, in this budget": HOLDS,
        "Linear: the time to learn does not grow with depth (orthogonal, 40 layers against 2)": HOLDS,
        "Linear: the time to learn grows with depth (Gaussian, 40 layers against 2)": HOLDS,
        "Orthogonal for RNNs: gradient kept within a factor of ten (tanh)": FAILS,
        "The start matters less: smaller spread (batch norm)": HOLDS,
        "The start matters less: smaller spread (skips, zero)": HOLDS,
        "The start no longer matters: the usual three within 2 points (skips, zero)": HOLDS,
        "The start no longer matters: the usual three within 2 points (Adam)": FAILS,
    },
}


def test_every_lesson_has_its_reference_run():
    assert sorted(RESULTS) == LESSONS
    assert sorted(HEADLINES) == LESSONS


@pytest.mark.parametrize("lesson", LESSONS)
def test_results_come_from_the_code_as_it_stands(lesson):
    fresh = f"results/{lesson} is older than the code; run: python {lesson}.py --out results"
    assert RESULTS[lesson]["environment"]["source"] == report.source_hash(lesson), fresh
    again = f"python {lesson}.py --dataset fashion-mnist --out results/fashion-mnist"
    assert FASHION[lesson]["environment"]["source"] == report.source_hash(lesson), again


@pytest.mark.parametrize("lesson", LESSONS)
def test_fashion_mnist_is_a_whole_run_of_the_same_claims(lesson):
    record, digits = FASHION[lesson], RESULTS[lesson]
    assert record["settings"]["dataset"] == readme.FASHION
    assert not record["settings"]["quick"]
    assert len(record["settings"]["seeds"]) >= 3
    assert list(record["experiments"]) == list(digits["experiments"])
    ids = [[claim["id"] for claim in each["claims"]] for each in (record, digits)]
    assert ids[0] == ids[1]
    folder = ROOT / "results" / readme.FASHION / lesson
    assert (folder / "summary.md").read_text(encoding="utf-8") == report.summary_markdown(record)
    for entry in record["experiments"].values():
        assert all((folder / figure).exists() for figure in entry["figures"])


def test_verdicts_that_differ_are_told_claim_by_claim():
    def claim(id: str, verdict: str, mean: float, statement: str = "") -> dict:
        estimate = {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 10, "unit": "points"}
        words = {"id": id, "statement": statement or f"claim {id}", "expected": "> 0 points", "seeds": 10}
        return words | {"estimate": estimate, "verdict": verdict}

    digits = {"title": "A lesson", "claims": [claim("a-1", HOLDS, 5), claim("a-2", UNCLEAR, 0), claim("b-1", HOLDS, 3)]}
    fashion = {"claims": [claim("a-1", HOLDS, 4), claim("a-2", FAILS, -2), claim("b-1", FAILS, -3, "claim b-1 (B)")]}
    lines = readme.differences(digits, fashion).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(
        "| claim b-1; on Fashion-MNIST: claim b-1 (B) | > 0 points | +3.0 [+2.0, +4.0] points: holds"
    )
    assert lines[3].startswith("| claim a-2 |")
    assert lines[3].endswith("-2.0 [-3.0, -1.0] points: does not hold here |")
    assert readme.differences(digits, digits) == "Every verdict is the same."
    table = readme.agreement({"x": digits}, {"x": fashion}).splitlines()
    assert table[-2:] == ["| A lesson | 3 | 1 | 1 | 1 |", "| all | 3 | 1 | 1 | 1 |"]


@pytest.mark.parametrize("lesson", LESSONS)
def test_results_are_a_whole_default_run(lesson):
    record, folder = RESULTS[lesson], ROOT / "results" / lesson
    settings = record["settings"]
    assert settings["seeds"] == list(range(10))
    assert (settings["dataset"], settings["quick"]) == ("digits", False)
    names = [experiment.__name__ for experiment in load_lesson(lesson).EXPERIMENTS]
    assert list(record["experiments"]) == names
    for entry in record["experiments"].values():
        for figure in entry["figures"]:
            with Image.open(folder / figure) as image:
                image.load()
        for arm in entry.get("arms", {}).values():
            assert [run["seed"] for run in arm["runs"]] == settings["seeds"]
    assert (folder / "summary.md").read_text(encoding="utf-8") == report.summary_markdown(record)
    assert len(record["claims"]) >= 10
    assert record["seconds"] == pytest.approx(
        sum(entry["seconds"] for entry in record["experiments"].values()), rel=1e-4
    )


@pytest.mark.parametrize("lesson", LESSONS)
def test_verdicts_follow_from_the_estimates(lesson):
    for claim in RESULTS[lesson]["claims"]:
        words = claim["expected"].removesuffix(claim["estimate"]["unit"]).split()
        if words[0] in "<>":
            limit = float(words[1])
            expected = Range(limit, float("inf")) if words[0] == ">" else Range(float("-inf"), limit)
        else:
            expected = Range(float(words[0]), float(words[2]))
        effect = Estimate(*(claim["estimate"][name] for name in Estimate._fields))
        assert claim["verdict"] == judge(effect, expected, claim["seeds"]), claim["statement"]


@pytest.mark.parametrize("lesson", LESSONS)
def test_paired_differences_follow_from_the_runs(lesson):
    from common.statistics import paired_difference

    for entry in RESULTS[lesson]["experiments"].values():
        for arm in entry.get("arms", {}).values():
            other = entry["arms"][arm["baseline"]]
            values = [[run["test"]["accuracy"] for run in each["runs"]] for each in (arm, other)]
            if None not in values[0] + values[1]:
                found = arm["difference"]["test_accuracy"]
                expected = paired_difference(*values)
                assert [found[name] for name in Estimate._fields] == pytest.approx(list(expected), abs=1e-5)


@pytest.mark.parametrize("lesson", LESSONS)
def test_headline_claims_hold(lesson):
    verdict = {claim["statement"]: claim["verdict"] for claim in RESULTS[lesson]["claims"]}
    for statement, expected in HEADLINES[lesson].items():
        assert verdict[statement] == expected, statement
    assert set(verdict.values()) <= {HOLDS, FAILS, UNCLEAR}


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_exercise_has_its_answer(lesson):
    text = (ROOT / f"{lesson}.py").read_text(encoding="utf-8")
    exercises = re.findall(r"^# (\d)\. ", text.partition("# ## Exercises")[2], flags=re.MULTILINE)
    answers = (ROOT / "results" / lesson / "answers.md").read_text(encoding="utf-8")
    assert 3 <= len(exercises) <= 5
    assert re.findall(r"<summary>(\d)\. ", answers) == exercises


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = readme.blocks(RESULTS, FASHION)


def test_readme_says_what_results_say():
    assert readme.fill(README, BLOCKS) == README, "out of date; run: python -m common.readme"
    assert re.findall(r"<!-- begin: (.+?) -->", README)


def test_a_stale_readme_is_noticed():
    stale = re.sub(r"\+\d\.\d", "+99.9", README, count=1)
    assert readme.fill(stale, BLOCKS) == README


def test_readme_links_lead_somewhere():
    for text, base in [(README, ROOT)] + [
        (path.read_text(encoding="utf-8"), path.parent) for path in ROOT.glob("results/*/*.md")
    ]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (base / target).exists(), target


def test_readme_anchors_exist():
    heads = {
        re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-")
        for head in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in heads, anchor


def test_quick_start_is_two_command_lines():
    section = README.partition("## Quick start")[2]
    block = re.search(r"```\w*\n(.*?)```", section, flags=re.DOTALL)[1]
    first, second = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert first.endswith("python 14_dropout_regularization.py")
    assert second.endswith("python -m pytest")


def test_the_readme_generator_knows_every_experiment():
    made = BLOCKS
    for lesson, record in RESULTS.items():
        for name in record["experiments"]:
            lines = made[f"excerpt {lesson[:2]} {name}"].splitlines()
            assert all(len(line) <= 80 for line in lines)
    with pytest.raises(KeyError):
        readme.fill("<!-- begin: nothing -->\n<!-- end -->", made)


def test_results_hold_nothing_of_this_machines_paths():
    for path in (ROOT / "results").rglob("*.*"):
        if path.suffix in (".md", ".json"):
            assert str(Path.home()) not in path.read_text(encoding="utf-8")
            assert str(ROOT) not in path.read_text(encoding="utf-8")
