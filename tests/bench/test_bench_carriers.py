"""``flsplit bench carriers`` with real processes; nothing is said about time."""

import json

import pytest
from typer.testing import CliRunner

from flsplit.cli import app


@pytest.mark.e2e
@pytest.mark.long
def test_carriers_of_a_simulation_are_measured(tmp_path):
    path = tmp_path / "figures.json"

    sizes = ["--clients", "3", "--floats", "10", "--steps", "2"]
    result = CliRunner().invoke(
        app, ["bench", "carriers", *sizes, "--only", "simulated", "--json", str(path)]
    )

    assert result.exit_code == 0, result.output
    carriers = json.loads(path.read_text())["carriers"]
    assert carriers.keys() == {"session-simulated", "flower-simulated", "grpc-echo-simulated"}
    for one in carriers.values():
        assert (one["clients"], one["floats"], one["steps"]) == (3, 10, 2)
        assert 0 < one["min_s"] <= one["median_s"] <= one["max_s"]
        assert one["hosts"] >= 1
