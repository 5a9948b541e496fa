"""Sessions: the same numbers as LocalGrid, whoever hosts the clients, and whatever hosts do."""

import logging
import socket
import threading
import time

import numpy as np
import pytest
from carry.threaded import ThreadedGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from reference import CUT, LR, MOMENTUM, SEED, fresh, make_parts, noisy_net, split_app

from flsplit import LocalGrid, SessionSettings
from flsplit.carry import choose
from flsplit.carry.choose import TooSlowError
from flsplit.carry.refusals import BrokenAppError
from flsplit.carry.session import host as session_host
from flsplit.carry.session import session_grid
from flsplit.carry.session.host import serve_session
from flsplit.carry.session.invitation import Invitation
from flsplit.carry.session.session_grid import NoHostError
from flsplit.client_parts import Int8, TopK
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.strategies import EPSL, GAPSL, PSL, SGLR, SplitFedV1
from flsplit.wire import DialError, Envelope, HostStream, SessionServer

SIZES = (20, 13, 9, 16)


def make_app():
    parts = make_parts(SIZES, noisy_net)
    return split_app(noisy_net, parts, parts, optimizer=MOMENTUM)


def make_strategy(cls=PSL, **options):
    settings = options.pop("session", SessionSettings(join_timeout=20.0, grace=2.0))
    return cls(
        model=fresh(noisy_net),
        cut=CUT,
        server_lr=LR,
        server_optimizer=MOMENTUM,
        batch_size=4,
        seed=SEED,
        session=settings,
        **options,
    )


def start(strategy, grid, num_rounds=2, timeout=30.0):
    initial = ArrayRecord(fresh(noisy_net).state_dict())
    return strategy.start(grid, initial, num_rounds=num_rounds, timeout=timeout)


def outcome(result):
    return result.history.numbers(), {k: v.numpy().tobytes() for k, v in result.arrays.items()}


@pytest.fixture
def simulated(monkeypatch):
    """Let hosts believe that they are ``n`` actors of a simulation."""

    def believe(hosts):
        monkeypatch.setattr(session_host, "count_simulated_hosts", lambda: hosts)
        monkeypatch.setattr(session_grid, "simulates", lambda grid: hosts > 0)
        monkeypatch.setattr(session_grid, "running_ray", lambda timeout: None)

    return believe


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PSL, SplitFedV1, SGLR, EPSL, GAPSL])
def test_deployed_session_gives_the_numbers_of_localgrid(cls):
    # The same number of steps for all: GAPSL refuses a step with a single client.
    options = {"local_steps": 3}
    grid = ThreadedGrid(make_app(), len(SIZES))
    result = start(make_strategy(cls, **options), grid)
    grid.join()
    local = start(make_strategy(cls, **options), LocalGrid(make_app(), len(SIZES)))
    assert outcome(result) == outcome(local)
    assert len(grid.pushed) == len(SIZES)  # one Flower message per host


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_number_of_simulated_hosts_changes_no_number(hosts, simulated):
    simulated(hosts)
    settings = SessionSettings(max_hosts=hosts, join_timeout=20.0)
    grid = ThreadedGrid(make_app(), len(SIZES))
    result = start(make_strategy(session=settings), grid)
    grid.join()
    assert outcome(result) == outcome(start(make_strategy(), LocalGrid(make_app(), len(SIZES))))
    assert len(grid.pushed) == hosts


def test_what_is_compressed_crosses_as_it_is_counted():
    parts = {"client_parts": [Int8(), TopK(0.3, "cut-gradient", feedback=True)], "local_steps": 3}
    grid = ThreadedGrid(make_app(), len(SIZES))
    result = start(make_strategy(**parts), grid)
    grid.join()
    local = start(make_strategy(**parts), LocalGrid(make_app(), len(SIZES)))
    assert outcome(result) == outcome(local)
    for entry in result.history:
        for category in ("activations-up", "gradients-down-unicast"):
            assert 0 < entry.traffic.logical[category] == entry.traffic.wire[category]


