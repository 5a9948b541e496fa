"""Hosts that say they are somebody else: what one says changes nothing for another."""

from dataclasses import replace

import pytest
from carry.test_session import (
    SIZES,
    done,
    make_app,
    make_strategy,
    open_stream,
    outcome,
    simulated,  # noqa: F401 - a fixture
    start,
)
from carry.threaded import ThreadedGrid
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from flsplit import LocalGrid, SessionSettings
from flsplit.carry.session import host as session_host
from flsplit.carry.session.invitation import Invitation
from flsplit.carry.session.roster import Seat
from flsplit.carry.session.session_grid import SessionGrid
from flsplit.wire import Envelope, HostJoined, MessageArrived

SESSION = SessionSettings(join_timeout=20.0, grace=2.0)


def introduced(hello):
    """Return a host that serves as it should, after a hello of its own."""

    def serve(app, message, context):
        clients = session_host.HostedClients(app, context, Invitation.from_content(message.content))
        with open_stream(message, context, hello) as stream:
            for envelope, request in stream:
                stream.send(envelope, clients.answer(envelope.client, request))
        return done(message)

    return serve


@pytest.mark.chaos(
    "a deployed host's hello claims other partitions, peers or nodes",
    "it serves its own node; the same numbers",
)
@pytest.mark.parametrize(
    "hello",
    [
        {"peers": 1, "num-partitions": 4},
        {"peers": 1, "num-partitions": 2**31 - 1},
        {"peers": 4, "num-partitions": 1, "node-id": "102", "partition-id": 3, "client": "2"},
    ],
)
def test_a_deployed_host_serves_its_own_node_whatever_it_says(hello):
    grid = ThreadedGrid(make_app(), len(SIZES), serve={0: introduced(hello)})
    for partition, context in enumerate(reversed(grid.contexts.values())):
        context.node_config["partition-id"] = partition  # so that the nodes' order is another
    result = start(make_strategy(session=SESSION), grid)
    assert outcome(result) == outcome(start(make_strategy(), LocalGrid(make_app(), len(SIZES))))


@pytest.mark.chaos(
    "a malformed hello",
    "that host is sent away with the reason, the others go on",
)
@pytest.mark.parametrize("hosts", [0, 4])
def test_a_host_whose_hello_is_malformed_is_sent_away_and_the_others_go_on(
    hosts,
    simulated,  # noqa: F811
    caplog,
):
    simulated(hosts)
    serve = {0: introduced({"peers": 2**40})}
    grid = ThreadedGrid(make_app(), len(SIZES), serve=serve)
    result = start(make_strategy(session=SESSION), grid, num_rounds=1)
    assert "node 101 is left out: hello: Expected `int` <= 1048576" in caplog.text
    # The others of a simulation serve its client, too.
    expected = ["0", "1", "2", "3"] if hosts else ["1", "2", "3"]
    assert result.history[0].participants == expected


@pytest.mark.chaos(
    "a simulated host's hello claims 2³¹ - 1 partitions",
    "there are as many clients as Flower says",
)
def test_the_number_of_simulated_clients_is_what_flower_says(simulated):  # noqa: F811
    simulated(2)
    hello = {"peers": 2, "num-partitions": 2**31 - 1}
    grid = ThreadedGrid(make_app(), len(SIZES), serve={0: introduced(hello)})
    strategy = make_strategy(session=replace(SESSION, max_hosts=2))
    result = start(strategy, grid, num_rounds=1)
    assert result.history[0].participants == ["0", "1", "2", "3"]


@pytest.mark.chaos(
    "a server asks a deployed node for another client",
    "the node refuses",
)
@pytest.mark.parametrize(("told", "ray"), [(True, 0), (False, 2), (False, 0)])
def test_no_server_makes_a_deployed_node_serve_another_client(told, ray, monkeypatch):
    monkeypatch.setattr(session_host, "count_simulated_hosts", lambda: ray)
    app = ClientApp()

    @app.query("name")
    def name(message, context):
        who = context.node_config["partition-id"]
        return Message(RecordDict({"it": ConfigRecord({"partition": who})}), reply_to=message)

    context = ThreadedGrid(app, 1).contexts[101]
    invitation = Invitation("s", "e", "192.0.2.1:1", "t", b"", 0.0, 1, "/not/mine", told)
    clients = session_host.HostedClients(app, context, invitation)
    message = Message(RecordDict(), 101, "query.name")
    assert clients.answer("", message).content["it"]["partition"] == 0
    refused = clients.answer("3", message)
    assert "client is '3', expected '': this node serves its own" in refused.error.reason


# --- whatever comes ----------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab1")
HELLOS = st.dictionaries(
    st.sampled_from(["peers", "num-partitions", "node-id", "partition-id", "client"]),
    SCALARS | st.lists(SCALARS, max_size=2),
)


@pytest.mark.chaos(
    "any hello",
    "the other nodes' clients are where they were",
)
@settings(max_examples=60, deadline=None)
@given(HELLOS)
def test_no_hello_changes_where_another_node_is_served(hello):
    session = SessionGrid(ThreadedGrid(None, 2), SESSION)
    session._server = server = Server()
    server.events = [HostJoined("101", 0, hello), HostJoined("102", 1, {})]
    while session._take_event(0.0):
        pass
    roster = session._roster
    roster.seat_all()
    assert roster.seat(102) == Seat("102", "")
    assert (roster.seat(101) == Seat("101", "")) is (server.closed == [])
    assert set(roster.node_ids()) <= {101, 102}


class Server:
    """A session's server from which comes what a test says."""

    def __init__(self):
        self.events, self.sent, self.closed = [], [], []

    def receive(self, timeout):
        return self.events.pop(0) if self.events else None

    def send(self, host, envelope, message, timeout):
        self.sent.append((host, envelope, message))

    def close_host(self, host, reason):
        self.closed.append(host)


def answer(message, text):
    return Message(RecordDict({"it": ConfigRecord({"said": text})}), reply_to=message)


def claims(message, source):
    """Return an answer to a message in another node's name."""
    made = answer(message, "lie")
    made.metadata.__dict__["_src_node_id"] = source
    return made


NAMES = st.sampled_from(["", "0", "1", "101", "102"]) | st.text(max_size=3)


@pytest.mark.chaos(
    "any lie in an envelope",
    "it is taken for nobody else's answer",
)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            NAMES, st.integers(0, 6), st.integers(0, 3), st.sampled_from([101, 102]), st.booleans()
        ),
        max_size=8,
    )
)
def test_no_message_of_a_host_is_taken_for_another_node_s(lies):
    session = SessionGrid(ThreadedGrid(None, 2), SESSION)
    server = Server()
    session._server, session._session = server, "s"
    server.events = [HostJoined("101", 0, {}), HostJoined("102", 1, {})]
    while session._take_event(0.0):
        pass
    session._roster.seat_all()
    asked = [Message(RecordDict(), node, "query.any") for node in (101, 102)]
    ids = list(session.push_messages(asked))
    (_, mine, own), (_, others, other) = server.sent
    for client, sequence, epoch, source, of_other in lies:
        message = claims(other if of_other else own, source)
        server.events.append(
            MessageArrived("101", 0, Envelope(client, sequence, epoch), message, 1)
        )
    server.events.append(MessageArrived("102", 1, others, answer(other, "truth"), 1))
    replies = {one.metadata.src_node_id: one for one in session.pull_messages(ids)}
    assert replies[102].content["it"]["said"] == "truth"
    if 101 in replies:
        assert replies[101].metadata.src_node_id == 101
        assert mine.client == ""
