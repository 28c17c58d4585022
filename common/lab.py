"""The laboratory that a lesson works in: it runs studies, prints and keeps what came out, and files it.

What only reports (xarray, matplotlib) is imported when the Lab is made: the workers are forked by then.
"""

import math
import pickle
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from itertools import product
from numbers import Real
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data import LessonError
from common.training import STACK, UNITS, Inspect, Recipe, Results, build, check_value, fit
from runner.notebooks import Script, in_notebook
from runner.terminal import own_settings, plain_matplotlib, width, wrapped
from runner.workers import answer, wait_for

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Values = tuple | Mapping[Any, Any]  # of a factor: the values themselves, or label → value
TUNING_SEEDS = 3


class Lab:
    """Hands a lesson its tools, prints what comes out, and keeps the record of every finished experiment."""

    executor: Executor
    dead = 0  # runs of the experiment in progress whose loss was not finite at the start

    def __init__(self, name: str, title: str, script: Script | None, options: Namespace, order: list[str]) -> None:
        with plain_matplotlib():
            from common import plotting, report, statistics
            from docs import record

        self.plotting, self.report, self.statistics, self.files = plotting, report, statistics, record
        self.options, self.order = options, order
        self.record = record.begin(name, title, script, options, order)

    def say(self, text: str | Callable[[int], str]) -> None:
        """Print text, its long lines wrapped by words, or what a function makes of a number of columns; keep it as it
        is on 80 columns, whatever the terminal has.
        """
        made = text if callable(text) else partial(wrapped, text)
        self.entry["printed"] += f"{made(80)}\n"
        print(made(width()))

    def run(self, experiment: Callable[["Lab"], None]) -> None:
        """Carry out one experiment: its question is the first paragraph of its docstring. File it when it is done."""
        self.files.renew(self.record, self.order)
        start, self.name, self.claims, self.dead = time.perf_counter(), experiment.__name__, [], 0
        self.entry = {"question": question_of(experiment), "printed": "", "varies": [], "figures": [], "studies": []}
        columns = width()
        print(f"\n{self.order.index(self.name) + 1} of {len(self.order)}: {self.name} ".ljust(columns, "-"))
        print(fill(self.entry["question"], columns))
        with own_settings():
            experiment(self)
        print()
        for i, claim in enumerate(self.claims, 1):
            told, measured = f"{i}. {claim['statement']} ({claim['source']})", self.report.measured(claim)
            print(fill(told, columns, initial_indent=claim["verdict"].ljust(15), subsequent_indent=" " * 15))
            told = f"{measured}; expected {claim['expected']}"
            print(fill(told, columns, initial_indent=" " * 15, subsequent_indent=" " * 15))
        self.entry["seconds"] = time.perf_counter() - start
        self.files.add(self.record, self.name, self.entry, self.claims, self.order)

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
        `grid` of scores by factors × candidates × tuning_seed. Raises LessonError when factors and recipe do not fit,
        and when every run diverged. Where a run was dead at its start, its loss not finite, no claim is judged.
        """
        tune, name = tune or {}, getattr(recipe, "__name__", "recipe")
        check_value("the recipe of a study", recipe, "a function that returns a Recipe", callable(recipe))
        check_value("tune", tune, "a dictionary", isinstance(tune, Mapping))
        check_value("a setting to tune", set(tune), "none of the factors", not set(tune) & set(factors))
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
            print(self.files.all_numbers(self.entry["studies"][-1], width()))
        dead, lost, size = int((runs.diverged_at == 0).sum()), int(runs.diverged_at.count()), runs.diverged_at.size
        if dead:
            self.say(f"{dead} of {size} runs were dead at the start, their loss not finite: no claim is judged")
        if lost == size:
            cause = f"{dead} of {size} at the start; look at data, starting weights and learning rate"
            raise LessonError(f"{self.name}: every run diverged, {cause}")
        self.dead += dead
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
        check_value("what the function of a study returns", recipe, Recipe)
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
            weights = sum(each.numel() for each in build(recipe, options.dataset).parameters())
            different[keys[-1]], work[keys[-1]] = recipe, weights * recipe.epochs * (recipe.examples or 1e9)
        size = STACK if options.device == "cpu" else len(seeds)
        stacks = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        futures: dict[bytes, list[Future]] = {}
        for key in sorted(different, key=work.get, reverse=True):
            how = (options.dataset, options.device, inspect)
            futures[key] = [self.executor.submit(answer, fit, different[key], stack, *how) for stack in stacks]
        wait_for([future for row in futures.values() for future in row], self.name)
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
        self.say(partial(self.report.table, title, heads, [rows], columns is None))

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
        name = f"{self.name}{f'_{count + 1}' if count else ''}.png"
        path = self.files.write_figure(self.options.out / name, figure)
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

        Of true and false values: the share of seeds, in %. A quick run judges nothing, nor does an experiment in which
        a run was dead at its start; a diverged seed is undecided.
        """
        unit, seeds = effect.attrs.get("unit", ""), len(self.options.seeds)
        unit = self.statistics.SHARE if effect.dtype == bool else "points" if unit == "%" else unit
        wanted = " and ".join([f"> {above:g}"] * (above > -math.inf) + [f"< {below:g}"] * (below < math.inf))
        estimate = {name: float(value) for name, value in self.statistics.interval(effect).items()}
        verdict = self.statistics.judge(estimate, above, below, seeds)
        verdict = self.statistics.NOT_JUDGED if self.options.quick or self.dead else verdict
        claim = {"id": f"{self.name}-{len(self.claims) + 1}", "statement": statement, "source": source}
        claim |= {"experiment": self.name, "expected": f"{wanted} {unit}".strip(), "seeds": seeds, "verdict": verdict}
        self.claims.append(claim | {"estimate": estimate | {"unit": unit}})

    def close(self) -> None:
        """Count the lesson's verdicts, and say where the files are."""
        verdicts = [claim["verdict"] for claim in self.record["claims"]]
        counts = ", ".join(f"{each}: {verdicts.count(each)}" for each in sorted(set(verdicts), key=len))
        told = f"{len(verdicts)} rules of thumb ({counts}), {self.record['seconds']:.0f} s after start-up."
        print(f"\n{fill(told, width())}")
        print(f"All tables, figures and numbers: {self.options.out / 'summary.md'}")


def labelled(name: str, values: Values) -> dict[Any, Any]:
    """A factor's values by label. Raises LessonError for no values, one label twice, or labels that name nothing."""
    given = list(values) if isinstance(values, (tuple, list, Mapping)) else []
    alike = any(all(isinstance(label, kind) and label == label for label in given) for kind in (str, Real))
    wanted = "different words, or different numbers, or a dictionary label → value"
    check_value(f"the values of {name}", values, wanted, bool(given) and alike and len(set(given)) == len(given))
    taken = {"seed", "tuning_seed", "epoch", "best_epoch", "diverged_at", "seconds", "grid", *UNITS}
    taken |= {"n", "mean", "low", "high", *(f"best_{each}" for each in UNITS)}
    check_value("the name of a factor", name, "one that no result has", name not in taken)
    return dict(values) if isinstance(values, Mapping) else dict(zip(given, given, strict=True))


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
