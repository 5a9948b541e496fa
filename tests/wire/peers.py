"""Messages to send, and other processes to send them to."""

import multiprocessing
import os
import time

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Metadata,
    MetricRecord,
    RecordDict,
)

from flsplit.wire import Envelope, HostJoined, HostStream, Keepalive, SessionServer, make_message

QUICK = Keepalive(interval=0.4, timeout=0.4)

# A fork server imports the package once; every further process starts in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["flsplit.wire"])


def make_metadata(**changes):
    fields = {
        "run_id": 2**63 + 5,
        "message_id": "m1",
        "src_node_id": 1,
        "dst_node_id": 2**64 - 1,
        "reply_to_message_id": "m0",
        "group_id": "3",
        "created_at": time.time(),
        "ttl": 3600.5,
        "message_type": "train.step",
        "src_task_id": None,
        "dst_task_id": 7,
    }
    return Metadata(**(fields | changes))


def make_tensor_message(data=b"12345678", **changes):
    arrays = ArrayRecord({"x": Array("uint8", (len(data),), "flsplit.raw", data)})
    config = ConfigRecord({"lr": 0.1, "labels": b"\x00\x01", "update": True})
    metrics = MetricRecord({"loss": float("nan"), "counts": [1, 2]})
    content = RecordDict({"smashed": arrays, "config": config, "metrics": metrics})
    return make_message(make_metadata(**changes), content=content)


def data_of(message):
    return message.content["smashed"]["x"].data


def dial(server, host, epoch=0, **options):
    token = server.invite(host, epoch)
    options.setdefault("keepalive", QUICK)
    return HostStream.dial(server.address, token, server.certificate_pem, {"name": host}, **options)


def echo(address, token, certificate_pem, keepalive=QUICK):
    """Send every message back until the stream ends (in a process of its own)."""
    with HostStream.dial(address, token, certificate_pem, {}, 20, keepalive=keepalive) as stream:
        for envelope, message in stream:
            stream.send(envelope, message)


def start_echo(server, host, epoch=0):
    arguments = (server.address, server.invite(host, epoch), server.certificate_pem)
    process = processes.Process(target=echo, args=arguments, daemon=True)
    process.start()
    joined = server.receive(30)
    assert isinstance(joined, HostJoined)
    assert joined.host == host
    return process


def serve_and_report(pipe):
    """Invite one host, then sit there (in a process of its own)."""
    server = SessionServer(keepalive=QUICK)
    pipe.send((server.address, server.invite("a"), server.certificate_pem))
    time.sleep(60)


def serve_and_fail(pipe):
    """Raise in the main thread while a host is connected (in a process of its own)."""
    server = SessionServer(keepalive=QUICK)
    pipe.send((server.address, server.invite("a"), server.certificate_pem))
    server.receive(20)
    raise RuntimeError("the app has failed")


def exchange(server, host, size=1000, sequence=0, timeout=10):
    """Send one message, and return the event that comes back."""
    data = os.urandom(size)
    envelope = Envelope("client-0", sequence, 0, "step")
    server.send(host, envelope, make_tensor_message(data), timeout)
    event = server.receive(timeout)
    assert event is not None
    assert (event.host, event.envelope) == (host, envelope)
    assert data_of(event.message) == data
    return event
