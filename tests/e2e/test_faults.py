"""Faults in a deployment: processes that die, hang and come back, with TLS and authentication."""

import pytest

from flsplit import History
from tests.flower_processes import deployment

NUM_CLIENTS = 3
# A client's first answer takes as long as its data take to load, libraries included.
RUN_CONFIG = {"strategy": "psl", "batch-size": 64, "session-step-timeout": 30.0}


@pytest.fixture
def flower(tmp_path):
    nodes = [
        {
            "partition-id": index,
            "num-partitions": NUM_CLIENTS,
            "state-dir": str(tmp_path / f"state-{index}"),
        }
        for index in range(NUM_CLIENTS)
    ]
    with deployment(tmp_path, NUM_CLIENTS, node_configs=nodes) as running:
        yield running


@pytest.fixture
def start(flower, gates, tmp_path):
    def start(**changes):
        return flower.start_app(gates.app, RUN_CONFIG | changes | {"output-dir": str(tmp_path)})

    return start


def history_of(run, tmp_path, num_rounds):
    finished = run.finish()
    assert finished.completed, finished.log
    history = History.load(tmp_path / "history.jsonl")
    assert [entry.round for entry in history] == list(range(1, num_rounds + 1))
    return history


def missing_rounds(history, client):
    """Return the rounds in which a client didn't take part from beginning to end."""
    return [
        entry.round
        for entry in history
        if client not in entry.participants
        or client in {one.client for one in (*entry.redone, *entry.left_out)}
    ]


def reason(history, client, server_round):
    return next(o.reason for o in history[server_round - 1].left_out if o.client == client)


@pytest.mark.chaos(
    "SIGKILL of one ClientApp, SIGSTOP of another",
    "they are left out with the reason, the others do all their steps",
)
@pytest.mark.e2e
def test_the_others_go_on_without_clients_that_die_or_hang(flower, gates, start, tmp_path):
    dying, hanging = gates.before_step(0, server_round=3), gates.before_step(1, server_round=5)
    run = start(**{"num-server-rounds": 8})

    dying.wait()
    flower.supernodes[0].kill_client_app()
    dying.open()
    hanging.wait()
    flower.supernodes[1].pause_client_app()
    hanging.open()
    history = history_of(run, tmp_path, 8)

    assert missing_rounds(history, "2") == []
    # They come back no sooner than Flower frees their nodes, after about a minute.
    assert missing_rounds(history, "0")[:3] == [3, 4, 5]
    assert missing_rounds(history, "1") == [5, 6, 7, 8]
    assert "its host was lost" in reason(history, "0", 3)
    # Its silence is noticed by the step's timeout or by the keep-alive, whichever is over first.
    assert any(said in reason(history, "1", 5) for said in ("no answer within", "keep-alive"))
    # The survivor did all its steps in every round, and was evaluated.
    alone = [e for e in history if e.participants == ["2"] and not e.left_out]
    assert alone
    assert len({(entry.steps, entry.rows) for entry in alone}) == 1
    assert all(entry.rows >= alone[0].rows for entry in history)
    assert history[-1].evaluation["num-examples"] >= 100


@pytest.mark.chaos(
    "ClientApps and SuperNodes die, hang, come back",
    "the run waits for them, and they go on from their states",
)
@pytest.mark.e2e
@pytest.mark.long
def test_the_run_waits_for_clients_that_come_back_and_go_on_from_their_own_state(
    flower, gates, start, tmp_path
):
    rounds = (3, 5, 7)
    dying, hanging, leaving = (gates.before_step(i, rounds[i]) for i in range(NUM_CLIENTS))
    run = start(**{"num-server-rounds": 9, "strategy-args": "{min-available-nodes = 3}"})

    dying.wait()
    flower.supernodes[0].kill_client_app()
    dying.open()
    hanging.wait()  # Flower frees the killed one's node when its token expires, after a minute
    flower.supernodes[1].pause_client_app()
    hanging.open()
    run.wait_for_log("client '1' is left out")
    flower.supernodes[1].resume()
    leaving.wait()
    (newest,) = (tmp_path / "state-2").glob("*/2/round-6.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1])
    flower.supernodes[2].restart()
    leaving.open()
    history = history_of(run, tmp_path, 9)

    assert [missing_rounds(history, client) for client in "012"] == [[3], [5], [7]]
    # Only the one whose last state is broken goes on from an earlier one.
    assert [entry.restarted for entry in history] == [*6 * [[]], ["2"], [], []]
    (note,) = history[6].notes
    assert note.startswith(f"client '2': {newest} is broken")
    assert note.endswith("it goes on from round 5")
    assert history[-1].left_out == []
