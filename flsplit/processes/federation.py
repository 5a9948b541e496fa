"""Where apps run: a SuperLink with SuperNodes as processes, or one that simulates clients."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flsplit.processes.certificates import make_certificate_files, make_node_key
from flsplit.processes.flower_process import FlowerProcess
from flsplit.processes.flower_run import FinishedRun, FlowerRun, RunConfig
from flsplit.processes.home import FlowerHome
from flsplit.processes.supernode import SuperNode
from flsplit.processes.waiting import RUN_TIMEOUT, free_ports


@dataclass(frozen=True)
class Federation:
    """A SuperLink with its clients; it can run several apps, one after the other.

    Attributes
    ----------
    home : FlowerHome
        Whose ``flwr`` it answers to.
    superlink : FlowerProcess
        The SuperLink.
    supernodes : list of SuperNode
        In a deployment.
    config : list of str
        In a simulation, what ``flwr run --federation-config`` is told.
    """

    home: FlowerHome
    superlink: FlowerProcess
    supernodes: list[SuperNode] = field(default_factory=list)
    config: list[str] = field(default_factory=list)

    def start_app(
        self,
        app_dir: Path,
        run_config: RunConfig | None = None,
        federation_config: Iterable[str] = (),
    ) -> FlowerRun:
        """Start an app and return the run that is under way."""
        return FlowerRun(self.home, app_dir, run_config or {}, [*self.config, *federation_config])

    def run_app(
        self,
        app_dir: Path,
        run_config: RunConfig | None = None,
        federation_config: Iterable[str] = (),
        timeout: float = RUN_TIMEOUT,
    ) -> FinishedRun:
        """Run an app to its end."""
        return self.start_app(app_dir, run_config, federation_config).finish(timeout)


def simulation_config(num_supernodes: int) -> str:
    """Return the federation config for `num_supernodes` clients with one processor core each."""
    return f"num-supernodes={num_supernodes} client-resources-num-cpus=1"


@contextmanager
def simulation(
    path: Path, num_supernodes: int = 2, env: Mapping[str, str] | None = None
) -> Iterator[Federation]:
    """Start a SuperLink for simulations with its home in `path`."""
    with FlowerHome(path / "flwr-home", env) as home:
        superlink = home.start_simulation_superlink()
        yield Federation(home, superlink, config=[simulation_config(num_supernodes)])


@contextmanager
def deployment(
    path: Path,
    num_supernodes: int = 2,
    tls: bool = True,
    auth: bool = True,
    node_configs: Sequence[Mapping[str, Any]] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Federation]:
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
        yield Federation(home, superlink, supernodes)
