"""Deployments: a SuperLink and SuperNodes as processes, with TLS and authentication."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flsplit.processes.certificates import make_certificate_files, make_node_key
from flsplit.processes.flower_process import FlowerProcess
from flsplit.processes.flower_run import FinishedRun, FlowerRun, RunConfig
from flsplit.processes.home import FlowerHome
from flsplit.processes.waiting import RUN_TIMEOUT, START_TIMEOUT, free_ports, wait_until


class SuperNode(FlowerProcess):
    """A SuperNode, the ClientApp processes that it starts, and how to disturb them.

    Attributes
    ----------
    node_id : int
        Flower's id of the node, once it was online.
    """

    node_id = 0
    _killed = False

    def start(self, wait: bool = True) -> None:
        """Start the process; unless told otherwise, wait until the SuperLink has taken it in."""
        super().start()
        if wait:
            self.wait_online()

    def wait_online(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until the SuperLink has taken it in.

        After a kill the SuperLink refuses the same key until it has noticed, which takes as long as
        a heartbeat lasts: up to 60 s. Until then the process ends, and is started again.
        """

        def ask() -> bool:
            try:
                online = self.wait_for_log(r"SuperNode ID: (\d+)", timeout)
            except RuntimeError as error:
                refused = self._killed and "Failed to activate SuperNode" in str(error)
                taken = "address already in use" in str(error)
                if not (refused or taken):
                    raise
                if taken:  # by somebody else, since the port was found free
                    self.command[self.command.index("--port") + 1] = str(free_ports(1)[0])
                self.start(wait=False)
                return False
            self.node_id = int(online[1])
            self._killed = False
            return True

        wait_until(ask, f"{self.name} to be taken in by the SuperLink", timeout, poll=1.0)

    def client_apps(self) -> list[int]:
        """Return the ids of its living ClientApp processes."""
        return self.tree.find("flwr-clientapp")

    def wait_for_client_app(self, timeout: float = START_TIMEOUT) -> int:
        """Wait until it has a living ClientApp process, and return that one's id."""
        return wait_until(self.client_apps, f"a ClientApp of {self.name}", timeout)[0]

    def kill_client_app(self, timeout: float = START_TIMEOUT) -> int:
        """End its ClientApp process with ``SIGKILL``, waiting for it if need be; return the id."""
        pid = self.wait_for_client_app(timeout)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in self.client_apps(), f"the end of {pid}", 10)
        return pid

    def pause_client_app(self, timeout: float = START_TIMEOUT) -> int:
        """Halt its ClientApp process (``SIGSTOP``); return the id, for ``SIGCONT``."""
        pid = self.wait_for_client_app(timeout)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def kill(self) -> None:
        """End it and its ClientApps at once."""
        super().kill()
        self._killed = True

    def restart(self) -> None:
        """Stop it, start it anew, and wait until it is back; after :meth:`kill`, use `start`."""
        self.stop()
        self.start()


@dataclass(frozen=True)
class Deployment:
    """A SuperLink and its SuperNodes."""

    home: FlowerHome
    superlink: FlowerProcess
    supernodes: list[SuperNode]

    def start_app(
        self,
        app_dir: Path,
        run_config: RunConfig | None = None,
        echo: Callable[[str], object] | None = None,
    ) -> FlowerRun:
        """Start an app and return the run that is under way."""
        return FlowerRun(self.home, app_dir, run_config or {}, echo=echo)

    def run_app(
        self,
        app_dir: Path,
        run_config: RunConfig | None = None,
        timeout: float = RUN_TIMEOUT,
    ) -> FinishedRun:
        """Run an app to its end."""
        return self.start_app(app_dir, run_config).finish(timeout)


@contextmanager
def deployment(
    path: Path,
    num_supernodes: int = 2,
    tls: bool = True,
    auth: bool = True,
    node_configs: Sequence[Mapping[str, Any]] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Deployment]:
    """Start a SuperLink and SuperNodes as processes, and wait until all are connected.

    Parameters
    ----------
    path : Path
        Where their homes, keys and logs lie.
    num_supernodes : int
        How many SuperNodes.
    tls : bool
        Whether the SuperLink has a certificate, for 127.0.0.1, which all others trust.
    auth : bool
        Whether SuperNodes show a key that was registered; needs `tls`.
    node_configs : sequence of mappings, optional
        The node config of each; ``partition-id`` and ``num-partitions`` by default.
    env : mapping, optional
        More environment variables for all processes.
    """
    if auth and not tls:
        raise ValueError("SuperNode authentication needs TLS: auth=True with tls=False")
    if node_configs is None:
        node_configs = [
            {"partition-id": i, "num-partitions": num_supernodes} for i in range(num_supernodes)
        ]
    if len(node_configs) != num_supernodes:
        raise ValueError(
            f"{num_supernodes} SuperNodes need as many node configs, got {node_configs}"
        )

    with FlowerHome(path / "flwr-home", env) as home:
        options, trust = ["--insecure"], ["--insecure"]
        certificate = None
        if tls:
            certificate, key = make_certificate_files(path / "certificates")
            options = ["--ssl-ca-certfile", str(certificate)]
            options += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            trust = ["--root-certificates", str(certificate)]
        if auth:
            options.append("--enable-supernode-auth")
        superlink = home.start_superlink(options, certificate)

        supernodes = []
        ports = free_ports(num_supernodes)
        for i, (port, config) in enumerate(zip(ports, node_configs, strict=True)):
            name = f"supernode-{i}"
            command = ["flower-supernode", "--superlink", f"127.0.0.1:{home.port}", *trust]
            command += ["--host", "127.0.0.1", "--port", str(port)]
            if config:
                pairs = [f"{name}={json.dumps(value)}" for name, value in config.items()]
                command += ["--node-config", " ".join(pairs)]
            if auth:
                private, public = make_node_key(path / "keys", name)
                home.flwr("supernode", "register", str(public), check=True)
                command += ["--auth-supernode-private-key", str(private)]
            # Each has a home of its own, as on machines of their own: all unpack the same app.
            node_env = {**home.env, "FLWR_HOME": str(path / f"{name}-home")}
            supernodes.append(SuperNode(name, command, node_env, home.log_path(name)))
        for supernode in supernodes:
            supernode.start(wait=False)
            home.started.append(supernode)
        for supernode in supernodes:
            supernode.wait_online()
        yield Deployment(home, superlink, supernodes)
