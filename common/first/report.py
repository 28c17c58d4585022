"""Tables in the terminal and in Markdown, and the files of a run, written whole or not at all."""

import ast
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from common.first.experiment import Comparison, Tuning
from common.first.statistics import FAILS, HOLDS, NOT_JUDGED, UNCLEAR, Claim, Estimate

ROOT = Path(__file__).resolve().parents[2]
DECIDES_NUMBERS = ["first/data", "first/training", "first/experiment", "first/statistics"]


class Table(NamedTuple):
    """A table as plain data: the first column names the row; `breaks` holds the rows before which a line is drawn."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    breaks: frozenset[int] = frozenset()


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimals, in scientific notation where those would hide it; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    huge_or_tiny = value != 0 and not 10**-digits <= abs(value) < 1e4
    return f"{value:.1e}" if huge_or_tiny else f"{value:.{digits}f}"


def loss(value: float) -> str:
    """A loss, or seconds, with two decimals; what is too small for them as <0.01, what is too large as 3e+08, so that
    columns stay narrow.
    """
    if value >= 1e4 and math.isfinite(value):
        return f"{value:.0e}"
    return "<0.01" if 0 < value < 0.01 else number(value, 2)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, in scientific notation where it is huge; a dash where there is none."""
    if abs(value) >= 1e6 and math.isfinite(value):
        return f"{value:+.0e}"
    return f"{value:+.{digits}f}" if math.isfinite(value) else "–"


def candidate_name(candidate: float) -> str:
    """A candidate of a grid, short enough for the head of a column: 0.003, 10, 3e-4."""
    if 0 < candidate < 0.001:
        return np.format_float_scientific(candidate, trim="-", exp_digits=1)
    return f"{candidate:g}"


def interval(effect: Estimate, digits: int = 1) -> str:
    """A signed mean with its interval: +5.2 [+4.1, +6.3]."""
    if not math.isfinite(effect.low):
        return signed(effect.mean, digits)
    return f"{effect.mean:+.{digits}f} [{effect.low:+.{digits}f}, {effect.high:+.{digits}f}]"


def group_breaks(runs: Comparison) -> frozenset[int]:
    """The rows at which a new baseline begins, where the arms are compared in groups."""
    baselines = list(runs.baseline.values())
    return frozenset(i for i in range(1, len(baselines)) if baselines[i] != baselines[i - 1])


def loss_table(runs: Comparison, columns: int = 5) -> Table:
    """Mean loss over training, "train/validation", one row for each arm.

    The columns are epochs; where the arms train for different numbers of them, shares of each arm's training.
    """
    same = len({recipe.epochs for recipe in runs.arms.values()}) == 1
    longest = max((runs.epochs(arm) for arm in runs.arms), key=len)
    if same:
        picked = sorted({round(i * (len(longest) - 1) / (columns - 1)) for i in range(columns)}) if longest else []
        shown = [longest[i] for i in picked]
        heads = [f"epoch\n{epoch}" for epoch in shown]
    else:
        heads = [f"{100 * i / (columns - 1):.0f} % of\ntraining" for i in range(columns)]
    rows = []
    for arm, recipe in runs.arms.items():
        epochs = runs.epochs(arm)
        wanted = shown if same else [i / (columns - 1) * recipe.epochs for i in range(columns)]
        nearest = [min(range(len(epochs)), key=lambda i: abs(epochs[i] - each), default=0) for each in wanted]
        tolerance = 0 if same else recipe.epochs / (columns - 1) / 2
        rows.append([arm, *(loss_cell(runs, arm, i, each, tolerance) for i, each in zip(nearest, wanted, strict=True))])
    seen = [i for i in range(len(heads)) if any(row[i + 1] != "–/–" for row in rows)]  # columns that any arm has
    rows = [[row[0], *(row[i + 1] for i in seen)] for row in rows]
    heads = ["arm", *(heads[i] for i in seen)]
    return Table("Loss by epoch: train/validation (means over seeds)", heads, rows, group_breaks(runs))


def loss_cell(runs: Comparison, arm: str, i: int, epoch: float, tolerance: float) -> str:
    """Mean "train/validation" loss of the arm at its i-th measurement; dashes if that is not at about this epoch."""
    epochs = runs.epochs(arm)
    if i >= len(epochs) or abs(epochs[i] - epoch) > tolerance:
        return "–/–"
    train, validation = (runs.history(f"{part}_loss", arm) for part in ("train", "validation"))
    return f"{loss(column_mean(train, i))}/{loss(column_mean(validation, i))}"


