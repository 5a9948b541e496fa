"""A simulation whose Ray misses its time: `flwr` is a script here that plays it."""

import os
import sys

import pytest

from tests.flower_processes import FlowerRun, flower_home

FLWR = """#!{python}
import json, pathlib, sys

if sys.argv[1] == "ls":
    status = "finished:completed" if sys.argv[3] == "4" else "finished:failed"
    print(json.dumps({{"runs": [{{"status": status, "status-details": ""}}]}}))
else:
    runs = pathlib.Path({runs!r})
    number = int(runs.read_text()) + 1
    runs.write_text(str(number))
    print(f"Successfully started run {{number}}")
    slow = [
        "Timed out waiting for file /tmp/x/gcs_server_port_1",
        "The current node timed out during startup.",
    ]
    print("TRAINING" if number == 4 else "Exception: " + slow[number % 2])
"""


@pytest.fixture
def home(tmp_path):
    """Give a function that makes a Flower home whose runs are numbered from `first`."""
    (tmp_path / "bin").mkdir()
    runs = tmp_path / "runs"
    program = tmp_path / "bin" / "flwr"
    program.write_text(FLWR.format(python=sys.executable, runs=str(runs)))
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    with flower_home(tmp_path, {"PATH": path}) as made:

        def starting_at(first):
            runs.write_text(str(first - 1))
            return made

        yield starting_at


def test_the_run_is_started_again(home, tmp_path):
    lines = []
    run = FlowerRun(home(2), tmp_path, echo=lines.append)

    run.wait_for_log("TRAINING")
    finished = run.finish(timeout=60)

    assert (finished.run_id, finished.completed) == (4, True)
    assert "imed out" not in finished.log
    assert sum("starting the run again" in line for line in lines) == 2


def test_it_is_not_started_a_fourth_time(home, tmp_path):
    finished = FlowerRun(home(1), tmp_path).finish(timeout=60)

    # Number 4 would have completed.
    assert (finished.run_id, finished.status) == (3, "finished:failed")
    assert "timed out during startup" in finished.log
