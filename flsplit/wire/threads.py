"""Threads for the server's streams, which do not keep a finished program alive."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StreamThreads(Executor):
    """Runs each call on a daemon thread of its own; who uses it limits how many there are.

    The interpreter waits for the threads of the standard `ThreadPoolExecutor` before it exits. A
    stream occupies a thread until it ends, so a program that raises while hosts are connected would
    hang there for ever, and its hosts with it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: set[threading.Thread] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` on a new thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # whoever asked for the result gets it
                future.set_exception(error)
            self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._threads.add(thread)
        thread.start()
        return future

    def join(self, timeout: float) -> None:
        """Wait for the threads to end, all of them together for `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