def test_what_is_compressed_at_a_second_cut_does_too():
    cut = ("front", "middle")
    app = split_app(noisy_net, make_parts(SIZES, noisy_net), optimizer=MOMENTUM, cut=cut)

    def trained(grid):
        strategy = PSL(
            model=fresh(noisy_net), cut=cut, server_lr=LR, batch_size=4, seed=SEED, local_steps=2,
            client_parts=[Int8("outputs"), TopK(0.3, "output-gradient", feedback=True)],
            session=SessionSettings(join_timeout=20.0, grace=2.0),
        )  # fmt: skip
        return start(strategy, grid)

    grid = ThreadedGrid(app, len(SIZES))
    result = trained(grid)
    grid.join()
    assert outcome(result) == outcome(trained(LocalGrid(app, len(SIZES))))
    for entry in result.history:
        for category in ("outputs-down", "output-gradients-up"):
            assert 0 < entry.traffic.logical[category] == entry.traffic.wire[category]


def test_plain_text_gives_the_same_numbers():
    settings = SessionSettings(tls=False, join_timeout=20.0)
    result = start(make_strategy(session=settings), ThreadedGrid(make_app(), len(SIZES)))
    assert outcome(result) == outcome(start(make_strategy(), LocalGrid(make_app(), len(SIZES))))


@pytest.mark.parametrize("hosts", [0, 2])
def test_handing_over_to_a_new_session_changes_no_number(hosts, simulated):
    simulated(hosts)
    settings = SessionSettings(session_rounds=1, join_timeout=20.0, max_hosts=hosts)
    grid = ThreadedGrid(make_app(), len(SIZES))
    result = start(make_strategy(session=settings), grid, num_rounds=3)
    local = start(make_strategy(), LocalGrid(make_app(), len(SIZES)), num_rounds=3)
    assert outcome(result) == outcome(local)
    assert len(grid.pushed) == 3 * (hosts or len(SIZES))


def serve_once():
    """Return what serves a node's first session, and refuses further ones."""
    calls = []

    def serve(app, message, context):
        calls.append(message)
        return (serve_session if len(calls) == 1 else refuse)(app, message, context)

    return serve


def test_no_session_is_opened_after_the_last_round():
    grid = ThreadedGrid(make_app(), 1, serve={0: serve_once()})
    settings = SessionSettings(session_rounds=1, join_timeout=20.0)
    result = start(make_strategy(session=settings), grid, num_rounds=1)
    assert [entry.round for entry in result.history] == [1]
    assert len(grid.pushed) == 1


def test_a_handover_waits_for_nodes_that_are_away_just_then(monkeypatch):
    def serve(app, message, context):
        calls.append(message)
        if len(calls) == 2:
            return Message(Error(5, "node unavailable"), reply_to=message)
        return serve_session(app, message, context)

    calls = []
    monkeypatch.setattr(session_grid, "_AGAIN_SECONDS", 0.0)
    settings = SessionSettings(session_rounds=1, join_timeout=20.0)
    result = start(make_strategy(session=settings), ThreadedGrid(make_app(), 1, serve={0: serve}))
    assert [entry.participants for entry in result.history] == [["0"], ["0"]]
    assert len(calls) == 3


def test_a_handover_without_nodes_ends_the_run_after_its_timeout():
    settings = SessionSettings(session_rounds=1, join_timeout=20.0)
    grid = ThreadedGrid(make_app(), 1, serve={0: serve_once()})
    session = session_grid.SessionGrid(grid, settings)
    with session, pytest.raises(NoHostError, match="session-address"):
        session.end_round(1, timeout=0.3)


def test_wire_bytes_are_those_of_the_arrays():
    result = start(make_strategy(), ThreadedGrid(make_app(), len(SIZES)), num_rounds=1)
    traffic = result.history[0].traffic
    assert traffic.wire["activations-up"] == traffic.logical["activations-up"] > 0


# --- hosts that fail ---------------------------------------------------------------------------


def open_stream(message, context, hello=None):
    invitation = Invitation.from_content(message.content)
    return HostStream.dial(
        invitation.address,
        invitation.token,
        invitation.certificate or None,
        hello or session_host.describe_host(invitation).to_json(),
    )


