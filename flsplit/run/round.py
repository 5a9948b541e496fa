"""One round under way: the clients in it, its plan and its ledger entry."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from flsplit.account.ledger import RoundEntry
from flsplit.client_parts import ClientPart
from flsplit.client_parts.chain import sent_down
from flsplit.client_parts.compression import compressing
from flsplit.errors import FlsplitError, LostClientsError, NotEnoughClientsError, located
from flsplit.log import logger
from flsplit.losses import Count
from flsplit.message.local_steps import LocalReply, LocalRequest
from flsplit.message.optimizer_state import OptimizerState
from flsplit.message.request import Backward, Reply, Request, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.u_shape import TailReply, TailRequest
from flsplit.run.callbacks import Callback
from flsplit.server.client_batch import ClientBatch
from flsplit.server.clients import Clients, Sent
from flsplit.server.misfits import Fits


@dataclass
class Tally:
    """Sums over training rows, of one client or of all."""

    rows: int = 0
    loss: float = 0.0
    weight: float = 0.0
    correct: int = 0
    classified: int = 0

    @property
    def mean_loss(self) -> float | None:
        """Mean over all that count, in training mode."""
        return self.loss / self.weight if self.weight else None

    @property
    def accuracy(self) -> float | None:
        """Share of what is classified correctly; None where labels are no classes."""
        return self.correct / self.classified if self.classified else None


@dataclass
class Round:
    """What a strategy needs to train one round.

    Attributes
    ----------
    clients : Clients
        Talks to the clients.
    plan : RoundPlan
        What they are told at the beginning.
    segment : SegmentArrays
        The server's version of the client segment, for clients that don't hold it.
    participants : list of str
        Who takes part, in their fixed order.
    upload_segment : bool
        Whether clients hand over their segment at the end.
    segments : dict of str to SegmentArrays
        The same for clients that are cut elsewhere, by name.
    min_clients : int
        With fewer clients left, the round ends with an error.
    fits : Fits
        Tells whose smashed data and labels the server segment can't take.
    client_parts : sequence of ClientPart
        What edits the cut-layer gradients on their way down, beside what it does on the client.
    overrides : dict of str to dict
        What a client's plan has in place of the round's, by field of `RoundPlan`: ``batch_size``,
        ``batch_sizes``, ``local_steps``, ``local_epochs``, ``lr``, ``drop_last``. To be set
        before the client is first asked in the round.
    exchanges_left : callable, optional
        In the first round of a run: takes how many steps the clients have, and returns how many
        exchanges the run takes from here on.
    callbacks : sequence of Callback
        What looks at every exchange.
    problem : str
        Why the round has ended early and is to be done again: too few clients are left, or nobody
        who trains, though others are there or may come back. Empty as long as it goes on.
    """

    clients: Clients
    plan: RoundPlan
    segment: SegmentArrays
    participants: list[str]
    upload_segment: bool
    min_clients: int
    fits: Fits
    client_parts: Sequence[ClientPart] = ()
    segments: Mapping[str, SegmentArrays] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    exchanges_left: Callable[[int], int] | None = None
    callbacks: Sequence[Callback] = ()
    entry: RoundEntry = field(init=False)
    problem: str = field(default="", init=False)
    _plans: dict[str, RoundPlan] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    _total: Tally = field(default_factory=Tally)
    _metrics: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the ledger's entry."""
        self.entry = RoundEntry(self.plan.server_round, participants=list(self.participants))
        self._started = time.perf_counter()

    def begin_with(self, segment: SegmentArrays) -> None:
        """Let the next clients begin with another segment than the round's first."""
        self.segment = segment
        self.plan = replace(self.plan, segment_version=segment.version)
        self._plans.clear()

    # --- requests ------------------------------------------------------------------------

    def plan_of(self, client: str) -> RoundPlan:
        """Return a client's plan: the round's, but for what ``overrides`` says.

        ConfigError if that can't be used.
        """
        if client not in self.overrides:
            return self.plan
        if client not in self._plans:
            with located(f"the plan of client {client!r}"):
                self._plans[client] = self.plan.changed(self.overrides[client])
        return self._plans[client]

    def first_request(self, client: str, optimizer: OptimizerState | None = None) -> StepRequest:
        """Return the request that begins a client's round."""
        plan = self.plan_of(client)
        return StepRequest(
            plan.server_round,
            step=0,
            plan=plan,
            segment=self.segments.get(client, self.segment),
            optimizer=optimizer,
            num_steps=plan.num_steps,
            planned=plan,
        )

    def next_request(
        self, reply: StepReply, backward: Backward, *, upload_optimizer: bool = False
    ) -> StepRequest | FinishRequest:
        """Return the request after ``reply``: the next step, or the end of the client's round."""
        if self.client_parts:
            backward = self._edited(reply, backward)
        if backward.step + 1 < reply.num_steps:
            return StepRequest(
                self.plan.server_round,
                backward.step + 1,
                backward,
                num_steps=reply.num_steps,
                num_examples=reply.num_examples,
                planned=self.plan_of(reply.client) if self.overrides else self.plan,
            )
        return FinishRequest(
            self.plan.server_round,
            backward,
            self.upload_segment,
            upload_optimizer,
            like=self.segments.get(reply.client, self.segment),
            num_examples=reply.num_examples,
            planned=self.plan_of(reply.client),
        )

    def _edited(self, reply: StepReply, backward: Backward) -> Backward:
        """Return what is told to a client, after the client parts' ``down``."""
        if (gradient := backward.gradient) is None:
            return backward
        plan = self.plan
        where = (plan.seed, reply.client, plan.server_round, backward.step)
        edited = sent_down(self.client_parts, *where, gradient, reply.labels)
        alone = edited is not gradient or compressing(self.client_parts, "cut-gradient")
        # What was edited is this client's alone: nothing of it is sent to several at once.
        return Backward(backward.step, edited) if alone else backward

    def exchange(
        self, requests: Mapping[str, Request]
    ) -> tuple[dict[str, StepReply], dict[str, FinishReply]]:
        """Send requests; return the replies to steps and to ends of a round.

        Raises
        ------
        NotEnoughClientsError
            If fewer than ``min_clients`` are left afterwards, though they are connected. Where
            clients have disconnected or lost their host, or others are there than the
            participants, the round ends early instead: no steps are returned.
        """
        replies = self._exchange(requests)
        if not self.enough_are_left():
            replies = {n: r for n, r in replies.items() if isinstance(r, FinishReply)}
        steps: dict[str, StepReply] = {}
        ends: dict[str, FinishReply] = {}
        for name, reply in replies.items():
            if isinstance(reply, StepReply):
                steps[name] = reply
            elif isinstance(reply, FinishReply):
                ends[name] = reply
        return steps, ends

    def exchange_local(self, requests: Mapping[str, LocalRequest]) -> dict[str, LocalReply]:
        """Send requests for local steps and return the replies; fewer clients as in `exchange`."""
        return self._local(self._exchange(requests))

    def send_local(self, requests: Mapping[str, LocalRequest]) -> Sent:
        """Send requests for local steps whose replies :meth:`receive_local` returns later."""
        planned = {name: replace(one, planned=self.plan_of(name)) for name, one in requests.items()}
        return self.clients.send(planned, self.entry)

    def receive_local(self, sent: Sent) -> dict[str, LocalReply]:
        """Return the replies to what was sent; fewer clients as in `exchange`."""
        replies: Mapping[str, Reply] = self.clients.receive(sent, self.entry)
        self._show(sent.requests, replies)
        return self._local(self.fits.sifted(self.clients, sent.requests, replies, self.entry))

    def _local(self, replies: Mapping[str, Reply]) -> dict[str, LocalReply]:
        if not self.enough_are_left():
            return {}
        return {name: one for name, one in replies.items() if isinstance(one, LocalReply)}

    def _exchange(self, requests: Mapping[str, Request]) -> Mapping[str, Reply]:
        """Exchange; after the run's first, let the carrier say if it is too slow for the rest."""
        before = self.entry.waiting_seconds
        replies = self.clients.exchange(requests, self.entry)
        if self.callbacks:
            self._show(requests, replies)
        if self.exchanges_left:
            steps = [r.num_steps for r in replies.values() if isinstance(r, StepReply | LocalReply)]
            if steps:
                exchanges = self.exchanges_left(max(steps))
                self.clients.carrier.check_speed(self.entry.waiting_seconds - before, exchanges)
                self.exchanges_left = None
        return self.fits.sifted(self.clients, requests, replies, self.entry)

    def ask_tails(self, step: int, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of clients' own mean losses by the server segment's outputs.

        ``outputs`` are by client, who has the layers that come after them.

        LostClientsError if not all clients answer; those that don't are left out of the round.
        """
        requests = {
            name: TailRequest(self.plan.server_round, step, one) for name, one in outputs.items()
        }
        replies = self.clients.exchange(requests, self.entry)
        self._show(requests, replies)
        if lost := sorted(outputs.keys() - replies.keys()):
            raise LostClientsError(f"step {step}: no gradient came from {', '.join(lost)}")
        found = {n: one.gradient for n, one in replies.items() if isinstance(one, TailReply)}
        return {name: one.to(outputs[name].device) for name, one in found.items()}

    def _show(self, requests: Mapping[str, Request], replies: Mapping[str, Reply]) -> None:
        for one in self.callbacks:
            one.on_exchange(requests, replies)

    def enough_are_left(self) -> bool:
        """Tell whether the round can go on.

        Where clients have disconnected or lost their host, it ends here, and is done again when
        they have returned; where its participants can't take part but others are there, with
        them. Too few that are there won't be more next time either.

        Raises
        ------
        NotEnoughClientsError
            In that case.
        """
        if self.problem:
            return False
        if not self.entry.left_out:
            return True
        lost = {one.client: one.reason for one in self.entry.left_out}
        left = set(self.clients.directory.node_of) - lost.keys()
        trains = bool(set(self.participants) - lost.keys())
        if len(left) >= self.min_clients and trains:
            return True
        problem = (
            f"round {self.plan.server_round}: {len(left)} of {len(left | lost.keys())} clients are "
            f"left, expected {self.min_clients} or more (min_available_nodes) and one that trains. "
            f"{_by_reason(lost)}"
        )
        some_are_away = any(one.away for one in self.entry.left_out)
        too_few = len(left) < max(1, self.min_clients)
        if too_few and not some_are_away and lost.keys() <= set(self.clients.directory.discover()):
            raise NotEnoughClientsError(problem)
        logger.warning("the round ends early: %s", problem)
        self.problem = problem
        return False

    def others_than(self, clients: Sequence[str]) -> list[str]:
        """Return the participants that are not left out, and are none of these."""
        gone = {one.client for one in self.entry.left_out}.union(clients)
        return [name for name in self.participants if name not in gone]

    def anybody_but(self, clients: Collection[str]) -> bool:
        """Tell whether a connected client is left in this round or for another attempt at it."""
        gone = {one.client for one in self.entry.left_out}.union(clients)
        return not gone.issuperset(self.clients.directory.node_of)

    def give_up(self, error: FlsplitError) -> bool:
        """End a round that can't go on with who is left; False where it has lost nobody."""
        if self.entry.left_out:
            self.problem = str(error)
            logger.warning("the round ends early: %s", error)
        return bool(self.problem)

    def leave_out(self, client: str, step: int, error: FlsplitError) -> None:
        """Leave a client out for the rest of the round, because of its batch in a step."""
        self.clients.leave_out(client, step, error, self.entry)

    def batches(self, replies: Mapping[str, StepReply]) -> list[ClientBatch]:
        """Return the clients' mini-batches as they came, in the clients' fixed order.

        Those that sit the step out have none.
        """
        found = []
        for name, one in replies.items():
            if one.rows:
                batch = ClientBatch(name, one.smashed, one.labels, one.num_examples, one.frozen)
                found.append(batch)
        return found

    # --- keeping account -----------------------------------------------------------------

    def record_loss(self, batch: ClientBatch, loss: float, count: Count) -> None:
        """Count a client's mini-batch: its rows, its mean loss and its correct answers."""
        tally = self.tallies.get(batch.client)
        if tally is None:
            tally = self.tallies[batch.client] = Tally()
        rows = len(batch)
        for one in (tally, self._total):
            one.rows += rows
            one.loss += loss * count.weight
            one.weight += count.weight
            one.correct += count.correct
            one.classified += count.classified

    def record_alignment(self, rows: int, epochs: int, started: float) -> None:
        """Count the time of an auxiliary model's alignment on ``rows`` of smashed data."""
        self.entry.server_seconds += time.perf_counter() - started
        if self.clients.clock:
            self.clients.clock.aligned(rows, epochs, started)

    def record_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add to what the entry will hold the mean of."""
        for name, number in metrics.items():
            self._metrics.setdefault(name, []).append(number)

    def close(self) -> RoundEntry:
        """Fill in the entry's means and wall time, and return it."""
        self.entry.loss, self.entry.accuracy = self._total.mean_loss, self._total.accuracy
        self.entry.metrics = {name: float(np.mean(all_)) for name, all_ in self._metrics.items()}
        self.entry.seconds = time.perf_counter() - self._started
        if self.clients.clock:
            self.entry.simulated_seconds = self.clients.clock.end_round()
        return self.entry


def _by_reason(lost: Mapping[str, str]) -> str:
    """Return who was lost and why; clients with the same reason stand together."""
    names: dict[str, list[str]] = {}
    for name, reason in lost.items():
        names.setdefault(reason, []).append(f"client {name!r}")
    return "; ".join(f"{', '.join(clients)}: {reason}" for reason, clients in names.items())
