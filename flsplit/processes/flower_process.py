"""One long-running process of Flower, with its log and all that it starts."""

import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from flsplit.log import without_colours
from flsplit.processes.tree import STOP_GRACE, ProcessTree
from flsplit.processes.waiting import START_TIMEOUT, wait_until


class FlowerProcess:
    """A long-running process of Flower (a SuperLink, a SuperNode), and all that it starts.

    ``name`` is what error messages call it.
    """

    def __init__(
        self, name: str, command: list[str], env: Mapping[str, str], log_path: Path
    ) -> None:
        self.name, self.command = name, command
        self._env, self._log_path = env, log_path

    def start(self) -> None:
        """Start it, or start it again after it has ended; `log` begins anew."""
        self.tree = ProcessTree()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                self.command,
                env={**self._env, **self.tree.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the process itself (not its children) is running."""
        return self._popen.poll() is None

    @property
    def log(self) -> str:
        """Its output until now, without colours."""
        text = self._log_path.read_bytes()[self._log_start :].decode(errors="replace")
        return without_colours(text)

    def check(self) -> None:
        """Raise with the last lines of the log if the process has ended."""
        if not self.alive:
            tail = "\n".join(self.log.splitlines()[-15:])
            raise RuntimeError(
                f"{self.name} ended with {self._popen.poll()}; its log ends:\n{tail}"
            )

    def wait_for_log(self, pattern: str, timeout: float = START_TIMEOUT) -> re.Match[str]:
        """Wait until the log matches `pattern`; raise if the process ends without it."""

        def ask() -> re.Match[str] | None:
            alive = self.alive
            if match := re.search(pattern, self.log):
                return match
            if not alive:
                self.check()
            return None

        return wait_until(ask, f"{pattern!r} in the log of {self.name}", timeout)

    def wait(self) -> None:
        """Wait until the process itself has ended."""
        self._popen.wait()

    def stop(self, grace: float = STOP_GRACE) -> None:
        """End it and its children as ``SIGTERM`` does, the hard way after `grace` seconds."""
        self.tree.stop(grace)
        self.wait()

    def kill(self) -> None:
        """End it and its children at once, as when the machine loses its power."""
        self.tree.stop(grace=0.0)
        self.wait()

    def pause(self) -> None:
        """Halt it and its children (``SIGSTOP``)."""
        self.tree.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it and its children go on (``SIGCONT``)."""
        self.tree.signal(signal.SIGCONT)