def done(message):
    return Message(RecordDict(), reply_to=message)


def serve_some(number):
    """Return a host that leaves after some messages."""

    def serve(app, message, context):
        clients = session_host.HostedClients(app, context, Invitation.from_content(message.content))
        with open_stream(message, context) as stream:
            for count, (envelope, request) in enumerate(stream):
                if count == number:
                    break
                stream.send(envelope, clients.answer(envelope.client, request))
        return done(message)

    return serve


@pytest.mark.chaos(
    "a simulated host is lost",
    "its clients move to the others",
)
@pytest.mark.parametrize("needed", [1, len(SIZES)])
def test_clients_of_a_lost_simulated_host_move_to_the_others(simulated, needed):
    simulated(2)
    grid = ThreadedGrid(make_app(), len(SIZES), serve={0: serve_some(20)})
    settings = SessionSettings(max_hosts=2, join_timeout=20.0)
    strategy = make_strategy(session=settings, min_available_nodes=needed)
    result = start(strategy, grid, num_rounds=4)
    missed = [
        sorted({one.client for one in (*entry.redone, *entry.left_out)}) for entry in result.history
    ]
    assert sorted(missed, key=len)[-1] in (["0", "2"], ["1", "3"])
    assert sum(map(bool, missed)) == 1
    # From their stored states: nobody had to start from the server's segment.
    assert all(entry.restarted == [] for entry in result.history)
    assert result.history[-1].participants == ["0", "1", "2", "3"]
    if needed == len(SIZES):  # then the round is done again
        grid = LocalGrid(make_app(), len(SIZES))
        local = start(make_strategy(min_available_nodes=needed), grid, num_rounds=4)
        assert without_redone(result) == without_redone(local)


def without_redone(result):
    for entry in result.history:
        assert entry.left_out == []
        entry.redone = []
    return outcome(result)


@pytest.mark.chaos(
    "a deployed host is lost",
    "it is invited again and comes back",
)
def test_a_deployed_node_that_was_lost_is_invited_again_and_comes_back():
    calls = []

    def serve(app, message, context):
        calls.append(time.monotonic())
        chosen = serve_some(3) if len(calls) == 1 else serve_session
        return chosen(app, message, context)

    grid = ThreadedGrid(make_app(), len(SIZES), serve={1: serve})
    result = start(make_strategy(min_available_nodes=4), grid, num_rounds=3)
    missed = [[one.client for one in entry.redone] for entry in result.history]
    assert missed == [["1"], [], []]
    assert len(calls) == 2
    local = start(make_strategy(), LocalGrid(make_app(), len(SIZES)), num_rounds=3)
    assert without_redone(result) == without_redone(local)


@pytest.mark.chaos(
    "a host never answers",
    "it is left out, and costs the step timeout once",
)
def test_a_host_that_never_answers_costs_the_step_timeout_once():
    def never(app, message, context):
        with open_stream(message, context) as stream:
            for _ in stream:
                pass
        return done(message)

    grid = ThreadedGrid(make_app(), len(SIZES), serve={2: never})
    settings = SessionSettings(step_timeout=1.0, join_timeout=20.0, grace=2.0)
    result = start(make_strategy(session=settings, min_available_nodes=3), grid, num_rounds=2)
    assert [entry.participants for entry in result.history] == [["0", "1", "3"]] * 2


