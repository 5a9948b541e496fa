"""SessionGrid: a Grid whose messages travel over the streams of a session."""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from flwr.app import Error, Message
from flwr.serverapp import Grid

from flsplit.carry.carrier import Carrier
from flsplit.carry.polling import polling
from flsplit.carry.ray_cluster import START_SECONDS, cluster_address, count_places, running_ray
from flsplit.carry.refusals import BrokenAppError, Refusals
from flsplit.carry.session.host import Hello
from flsplit.carry.session.invitation import SESSION, Invitation
from flsplit.carry.session.roster import Roster, Seat
from flsplit.carry.session.settings import HOW_TO_SET, SessionSettings
from flsplit.errors import ConfigError, FlsplitError, ProtocolError
from flsplit.flower_internals import NODE_AWAY, Run, set_message_id, simulates
from flsplit.log import RareLog, counted, logger
from flsplit.wire import (
    DialError,
    Envelope,
    HostJoined,
    MessageArrived,
    SessionServer,
    StreamEnded,
    WireError,
)

_DIAL_ERROR = DialError.__name__  # how a host's Error says that it can't reach the server
_LOOK_SECONDS = 0.5  # how often Flower's grid is asked for nodes' refusals: it has no events
_TELL_SECONDS = 15.0  # after which waiting for the first host is told; doubled each time
_AGAIN_SECONDS = 5.0  # between attempts to open a session where nodes have refused it
_END_SECONDS = 30.0  # how long nodes have to hand their session message back


class NoHostError(FlsplitError):
    """No node could open a stream back to the ServerApp."""


@dataclass
class _OnItsWay:
    message: Message
    seat: Seat
    epoch: int
    reply: Message | None = None


