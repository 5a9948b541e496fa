"""Opening a stream, and telling why it could not be opened."""

import threading
from typing import Any

import grpc

from flsplit.wire.grpc_options import PROTOCOL_VERSION, VERSION_KEY, Keepalive, channel_options
from flsplit.wire.wire_errors import DialError

_STATUS_SECONDS = 1.0

_TLS_WORDS = ("certificate", "handshake", "ssl", "peer name")

_REMEDIES = {
    "unreachable": (
        "Check that the server is running, that this address leads to it from this machine, and "
        "that no firewall blocks TCP port {port}"
    ),
    "certificate": (
        "Whoever answers there is not the server of this session: check the address for another "
        "program on port {port}, a proxy that opens TLS, or a session that is over"
    ),
    "token": "Ask the server for a new invitation: each is good for one stream",
    "version": "Install the same version of flsplit on both sides",
    "refused": "Raise the session's limit on hosts, or wait for one to leave",
}

_KINDS = {
    grpc.StatusCode.UNAUTHENTICATED: "token",
    grpc.StatusCode.FAILED_PRECONDITION: "version",
    grpc.StatusCode.UNIMPLEMENTED: "version",
    grpc.StatusCode.OK: "version",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "refused",
}


def open_channel(address: str, certificate_pem: bytes | None, keepalive: Keepalive) -> Any:
    """Return a channel to `address` that trusts this certificate and no other."""
    options = channel_options(address, keepalive)
    if certificate_pem is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate_pem)
    return grpc.secure_channel(address, credentials, options=options)


def wait_until_admitted(address: str, call: Any, timeout: float) -> None:
    """Wait for the server's answer to the token; `DialError` if it is no, or none in time."""
    alarm = threading.Timer(timeout, call.cancel)
    alarm.daemon = True
    alarm.start()
    try:
        answer = dict(call.initial_metadata())
    finally:
        alarm.cancel()
    if answer.get(VERSION_KEY) != str(PROTOCOL_VERSION):
        raise _explain(address, call, timeout)


def _explain(address: str, call: Any, timeout: float) -> DialError:
    # A refusal follows its empty answer at once; something else that speaks gRPC may answer and
    # leave the call open.
    over = threading.Event()
    answered = call.add_callback(over.set) and not over.wait(_STATUS_SECONDS)
    call.cancel()
    code, details = call.code(), str(call.details())
    if answered:
        kind, cause = "version", "what answers there is not an flsplit session"
    elif code is grpc.StatusCode.CANCELLED:
        kind, cause = "unreachable", f"no answer within {timeout:g} s"
    else:
        kind, cause = _KINDS.get(code) or _connection_kind(details), details
    port = address.rpartition(":")[2]
    return DialError(address, kind, cause, _REMEDIES[kind].format(port=port) + ".")


def _connection_kind(details: str) -> str:
    # gRPC has one status for everything that happens before the first byte of the call.
    lowered = details.lower()
    return "certificate" if any(word in lowered for word in _TLS_WORDS) else "unreachable"
