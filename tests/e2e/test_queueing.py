"""Two runs on one fleet: the second waits for its nodes, on a port of its own."""

import pytest
from safetensors.numpy import load_file

from flsplit import History
from flsplit.processes import free_ports
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import deployment

KEPT = ("output", "checkpoint")


@pytest.mark.chaos(
    "two runs on one fleet at once",
    "the second waits for its nodes; both end as if they were alone",
)
@pytest.mark.e2e
@pytest.mark.long
def test_a_run_waits_for_nodes_that_are_busy_with_another(quickstart, gates, tmp_path):
    gate = gates.before_step(0, server_round=1)
    node = {"partition-id": 0, "num-partitions": 1, "state-dir": str(tmp_path / "states")}
    with deployment(tmp_path, 1, tls=False, auth=False, node_configs=[node]) as flower:
        (port,) = free_ports(1)
        config = {"num-server-rounds": 2, "session-port": port, "session-ports": 20}

        def start(name, **changes):
            folders = {f"{what}-dir": str(tmp_path / name / what) for what in KEPT}
            return flower.start_app(gates.app, config | folders | changes)

        first = start("first")
        gate.wait()
        second = start("second", seed=1)
        second.wait_for_log("waiting for hosts: 1 nodes are invited")
        gate.open()
        finished = [run.finish() for run in (first, second)]
    assert [run.completed for run in finished] == [True, True], finished[1].log
    assert "1 client served by 1 host over" in finished[1].log
    for name, changes in (("first", {}), ("second", {"seed": 1})):
        expected = run_locally(1, {"num-server-rounds": 2} | changes)
        history = History.load(tmp_path / name / "output" / "history.jsonl")
        assert history.numbers() == expected.history.numbers()
        weights = load_file(tmp_path / name / "output" / "model.safetensors")
        for key, array in expected.arrays.items():
            assert weights[key].tobytes() == array.numpy().tobytes(), key
