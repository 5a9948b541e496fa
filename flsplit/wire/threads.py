"""Threads for the server's streams, which do not keep a finished program alive."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StreamThreads(Executor):
    """A pool of daemon threads.

    The interpreter waits for the threads of the standard `ThreadPoolExecutor` before it exits. A
    stream occupies a thread until it ends, so a program that raises while hosts are connected would
    hang there for ever, and its hosts with it.

    Parameters
    ----------
    max_workers : int
        The most threads; further work waits for one of them.
    name : str
        What the threads' names begin with.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers = max_workers
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` on a thread of the pool."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._busy += 1
            if self._busy > len(self._threads) < self._max_workers:
                self._start_thread()
        self._work.put(lambda: _run(future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads once their work is done."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._work.put(None)
        if wait:
            self.join(None)

    def join(self, timeout: float | None) -> None:
        """Wait for the threads to end, all of them together for `timeout` seconds at most."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            thread.join(left)

    def _start_thread(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            with self._lock:
                self._busy -= 1


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # whoever asked for the result gets it
        future.set_exception(error)
