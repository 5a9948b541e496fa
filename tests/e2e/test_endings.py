"""Runs in a deployment that end before their time: nobody waits on, nothing stays open."""

import shutil

import pytest

from tests.flower_processes import deployment, wait_until

NUM_CLIENTS = 2
CHANGES = {"strategy": "splitfed-v2", "batch-size": 64, "num-server-rounds": 10_000}

FAILING = """        evaluate_fn=fail,
        num_rounds="""

FAIL = '''

def fail(server_round: int, _arrays: ArrayRecord) -> None:
    """Raise in the second round."""
    if server_round == 2:
        raise RuntimeError("as it was asked to")
'''


@pytest.fixture
def failing_app(quickstart, tmp_path):
    """Give a quickstart whose ServerApp raises in the second round."""
    app = tmp_path / "failing"
    shutil.copytree(quickstart, app)
    server = app / "quickstart" / "server_app.py"
    source = server.read_text()
    assert source.count("        num_rounds=") == 1
    server.write_text(source.replace("        num_rounds=", FAILING) + FAIL)
    return app


def everything_has_ended(flower):
    """Tell whether no process of a ServerApp or ClientApp is left, and with them no open port."""
    return not any(flower.home.tree.find(f"flwr-{name}app") for name in ("server", "client"))


@pytest.mark.chaos(
    "a ServerApp raises or is stopped, deployed",
    "the run ends on all machines",
)
@pytest.mark.e2e
def test_a_deployed_run_that_raises_or_is_stopped_ends_everywhere(
    quickstart, failing_app, tmp_path
):
    with deployment(tmp_path, NUM_CLIENTS) as flower:
        finished = flower.run_app(failing_app, CHANGES)
        assert finished.status == "finished:failed"
        assert "as it was asked to" in finished.details + finished.log
        wait_until(lambda: everything_has_ended(flower), "the end of the failed run", 120)

        stopped = flower.start_app(quickstart, CHANGES)  # the same nodes are free again
        stopped.wait_for_log("round 2/")
        stopped.stop()
        assert stopped.finish().status == "finished:stopped"
        wait_until(lambda: everything_has_ended(flower), "the end of the stopped run", 120)
        for supernode in flower.supernodes:
            assert supernode.alive
