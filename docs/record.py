"""The files of a run, written whole or not at all: results.json, and summary.md, the page that is made of it.

`python -m docs.record FOLDER …` makes the page anew.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any
from uuid import uuid4

import torch
import xarray as xr
from matplotlib.figure import Figure
from tabulate import tabulate

from common.data import digest, load, reason
from common.plotting import words
from common.report import measured, table
from docs.sources import sources
from runner.notebooks import Script, cells, in_notebook

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy", "test_accuracy")
SETTINGS = ("dataset", "seeds", "device", "quick", "longer", "larger")  # options that decide the numbers
OWN = ("folder", "script", "sources", "seen")  # of a record in memory, not of what is written
PAUSES = (0.1, 0.3, 1.0, 2.0)  # seconds, before another try


def environment(device: str) -> dict[str, str]:
    """Versions and machine."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", info, re.MULTILINE) or [platform.processor()]
    parts = [f"{platform.system()} {platform.machine()}", names[0], f"{os.cpu_count()} cores"]
    parts += [torch.cuda.get_device_name(device)] if device.startswith("cuda") else []
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": ", ".join(parts)}


def plain(value: Any) -> Any:
    """A value as strict JSON holds it: NaN and infinity become null, numbers six digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def patiently(action: Callable[[], Any], path: Path) -> None:
    """Do something with the file `path`; for some seconds again and again while another program holds it open, as a
    viewer or a virus scanner on Windows may. Raises OSError, which names the file.
    """
    for pause in (*PAUSES, None):
        try:
            action()
            return
        except PermissionError as error:
            if pause is None:
                raise PermissionError(error.errno, f"{error.strerror} (open in another program?)", str(path)) from None
            time.sleep(pause)
        except OSError as error:
            raise OSError(error.errno, error.strerror or reason(error), str(path)) from None


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, of a name of its own, then put it in place: nobody ever sees half of it.
    Raises OSError, which names `path`.
    """
    aside = path.with_name(f".{path.stem}.{uuid4().hex}.part{path.suffix}")
    try:
        patiently(lambda: write(aside), path)
        patiently(lambda: os.replace(aside, path), path)
    finally:
        aside.unlink(missing_ok=True)


def write_figure(path: Path, figure: Figure) -> Path:
    """Save a figure, under another name where a viewer keeps its file locked. Returns the file's path."""
    try:
        write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
    except PermissionError:
        path = path.with_name(f"{path.stem}_new{path.suffix}")
        write_whole(path, lambda aside: figure.savefig(aside, dpi=110))
    return path


