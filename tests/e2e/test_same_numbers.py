"""All carriers give the same numbers: LocalGrid, Flower's messages, sessions of any size."""

import pytest
import torch
from safetensors.torch import load_file

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import simulation

NUM_CLIENTS = 4
COUPLED = {
    "num-server-rounds": 2,
    "batch-size": 64,
    "strategy": "splitfed-v1",
    "fleet": "fleet.toml",  # simulated seconds are numbers, too
}
FSL_SAGE = {
    "num-server-rounds": 3,
    "batch-size": 64,
    "strategy": "fsl-sage",
    "strategy-args": "{upload-every = 2, align-every = 2, align-epochs = 20}",
}

FLOWER = {"carrier": "flower"}
SESSION = {"carrier": "session"}


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    """Start one SuperLink for all runs."""
    with simulation(tmp_path_factory.mktemp("flower")) as running:
        yield running


@pytest.fixture
def compare(flower, quickstart, tmp_path):
    """Return what runs the app for real, and compares it with a local run."""

    def run_and_compare(name, changes, expected, cpus=2):
        folder = tmp_path / name.replace(" ", "-")
        run = flower.run_app(
            quickstart,
            NUM_CLIENTS,
            changes | {"output-dir": str(folder)},
            [f"init-args-num-cpus={cpus}"],
        )
        assert run.completed, (name, run.log)
        history = History.load(folder / "history.jsonl")
        assert history.numbers() == expected.history.numbers(), name
        weights = load_file(folder / "model.safetensors")
        for key, array in expected.arrays.items():
            assert torch.equal(weights[key], torch.from_numpy(array.numpy())), (name, key)
        return run.log

    return run_and_compare


@pytest.mark.e2e
def test_all_carriers_give_the_same_numbers(compare):
    expected = run_locally(NUM_CLIENTS, COUPLED)
    compare("flower", COUPLED | FLOWER, expected)
    for hosts, cpus in ((1, 2), (2, 2), (4, 4)):
        changes = COUPLED | SESSION | {"session-max-hosts": hosts}
        log = compare(f"session, {hosts} hosts", changes, expected, cpus)
        assert f"{hosts} hosts serve {NUM_CLIENTS} clients" in log, log


@pytest.mark.e2e
def test_a_decoupled_method_gives_the_same_numbers_on_all_carriers(compare):
    expected = run_locally(NUM_CLIENTS, FSL_SAGE)
    aligned = ["cosine-after-alignment" in entry.metrics for entry in expected.history]
    assert aligned == [False, False, True]
    compare("flower", FSL_SAGE | FLOWER, expected)
    compare("session", FSL_SAGE | SESSION, expected)
