"""The server of a session: hosts dial in, messages go both ways."""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import grpc
from flwr.app import Message

from flsplit.log import RareLog
from flsplit.wire.codec import DEFAULT_MAX_BYTES
from flsplit.wire.credentials import Ticket, TokenBook, make_certificate
from flsplit.wire.events import Event
from flsplit.wire.grpc_options import (
    METHOD,
    PROTOCOL_VERSION,
    SERVICE,
    TOKEN_KEY,
    VERSION_KEY,
    Keepalive,
    server_options,
)
from flsplit.wire.header import Envelope
from flsplit.wire.link import END_GRACE, HostLink
from flsplit.wire.outbox import DEFAULT_MAX_QUEUED_BYTES
from flsplit.wire.threads import StreamThreads
from flsplit.wire.wire_errors import StreamEnded, TokenRefused

logger = logging.getLogger(__name__)

# Streams beyond those of hosts: a place at the door, from which one is told why it can't come in.
_SPARE_STREAMS = 8
_CLOSE_SECONDS = 1.0


class SessionServer:
    """Listens for hosts, and lets one thread talk with all of them.

    Nothing is computed on the threads of the connections: they decode what arrives and queue it,
    and whoever runs the session takes it from there with `receive`.

    Parameters
    ----------
    bind_address : str
        Where to listen, as ``host:port``; port 0 takes a free one.
    advertised_hosts : sequence of str
        Further names and addresses for the certificate.
    tls : bool
        Whether to encrypt. Without it there is no certificate, and tokens travel in the clear.
    max_hosts : int
        The most hosts at a time. Each takes two threads while it is connected.
    max_message_bytes : int
        The longest message in either direction.
    max_queued_bytes : int
        What may wait to be sent to one host before `send` waits; one message may always.
    unasked_messages : int
        How many messages a host may send beyond one for each that it was sent. This bounds what
        can pile up unread: as many messages as the server has asked for, and these.
    keepalive : Keepalive
        When a silent host counts as lost.

    Raises
    ------
    OSError
        If it cannot listen there.
    """

    def __init__(
        self,
        bind_address: str = "127.0.0.1:0",
        *,
        advertised_hosts: tuple[str, ...] = (),
        tls: bool = True,
        max_hosts: int = 64,
        max_message_bytes: int = DEFAULT_MAX_BYTES,
        max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES,
        unasked_messages: int = 0,
        keepalive: Keepalive | None = None,
    ) -> None:
        self.tokens = TokenBook()
        self._refused = RareLog(logger)
        self._max_hosts = max_hosts
        self._link_limits = (max_message_bytes, max_queued_bytes, unasked_messages)
        self._events: queue.SimpleQueue[tuple[HostLink, Event] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._links: dict[str, HostLink] = {}
        self._readers: set[threading.Thread] = set()
        self._closed = False
        bind_host = bind_address.rpartition(":")[0].strip("[]")
        self._certificate = make_certificate((bind_host, *advertised_hosts)) if tls else None
        self._threads = StreamThreads("flsplit-stream")
        # No serialisers: what goes in and out is bytes.
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server = grpc.server(
            self._threads,
            [grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})],
            options=server_options(keepalive or Keepalive()),
            maximum_concurrent_rpcs=max_hosts + _SPARE_STREAMS,
        )
        self.port = self._listen(bind_address)
        self.address = f"{bind_address.rpartition(':')[0]}:{self.port}"
        self._server.start()

    @property
    def certificate_pem(self) -> bytes | None:
        """What a host must pin, or None without TLS."""
        return self._certificate.certificate_pem if self._certificate else None

    @property
    def hosts(self) -> list[str]:
        """The hosts that are connected now."""
        with self._lock:
            return list(self._links)

    def invite(self, host: str, epoch: int = 0) -> str:
        """Return a token with which `host` can open its stream, once."""
        return self.tokens.issue(host, epoch)

    def receive(self, timeout: float | None = None) -> Event | None:
        """Return the next event, or None after `timeout` seconds or when the server is closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._closed:
            left = None if deadline is None else _left(deadline)
            try:
                item = self._events.get(timeout=left)
            except queue.Empty:
                return None
            if item is not None and not item[0].closed:
                return item[1]
        return None

    def send(
        self, host: str, envelope: Envelope, message: Message, timeout: float | None = None
    ) -> int:
        """Send a message to `host`; returns its bytes on the wire once it is queued.

        This waits while more than `max_queued_bytes` wait for the host. It never waits longer than
        the keep-alive for a host that is dead or stopped.

        WireError if the message cannot be sent as it is; the stream is unharmed. StreamEnded if the
        host is not connected, or is lost while this waits. TimeoutError if the host is alive but
        has not made room within `timeout` seconds.
        """
        with self._lock:
            link = self._links.get(host)
        if link is None:
            raise StreamEnded(f"host {host!r} is not connected")
        return link.send(envelope, message, timeout)

    def close_host(self, host: str, reason: str) -> None:
        """End a host's stream after what waits for it, and forget its events."""
        with self._lock:
            link = self._links.pop(host, None)
        if link is not None:
            link.close(reason)

    def close(self, reason: str = "the session is over") -> None:
        """End every stream, free the port and stop all threads.

        This takes about a second at most. A thread that gRPC holds because it cannot get rid of
        data for a stopped host outlives it by up to the keep-alive.
        """
        deadline = time.monotonic() + _CLOSE_SECONDS
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links.values())
        for link in links:
            link.close(reason)
        self._events.put(None)
        self._server.stop(END_GRACE).wait(_left(deadline))
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.join(_left(deadline))
        self._threads.join(_left(deadline))

    def __enter__(self) -> Self:
        """Return the server, which listens already."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close it."""
        self.close("the session is over" if error is None else "the session has failed")

    def _listen(self, address: str) -> int:
        problem = ""
        try:
            if self._certificate is None:
                port = self._server.add_insecure_port(address)
            else:
                pair = (self._certificate.key_pem, self._certificate.certificate_pem)
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            port, problem = 0, f": {error}"
        if not port:
            raise OSError(f"cannot listen on {address}{problem}")
        return int(port)

    def _serve(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        # Runs on a thread of the pool for as long as the stream lasts. Nothing is read from
        # `requests` before the host is admitted.
        ticket = self._admit(context)
        link = HostLink(ticket, context, self._events, *self._link_limits)
        self._register(link, context)
        # The reader is started first, because it is what takes the link off the list again.
        name = f"flsplit-reader-{ticket.host}"
        reader = threading.Thread(target=self._read, args=(link, requests), name=name, daemon=True)
        with self._lock:
            self._readers.add(reader)
        reader.start()
        context.send_initial_metadata(((VERSION_KEY, str(PROTOCOL_VERSION)),))
        yield from link.payloads()

    def _admit(self, context: Any) -> Ticket:
        shown = dict(context.invocation_metadata())
        try:
            ticket = self.tokens.redeem(str(shown.get(TOKEN_KEY, "")))
        except TokenRefused as refusal:
            self._refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(refusal))
        version = shown.get(VERSION_KEY)
        if version != str(PROTOCOL_VERSION):
            reason = (
                f"the server speaks version {PROTOCOL_VERSION} of the session protocol, host "
                f"{ticket.host} speaks version {str(version)[:20]}"
            )
            self._refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        return ticket

    def _register(self, link: HostLink, context: Any) -> None:
        host = link.ticket.host
        with self._lock:
            full = len(self._links) >= self._max_hosts and host not in self._links
            accepted = not full and not self._closed
            old = self._links.get(host) if accepted else None
            if accepted:
                self._links[host] = link
        if self._closed:
            self._refuse(context, grpc.StatusCode.UNAVAILABLE, "the session is over")
        if not accepted:
            reason = f"the session has its {self._max_hosts} hosts already"
            self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        if old is not None:
            old.supersede(f"the host has come back with epoch {link.ticket.epoch}")

    def _read(self, link: HostLink, requests: Iterator[bytes]) -> None:
        try:
            link.read(requests)
        finally:
            with self._lock:
                self._readers.discard(threading.current_thread())
                if self._links.get(link.ticket.host) is link:
                    del self._links[link.ticket.host]

    def _refuse(self, context: Any, code: Any, reason: str) -> NoReturn:
        self._refused.warning("refused a stream from %s: %s", context.peer(), reason)
        context.abort(code, reason)
        raise AssertionError("abort() raises, which ends the call")


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
