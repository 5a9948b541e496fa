"""A host's end of its stream."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import grpc
from flwr.app import Message

from flsplit.wire.bundles import unbundled
from flsplit.wire.codec import DEFAULT_MAX_BYTES, Decoder, encode
from flsplit.wire.dialing import open_channel, wait_until_admitted
from flsplit.wire.frames import write_goodbye, write_hello
from flsplit.wire.grpc_options import (
    METHOD,
    PROTOCOL_VERSION,
    REASON_KEY,
    SERVICE,
    TOKEN_KEY,
    VERSION_KEY,
    Keepalive,
)
from flsplit.wire.header import Envelope
from flsplit.wire.outbox import DEFAULT_MAX_QUEUED_BYTES, Outbox
from flsplit.wire.wire_errors import WireError

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0
_ENDED = "the stream has ended"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stream ended.

    Parameters
    ----------
    orderly : bool
        Whether one of the two sides closed it, as opposed to a failure.
    reason : str
        Why, in words: the server's where it gave one.
    """

    orderly: bool
    reason: str


class HostStream:
    """The stream of one host, opened with `dial`.

    Iterate over it to get what the server sends, one message at a time: the next is only taken
    from the network when it is asked for. The iteration ends when the stream does, for whatever
    cause; `ending` says which.
    """

    def __init__(self, channel: Any, call: Any, outbox: Outbox, max_message_bytes: int) -> None:
        self._channel = channel
        self._call = call
        self._outbox = outbox
        self._max_message_bytes = max_message_bytes
        self._decoder = Decoder(max_message_bytes)
        self._over = threading.Event()
        self._ending: Ending | None = None
        if not call.add_callback(self._terminated):
            self._terminated()

    @classmethod
    def dial(
        cls,
        address: str,
        token: str,
        certificate_pem: bytes | None,
        hello: dict[str, Any],
        timeout: float = 10.0,
        *,
        max_message_bytes: int = DEFAULT_MAX_BYTES,
        max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES,
        keepalive: Keepalive | None = None,
    ) -> "HostStream":
        """Open a stream to the server of a session.

        ``token`` is what the server has issued for this host; ``certificate_pem`` the only
        certificate to trust, None to dial without TLS. The bounds are as in `SessionServer`.

        DialError if it cannot be opened. It names the address and a remedy.
        """
        introduction = write_hello(hello)
        channel = open_channel(address, certificate_pem, keepalive or Keepalive())
        outbox = Outbox(max_queued_bytes)
        method = channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)
        metadata = ((TOKEN_KEY, token), (VERSION_KEY, str(PROTOCOL_VERSION)))
        call = method(outbox.payloads(), metadata=metadata)
        try:
            wait_until_admitted(address, call, timeout)
        except BaseException:
            outbox.drop(_ENDED)
            call.cancel()
            channel.close()
            raise
        outbox.put([introduction], len(introduction))
        return cls(channel, call, outbox, max_message_bytes)

    @property
    def ending(self) -> Ending | None:
        """How the stream ended, or None while it is open."""
        return self._ending

    def send(self, envelope: Envelope, message: Message, timeout: float | None = None) -> int:
        """Send a message to the server; returns its bytes on the wire once it is queued.

        WireError if the message cannot be sent as it is; the stream is unharmed. StreamEnded if the
        stream is over. TimeoutError if there is no room within `timeout` seconds.
        """
        parcel = encode(envelope, message, self._max_message_bytes)
        self._outbox.put(parcel.frames(), parcel.size, timeout)
        return parcel.size

    def __iter__(self) -> Iterator[tuple[Envelope, Message]]:
        """Yield what the server sends until the stream ends."""
        while (payload := self._next_payload()) is not None:
            for envelope, message, _ in self._take(payload):
                yield envelope, message

    def close(self, reason: str = "the host is done") -> None:
        """Close the stream after what waits to be sent; safe to call twice."""
        ending = Ending(orderly=True, reason=reason)
        if self._ending is None:
            self._ending = ending
        self._outbox.finish(reason, last=write_goodbye(reason))
        self._over.wait(_FLUSH_SECONDS)
        self._end(ending)

    def __enter__(self) -> Self:
        """Return the stream, which is open already."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close it."""
        self.close("the host is done" if error is None else "the host has failed")

    def _next_payload(self) -> bytes | None:
        try:
            payload: bytes | None = next(self._call, None)
        except grpc.RpcError:
            payload = None
        if payload is None:
            self._over.wait(_FLUSH_SECONDS)
        return payload

    def _take(self, payload: bytes) -> list[tuple[Envelope, Message, int]]:
        try:
            arrived = [self._decoder.add(frame) for frame in unbundled(payload)]
            return [one for one in arrived if one is not None]
        except WireError as error:
            logger.error("the server sent what does not fit: %s", error)  # noqa: TRY400
            self._end(Ending(orderly=False, reason=f"the server sent what does not fit: {error}"))
            raise

    def _end(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
        self._outbox.drop(ending.reason)
        self._call.cancel()
        self._channel.close()

    def _terminated(self) -> None:
        # gRPC calls this on a thread of its own when the stream is over for whatever reason.
        if self._ending is None:
            self._ending = _read_ending(self._call)
        self._outbox.drop(self._ending.reason)
        self._over.set()


def _read_ending(call: Any) -> Ending:
    told = dict(call.trailing_metadata() or ()).get(REASON_KEY)
    reason = told.decode("utf-8", "replace") if isinstance(told, bytes) else call.details()
    return Ending(call.code() is grpc.StatusCode.OK, reason or _ENDED)