@pytest.mark.chaos(
    "a host takes no message",
    "it is left out, and costs the step timeout once",
)
def test_a_host_that_takes_nothing_costs_the_step_timeout_once(simulated, monkeypatch):
    over, waits = threading.Event(), []

    def take_nothing(app, message, context):
        with open_stream(message, context):
            over.wait(60)
        return done(message)

    class Tight(session_grid.SessionServer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, max_queued_bytes=1)

        def send(self, *args, **kwargs):
            try:
                return super().send(*args, **kwargs)
            except TimeoutError as error:
                waits.append(str(error))
                raise

    simulated(1)
    monkeypatch.setattr(session_grid, "SessionServer", Tight)
    settings = SessionSettings(step_timeout=0.5, join_timeout=20.0, max_hosts=1)
    grid = ThreadedGrid(make_app(), len(SIZES), serve={0: take_nothing})
    # Longer than what gRPC lets travel ahead of a reader.
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(16 * 2**20, np.uint8))})})
    with session_grid.SessionGrid(grid, settings) as session:
        clients = list(session.get_node_ids())
        asked = [Message(content, client, "query.describe") for client in clients]
        replies = list(session.send_and_receive(asked))
        left = list(session.get_node_ids())
        over.set()
    assert len(waits) == 1
    assert [reply.has_error() for reply in replies] == [True] * len(SIZES)
    assert "session-step-timeout" in replies[1].error.reason
    assert left == []


@pytest.mark.chaos(
    "all hosts are lost",
    "the run ends after timeout, and says why",
)
def test_all_hosts_lost_and_none_back_within_timeout_is_a_clear_error():
    def leave(app, message, context):
        if leave.left:
            return Message(Error(2, "out of order"), reply_to=message)
        leave.left = True
        return serve_some(5)(app, message, context)

    leave.left = False
    grid = ThreadedGrid(make_app(), 1, serve={0: leave})
    with pytest.raises(NotEnoughClientsError, match="min_available_nodes"):
        start(make_strategy(), grid, timeout=2.0)


# --- hosts that misbehave ----------------------------------------------------------------------


def tampering(change):
    """Return a host that sends a changed envelope or message before each right answer."""

    def serve(app, message, context):
        clients = session_host.HostedClients(app, context, Invitation.from_content(message.content))
        with open_stream(message, context) as stream:
            for envelope, request in stream:
                reply = clients.answer(envelope.client, request)
                if bad := change(envelope, reply):
                    stream.send(*bad)
                else:
                    stream.send(envelope, reply)
        return done(message)

    return serve


def for_another_client(envelope, reply):
    return Envelope("1", envelope.sequence, envelope.epoch), reply


def of_an_old_epoch(envelope, reply):
    return Envelope(envelope.client, envelope.sequence, envelope.epoch - 1), reply


def of_another_step(envelope, reply):
    return Envelope(envelope.client, envelope.sequence - 1, envelope.epoch), reply


def in_anothers_name(envelope, reply):
    reply.metadata.__dict__["_src_node_id"] = 102
    return envelope, reply


@pytest.mark.chaos(
    "a host answers for another client, node or epoch",
    "the answer is dropped with the reason, the others go on",
)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (for_another_client, "another host"),
        (of_an_old_epoch, "another epoch"),
        (of_another_step, "nothing that is awaited"),
        (in_anothers_name, "another client's name"),
    ],
)
def test_misbehaving_host_is_refused_with_a_reason_and_the_others_go_on(change, problem, caplog):
    caplog.set_level(logging.WARNING, logger="flwr")
    grid = ThreadedGrid(make_app(), len(SIZES), serve={0: tampering(change)})
    settings = SessionSettings(step_timeout=1.0, join_timeout=20.0, grace=2.0)
    result = start(make_strategy(session=settings, min_available_nodes=3), grid, num_rounds=1)
    assert problem in caplog.text
    assert result.history[0].participants == ["1", "2", "3"]


@pytest.mark.chaos(
    "an answer is repeated",
    "it is dropped",
)
def test_an_answer_that_is_repeated_is_dropped(caplog):
    def serve(app, message, context):
        clients = session_host.HostedClients(app, context, Invitation.from_content(message.content))
        with open_stream(message, context) as stream:
            for envelope, request in stream:
                reply = clients.answer(envelope.client, request)
                stream.send(envelope, reply)
                stream.send(envelope, reply)
        return done(message)

    # One message more than was asked for already breaks the rules of the wire.
    grid = ThreadedGrid(make_app(), len(SIZES), serve={0: serve})
    settings = SessionSettings(step_timeout=2.0, join_timeout=20.0, grace=2.0)
    result = start(make_strategy(session=settings, min_available_nodes=3), grid, num_rounds=1)
    assert "0" not in result.history[0].participants or result.history[0].left_out


