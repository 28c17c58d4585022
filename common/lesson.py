"""A lesson: its experiments, the command line that all lessons share, and the one line that every failure ends in."""

import argparse
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import torch

from common.data import DATASETS, FOLDER, LessonError, load
from common.lab import Lab, in_notebook, question_of

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"
Experiment = Callable[[Lab], None]


def parse(lesson: str, title: str, names: Sequence[str], arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises SystemExit(2) with one line on stderr for anything it does not understand."""
    parser = argparse.ArgumentParser(prog=f"{lesson}.py", description=title)
    parser.error = lambda message: fail(2, f"{parser.prog}: {message} (see --help)")
    sets = f"one of: {', '.join(DATASETS)} (default digits); or a file of your own, NAME.npz"
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
    if options.dataset not in DATASETS and not options.dataset.endswith(".npz"):
        parser.error(f"argument --dataset: {options.dataset!r} is not one of {', '.join(DATASETS)}, nor an .npz file")
    known = re.fullmatch(r"cpu|mps|cuda(:\d+)?", options.device)
    try:
        torch.empty(0, device=options.device if known else "unknown").cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        wanted = "wanted cpu, or a cuda, cuda:N or mps that PyTorch finds"
        parser.error(f"argument --device: {options.device!r} cannot be used here: {wanted}")
    count = options.seeds or (2 if options.quick else 10)
    options.seeds = list(range(options.first_seed, options.first_seed + count))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.jobs = options.jobs or cores
    if options.device != "cpu" or (in_notebook() and sys.platform != "linux"):
        options.jobs = 0  # processes would not help a GPU; where they are spawned they cannot import cells
    options.out = Path(os.path.expanduser(options.out)) / lesson
    return options


def warm_up(dataset: str, folder: Path) -> None:
    """Pay once, before any worker is forked, for what every run needs: the data and PyTorch's optimisers."""
    torch.set_num_threads(1)  # parallel runs, each on one thread, beat one run on many at these sizes
    load(dataset, folder)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    gc.freeze()  # what is there now stays: the collector need not look at it, nor a worker copy it


def start_worker(dataset: str, folder: Path) -> None:
    """Prepare a worker: leave Ctrl-C to the parent, end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    warm_up(dataset, folder)


@contextmanager
def workers(jobs: int, dataset: str, folder: Path = FOLDER) -> Iterator[Executor]:
    """An executor for `jobs` trainings at a time on a data set kept in `folder`: processes, forked after `warm_up` on
    Linux, spawned elsewhere, and ended at once if the body raises, Ctrl-C included; for 0 a thread of this process.
    """
    warm_up(dataset, folder)
    if jobs == 0:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(dataset, folder))
    try:
        pool.submit(int).result()  # fork now, while this process has no other thread
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Lesson:
    """The experiments of a script, which runs them all in `main`. In a notebook each runs in its own cell, at once,
    with the command line's words in `arguments`.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title, self.arguments, self.lab = name, title, [], None
        self.experiments: dict[str, Experiment] = {}

    def experiment(self, function: Experiment) -> Experiment:
        """Add an experiment; in a notebook's cell, run it."""
        self.experiments[function.__name__] = function
        if in_cell(function):
            self.run([function], self.arguments)
        return function

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run all experiments, as the command line or `arguments` ask; below a notebook's cells, list the verdicts.
        Raises SystemExit: 2 for a wrong value, 130 after Ctrl-C, 1 for anything else the reader can mend.
        """
        if self.lab and in_cell(next(iter(self.experiments.values()))):
            self.lab.close()
        else:
            self.run(list(self.experiments.values()), sys.argv[1:] if arguments is None else arguments)

    def run(self, experiments: list[Experiment], arguments: Sequence[str]) -> None:
        """Run these experiments, and end every failure in one line and an exit code."""
        script = None if in_cell(experiments[0]) else Path(experiments[0].__code__.co_filename)
        name = script.stem if script else self.name
        options = parse(name, self.title, list(self.experiments), arguments)
        finished: list[str] = []
        before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
        try:
            if options.list:
                print("\n".join(f"{each.__name__}: {question_of(each)}" for each in experiments), flush=True)
                return
            options.out.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=options.out).close()  # rather now than after minutes of training
            with workers(options.jobs, options.dataset, Path(os.path.expanduser(options.data_dir))) as executor:
                if not in_notebook():
                    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers that inherit it could lose one
                if self.lab is None or self.lab.options != options:
                    self.lab = Lab(name, self.title, script, options)
                self.lab.order, self.lab.executor = list(self.experiments), executor
                for experiment in experiments:
                    if not options.only or experiment.__name__ in options.only:
                        self.lab.run(experiment)
                        finished.append(experiment.__name__)
                if script:
                    self.lab.close()
                sys.stdout.flush()
        except KeyboardInterrupt:
            fail(130, f"\ninterrupted; {', '.join(finished) or 'nothing'} finished, in {options.out}")
        except LessonError as error:
            fail(2, f"error: {error}")
        except BrokenProcessPool:
            fail(1, "error: a worker process was killed (out of memory?); try --jobs 1")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more when it ends
            fail(1, "error: the program that read the output has ended")
        except OSError as error:
            fail(1, f"error: {error.filename or options.out}: {error.strerror}; --out DIR chooses another place")
        finally:
            torch.set_num_threads(threads)
            if not in_notebook():
                signal.signal(signal.SIGTERM, before)


def in_cell(function: Experiment) -> bool:
    """Whether a function was defined in a cell of a notebook, not in a file that a notebook runs or imports."""
    return in_notebook() and function.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__")


def fail(code: int, message: str) -> NoReturn:
    """End with one line on stderr and an exit code."""
    print(message, file=sys.stderr)
    sys.exit(code)
