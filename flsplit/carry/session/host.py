"""A session's host: dials back, and serves its clients until the stream ends."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from msgspec import Meta, Struct, ValidationError, convert, to_builtins

from flsplit.carry.cohort import Cohort
from flsplit.carry.ray_cluster import count_places
from flsplit.carry.session.invitation import Invitation
from flsplit.carry.session.settings import HOW_TO_SET
from flsplit.client.spec import client_name
from flsplit.errors import ConfigError, ProtocolError
from flsplit.log import logger
from flsplit.message.raised import raised
from flsplit.seeds import set_aside
from flsplit.storage import FolderLock, StorageError, folder_name
from flsplit.wire import DialError, Envelope, HostStream, StreamEnded, WireError

_DIAL_SECONDS = 5.0  # for all tries together; the server invites again later
_FIRST_PAUSE = 0.5  # seconds, doubled each time

_ended: set[str] = set()
"""Sessions that their server has ended here; an actor finds invitations to them in its queue."""

OWN_CLIENT = ""
"""How an envelope addresses the client of the node itself."""


class Hello(Struct, frozen=True, rename="kebab"):
    """A host's introduction; the server knows from its token which node it is.

    ``peers`` says how many hosts like this one the resources of a simulation allow; 0 in a
    deployment, where nobody asks.
    """

    peers: Annotated[int, Meta(ge=0, le=2**20)] = 0

    def to_json(self) -> dict[str, Any]:
        """Return what is sent."""
        found: dict[str, Any] = to_builtins(self)
        return found

    @classmethod
    def from_json(cls, hello: dict[str, Any]) -> Self:
        """Return what came; ProtocolError if it is malformed."""
        try:
            return convert(hello, cls)
        except ValidationError as error:
            raise ProtocolError(f"hello: {error}") from error


def serve_session(app: ClientApp, message: Message, context: Context) -> Message:
    """Serve messages over a stream until it ends; the answer to ``train.session``.

    The answer says how many messages were served; it is an Error if the server can't be reached, or
    if the node's own configuration can't be used.
    """
    invitation = Invitation.from_content(message.content)
    if invitation.expired:
        return _reply(message, served=0)
    try:
        # Before dialling: the answer to this message is all that the server hears of an error.
        clients = HostedClients(app, context, invitation)
        stream = _dial(invitation, describe_host(invitation).to_json())
    except (ConfigError, DialError) as error:
        if _is_over(invitation, error):
            return _reply(message, served=0)
        return raised(message, error)
    with stream, clients:
        served = _serve(stream, clients)
    ending = stream.ending
    if ending and ending.orderly:
        _ended.add(invitation.session)
    logger.info("session %s: %s", invitation.session, ending.reason if ending else "over")
    return _reply(message, served=served)


def _dial(invitation: Invitation, hello: dict[str, Any]) -> HostStream:
    """Open the stream; a server that can't be reached just then is tried a few times."""
    deadline, pause = time.monotonic() + _DIAL_SECONDS, _FIRST_PAUSE
    while True:
        try:
            return HostStream.dial(
                invitation.address,
                invitation.token,
                invitation.certificate or None,
                hello,
                max_message_bytes=invitation.max_step_bytes,
            )
        except DialError as error:
            late = time.monotonic() + pause > deadline
            if late or error.kind != "unreachable" or _is_over(invitation, error):
                raise
            logger.info("trying again in %g s: %s", pause, error)
        time.sleep(pause)
        pause *= 2


def _is_over(invitation: Invitation, error: Exception) -> bool:
    """Tell whether nobody listens any more to what a session was."""
    unreachable = isinstance(error, DialError) and error.kind == "unreachable"
    return unreachable and invitation.session in _ended


def describe_host(invitation: Invitation) -> Hello:
    """Return what a host says of itself when it joins."""
    return Hello(peers=count_simulated_hosts() if invitation.simulated else 0)


def count_simulated_hosts() -> int:
    """Return how many actors like this one the simulation can run; 0 in a deployment.

    Flower's engine makes as many as the cluster's resources hold, and tells nobody.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0
    return max(1, count_places(ray, ray.get_runtime_context().get_assigned_resources()))


class HostedClients:
    """The clients of a host: its own, or any partition of a simulation.

    ConfigError if the node's own ``state-dir`` is no absolute path.
    """

    def __init__(self, app: ClientApp, context: Context, invitation: Invitation) -> None:
        folder = str(context.node_config.get("state-dir", ""))
        # Both sides must say so: no server makes a deployed node serve other clients than its own.
        self._simulated = invitation.simulated and count_simulated_hosts() > 0
        if self._simulated:
            folder = invitation.state_dir
        if folder and not Path(folder).is_absolute():
            raise ConfigError(f"node config: state-dir is {folder!r}, expected an absolute path")
        store = Path(folder) / folder_name(invitation.experiment) if folder else None
        self.cohort = Cohort(app, store=store)
        self._contexts = {OWN_CLIENT: context}
        # For `flsplit clean`. In a simulation the server has locked what is around all of them.
        self._lock: FolderLock | None = None
        if store and not self._simulated:
            self._lock = FolderLock(store / folder_name(client_name(context)))

    def __enter__(self) -> Self:
        """Say that the client's folder is in use; where that can't be, the first round tells."""
        if self._lock:
            with suppress(StorageError):
                self._lock.take()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Let go of it."""
        if self._lock:
            self._lock.release()

    def answer(self, client: str, message: Message) -> Message:
        """Return a client's answer."""
        if client not in self._contexts:
            if not (self._simulated and client.isdecimal()):
                expected = "a partition" if self._simulated else "'': this node serves its own"
                problem = f"envelope: client is {client!r}, expected {expected}"
                return raised(message, ProtocolError(problem))
            own = self._contexts[OWN_CLIENT]
            self._contexts[client] = Context(
                run_id=own.run_id,
                node_id=own.node_id,
                node_config={**own.node_config, "partition-id": int(client)},
                state=RecordDict(),
                run_config=own.run_config,
            )
        return self.cohort.answer(message, self._contexts[client])


def _serve(stream: HostStream, clients: HostedClients) -> int:
    served = 0
    with set_aside():
        for envelope, request in stream:
            reply = clients.answer(envelope.client, request)
            try:
                _send(stream, envelope, request, reply)
            except StreamEnded:
                break
            served += 1
    clients.cohort.flush()
    return served


def _send(stream: HostStream, envelope: Envelope, request: Message, reply: Message) -> None:
    """Send a reply; one that can't be sent costs its client the answer, not the host its stream."""
    try:
        stream.send(envelope, reply)
    except WireError as error:
        problem = ConfigError(
            f"the answer can't be sent: {error} (session-max-step-bytes; {HOW_TO_SET})"
        )
        logger.error("client %r: %s", envelope.client, problem)
        stream.send(envelope, raised(request, problem))


def _reply(message: Message, *, served: int) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"served": served})}), reply_to=message)
