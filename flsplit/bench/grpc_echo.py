"""The floor of an exchange: bytes over gRPC streams under TLS, with nothing of flsplit around them.

The processes dial in as a session's hosts do. In an exchange the server sends each its clients'
bytes, one message per client, and waits until all have come back.
"""

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from flsplit.bench.figures import BenchError
from flsplit.wire.credentials import SESSION_NAME, make_certificate

_SERVICE, _METHOD = "flsplit.Bench", "Echo"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_START_SECONDS = 180.0
_WARM_UP = 20

_Queue = queue.SimpleQueue[bytes | None]


def measure_echo(processes: int, clients: int, floats: int, steps: int) -> list[float]:
    """Return the seconds that each exchange took.

    Parameters
    ----------
    processes : int
        How many processes send back what they get.
    clients : int
        Messages per exchange, dealt out over the processes.
    floats : int
        Floats (4 bytes) per message.
    steps : int
        How many exchanges, besides the warm-up.
    """
    server = _EchoServer(processes)
    workers = [_start_worker(server) for _ in range(processes)]
    try:
        server.wait_for_hosts()
        payload = bytes(4 * floats)
        seconds = [server.exchange(payload, clients) for _ in range(_WARM_UP + steps)]
    finally:
        server.close()
        for worker in workers:
            worker.kill()
            worker.wait()
    return seconds[_WARM_UP:]


def _start_worker(server: "_EchoServer") -> "subprocess.Popen[bytes]":
    worker = subprocess.Popen(
        [sys.executable, "-m", __name__, server.address], stdin=subprocess.PIPE
    )
    assert worker.stdin is not None
    worker.stdin.write(server.certificate)
    worker.stdin.close()
    return worker


class _EchoServer:
    """Sends payloads to all processes that have dialled in, and counts what comes back."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._joined: queue.SimpleQueue[_Queue] = queue.SimpleQueue()
        self._outboxes: list[_Queue] = []
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        made = make_certificate(["127.0.0.1"])
        self.certificate = made.certificate_pem
        self._pool = ThreadPoolExecutor(2 * processes + 2)
        self._server = grpc.server(self._pool, options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service = grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})
        self._server.add_generic_rpc_handlers((service,))
        credentials = grpc.ssl_server_credentials([(made.key_pem, made.certificate_pem)])
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def _serve(self, requests: Any, context: Any) -> Iterator[bytes]:
        outbox: _Queue = queue.SimpleQueue()
        self._pool.submit(self._read, requests)
        self._joined.put(outbox)
        while (payload := outbox.get()) is not None:
            yield payload

    def _read(self, requests: Any) -> None:
        for echoed in requests:
            self._arrived.put(len(echoed))

    def wait_for_hosts(self) -> None:
        for _ in range(self._processes):
            try:
                self._outboxes.append(self._joined.get(timeout=_START_SECONDS))
            except queue.Empty:
                raise BenchError(f"no process has dialled in {_START_SECONDS:g} s") from None

    def exchange(self, payload: bytes, clients: int) -> float:
        started = time.perf_counter()
        for client in range(clients):
            self._outboxes[client % self._processes].put(payload)
        for _ in range(clients):
            if self._arrived.get(timeout=_START_SECONDS) != len(payload):
                raise BenchError("the echo came back shorter than it was sent")
        return time.perf_counter() - started

    def close(self) -> None:
        for outbox in self._outboxes:
            outbox.put(None)
        self._server.stop(grace=1.0).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _echo(address: str, certificate: bytes) -> None:
    """Dial in and send back what comes; runs in a process of its own."""
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", SESSION_NAME)]
    replies: _Queue = queue.SimpleQueue()
    with grpc.secure_channel(address, credentials, options=options) as channel:
        call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(iter(replies.get, None))
        for payload in call:
            replies.put(payload)
        replies.put(None)


if __name__ == "__main__":
    _echo(sys.argv[1], sys.stdin.buffer.read())
