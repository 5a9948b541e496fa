"""The server's end of one host's stream."""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from flwr.app import Message

from flsplit.wire.bundles import unbundled
from flsplit.wire.codec import Decoder, encode
from flsplit.wire.credentials import Ticket
from flsplit.wire.events import Event, HostJoined, HostLost, MessageArrived
from flsplit.wire.frames import FRAME_BYTES, read_goodbye, read_hello, shorten_reason
from flsplit.wire.grpc_options import REASON_KEY
from flsplit.wire.header import Envelope
from flsplit.wire.outbox import Outbox
from flsplit.wire.wire_errors import Told, WireError

logger = logging.getLogger(__name__)

END_GRACE = 0.5
"""Seconds in which a stream that was ended can still say why, before it is cut off."""

_BROKEN = (
    "the connection to the host is gone: its process ended, or nothing came from it within the "
    f"keep-alive, or it sent a frame far over {FRAME_BYTES} bytes"
)


class HostLink:
    """One host's stream: sends what is given to it, and reports what the host does.

    What happens goes into ``events`` as ``(link, event)``, in that order. The three bounds are
    those of `SessionServer`.
    """

    def __init__(
        self,
        ticket: Ticket,
        context: Any,
        events: "queue.SimpleQueue[tuple[HostLink, Event] | None]",
        max_message_bytes: int,
        max_queued_bytes: int,
        unasked_messages: int,
    ) -> None:
        self.ticket = ticket
        self._context = context
        self._events = events
        self._max_message_bytes = max_message_bytes
        self._allowed = unasked_messages
        self._outbox = Outbox(max_queued_bytes)
        self._decoder = Decoder(max_message_bytes)
        self._lock = threading.Lock()
        self._ending: tuple[Any, str] | None = None
        self._silent = False
        self._joined = False
        self._farewell: str | None = None
        self.closed = False
        """Whether the server's own user closed it; its events are of no interest any more."""
        self._guillotine = threading.Timer(END_GRACE, context.cancel)
        self._guillotine.daemon = True
        if not context.add_callback(self._terminated):
            self._terminated()

    def send(self, envelope: Envelope, message: Message, timeout: float | None) -> int:
        """Queue a message for the host and return its size."""
        parcel = encode(envelope, message, self._max_message_bytes)
        # Counted before it is queued, since the reply can be there before this returns.
        self._allow(1)
        self._outbox.put(parcel.frames(), parcel.size, timeout)
        return parcel.size

    def payloads(self) -> Iterator[bytes]:
        """Yield what gRPC is to send; when this ends, the stream ends."""
        yield from self._outbox.payloads()
        if self._ending is not None:
            code, reason = self._ending
            self._context.set_code(code)
            shortened = shorten_reason(reason)
            self._context.set_details(shortened.decode())
            # gRPC drops the details of a good status.
            self._context.set_trailing_metadata(((REASON_KEY, shortened),))

    def read(self, requests: Iterable[bytes]) -> None:
        """Report everything that the host sends until its stream ends."""
        reason = self._read(requests)
        self._outbox.drop(reason)
        self._report(HostLost(self.ticket.host, self.ticket.epoch, reason))

    def end(self, code: Any, reason: str, *, flush: bool = False) -> None:
        """End the stream and tell the host why."""
        with self._lock:
            if self._ending is not None:
                return
            self._ending = (code, reason)
            # A host that does not read, such as a stopped one, would keep the stream half open.
            self._guillotine.start()
        if flush:
            self._outbox.finish(reason)
        else:
            self._outbox.drop(reason)

    def close(self, reason: str) -> None:
        """End the stream in good order and forget its events."""
        self.closed = True
        with self._lock:
            self._silent = True
        self.end(grpc.StatusCode.OK, reason, flush=True)

    def supersede(self, reason: str) -> None:
        """Report the host as lost and let nothing more of this stream be heard."""
        self._report(HostLost(self.ticket.host, self.ticket.epoch, reason))
        with self._lock:
            self._silent = True
        self.end(grpc.StatusCode.ABORTED, reason)

    def _read(self, requests: Iterable[bytes]) -> str:
        try:
            for payload in requests:
                for frame in unbundled(payload):
                    self._take(frame)
        except WireError as error:
            logger.warning("host %s sent what does not fit: %s", self.ticket.host, error)
            self.end(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return f"the host sent what does not fit: {error}"
        except Exception:  # gRPC raises a bare one when the stream breaks
            logger.debug("the stream of host %s broke", self.ticket.host, exc_info=True)
        return self._reason()

    def _reason(self) -> str:
        if self._ending is not None:
            return self._ending[1]
        if self._farewell is not None:
            return f"the host closed the stream: {self._farewell}"
        return _BROKEN if self._decoder.idle else f"{_BROKEN} (in the middle of a message)"

    def _take(self, frame: bytes) -> None:
        host, epoch = self.ticket.host, self.ticket.epoch
        if not self._joined:
            hello = read_hello(frame)
            self._joined = True
            logger.info("host %s (epoch %d) has joined", host, epoch)
            self._report(HostJoined(host, epoch, hello))
            return
        if self._decoder.idle:
            self._farewell = read_goodbye(frame)
            if self._farewell is not None:
                return
            self._allow(-1)
        arrived = self._decoder.add(frame)
        if arrived is not None:
            logger.debug("host %s: message %d has arrived", host, arrived[0].sequence)
            self._report(MessageArrived(host, epoch, *arrived))

    def _allow(self, messages: int) -> None:
        # What nobody has asked for would pile up here, and a host could fill the memory with it.
        with self._lock:
            if self._allowed + messages < 0:
                raise WireError(
                    "message", "no more messages than were sent to the host", Told("one more")
                )
            self._allowed += messages

    def _report(self, event: Event) -> None:
        with self._lock:
            if self._joined and not self._silent:
                self._events.put((self, event))

    def _terminated(self) -> None:
        # gRPC calls this when the stream is over for whatever reason: nobody may wait for it now.
        self._guillotine.cancel()
        self._outbox.drop(self._reason())
