"""``flsplit bench steady``: whether memory and time stay the same over many steps and clients."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from flsplit.bench import training_app, workload
from flsplit.bench.figures import machine
from flsplit.bench.measuring_app import measuring

_SECONDS_PER_CLIENT_AND_STEP = 0.1  # far more than it takes

Curve = list[tuple[int, int]]
"""Steps done, and bytes of memory."""


def measure_steady(clients: int, steps: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Simulate many steps with the quickstart's network; return what the JSON file holds.

    Under ``memory`` are the bytes of the server's process and of each host after some steps,
    under ``peak`` the most that the server's process took, and ``round_s`` are the seconds from
    ``flwr run`` to the end of the round that all steps are in.
    """
    timeout = 300 + clients * steps * _SECONDS_PER_CLIENT_AND_STEP
    with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as folder:
        config = {"steps": steps, "workload": workload.QUICKSTART, "memory-dir": folder}
        with measuring("simulated", clients, training_app, timeout) as measure:
            say(f"{steps} steps of {clients} simulated clients")
            begun = time.time()
            measured = measure(config)
        memory = {"server": [(step, size) for step, size in measured["memory"]]}
        for number, path in enumerate(sorted(Path(folder).iterdir())):
            memory[f"host {number}"] = last_of_each_step(path.read_text())
    return {
        "clients": clients,
        "steps": len(measured["seconds"]),
        "median_s": statistics.median(measured["seconds"]),
        "round_s": measured["ended"] - begun,
        "peak": measured["peak"],
        "memory": memory,
        "machine": machine(),
    }


def last_of_each_step(text: str) -> Curve:
    """Return a host's curve; each of its clients has written a line per hundred steps."""
    pairs = [line.split() for line in text.splitlines()]
    return sorted({int(step): int(size) for step, size in pairs}.items())


def memory_table(measured: dict[str, Any]) -> Table:
    """Return the memory at some points of the run."""
    steps, milliseconds = measured["steps"], measured["median_s"] * 1000
    marks = (0, training_app.MEMORY_EVERY, steps // 2, steps)
    table = Table(
        title=f"Memory in MiB, {measured['clients']} clients; {milliseconds:.1f} ms per step, "
        f"{milliseconds / measured['clients']:.2f} ms per step and client; the round ended "
        f"{measured['round_s']:.0f} s after the start, server at most "
        f"{measured['peak'] / 2**20:.0f} MiB"
    )
    table.add_column("process")
    for mark in marks:
        table.add_column(f"step {mark}", justify="right")
    for name, curve in measured["memory"].items():
        sizes = [[size for step, size in curve if step <= mark][-1] for mark in marks]
        table.add_row(name, *(f"{size / 2**20:.1f}" for size in sizes))
    return table