def column_mean(values: Any, column: int) -> float:
    """Mean of one column of (seeds, measurements) over the runs that got so far; NaN if none did."""
    kept = [value for value in values[:, column : column + 1].ravel() if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def summary_table(runs: Comparison) -> Table:
    """Final metrics of each arm, its paired difference to its baseline, and how many of its runs did not diverge."""
    rows = []
    for arm in runs.arms:
        mean = {name: runs.estimate(name, arm).mean for name in ("train_loss", "validation_loss", "gap", "seconds")}
        accuracy = runs.estimate("test_accuracy", arm).scaled(100)
        is_baseline = runs.baseline[arm] == arm
        difference = "baseline" if is_baseline else interval(runs.difference("test_accuracy", arm).scaled(100))
        row = [loss(mean["train_loss"]), loss(mean["validation_loss"]), signed(mean["gap"])]
        lost = sum(run.diverged_at is not None for run in runs.runs[arm])
        rows.append([arm, *row, number(accuracy.mean, 1), difference, str(lost), loss(mean["seconds"])])
    columns = [
        "arm",
        "train\nloss",
        "val.\nloss",
        "gap",
        "test\nacc. %",
        "test acc. against\nbaseline, points",
        "div.",
        "s",
    ]
    return Table("After the last epoch (means over seeds, 95 % intervals)", columns, rows, group_breaks(runs))


def tuning_table(name: str, tuning: Tuning, seeds: Sequence[int]) -> Table:
    """The grid that a setting was chosen from: mean score of each candidate, the best of each row marked by a star.

    Rows that share their candidates share columns; otherwise each cell names its own candidate.
    """
    grids = {row: list(candidates) for row, candidates in tuning.scores.items()}
    shared = next(iter(grids.values()))
    same = all(candidates == shared for candidates in grids.values())
    unit, digits = (100, 1) if tuning.metric.endswith("accuracy") else (1, 3)

    def cell(row: str, candidate: float) -> str:
        star = "*" if candidate == tuning.best(row) else ""
        score = number(unit * tuning.mean(row, candidate), digits) + star
        return score if same else f"{candidate:g}: {score}"

    longest = max(map(len, grids.values()))
    heads = [candidate_name(candidate) for candidate in shared] if same else [""] * longest
    rows = [[row, *(cell(row, each) for each in grid), *[""] * (longest - len(grid))] for row, grid in grids.items()]
    metric = tuning.metric.replace("_", " ") + (" in %" if unit == 100 else "")
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return Table(f"{name}, chosen (*) by {metric}, {which}", ["arm", *heads], rows)


def diverged_lines(runs: Comparison) -> list[str]:
    """For each arm that lost runs: how many, and at which steps."""
    lines = []
    for arm, row in runs.runs.items():
        steps = [run.diverged_at for run in row if run.diverged_at is not None]
        if steps:
            where = f"step {steps[0]}" if min(steps) == max(steps) else f"steps {min(steps)} to {max(steps)}"
            lines.append(f"{arm}: {len(steps)} of {len(row)} runs diverged at {where}")
    return lines


def claim_json(claim: Claim) -> dict[str, Any]:
    """A claim as results.json holds it."""
    values = {name: getattr(claim, name) for name in ("id", "statement", "source", "experiment")}
    values |= {"expected": f"{claim.expected} {claim.unit}".strip()}
    values |= {"estimate": claim.effect._asdict() | {"unit": claim.unit}, "seeds": claim.seeds}
    return values | {"verdict": claim.verdict}


def measured(claim: dict[str, Any]) -> str:
    """A claim's effect with its interval and unit."""
    effect = {name: claim["estimate"][name] for name in Estimate._fields}
    effect = Estimate(**{name: math.nan if value is None else value for name, value in effect.items()})
    lost = "" if claim["seeds"] == effect.n else f" ({effect.n} of {claim['seeds']} seeds)"
    coarse = abs(effect.mean) >= 10 or claim["estimate"]["unit"] in ("points", "epochs", "%")
    return f"{interval(effect, 1 if coarse else 3)} {claim['estimate']['unit']}".strip() + lost


def claims_table(claims: Sequence[dict[str, Any]]) -> Table:
    """Each claim with its source, the measured effect and its interval, and the verdict."""
    rows = [
        [
            f"{claim['statement']} ({claim['source']})",
            f"{measured(claim)}; expected {claim['expected']}",
            claim["verdict"],
        ]
        for claim in claims
    ]
    return Table("Rules of thumb, judged by this run", ["claim", "measured", "verdict"], rows)


def verdict_lines(claims: Sequence[dict[str, Any]]) -> list[str]:
    """The claims in words, those that hold first."""
    lines = []
    for verdict in (HOLDS, FAILS, UNCLEAR, NOT_JUDGED):
        chosen = [claim for claim in claims if claim["verdict"] == verdict]
        if chosen:
            lines.append(f"\n{verdict} ({len(chosen)} of {len(claims)}):")
            lines += [f"  {claim['statement']}: {measured(claim)}" for claim in chosen]
    return lines


def print_table(console: Console, table: Table) -> None:
    """Print the table so that it stays readable at 80 columns: words wrap, numbers never do."""
    words = table.columns[0] == "claim"
    rich_table = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    rich_table.pad_edge, rich_table.padding = False, (0, 1, 0, 0)
    for i, name in enumerate(table.columns):
        rich_table.add_column(name, justify="left" if i == 0 or words else "right", no_wrap=not words and i > 0)
    for i, row in enumerate(table.rows, start=1):
        rich_table.add_row(*row, end_section=i in table.breaks or (words and i < len(table.rows)))
    console.print()
    console.print(rich_table, markup=False)
    console.print()


def markdown(table: Table) -> str:
    """The same table in Markdown."""
    heads = [name.replace("\n", " ") for name in table.columns]
    lines = [f"**{table.title}**", "", "| " + " | ".join(heads) + " |"]
    lines.append("| :-- |" + (" :-- |" if table.columns[0] == "claim" else " --: |") * (len(table.columns) - 1))
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)


