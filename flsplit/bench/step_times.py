"""``flsplit bench train``: what a training step takes, beside a plain torch loop."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from flwr.app import UserConfig
from torch.nn import functional

from flsplit.bench import training_app, workload
from flsplit.bench.measuring_app import measuring
from flsplit.carry.local_grid import LocalGrid
from flsplit.log import logger

NVFLARE = "2.9.0"

PerStep = dict[str, dict[int, Sequence[float]]]


def measure_training(
    clients: Sequence[int], steps: int, say: Callable[[str], object], names: Sequence[str]
) -> tuple[PerStep, dict[str, str]]:
    """Return the seconds per step by name and number of clients, and notes on what is missing.

    ``names`` are some of ``MEASURES``.
    """
    per_step: PerStep = {}
    notes: dict[str, str] = {}
    for name in names:
        for count in clients:
            say(f"measuring {name}, {count} clients, {steps} steps")
            if seconds := MEASURES[name](count, steps, notes):
                per_step.setdefault(name, {})[count] = seconds
    return per_step, notes


def measure_floor(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train the whole model on batches of the clients, one after the other, in a plain loop."""
    with _one_thread():
        torch.manual_seed(0)
        model = workload.network(workload.IMAGES)
        optimizer = torch.optim.Adam(model.parameters(), lr=workload.LR)
        data = [workload.partition(workload.IMAGES, one, clients).tensors for one in range(clients)]
        seconds = []
        for _ in range(training_app.WARM_UP + steps):
            started = time.perf_counter()
            for images, labels in data:
                rows = torch.randperm(len(labels))[: workload.BATCH_SIZE]
                optimizer.zero_grad(set_to_none=True)
                loss = functional.cross_entropy(model(images[rows]), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            seconds.append(time.perf_counter() - started)
    return seconds[training_app.WARM_UP :]


def measure_local(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train over LocalGrid: all clients and the server in this process."""
    config: UserConfig = {**training_app.CONFIG, "clients": clients, "steps": steps}
    with _one_thread():
        grid = LocalGrid(training_app.client_app(), clients, run_config=config, progress=False)
        return training_app.train(grid, config).seconds()


def measure_session(setting: str, clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train over a session with as many SuperNodes, deployed or simulated on a core per host."""
    with measuring(setting, clients, training_app) as measure:
        return list(measure({"steps": steps})["seconds"])


def measure_nvflare(clients: int, steps: int, notes: dict[str, str]) -> list[float]:
    """Train the same halves in NVFlare's Collab simulator, where that is installed."""
    try:
        found = version("nvflare")
    except PackageNotFoundError:
        found = ""
    if found != NVFLARE:
        here = f"{found} is" if found else "it is not"
        notes["nvflare"] = f"not measured: it needs nvflare=={NVFLARE}, {here} installed"
        return []
    from flsplit.bench.nvflare_app import measure

    with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as temporary:
        return measure(clients, steps, Path(temporary))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as each process of the other measurements does, and leave out the run's log."""
    threads, level = torch.get_num_threads(), logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


MEASURES: dict[str, Callable[[int, int, dict[str, str]], list[float]]] = {
    "floor": measure_floor,
    "local": measure_local,
    "session-deployed": partial(measure_session, "deployed"),
    "session-simulated": partial(measure_session, "simulated"),
    "nvflare": measure_nvflare,
}
