"""The simulated time of rounds that were really run, from what their ledger counted."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from flsplit.account.ledger import RoundEntry
from flsplit.errors import ConfigError
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.latency import round_seconds
from flsplit.wireless.profile import Place
from flsplit.wireless.rates import Rates
from flsplit.wireless.rounds import BITS, Phase, Stage, Where


def simulated_seconds(
    entry: RoundEntry, fleet: Fleet, place: Place, rates: Rates, *, in_turn: bool = False
) -> float:
    """Return how long (s) a recorded round would have taken on a fleet.

    The round's bytes, the rows that clients sent (activation bytes by bytes per row) and the rows
    that the server back-propagated are shared out evenly over its participants and steps; then it
    is timed as in `round_seconds`. A sequential method counts a step for each client's mini-batch,
    the others one for all clients together, which cancels out here.

    Parameters
    ----------
    entry : RoundEntry
        The round.
    fleet : Fleet
        With devices that are called as the round's participants are.
    place : Place
        Where the model was cut; of it are the FLOPs per row.
    rates : Rates
        What the links carry, in bit/s; of all the fleet's devices.
    in_turn : bool
        Whether the clients took turns.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    ConfigError
        If a participant is not among the devices.
    """
    here, at = _participants(entry, fleet, rates)
    phases = recorded_phases(entry, place, in_turn=in_turn)
    return round_seconds(phases, here, at) if entry.participants else 0.0


def simulated_times(
    entries: Iterable[RoundEntry],
    fleet: Fleet,
    place: Place,
    rates: Rates,
    *,
    in_turn: bool = False,
) -> list[float]:
    """Return the simulated time (s) at the end of each round; see `simulated_seconds`."""
    seconds = [simulated_seconds(e, fleet, place, rates, in_turn=in_turn) for e in entries]
    return [float(total) for total in np.cumsum(seconds)]


def recorded_phases(entry: RoundEntry, place: Place, *, in_turn: bool) -> tuple[Phase, ...]:
    """Return a recorded round as phases, with its bits and FLOPs per client, or on the server."""
    clients = max(len(entry.participants), 1)
    logical = entry.traffic.logical
    rows = logical["activations-up"] / place.activation_bytes / clients

    def bits(*categories: str) -> float:
        """Return bits per client."""
        return BITS * sum(logical[category] for category in categories) / clients

    def on_server(rows: float, flops: int) -> float:
        """Return FLOPs: of all clients' rows, or in its turn of one client's."""
        return flops * rows * (1 if in_turn else clients)

    up = (
        Stage("client forward", Where.DEVICE, rows * place.client_flops_forward),
        Stage("uplink", Where.UPLINK, bits("activations-up", "labels-up")),
    )
    server = (
        Stage("server forward", Where.SERVER, on_server(rows, place.server_flops_forward)),
        Stage(
            "server backward",
            Where.SERVER,
            on_server(entry.rows / clients, place.server_flops_backward),
        ),
    )
    shared = BITS * logical["gradients-down-broadcast"] / (clients if in_turn else 1)
    broadcast = (Stage("broadcast", Where.BROADCAST, shared),)
    down = (
        Stage("unicast", Where.DOWNLINK, bits("gradients-down-unicast")),
        Stage("client backward", Where.DEVICE, rows * place.client_flops_backward),
    )
    segments = (
        (
            Stage(
                "aggregation up",
                Where.UPLINK,
                bits("client-segments-up", "optimizer-up", "auxiliary-up"),
            ),
        ),
        (
            Stage(
                "aggregation down",
                Where.DOWNLINK,
                bits("client-segments-down", "optimizer-down", "auxiliary-down"),
            ),
        ),
    )
    # Steps are alike, so that a round's maxima are as many steps' maxima.
    return tuple(Phase(stages, 1, in_turn) for stages in (up, server, broadcast, down, *segments))


def _participants(entry: RoundEntry, fleet: Fleet, rates: Rates) -> tuple[Fleet, Rates]:
    """Return the fleet and the rates of those devices that took part."""
    index = {device.name: i for i, device in enumerate(fleet.devices)}
    for name in entry.participants:
        if name not in index:
            raise ConfigError(
                f"client {name!r} took part in round {entry.round}, but the fleet has no device of "
                f"that name, only {', '.join(list(index)[:10])}"
            )
    if not entry.participants:
        return fleet, rates
    chosen = [index[name] for name in entry.participants]
    # The rates are known already: what remains of the fleet needs no radio.
    devices = tuple(
        replace(
            fleet.devices[i],
            uplink_bps=float(rates.uplink_bps[i]),
            downlink_bps=float(rates.downlink_bps[i]),
        )
        for i in chosen
    )
    own = Rates(rates.uplink_bps[chosen], rates.downlink_bps[chosen], rates.broadcast_bps)
    return Fleet(devices=devices, server=fleet.server), own
