"""The commands ``flsplit bench carriers`` and ``flsplit bench train``."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flsplit.command_errors import errors_in_a_line, say

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure on this machine; starts what it needs by itself, on loopback.",
)

JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Also write the figures there.")
]


@bench.command()
def carriers(
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="Clients (2 deployed, 10 simulated)."),
    ] = None,
    floats: Annotated[
        int | None,
        typer.Option(min=1, help="Floats per client, each way (100000 deployed, 10000 simulated)."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Exchanges; fewer for Flower's messages, which are slow.")
    ] = 2000,
    json: JsonFile = None,
    only: Annotated[
        str, typer.Option(hidden=True, help="deployed or simulated; both by default.")
    ] = "",
    flower: Annotated[bool, typer.Option(hidden=True)] = True,
) -> None:
    """Seconds per exchange, deployed and simulated: Flower's messages, sessions, a gRPC echo."""
    from flsplit.bench.exchange_times import SETTINGS, measure_carriers
    from flsplit.bench.figures import carriers_json, carriers_table, write_json

    settings = chosen(only, SETTINGS)
    with errors_in_a_line(RuntimeError, TimeoutError):
        figures = measure_carriers(clients, floats, steps, say, settings, flower)
        Console().print(carriers_table(figures))
        write_json(json, carriers_json(figures))


@bench.command()
def train(
    clients: Annotated[str, typer.Option(help="Numbers of clients, with commas.")] = "1,2,4",
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure of each.")] = 60,
    json: JsonFile = None,
    only: Annotated[
        str, typer.Option(hidden=True, help="Which to measure, with commas; all by default.")
    ] = "",
) -> None:
    """Seconds per training step over sessions and LocalGrid, beside a plain torch loop."""
    from flsplit.bench.figures import steps_json, steps_table, write_json
    from flsplit.bench.step_times import MEASURES, measure_training

    counts = numbers(clients)
    names = chosen(only, MEASURES)
    with errors_in_a_line(RuntimeError, TimeoutError):
        per_step, notes = measure_training(counts, steps, say, names)
        Console().print(steps_table(per_step))
        for name, note in notes.items():
            say(f"{name}: {note}")
        write_json(json, steps_json(per_step, notes))


@bench.command(hidden=True)
def steady(
    clients: Annotated[int, typer.Option(min=1, help="Simulated clients.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = 10_000,
    json: JsonFile = None,
) -> None:
    """Memory of server and hosts, and seconds per step, over many steps with many clients."""
    from flsplit.bench.figures import write_json
    from flsplit.bench.steady import measure_steady, memory_table

    with errors_in_a_line(RuntimeError, TimeoutError):
        measured = measure_steady(clients, steps, say)
        Console().print(memory_table(measured))
        write_json(json, measured)


def numbers(text: str) -> list[int]:
    """Return the numbers of clients in ``text``, e.g. ``1,2,4``."""
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"--clients is {text!r}, expected numbers as 1,2,4")
    return found


def chosen(text: str, known: Collection[str]) -> list[str]:
    """Return the names in ``text``, all known ones if it is empty."""
    names = text.split(",") if text else list(known)
    if unknown := set(names) - set(known):
        raise typer.BadParameter(
            f"--only: there is no {sorted(unknown)[0]!r}; known: {', '.join(known)}"
        )
    return names
