"""The laboratory a lesson works in: it runs comparisons, prints and keeps what came out, and files it."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule

from common.first import report
from common.first.data import LessonError
from common.first.experiment import AllDivergedError, Comparison, Tuning, compare, tuning_seeds, what_varies
from common.first.statistics import NOT_JUDGED, Claim, Estimate, Range, judge
from common.first.training import Recipe

QUICK_EPOCHS = 1
TUNING_SEEDS = 4


class Larger(NamedTuple):
    """What a lesson changes on every data set but the digits: so many times as many training examples, so many times as
    many epochs, and how many seeds a run has by default.
    """

    examples: int = 1
    epochs: int = 1
    seeds: int = 10


@dataclass(frozen=True)
class Settings:
    """What the command line decided. `out` is the lesson's own folder; `larger` is all ones for the digits."""

    lesson: str
    title: str
    dataset: str
    seeds: list[int]
    device: str
    jobs: int
    quick: bool
    out: Path
    larger: Larger

    def same_numbers(self) -> dict[str, Any]:
        """The settings that decide the numbers, as results.json holds them."""
        return {"dataset": self.dataset, "seeds": self.seeds, "device": self.device, "quick": self.quick}


def processor() -> str:
    """The processor's name, as well as the platform tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def environment(settings: Settings) -> dict[str, str]:
    """Versions, machine, and the hash of the code that decides the numbers."""
    cuda = settings.device.startswith("cuda")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "device_name": torch.cuda.get_device_name(settings.device) if cuda else settings.device,
        "source": report.source_hash(settings.lesson),
    }


def earlier_record(path: Path) -> dict[str, Any]:
    """The record an earlier run left, or an empty one if there is none or it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"settings", "environment", "experiments", "claims"} <= record.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


