"""Talking to clients: by name, all at once, and never fooled by the order of arrival."""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from flwr.app import Message

from flsplit.account.clock import Clock
from flsplit.account.ledger import LeftOut, RoundEntry, Traffic
from flsplit.carry.carrier import Carrier
from flsplit.cut import Trace
from flsplit.errors import FlsplitError, ProtocolError, StateLostError
from flsplit.log import logger
from flsplit.message.crossings import MOST_TRACES
from flsplit.message.local_steps import LocalRequest
from flsplit.message.raised import shortened
from flsplit.message.request import Reply, Request
from flsplit.message.storage_note import problem_in
from flsplit.server.directory import AwayError, Directory, by_node, in_order, raise_error
from flsplit.server.links import Links
from flsplit.server.traffic import count, exchange_of
from flsplit.storage import State

MOST_TRACE_BYTES = 16 * 2**20
"""Of a client's traces, as JSON; those of a forward with some hundred calls have 100 KiB."""

_GONE = "its node is not connected any more"


@dataclass(frozen=True)
class Sent:
    """Requests that are on their way."""

    requests: dict[str, Request]
    traffic: dict[str, Traffic]  # what each client receives and sends
    started: float  # when clients could begin, by `time.perf_counter`
    ids: list[str] = field(default_factory=list)  # the messages' ids, where answers are taken later


