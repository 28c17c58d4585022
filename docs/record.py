"""The files of a run, written whole or not at all: results.json, and summary.md, the page that is made of it.

`python -m docs.record FOLDER …` makes the page anew.
"""

import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import xarray as xr
from tabulate import tabulate

from common.plotting import words
from common.report import measured, table

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy", "test_accuracy")
SETTINGS = ("dataset", "seeds", "device", "quick", "longer", "larger")  # options that decide the numbers
DECIDES_NUMBERS = ("data", "training", "lab", "statistics")
CELLS = "cells of a notebook"


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


def environment(device: str, script: Path | None) -> dict[str, str]:
    """Versions, machine, and a hash of the code that decides the numbers: comments and docstrings leave it be."""
    files = [script, *(ROOT / "common" / f"{name}.py" for name in DECIDES_NUMBERS)] if script else []
    code = json.dumps([syntax(ast.parse(file.read_text(encoding="utf-8"))) for file in files])
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", info, re.MULTILINE) or [platform.processor()]
    parts = [f"{platform.system()} {platform.machine()}", names[0], f"{os.cpu_count()} cores"]
    parts += [torch.cuda.get_device_name(device)] if device.startswith("cuda") else []
    source = hashlib.sha256(code.encode()).hexdigest() if script else CELLS
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return versions | {"machine": ", ".join(parts), "source": source}


