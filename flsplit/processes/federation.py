"""Simulations: a SuperLink that runs apps with simulated clients."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flsplit.processes.flower_process import FlowerProcess
from flsplit.processes.flower_run import FinishedRun, FlowerRun, RunConfig
from flsplit.processes.home import FlowerHome
from flsplit.processes.waiting import RUN_TIMEOUT


def simulation_config(num_supernodes: int) -> str:
    """Return the federation config for `num_supernodes` clients with one processor core each."""
    return f"num-supernodes={num_supernodes} client-resources-num-cpus=1"


@dataclass(frozen=True)
class Simulation:
    """A SuperLink for simulations; it can run several apps, one after the other."""

    home: FlowerHome
    superlink: FlowerProcess
    num_supernodes: int = 2

    def start_app(
        self,
        app_dir: Path,
        num_supernodes: int | None = None,
        run_config: RunConfig | None = None,
        federation_config: Iterable[str] = (),
        echo: Callable[[str], object] | None = None,
    ) -> FlowerRun:
        """Start an app and return the run that is under way."""
        federation = [simulation_config(num_supernodes or self.num_supernodes), *federation_config]
        return FlowerRun(self.home, app_dir, run_config or {}, federation, echo)

    def run_app(
        self,
        app_dir: Path,
        num_supernodes: int | None = None,
        run_config: RunConfig | None = None,
        federation_config: Iterable[str] = (),
        timeout: float = RUN_TIMEOUT,
    ) -> FinishedRun:
        """Run an app to its end."""
        run = self.start_app(app_dir, num_supernodes, run_config, federation_config)
        return run.finish(timeout)


@contextmanager
def simulation(
    path: Path, num_supernodes: int = 2, env: Mapping[str, str] | None = None
) -> Iterator[Simulation]:
    """Start a SuperLink for simulations with its home in `path`."""
    with FlowerHome(path / "flwr-home", env) as home:
        yield Simulation(home, home.start_simulation_superlink(), num_supernodes)
