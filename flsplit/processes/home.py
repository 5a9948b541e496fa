"""A Flower home: the folder, ports and processes of one installation of Flower."""

import json
import os
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from flsplit.processes import tree
from flsplit.processes.flower_process import FlowerProcess
from flsplit.processes.tree import ProcessTree
from flsplit.processes.waiting import START_TIMEOUT, free_ports, wait_until
from flsplit.storage import FolderLock


class FlowerHome:
    """A Flower home (``FLWR_HOME``) with processes that end with it.

    Use it as a context manager: when it is left, every process that was started in it is stopped,
    with all its children.

    Parameters
    ----------
    path : Path
        The folder; made if it is not there.
    env : mapping, optional
        More environment variables for the processes.
    """

    def __init__(self, path: Path, env: Mapping[str, str] | None = None) -> None:
        self.path = path.resolve()
        self.tree = ProcessTree()
        # Ray puts sockets below this folder, whose paths must be short.
        short = "/tmp" if os.access("/tmp", os.W_OK) else None
        self._scratch = tempfile.mkdtemp(prefix="flsplit-ray-", dir=short)
        self._in_use = FolderLock(Path(self._scratch))
        self._in_use.take()
        self.port, control_port = free_ports(2)
        self.env = {
            # What a user has set for these counts.
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's default of 15 lets simulated clients wait behind everything else that runs here.
            "RAY_worker_niceness": "0",
            **os.environ,
            # Flower starts its own programs by name.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.path),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
            # A cluster that happens to run here is not found from there, so a simulation lands on
            # one only if RAY_ADDRESS names it.
            "RAY_TMPDIR": self._scratch,
            "PYTHONIOENCODING": "utf-8",
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
            **self.tree.env,
        }
        self._guard: subprocess.Popen[bytes] | None = None
        self.started: list[FlowerProcess] = []
        """What is waited for at the end."""

    def __enter__(self) -> Self:
        """Make the folder and start the guard."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._guard = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", tree.__file__),
                *(self.tree.mark, str(os.getsid(0)), self._scratch),
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop everything that was started here, and wait until it is gone."""
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        for process in self.started:
            process.wait()
        self._in_use.release()

    def start(self, name: str, command: list[str]) -> FlowerProcess:
        """Start a process in this home; its output goes to ``logs/<name>.log``."""
        process = FlowerProcess(name, command, self.env, self.log_path(name))
        process.start()
        self.started.append(process)
        return process

    def log_path(self, name: str) -> Path:
        """Return where the output of a process goes."""
        return self.path / "logs" / f"{name}.log"

    def start_superlink(
        self, options: list[str], root_certificates: Path | None = None
    ) -> FlowerProcess:
        """Start a SuperLink on this home's port, wait until it answers, and tell ``flwr`` of it.

        ``root_certificates`` is what ``flwr`` trusts; without TLS by default.
        """
        address = ["--host", "127.0.0.1", "--port"]
        for attempt in (1, 2, 3):
            command = ["flower-superlink", *address, str(self.port), *options]
            superlink = self.start("superlink", command)
            answers = partial(self._answers, superlink, root_certificates)
            try:
                wait_until(answers, "the SuperLink", START_TIMEOUT)
            except RuntimeError:
                superlink.kill()
                # Somebody else may have taken the port since it was found free.
                if attempt == 3 or "address already in use" not in superlink.log:
                    raise
                [self.port] = free_ports(1)
                self.env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(self.port)
            else:
                break
        trust = "insecure = true"
        if root_certificates:
            trust = f"root-certificates = {json.dumps(str(root_certificates))}"
        (self.path / "config.toml").write_text(
            '[superlink]\ndefault = "own"\n\n'
            f'[superlink.own]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        )
        return superlink

    def _answers(self, superlink: FlowerProcess, root_certificates: Path | None) -> bool:
        superlink.check()
        url, context = f"http://127.0.0.1:{self.port}/health", None
        if root_certificates:
            url = url.replace("http:", "https:")
            context = ssl.create_default_context(cafile=root_certificates)
        try:
            with urllib.request.urlopen(url, timeout=5, context=context) as reply:
                # Alive: otherwise it was somebody else's who answered on this port.
                return bool(reply.status == 200) and superlink.alive
        except OSError:
            return False

    def start_simulation_superlink(self) -> FlowerProcess:
        """Start the SuperLink that ``flwr run`` would start for simulations."""
        return self.start_superlink(["--insecure", "--simulation"])

    def flwr(self, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Call ``flwr`` in this home."""
        done = subprocess.run(
            ["flwr", *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            check=False,
        )
        if check and done.returncode != 0:
            output = (done.stdout + done.stderr).strip()
            raise RuntimeError(f"flwr {' '.join(arguments)} ended with {done.returncode}: {output}")
        return done

    def status(self, run_id: int) -> tuple[str, str]:
        """Return a run's status and its details as ``flwr ls`` tells them."""
        answer = self.flwr("ls", "--run-id", str(run_id), "--format", "json")
        try:
            run = json.loads(answer.stdout)["runs"][0]
            return run["status"], run["status-details"]
        except (ValueError, LookupError):
            return "unknown", (answer.stdout + answer.stderr).strip()
