"""The clock of a run on a fleet: how long what was really sent and computed would take there."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flsplit.account.clock import Errand, Exchange, Leg
from flsplit.errors import ConfigError
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.phases import BITS
from flsplit.wireless.profile import BACKWARD_PER_FORWARD, Place
from flsplit.wireless.rates import Rates


@dataclass(frozen=True)
class Costs:
    """What a row costs."""

    place: Place  # where the model is cut, with the FLOPs on both sides
    last_layer_flops_backward: int  # B_l, where nothing is aggregated
    auxiliary_flops: Callable[[], int]  # those of a row's forward pass through an auxiliary model

    def leg_flops(self, leg: Leg) -> float:
        """Return what a device computes (FLOPs): rows by FLOPs per row, for each kind of pass."""
        flops = leg.forward_rows * self.place.client_flops_forward
        flops += leg.backward_rows * self.place.client_flops_backward
        flops += leg.tail_rows * self.place.tail_flops
        if leg.auxiliary_rows:  # otherwise there may be no auxiliary model to ask
            flops += leg.auxiliary_rows * self._auxiliary_row_flops()
        return float(flops)

    def step_flops(self, forward_rows: int, backward_rows: int, logit_rows: int) -> float:
        """Return what the server computes on so many rows (FLOPs).

        ``forward_rows F_s + logit_rows B_l + backward_rows (B_s - B_l)``, as in
        `flsplit.wireless.phases.server_passes`.
        """
        place, last = self.place, self.last_layer_flops_backward
        forward = forward_rows * place.server_flops_forward
        backward = backward_rows * (place.server_flops_backward - last)
        return float(forward + logit_rows * last + backward)

    def alignment_flops(self, rows: int, epochs: int) -> float:
        """Return what the server computes in an alignment (FLOPs).

        ``rows (F_s + B_s + 2 E (F_a + B_a))`` for E epochs: with second derivatives each pass
        through the auxiliary model counts twice.
        """
        per_row = self.place.server_flops_forward + self.place.server_flops_backward
        return float(rows * (per_row + 2 * epochs * self._auxiliary_row_flops()))

    def _auxiliary_row_flops(self) -> int:
        return (1 + BACKWARD_PER_FORWARD) * self.auxiliary_flops()


class FleetClock:
    """Simulates the time that a run takes on a fleet.

    Every client and the server have a time of their own, which goes on with what they receive,
    compute and send. Who waits for whom is as it is in the run: a server step begins when the
    smashed data that it works on has come, and what is asked of clients next when the server is
    ready and, unless the method is decoupled, when all clients are. So the time doesn't depend
    on the carrier. Test batches take no time.

    ``wait`` waits for a number of seconds: whatever really ended too soon does so until its
    simulated time has passed. ``now`` tells the real time, in s.
    """

    def __init__(
        self,
        fleet: Fleet,
        rates: Rates,
        costs: Costs,
        *,
        wait: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._fleet, self._rates, self._costs = fleet, rates, costs
        self._wait, self._now = wait, now
        self._index = {device.name: index for index, device in enumerate(fleet.devices)}
        self._begin_round()

    def _begin_round(self) -> None:
        self._server_at = 0.0
        self._client_at: dict[str, float] = {}
        self._arrived: dict[tuple[str, int], float] = {}

    def exchanged(self, exchange: Exchange, started: float) -> None:
        """Let clients receive, compute and send; see `flsplit.account.Clock`."""
        took = 0.0
        for name, errand in exchange.errands.items():
            begun = self._client_at.get(name, 0.0)
            if exchange.after_server:
                begun = max(begun, self._server_at)
            shared_s = BITS * exchange.shared_bytes / self._rates.broadcast_bps
            self._client_at[name] = self._after(errand, name, begun + shared_s)
            took = max(took, self._client_at[name] - begun)
        if exchange.before_server:
            ready = [self._client_at[name] for name in exchange.errands]
            self._server_at = max([self._server_at, *ready])
        self._play(started, took)

    def _after(self, errand: Errand, name: str, at: float) -> float:
        """Return when a client (s) that begins at a time (s) has done its errand.

        Bits by the downlink's bit/s, then for each leg FLOPs by the device's FLOP/s and bits by
        the uplink's bit/s.
        """
        if name not in self._index:
            raise ConfigError(
                f"client {name!r} takes part, but the fleet has no device of that name, only "
                f"{', '.join(list(self._index)[:10])}"
            )
        index = self._index[name]
        at += BITS * errand.down_bytes / float(self._rates.downlink_bps[index])
        for leg in errand.legs:
            at += self._costs.leg_flops(leg) / float(self._fleet.compute_flops[index])
            at += BITS * leg.up_bytes / float(self._rates.uplink_bps[index])
            if leg.step is not None:
                self._arrived[name, leg.step] = at
        return at

    def stepped(
        self,
        uploads: Iterable[tuple[str, int]],
        *,
        forward_rows: int,
        backward_rows: int,
        logit_rows: int,
        started: float,
    ) -> None:
        """Let the server work once the uploads are there; see `flsplit.account.Clock`."""
        there = [self._arrived.get(upload, 0.0) for upload in uploads]
        self._server_at = max([self._server_at, *there])
        self._compute(self._costs.step_flops(forward_rows, backward_rows, logit_rows), started)

    def aligned(self, rows: int, epochs: int, started: float) -> None:
        """Let the server align an auxiliary model; see `flsplit.account.Clock`."""
        self._compute(self._costs.alignment_flops(rows, epochs), started)

    def _compute(self, flops: float, started: float) -> None:
        took = flops / self._fleet.server.compute_flops
        self._server_at += took
        self._play(started, took)

    def _play(self, started: float, seconds: float) -> None:
        """Wait until ``seconds`` have passed since ``started``; what really happened is in them."""
        if self._wait and (left := started + seconds - self._now()) > 0:
            self._wait(left)

    def end_round(self) -> float:
        """Return how long the round takes (s), until the last has done its work."""
        seconds = max([self._server_at, *self._client_at.values()])
        self._begin_round()
        return seconds
