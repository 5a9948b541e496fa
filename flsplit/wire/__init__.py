"""Sessions on the level of bytes: Flower messages over one stream per host.

The process of the ServerApp listens with a `SessionServer`; each host dials it with
`HostStream.dial` and serves messages until the stream closes. The format is specified in
``docs/wire.md``.
"""

from flsplit.wire.codec import Decoder, Parcel, encode
from flsplit.wire.credentials import Certificate, Ticket, TokenBook, make_certificate
from flsplit.wire.events import Event, HostJoined, HostLost, MessageArrived
from flsplit.wire.grpc_options import PROTOCOL_VERSION, Keepalive
from flsplit.wire.header import Envelope, make_message
from flsplit.wire.host_stream import Ending, HostStream
from flsplit.wire.server import SessionServer
from flsplit.wire.wire_errors import DialError, StreamEnded, TokenRefused, WireError

__all__ = [
    "PROTOCOL_VERSION",
    "Certificate",
    "Decoder",
    "DialError",
    "Ending",
    "Envelope",
    "Event",
    "HostJoined",
    "HostLost",
    "HostStream",
    "Keepalive",
    "MessageArrived",
    "Parcel",
    "SessionServer",
    "StreamEnded",
    "Ticket",
    "TokenBook",
    "TokenRefused",
    "WireError",
    "encode",
    "make_certificate",
    "make_message",
]
