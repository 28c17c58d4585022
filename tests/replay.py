"""A lesson's own experiments on its stored reference run, without training: what it asks, prints, draws and claims."""

from dataclasses import fields
from itertools import product
from types import SimpleNamespace

import xarray as xr
from conftest import load_lesson

from common import plotting, report, statistics
from common.lab import Lab, flatten, labelled, what_varies


def study(record, experiment, which=0):
    """A study of a reference run, as an xarray Dataset."""
    stored = record["experiments"][experiment]["studies"][which]
    runs = xr.Dataset.from_dict({key: stored[key] for key in ("coords", "attrs", "dims", "data_vars")})
    return runs.assign({name: runs[name].astype(float) for name in runs if runs[name].dtype == object})


class Replay(Lab):
    """A laboratory that trains nothing: each study is the reference run's. What the lesson asks and says is kept."""

    def __init__(self, record, seeds, sign):
        self.record, self.sign = record, sign
        self.plotting, self.report, self.statistics = plotting, report, statistics
        self.options, self.judged = SimpleNamespace(seeds=seeds, quick=False), []
        self.asked, self.printed, self.figures = {}, {}, {}

    def study(self, recipe, *, tune=None, inspect=None, **factors):
        which = len(self.asked[self.name])
        runs, stored = study(self.record, self.name, which), self.record["experiments"][self.name]["studies"][which]
        levels = {name: labelled(name, values) for name, values in (factors | (tune or {})).items()}
        assert all(runs[name].values.tolist() == list(each) for name, each in levels.items())
        rows = product(*(each.values() for each in levels.values()))
        recipes = [recipe(**dict(zip(levels, row, strict=True))) for row in rows]
        labels = [
            " ".join(map(str, row)) for row in product(*(each for name, each in levels.items() if name != "rate"))
        ]
        asked = SimpleNamespace(recipe=recipe, levels=levels, tuned=list(tune or {}), labels=labels, recipes=recipes)
        asked.inspect = inspect
        self.asked[self.name].append(asked)
        varies, held = what_varies(recipes)
        assert (getattr(recipe, "__name__", "recipe"), held) == (stored["recipe"], stored["held"])
        runs = runs.assign(validation_accuracy=self.sign * runs.validation_accuracy).sel(seed=self.options.seeds)
        for line in (f"varies: {', '.join(varies) or 'nothing'}", *report.choice_lines(runs, list(tune or {}))):
            self.say(line)
        return runs

    def figure(self, figure):
        self.figures.setdefault(self.name, []).append(figure)


def replay(record, seeds=None, sign=1):
    """The lesson's own experiments on the stored results; a sign of -1 turns the order on validation around."""
    lab = Replay(record, seeds or record["settings"]["seeds"], sign)
    for lab.name, experiment in load_lesson(record["lesson"]).lesson.experiments.items():
        lab.claims, lab.entry, lab.asked[lab.name] = [], {"question": "", "printed": ""}, []
        experiment(lab)
        lab.printed[lab.name] = lab.entry["printed"]
        lab.judged += lab.claims
    return lab


def settings(recipe):
    """Every setting of a recipe by name, as text, those of partial functions too."""
    parts = [flatten(each.name, getattr(recipe, each.name)) for each in fields(recipe)]
    return {name: text for part in parts for name, text in part.items()}


def changes(recipe, base):
    """The settings in which a recipe differs from another."""
    return " ".join(map("=".join, sorted(settings(recipe).items() - settings(base).items())))
