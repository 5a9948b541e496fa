"""Talking to clients: by name, all at once, and never fooled by the order of arrival."""

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flsplit.account.clock import Clock
from flsplit.account.ledger import LeftOut, RoundEntry, Traffic
from flsplit.carry.choose import OpenCarrier
from flsplit.carry.session.grid import SessionGrid
from flsplit.errors import (
    ConfigError,
    FlsplitError,
    NotEnoughClientsError,
    ProtocolError,
    StateLostError,
)
from flsplit.flower_internals import NODE_AWAY
from flsplit.log import logger
from flsplit.message.arrays import nbytes
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.fields import record, value
from flsplit.message.finish import FinishReply, FinishRequest
from flsplit.message.local import LocalReply, LocalRequest
from flsplit.message.parts import Backward
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.message.step import StepReply, StepRequest
from flsplit.message.types import DESCRIBE, EVALUATE, FINISH, LOCAL, SHAPE, STEP
from flsplit.server.checks import Reply, Request, check_reply
from flsplit.server.errands import exchange_of


class _AwayError(FlsplitError):
    """A client's node or host was lost; nothing is wrong with the client itself."""


STATE_LOST = StateLostError.__name__  # how a client's Error says so

_GONE = "its node is not connected any more"

_POLL_SECONDS = 0.5  # Flower's grid has no event for a node that joins


@dataclass(frozen=True)
class _Kind:
    message_type: str
    parse: Callable[[RecordDict], Reply]
    category: dict[str, str]  # ledger category by record name


_SEGMENTS = {"arrays": "client-segments-{}", "optimizer": "optimizer-{}"}
_TRAINING = {"smashed-data": "activations-up", "labels": "labels-up"} | _SEGMENTS
_KINDS: dict[type[Request], _Kind] = {
    StepRequest: _Kind(STEP, StepReply.from_content, _TRAINING),
    FinishRequest: _Kind(FINISH, FinishReply.from_content, _TRAINING),
    LocalRequest: _Kind(LOCAL, LocalReply.from_content, _TRAINING | {"auxiliary": "auxiliary-{}"}),
    ShapeRequest: _Kind(SHAPE, ShapeReply.from_content, {}),
    EvaluateRequest: _Kind(
        EVALUATE,
        EvaluateReply.from_content,
        {"smashed-data": "evaluation-up", "labels": "evaluation-up"} | _SEGMENTS,
    ),
}


@dataclass(frozen=True)
class Sent:
    """Requests that are on their way.

    Attributes
    ----------
    requests : dict of str to dataclasses of ``flsplit.message``
        By client.
    traffic : dict of str to Traffic
        What each client receives and sends.
    started : float
        When clients could begin, by `time.perf_counter`.
    ids : list of str
        The messages' ids, where answers are taken later.
    """

    requests: dict[str, Request]
    traffic: dict[str, Traffic]
    started: float
    ids: list[str] = field(default_factory=list)


