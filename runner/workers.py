"""The processes that train, and what a run claims of this process and gives back."""

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from common.data import FOLDER, load, reason
from runner.notebooks import in_notebook

EVERY = 10  # seconds between two lines that tell how far the trainings are, where there is no terminal for a bar


def warm_up(dataset: str, folder: Path) -> None:
    """Pay once, before any worker is forked, for what every run needs: the data and PyTorch's optimisers."""
    torch.set_num_threads(1)  # parallel runs, each on one thread, beat one run on many at these sizes
    load(dataset, folder)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


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
    Linux, spawned elsewhere, and ended at once if the body raises, Ctrl-C included. For 0, or where no process can be
    started, a thread of this process. Raises BrokenProcessPool, which says how, when a process ends by itself.
    """
    warm_up(dataset, folder)
    readers_own = multiprocessing.active_children()
    pool = start_pool(jobs, dataset, folder) if jobs else None
    if pool is None:
        pool = ThreadPoolExecutor(1)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # what is in progress ends first
        return
    processes = started_since(readers_own)
    try:
        yield pool
    except BrokenProcessPool as error:
        pool.shutdown(cancel_futures=True)  # then it is known how they ended
        raise BrokenProcessPool(death(processes)) from error
    except BaseException:
        for process in started_since(readers_own):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_pool(jobs: int, dataset: str, folder: Path) -> Executor | None:
    """Processes, all started, or None and a line on stderr where the system starts none."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    readers_own = multiprocessing.active_children()
    gc.freeze()  # what is there now stays: the collector need not look at it, nor a worker copy it
    try:
        pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(dataset, folder))
        pool.submit(int).result()  # fork now, while this process has no other thread
        return pool
    except (OSError, ImportError, NotImplementedError, BrokenProcessPool) as error:  # no shared memory, a limit, …
        for process in started_since(readers_own):  # before the limit
            process.terminate()
        print(f"no worker process can be started ({reason(error)}); one training at a time, here", file=sys.stderr)
        return None
    finally:
        gc.unfreeze()


def started_since(before: list[BaseProcess]) -> list[BaseProcess]:
    """The child processes of this one that run, but for those from `before`."""
    return [each for each in multiprocessing.active_children() if each not in before]


def death(processes: list[BaseProcess]) -> str:
    """How a worker process ended, in a line."""
    codes = [process.exitcode for process in processes if process.exitcode not in (None, 0, -signal.SIGTERM)]
    if not codes:
        return "a worker process was ended by somebody, or sent what cannot be read"
    code = codes[0]
    how = f"with exit code {code}" if code > 0 else f"by signal {-code} ({signal.strsignal(-code)})"
    return f"a worker process ended {how}{'; out of memory? try --jobs 1' if code == -9 else ''}"


@contextmanager
def state_kept() -> Iterator[None]:
    """Put back what a run changes in this process: PyTorch's threads, its random numbers and the answer to SIGTERM."""
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    answer = signal.getsignal(signal.SIGTERM)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)
        if not in_notebook():
            signal.signal(signal.SIGTERM, answer)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other run write to a folder; raises Timeout if one does. However a run ends, its claim ends with it."""
    claim = folder / ".lock"
    with FileLock(claim, timeout=0):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows lets nobody delete what is open, and does so itself
                claim.unlink()


def answer(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, in a worker; an error that cannot be pickled and sent back is raised again as text."""
    try:
        return function(*arguments)
    except BaseException as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError("".join(format_exception(error))) from None
        raise


def wait_for(futures: Sequence[Future], name: str) -> None:
    """Wait until all are done, or one fails, with a bar; without a terminal with a line now and then."""
    pending, told = set(futures), time.monotonic()
    with tqdm(desc=name, total=len(futures), leave=False, disable=None) as bar:
        while pending:
            done, pending = wait(pending, EVERY, "FIRST_COMPLETED")
            for future in done:
                future.result()
            bar.update(len(done))
            if bar.disable and time.monotonic() - told >= EVERY:
                told = time.monotonic()
                print(f"{name}: {len(futures) - len(pending)} of {len(futures)} trainings", file=sys.stderr)
