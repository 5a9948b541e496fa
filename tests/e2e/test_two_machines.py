"""A simulation on a Ray cluster of two machines: both work, with the numbers of one."""

import pytest

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import simulation
from tests.two_machines import ray_on_two_machines

NUM_CLIENTS = 4
CHANGES = {"strategy": "psl", "batch-size": 64, "num-server-rounds": 4}


@pytest.mark.chaos(
    "a machine of a Ray cluster dies",
    "its clients miss a round",
)
@pytest.mark.e2e
@pytest.mark.long
def test_two_machines_give_the_numbers_of_one_and_a_lost_one_loses_only_its_step(
    quickstart, gates, tmp_path
):
    out = tmp_path / "out"
    gate = gates.before_step(0, server_round=3)
    with (
        ray_on_two_machines(tmp_path) as (address, other),
        simulation(tmp_path, NUM_CLIENTS, env={"RAY_ADDRESS": address}) as flower,
    ):
        run = flower.start_app(gates.app, CHANGES | {"output-dir": str(out)})
        gate.wait()
        other.kill()
        gate.open()
        finished = run.finish(timeout=280)

    assert finished.completed, finished.log
    assert (
        f"{NUM_CLIENTS} clients served by 2 hosts over {address.partition(':')[0]}:" in finished.log
    )
    history = History.load(out / "history.jsonl")
    expected = run_locally(NUM_CLIENTS, CHANGES).history.numbers()
    assert history.numbers()[:2] == expected[:2]
    missed = [{one.client for one in entry.left_out} for entry in history]
    assert missed[2] in ({"0", "2"}, {"1", "3"})
    assert missed == [set(), set(), missed[2], set()]
    assert history[-1].participants == ["0", "1", "2", "3"]
    assert all(entry.restarted == [] for entry in history)  # both have one disk
