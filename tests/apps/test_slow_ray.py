"""A simulation whose Ray misses its time: `flwr` is a script here that plays it."""

import os
import sys

import pytest

from tests.flower_processes import flower_home

FLWR = """#!{python}
import json, pathlib, sys

if sys.argv[1] == "ls":
    status = "finished:completed" if sys.argv[3] == "3" else "finished:failed"
    print(json.dumps({{"runs": [{{"status": status, "status-details": ""}}]}}))
else:
    runs = pathlib.Path({runs!r})
    number = int(runs.read_text()) + 1
    runs.write_text(str(number))
    print(f"Successfully started run {{number}}")
    print("TRAINING" if number == 3 else "Exception: The current node timed out during startup.")
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


def test_the_run_is_started_once_more(home, tmp_path):
    lines = []
    run = home(2).start_run(tmp_path, echo=lines.append)

    run.wait_for_log("TRAINING")
    finished = run.finish(timeout=60)

    assert (finished.run_id, finished.completed) == (3, True)
    assert "timed out during startup" not in finished.log
    assert any("starting the run once more" in line for line in lines)


def test_it_is_not_started_a_third_time(home, tmp_path):
    finished = home(1).start_run(tmp_path).finish(timeout=60)

    # Number 3 would have completed.
    assert (finished.run_id, finished.status) == (2, "finished:failed")
    assert "timed out during startup" in finished.log