# --- opening -----------------------------------------------------------------------------------


def refuse(app, message, context):
    return Message(Error(2, "DialError: connection refused"), reply_to=message)


@pytest.mark.chaos(
    "one node can't dial back",
    "it is named and left out",
)
def test_a_single_node_that_cannot_dial_back_is_named_and_left_out(caplog):
    grid = ThreadedGrid(make_app(), len(SIZES), serve={3: refuse})
    result = start(make_strategy(), grid, num_rounds=1)
    assert result.history[0].participants == ["0", "1", "2"]
    assert "node 104 is left out: DialError" in caplog.text


@pytest.mark.chaos(
    "no node can dial back",
    "the error names address, port and remedy",
)
def test_session_without_hosts_names_address_port_and_remedy():
    grid = ThreadedGrid(make_app(), 2, serve={0: refuse, 1: refuse})
    with pytest.raises(NoHostError, match=r"127\.0\.0\.1:\d+.*session-address"):
        start(make_strategy(carrier="session"), grid)


def test_a_relative_state_dir_is_told_to_the_server(caplog):
    grid = ThreadedGrid(make_app(), 1, node_config={"state-dir": "states"})
    with pytest.raises(NoHostError, match=r"state-dir is 'states', expected an absolute path$"):
        start(make_strategy(carrier="session"), grid)
    assert "node 101 is left out: ConfigError: node config: state-dir" in caplog.text


def cannot_import(app, message, context):
    """Answer as Flower does for a ClientApp that can't be loaded."""
    reason = "<class 'ModuleNotFoundError'>:<'No module named 'absent''>"
    return Message(Error(2, reason), reply_to=message)


@pytest.mark.parametrize("carrier", ["session", "auto"])
def test_an_app_that_no_node_can_run_ends_the_run(carrier):
    grid = ThreadedGrid(make_app(), 2, serve={0: cannot_import, 1: cannot_import})
    strategy = make_strategy(carrier=carrier, session=SessionSettings(grace=0.2))
    said = "node 101 and 1 more: its ClientApp can't be run: ModuleNotFoundError: No module named"
    with pytest.raises(BrokenAppError, match=said):
        start(strategy, grid)
    assert {one.metadata.message_type for one in grid.pushed} == {"train.session"}


def test_another_node_may_come_that_can_run_the_app():
    grid = ThreadedGrid(make_app(), 2, serve={0: cannot_import})
    looks = iter([[101]] * 4)
    grid.get_node_ids = lambda: next(looks, list(grid.contexts))
    result = start(make_strategy(), grid, num_rounds=1)
    assert result.history[0].participants == ["1"]


def test_of_a_simulation_no_more_nodes_are_invited_than_there_are_processes(simulated, monkeypatch):
    simulated(3)  # each takes less than a core
    monkeypatch.setattr(session_grid, "running_ray", lambda timeout: "ray")
    monkeypatch.setattr(session_grid, "count_places", lambda ray, needed: 2)
    monkeypatch.setattr(session_grid, "cluster_address", lambda ray: "")
    broken = ThreadedGrid(make_app(), 9, serve=dict.fromkeys(range(9), cannot_import))
    with pytest.raises(BrokenAppError):
        start(make_strategy(), broken)
    assert len(broken.pushed) == 2

    monkeypatch.setattr(session_grid, "cluster_address", lambda ray: "127.0.0.3")
    grid = ThreadedGrid(make_app(), len(SIZES))
    result = start(make_strategy(), grid, num_rounds=1)
    assert result.history[0].participants == ["0", "1", "2", "3"]
    assert len(grid.pushed) == 3
    invitation = Invitation.from_content(grid.pushed[0].content)
    assert invitation.address.startswith("127.0.0.3:")  # where Ray's other machines find it


