"""What is measured, as numbers, as a table and as JSON."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr
import grpc
import torch
from rich.table import Table

from flsplit.errors import FlsplitError


class BenchError(FlsplitError):
    """A measurement did not come about."""


@dataclass(frozen=True)
class Exchanges:
    """How long exchanges of one carrier took.

    Attributes
    ----------
    seconds : sequence of float
        One entry per exchange of all clients, warm-up left out.
    clients : int
        How many clients take part in each.
    floats : int
        Floats (4 bytes) per client, each way.
    hosts : int
        How many processes answer.
    """

    seconds: Sequence[float]
    clients: int
    floats: int
    hosts: int

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the figures for the JSON file."""
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "steps": len(self.seconds),
            "clients": self.clients,
            "floats": self.floats,
            "hosts": self.hosts,
        }


def carriers_table(carriers: Mapping[str, Exchanges]) -> Table:
    """Return the carriers' figures with their ratios to Flower's messages and to the echo."""
    table = Table(title="Seconds per exchange of all clients", caption=_sizes(carriers))
    table.add_column("carrier", no_wrap=True)
    for name in ("steps", "median", "min", "max", "Flower's / this", "this / echo"):
        table.add_column(name, justify="right")
    for name, one in carriers.items():
        faster, slower = ratios(carriers, name)
        table.add_row(
            *(name, str(len(one.seconds))),
            *(f"{value:.5f}" for value in (one.median, min(one.seconds), max(one.seconds))),
            "" if faster is None else f"{faster:.1f}",
            "" if slower is None else f"{slower:.2f}",
        )
    return table


def _sizes(carriers: Mapping[str, Exchanges]) -> str:
    """Return what the exchanges of each setting consist of."""
    settings = {name.rpartition("-")[2]: one for name, one in carriers.items()}
    return "\n".join(
        f"{setting}: {one.clients} clients on {one.hosts} hosts, {one.floats} floats each way"
        for setting, one in settings.items()
    )


def ratios(carriers: Mapping[str, Exchanges], name: str) -> tuple[float | None, float | None]:
    """Return how many times faster than Flower's messages, and slower than the echo, one is."""
    setting = name.rpartition("-")[2]
    flower, echo = carriers.get(f"flower-{setting}"), carriers.get(f"grpc-echo-{setting}")
    median = carriers[name].median
    faster = flower.median / median if flower else None
    slower = median / echo.median if echo else None
    return faster, slower


def carriers_json(carriers: Mapping[str, Exchanges]) -> dict[str, Any]:
    """Return all figures for the JSON file."""
    written = {}
    for name, one in carriers.items():
        faster, slower = ratios(carriers, name)
        more = {"times_faster_than_flower": faster, "times_the_echo": slower}
        written[name] = one.to_json() | {k: v for k, v in more.items() if v is not None}
    return {"carriers": written, "machine": machine()}


def steps_table(per_step: Mapping[str, Mapping[int, Sequence[float]]]) -> Table:
    """Return the seconds per local step, by name and number of clients."""
    counts = sorted({clients for figures in per_step.values() for clients in figures})
    table = Table(title="Seconds per step of one batch of each client: median (min to max)")
    table.add_column("")
    for clients in counts:
        table.add_column(f"{clients} client{'s' if clients > 1 else ''}", justify="right")
        table.add_column("times the floor", justify="right")
    for name, figures in per_step.items():
        cells = [name]
        for clients in counts:
            cells += _step_cells(figures.get(clients), per_step.get("floor", {}).get(clients))
        table.add_row(*cells)
    return table


def _step_cells(seconds: Sequence[float] | None, floor: Sequence[float] | None) -> list[str]:
    if not seconds:
        return ["", ""]
    median = statistics.median(seconds)
    times = f"{median / statistics.median(floor):.2f}" if floor else ""
    return [f"{median:.4f} ({min(seconds):.4f} to {max(seconds):.4f})", times]


def steps_json(
    per_step: Mapping[str, Mapping[int, Sequence[float]]], notes: Mapping[str, str]
) -> dict[str, Any]:
    """Return all figures for the JSON file."""

    def each(pick: Any) -> dict[str, dict[str, float]]:
        return {
            name: {str(clients): pick(seconds) for clients, seconds in figures.items()}
            for name, figures in per_step.items()
        }

    return {
        "seconds_per_step": each(statistics.median),
        "min_s": each(min),
        "max_s": each(max),
        "notes": dict(notes),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on: cores, system, versions."""
    return {
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grpc": grpc.__version__,
        "flwr": flwr.__version__,
    }


def num_cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write the JSON file, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n")