def plain(value: Any) -> Any:
    """A value as strict JSON holds it: NaN and infinity become null, numbers six digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: nobody ever sees half of it."""
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_record(folder: Path, record: Mapping[str, Any], script: Path | None) -> None:
    """Write results.json, strict JSON, and summary.md."""
    written = plain({name: value for name, value in record.items() if name != "folder"})
    text = json.dumps(written, allow_nan=False, ensure_ascii=False) + "\n"
    for name, content in {"results.json": text, "summary.md": summary(written, script)}.items():
        write_whole(folder / name, lambda aside, content=content: aside.write_text(content, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any]:
    """The record an earlier run left, or an empty one if there is none or it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def set_aside(folder: Path) -> None:
    """Move an earlier run's files to previous-N, N one above the highest that is there."""
    found = [*folder.glob("*.png"), *folder.glob("results.json"), *folder.glob("summary.md")]
    if folder / "results.json" in found:
        numbers = [int(path.name[9:]) for path in folder.glob("previous-*") if path.name[9:].isdecimal()]
        previous = folder / f"previous-{max(numbers, default=0) + 1}"
        previous.mkdir()
        for path in found:
            path.rename(previous / path.name)


def begin(lesson: str, title: str, script: Path | None, options: Namespace) -> dict[str, Any]:
    """The record of a run that begins, in options.out. An earlier one of the same script, data and settings goes on, so
    that `--only` renews one experiment and keeps the others; else its files are set aside.
    """
    settings = {each: getattr(options, each) for each in SETTINGS}
    source = environment(options.device, script)
    if options.dataset.endswith(".npz"):
        source["data"] = hashlib.sha256(Path(os.path.expanduser(options.dataset)).read_bytes()).hexdigest()
    record = {"lesson": lesson, "title": title, "settings": settings, "seconds": 0.0, "environment": source}
    record |= {"experiments": {}, "claims": [], "folder": options.out}
    if not take_up(record):
        set_aside(options.out)
    return record


def take_up(record: dict[str, Any]) -> bool:
    """Put what is in the record's folder into the record, if it is of the same script, data and settings, which nobody
    knows of a notebook's cells; returns whether it is.
    """
    there = read_record(record["folder"] / "results.json")
    same = all(there.get(each) == record[each] for each in ("lesson", "settings", "environment"))
    if same and record["environment"]["source"] != CELLS:
        put(record, there["experiments"], there["claims"])
        return True
    return False


def put(record: dict[str, Any], experiments: Mapping[str, Any], claims: Sequence[dict]) -> None:
    """Put experiments with their claims into a record, in the place of earlier ones of the same names."""
    others = [claim for claim in record["claims"] if claim["experiment"] not in experiments]
    record |= {"experiments": record["experiments"] | experiments, "claims": [*others, *claims]}


def add(record: dict[str, Any], name: str, entry: dict[str, Any], claims: list[dict], order: Sequence[str]) -> None:
    """Add a finished experiment with its claims, and what another run has filed meanwhile, in the lesson's order."""
    take_up(record)
    put(record, {name: entry}, claims)
    record["experiments"] = {each: record["experiments"][each] for each in order if each in record["experiments"]}
    record["claims"].sort(key=lambda claim: order.index(claim["experiment"]))
    record["seconds"] = sum(each["seconds"] for each in record["experiments"].values())


def all_numbers(study: Mapping[str, Any]) -> str:
    """What a study held fixed, every combination of its factors after the last epoch, and the grids of what was tuned,
    means over seeds, as text.
    """
    held = ", ".join(f"{name}={value}" for name, value in study["held"].items() if value not in (None, "None"))
    runs = xr.Dataset.from_dict({name: study[name] for name in ("coords", "dims", "attrs", "data_vars")})
    factors = list(runs.seconds.dims[:-1])
    heads = ("train\nloss", "val.\nloss", "train\nacc. %", "val.\nacc. %", "test\nacc. %")
    columns = {head: runs[name].astype(float) for head, name in zip(heads, METRICS, strict=True)}
    columns["div.\n%"] = (100.0 * runs.diverged_at.astype(float).notnull()).assign_attrs(unit="%")
    parts = [fill(f"held: {held}", 80), table("After the last epoch (means over seeds)", columns, factors)]
    if "grid" in runs:
        grid = runs.grid.astype(float).rename(tuning_seed="seed")
        tuned = [dim for dim in grid.dims if dim not in (*factors, "seed")]
        for name in tuned:
            scores = grid.max([other for other in tuned if other != name])
            columns = {words(each): scores.sel({name: each}) for each in scores[name].values.tolist()}
            parts.append(table(f"Validation accuracy (%) on the tuning seeds by {words(name)}", columns, factors))
    return "\n".join(parts).rstrip()


def prose(script: Path | None) -> dict[str, tuple[str, str]]:
    """For each experiment of a script its heading, and the text of the Markdown cell below it: what was seen."""
    found, heading, name = {}, "", ""
    for cell in re.split(r"^# %%", script.read_text(encoding="utf-8") if script else "", flags=re.MULTILINE):
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            text = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            if name:
                found[name] = (heading, re.split(r"^#", text, flags=re.MULTILINE)[0].strip())
            heading, name = (re.findall(r"^## (.+)$", text, re.MULTILINE) or [heading])[-1], ""
        elif experiment := re.search(r"^@lesson\.experiment\ndef (\w+)", body, re.MULTILINE):
            name = experiment[1]
    return found


def summary(record: Mapping[str, Any], script: Path | None) -> str:
    """A whole results.json for readers, in Markdown: for each experiment the question, the figures, what was printed,
    the verdicts, and what was seen in the reference run; everything else folded away.
    """
    settings, told = record["settings"], prose(script)
    run = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "seeds")
    parts = [f"# {record['title']}", f"{len(settings['seeds'])} seeds from {settings['seeds'][0]}; {run}."]
    for name, entry in record["experiments"].items():
        heading, seen = told.get(name, (name, ""))
        parts += [f'<a id="{name}"></a>', f"## {heading}", f"*{entry['question']}*"]
        parts += [f"![{entry['question']}]({figure})" for figure in entry["figures"]]
        parts += [f"```text\n{entry['printed'].strip()}\n```"] if entry["printed"] else []
        claims = [claim for claim in record["claims"] if claim["experiment"] == name]
        rows = []
        for claim in claims:
            statement = f"{claim['statement']} ({claim['source']})".replace("|", "\\|")
            rows.append([statement, claim["expected"], measured(claim), claim["verdict"], claim["id"]])
        heads = ["claim", "expected", "measured", "verdict", "id"]
        parts += [tabulate(rows, heads, "pipe", disable_numparse=True)] if claims else []
        parts += [f"*The lesson says of its reference run on digits:*\n\n{seen}"] if seen else []
        numbers = "\n\n".join(all_numbers(study) for study in entry["studies"])
        if numbers:
            parts += [f"<details>\n<summary>All numbers</summary>\n\n```text\n{numbers}\n```\n\n</details>"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        place = next(path for path in (ROOT, ROOT / "further") if (path / f"{folder.name}.py").exists())
        write_record(folder, read_record(folder / "results.json"), place / f"{folder.name}.py")