def summary_markdown(record: dict[str, Any]) -> str:
    """A whole results.json as Markdown: the tables, findings, figures and verdicts that the terminal showed."""
    settings = record["settings"]
    count = f"{len(settings['seeds'])} seeds from {settings['seeds'][0]}"
    quick = "; a quick run, which judges nothing" if settings["quick"] else ""
    parts = [f"# {record['title']}", f"Data set {settings['dataset']}, {count}, {settings['device']}{quick}."]
    for name, entry in record["experiments"].items():
        tables = [Table(each["title"], each["columns"], each["rows"]) for each in entry["table"]]
        parts += [f"## {name}", entry["question"], *map(markdown, tables)]
        parts += ["\n".join(f"- {finding}" for finding in entry["findings"])]
        parts += [f"![{name}]({figure})" for figure in entry["figures"]]
        claims = [claim for claim in record["claims"] if claim["experiment"] == name]
        parts += [markdown(claims_table(claims))] if claims else []
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(value: Any) -> Any:
    """A value as strict JSON holds it: NaN and infinity become null, arrays lists, numbers seven digits."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def arms_json(runs: Comparison) -> dict[str, Any]:
    """The arms of a comparison as results.json holds them."""
    metrics = ["train_loss", "validation_loss", "gap", "train_accuracy", "validation_accuracy", "test_accuracy"]
    metrics += ["test_loss", "best_epoch", "best_test_accuracy"]

    def parts(values: dict[str, float]) -> dict[str, dict[str, float]]:
        pairs = {part: (f"{part}_loss", f"{part}_accuracy") for part in ("train", "validation", "test")}
        return {
            part: {"loss": values.get(a, math.nan), "accuracy": values.get(b, math.nan)}
            for part, (a, b) in pairs.items()
        }

    return {
        arm: {
            "baseline": runs.baseline[arm],
            "runs": [
                {"seed": run.seed, "seconds": run.seconds, "diverged_at": run.diverged_at}
                | parts(run.final)
                | {"best": {"epoch": run.best.get("epoch", math.nan), **parts(run.best)}, "history": run.history}
                for run in runs.runs[arm]
            ],
            "summary": {metric: runs.estimate(metric, arm)._asdict() for metric in metrics},
            "difference": {metric: runs.difference(metric, arm)._asdict() for metric in metrics},
        }
        for arm in runs.arms
    }


def syntax(node: Any) -> Any:
    """A syntax tree as nested lists, the same in every version of Python: no positions, no docstrings, no empties."""
    if isinstance(node, list):
        return [syntax(item) for item in node if not is_text(item)]
    if isinstance(node, ast.AST):
        pairs = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *([name, syntax(value)] for name, value in pairs)]
    return repr(node)


def is_text(node: Any) -> bool:
    """Whether a statement is a bare string: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def source_hash(lesson: str) -> str:
    """sha256 over the code that decides the lesson's numbers: comments, docstrings and plotting's looks leave it be.

    The move of these modules to common/first leaves it be, too.
    """
    files = [ROOT / f"{lesson}.py", *(ROOT / "common" / f"{name}.py" for name in DECIDES_NUMBERS)]
    texts = [file.read_text(encoding="utf-8").replace("common.first.", "common.") for file in files]
    texts = [text.replace(".parents[2]", ".parent.parent") for text in texts]
    trees = [syntax(ast.parse(text)) for text in texts]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: nobody ever sees half of it."""
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> Any:
    """Write strict JSON, whole or not at all; returns the value as it was written."""
    written = plain(value)
    text = json.dumps(written, allow_nan=False, ensure_ascii=False)
    write_whole(path, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
    return written
