"""The laboratory that a lesson works in: it runs studies, prints and keeps what came out, and files it.

What only reports (xarray, matplotlib) is imported when the Lab is made: the workers are forked by then.
"""

import argparse
import math
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from common.data import LessonError, load
from common.training import STACK, Inspect, Recipe, Results, fit

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Values = tuple | Mapping[Any, Any]  # of a factor: the values themselves, or label → value
TUNING_SEEDS = 3


class Lab:
    """Hands a lesson its tools, prints what comes out, and keeps the record of every finished experiment."""

    executor: Executor
    order: list[str]  # the names of the lesson's experiments

    def __init__(self, name: str, title: str, script: Path | None, options: argparse.Namespace) -> None:
        from common import plotting, report, statistics
        from docs import record

        self.plotting, self.report, self.statistics, self.files = plotting, report, statistics, record
        self.options, self.script = options, script
        self.record = record.begin(name, title, script, options)

    def say(self, text: str) -> None:
        """Print text, a single line wrapped by words, and keep it."""
        text = text if "\n" in text else fill(text, 80, subsequent_indent="  ")
        self.entry["printed"] += f"{text}\n"
        print(text)

    def run(self, experiment: Callable[["Lab"], None]) -> None:
        """Carry out one experiment: its question is the first paragraph of its docstring. File it when it is done."""
        start, self.name, self.claims = time.perf_counter(), experiment.__name__, []
        self.entry = {"question": question_of(experiment), "printed": "", "varies": [], "figures": [], "studies": []}
        print(f"\n{self.order.index(self.name) + 1} of {len(self.order)}: {self.name} ".ljust(80, "-"))
        print(fill(self.entry["question"], 80))
        experiment(self)
        print()
        for i, claim in enumerate(self.claims, 1):
            told = f"{i}. {claim['statement']} ({claim['source']})"
            print(fill(told, 80, initial_indent=claim["verdict"].ljust(15), subsequent_indent=" " * 15))
            print(f"{'':15}{self.report.measured(claim)}; expected {claim['expected']}")
        self.entry["seconds"] = time.perf_counter() - start
        self.files.add(self.record, self.name, self.entry, self.claims, self.order)
        self.files.write_record(self.options.out, self.record, self.script)

    def study(
        self,
        recipe: Callable[..., Recipe],
        *,
        tune: dict[str, Values] | None = None,
        inspect: Inspect | None = None,
        **factors: Values,
    ) -> "xr.Dataset":
        """Train `recipe(**setting)` for every combination of the factors on every seed.

        A factor is a tuple of values, or a dictionary label → value. tune: nuisance settings; for each combination of
        the factors the candidate is taken that has the best mean validation accuracy at the end of training, on seeds
        that are not reported (one that lost a run comes last, of equals the first wins). inspect: see `fit`.

        Returns every result of `common.training.fit` as an array of factors × seed × its own dimensions, NaN where a
        run diverged. With `tune` also each choice as `chosen_…` by factors (NaN where it makes no difference), and the
        `grid` of scores by factors × candidates × tuning_seed. Raises LessonError when factors and recipe do not fit.
        """
        tune, name = tune or {}, getattr(recipe, "__name__", "recipe")
        levels = {name: labelled(name, values) for name, values in {**factors, **tune}.items()}
        try:
            signature(recipe).bind(**levels)
        except TypeError as error:
            raise LessonError(f"the factors do not fit the recipe {name}: {error}") from None
        settings = product(*(each.values() for each in levels.values()))
        recipes = [self.sized(recipe(**dict(zip(levels, values, strict=True)))) for values in settings]
        varies, held = what_varies(recipes)
        recipes, chosen = self.choose(recipes, levels, list(tune)) if tune else (recipes, {})
        own = {name: levels[name] for name in factors}
        runs = self.statistics.assemble(own, self.train(recipes, self.options.seeds, inspect)).assign(chosen)

        self.entry["studies"].append({"recipe": name, "held": held, **runs.to_dict()})
        self.entry["varies"] += [each for each in varies if each not in self.entry["varies"]]
        self.say(f"varies: {', '.join(varies) or 'nothing'}")
        for line in self.report.choice_lines(runs, list(tune)):
            self.say(line)
        if self.options.verbose:
            print(self.files.all_numbers(self.entry["studies"][-1]))
        if inspect and bool(runs.diverged_at.notnull().all()):
            raise LessonError(f"{self.name}: every run diverged, so there is no trained network to look at")
        return runs

    def choose(
        self, recipes: list[Recipe], levels: dict[str, dict[Any, Any]], tuned: list[str]
    ) -> tuple[list[Recipe], dict[str, "xr.DataArray"]]:
        """The best recipe for each combination of the factors, and what was chosen, as `study` returns it."""
        first = max(1_000_000, max(self.options.seeds) + 1)
        seeds = range(first, first + (1 if self.options.quick else TUNING_SEEDS))
        brief = self.train([replace(each, evaluations=1) for each in recipes], seeds)
        grid = self.statistics.assemble(levels, brief).validation_accuracy.rename(seed="tuning_seed")
        best = grid.mean("tuning_seed", skipna=False).fillna(-np.inf).argmax(tuned)
        places = grid[..., 0].copy(data=np.arange(len(recipes)).reshape(grid.shape[:-1])).isel(best)
        chosen = {"grid": grid}
        for name in tuned:
            matters = (grid.fillna(-1) != grid.isel({name: 0}, drop=True).fillna(-1)).any([*tuned, "tuning_seed"])
            chosen[f"chosen_{name}"] = grid[name].isel({name: best[name]}).drop_vars(name).where(matters)
        return [recipes[i] for i in places.values.ravel()], chosen

    def sized(self, recipe: Recipe) -> Recipe:
        """The recipe as long and as large as the command line says; in a quick run one epoch."""
        if self.options.quick:
            return replace(recipe, epochs=min(recipe.epochs, 1), evaluations=1)
        longer, larger = self.options.longer, self.options.larger
        longer = {"epochs": longer * recipe.epochs, "evaluations": longer * recipe.evaluations}
        return replace(recipe, examples=recipe.examples and larger * recipe.examples, **longer)

    def train(self, recipes: list[Recipe], seeds: Sequence[int], inspect: Inspect | None = None) -> list[list[Results]]:
        """Train the recipes on every seed, equal ones once, most work first; for each its stacks' results, see `fit`.

        A task is one recipe and one stack of seeds, whose size does not depend on the jobs, so no number does; on a GPU
        one stack holds all seeds. Raises LessonError if a recipe holds a function that no other process could find.
        """
        options, keys, different, work = self.options, [], {}, {}
        for recipe in recipes:
            try:
                keys.append(pickle.dumps((recipe, inspect)))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                wanted = f"recipe and inspect may hold only functions of the script's top level ({error})"
                raise LessonError(wanted) from None
            weights = sum(each.numel() for each in recipe.model(load(options.dataset).task).parameters())
            different[keys[-1]], work[keys[-1]] = recipe, weights * recipe.epochs * (recipe.examples or 1e9)
        size = STACK if options.device == "cpu" else len(seeds)
        stacks = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        futures: dict[bytes, list[Future]] = {}
        with tqdm(desc=self.name, total=len(different) * len(stacks), leave=False, disable=None) as bar:
            for key in sorted(different, key=work.get, reverse=True):
                how = (options.dataset, options.device, inspect)
                futures[key] = [self.executor.submit(fit, different[key], stack, *how) for stack in stacks]
                for future in futures[key]:
                    future.add_done_callback(lambda _: bar.update())
            wait([future for row in futures.values() for future in row], return_when="FIRST_EXCEPTION")
        return [[part for future in futures[key] for part in future.result()] for key in keys]

    def gain(self, values: "xr.DataArray", **baseline: Any) -> "xr.DataArray":
        """The paired difference, seed by seed, of an accuracy to that of the baseline: `lab.gain(accuracy, p=0)`."""
        named = {"unit": "points", "long_name": f"gain in {values.attrs['long_name']}"}
        return (values - values.sel(baseline, drop=True)).assign_attrs(named)

    def table(self, values: "xr.DataArray | dict[str, xr.DataArray]", rows: str, columns: str | None = None) -> None:
        """Print means over seeds of an array (rows, columns, seed); or of each array (rows, seed), with intervals."""
        words = self.plotting.words
        if columns is None:
            title = "Means over seeds, 95 % intervals"
            heads = {f"{name}\n{each.attrs.get('unit', '')}".strip(): each for name, each in values.items()}
        else:
            title = f"{self.plotting.label_of(values)} by {words(columns)} (means over seeds)"
            heads = {words(each): values.sel({columns: each}) for each in values[columns].values.tolist()}
        self.say(self.report.table(title, heads, [rows], spans=columns is None))

    def sweep(self, *arrays: "xr.DataArray", x: str, hue: str | None = None) -> None:
        """Draw each array (x, hue, seed) against the values of x, evenly spaced, in a panel of its own."""
        self.figure(self.plotting.lines(self.entry["question"], arrays, x, hue, None, even=True))

    def curves(self, *arrays: "xr.DataArray", x: str = "epoch", hue: str | None = None, dashed: Any = None) -> None:
        """Draw each array (x, hue, seed) against x, in a panel of its own; `dashed` is added to the first."""
        self.figure(self.plotting.lines(self.entry["question"], arrays, x, hue, dashed, even=False))

    def dots(self, *arrays: "xr.DataArray", y: str, hue: str | None = None) -> None:
        """Draw each array (y, hue, seed) as dots with intervals, a row for each value of y, in a panel of its own."""
        self.figure(self.plotting.dots(self.entry["question"], arrays, y, hue))

    def heat(self, *arrays: "xr.DataArray", x: str, y: str) -> None:
        """Draw each array (y, x, seed) as colours and numbers, in a panel of its own."""
        self.figure(self.plotting.heat(self.entry["question"], arrays, x, y))

    def figure(self, figure: "Figure") -> None:
        """Save a figure under the experiment's name; in a notebook, show it too."""
        count = len(self.entry["figures"])
        path = self.options.out / f"{self.name}{f'_{count + 1}' if count else ''}.png"
        self.files.write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
        self.entry["figures"].append(path.name)
        print(f"figure: {path}")
        if in_notebook():
            from IPython.display import Image, display

            display(Image(path))

    def claim(
        self, statement: str, source: str, effect: "xr.DataArray", above: float = -math.inf, below: float = math.inf
    ) -> None:
        """Judge a rule of thumb: its measured effect (seed,) should be above and below these two; above=-1, below=1 say
        that none worth the name is expected. The verdict is printed at the end of the experiment.

        Of true and false values: the share of seeds, in %. A quick run judges nothing; a diverged seed is undecided.
        """
        unit, seeds = effect.attrs.get("unit", ""), len(self.options.seeds)
        unit = self.statistics.SHARE if effect.dtype == bool else "points" if unit == "%" else unit
        wanted = " and ".join([f"> {above:g}"] * (above > -math.inf) + [f"< {below:g}"] * (below < math.inf))
        estimate = {name: float(value) for name, value in self.statistics.interval(effect).items()}
        verdict = self.statistics.judge(estimate, above, below, seeds)
        verdict = self.statistics.NOT_JUDGED if self.options.quick else verdict
        claim = {"id": f"{self.name}-{len(self.claims) + 1}", "statement": statement, "source": source}
        claim |= {"experiment": self.name, "expected": f"{wanted} {unit}".strip(), "seeds": seeds, "verdict": verdict}
        self.claims.append(claim | {"estimate": estimate | {"unit": unit}})

    def close(self) -> None:
        """Count the lesson's verdicts, and say where the files are."""
        verdicts = [claim["verdict"] for claim in self.record["claims"]]
        counts = ", ".join(f"{each}: {verdicts.count(each)}" for each in sorted(set(verdicts), key=len))
        print(f"\n{len(verdicts)} rules of thumb ({counts}), {self.record['seconds']:.0f} s after start-up.")
        print(f"All tables, figures and numbers: {self.options.out / 'summary.md'}")


