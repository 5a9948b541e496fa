"""``flsplit bench carriers``: what one exchange takes over Flower's messages and over a session."""

from collections.abc import Callable, Sequence

from flsplit.bench import echo_app
from flsplit.bench.figures import Exchanges
from flsplit.bench.grpc_echo import measure_echo
from flsplit.bench.measuring_app import measuring

SETTINGS = ("deployed", "simulated")

_CLIENTS = {"deployed": 2, "simulated": 10}
_FLOATS = {"deployed": 100_000, "simulated": 10_000}
# An exchange of Flower's messages takes seconds in a deployment, a tenth in a simulation.
_FLOWER_STEPS = {"deployed": 5, "simulated": 50}


def measure_carriers(
    clients: int | None,
    floats: int | None,
    steps: int,
    say: Callable[[str], object],
    settings: Sequence[str],
    flower: bool,
) -> dict[str, Exchanges]:
    """Return the seconds of exchanges by carrier, e.g. ``session-deployed``.

    Numbers of clients and floats per client each way are by default those that the two settings
    have of their own. Of Flower's messages fewer exchanges are measured.
    """
    figures: dict[str, Exchanges] = {}
    for setting in settings:
        count, size = clients or _CLIENTS[setting], floats or _FLOATS[setting]
        counts = {"session": steps}
        if flower:
            counts["flower"] = min(steps, _FLOWER_STEPS[setting])
        say(f"starting Flower ({setting}, {count} clients)")
        measured = {}
        with measuring(setting, count, echo_app) as measure:
            for carrier, number in counts.items():
                say(f"measuring {number} exchanges, carrier {carrier}")
                measured[carrier] = measure({"carrier": carrier, "floats": size, "steps": number})
        hosts = measured["session"]["hosts"]
        for carrier in sorted(counts):
            seconds = measured[carrier]["seconds"]
            figures[f"{carrier}-{setting}"] = Exchanges(seconds, count, size, hosts)
        say(f"measuring an echo over gRPC alone, {hosts} processes")
        echoed = measure_echo(hosts, count, size, steps)
        figures[f"grpc-echo-{setting}"] = Exchanges(echoed, count, size, hosts)
    return figures
