"""``flsplit bench carriers``: what one exchange takes over Flower's messages and over a session."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flsplit.bench import echo
from flsplit.bench.app_folder import check_completed, write_app
from flsplit.bench.figures import Exchanges
from flsplit.bench.grpc_echo import measure_echo
from flsplit.processes import FinishedRun, deployment, simulation

RunApp = Callable[[Mapping[str, Any]], FinishedRun]

DEPLOYED_CLIENTS, DEPLOYED_FLOATS = 2, 100_000
SIMULATED_CLIENTS, SIMULATED_FLOATS = 10, 10_000

# An exchange of Flower's messages takes seconds in a deployment, a tenth in a simulation.
FLOWER_STEPS = {"deployed": 5, "simulated": 50}

_RUN_TIMEOUT = 900.0


def measure_carriers(
    clients: int | None,
    floats: int | None,
    steps: int,
    say: Callable[[str], object],
    settings: Sequence[str] = ("deployed", "simulated"),
    flower: bool = True,
) -> dict[str, Exchanges]:
    """Return the seconds of exchanges by carrier, e.g. ``session-deployed``.

    Parameters
    ----------
    clients, floats : int or None
        How many clients, and floats per client each way; by default those that the two settings
        have of their own.
    steps : int
        Exchanges to measure; fewer for Flower's messages.
    say : callable
        Told what is going on.
    settings : sequence of str
        ``deployed``, ``simulated``.
    flower : bool
        Whether to measure Flower's messages, too.
    """
    figures: dict[str, Exchanges] = {}
    for setting in settings:
        deployed = setting == "deployed"
        size = {
            "clients": clients or (DEPLOYED_CLIENTS if deployed else SIMULATED_CLIENTS),
            "floats": floats or (DEPLOYED_FLOATS if deployed else SIMULATED_FLOATS),
        }
        with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as temporary:
            folder = Path(temporary)
            say(f"starting Flower ({setting}, {size['clients']} clients)")
            measure = _deployed if deployed else _simulated
            counts = {"session": steps} | (
                {"flower": min(steps, FLOWER_STEPS[setting])} if flower else {}
            )
            measured = measure(folder, size, counts, say)
        hosts = measured["session"]["hosts"]
        for carrier in sorted(counts):
            seconds = measured[carrier]["seconds"]
            figures[f"{carrier}-{setting}"] = Exchanges(seconds, **size, hosts=hosts)
        say(f"measuring an echo over gRPC alone, {hosts} processes")
        echoed = measure_echo(hosts, size["clients"], size["floats"], steps)
        figures[f"grpc-echo-{setting}"] = Exchanges(echoed, **size, hosts=hosts)
    return figures


def _deployed(
    folder: Path, size: Mapping[str, int], counts: Mapping[str, int], say: Callable[[str], object]
) -> dict[str, Any]:
    with deployment(folder / "flower", size["clients"]) as flower:

        def run(config: Mapping[str, Any]) -> FinishedRun:
            return flower.run_app(folder / "app", config, timeout=_RUN_TIMEOUT)

        return _measure(folder, run, size, counts, say)


def _simulated(
    folder: Path, size: Mapping[str, int], counts: Mapping[str, int], say: Callable[[str], object]
) -> dict[str, Any]:
    with simulation(folder / "flower") as flower:

        def run(config: Mapping[str, Any]) -> FinishedRun:
            return flower.run_app(folder / "app", size["clients"], config, timeout=_RUN_TIMEOUT)

        return _measure(folder, run, size, counts, say)


def _measure(
    folder: Path,
    run: RunApp,
    size: Mapping[str, int],
    counts: Mapping[str, int],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Run the app once per carrier; return what it has written."""
    app = f"{echo.__name__}:"
    write_app(folder / "app", f"{app}client_app", f"{app}server_app", echo.CONFIG)
    measured = {}
    for carrier, steps in counts.items():
        say(f"measuring {steps} exchanges, carrier {carrier}")
        output = folder / f"{carrier}.json"
        finished = run({**size, "carrier": carrier, "steps": steps, "output": str(output)})
        check_completed(finished, carrier)
        measured[carrier] = json.loads(output.read_text())
    return measured
