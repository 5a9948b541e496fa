import threading
import time

import pytest
from flwr.app import Error

from flsplit.wire import (
    Ending,
    Envelope,
    HostJoined,
    HostLost,
    HostStream,
    MessageArrived,
    SessionServer,
    StreamEnded,
    WireError,
    make_message,
)

from .peers import QUICK, data_of, dial, exchange, make_metadata, make_tensor_message, start_echo

ENVELOPE = Envelope("client-0", 0, 0, "step")


def serve(stream):
    """Echo on a thread of this process."""

    def loop():
        for envelope, message in stream:
            stream.send(envelope, message)

    thread = threading.Thread(target=loop)
    thread.start()
    return thread


def test_a_host_joins_and_answers(server):
    with dial(server, "a", epoch=2) as stream:
        assert server.receive(5) == HostJoined("a", 2, {"name": "a"})
        assert server.hosts == ["a"]
        thread = serve(stream)
        for size in (0, 1, 40_000, 20 * 2**20):
            event = exchange(server, "a", size)
            assert isinstance(event, MessageArrived)
            assert event.size > size
        assert server.receive(0.01) is None
        server.close_host("a", "enough")
        thread.join(5)
    assert stream.ending == Ending(True, "enough")


def test_both_sides_count_the_same_bytes(server):
    with dial(server, "a") as stream:
        server.receive(5)
        message = make_tensor_message()
        sent = server.send("a", ENVELOPE, message)
        envelope, arrived = next(iter(stream))
        assert stream.send(envelope, arrived) == sent
        assert server.receive(5).size == sent


def test_errors_travel(server):
    with dial(server, "a") as stream:
        server.receive(5)
        serve(stream)
        server.send("a", ENVELOPE, make_message(make_metadata(), error=Error(1, "no data")))
        assert server.receive(5).message.error == Error(1, "no data")
        server.close_host("a", "enough")


def test_without_tls():
    with SessionServer(tls=False) as server, dial(server, "a") as stream:
        assert server.certificate_pem is None
        server.receive(5)
        serve(stream)
        exchange(server, "a")
        server.close_host("a", "enough")


def test_two_processes(server):
    processes = [start_echo(server, host) for host in "ab"]
    for sequence in range(20):
        exchange(server, "ab"[sequence % 2], sequence=sequence)
    server.close()
    for process in processes:
        process.join(5)
        assert process.exitcode == 0


def test_a_quiet_host_is_not_cut_off(server):
    # Many times the interval of the keep-alive: gRPC's own limits on pings must not bite.
    process = start_echo(server, "a")
    assert server.receive(8 * QUICK.interval) is None
    exchange(server, "a")
    server.close()
    process.join(5)


def test_the_host_closes(server):
    stream = dial(server, "a")
    server.receive(5)
    server.send("a", ENVELOPE, make_tensor_message())
    envelope, message = next(iter(stream))
    stream.send(envelope, message)
    stream.close("no more data")
    # What it had sent still arrives.
    assert isinstance(server.receive(5), MessageArrived)
    lost = server.receive(5)
    assert lost == HostLost("a", 0, "the host closed the stream: no more data")
    with pytest.raises(StreamEnded, match="'a' is not connected"):
        server.send("a", ENVELOPE, make_tensor_message())
    with pytest.raises(StreamEnded, match="no more data"):
        stream.send(ENVELOPE, make_tensor_message())
    assert list(stream) == []
    stream.close()


def test_the_last_message_arrives_before_the_end(server):
    with dial(server, "a") as stream:
        server.receive(5)
        server.send("a", ENVELOPE, make_tensor_message(bytes(2**20)))
        server.close_host("a", "that was all")
        assert [data_of(message) for _, message in stream] == [bytes(2**20)]
        assert stream.ending == Ending(True, "that was all")


def test_a_closed_host_is_not_heard_of_again(server):
    with dial(server, "a") as stream:
        server.receive(5)
        server.send("a", ENVELOPE, make_tensor_message())
        envelope, message = next(iter(stream))
        stream.send(envelope, message)
        time.sleep(0.1)
        server.close_host("a", "enough")
        server.close_host("a", "again")
        assert list(stream) == []
    assert server.receive(0.3) is None


def test_a_host_that_comes_back_replaces_its_old_stream(server):
    old = dial(server, "a", epoch=0)
    assert server.receive(5).epoch == 0
    new = dial(server, "a", epoch=1)
    lost, joined = server.receive(5), server.receive(5)
    assert lost == HostLost("a", 0, "the host has come back with epoch 1")
    assert joined == HostJoined("a", 1, {"name": "a"})
    assert list(old) == []
    assert old.ending == Ending(False, "the host has come back with epoch 1")
    serve(new)
    exchange(server, "a")
    assert server.receive(0.1) is None
    server.close_host("a", "enough")
    old.close()
    new.close()


def test_sending_waits_for_a_slow_host_and_then_gives_up():
    with (
        SessionServer(keepalive=QUICK, max_queued_bytes=2**20) as server,
        dial(server, "a") as stream,
    ):
        server.receive(5)
        message = make_tensor_message(bytes(20 * 2**20))
        server.send("a", ENVELOPE, message)
        with pytest.raises(TimeoutError, match=r"0.3 s"):
            server.send("a", ENVELOPE, message, timeout=0.3)
        # It was only slow: once it reads, all goes on.
        next(iter(stream))
        server.send("a", ENVELOPE, make_tensor_message(), timeout=5)


def test_many_long_messages_at_once_do_not_lock_up():
    # Each side sends more than both queues hold, before the server takes in any of it.
    with (
        SessionServer(keepalive=QUICK, max_queued_bytes=2**20) as server,
        dial(server, "a", max_queued_bytes=2**20) as stream,
    ):
        server.receive(5)
        thread = serve(stream)
        for sequence in range(12):
            envelope = Envelope("client-0", sequence, 0)
            server.send("a", envelope, make_tensor_message(bytes(5 * 2**20)), timeout=20)
        order = [server.receive(20).envelope.sequence for _ in range(12)]
        assert order == list(range(12))
        server.close_host("a", "enough")
        thread.join(5)


def test_a_message_that_cannot_be_sent_harms_nobody():
    with (
        SessionServer(keepalive=QUICK, max_message_bytes=10_000) as server,
        dial(server, "a", max_message_bytes=10_000) as stream,
    ):
        server.receive(5)
        serve(stream)
        with pytest.raises(WireError, match="at most 10000 bytes"):
            server.send("a", ENVELOPE, make_tensor_message(bytes(10_000)))
        exchange(server, "a")
        server.close_host("a", "enough")


def test_the_host_has_a_limit_of_its_own(server):
    with dial(server, "a", max_message_bytes=10_000) as stream:
        server.receive(5)
        server.send("a", ENVELOPE, make_tensor_message(bytes(10_000)))
        with pytest.raises(WireError, match="at most 10000 bytes"):
            next(iter(stream))
        assert not stream.ending.orderly
        assert isinstance(server.receive(5), HostLost)


def test_dial_takes_no_hello_that_json_cannot_hold(server):
    with pytest.raises(WireError, match="hello"):
        HostStream.dial(server.address, server.invite("a"), server.certificate_pem, {"a": b""})