def write_record(folder: Path, record: Mapping[str, Any], script: str) -> None:
    """Write results.json, strict JSON, and summary.md, to which the text of the script adds its prose."""
    written = plain({name: value for name, value in record.items() if name not in OWN})
    text = json.dumps(written, allow_nan=False, ensure_ascii=False) + "\n"
    for name, content in {"results.json": text, "summary.md": summary(written, script)}.items():
        write_whole(folder / name, lambda aside, content=content: aside.write_text(content, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any]:
    """The record an earlier run left, or an empty one if there is none or it cannot be read."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        entries = found["experiments"].values()
        whole = all(each.keys() >= {"figures", "studies", "printed", "seconds"} for each in entries)
        return found if whole and isinstance(found["claims"], list) and "seconds" in found else {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def set_aside(folder: Path, put: Callable[[Path, Path], Any] = os.replace) -> None:
    """Move, or `put`, an earlier run's files into previous-N, N one above the highest that is there."""
    found = [*folder.glob("*.png"), *folder.glob("results.json"), *folder.glob("summary.md")]
    if folder / "results.json" in found:
        numbers = [int(path.name[9:]) for path in folder.glob("previous-*") if path.name[9:].isdecimal()]
        previous = folder / f"previous-{max(numbers, default=0) + 1}"
        previous.mkdir()
        for path in found:
            patiently(lambda path=path: put(path, previous / path.name), path)


def sweep_up(folder: Path) -> None:
    """Delete what runs that were killed while they wrote have left: unfinished files more than an hour old."""
    for path in folder.glob(".*.part.*"):
        if time.time() - path.stat().st_mtime > 3600:
            path.unlink(missing_ok=True)


def sources_of(order: Sequence[str], script: Script | None) -> dict[str, str]:
    """The hashes of the code of a script's or a notebook's experiments; of one without a file nothing is known."""
    if script is None and not in_notebook():
        return {name: uuid4().hex for name in order}
    text, folder = (script.text, script.path.parent) if script else (cells(), Path.cwd())
    return sources(order, text, (folder, ROOT))


def begin(name: str, title: str, script: Script | None, options: Namespace, order: Sequence[str]) -> dict[str, Any]:
    """The record of a run of the experiments in `order` that begins, in options.out. What an earlier one of the same
    name, data, settings and versions has filed of experiments whose code is unchanged goes on, so that `--only` renews
    one and keeps the others; else its files are set aside.
    """
    settings = {each: getattr(options, each) for each in SETTINGS}
    around = environment(options.device) | {"data": digest(load(options.dataset, options.data_dir))}
    record = {"lesson": name, "title": title, "settings": settings, "seconds": 0.0, "environment": around}
    record |= {"experiments": {}, "claims": [], "folder": options.out}
    record |= {"script": script, "sources": sources_of(order, script)}
    sweep_up(options.out)
    there = read_record(options.out / "results.json")
    same = all(there.get(each) == record[each] for each in ("lesson", "settings", "environment"))
    if not same:
        set_aside(options.out)
    else:
        put(record, there["experiments"], there["claims"])
        drop_obsolete(record)
    record["seen"] = content(options.out)
    return record


def drop_obsolete(record: dict[str, Any]) -> None:
    """Leave out of a record the experiments whose code is no longer what it was when they were run, and set a copy of
    all files aside before.
    """
    kept, folder = {}, record["folder"]
    for name, entry in record["experiments"].items():
        if entry.get("source") == record["sources"].get(name):
            kept[name] = entry
    if len(kept) < len(record["experiments"]):
        set_aside(folder, shutil.copyfile if kept else os.replace)
        figures = {figure for entry in kept.values() for figure in entry["figures"]}
        for path in folder.glob("*.png"):
            if path.name not in figures:
                path.unlink()
    record["experiments"] = kept
    record["claims"] = [claim for claim in record["claims"] if claim["experiment"] in kept]


def renew(record: dict[str, Any], order: Sequence[str]) -> None:
    """Before an experiment: set aside what another run has filed in the folder between a notebook's cells, and look
    which experiments the cells would still run as they were run.
    """
    if content(record["folder"]) != record["seen"]:
        set_aside(record["folder"])
        record |= {"experiments": {}, "claims": []}
    if record["script"] is None and in_notebook():
        record["sources"] = sources_of(order, None)
        drop_obsolete(record)


def content(folder: Path) -> str:
    """A hash of a folder's results.json, or nothing if it is not there."""
    path = folder / "results.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def put(record: dict[str, Any], experiments: Mapping[str, Any], claims: Sequence[dict]) -> None:
    """Put experiments with their claims into a record, in the place of earlier ones of the same names."""
    others = [claim for claim in record["claims"] if claim["experiment"] not in experiments]
    record |= {"experiments": record["experiments"] | experiments, "claims": [*others, *claims]}


def add(record: dict[str, Any], name: str, entry: dict[str, Any], claims: list[dict], order: Sequence[str]) -> None:
    """Add a finished experiment with its claims, in the lesson's order, and write the files."""
    script = record["script"]
    put(record, {name: entry | {"source": record["sources"].get(name, uuid4().hex)}}, claims)
    record["experiments"] = {each: record["experiments"][each] for each in order if each in record["experiments"]}
    record["claims"].sort(key=lambda claim: order.index(claim["experiment"]))
    record["seconds"] = sum(each["seconds"] for each in record["experiments"].values())
    write_record(record["folder"], record, script.text if script else "")
    record["seen"] = content(record["folder"])


def all_numbers(study: Mapping[str, Any], width: int = 80) -> str:
    """What a study held fixed, every combination of its factors after the last epoch, and the grids of what was tuned,
    means over seeds, as text of so many columns.
    """
    held = ", ".join(f"{name}={value}" for name, value in study["held"].items() if value not in (None, "None"))
    runs = xr.Dataset.from_dict({name: study[name] for name in ("coords", "dims", "attrs", "data_vars")})
    factors = list(runs.seconds.dims[:-1])
    heads = ("train\nloss", "val.\nloss", "train\nacc. %", "val.\nacc. %", "test\nacc. %")
    columns = {head: runs[name].astype(float) for head, name in zip(heads, METRICS, strict=True)}
    columns["div.\n%"] = (100.0 * runs.diverged_at.astype(float).notnull()).assign_attrs(unit="%")
    after = table("After the last epoch (means over seeds)", columns, factors, width=width)
    parts = [fill(f"held: {held}", width), after]
    if "grid" in runs:
        grid = runs.grid.astype(float).rename(tuning_seed="seed")
        tuned = [dim for dim in grid.dims if dim not in (*factors, "seed")]
        for name in tuned:
            scores = grid.max([other for other in tuned if other != name])
            columns = {words(each): scores.sel({name: each}) for each in scores[name].values.tolist()}
            title = f"Validation accuracy (%) on the tuning seeds by {words(name)}"
            parts.append(table(title, columns, factors, width=width))
    return "\n".join(parts).rstrip()


def prose(script: str) -> dict[str, tuple[str, str]]:
    """For each experiment in the text of a script its heading, and the Markdown cell below it: what was seen."""
    found, heading, name = {}, "", ""
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE):
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            text = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            if name:
                found[name] = (heading, re.split(r"^#", text, flags=re.MULTILINE)[0].strip())
            heading, name = (re.findall(r"^## (.+)$", text, re.MULTILINE) or [heading])[-1], ""
        elif experiment := re.search(r"^@lesson\.experiment\ndef (\w+)", body, re.MULTILINE):
            name = experiment[1]
    return found


