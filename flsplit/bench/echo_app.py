"""The app that measures exchanges: clients send back what they get."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from flsplit.bench.figures import BenchError
from flsplit.carry.polling import polling
from flsplit.carry.session import SessionGrid
from flsplit.carry.session.host import serve_session

ECHO = "train.echo"
WARM_UP = 1  # exchanges of Flower's messages that are not counted
SESSION_WARM_UP = 20

# The keys of the run config and their defaults.
CONFIG: UserConfig = {"carrier": "session", "clients": 2, "floats": 1, "steps": 1, "output": ""}

_CONNECT_SECONDS = 120.0


def client_app() -> ClientApp:
    """Return an ordinary ClientApp with one handler, which can also be reached over a session."""
    app = ClientApp()

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        payload = message.content.array_records["payload"]
        return Message(RecordDict({"payload": payload}), reply_to=message)

    @app.query("process")
    def process(message: Message, context: Context) -> Message:
        return Message(RecordDict({"me": ConfigRecord({"pid": os.getpid()})}), reply_to=message)

    @app.train("session")
    def session(message: Message, context: Context) -> Message:
        return serve_session(app, message, context)

    return app


def server_app() -> ServerApp:
    """Return the ServerApp that measures."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config: Any = context.run_config
        payload = bytes(4 * config["floats"])
        _wait_for_nodes(grid, config["clients"])
        with ExitStack() as stack:
            carrier, warm_up, hosts = grid, WARM_UP, 0
            if config["carrier"] == "session":
                carrier, warm_up = stack.enter_context(SessionGrid(grid)), SESSION_WARM_UP
            nodes = _wait_for_nodes(carrier, config["clients"])
            seconds = [_exchange(carrier, nodes, payload) for _ in range(warm_up + config["steps"])]
            if carrier is not grid:  # otherwise it would cost an exchange more, and actors vary
                hosts = _count_hosts(carrier, nodes)
        measured = {"seconds": seconds[warm_up:], "hosts": hosts}
        Path(config["output"]).write_text(json.dumps(measured))

    return app


def _wait_for_nodes(grid: Grid, count: int) -> list[int]:
    for _ in polling(_CONNECT_SECONDS, every=0.1):
        if len(nodes := sorted(grid.get_node_ids())) >= count:
            return nodes
    raise BenchError(f"{len(nodes)} of {count} clients came in {_CONNECT_SECONDS:g} s")


def _count_hosts(grid: Grid, nodes: list[int]) -> int:
    asked = [Message(RecordDict(), node, "query.process") for node in nodes]
    replies = grid.send_and_receive(asked)
    return len({one.content.config_records["me"]["pid"] for one in replies if one.has_content()})


def _exchange(grid: Grid, nodes: list[int], payload: bytes) -> float:
    started = time.perf_counter()
    array = Array("float32", (len(payload) // 4,), "flsplit.raw", payload)
    messages = [
        Message(RecordDict({"payload": ArrayRecord({"0": array})}), node, ECHO) for node in nodes
    ]
    replies = list(grid.send_and_receive(messages))
    seconds = time.perf_counter() - started
    good = [
        one
        for one in replies
        if one.has_content() and one.content.array_records["payload"]["0"].data == payload
    ]
    if len(good) != len(nodes):
        errors = [one.error.reason for one in replies if one.has_error()]
        raise BenchError(f"{len(good)} of {len(nodes)} clients echoed: {errors}")
    return seconds
