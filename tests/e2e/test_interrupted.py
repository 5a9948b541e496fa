"""Simulations that are interrupted: an actor or the server dies, a run is stopped."""

import os
import signal

import pytest
from safetensors.torch import load_file

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import simulation, wait_until

NUM_CLIENTS = 4
CHANGES = {"strategy": "psl", "batch-size": 64}


@pytest.mark.chaos(
    "SIGKILL of a Ray actor",
    "its clients move to another host",
)
@pytest.mark.e2e
def test_clients_of_a_killed_actor_move_and_the_run_goes_on(gates, tmp_path):
    changes = CHANGES | {"num-server-rounds": 6, "output-dir": str(tmp_path / "out")}
    gate = gates.before_step(0, server_round=3)
    with simulation(tmp_path, NUM_CLIENTS) as flower:
        run = flower.start_app(gates.app, changes)
        gate.wait()
        actors = flower.home.tree.find("ray::ClientAppActor")
        os.kill(actors[0], signal.SIGKILL)
        gate.open()
        finished = run.finish()

    assert finished.completed, finished.log
    history = History.load(tmp_path / "out" / "history.jsonl")
    # Its clients missed what was left of that round.
    missed = [{one.client for one in entry.left_out} for entry in history]
    assert [set(), set(), missed[2], set(), set(), set()] == missed
    assert missed[2] in ({"0", "2"}, {"1", "3"})
    assert "moves to another host" in finished.log
    assert history[-1].participants == ["0", "1", "2", "3"]
    assert all(entry.restarted == [] for entry in history)


@pytest.mark.chaos(
    "SIGKILL of a simulation's server, and resume",
    "the run ends as if nothing had happened",
)
@pytest.mark.e2e
@pytest.mark.long
def test_a_server_that_was_killed_resumes_with_the_same_numbers(quickstart, gates, tmp_path):
    rounds = {"num-server-rounds": 6}
    changes = (
        CHANGES
        | rounds
        | {
            "checkpoint-dir": str(tmp_path / "checkpoints"),
            "output-dir": str(tmp_path / "out"),
        }
    )
    gate = gates.before_step(0, server_round=4)
    with simulation(tmp_path, NUM_CLIENTS) as flower:
        run = flower.start_app(gates.app, changes)
        gate.wait()
        # In a simulation the ServerApp and Flower's engine are one process.
        assert flower.home.tree.signal(signal.SIGKILL, "flwr-simulation")
        gate.open()
        assert not run.finish().completed

        finished = flower.run_app(gates.app, changes | {"resume": True})
        assert finished.completed, finished.log
        assert "resuming after round 3" in finished.log

    expected = run_locally(NUM_CLIENTS, CHANGES | rounds)
    history = History.load(tmp_path / "out" / "history.jsonl")
    assert history.numbers() == expected.history.numbers()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for key, array in expected.arrays.items():
        assert weights[key].numpy().tobytes() == array.numpy().tobytes(), key


@pytest.mark.chaos(
    "flwr stop",
    "all processes end",
)
@pytest.mark.e2e
def test_a_run_that_is_stopped_ends_with_all_its_processes(quickstart, tmp_path):
    changes = CHANGES | {"num-server-rounds": 10_000, "output-dir": str(tmp_path / "out")}
    with simulation(tmp_path, NUM_CLIENTS) as flower:
        run = flower.start_app(quickstart, changes)
        run.wait_for_log("round 2/")
        run.stop()
        finished = run.finish()
        assert finished.status == "finished:stopped"
        names = ("ray::ClientAppActor", "flwr-simulation")
        wait_until(
            lambda: not any(flower.home.tree.find(name) for name in names) or None,
            "the end of the simulation's processes",
            timeout=120,
        )