def escaped(text: str) -> str:
    """Text as Markdown shows it letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]<|~$]|&(?=#?\w+;))", r"\\\1", " ".join(text.split()))


def fenced(text: str) -> str:
    """Text as a block of Markdown that no backticks in it end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip()}\n{fence}"


def summary(record: Mapping[str, Any], script: str) -> str:
    """A whole results.json for readers, in Markdown: for each experiment the question, the figures, what was printed,
    the verdicts, and what was seen in the reference run; everything else folded away.
    """
    settings, told = record["settings"], prose(script)
    run = ", ".join(f"{name} {escaped(str(value))}" for name, value in settings.items() if name != "seeds")
    parts = [f"# {escaped(record['title'])}", f"{len(settings['seeds'])} seeds from {settings['seeds'][0]}; {run}."]
    for name, entry in record["experiments"].items():
        heading, seen = told.get(name, (escaped(name), ""))
        question = escaped(entry["question"])
        parts += [f'<a id="{name}"></a>', f"## {heading}", f"*{question}*"]
        parts += [f"![{question}]({figure})" for figure in entry["figures"]]
        parts += [fenced(entry["printed"])] if entry["printed"] else []
        claims = [claim for claim in record["claims"] if claim["experiment"] == name]
        rows = []
        for claim in claims:
            statement = escaped(f"{claim['statement']} ({claim['source']})")
            rows.append([statement, claim["expected"], measured(claim), claim["verdict"], claim["id"]])
        heads = ["claim", "expected", "measured", "verdict", "id"]
        parts += [tabulate(rows, heads, "pipe", disable_numparse=True)] if claims else []
        parts += [f"*The lesson says of its reference run on digits:*\n\n{seen}"] if seen else []
        numbers = "\n\n".join(all_numbers(study) for study in entry["studies"])
        if numbers:
            parts += [f"<details>\n<summary>All numbers</summary>\n\n{fenced(numbers)}\n\n</details>"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        place = next(path for path in (ROOT, ROOT / "further") if (path / f"{folder.name}.py").exists())
        text = (place / f"{folder.name}.py").read_text(encoding="utf-8")
        write_record(folder, read_record(folder / "results.json"), text)
