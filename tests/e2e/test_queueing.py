"""Two runs on one fleet: the second waits for its nodes, on a port of its own."""

import pytest

from flsplit.processes import free_ports
from tests.flower_processes import deployment


@pytest.mark.e2e
def test_a_run_waits_for_nodes_that_are_busy_with_another(gates, tmp_path):
    gate = gates.before_step(0, server_round=1)
    with deployment(tmp_path, 1, tls=False, auth=False) as flower:
        (port,) = free_ports(1)
        config = {"num-server-rounds": 1, "session-port": port, "session-ports": 20}
        first = flower.start_app(gates.app, config)
        gate.wait()
        second = flower.start_app(gates.app, config)
        second.wait_for_log("waiting for hosts: 1 nodes are invited")
        gate.open()
        finished = [run.finish() for run in (first, second)]
    assert [run.completed for run in finished] == [True, True], finished[1].log
    assert "1 hosts serve 1 clients" in finished[1].log