class Clients:
    """The clients of a run behind a Grid, known by name.

    Parameters
    ----------
    carrier : OpenCarrier
        With a Grid to send messages over.
    timeout : float
        Seconds to wait for the answers of one exchange, and for nodes to connect.
    """

    def __init__(self, carrier: OpenCarrier, timeout: float) -> None:
        self.carrier = carrier
        self.clock: Clock | None = None
        """What is told of every exchange."""
        self.exchanges = 0
        """How many there have been."""
        self._answered: dict[str, float] = {}  # when clients last had, by time.perf_counter
        self._grid = carrier.grid
        self._timeout = timeout
        self._node_of: dict[str, int] = {}
        self.holds: dict[str, int] = {}
        """Which version of the server's client segment each client holds."""
        self._unusable: dict[int, str] = {}
        self._sends = not getattr(self._grid, "in_process", False)

    # --- who is there --------------------------------------------------------------------

    def discover(self) -> list[str]:
        """Return the names of the connected clients, in their fixed order."""
        nodes = set(self._grid.get_node_ids())
        self._node_of = {name: node for name, node in self._node_of.items() if node in nodes}
        if unknown := nodes - set(self._node_of.values()):
            self._describe(sorted(unknown))
        return sorted(self._node_of, key=_natural)

    def wait_for(self, minimum: int) -> list[str]:
        """Return the connected clients once there are at least ``minimum``.

        Raises
        ------
        NotEnoughClientsError
            If there are fewer after ``timeout`` seconds, or at once where none can join: over a
            grid in this process.
        """
        timeout = self._timeout if self._sends else 0.0
        deadline, told = time.monotonic() + timeout, False
        while len(names := self.discover()) < minimum:
            if not self._sends or time.monotonic() > deadline:
                raise NotEnoughClientsError(
                    f"{len(names)} clients are connected after {timeout:g} s, expected at "
                    f"least {minimum} (min_available_nodes, min_train_nodes){self._refusals()}"
                )
            if not told:
                logger.info(
                    "waiting for %d clients, %d are connected%s",
                    minimum, len(names), self._refusals(),
                )  # fmt: skip
                told = True
            time.sleep(_POLL_SECONDS)
        return names

    def _refusals(self) -> str:
        return "".join(f"; node {node}: {why}" for node, why in self._unusable.items())

    def _describe(self, nodes: list[int]) -> None:
        messages = [Message(RecordDict(), node, DESCRIBE) for node in nodes]
        answers = self._grid.send_and_receive(messages, timeout=self._timeout)
        for node, message in _by_node(answers, messages).items():
            try:
                name = _described(message)
            except ProtocolError as error:
                if self._unusable.get(node) != str(error):
                    logger.warning("node %d can't be used: %s", node, error)
                self._unusable[node] = str(error)
                continue
            self._unusable.pop(node, None)
            if self._node_of.get(name, node) != node:
                raise ConfigError(
                    f"two nodes call themselves client {name!r}; give each its own partition-id or "
                    "client-name in its node config"
                )
            self._node_of[name] = node

    @property
    def connected(self) -> set[str]:
        """Who was connected when last looked."""
        return set(self._node_of)

    # --- an exchange ---------------------------------------------------------------------

    def exchange(self, requests: Mapping[str, Request], entry: RoundEntry) -> dict[str, Reply]:
        """Send each client its request and return the replies, in the clients' fixed order.

        A segment is left out of the request of a client that holds it; a client that turns out
        not to is asked again, with the segment.

        A client that answers with an error, with something else than it was asked for, or not
        within the timeout, is missing from the replies and in the ledger.
        """
        replies, lost = self._ask(requests, entry)
        if lost:
            for name in lost:
                logger.info("client %r starts from the server's segment: its state was lost", name)
                self.holds.pop(name, None)
                entry.restarted.append(name)
            again, _ = self._ask({name: requests[name] for name in lost}, entry)
            replies |= again
        return {name: replies[name] for name in sorted(replies, key=_natural)}

    def send(self, requests: Mapping[str, Request], entry: RoundEntry) -> Sent:
        """Send requests whose answers are taken later; for sessions and LocalGrid.

        A client answers in the order in which it was asked.
        """
        requests = self._without_who_is_gone(requests, entry)
        traffic = {name: Traffic() for name in requests}
        messages = [self._message(name, one, traffic[name]) for name, one in requests.items()]
        started = time.perf_counter()
        return Sent(requests, traffic, started, list(self._grid.push_messages(messages)))

    def receive(self, sent: Sent, entry: RoundEntry) -> dict[str, Reply]:
        """Return the answers to requests that were sent before, as :meth:`exchange` does.

        A client that was left out in the meantime is missing.
        """
        waited = time.perf_counter()
        if isinstance(self._grid, SessionGrid):
            answers = self._grid.receive(sent.ids, timeout=self._timeout)
        else:
            answers = list(self._grid.pull_messages(sent.ids))
        entry.waiting_seconds += time.perf_counter() - waited
        left_out = {one.client for one in entry.left_out}
        replies, stateless = self._take_all(sent, _by_node(answers), entry, but=left_out)
        for name, error in stateless.items():
            self.leave_out(name, sent.requests[name], error, entry)
        busy_until = [self._answered.get(name, 0.0) for name in sent.requests]
        self._close(replace(sent, started=max([sent.started, *busy_until])), replies, entry)
        return replies

    def _ask(
        self, requests: Mapping[str, Request], entry: RoundEntry
    ) -> tuple[dict[str, Reply], list[str]]:
        """Return the replies, and which clients don't hold the segment they should hold."""
        requests = self._without_who_is_gone(requests, entry)
        if not requests:
            return {}, []
        held = {name: self._without_what_is_held(name, one) for name, one in requests.items()}
        traffic = {name: Traffic() for name in held}
        messages = [self._message(name, one, traffic[name]) for name, one in held.items()]
        sent = Sent(held, traffic, started=time.perf_counter())
        answers = self._grid.send_and_receive(messages, timeout=self._timeout)
        entry.waiting_seconds += time.perf_counter() - sent.started
        replies, stateless = self._take_all(sent, _by_node(answers, messages), entry)
        lost = []
        for name, error in stateless.items():
            if held[name] is requests[name]:
                self.leave_out(name, requests[name], error, entry)
            else:
                lost.append(name)
        self._close(sent, replies, entry)
        return replies, lost

    def _take_all(
        self,
        sent: Sent,
        by_node: Mapping[int, Message],
        entry: RoundEntry,
        but: Collection[str] = (),
    ) -> tuple[dict[str, Reply], dict[str, StateLostError]]:
        """Return the replies, and who has lost its state; others without one are left out."""
        replies: dict[str, Reply] = {}
        stateless: dict[str, StateLostError] = {}
        for name, request in sent.requests.items():
            if name in but:
                continue
            try:
                replies[name] = self._take(name, request, by_node, sent.traffic[name])
                entry.client_seconds += replies[name].seconds
            except StateLostError as error:
                stateless[name] = error
            except FlsplitError as error:
                self.leave_out(name, request, error, entry)
        return replies, stateless

    def _close(self, sent: Sent, replies: Mapping[str, Reply], entry: RoundEntry) -> None:
        """Account for what was sent, and tell the clock."""
        self.exchanges += 1
        broadcast = _broadcast_bytes(sent.requests)
        for one in sent.traffic.values():
            entry.traffic.include(one)
        entry.traffic.add("gradients-down-broadcast", broadcast, 0)
        if self.clock:
            told = time.perf_counter()
            exchange = exchange_of(sent.requests, replies, sent.traffic, broadcast)
            self.clock.exchanged(exchange, sent.started)
            entry.waiting_seconds += time.perf_counter() - told
        self._answered |= dict.fromkeys(sent.requests, time.perf_counter())

    def _without_who_is_gone(
        self, requests: Mapping[str, Request], entry: RoundEntry
    ) -> dict[str, Request]:
        """Return the requests that can be sent; clients whose node is gone are left out."""
        there = {name: one for name, one in requests.items() if name in self._node_of}
        for name, request in requests.items():
            if name not in there:
                self.leave_out(name, request, _AwayError(_GONE), entry)
        return there

    def _without_what_is_held(self, name: str, request: Request) -> Request:
        if isinstance(request, LocalRequest) and request.auxiliary_held and name in self.holds:
            request = replace(request, auxiliary=None)
        segment = getattr(request, "segment", None)
        if segment and self.holds.get(name) == segment.version:
            return replace(request, segment=None)  # type: ignore[arg-type]
        return request

    def _message(self, name: str, request: Request, traffic: Traffic) -> Message:
        kind = _KINDS[type(request)]
        content = request.to_content()
        self._account_down(content, request, kind, traffic)
        group = str(request.server_round)
        return Message(content, self._node_of[name], kind.message_type, group_id=group)

    def _take(
        self, name: str, request: Request, by_node: Mapping[int, Message], traffic: Traffic
    ) -> Reply:
        if name not in self._node_of:
            raise _AwayError(_GONE)
        message = by_node.get(self._node_of[name])
        if message is None:
            raise ProtocolError(f"no answer within {self._timeout:g} s")
        if message.has_error():
            reason = message.error.reason or "an error without a reason"
            if message.error.code == NODE_AWAY:
                raise _AwayError(reason)
            raise StateLostError(reason) if STATE_LOST in reason else ProtocolError(reason)
        kind = _KINDS[type(request)]
        reply = kind.parse(message.content)
        check_reply(name, request, reply)
        if segment := getattr(request, "segment", None):
            self.holds[name] = segment.version
        for key, category in kind.category.items():
            for array in message.content.array_records.get(key, {}).values():
                self._account(category.format("up"), array, traffic)
        return reply

    def leave_out(
        self, name: str, request: Request, error: FlsplitError, entry: RoundEntry
    ) -> None:
        """Note in the ledger that a client is out for the rest of the round."""
        step = getattr(request, "step", entry.steps)
        away = isinstance(error, _AwayError)
        entry.left_out.append(LeftOut(name, step, str(error), away))
        logger.warning(
            "client %r is left out of round %d from step %d on: %s", name, entry.round, step, error
        )

    # --- accounting ----------------------------------------------------------------------

    def _account(self, category: str, array: Array, traffic: Traffic) -> None:
        traffic.add(category, nbytes(array), len(array.data) if self._sends else 0)

    def _account_down(
        self, content: RecordDict, request: Request, kind: _Kind, traffic: Traffic
    ) -> None:
        for key, category in kind.category.items():
            for array in content.array_records.get(key, {}).values():
                self._account(category.format("down"), array, traffic)
        for array in content.array_records.get("cut-gradient", ArrayRecord()).values():
            own = nbytes(array) - _shared_bytes(getattr(request, "backward", None))
            wire = len(array.data) if self._sends else 0
            traffic.add("gradients-down-unicast", own, wire)


