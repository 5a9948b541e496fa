"""Faults in a deployment: processes that die, hang and come back, with TLS and authentication."""

import pytest

from flsplit import History
from tests.flower_processes import REPOSITORY, deployment

QUICKSTART = REPOSITORY / "apps" / "quickstart"
NUM_CLIENTS = 3
RUN_CONFIG = {"strategy": "psl", "batch-size": 64, "session-step-timeout": 5.0}


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


def start(flower, tmp_path, **run_config):
    config = RUN_CONFIG | run_config | {"output-dir": str(tmp_path / "out")}
    return flower.start_app(QUICKSTART, config)


def history_of(finished, tmp_path, num_rounds):
    assert finished.completed, finished.log
    history = History.load(tmp_path / "out" / "history.jsonl")
    assert [entry.round for entry in history] == list(range(1, num_rounds + 1))
    return history


def missing_rounds(history, client):
    """Return the rounds in which a client didn't take part from beginning to end."""
    return [
        entry.round
        for entry in history
        if client not in entry.participants or client in {one.client for one in entry.left_out}
    ]


@pytest.mark.e2e
def test_the_others_go_on_without_clients_that_die_or_hang(flower, tmp_path):
    killed, stopped, _ = flower.supernodes
    num_rounds = 250
    run = start(flower, tmp_path, **{"num-server-rounds": num_rounds})

    run.wait_for_log("round 3/")
    killed.kill_client_app()
    run.wait_for_log("client '0' is left out")
    run.wait_for_log("round 10/")
    stopped.pause_client_app()
    run.wait_for_log("client '1' is left out")
    history = history_of(run.finish(), tmp_path, num_rounds)

    assert missing_rounds(history, "2") == []
    for client, reason in (("0", "its host was lost"), ("1", "no answer within")):
        missing = missing_rounds(history, client)
        assert missing
        assert client not in history[missing[-1] - 1].participants
        reasons = [o.reason for e in history for o in e.left_out if o.client == client]
        assert any(reason in one for one in reasons), reasons
    # The survivor did all its steps in every round, and was evaluated.
    alone = [e for e in history if e.participants == ["2"] and not e.left_out]
    assert alone
    assert len({(entry.steps, entry.rows) for entry in alone}) == 1
    assert all(entry.rows >= alone[0].rows for entry in history)
    assert history[-1].evaluation["num-examples"] >= 100


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_the_run_waits_for_clients_that_come_back_and_go_on_from_their_own_state(flower, tmp_path):
    killed, stopped, restarted = flower.supernodes
    num_rounds = 400  # the log that is waited for comes seconds late
    run = start(
        flower,
        tmp_path,
        **{"num-server-rounds": num_rounds, "strategy-args": "{min-available-nodes = 3}"},
    )

    run.wait_for_log("round 3/")
    killed.kill_client_app()  # Flower notices when the ClientApp's token expires, after a minute
    run.wait_for_log("client '0' is left out")
    run.wait_for_log("round 7/", timeout=180)
    stopped.pause_client_app()
    run.wait_for_log("client '1' is left out")
    stopped.resume()
    run.wait_for_log("round 11/")
    restarted.restart()
    history = history_of(run.finish(), tmp_path, num_rounds)

    for client in "012":
        assert len(missing_rounds(history, client)) == 1
    assert all(entry.restarted == [] for entry in history)
    assert history[-1].left_out == []
