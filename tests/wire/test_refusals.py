import logging
import os
import queue
import re
import socket
import threading
import time

import grpc
import pytest

from flsplit.wire import (
    DialError,
    Envelope,
    HostJoined,
    HostLost,
    HostStream,
    SessionServer,
    StreamEnded,
    encode,
    make_certificate,
)
from flsplit.wire.frames import FRAME_BYTES, write_hello
from flsplit.wire.grpc_options import METHOD, SERVICE, TOKEN_KEY, VERSION_KEY, channel_options

from .peers import QUICK, dial, exchange, make_tensor_message, start_echo

ENVELOPE = Envelope("client-0", 0, 0, "step")


@pytest.fixture
def bystander(server):
    """Another host that must not notice anything."""
    process = start_echo(server, "bystander")
    exchange(server, "bystander")
    yield
    while server.receive(0.1) is not None:
        pass
    exchange(server, "bystander")
    server.close()
    process.join(5)
    assert process.exitcode == 0


class RawHost:
    """A host that sends whatever it is told to."""

    def __init__(self, server, token, version="1"):
        options = channel_options(server.address, QUICK)
        options = [o for o in options if "message_length" not in o[0]]
        options.append(("grpc.max_send_message_length", -1))
        credentials = grpc.ssl_channel_credentials(server.certificate_pem)
        self.channel = grpc.secure_channel(server.address, credentials, options)
        self.frames = queue.SimpleQueue()
        pairs = ((TOKEN_KEY, token), (VERSION_KEY, version))
        metadata = tuple(pair for pair in pairs if pair[1] is not None)
        method = self.channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)
        self.call = method(iter(self.frames.get, None), metadata=metadata)

    def send(self, *frames):
        for frame in frames:
            self.frames.put(frame)

    def end(self):
        """Return the status with which the server ended the stream."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError:
            pass
        self.frames.put(None)
        self.channel.close()
        return self.call.code(), self.call.details()


def refused_dial(address, token, certificate_pem, timeout=3600):
    """Return the error of a dial that is refused at once: it doesn't wait for the timeout."""
    with pytest.raises(DialError) as caught:
        HostStream.dial(address, token, certificate_pem, {}, timeout, keepalive=QUICK)
    error = caught.value
    assert address in str(error)
    assert error.port == address.rpartition(":")[2]
    assert error.remedy in str(error)
    return error


@pytest.mark.usefixtures("bystander")
class TestAtTheDoor:
    def test_without_a_token(self, server, caplog):
        host = RawHost(server, token=None)
        host.send(write_hello({}), b"garbage")
        assert host.end() == (grpc.StatusCode.UNAUTHENTICATED, "the token is unknown")
        assert "refused a stream from ipv4:127.0.0.1" in caplog.text
        assert server.receive(0.1) is None

    def test_a_wrong_token(self, server, caplog):
        error = refused_dial(server.address, "guess", server.certificate_pem)
        assert (error.kind, error.cause) == ("token", "the token is unknown")
        assert "the token is unknown" in caplog.text

    def test_a_used_token(self, server, caplog):
        token = server.invite("a")
        with HostStream.dial(server.address, token, server.certificate_pem, {}) as stream:
            error = refused_dial(server.address, token, server.certificate_pem)
            assert "the token of host 'a' was used already" in error.cause
            assert error.cause in caplog.text
            assert server.receive(5) == HostJoined("a", 0, {})
            # The stream that the token opened goes on.
            server.send("a", ENVELOPE, make_tensor_message())
            assert next(iter(stream))[0] == ENVELOPE

    def test_a_token_of_an_old_epoch(self, server):
        token = server.invite("a", 0)
        server.invite("a", 1)
        assert "epoch 0" in refused_dial(server.address, token, server.certificate_pem).cause

    def test_a_wrong_certificate(self, server):
        other = make_certificate(["127.0.0.1"]).certificate_pem
        token = server.invite("a")
        error = refused_dial(server.address, token, other)
        assert error.kind == "certificate"
        assert "not the server of this session" in error.remedy
        # The token was never shown to the stranger, so it is still good.
        HostStream.dial(server.address, token, server.certificate_pem, {}).close()

    def test_a_wrong_version(self, server, caplog):
        host = RawHost(server, server.invite("a"), version="7")
        code, details = host.end()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "version 1" in details
        assert "host a speaks version 7" in details
        assert details in caplog.text

    def test_no_version(self, server):
        assert RawHost(server, server.invite("a"), version=None).end()[1].endswith("version None")

    def test_tls_against_no_tls(self, server):
        with SessionServer(tls=False) as plain:
            token = plain.invite("a")
            assert refused_dial(plain.address, token, server.certificate_pem).kind == "certificate"
        assert refused_dial(server.address, "x", None).kind in ("certificate", "unreachable")

    def test_garbage_instead_of_http(self, server):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(os.urandom(10_000))