class SessionGrid(Carrier):
    """Carries the messages of a run over one stream per host.

    A ``with`` block opens the session: each node gets one Flower message ``train.session``,
    inside which its ClientApp dials back and serves messages until the block ends.

    ``grid`` is for the session messages themselves; ``timeout`` says how long to wait for the first
    host, where the settings don't.
    """

    works_ahead = True

    def __init__(
        self,
        grid: Grid,
        settings: SessionSettings | None = None,
        *,
        experiment: str = "",
        state_dir: str = "",
        timeout: float = 3600.0,
    ) -> None:
        self._grid = grid
        self.simulated = simulates(grid)
        self._timeout = timeout
        self._settings = settings or SessionSettings()
        self._experiment = experiment or uuid.uuid4().hex
        self._state_dir = state_dir
        self._roster = Roster(self.simulated)
        self._invited: dict[int, str] = {}
        self._refusals = Refusals()
        self._epochs = 0
        self._sequence = 0
        self._places = 0
        self._sent: dict[str, _OnItsWay] = {}  # by the message's id
        self._dropped = RareLog(logger)
        self._server: SessionServer | None = None

    # --- life time -----------------------------------------------------------------------

    def open(self) -> None:
        """Open the session.

        ConfigError if the ServerApp can't listen where the settings say. NoHostError if no node can
        dial back; it says which address and port, and what to do. BrokenAppError if no node can run
        the ClientApp.
        """
        try:
            self._open()
        except BaseException:
            self.close("the session could not be opened")
            raise

    def __enter__(self) -> Self:
        """Open the session, if it isn't open."""
        if self._server is None:
            self.open()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close the session; hosts then answer their session messages."""
        self.close("the session is over" if error is None else "the run has failed")

    def close(self, reason: str = "the session is over") -> None:
        """End all streams and free the port."""
        if self._server:
            self._server.close(reason)
            self._server = None

    def end_round(self, server_round: int, timeout: float = 0.0) -> None:
        """Hand over to a new session where ``session_rounds`` says so.

        NoHostError if no node has come to a new session after ``timeout`` seconds.
        """
        rounds = self._settings.session_rounds
        if rounds and server_round % rounds == 0:
            self.close("the session ends after its rounds")
            self._wait_for_nodes()
            self._open_again(time.monotonic() + timeout)

    def _open_again(self, deadline: float) -> None:
        """Open the next session; nodes may be busy with another run, or away for a moment."""
        while True:
            self._roster = Roster(self.simulated)
            try:
                return self.open()
            except (NoHostError, BrokenAppError) as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                logger.warning("no host for the next session, trying again: %s", error)
                time.sleep(min(_AGAIN_SECONDS, left))

    def _open(self) -> None:
        self._session = uuid.uuid4().hex[:12]
        if self.simulated and (ray := running_ray(START_SECONDS)):
            self._places = count_places(ray, {"CPU": 1.0})
            if self._settings.is_local and (address := cluster_address(ray)):
                # Clients' processes run on Ray's other machines, too.
                bind = self._settings.bind or address
                self._settings = replace(self._settings, address=address, bind=bind)
        self._server = self._listen()
        self._invited = {}
        self._refusals.ask_at_once()
        self._invite_nodes()
        self._wait_for_hosts()
        if self.simulated:  # a host is there, so Flower knows all nodes by now
            self._roster.num_partitions = len(list(self._grid.get_node_ids()))
        self._roster.seat_all()
        logger.info(
            "session %s: %s served by %s over %s",
            self._session, counted(len(self._roster.node_ids()), "client"),
            counted(len(self._roster.epochs), "host"), self._address,
        )  # fmt: skip

    def _listen(self) -> SessionServer:
        settings = self._settings
        problem = OSError()
        for port in settings.ports_to_try:
            try:
                return SessionServer(
                    replace(settings, port=port).bind_address,
                    advertised_hosts=(settings.address,),
                    tls=settings.tls,
                    max_hosts=max(settings.max_hosts, 1024),
                    max_message_bytes=settings.max_step_bytes,
                )
            except OSError as error:
                problem = error
        raise ConfigError(
            f"session-port is {settings.port}, session-ports is {settings.ports}, session-bind is "
            f"{settings.bind!r} and session-address is {settings.address!r}, but the ServerApp "
            f"{str(problem).rstrip('.')}. Is the port taken, by another run perhaps, each of which "
            f"needs one of its own, or is the address none of this machine's? ({HOW_TO_SET})"
        ) from problem

    @property
    def _address(self) -> str:
        return self._settings.advertised(self._open_server.port)

    @property
    def _open_server(self) -> SessionServer:
        if self._server is None:
            raise FlsplitError("the session is not open")
        return self._server

    # --- hosts ---------------------------------------------------------------------------

    def _invite_nodes(self) -> None:
        """Invite connected nodes that are no hosts and have no invitation pending.

        Of a simulation's nodes only as many as there are processes for: others would wait in
        Flower's queue, or all fail there in turn, a page of its log each.
        """
        nodes = set(self._grid.get_node_ids())
        self._refusals.keep_only(nodes)
        places = (self._roster.peers or self._places) - len(self._refusals)
        most = places if self.simulated and self._places else len(nodes)
        limit = min(self._settings.max_hosts or len(nodes), most)
        free = self._refusals.due(nodes - self._invited.keys())
        if free := free[: max(limit - len(self._invited), 0)]:
            messages = [self._invitation(node) for node in free]
            ids = list(self._grid.push_messages(messages))
            self._invited |= dict(zip(free, ids, strict=True))

    def _invitation(self, node: int) -> Message:
        self._epochs += 1
        settings, server = self._settings, self._open_server
        invitation = Invitation(
            session=self._session,
            experiment=self._experiment,
            address=self._address,
            token=server.invite(str(node), self._epochs),
            certificate=server.certificate_pem or b"",
            expires=time.time() + settings.lifetime,
            max_step_bytes=settings.max_step_bytes,
            state_dir=self._state_dir if self.simulated else "",
            simulated=self.simulated,
        )
        return Message(invitation.to_content(), node, SESSION, ttl=settings.lifetime)

    def _wait_for_hosts(self) -> None:
        """Wait until all hosts that can come are there, or the grace period is over."""
        grace, started = self._settings.grace, time.monotonic()
        limits = {"the first": self._patience, "further ones": grace, "better ones": grace}
        ends: dict[str, float] = {}
        tell = _TELL_SECONDS
        while awaited := self._awaited_hosts():
            now = time.monotonic()
            left = ends.setdefault(awaited, now + limits[awaited]) - now
            if left <= 0:
                break
            self._take_event(min(_LOOK_SECONDS, left))
            self._take_refusals()
            self._invite_nodes()
            if not self._roster.epochs and now - started > tell:
                tell *= 2
                logger.info(
                    "waiting for hosts: %d nodes are invited, and may be busy with other runs",
                    len(self._invited),
                )
        if not self._roster.epochs:
            raise self._no_host()

    @property
    def _patience(self) -> float:
        return self._settings.join_timeout or self._timeout

    def _awaited_hosts(self) -> str:
        """Return which hosts are worth waiting for now; empty if none."""
        if self._num_awaited() > 0:
            return "further ones" if self._roster.epochs else "the first"
        others = not self.simulated and not self._roster.epochs
        return "better ones" if others and self._refusals.all_broken() else ""

    def _num_awaited(self) -> int:
        able = len(self._invited)
        return min(able, self._roster.peers or able) - len(self._roster.epochs)

    def _take_refusals(self) -> None:
        """Note which nodes have answered their session message already: they won't come."""
        # Errors that the SuperLink itself answers with don't come from the node's id.
        node_of = {message_id: node for node, message_id in self._invited.items()}
        for message in self._grid.pull_messages(list(node_of)):
            node = node_of[message.metadata.reply_to_message_id]
            if str(node) in self._roster.epochs:
                continue
            # Whoever asks Flower for an answer again is told that there is no such message.
            del self._invited[node]
            ended = FlsplitError("its session message was answered, but it serves none")
            self._refusals.note(node, message.error if message.has_error() else ended)

    def _no_host(self) -> FlsplitError:
        if self._refusals.all_broken():
            return self._refusals.broken_app()
        if self._refusals:
            told = self._refusals.told()
            problem = f"{len(self._refusals)} nodes could not open a session; {told}"
            if _DIAL_ERROR in told:
                problem += (
                    f" (the ServerApp listens on {self._open_server.address} and advertises "
                    f"{self._address}; set session-address and session-port; {HOW_TO_SET})"
                )
            return NoHostError(problem)
        return NoHostError(
            f"none of {len(self._invited)} nodes dialled {self._address} within "
            f"{self._patience:g} s; are they busy with another run, are their ClientApps made by "
            "flsplit.client_app, and can their machines reach this address and port "
            "(session-address, session-port)?"
        )

    def _dismiss(self, host: str, reason: str) -> None:
        """End the stream of a host that takes too long; it counts as lost."""
        self._open_server.close_host(host, reason)
        self._lose(host, reason)

    def _lose(self, host: str, reason: str) -> None:
        """Answer what a lost host still owed; its node may come back with a new invitation."""
        logger.warning("host %s is lost: %s", host, reason)
        self._roster.leave(host)
        self._invited.pop(int(host), None)
        for sent in self._sent.values():
            if sent.seat.host == host and sent.reply is None:
                sent.reply = _error(sent.message, f"its host was lost: {reason}")

    # --- Grid ----------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Set the run of Flower's grid."""
        self._grid.set_run(run)

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients that have a host now, after letting hosts join, leave and return."""
        while self._take_event(timeout=0.0):
            pass
        if not self.simulated:
            self._take_refusals()
            self._invite_nodes()
        self._roster.seat_all()
        return self._roster.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to their clients' hosts; return the messages' ids."""
        return [self._send(message, self._settings.step_timeout) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come for these messages, each once."""
        while self._take_event(timeout=0.0):
            pass
        return self._collect(list(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies.

        A host that hasn't answered after ``step_timeout`` (or ``timeout``, if that is less)
        counts as lost; its clients answer with an Error. So does one that has made no room for a
        message by then. The others' time begins when all messages are on their way.
        """
        limit = self._limit(timeout)
        return self.receive([self._send(one, limit) for one in messages], timeout=timeout)

    def receive(self, ids: list[str], *, timeout: float | None = None) -> list[Message]:
        """Wait for the replies to messages that were pushed; hosts may be late as above.

        The time counts from this call on: a host may have other messages to answer first.
        """
        limit = self._limit(timeout)
        deadline = time.monotonic() + limit
        waiting = self._unanswered(ids)
        while waiting and (left := deadline - time.monotonic()) > 0:
            if waiting[-1].reply is None:
                self._take_event(left)
            else:
                waiting.pop()
        for host in {sent.seat.host for sent in self._unanswered(ids)}:
            self._dismiss(host, f"no answer within {limit:g} s (session-step-timeout)")
        return self._collect(ids)

    def _limit(self, timeout: float | None) -> float:
        """Return how many seconds a host has, where the caller allows ``timeout``."""
        step_timeout = self._settings.step_timeout
        return min(step_timeout, timeout or step_timeout)

    # --- messages ------------------------------------------------------------------------

    def _send(self, message: Message, limit: float) -> str:
        """Send a message, and wait up to ``limit`` seconds for its host to make room for it."""
        self._sequence += 1
        message_id = self._id_of(self._sequence)
        set_message_id(message, message_id)
        seat = self._roster.seat(message.metadata.dst_node_id)
        if seat is None:
            gone = _error(message, "the client has no host now")
            self._sent[message_id] = _OnItsWay(message, Seat("", ""), 0, gone)
            return message_id
        epoch = self._roster.epochs[seat.host]
        self._sent[message_id] = sent = _OnItsWay(message, seat, epoch)
        envelope = Envelope(seat.client, self._sequence, epoch)
        try:
            self._open_server.send(seat.host, envelope, message, timeout=limit)
        except WireError as error:
            raise ConfigError(f"{error} (session-max-step-bytes; {HOW_TO_SET})") from error
        except StreamEnded as error:
            sent.reply = _error(message, f"its host was lost: {error}")
        except TimeoutError as error:
            # If it stayed, every further message to it would wait as long.
            self._dismiss(seat.host, f"{error} (session-step-timeout)")
        return message_id

    def _id_of(self, sequence: int) -> str:
        # Random bytes for a uuid would let go of the interpreter lock at every message.
        return f"{self._session}-{sequence}"

    def _unanswered(self, ids: list[str]) -> list[_OnItsWay]:
        return [self._sent[one] for one in ids if self._sent[one].reply is None]

    def _collect(self, ids: list[str]) -> list[Message]:
        replies = []
        for one in ids:
            if one in self._sent and (reply := self._sent[one].reply) is not None:
                replies.append(reply)
                del self._sent[one]
        return replies

    def _take_event(self, timeout: float) -> bool:
        """Handle the next event, if one comes within ``timeout`` seconds."""
        event = self._open_server.receive(timeout)
        if isinstance(event, MessageArrived):
            self._take_message(event)
        elif isinstance(event, HostJoined):
            self._welcome(event)
        elif event is not None and self._roster.epochs.get(event.host) == event.epoch:
            self._lose(event.host, event.reason)
        return event is not None

    def _welcome(self, event: HostJoined) -> None:
        """Count a host in, or send it away if what it says of itself is malformed."""
        try:
            hello = Hello.from_json(event.hello)
        except ProtocolError as error:
            self._refusals.note(int(event.host), error)
            self._invited.pop(int(event.host), None)
            self._open_server.close_host(event.host, str(error))
        else:
            self._refusals.forget(int(event.host))
            self._roster.join(event.host, event.epoch, hello)

    def _take_message(self, event: MessageArrived) -> None:
        sent = self._sent.get(self._id_of(event.envelope.sequence))
        if sent is None or sent.reply is not None:
            problem = "answers nothing that is awaited"
        elif (event.host, event.envelope.client) != (sent.seat.host, sent.seat.client):
            problem = "answers for a client of another host"
        elif event.message.metadata.src_node_id != sent.message.metadata.dst_node_id:
            problem = "answers in another client's name"
        elif not event.epoch == event.envelope.epoch == sent.epoch:
            problem = "is of another epoch"
        else:
            sent.reply = event.message
            return
        self._dropped.warning("a message of host %s is dropped: it %s", event.host, problem)

    def _wait_for_nodes(self) -> None:
        waiting = set(self._invited.values())
        for _ in polling(_END_SECONDS, every=_LOOK_SECONDS / 5):
            for message in self._grid.pull_messages(list(waiting)):
                waiting.discard(message.metadata.reply_to_message_id)
            if not waiting:
                return


def _error(message: Message, reason: str) -> Message:
    return Message(Error(NODE_AWAY, reason), reply_to=message)
