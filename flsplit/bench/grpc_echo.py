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

    ``clients`` messages per exchange are dealt out over the processes; ``steps`` exchanges are
    measured besides the warm-up.
    """
    joined: queue.SimpleQueue[_Queue] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(2 * processes + 2)  # each stream is read and written by a thread

    def serve(requests: Any, context: Any) -> Iterator[bytes]:
        outbox: _Queue = queue.SimpleQueue()
        pool.submit(read, requests)
        joined.put(outbox)
        while (payload := outbox.get()) is not None:
            yield payload

    def read(requests: Any) -> None:
        for echoed in requests:
            arrived.put(len(echoed))

    def exchange(outboxes: list[_Queue], payload: bytes) -> float:
        started = time.perf_counter()
        for client in range(clients):
            outboxes[client % processes].put(payload)
        for _ in range(clients):
            if arrived.get(timeout=_START_SECONDS) != len(payload):
                raise BenchError("the echo came back shorter than it was sent")
        return time.perf_counter() - started

    made = make_certificate(["127.0.0.1"])
    server = grpc.server(pool, options=_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(serve)
    service = grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})
    server.add_generic_rpc_handlers((service,))
    credentials = grpc.ssl_server_credentials([(made.key_pem, made.certificate_pem)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    workers = [_start_worker(port, made.certificate_pem) for _ in range(processes)]
    outboxes: list[_Queue] = []
    try:
        while len(outboxes) < processes:
            outboxes.append(joined.get(timeout=_START_SECONDS))
        payload = bytes(4 * floats)
        seconds = [exchange(outboxes, payload) for _ in range(_WARM_UP + steps)]
    except queue.Empty:
        raise BenchError(f"nothing has come from a process for {_START_SECONDS:g} s") from None
    finally:
        for outbox in outboxes:
            outbox.put(None)
        server.stop(grace=1.0).wait()
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
            worker.wait()
    return seconds[_WARM_UP:]


def _start_worker(port: int, certificate: bytes) -> "subprocess.Popen[bytes]":
    worker = subprocess.Popen([sys.executable, "-m", __name__, str(port)], stdin=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.write(certificate)
    worker.stdin.close()
    return worker


def _echo(port: str, certificate: bytes) -> None:
    """Dial in and send back what comes; runs in a process of its own, until the stream ends."""
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", SESSION_NAME)]
    replies: _Queue = queue.SimpleQueue()
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(iter(replies.get, None))
        for payload in call:
            replies.put(payload)
        replies.put(None)


if __name__ == "__main__":
    _echo(sys.argv[1], sys.stdin.buffer.read())