class Lab:
    """Hands a lesson its tools, prints what comes out, and keeps the record of every finished experiment."""

    def __init__(self, settings: Settings, order: Sequence[str], console: Console, executor: Executor) -> None:
        self.settings, self.order, self.console, self.executor = settings, order, console, executor
        self.quick = settings.quick
        self.record = {
            "lesson": settings.lesson,
            "title": settings.title,
            "settings": settings.same_numbers() | {"jobs": settings.jobs},
            "seconds": 0.0,
            "environment": environment(settings),
            "experiments": {},
            "claims": [],
        }
        self.set_aside = not self.continues(earlier_record(settings.out / "results.json"))
        self.name = ""
        self.entry: dict[str, Any] = {}
        self.claims: list[Claim] = []

    def continues(self, earlier: dict[str, Any]) -> bool:
        """Take up an earlier record of the same settings and source, so that `--only` renews one experiment and keeps
        the others. Otherwise the first file written sets the earlier run aside. In a notebook it always does: a cell
        may say something else than the script that was hashed.
        """
        same = bool(earlier) and earlier["environment"] == self.record["environment"] and not in_notebook()
        if not same or not self.settings.same_numbers().items() <= earlier["settings"].items():
            return False
        self.record |= {"experiments": earlier["experiments"], "claims": earlier["claims"]}
        return True

    def folder(self) -> Path:
        """The lesson's folder, ready to be written to."""
        out = self.settings.out
        if self.set_aside and (out / "results.json").exists():
            count = len(list(out.glob("previous-*")))
            previous = out / f"previous-{count + 1}"
            previous.mkdir()
            for name in ("results.json", "summary.md", "*.png"):
                for path in out.glob(name):
                    path.rename(previous / path.name)
        self.set_aside = False
        return out

    def run(self, experiment: Callable[["Lab"], None]) -> None:
        """Carry out one experiment: its question is the first paragraph of its docstring. File it when it is done."""
        start = time.perf_counter()
        self.name, self.claims = experiment.__name__, []
        question = question_of(experiment)
        self.entry = {"question": question, "varies": [], "baseline": None, "figures": [], "findings": [], "table": []}
        self.console.print(Rule(f"{self.order.index(self.name) + 1} of {len(self.order)}: {self.name}", align="left"))
        self.console.print(question, markup=False, highlight=False)
        try:
            experiment(self)
        except AllDivergedError as error:
            self.finding(f"The experiment ends here: {error}.")
        if self.claims:
            report.print_table(self.console, report.claims_table([report.claim_json(claim) for claim in self.claims]))
        self.entry["seconds"] = time.perf_counter() - start
        self.save()

    def save(self) -> None:
        """Write results.json and summary.md with everything finished so far."""
        experiments = self.record["experiments"] | {self.name: self.entry}
        others = [claim for claim in self.record["claims"] if claim["experiment"] != self.name]
        claims = others + [report.claim_json(claim) for claim in self.claims]
        self.record["experiments"] = {name: experiments[name] for name in self.order if name in experiments}
        self.record["claims"] = sorted(claims, key=lambda claim: self.order.index(claim["experiment"]))
        self.record["seconds"] = sum(entry["seconds"] for entry in self.record["experiments"].values())
        folder = self.folder()
        summary = report.summary_markdown(report.write_json(folder / "results.json", self.record))
        report.write_whole(folder / "summary.md", lambda aside: aside.write_text(summary, encoding="utf-8"))

    def compare(
        self,
        arms: dict[str, Recipe],
        baseline: str | dict[str, str],
        inspect: Callable[..., dict[str, Any]] | None = None,
    ) -> Comparison:
        """Train every arm on every seed; print what varies, what is held, and the two tables of losses."""
        arms = self.sized(arms)
        varies, held = what_varies(list(arms.values()))
        self.console.print(f"\nvaries: {', '.join(varies) or 'nothing'}", markup=False, highlight=False)
        same = ", ".join(f"{name}={value}" for name, value in held.items() if value != "None")
        self.console.print(f"held:   {same}", markup=False, highlight=False, style="dim")
        runs = self.train(arms, baseline, self.settings.seeds, inspect)
        self.table(report.loss_table(runs))
        self.table(report.summary_table(runs))
        for line in report.diverged_lines(runs):
            self.finding(line)
        if known := self.entry.get("arms", {}).keys() & arms.keys():
            raise LessonError(f"two comparisons of one experiment share the arm {', '.join(known)}")
        self.entry["varies"] += [name for name in varies if name not in self.entry["varies"]]
        self.entry["baseline"] = self.entry["baseline"] or next(iter(runs.baseline.values()))
        self.entry.setdefault("arms", {}).update(report.arms_json(runs))
        return runs

    def tune(
        self,
        name: str,
        grids: dict[str, dict[float, Recipe]],
        metric: str = "validation_accuracy",
        count: int = TUNING_SEEDS,
    ) -> Tuning:
        """Train each row's candidates on `count` seeds that are not reported, print the grid of mean scores, mark the
        best.

        name: what the candidates differ in, for the table's title. metric: what chooses, on validation (see Run.value).
        """
        recipes = {(row, key): recipe for row, grid in grids.items() for key, recipe in grid.items()}
        arms = {f"{row}, {key}": replace(recipe, evaluations=1) for (row, key), recipe in recipes.items()}
        seeds = tuning_seeds(self.settings.seeds, 1 if self.quick else count)
        runs = self.train(self.sized(arms), next(iter(arms)), seeds)
        scores = {row: {key: runs.values(metric, f"{row}, {key}") for key in grid} for row, grid in grids.items()}
        tuning = Tuning(metric, scores)
        self.table(report.tuning_table(name, tuning, seeds))
        return tuning

    def sized(self, arms: dict[str, Recipe]) -> dict[str, Recipe]:
        """The arms as they are trained: cut to an epoch in a quick run, as large as the lesson says on a larger set."""
        if self.quick:
            return {arm: replace(recipe, epochs=min(recipe.epochs, QUICK_EPOCHS)) for arm, recipe in arms.items()}
        larger = self.settings.larger
        return {
            arm: replace(
                recipe,
                examples=recipe.examples and larger.examples * recipe.examples,
                epochs=larger.epochs * recipe.epochs,
            )
            for arm, recipe in arms.items()
        }

    def train(
        self,
        arms: dict[str, Recipe],
        baseline: str | dict[str, str],
        seeds: Sequence[int],
        inspect: Callable[..., dict[str, Any]] | None = None,
    ) -> Comparison:
        """Train every arm on every seed behind a progress bar."""
        settings = self.settings
        with progress() as bar:
            task = bar.add_task(self.name, total=len(arms) * len(seeds))

            def advance(_: Future) -> None:
                bar.advance(task)

            return compare(arms, baseline, seeds, self.executor, settings.dataset, settings.device, inspect, advance)

    def table(self, table: report.Table) -> None:
        """Print a table and keep it."""
        report.print_table(self.console, table)
        self.entry["table"].append({"title": table.title, "columns": table.columns, "rows": table.rows})

    def finding(self, sentence: str) -> None:
        """Print a sentence computed from the numbers, and keep it."""
        self.console.print(f"• {sentence}", markup=False, highlight=False)
        self.entry["findings"].append(sentence)

    def figure(self, name: str, figure: Figure) -> None:
        """Save the figure as `name`.png; in a notebook, show it too."""
        path = self.folder() / f"{name}.png"
        report.write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
        self.entry["figures"].append(path.name)
        self.console.print(f"figure: {path}", markup=False, highlight=False, soft_wrap=True)
        if in_notebook():
            from IPython.display import Image, display

            display(Image(path))

    def claim(self, statement: str, source: str, effect: Estimate, expected: Range, unit: str = "points") -> None:
        """Judge a rule of thumb by a measured effect; the verdict is printed at the end of the experiment.

        A quick run, too short to learn anything, judges nothing; nor do the runs that survive where others diverged.
        """
        seeds = len(self.settings.seeds)
        verdict = NOT_JUDGED if self.quick else judge(effect, expected, seeds)
        id = f"{self.name}-{len(self.claims) + 1}"
        self.claims.append(Claim(id, statement, source, self.name, expected, effect, unit, seeds, verdict))

    def close(self) -> None:
        """What we saw: every claim of the lesson by its verdict, and where the files are."""
        self.console.print(Rule("What we saw", align="left"))
        for line in report.verdict_lines(report.plain(self.record["claims"])):
            self.console.print(line, markup=False, highlight=False)
        seconds = self.record["seconds"]
        self.console.print(f"\n{seconds:.0f} s after start-up; tables and numbers: ", end="")
        self.console.print(f"{self.settings.out / 'summary.md'}", markup=False, highlight=False, soft_wrap=True)


def question_of(experiment: Callable[[Lab], None]) -> str:
    """The first paragraph of an experiment's docstring, on one line."""
    return " ".join((experiment.__doc__ or "").split("\n\n")[0].split())


def progress() -> Progress:
    """A bar with the time left, on stderr; nothing when that is not a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = sys.stderr.isatty()
    return Progress(*columns, console=Console(stderr=True, quiet=not shown), transient=True, disable=not shown)


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    return "ipykernel" in sys.modules
