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
from flsplit.log import counted


class BenchError(FlsplitError):
    """A measurement did not come about."""


@dataclass(frozen=True)
class Exchanges:
    """How long exchanges of one carrier took."""

    seconds: Sequence[float]  # one entry per exchange of all clients, warm-up left out
    clients: int  # how many clients take part in each
    floats: int  # floats (4 bytes) per client, each way
    hosts: int  # how many processes answer

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)


def carriers_table(carriers: Mapping[str, Exchanges]) -> Table:
    """Return the carriers' figures with their ratios to Flower's messages and to the echo."""
    settings = {name.rpartition("-")[2]: one for name, one in carriers.items()}
    sizes = (
        f"{setting}: {one.clients} clients on {one.hosts} hosts, {one.floats} floats each way"
        for setting, one in settings.items()
    )
    table = Table(title="Seconds per exchange of all clients", caption="\n".join(sizes))
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


def ratios(carriers: Mapping[str, Exchanges], name: str) -> tuple[float | None, float | None]:
    """Return how many times faster than Flower's messages, and slower than the echo, one is."""
    setting = name.rpartition("-")[2]
    flower, echo = carriers.get(f"flower-{setting}"), carriers.get(f"grpc-echo-{setting}")
    median = carriers[name].median
    return flower.median / median if flower else None, median / echo.median if echo else None


def carriers_json(carriers: Mapping[str, Exchanges]) -> dict[str, Any]:
    """Return all figures for the JSON file."""
    written: dict[str, dict[str, Any]] = {}
    for name, one in carriers.items():
        faster, slower = ratios(carriers, name)
        written[name] = {
            "median_s": one.median,
            "min_s": min(one.seconds),
            "max_s": max(one.seconds),
            "steps": len(one.seconds),
            "clients": one.clients,
            "floats": one.floats,
            "hosts": one.hosts,
        }
        if faster is not None:
            written[name]["times_faster_than_flower"] = faster
        if slower is not None:
            written[name]["times_the_echo"] = slower
    return {"carriers": written, "machine": machine()}


def steps_table(per_step: Mapping[str, Mapping[int, Sequence[float]]]) -> Table:
    """Return the seconds per local step, by name and number of clients."""
    counts = sorted({clients for figures in per_step.values() for clients in figures})
    table = Table(title="Seconds per step of one batch of each client: median (min to max)")
    table.add_column("")
    for clients in counts:
        table.add_column(counted(clients, "client"), justify="right")
        table.add_column("times the floor", justify="right")
    floor = per_step.get("floor", {})
    for name, figures in per_step.items():
        cells = [name]
        for clients in counts:
            if seconds := figures.get(clients):
                median = statistics.median(seconds)
                cells.append(f"{median:.4f} ({min(seconds):.4f} to {max(seconds):.4f})")
            else:
                cells.append("")
            known = seconds and clients in floor
            cells.append(f"{median / statistics.median(floor[clients]):.2f}" if known else "")
        table.add_row(*cells)
    return table


def steps_json(
    per_step: Mapping[str, Mapping[int, Sequence[float]]], notes: Mapping[str, str]
) -> dict[str, Any]:
    """Return all figures for the JSON file."""
    picks: dict[str, Any] = {"seconds_per_step": statistics.median, "min_s": min, "max_s": max}
    written: dict[str, Any] = {
        key: {
            name: {str(clients): pick(seconds) for clients, seconds in figures.items()}
            for name, figures in per_step.items()
        }
        for key, pick in picks.items()
    }
    return written | {"notes": dict(notes), "machine": machine()}


def machine() -> dict[str, Any]:
    """Return what the figures depend on: cores, system, versions."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return {
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grpc": grpc.__version__,
        "flwr": flwr.__version__,
    }


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write the JSON file, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n")
