"""All carriers give the same numbers: LocalGrid, Flower's messages, sessions of any size."""

import pytest
import torch
from safetensors.torch import load_file

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import simulation

NUM_CLIENTS = 4
CHANGES = {
    "num-server-rounds": 2,
    "batch-size": 64,
    "strategy": "splitfed-v1",
    "fleet": "fleet.toml",
}

CARRIERS = {
    "flower": ({"carrier": "flower"}, 2),
    "session, 1 host": ({"carrier": "session", "session-max-hosts": 1}, 2),
    "session, 2 hosts": ({"carrier": "session", "session-max-hosts": 2}, 2),
    "session, 4 hosts": ({"carrier": "session", "session-max-hosts": 4}, 4),
}


@pytest.mark.e2e
def test_all_carriers_give_the_same_numbers(quickstart, tmp_path):
    expected = run_locally(NUM_CLIENTS, CHANGES)
    with simulation(tmp_path) as flower:
        for name, (carrier, cpus) in CARRIERS.items():
            folder = tmp_path / name.replace(" ", "-")
            run = flower.run_app(
                quickstart,
                NUM_CLIENTS,
                CHANGES | carrier | {"output-dir": str(folder)},
                [f"init-args-num-cpus={cpus}"],
            )
            assert run.completed, (name, run.log)
            history = History.load(folder / "history.jsonl")
            assert history.numbers() == expected.history.numbers(), name
            weights = load_file(folder / "model.safetensors")
            for key, array in expected.arrays.items():
                assert torch.equal(weights[key], torch.from_numpy(array.numpy())), (name, key)
            if "host" in name:
                assert f"{name.split()[1]} hosts serve {NUM_CLIENTS} clients" in run.log, run.log
