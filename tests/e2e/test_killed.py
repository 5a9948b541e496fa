"""Processes that are killed at random steps, over and over, with state-dir and checkpoints."""

import random
import signal

import pytest
from safetensors.torch import load_file

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import deployment

NUM_CLIENTS = 3
SEED = 0
SETTINGS = {"strategy": "psl", "batch-size": 64}
ALL_CLIENTS = {"strategy-args": f"{{min-available-nodes = {NUM_CLIENTS}, local-steps = 4}}"}


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


def assert_as_if_nothing_had_happened(folder, changes):
    """Compare weights and history with those of an undisturbed run over LocalGrid."""
    expected = run_locally(NUM_CLIENTS, changes)
    history = History.load(folder / "history.jsonl")
    assert [one | {"redone": []} for one in history.numbers()] == expected.history.numbers()
    weights = load_file(folder / "model.safetensors")
    for key, array in expected.arrays.items():
        assert weights[key].numpy().tobytes() == array.numpy().tobytes(), key
    return history


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.chaos(
    "SIGKILL of ClientApps and SuperNodes at 14 random steps",
    "rounds that lost a client are done again, and the run ends as if nothing had happened",
)
def test_killed_clients_change_no_number(quickstart, flower, gates, tmp_path):
    drawn = random.Random(SEED)
    changes = SETTINGS | ALL_CLIENTS | {"num-server-rounds": 16}
    kills = [
        (server_round, drawn.randrange(NUM_CLIENTS), drawn.randrange(4), drawn.random() < 0.5)
        for server_round in range(2, 16)
    ]
    at = [gates.before_step(client, round_, step) for round_, client, step, _ in kills]
    run = flower.start_app(gates.app, changes | {"output-dir": str(tmp_path / "out")})
    for gate, (_, client, _, whole_node) in zip(at, kills, strict=True):
        gate.wait()
        node = flower.supernodes[client]
        if whole_node:
            node.kill()
        else:
            node.kill_client_app()
        gate.open()
        if whole_node:
            node.start()
    finished = run.finish()
    assert finished.completed, finished.log
    assert_as_if_nothing_had_happened(tmp_path / "out", changes)


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.chaos(
    "SIGKILL of the ServerApp at 6 random steps, and resume",
    "the run ends as if nothing had happened",
)
def test_killed_servers_change_no_number(quickstart, flower, gates, tmp_path):
    drawn = random.Random(SEED)
    changes = SETTINGS | ALL_CLIENTS | {"num-server-rounds": 8}
    places = {
        "output-dir": str(tmp_path / "out"),
        "checkpoint-dir": str(tmp_path / "checkpoints"),
    }
    for server_round in range(2, 8):
        gate = gates.before_step(drawn.randrange(NUM_CLIENTS), server_round, drawn.randrange(4))
        resume = {"resume": server_round > 2}
        run = flower.start_app(gates.app, changes | places | resume)
        gate.wait()
        assert flower.home.tree.signal(signal.SIGKILL, "flwr-serverapp")
        gate.open()
        assert not run.finish().completed
    finished = flower.run_app(gates.app, changes | places | {"resume": True})
    assert finished.completed, finished.log
    assert_as_if_nothing_had_happened(tmp_path / "out", changes)