def wrong_frames():
    frame = next(encode(ENVELOPE, make_tensor_message()).frames())
    long = list(encode(ENVELOPE, make_tensor_message(bytes(10 * 2**20))).frames())
    hello = write_hello({})
    return {
        "no hello": [frame],
        "hello of no sense": [b"\x00{"],
        "empty": [hello, b""],
        "garbage": [hello, os.urandom(1000)],
        "truncated": [hello, frame[:-20]],
        "frame over the limit": [hello, bytes(FRAME_BYTES + 1)],
        "message over the limit": [hello, *long],
        "bundle that ends too early": [hello, b"\4\0\0\0\7abc"],
    }


@pytest.mark.chaos(
    "a host sends bytes that are no message",
    "its stream ends with the reason, the others go on",
)
@pytest.mark.parametrize("name", list(wrong_frames()))
def test_what_does_not_fit_ends_that_stream_alone(name, caplog):
    frames = wrong_frames()[name]
    with SessionServer(max_message_bytes=2**20, unasked_messages=5, keepalive=QUICK) as server:
        other = dial(server, "other")
        server.receive(5)
        host = RawHost(server, server.invite("a"))
        host.send(*frames)
        code, details = host.end()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert re.search("expected .* got ", details)
        assert "host a sent what does not fit" in caplog.text
        assert details in caplog.text
        if len(frames) > 1:
            assert server.receive(5) == HostJoined("a", 0, {})
            lost = server.receive(5)
            assert isinstance(lost, HostLost)
            assert details in lost.reason
        assert server.hosts == ["other"]
        server.send("other", ENVELOPE, make_tensor_message())
        assert next(iter(other))[0] == ENVELOPE
        other.close()


def test_a_frame_far_over_the_limit(server):
    host = RawHost(server, server.invite("a"))
    host.send(write_hello({}), bytes(4 * FRAME_BYTES))
    assert host.end()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(server.receive(5), HostJoined)
    assert "far over 8388608 bytes" in server.receive(5).reason


def test_a_message_nobody_asked_for(server, caplog):
    host = RawHost(server, server.invite("a"))
    frame = next(encode(ENVELOPE, make_tensor_message()).frames())
    host.send(write_hello({}), frame)
    assert "no more messages than were sent to the host" in host.end()[1]
    assert "no more messages" in caplog.text


def test_a_stream_that_ends_within_a_message(server):
    server_message = make_tensor_message(bytes(10 * 2**20))
    host = RawHost(server, server.invite("a"))
    host.send(write_hello({}))
    assert isinstance(server.receive(5), HostJoined)
    server.send("a", ENVELOPE, make_tensor_message())
    host.send(next(encode(ENVELOPE, server_message).frames()), None)
    host.end()
    assert "in the middle of a message" in server.receive(5).reason


def test_one_host_too_many(caplog):
    with SessionServer(max_hosts=1, keepalive=QUICK) as server:
        first = dial(server, "a")
        error = refused_dial(server.address, server.invite("b"), server.certificate_pem)
        assert (error.kind, error.cause) == ("refused", "the session has its 1 hosts already")
        assert error.cause in caplog.text
        # The same host may come back all the same.
        dial(server, "a", epoch=1).close()
        first.close()


@pytest.mark.chaos(
    "many strangers dial",
    "they keep no host out",
)
def test_many_strangers_do_not_keep_a_host_out():
    with SessionServer(max_hosts=1, keepalive=QUICK) as server:
        strangers = [RawHost(server, token="guess") for _ in range(30)]
        with dial(server, "a"):
            assert isinstance(server.receive(5), HostJoined)
        for stranger in strangers:
            assert stranger.end()[0] in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,  # who comes when the session is full
            )


def test_nobody_listens(server):
    address, pem = server.address, server.certificate_pem
    server.close()
    error = refused_dial(address, "x", pem)
    assert error.kind == "unreachable"
    assert error.port in error.remedy


def test_a_name_that_does_not_resolve(server):
    assert refused_dial("no-such-host.invalid:1", "x", server.certificate_pem).kind == "unreachable"


def test_somebody_listens_and_says_nothing(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        error = refused_dial(address, "x", server.certificate_pem, timeout=0.5)
        assert (error.kind, error.cause) == ("unreachable", "no answer within 0.5 s")


def test_something_else_speaks_grpc():
    from concurrent import futures

    with futures.ThreadPoolExecutor(1) as pool:
        other = grpc.server(pool)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        error = refused_dial(f"127.0.0.1:{port}", "x", None)
        other.stop(None)
    assert error.kind == "version"


def test_an_address_in_use(server):
    with pytest.raises(OSError, match=f"cannot listen on {server.address}"):
        SessionServer(server.address)


def test_a_refused_dial_leaves_no_thread(server):
    before = set(threading.enumerate())
    for _ in range(3):
        refused_dial(server.address, "guess", server.certificate_pem)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and _mine(set(threading.enumerate()) - before):
        time.sleep(0.02)
    assert _mine(set(threading.enumerate()) - before) == []


def test_sending_to_a_stranger_is_refused(server):
    with pytest.raises(StreamEnded, match="'nobody' is not connected"):
        server.send("nobody", ENVELOPE, make_tensor_message())


def _mine(threads):
    # The server's pool keeps its threads for the next stream.
    return [thread for thread in threads if not thread.name.startswith("flsplit-stream")]


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.INFO, "flsplit.wire")
