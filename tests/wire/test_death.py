import os
import re
import signal
import socket
import threading
import time

import pytest

from flsplit.wire import (
    Ending,
    Envelope,
    HostLost,
    HostStream,
    SessionServer,
    StreamEnded,
)

from .peers import QUICK, exchange, make_tensor_message, processes, serve_and_report, start_echo

ENVELOPE = Envelope("client-0", 0, 0, "step")
PATIENCE = 50.0
"""Seconds, far more than any of this takes: a host that isn't noticed shows as one."""


def next_loss(server):
    event = server.receive(PATIENCE)
    assert isinstance(event, HostLost)
    return event


def send_until_refused(server, message):
    for _ in range(1000):
        server.send("a", ENVELOPE, message)


@pytest.fixture
def pair(server):
    return {name: start_echo(server, name) for name in "ab"}


def test_a_killed_host_is_noticed_and_the_other_goes_on(server, pair):
    os.kill(pair["a"].pid, signal.SIGKILL)
    assert next_loss(server).host == "a"
    assert server.hosts == ["b"]
    exchange(server, "b")


@pytest.mark.chaos(
    "SIGSTOP of a host's process",
    "it is noticed, the other goes on",
)
def test_a_stopped_host_is_noticed_and_the_other_goes_on(server, pair):
    os.kill(pair["a"].pid, signal.SIGSTOP)
    lost = next_loss(server)
    assert lost.host == "a"
    assert "keep-alive" in lost.reason
    exchange(server, "b")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_sending_to_a_host_that_is_gone_does_not_wait_for_ever(stop):
    with SessionServer(keepalive=QUICK, max_queued_bytes=2**20) as server:
        process = start_echo(server, "a")
        os.kill(process.pid, stop)
        message = make_tensor_message(bytes(16 * 2**20))
        with pytest.raises(StreamEnded):
            send_until_refused(server, message)
        next_loss(server)
        server.close()


def test_closing_does_not_wait_for_a_stopped_host():
    server = SessionServer()
    process = start_echo(server, "a")
    os.kill(process.pid, signal.SIGSTOP)
    server.send("a", ENVELOPE, make_tensor_message(bytes(64 * 2**20)))
    server.close()
    with socket.create_server(("127.0.0.1", server.port)):
        pass


def test_closing_a_stopped_host_frees_its_place():
    with SessionServer(max_hosts=1) as server:
        process = start_echo(server, "a")
        os.kill(process.pid, signal.SIGSTOP)
        server.send("a", ENVELOPE, make_tensor_message(bytes(64 * 2**20)))
        server.close_host("a", "stopped")
        deadline = time.monotonic() + 5
        while _readers() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _readers() == []


def test_a_stopped_host_that_wakes_up_ends(server, pair):
    os.kill(pair["a"].pid, signal.SIGSTOP)
    next_loss(server)
    again = start_echo(server, "a", epoch=1)
    os.kill(pair["a"].pid, signal.SIGCONT)
    pair["a"].join(5)
    assert pair["a"].exitcode == 0
    exchange(server, "a")
    server.close()
    again.join(5)


@pytest.fixture
def distant():
    """A server in another process, and its one host in this one."""
    here, there = processes.Pipe()
    process = processes.Process(target=serve_and_report, args=(there,), daemon=True)
    process.start()
    with HostStream.dial(*here.recv(), {}, keepalive=QUICK) as stream:
        yield process, stream


@pytest.mark.chaos(
    "SIGKILL or SIGSTOP of the server",
    "its hosts end",
)
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_ends_when_its_server_is_gone(distant, stop):
    process, stream = distant
    os.kill(process.pid, stop)
    assert list(stream) == []
    assert not stream.ending.orderly
    with pytest.raises(StreamEnded):
        stream.send(ENVELOPE, make_tensor_message())


def test_a_host_can_be_closed_from_another_thread(distant):
    _, stream = distant
    threading.Timer(0.2, stream.close, ["no more data"]).start()
    assert list(stream) == []
    assert stream.ending == Ending(True, "no more data")


def test_a_host_that_holds_the_interpreter_is_not_lost(server, pair):
    # The answer to a ping must not need Python, or long computations would look like death.
    busy = length = 0
    while busy < QUICK.notice:
        began = time.monotonic()
        length += 1
        assert re.match(rf"(a?){{{length}}}a{{{length}}}$", "a" * length)
        busy = time.monotonic() - began
    assert server.receive(0.05) is None
    exchange(server, "a")


def _readers():
    return [t for t in threading.enumerate() if t.name.startswith("flsplit-reader")]
