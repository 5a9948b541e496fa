"""Gates: where a real run waits until the test lets it go on.

A gate is a named pipe. Whoever comes to it opens it for reading, which blocks until the test has
opened it for writing and closed it again. Without a pipe of that name, everybody passes.
"""

import errno
import os
import shutil
from pathlib import Path

from flsplit.processes import wait_until
from tests.e2e.local_quickstart import QUICKSTART

PASSING = '''"""Where the run waits until the test lets it go on."""

from pathlib import Path

FOLDER = Path({folder!r})


def pass_gate(name):
    """Wait if there is a gate of that name."""
    try:
        with (FOLDER / name).open() as gate:
            gate.read()
    except FileNotFoundError:
        pass


def at_each_step(message, context, call_next):
    """Pass a gate before a client step; a Flower mod."""
    if message.metadata.message_type == "train.step":
        client, step = context.node_config["partition-id"], message.content["step"]
        pass_gate(f"client-{{client}}-round-{{step['server-round']}}-step-{{step['step']}}")
    return call_next(message, context)
'''

OPTIMIZER = "optimizer=partial(SGD, momentum=0.9)"


class Gates:
    """A copy of the quickstart whose clients can be held at chosen steps."""

    def __init__(self, path: Path) -> None:
        self.app, self._folder = path / "gated-quickstart", path / "gates"
        self._folder.mkdir()
        shutil.copytree(QUICKSTART, self.app)
        package = self.app / "quickstart"
        (package / "gates.py").write_text(PASSING.format(folder=str(self._folder)))
        source = (package / "client_app.py").read_text()
        assert source.count(OPTIMIZER) == 1
        source = source.replace(OPTIMIZER, f"{OPTIMIZER}, mods=[at_each_step]")
        (package / "client_app.py").write_text(
            source.replace("from quickstart.task", "from quickstart.gates import at_each_step\n"
                           "from quickstart.task")
        )  # fmt: skip

    def before_step(self, client: int, server_round: int, step: int = 1) -> "Gate":
        """Put a gate in front of a client's step of a round."""
        return Gate(self._folder / f"client-{client}-round-{server_round}-step-{step}")


class Gate:
    """One gate: closed from the beginning, opened once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        os.mkfifo(path)

    def wait(self, timeout: float = 300.0) -> None:
        """Wait until somebody stands in front of it."""
        self._fd = wait_until(self._somebody, f"somebody at {self._path.name}", timeout)

    def open(self) -> None:
        """Let pass who waits, and everybody after."""
        self._path.unlink()
        os.close(self._fd)

    def _somebody(self) -> int | None:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody has opened it for reading
                raise
            return None
