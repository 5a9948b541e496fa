"""How much a client can make the server remember of its forward passes."""

import pytest
import torch

from flsplit import LocalGrid, client_app
from flsplit.cut.trace import Spec, Trace
from flsplit.message.crossings import MOST_TRACES
from flsplit.server import clients as of_server
from flsplit.server.clients import Clients


def known_of(*clients):
    app = client_app(model=lambda: torch.nn.Linear(1, 1), cut="0", data=lambda _: None)
    server = Clients(LocalGrid(app, 1, progress=False), timeout=1.0)
    for name, traces in clients:
        for trace in traces:
            server._learn_traces(name, {trace.digest: trace})
    return [list(server._traces[name].values()) for name, _ in clients]


def traces(count, calls=1):
    return [
        Trace(tuple(("linear", Spec((rows, 7), torch.float32)) for _ in range(calls)))
        for rows in range(1, count + 1)
    ]


def test_twice_as_many_are_known_as_a_client_takes_for_known():
    sent = traces(2 * MOST_TRACES + 3)
    assert known_of(("0", sent)) == [sent[3:]]


@pytest.mark.chaos(
    "a client sends ever more descriptions of its forward",
    "the server keeps the last of them, 16 MiB at most",
)
def test_of_long_ones_fewer_are_known(monkeypatch):
    sent = traces(9, calls=50)
    assert sent[0].nbytes == len(sent[0]._calls_as_json())
    monkeypatch.setattr(of_server, "MOST_TRACE_BYTES", 3 * sent[0].nbytes)
    assert known_of(("0", sent)) == [sent[-3:]]


def test_the_last_one_is_known_however_long_it_is_and_equal_ones_are_shared(monkeypatch):
    monkeypatch.setattr(of_server, "MOST_TRACE_BYTES", 1)
    (first,), (second,) = known_of(("0", traces(2)), ("1", traces(2)))
    assert first is second
