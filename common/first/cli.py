"""The command line that all six lessons share, and the one line that every failure ends in."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from common.first.data import DATASETS, FOLDER, LessonError
from common.first.experiment import workers
from common.first.lab import Lab, Larger, Settings, in_notebook, question_of

ROOT = Path(__file__).resolve().parents[2]
QUICK_SEEDS = 2


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def whole_number(least: int) -> Callable[[str], int]:
    """A converter to a whole number of at least `least`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return convert


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_jobs(asked: int | None, device: str) -> int:
    """Runs at a time: one per core on the CPU; one where processes would not help (a GPU) or could not be started
    (a notebook where they are spawned: they cannot import its cells).
    """
    if device != "cpu" or (in_notebook() and sys.platform != "linux"):
        return 1
    return asked or available_cores()


def choose_device(name: str) -> str:
    """The device for `--device`: auto is the CPU, which is all that digits need.

    Raises LessonError for a device this PyTorch does not have.
    """
    if name == "auto":
        return "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and (kind != "cuda" or not index.isdecimal())):
        raise LessonError(f"argument --device: {name!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise LessonError("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise LessonError(f"argument --device: {name} asked for, {torch.cuda.device_count()} CUDA devices are here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise LessonError("argument --device: PyTorch finds no MPS device here; use --device cpu")
    return name


def parse(lesson: str, title: str, names: Sequence[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises SystemExit(2) with one line on stderr for anything it does not understand."""
    parser = OneLineParser(prog=f"{lesson}.py", description=title)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two seeds, tiny; judges nothing")
    parser.add_argument("--seeds", type=whole_number(1), metavar="N", help="paired seeds for each arm (default 10)")
    parser.add_argument("--first-seed", type=whole_number(0), default=0, metavar="S", help="the first seed (default 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these experiments only")
    parser.add_argument("--list", action="store_true", help="list the experiments and their questions")
    sets = f"one of: {', '.join(DATASETS)} (default digits); or a file of your own, NAME.npz"
    parser.add_argument("--dataset", default="digits", metavar="NAME", help=sets)
    parser.add_argument("--data-dir", type=Path, default=FOLDER, help="where downloaded data sets are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    parser.add_argument(
        "--jobs", type=whole_number(1), metavar="N", help="runs at a time on the CPU (default: one per core)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs", metavar="DIR", help="where results are written")
    options = parser.parse_args(arguments)
    if options.dataset not in DATASETS and not options.dataset.endswith(".npz"):
        parser.error(f"argument --dataset: {options.dataset!r} is not one of {', '.join(DATASETS)}, nor an .npz file")
    for name in options.only or []:
        if name not in names:
            parser.error(f"argument --only: no experiment {name!r}; there are {', '.join(names)}")
    try:
        options.device = choose_device(options.device)
    except LessonError as error:
        parser.error(str(error))
    return options


def prepare_folder(folder: Path) -> None:
    """Make the folder and try that it can be written to. Raises LessonError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LessonError(f"argument --out: cannot write to {folder} ({error.strerror}); choose another") from None


def run_lesson(
    lesson: str,
    title: str,
    experiments: Sequence[Callable[[Lab], None]],
    larger: Larger,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run the lesson's experiments as the command line asks, and end every failure in one line and an exit code.

    larger: the sizes for every data set but the digits.
    arguments: the command line's words; None reads them from the command line, or means none in a notebook, whose
        kernel has arguments of its own.

    Raises SystemExit: 2 for a wrong value, 130 after Ctrl-C, 1 for anything else the reader can mend.
    """
    if arguments is None and in_notebook():
        arguments = []
    names = [experiment.__name__ for experiment in experiments]
    options = parse(lesson, title, names, arguments)
    console = Console()
    if options.list:
        for experiment in experiments:
            console.print(f"{experiment.__name__}: {question_of(experiment)}", markup=False, highlight=False)
        return
    chosen = [each for each in experiments if not options.only or each.__name__ in options.only]
    larger = Larger() if options.dataset == "digits" else larger
    count = options.seeds or (QUICK_SEEDS if options.quick else larger.seeds)
    seeds = list(range(options.first_seed, options.first_seed + count))
    jobs = choose_jobs(options.jobs, options.device)
    out = options.out.expanduser() / lesson
    settings = Settings(lesson, title, options.dataset, seeds, options.device, jobs, options.quick, out, larger)
    finished: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        prepare_folder(out)
        with workers(jobs, options.dataset, options.data_dir.expanduser()) as executor:
            if not in_notebook():
                # so that the workers are ended, too; not earlier, since one that inherits this can lose a SIGTERM
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            lab = Lab(settings, names, console, executor)
            console.print(
                f"{title}\n{options.dataset}, seeds {seeds[0]}–{seeds[-1]}, {options.device}, {jobs} at a time\n"
            )
            for experiment in chosen:
                lab.run(experiment)
                finished.append(experiment.__name__)
            lab.close()
    except KeyboardInterrupt:
        fail(130, f"interrupted; {', '.join(finished) or 'nothing'} finished, in {out}")
    except LessonError as error:
        fail(2, str(error))
    except BrokenProcessPool:
        fail(1, "a worker process was killed (out of memory?); try --jobs 1")
    except OSError as error:
        fail(1, f"{error.filename or out}: {error.strerror}")
    finally:
        if not in_notebook():
            signal.signal(signal.SIGTERM, before)


def fail(code: int, message: str) -> NoReturn:
    """End with one line on stderr and an exit code."""
    print(f"\n{message}" if code == 130 else f"error: {message}", file=sys.stderr)
    sys.exit(code)