class Clients:
    """The clients of a run behind a Grid, known by name.

    ``timeout`` is how many seconds to wait for the answers of one exchange, and for nodes to
    connect.
    """

    def __init__(self, carrier: Carrier, timeout: float) -> None:
        self.carrier = carrier
        self.clock: Clock | None = None
        """What is told of every exchange."""
        self.exchanges = 0
        """How many there have been."""
        self.directory = Directory(carrier, timeout)
        """Who is there."""
        self.holds: dict[str, int] = {}
        """Which version of the server's client segment each client holds."""
        self.trained: dict[str, int] = {}
        """How many steps each client had done in the run when it last ended a round."""
        self._begun: dict[str, int] = {}  # how many when the round ends that it is in
        self._traces: dict[str, dict[str, Trace]] = {}
        self._all_traces = WeakValueDictionary[str, Trace]()
        self._answered: dict[str, float] = {}  # when clients last had, by time.perf_counter
        self._times_out = Counter[str]()
        self.links = Links()
        """What is compressed on its way, either way."""
        self._timeout = timeout
        self._sends = not carrier.in_process

    # --- checkpoints ---------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return what is known of the clients from round to round."""
        known: State = {"holds": dict(self.holds), "trained": dict(self.trained)}
        links = self.links.state_dict()
        return known | {"links": links} if links else known

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`; with less, where a run begins."""
        self.holds = dict(state.get("holds", {}))
        self.trained = dict(state.get("trained", {}))
        self.links.load_state_dict(state.get("links", {}))

    # --- an exchange ---------------------------------------------------------------------

    def exchange(self, requests: Mapping[str, Request], entry: RoundEntry) -> dict[str, Reply]:
        """Send each client its request and return the replies, in the clients' fixed order.

        A segment is left out of the request of a client that holds it; a client that turns out
        not to is asked again, with the segment.

        A client that answers with an error, with something else than it was asked for, or not
        within the timeout, is missing from the replies and in the ledger.
        """
        replies: dict[str, Reply] = {}
        asked = requests
        while asked:
            sent, messages = self._made_ready(asked, entry, but_held=True)
            if not messages:
                break
            answers = self.carrier.send_and_receive(messages, timeout=self._timeout)
            entry.waiting_seconds += time.perf_counter() - sent.started
            found, stateless = self._take_all(sent, by_node(answers, messages), entry)
            replies |= found
            asked = {}
            for name, error in stateless.items():
                if sent.requests[name] is requests[name]:  # it was given all
                    self.leave_out(name, requests[name].step, error, entry)
                    continue
                logger.info("client %r starts from the server's segment: its state was lost", name)
                self.holds.pop(name, None)
                entry.restarted.append(name)
                asked[name] = requests[name]
            self._close(sent, found, entry)
        return {name: replies[name] for name in in_order(replies)} if len(replies) > 1 else replies

    def send(self, requests: Mapping[str, Request], entry: RoundEntry) -> Sent:
        """Send requests whose answers are taken later; for sessions and LocalGrid.

        A client answers in the order in which it was asked.
        """
        sent, messages = self._made_ready(requests, entry)
        return replace(sent, ids=list(self.carrier.push_messages(messages)))

    def receive(self, sent: Sent, entry: RoundEntry) -> dict[str, Reply]:
        """Return the answers to requests that were sent before, as :meth:`exchange` does.

        A client that was left out in the meantime is missing.
        """
        waited = time.perf_counter()
        answers = self.carrier.receive(sent.ids, timeout=self._timeout)
        entry.waiting_seconds += time.perf_counter() - waited
        left_out = {one.client for one in entry.left_out}
        replies, stateless = self._take_all(sent, by_node(answers), entry, but=left_out)
        for name, error in stateless.items():
            self.leave_out(name, sent.requests[name].step, error, entry)
        busy_until = [self._answered.get(name, 0.0) for name in sent.requests]
        self._close(replace(sent, started=max([sent.started, *busy_until])), replies, entry)
        return replies

    def _take_all(
        self,
        sent: Sent,
        answers: Mapping[int, Message],
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
                reply = self._take(name, request, answers, sent.traffic[name], entry)
                replies[name] = reply
                entry.client_seconds += reply.seconds
                if request.plan or reply.ends_round:
                    self._count_steps(name, request, reply, entry)
            except StateLostError as error:
                stateless[name] = error
            except FlsplitError as error:
                self.leave_out(name, request.step, error, entry)
        return replies, stateless

    def _count_steps(self, name: str, request: Request, reply: Reply, entry: RoundEntry) -> None:
        """Note a client's steps in the run, and that it begins a round with less than it had done.

        It may have done more: of a round that it didn't end, the server knows nothing.
        """
        if request.plan and reply.steps_before is not None and reply.num_steps is not None:
            known, before = self.trained.get(name, 0), reply.steps_before
            self._begun[name] = before + reply.num_steps
            if before < known and name not in entry.restarted:
                logger.warning(
                    "client %r has lost some of its state, or all: of its %d steps in this run it "
                    "goes on after step %d", name, known, before,
                )  # fmt: skip
                entry.restarted.append(name)
        if reply.ends_round and name in self._begun:
            self.trained[name] = self._begun[name]

    def _close(self, sent: Sent, replies: Mapping[str, Reply], entry: RoundEntry) -> None:
        self.exchanges += 1
        broadcast = 0
        for request in sent.requests.values():
            if request.backward and request.backward.shared_rows:
                broadcast = max(broadcast, request.backward.broadcast_bytes)
        for one in sent.traffic.values():
            entry.traffic.include(one)
        entry.traffic.logical["gradients-down-broadcast"] += broadcast
        if self.clock:
            told = time.perf_counter()
            exchange = exchange_of(sent.requests, replies, sent.traffic, broadcast)
            self.clock.exchanged(exchange, sent.started)
            entry.waiting_seconds += time.perf_counter() - told
        self._answered |= dict.fromkeys(sent.requests, time.perf_counter())

    def _made_ready(
        self, requests: Mapping[str, Request], entry: RoundEntry, *, but_held: bool = False
    ) -> tuple[Sent, list[Message]]:
        """Return messages, without what clients hold; clients whose node is gone are left out."""
        sent, traffic, messages = {}, {}, []
        for name, request in requests.items():
            node = self.directory.node_of.get(name)
            if node is None:
                self.leave_out(name, request.step, AwayError(_GONE), entry)
                continue
            if but_held and (request.segment or isinstance(request, LocalRequest)):
                request = self._without_what_is_held(name, request)
            content, own = request.to_content(), Traffic()
            if self.links.parts:
                self.links.pack(name, request.packed, content)
            count(content, request.categories, own, sends=self._sends)
            if request.backward and request.backward.shared_rows:  # counted once for all
                own.logical["gradients-down-unicast"] -= request.backward.shared_bytes
            sent[name], traffic[name] = request, own
            group = str(request.server_round)
            messages.append(Message(content, node, request.kind, group_id=group))
        return Sent(sent, traffic, time.perf_counter()), messages

    def _without_what_is_held(self, name: str, request: Request) -> Request:
        if isinstance(request, LocalRequest) and request.auxiliary_held and name in self.holds:
            request = replace(request, auxiliary=None)
        held = self.holds.get(name)
        if request.segment and held is not None:
            whole = request.segment
            rest = None if held == whole.version else whole.changing()
            return replace(request, segment=rest)  # type: ignore[type-var]
        return request

    def _take(
        self,
        name: str,
        request: Request,
        answers: Mapping[int, Message],
        traffic: Traffic,
        entry: RoundEntry,
    ) -> Reply:
        if name not in self.directory.node_of:
            raise AwayError(_GONE)
        message = answers.get(self.directory.node_of[name])
        if message is None:
            raise ProtocolError(f"no answer within {self._timeout:g} s")
        if message.has_error():
            raise_error(message)
        content = message.content
        read = content
        if self.links.parts:
            read = self.links.unpack(name, request.answer.packed, content)
        reply = request.answer.from_content(read)
        if reply.traces:
            self._learn_traces(name, reply.traces)
        reply = reply.resolved(self._traces.get(name, {}))
        for key in request.echoed:
            asked, found = getattr(request, key), getattr(reply, key)
            if asked is not None and found != asked:
                raise ProtocolError(f"reply: {key.replace('_', '-')} is {found}, expected {asked}")
        if reply.client != name:
            raise ProtocolError(f"reply: client is {reply.client!r}, expected {name!r}")
        request.check(reply)
        if request.segment:
            self.holds[name] = request.segment.version
        count(content, reply.categories, traffic, sends=self._sends)
        if problem := problem_in(content):
            logger.warning("client %r: %s", name, problem)
            entry.notes.append(f"client {name!r}: {problem}")
        return reply

    def _learn_traces(self, name: str, sent: Mapping[str, Trace]) -> None:
        """Remember the traces that a client sends, by digest, and forget its oldest.

        Clients that send the same one share it, so that the server segment knows it again.
        """
        known = self._traces.setdefault(name, {})
        for digest, trace in sent.items():
            known.pop(digest, None)  # the last that came is the last to go
            known[digest] = self._all_traces.setdefault(digest, trace)
        while len(known) > 1 and (
            len(known) > 2 * MOST_TRACES
            or sum(one.nbytes for one in known.values()) > MOST_TRACE_BYTES
        ):
            del known[next(iter(known))]

    def recall(self, history: Iterable[RoundEntry]) -> None:
        """Count on from an earlier part of the run."""
        for entry in history:
            for one in (*entry.redone, *entry.left_out):
                self._times_out[one.client] = one.times

    def leave_out(
        self, name: str, step: int | None, error: FlsplitError, entry: RoundEntry
    ) -> None:
        """Note in the ledger that a client is out for the rest of the round."""
        step = entry.steps if step is None else step
        away = isinstance(error, AwayError)
        reason = shortened(str(error))
        self._times_out[name] += 1
        entry.left_out.append(LeftOut(name, step, reason, away, self._times_out[name]))
        logger.warning(
            "client %r is left out of round %d from step %d on (%d in this run): %s",
            name, entry.round, step, self._times_out[name], reason,
        )  # fmt: skip
