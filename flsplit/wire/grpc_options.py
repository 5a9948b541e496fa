"""The settings of gRPC that both ends share, and why they are what they are."""

import ipaddress
from dataclasses import dataclass

from flsplit.wire.credentials import SESSION_NAME
from flsplit.wire.frames import FRAME_BYTES

PROTOCOL_VERSION = 1

SERVICE = "flsplit.Session"
METHOD = "Open"
TOKEN_KEY = "flsplit-token"
VERSION_KEY = "flsplit-wire-version"
REASON_KEY = "flsplit-reason-bin"
"""Why the server ended a stream; gRPC sends no text of its own with a good status."""

Options = list[tuple[str, int | str]]

_SLACK = 2**20
_LOOKAHEAD = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Keepalive:
    """When a silent peer counts as dead.

    After ``interval`` seconds of silence it is asked for a sign of life, which it has ``timeout``
    seconds to give. Question and answer travel behind data that is in the buffers of the sockets
    already, so on a slow link this must be longer than those take to empty.
    """

    interval: float = 5.0
    timeout: float = 15.0

    @property
    def notice(self) -> float:
        """The seconds within which a dead peer is noticed."""
        return self.interval + self.timeout


def common_options(keepalive: Keepalive) -> Options:
    """Return what holds on both sides."""
    return [
        # A frame just over the limit gets through to the decoder, which names the limit.
        ("grpc.max_send_message_length", FRAME_BYTES + _SLACK),
        ("grpc.max_receive_message_length", FRAME_BYTES + _SLACK),
        ("grpc.keepalive_time_ms", _milliseconds(keepalive.interval)),
        ("grpc.keepalive_timeout_ms", _milliseconds(keepalive.timeout)),
        # In current releases of gRPC the line above changes nothing by itself: every ping, also one
        # for the keep-alive, has this time for its answer, and the default is a minute.
        ("grpc.http2.ping_timeout_ms", _milliseconds(keepalive.timeout)),
        ("grpc.keepalive_permit_without_calls", 1),
        # A host may compute for hours without a word: any number of pings is fine.
        ("grpc.http2.max_pings_without_data", 0),
        # The next message travels while the host still works on this one.
        ("grpc.http2.lookahead_bytes", _LOOKAHEAD),
    ]


def server_options(keepalive: Keepalive) -> Options:
    """Return what the server sets besides."""
    return [
        *common_options(keepalive),
        # By default gRPC hangs up with "too_many_pings" on clients that ping as often as these.
        ("grpc.http2.min_ping_interval_without_data_ms", 1),
        ("grpc.http2.max_ping_strikes", 0),
        # Two sessions must not share a port without knowing.
        ("grpc.so_reuseport", 0),
    ]


def channel_options(address: str, keepalive: Keepalive) -> Options:
    """Return what a host sets besides."""
    options = [
        *common_options(keepalive),
        ("grpc.ssl_target_name_override", SESSION_NAME),
        # A token is good for one stream, so an attempt that gRPC repeats by itself would fail.
        ("grpc.enable_retries", 0),
        # Connections must not be shared with other streams of this process, nor their failures.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if _is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
