"""A lesson: its experiments, the command line that all lessons share, and the one line that every failure ends in."""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import torch
from filelock import Timeout

from common.data import DATASETS, FOLDER, LessonError, forget
from common.lab import Lab, question_of
from common.training import split_for
from runner.notebooks import Script, file_of, in_cell, in_notebook, script_of
from runner.terminal import any_output, blame, fail, width, wrapped
from runner.workers import alone_in, state_kept, workers

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"
Experiment = Callable[[Lab], None]


def parse(lesson: str, title: str, names: Sequence[str] | None, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises SystemExit(2) with one line on stderr for anything it does not understand."""
    parser = argparse.ArgumentParser(
        prog=f"{lesson}.py", description=title, formatter_class=partial(argparse.HelpFormatter, width=width())
    )
    parser.error = lambda message: fail(2, f"{parser.prog}: {message} (see --help)")
    sets = f"one of: {', '.join(DATASETS)} (default digits); or NAME.npz, or a folder with a folder of images per class"
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--quick", action="store_true", help="a smoke run: two seeds, tiny; judges nothing")
    parser.add_argument("--seeds", **number, help="paired seeds for each arm (default 10)")
    parser.add_argument("--first-seed", default=0, **number, help="the first seed (default 0)")
    parser.add_argument("--longer", default=1, **number, help="train N times as long: does a verdict last?")
    parser.add_argument("--larger", default=1, **number, help="training sets N times as large")
    parser.add_argument("--only", nargs="+", action="extend", choices=names, metavar="NAME", help="run only these")
    parser.add_argument("--list", action="store_true", help="list the experiments and their questions")
    parser.add_argument("--verbose", action="store_true", help="print every table, not only the main ones")
    parser.add_argument("--dataset", default="digits", metavar="NAME", help=sets)
    parser.add_argument("--data-dir", type=Path, default=FOLDER, help="where downloaded data sets are kept")
    parser.add_argument("--device", default="cpu", help="cpu (all that digits need), cuda, cuda:N or mps")
    parser.add_argument("--jobs", **number, help="trainings at a time on the CPU (default: one per core)")
    parser.add_argument("--out", type=Path, default=OUTPUTS, metavar="DIR", help="where results are written")
    options = parser.parse_args(arguments)
    for name, least in {"seeds": 1, "first_seed": 0, "longer": 1, "larger": 1, "jobs": 1}.items():
        if getattr(options, name) is not None and not least <= getattr(options, name) < 1_000_000:
            parser.error(f"argument --{name.replace('_', '-')}: wanted a whole number from {least} to 999999")
    own = options.dataset.lower().endswith(".npz") or os.path.exists(os.path.expanduser(options.dataset))
    if options.dataset not in DATASETS and not own:
        near = get_close_matches(options.dataset.lower().replace("_", "-"), DATASETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        wanted = f"one of {', '.join(DATASETS)}, nor the path of an .npz file or of a folder of images"
        parser.error(f"argument --dataset: {options.dataset!r} is not {wanted}{hint}")
    known = re.fullmatch(r"cpu|mps|cuda(:\d+)?", options.device)
    try:
        torch.empty(0, device=options.device if known else "unknown").cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        wanted = "wanted cpu, or a cuda, cuda:N or mps that PyTorch finds"
        parser.error(f"argument --device: {options.device!r} cannot be used here: {wanted}")
    count = options.seeds or (2 if options.quick else 10)
    options.seeds = list(range(options.first_seed, options.first_seed + count))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.jobs = min(options.jobs or cores, 61)  # Windows allows no more processes
    file = getattr(sys.modules["__main__"], "__file__", None)
    if options.device != "cpu" or (sys.platform != "linux" and (in_notebook() or not file or not Path(file).exists())):
        options.jobs = 0  # processes would not help a GPU; spawned ones import the script, but no cell or console
    options.data_dir = Path(os.path.expanduser(options.data_dir))
    options.out = Path(os.path.expanduser(options.out)).absolute() / lesson
    return options


class Lesson:
    """The experiments of a script, which runs them all in `main`. In a notebook each runs in its own cell, at once,
    with the command line's words in `arguments`.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title, self.arguments, self.lab = name, title, [], None
        self.experiments: dict[str, Experiment] = {}
        self.script: Script | None = None

    def experiment(self, function: Experiment) -> Experiment:
        """Add an experiment; in a notebook's cell, run it."""
        if function.__name__ in self.experiments and not in_cell(function):
            fail(2, f"error: two experiments are called {function.__name__}")
        self.script = self.script or script_of(function)
        self.experiments[function.__name__] = function
        if in_cell(function):
            self.run([function], self.arguments)
        return function

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run all experiments, as the command line or `arguments` ask; below a notebook's cells, list the verdicts.
        Raises SystemExit: 2 for a wrong value, 130 after Ctrl-C, 1 for anything else the reader can mend.
        """
        experiments = list(self.experiments.values())
        if experiments[0].__module__ == "__mp_main__":
            return  # a worker that was spawned imports the script, which may lack the guard
        cell = in_cell(experiments[0])
        if arguments is None and cell and self.lab:
            self.lab.close()
        elif arguments is None:
            main = experiments[0].__module__ == "__main__" and not in_notebook()
            own = main or Path(sys.argv[0]).absolute() == file_of(experiments[0])
            self.run(experiments, self.arguments if cell else sys.argv[1:] if own else [])
        else:
            self.run(experiments, arguments)

    @any_output()
    def run(self, experiments: list[Experiment], arguments: Sequence[str]) -> None:
        """Run these experiments, and end every failure in one line and an exit code."""
        words = shlex.split(arguments) if isinstance(arguments, str) else list(map(str, arguments))
        names = None if in_cell(experiments[0]) else list(self.experiments)  # later cells add to them
        options = parse(self.script.path.stem if self.script else self.name, self.title, names, words)
        finished: list[str] = []
        try:
            if options.list:
                told = "\n".join(f"{each.__name__}: {question_of(each)}" for each in experiments)
                print(wrapped(told, width()), flush=True)
                return
            options.out.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=options.out).close()  # rather now than after minutes of training
            with state_kept(), alone_in(options.out):
                self.work(experiments, options, finished)
        except SystemExit as end:
            if end.code == 143:  # SIGTERM
                raise
            fail(1, f"error: an experiment or a hook called sys.exit; {', '.join(finished) or 'nothing'} finished")
        except KeyboardInterrupt:
            fail(130, f"\ninterrupted; {', '.join(finished) or 'nothing'} finished, in {options.out}")
        except LessonError as error:
            fail(2, f"error: {error}")
        except Timeout:
            fail(2, f"error: another run writes to {options.out}; wait for its end, or choose another place with --out")
        except BrokenProcessPool as error:
            fail(1, f"error: {error}")
        except OSError as error:
            told = blame(error, options.out)
            if not told:
                raise
            fail(1, f"error: {told}")

    def work(self, experiments: list[Experiment], options: argparse.Namespace, finished: list[str]) -> None:
        """Run those of the experiments that the options name, and note in `finished` which are done."""
        forget()  # a file of data may have changed since the last run in this kernel
        split_for.cache_clear()
        with workers(options.jobs, options.dataset, options.data_dir) as executor:
            if not in_notebook():
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers that inherit it could lose one
            if self.lab is None or self.lab.options != options or self.script:
                self.lab = Lab(options.out.name, self.title, self.script, options, list(self.experiments))
            self.lab.order, self.lab.executor = list(self.experiments), executor
            for experiment in experiments:
                if not options.only or experiment.__name__ in options.only:
                    self.lab.run(experiment)
                    finished.append(experiment.__name__)
            if self.script:
                self.lab.close()
            sys.stdout.flush()
