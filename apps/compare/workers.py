"""Worker processes that do jobs, each with one thread of torch."""

import logging
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import torch
from jobs import Job, Run
from training import Setting, train


class Workers:
    """Processes that start with the first job, and end where the ``with`` block is left.

    Parameters
    ----------
    setting : Setting
        What the jobs have in common.
    count : int
        How many processes, 0 for this one. What comes of a job does not depend on it.
    """

    def __init__(self, setting: Setting, count: int) -> None:
        self.setting, self._count = setting, count
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(max(count, 1), context, initializer=_prepare)

    def __enter__(self) -> "Workers":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the processes; where an exception passes by, Ctrl-C for instance, at once."""
        if kind:
            for process in multiprocessing.active_children():
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def run(self, jobs: list[Job]) -> Iterator[tuple[Job, Run]]:
        """Yield each job with what came of it, in the order in which they finish."""
        if not self._count:
            for job in jobs:
                with _prepared():
                    run = run_one(job, self.setting)
                yield job, run
            return
        with _workers_ignore_interrupts():
            waiting = {self._executor.submit(run_one, job, self.setting): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def run_one(job: Job, setting: Setting) -> Run:
    """Return a run; one that diverges has no accuracy, and is a result; another error is told."""
    try:
        return train(setting, job.method, job.rates, job.partition, job.seed, job.kind)
    except ArithmeticError as error:
        return {"accuracy": [0.0], "failed": str(error), "cpu-seconds": 0.0}
    except Exception as error:  # of a model or of data that are not ours
        return {"error": f"{type(error).__name__}: {error}"}


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)


@contextmanager
def _prepared() -> Iterator[None]:
    """Work as a worker does, in this process."""
    threads, level = torch.get_num_threads(), logging.getLogger("flwr").level
    _prepare()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.getLogger("flwr").setLevel(level)


@contextmanager
def _workers_ignore_interrupts() -> Iterator[None]:
    """Start workers that Ctrl-C does not reach: this process ends them itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the new processes
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
