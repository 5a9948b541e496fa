"""Links that are slow, halt, break and stay half open, between one host and the server."""

import socket
import threading
from dataclasses import replace
from functools import cache

import pytest
from carry.test_session import SIZES, make_app, make_strategy, outcome, start
from carry.threaded import ThreadedGrid
from flwr.app import Message
from msgspec import structs

from flsplit import LocalGrid, SessionSettings
from flsplit.carry.session.host import serve_session
from flsplit.carry.session.invitation import Invitation
from tests.chaos.proxy import Proxy

ROUNDS = 3
LONG = 4.0  # seconds; a busy machine may take one or two for a step in which nothing is wrong
SESSION = SessionSettings(join_timeout=20.0, grace=5.0, step_timeout=20.0)


@pytest.fixture
def proxy():
    with Proxy() as running:
        yield running


@cache
def undisturbed():
    """Return what comes of the same run over LocalGrid."""
    return outcome(start(make_strategy(), LocalGrid(make_app(), len(SIZES)), num_rounds=ROUNDS))


def through(proxy):
    """Return a host that reaches the server through the proxy."""

    def serve(app, message, context):
        invitation = Invitation.from_content(message.content)
        proxy.target = invitation.address
        detour = structs.replace(invitation, address=proxy.address)
        changed = Message(detour.to_content(), context.node_id, message.metadata.message_type)
        changed.metadata.__dict__.update(message.metadata.__dict__)
        return serve_session(app, changed, context)

    return serve


class Watched:
    """An app that does something before one client's step 1 of round 2."""

    def __init__(self, happens, client="0"):
        self.app, self._happens, self._client = make_app(), [happens], client

    def __call__(self, message, context):
        if message.metadata.message_type == "train.step":
            at = message.content["step"]
            if str(context.node_config["partition-id"]) == self._client and (
                at["server-round"], at["step"]
            ) == (2, 1) and self._happens:  # fmt: skip
                self._happens.pop()()
        return self.app(message, context)


def assert_only_lost_after_a_step(result):
    """Only what the ledger says differs: all but client "0"'s rows after step 1 of round 2."""
    whole = undisturbed()[0]
    numbers = result.history.numbers()
    assert numbers[0] == whole[0]
    (left,) = result.history[1].left_out
    assert (left.client, left.step) == ("0", 1)
    assert result.history[1].rows == 4 + sum(SIZES[1:])  # of the first batch, and the others'
    assert result.history[1].steps == 4  # as many as the longest of the others has
    assert {"1", "2", "3"} <= set(result.history[2].participants)
    assert {one.client for one in result.history[2].left_out} <= {"0"}


def run(proxy, happens=lambda: None, session=SESSION, state_dir="", **options):
    nodes = {"state-dir": state_dir} if state_dir else None
    grid = ThreadedGrid(Watched(happens), len(SIZES), {0: through(proxy)}, nodes)
    strategy = make_strategy(session=session, **options)
    return start(strategy, grid, num_rounds=ROUNDS)


@pytest.mark.chaos("latency of 20 ms", "the same numbers, bit for bit")
def test_latency_changes_no_number(proxy):
    proxy.delay = 0.02
    assert outcome(run(proxy)) == undisturbed()


@pytest.mark.chaos("a link halts, for less than the step timeout", "the same numbers")
def test_a_link_that_halts_for_a_while_changes_no_number(proxy):
    def halt():
        proxy.halt()
        threading.Timer(0.5, proxy.resume).start()

    assert outcome(run(proxy, halt)) == undisturbed()


@pytest.mark.chaos(
    "a link halts, for longer than the step timeout",
    "its client is left out with the reason, and is back when the link is",
)
def test_a_link_that_halts_for_long_costs_its_client_the_round(proxy):
    session = replace(SESSION, step_timeout=LONG)
    result = run(proxy, proxy.halt, session)
    assert f"no answer within {LONG:g} s" in result.history[1].left_out[0].reason
    assert_only_lost_after_a_step(result)


@pytest.mark.chaos(
    "a connection is reset", "its client is left out of the round, and may come back in the next"
)
def test_a_reset_costs_a_client_the_round(proxy):
    result = run(proxy, proxy.reset)
    assert "its host was lost" in result.history[1].left_out[0].reason
    assert_only_lost_after_a_step(result)


@pytest.mark.chaos(
    "a connection is reset, and all clients are needed",
    "the round is done again; the same numbers",
)
def test_a_round_that_a_reset_breaks_is_done_again(proxy, tmp_path):
    result = run(
        proxy, proxy.reset, state_dir=str(tmp_path / "state"), min_available_nodes=len(SIZES)
    )
    assert [[o.client for o in entry.redone] for entry in result.history] == [[], ["0"], []]
    assert "its host was lost" in result.history[1].redone[0].reason
    assert [entry.restarted for entry in result.history] == [[], [], []]
    numbers, weights = outcome(result)
    assert weights == undisturbed()[1]
    assert [one | {"redone": []} for one in numbers] == undisturbed()[0]


@pytest.mark.chaos(
    "a link stays open at one end only", "its client is left out after the step timeout"
)
def test_a_half_open_link_costs_a_client_the_round(proxy):
    session = replace(SESSION, step_timeout=LONG)
    result = run(proxy, proxy.swallow, session)
    assert_only_lost_after_a_step(result)


@pytest.mark.chaos("500 connections that say nothing", "the same numbers")
def test_connections_that_say_nothing_change_no_number(proxy):
    silent = []

    def connect():
        host, _, port = proxy.target.rpartition(":")
        silent.extend(socket.create_connection((host, int(port))) for _ in range(500))

    try:
        assert outcome(run(proxy, connect)) == undisturbed()
        assert len(silent) == 500
    finally:
        for one in silent:
            one.close()