@pytest.mark.chaos(
    "all nodes are busy with another run",
    "they are waited for, and the log says so",
)
def test_nodes_that_are_busy_with_another_run_are_waited_for(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(session_grid, "_TELL_SECONDS", 0.1)
    free = threading.Event()

    def queue(app, message, context):
        free.wait(20)
        return serve_session(app, message, context)

    def tell(record):
        if "may be busy with other runs" in record.getMessage():
            free.set()
        return True

    grid = ThreadedGrid(make_app(), 2, serve={0: queue, 1: queue})
    logging.getLogger("flwr").addFilter(tell)
    try:
        result = start(make_strategy(session=SessionSettings()), grid, num_rounds=1)
    finally:
        logging.getLogger("flwr").removeFilter(tell)
    assert result.history[0].participants == ["0", "1"]
    assert "waiting for hosts: 2 nodes are invited" in caplog.text


@pytest.mark.chaos(
    "a node is refused again and again",
    "it is asked with back-off, the log says it once",
)
def test_a_node_is_told_once_why_it_cannot_come(caplog):
    """Flower forgets an answer that was taken, and says "Message Unavailable" from then on."""
    grid = ThreadedGrid(make_app(), 2, serve={0: refuse})
    answered = set()

    def pull(ids):
        known = {one for one in ids if one in grid.replies} | (set(ids) & answered)
        replies = {one: grid.replies.pop(one) for one in ids if one in grid.replies}
        gone = [one for one in known if one in answered and one not in replies]
        answered.update(replies)
        sent = {one.metadata.message_id: one for one in grid.pushed}
        unavailable = Error(3, "Message Unavailable")
        return [*replies.values(), *(Message(unavailable, reply_to=sent[one]) for one in gone)]

    grid.pull_messages = pull
    result = start(make_strategy(), grid, num_rounds=3)
    assert [entry.participants for entry in result.history] == [["1"]] * 3
    assert "DialError" in caplog.text
    assert "Unavailable" not in caplog.text


@pytest.mark.chaos(
    "the server can't be reached just then",
    "the host tries again",
)
def test_a_server_that_cannot_be_reached_just_then_is_tried_again(monkeypatch):
    dial, tries = HostStream.dial, []

    def unreachable_at_first(address, *arguments, **options):
        tries.append(address)
        if len(tries) < 3:
            raise DialError(address, "unreachable", "connection refused", "Wait.")
        return dial(address, *arguments, **options)

    monkeypatch.setattr(HostStream, "dial", unreachable_at_first)
    monkeypatch.setattr(session_host, "_FIRST_PAUSE", 0.01)
    result = start(make_strategy(carrier="session"), ThreadedGrid(make_app(), 1), num_rounds=1)
    assert result.history[0].participants == ["0"]
    assert len(tries) == 3


@pytest.mark.chaos(
    "several runs at once with session-ports",
    "each takes a free port",
)
def test_several_runs_take_a_port_each_from_those_that_are_free():
    with SessionServer("127.0.0.1:0") as other:
        settings = SessionSettings(port=other.port, ports=50, grace=0.5)
        session = session_grid.SessionGrid(ThreadedGrid(make_app(), 1), settings)
        with session:
            taken = int(session._address.rpartition(":")[2])
            assert other.port < taken < other.port + 50


def test_auto_falls_back_on_flowers_messages_with_the_same_numbers(caplog):
    serve = dict.fromkeys(range(len(SIZES)), refuse)
    result = start(make_strategy(), ThreadedGrid(make_app(), len(SIZES), serve=serve))
    assert "no session, going on over Flower's own messages" in caplog.text
    assert outcome(result) == outcome(start(make_strategy(), LocalGrid(make_app(), len(SIZES))))


def test_a_fallback_that_would_take_too_long_stops_and_says_why(monkeypatch):
    monkeypatch.setattr(choose, "MAX_FALLBACK_SECONDS", 1e-6)
    serve = dict.fromkeys(range(2), refuse)
    with pytest.raises(TooSlowError, match="no session could be opened"):
        start(make_strategy(), ThreadedGrid(make_app(), 2, serve=serve))


def test_nodes_that_never_dial_are_waited_for_no_longer_than_join_timeout():
    def silent(app, message, context):
        time.sleep(3)
        return done(message)

    grid = ThreadedGrid(make_app(), 2, serve={0: silent, 1: silent})
    settings = SessionSettings(join_timeout=0.5)
    with pytest.raises(NoHostError, match=r"none of 2 nodes dialled .* within 0\.5 s"):
        start(make_strategy(carrier="session", session=settings), grid)


@pytest.mark.chaos(
    "session-port is taken",
    "the run ends, and names the key",
)
@pytest.mark.parametrize("carrier", ["session", "auto"])
def test_a_taken_port_is_named_with_its_key(carrier):
    with SessionServer("127.0.0.1:0") as other:
        settings = SessionSettings(port=other.port)
        with pytest.raises(
            ConfigError, match=rf"session-port is {other.port},.*cannot listen.*pyproject"
        ):
            start(make_strategy(carrier=carrier, session=settings), ThreadedGrid(make_app(), 1))


def test_an_address_of_another_machine_is_named_with_its_key():
    settings = SessionSettings(bind="192.0.2.1")
    with pytest.raises(ConfigError, match=r"session-bind is '192\.0\.2\.1'.*cannot listen"):
        start(make_strategy(session=settings), ThreadedGrid(make_app(), 1))


def test_a_run_that_starts_before_its_nodes_waits_for_them_and_opens_a_session():
    grid = ThreadedGrid(make_app(), 2)
    looks = iter([[], [], [101]])
    grid.get_node_ids = lambda: next(looks, list(grid.contexts))
    result = start(make_strategy(), grid)

    expected = start(make_strategy(), LocalGrid(make_app(), 2))
    assert outcome(result) == outcome(expected)
    assert {one.metadata.message_type for one in grid.pushed} == {"train.session"}


def test_no_node_within_the_timeout_is_a_clear_error():
    grid = ThreadedGrid(make_app(), 0)
    with pytest.raises(NotEnoughClientsError, match=r"0 clients .* after 0 s.*SuperNodes running"):
        start(make_strategy(), grid, timeout=0.0)


def test_a_late_host_finds_the_session_over_at_once(monkeypatch):
    monkeypatch.setattr(session_host, "_DIAL_SECONDS", 0.0)
    messages = []

    def wait_in_the_queue(app, message, context):
        messages.append(message)
        time.sleep(1)
        return done(message)

    grid = ThreadedGrid(make_app(), 2, serve={1: wait_in_the_queue})
    start(make_strategy(session=SessionSettings(grace=0.2)), grid, num_rounds=1)
    reply = serve_session(grid.app, messages[0], grid.contexts[102])
    assert reply.content["metrics"]["served"] == 0  # its process has seen the session end
    monkeypatch.setattr(session_host, "_ended", set())
    reply = serve_session(grid.app, messages[0], grid.contexts[102])
    assert reply.has_error()
    assert "DialError" in reply.error.reason


def test_who_has_seen_a_session_end_does_not_dial_it_again_and_again(caplog):
    grid = ThreadedGrid(make_app(), 1)
    start(make_strategy(session=SessionSettings(grace=0.2)), grid, num_rounds=1)
    caplog.clear()
    reply = serve_session(grid.app, grid.pushed[0], grid.contexts[101])
    assert reply.content["metrics"]["served"] == 0
    assert "trying again" not in caplog.text


@pytest.mark.chaos(
    "an invitation has expired",
    "it is not taken up",
)
def test_an_expired_invitation_is_not_taken_up():
    invitation = Invitation("s", "e", "192.0.2.1:1", "token", b"", time.time() - 1, 1, "")
    grid = ThreadedGrid(make_app(), 1)
    message = Message(invitation.to_content(), 101, "train.session")
    reply = serve_session(grid.app, message, grid.contexts[101])
    assert reply.content["metrics"]["served"] == 0


def test_everything_is_closed_after_a_run_and_after_an_error():
    ports = []
    original = session_grid.SessionServer

    class Watched(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ports.append(self.port)

    for fail in (False, True):
        session_grid.SessionServer = Watched
        try:
            grid = ThreadedGrid(make_app(), 2)
            strategy = make_strategy()
            if fail:
                strategy.train_round = lambda round_: 1 / 0
                with pytest.raises(ZeroDivisionError):
                    start(strategy, grid)
            else:
                start(strategy, grid)
        finally:
            session_grid.SessionServer = original
        grid.join()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", ports[-1])) != 0


def test_a_step_over_the_limit_says_which_setting_to_raise():
    settings = SessionSettings(max_step_bytes=2000, join_timeout=20.0)
    with pytest.raises(ConfigError, match=r"session-max-step-bytes; .* pyproject\.toml declares"):
        start(make_strategy(session=settings), ThreadedGrid(make_app(), 2))


@pytest.mark.chaos(
    "an answer is too long",
    "its client is left out with the setting to raise, the others go on",
)
def test_an_answer_over_the_limit_says_which_setting_to_raise_and_the_others_go_on():
    def say_a_lot(message, context):
        if context.node_config["partition-id"] == 1:
            content = RecordDict({"config": ConfigRecord({"text": "x" * 2000})})
            return Message(content, reply_to=message)
        return done(message)

    settings = SessionSettings(max_step_bytes=2000, join_timeout=20.0)
    grid = ThreadedGrid(say_a_lot, 2)
    with session_grid.SessionGrid(grid, settings) as session:
        asked = [Message(RecordDict(), node, "query.any") for node in session.get_node_ids()]
        short, long = sorted(session.send_and_receive(asked), key=lambda reply: reply.has_error())
        clients = list(session.get_node_ids())
    assert not short.has_error()
    assert "at most 2000 bytes" in long.error.reason
    assert "session-max-step-bytes; a run config can only set keys" in long.error.reason
    assert clients == [101, 102]


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", ""),
        ("port", 70000),
        ("step_timeout", 0.0),
        ("grace", -1.0),
        ("max_step_bytes", 0),
        ("max_hosts", -1),
        ("ports", 0),
        ("ports", 70000),
    ],
)
def test_settings_that_cannot_be_used_are_refused(field, value):
    with pytest.raises(ConfigError, match="^session-" + field.replace("_", "-")):
        SessionSettings(**{field: value})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("session-port", "9095", "'9095', expected an integer"),
        ("session-port", True, "True, expected an integer"),
        ("session-max-hosts", 2.0, "2.0, expected an integer"),
        ("session-tls", "false", "'false', expected true or false"),
        ("session-tls", 0, "0, expected true or false"),
        ("session-join-timeout", "60", "'60', expected a number"),
        ("session-grace", False, "False, expected a number"),
        ("session-address", 5, "5, expected a string"),
        ("session-rounds", "2", "'2', expected an integer"),
    ],
)
def test_settings_of_another_type_are_refused_by_their_key(key, value, said):
    with pytest.raises(ConfigError) as caught:
        SessionSettings.from_run_config({key: value})
    assert str(caught.value) == f"{key} is {said}"


def test_a_whole_number_of_seconds_is_fine():
    assert SessionSettings(step_timeout=300).step_timeout == 300


def test_settings_come_from_the_run_config():
    config = {"session-address": "10.0.0.5", "session-port": 9095, "session-rounds": 7, "lr": 1.0}
    settings = SessionSettings.from_run_config(config)
    assert (settings.address, settings.port, settings.session_rounds) == ("10.0.0.5", 9095, 7)
    assert settings.bind_address == "0.0.0.0:9095"
    assert settings.advertised(9095) == "10.0.0.5:9095"


def test_a_node_that_was_away_when_invited_again_is_invited_until_it_comes():
    calls = []

    def serve(app, message, context):
        calls.append(message)
        if len(calls) == 1:
            return serve_some(3)(app, message, context)
        if len(calls) == 2:
            return Message(Error(5, "node unavailable"), reply_to=message)
        return serve_session(app, message, context)

    grid = ThreadedGrid(make_app(), len(SIZES), serve={1: serve})
    result = start(make_strategy(min_available_nodes=4), grid, num_rounds=3)
    assert [[one.client for one in entry.redone] for entry in result.history] == [["1"], [], []]
    assert len(calls) == 3
