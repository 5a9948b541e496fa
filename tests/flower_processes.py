"""Real Flower processes for tests: those of ``flsplit.processes``, and where the repository is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flsplit.processes import (
    FlowerHome,
    FlowerRun,
    ProcessTree,
    deployment,
    simulation,
    tree,
    wait_until,
)
from flsplit.processes.certificates import make_node_key

__all__ = [
    "REPOSITORY",
    "FlowerHome",
    "FlowerRun",
    "ProcessTree",
    "deployment",
    "flower_home",
    "make_node_key",
    "simulation",
    "tree",
    "wait_until",
]

REPOSITORY = Path(__file__).resolve().parents[1]


@contextmanager
def flower_home(path: Path, env: Mapping[str, str] | None = None) -> Iterator[FlowerHome]:
    """Give a Flower home in ``path/flwr-home`` with ports of its own; nothing runs in it yet."""
    with FlowerHome(path / "flwr-home", env) as home:
        yield home