def labelled(name: str, values: Values) -> dict[Any, Any]:
    """A factor's values by label. Raises LessonError for no values, one label twice, or labels that name nothing."""
    given = values if isinstance(values, (tuple, list, Mapping)) and name not in ("seed", "epoch") else ()
    factor = dict(given) if isinstance(given, Mapping) else dict(zip(given, given, strict=True))
    if not factor or len(factor) < len(given) or not all(isinstance(label, (str, int, float)) for label in factor):
        raise LessonError(f"{name}={values!r}: wanted different words or numbers, or a dictionary label → value")
    return factor


def flatten(name: str, value: Any) -> dict[str, str]:
    """A setting by name, and the arguments of a partial function: {"model": "mlp", "model.width": "128", …}."""
    if not isinstance(value, partial):
        return {name: getattr(value, "__name__", None) or str(value)}
    settings = flatten(name, value.func)
    for key, argument in signature(value.func).bind_partial(*value.args, **value.keywords).arguments.items():
        settings |= flatten(f"{name}.{key}", argument)
    return settings


def what_varies(recipes: Sequence[Recipe]) -> tuple[list[str], dict[str, str]]:
    """The names of the settings in which the recipes differ, and the settings that all of them share."""
    settings: list[dict[str, str]] = [{} for _ in recipes]
    for recipe, found in zip(recipes, settings, strict=True):
        for each in fields(recipe):
            found |= flatten(each.name, getattr(recipe, each.name))
    names = dict.fromkeys(name for each in settings for name in each)
    varies = [name for name in names if len({each.get(name) for each in settings}) > 1]
    return varies, {name: settings[0][name] for name in names if name not in varies}


def question_of(experiment: Callable[[Lab], None]) -> str:
    """The first paragraph of an experiment's docstring, on one line."""
    return " ".join((experiment.__doc__ or "").split("\n\n")[0].split())


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    return "ipykernel" in sys.modules
