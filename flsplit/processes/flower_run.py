"""A run that is under way on a SuperLink, and how it ended."""

import json
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flsplit.log import without_colours
from flsplit.processes.home import FlowerHome
from flsplit.processes.waiting import START_TIMEOUT, wait_until

RunConfig = Mapping[str, bool | int | float | str]

# Ray gives itself 30 s to start, which can't be changed; a busy or cold machine may need more.
RAY_DID_NOT_START = re.compile(
    r"The current node timed out during startup|Timed out waiting for file \S*gcs_server_port"
)
_ATTEMPTS = 3


@dataclass(frozen=True)
class FinishedRun:
    """How a run ended.

    Attributes
    ----------
    run_id : int or None
        Flower's id of the run; ``None`` if it was never started.
    status : str
        ``finished:completed``, ``finished:failed``, ``finished:stopped``; ``not-started`` if
        ``flwr run`` refused it; ``unknown`` if the SuperLink did not answer any more.
    details : str
        What Flower says about the status.
    log : str
        What ``flwr run --stream`` printed, without colours. The last lines before the end of a
        ServerApp may be missing.
    seconds : float
        The time from the call of ``flwr run`` to its end.
    """

    run_id: int | None
    status: str
    details: str
    log: str
    seconds: float

    @property
    def completed(self) -> bool:
        """Whether it ended as it should."""
        return self.status == "finished:completed"


class FlowerRun:
    """A run of an app that is under way on a home's SuperLink, and its log.

    A simulation in which Ray did not start in time has done nothing yet; it is started again,
    twice at most.

    Parameters
    ----------
    home : FlowerHome
        Where it runs.
    app : Path
        The app's folder.
    run_config : mapping, or strings as ``flwr run --run-config`` takes them
        What to change in the app's configuration.
    federation_config : iterable of str
        As ``flwr run --federation-config`` takes them.
    echo : callable, optional
        Called with each line of the log as it comes.
    """

    def __init__(
        self,
        home: FlowerHome,
        app: Path,
        run_config: RunConfig | Iterable[str] = (),
        federation_config: Iterable[str] = (),
        echo: Callable[[str], object] | None = None,
    ) -> None:
        if isinstance(run_config, Mapping):
            overrides = home.path / f"run-config-{uuid.uuid4().hex}.toml"
            # A string in JSON is one in TOML, and so are numbers and true and false.
            lines = [f"{json.dumps(k)} = {json.dumps(v)}\n" for k, v in run_config.items()]
            overrides.write_text("".join(lines))
            run_config = [str(overrides)] if run_config else []
        self._command = ["flwr", "run", str(app), "--stream"]
        for text in run_config:
            self._command += ["--run-config", text]
        for text in federation_config:
            self._command += ["--federation-config", text]
        self._home = home
        self._started = time.monotonic()
        self._lines: list[str] = []
        # Launched here and not by the thread: what is launched after the home has ended, stays.
        arguments = (self._launch(), echo or (lambda _line: None))
        self._reader = threading.Thread(target=self._read, args=arguments, daemon=True)
        self._reader.start()

    def _launch(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            env=self._home.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def _read(self, process: subprocess.Popen[str], echo: Callable[[str], object]) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            assert process.stdout is not None
            for line in process.stdout:
                self._lines.append(without_colours(line))
                echo(line)
            process.wait()
            if attempt == _ATTEMPTS or not RAY_DID_NOT_START.search(self.log):
                return
            again = "Ray did not start within its 30 s; starting the run again\n"
            echo(again)
            self._lines = [again]
            process = self._launch()

    @property
    def log(self) -> str:
        """What was streamed until now, without colours."""
        return "".join(self._lines)

    def wait_for_log(self, pattern: str, timeout: float = START_TIMEOUT) -> re.Match[str]:
        """Wait until the streamed log matches `pattern`; raise if the stream ends without it."""

        def ask() -> re.Match[str] | None:
            streaming = self._reader.is_alive()
            if not (match := re.search(pattern, self.log)) and not streaming:
                raise TimeoutError(f"the run ended without {pattern!r} in its log")
            return match

        try:
            return wait_until(ask, f"{pattern!r} in the log of the run", timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}, which ends:\n{self._tail}") from error

    @property
    def _tail(self) -> str:
        return "".join(self._lines[-15:])

    @property
    def run_id(self) -> int:
        """Flower's id of the run; waits until ``flwr run`` has told it."""
        return int(self.wait_for_log(r"started run (\d+)")[1])

    def stop(self) -> None:
        """Stop it with ``flwr stop``."""
        self._home.flwr("stop", str(self.run_id), check=True)

    def finish(self, timeout: float | None = None) -> FinishedRun:
        """Wait for its end and ask the SuperLink how it went.

        TimeoutError if it has not ended after `timeout` seconds.
        """
        left = None if timeout is None else timeout - (time.monotonic() - self._started)
        self._reader.join(None if left is None else max(left, 0.0))
        if self._reader.is_alive():
            raise TimeoutError(
                f"the run has not ended after {timeout:g} s; its log ends:\n{self._tail}"
            )
        seconds = time.monotonic() - self._started
        log = self.log
        if not (started := re.search(r"started run (\d+)", log)):
            return FinishedRun(None, "not-started", log.strip()[-2000:], log, seconds)
        run_id = int(started[1])

        def ask() -> tuple[str, str] | None:
            status, details = self._home.status(run_id)
            return (status, details) if status.startswith(("finished", "unknown")) else None

        # The stream can break off before the run does.
        left = 60.0 if timeout is None else max(timeout - seconds, 10.0)
        status, details = wait_until(ask, f"the end of run {run_id}", left, poll=0.5)
        return FinishedRun(run_id, status, details, log, seconds)
