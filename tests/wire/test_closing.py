import contextlib
import gc
import socket
import threading
import time

from flsplit.wire import HostStream, SessionServer

from .peers import QUICK, dial, exchange, processes, serve_and_fail, start_echo


def test_close_leaves_no_thread_and_no_port():
    before = set(threading.enumerate())
    server = SessionServer(keepalive=QUICK)
    streams = [dial(server, host) for host in "abc"]
    process = start_echo_beside(server, "d")
    exchange(server, "d")
    server.close()
    for stream in streams:
        assert list(stream) == []
        assert stream.ending.reason == "the session is over"
        stream.close()
    process.join(60)
    assert process.exitcode == 0
    assert wait_until_gone(before) == set()
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    server.close()
    assert server.receive() is None


def start_echo_beside(server, host):
    for _ in range(3):
        server.receive(5)
    return start_echo(server, host)


def wait_until_gone(before, seconds=60):
    deadline = time.monotonic() + seconds
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    return left


def test_closing_wakes_whoever_waits():
    server = SessionServer(keepalive=QUICK)
    threading.Timer(0.2, server.close).start()
    assert server.receive(3600) is None


def test_a_program_that_fails_ends_and_so_do_its_hosts():
    here, there = processes.Pipe()
    process = processes.Process(target=serve_and_fail, args=(there,), daemon=True)
    process.start()
    with HostStream.dial(*here.recv(), {}, keepalive=QUICK) as stream:
        assert list(stream) == []
        assert not stream.ending.orderly
    process.join(60)
    assert process.exitcode == 1


def test_leaving_a_failed_block_says_so():
    with contextlib.suppress(ZeroDivisionError), SessionServer(keepalive=QUICK) as server:
        stream = dial(server, "a")
        1 / 0  # noqa: B018 - the session fails here
    assert list(stream) == []
    assert stream.ending.reason == "the session has failed"
    stream.close()