def _by_node(answers: Iterable[Message], asked: Iterable[Message] = ()) -> dict[int, Message]:
    """Return the answers by the node that was asked.

    For a node that is away the SuperLink answers, with an Error in its own name.
    """
    requests = [one.metadata for one in asked]
    nodes = {one.dst_node_id for one in requests}
    node_of = {one.message_id: one.dst_node_id for one in requests}
    found = {}
    for answer in answers:
        node = answer.metadata.src_node_id
        if answer.has_error() and node not in nodes:
            node = node_of.get(answer.metadata.reply_to_message_id, node)
        found[node] = answer
    return found


def _described(message: Message) -> str:
    """Return the client's name in a reply to ``query.describe``."""
    if message.has_error():
        raise ProtocolError(message.error.reason)
    return value(record(message.content, "reply", ConfigRecord), "client", str)


def _broadcast_bytes(requests: Mapping[str, Request]) -> int:
    """Return the bytes of the gradient rows that all clients of the step share."""
    sizes = [_payload_bytes(getattr(request, "backward", None)) for request in requests.values()]
    return max(sizes, default=0)


def _shared_bytes(backward: Backward | None) -> int:
    if backward is None or backward.gradient is None:
        return 0
    return backward.gradient[: backward.shared_rows].nbytes


def _payload_bytes(backward: Backward | None) -> int:
    """Return what the shared rows take on a broadcast channel; a repeated row is sent once."""
    shared = _shared_bytes(backward)
    if backward is None or not backward.repeated or not shared:
        return shared
    return shared // backward.shared_rows


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort ``"2"`` before ``"10"``, and ``"01"`` always before ``"1"``."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name
