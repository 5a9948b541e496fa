"""``flsplit bench train``: what a training step takes, beside a plain torch loop."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from flwr.app import UserConfig
from torch import Tensor
from torch.nn import functional

from flsplit.bench import training, workload
from flsplit.bench.app_folder import check_completed, write_app
from flsplit.carry.local import LocalGrid
from flsplit.client.data import Order
from flsplit.log import logger
from flsplit.message.round_plan import RoundPlan
from flsplit.processes import FinishedRun, deployment, simulation

NVFLARE = "2.9.0"

PerStep = dict[str, dict[int, Sequence[float]]]
Say = Callable[[str], object]

_RUN_TIMEOUT = 900.0


def measure_training(
    clients: Sequence[int], steps: int, say: Say, names: Sequence[str]
) -> tuple[PerStep, dict[str, str]]:
    """Return the seconds per step by name and number of clients, and notes on what is missing.

    Parameters
    ----------
    clients : sequence of int
        Numbers of clients.
    steps : int
        Steps to measure for each.
    say : callable
        Told what is going on.
    names : sequence of str
        Which to measure, of ``MEASURES``.
    """
    per_step: PerStep = {name: {} for name in names}
    notes: dict[str, str] = {}
    for name in names:
        for count in clients:
            say(f"measuring {name}, {count} clients, {steps} steps")
            seconds = MEASURES[name](count, steps, notes)
            if seconds:
                per_step[name][count] = seconds
    return {name: figures for name, figures in per_step.items() if figures}, notes


def measure_floor(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train the whole model on the clients' batches, one after the other, in a plain loop."""
    with _one_thread():
        torch.manual_seed(0)
        model = workload.network(workload.IMAGES)
        optimizer = torch.optim.Adam(model.parameters(), lr=workload.LR)
        batches = _Batches(clients, training.WARM_UP + steps)
        seconds = []
        for step in range(training.WARM_UP + steps):
            started = time.perf_counter()
            for client in range(clients):
                images, labels = batches.get(client, step)
                optimizer.zero_grad(set_to_none=True)
                functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            seconds.append(time.perf_counter() - started)
    return seconds[training.WARM_UP :]


class _Batches:
    """The batches that clients of a run over some carrier train on."""

    def __init__(self, clients: int, steps: int) -> None:
        self._data = [
            workload.partition(workload.IMAGES, client, clients).tensors
            for client in range(clients)
        ]
        self._orders = [Order(len(data[1]), 0, str(i)) for i, data in enumerate(self._data)]
        self._drawn = [0] * clients
        self._plan = RoundPlan(
            server_round=1,
            num_rounds=1,
            cut=workload.CUT,
            segment_version=0,
            seed=0,
            lr=workload.LR,
            batch_size=workload.BATCH_SIZE,
            local_epochs=1,
            local_steps=steps,
            drop_last=True,
        )

    def get(self, client: int, step: int) -> tuple[Tensor, Tensor]:
        images, labels = self._data[client]
        rows, self._drawn[client] = self._orders[client].batch(
            self._plan, step, self._drawn[client]
        )
        return images[rows], labels[rows]


def measure_local(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train over LocalGrid: all clients and the server in this process."""
    config: UserConfig = {**training.CONFIG, "clients": clients, "steps": steps}
    with _one_thread(), _quiet():
        grid = LocalGrid(training.client_app(), clients, run_config=config, progress=False)
        return training.train(grid, config).seconds()


def measure_deployed(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train over a session with as many SuperNodes."""
    with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as temporary:
        folder = Path(temporary)
        with deployment(folder / "flower", clients) as flower:
            measured = run_training(
                folder,
                {"clients": clients, "steps": steps},
                lambda app, config: flower.run_app(app, config, timeout=_RUN_TIMEOUT),
            )
    return list(measured["seconds"])


def measure_simulated(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train over a session with as many simulated clients, one core per host."""
    with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as temporary:
        folder = Path(temporary)
        with simulation(folder / "flower") as flower:
            measured = run_training(
                folder,
                {"clients": clients, "steps": steps},
                lambda app, config: flower.run_app(app, clients, config, timeout=_RUN_TIMEOUT),
            )
    return list(measured["seconds"])


def run_training(
    folder: Path,
    config: Mapping[str, Any],
    run: Callable[[Path, Mapping[str, Any]], FinishedRun],
) -> Any:
    """Run the app that measures training, and return what its ServerApp has written."""
    name = f"{training.__name__}:"
    app = write_app(folder / "app", f"{name}client_app", f"{name}server_app", training.CONFIG)
    output = folder / "measured.json"
    check_completed(run(app, {**config, "output": str(output)}), "training")
    return json.loads(output.read_text())


def measure_nvflare(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train the same halves in NVFlare's Collab simulator, where that is installed."""
    if (found := _nvflare_version()) != NVFLARE:
        here = f"{found} is" if found else "it is not"
        notes["nvflare"] = f"not measured: it needs nvflare=={NVFLARE}, {here} installed"
        return []
    from flsplit.bench.nvflare_app import measure

    with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as temporary:
        return measure(clients, steps, Path(temporary))


def _nvflare_version() -> str:
    try:
        return version("nvflare")
    except PackageNotFoundError:
        return ""


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the strategy's log, which a run prints on its own terminal, out of the figures."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


MEASURES: dict[str, Callable[[int, int, dict[str, str]], list[float]]] = {
    "floor": measure_floor,
    "local": measure_local,
    "session-deployed": measure_deployed,
    "session-simulated": measure_simulated,
    "nvflare": measure_nvflare,
}
