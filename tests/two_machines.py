"""A second machine for Ray: a network namespace, which has no loopback interface in common."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from flsplit.processes import FlowerHome, FlowerProcess, free_ports, wait_until

OPTIONS = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@contextmanager
def second_machine() -> Iterator[tuple[str, str, list[str]]]:
    """Yield this machine's address, the other's, and what runs a command there; root only."""
    name, link = f"flsplit-{os.getpid()}", f"fl{os.getpid()}"
    network = f"10.231.{os.getpid() % 256}"
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("a network namespace needs root and iproute2")
    try:
        _ip(f"netns add {name}")
        _ip(f"link add {link}a type veth peer name {link}b netns {name}")
        _ip(f"address add {network}.1/24 dev {link}a")
        _ip(f"link set {link}a up")
        for rest in (
            f"address add {network}.2/24 dev {link}b",
            f"link set {link}b up",
            "link set lo up",
        ):
            _ip(f"-n {name} {rest}")
        yield f"{network}.1", f"{network}.2", ["ip", "netns", "exec", name]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace here: {error.stderr.decode().strip()}")
    finally:
        for rest in (f"link delete {link}a", f"netns delete {name}"):
            with suppress(subprocess.CalledProcessError):
                _ip(rest)


@contextmanager
def ray_on_two_machines(path: Path) -> Iterator[tuple[str, FlowerProcess]]:
    """Start Ray on both, with one core each; yield its address, and Ray on the other machine."""
    with second_machine() as (here, there, run_there), FlowerHome(path / "ray-home") as home:
        address = f"{here}:{free_ports(1)[0]}"
        start = [shutil.which("ray", path=home.env["PATH"]) or "ray", "start", *OPTIONS]
        port = address.rpartition(":")[2]
        head = [
            "--head",
            f"--node-ip-address={here}",
            f"--port={port}",
            "--include-dashboard=false",
        ]
        first = home.start("ray-head", [*start, *head])
        first.wait_for_log("Ray runtime started")
        join = [f"--address={address}", f"--node-ip-address={there}"]
        second = home.start("ray-other", [*run_there, *start, *join])
        second.wait_for_log("Ray runtime started")
        wait_until(lambda: second.alive, "Ray on the other machine", 10)
        yield address, second
