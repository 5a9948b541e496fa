"""Figures of the benchmarks: ratios, JSON and tables."""

import json

import pytest
from rich.console import Console

from flsplit.bench.figures import (
    Exchanges,
    carriers_json,
    carriers_table,
    ratios,
    steps_json,
    steps_table,
    write_json,
)

CARRIERS = {
    "flower-deployed": Exchanges([8.0, 4.0, 6.0], clients=2, floats=100, hosts=2),
    "session-deployed": Exchanges([0.003, 0.001, 0.002], clients=2, floats=100, hosts=2),
    "grpc-echo-deployed": Exchanges([0.001] * 5, clients=2, floats=100, hosts=2),
    "session-simulated": Exchanges([0.5], clients=10, floats=10, hosts=4),
}
STEPS = {
    "floor": {1: [0.2, 0.1, 0.3], 2: [0.4]},
    "session-deployed": {1: [0.25], 2: [0.5, 0.7]},
}


def rendered(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_ratios_are_those_of_the_medians_in_the_same_setting():
    assert ratios(CARRIERS, "session-deployed") == (6.0 / 0.002, 0.002 / 0.001)
    assert ratios(CARRIERS, "session-simulated") == (None, None)


def test_the_json_of_carriers_has_the_figures_by_name():
    written = carriers_json(CARRIERS)

    assert written["carriers"].keys() == CARRIERS.keys()
    session = written["carriers"]["session-deployed"]
    assert session == {
        "median_s": 0.002,
        "min_s": 0.001,
        "max_s": 0.003,
        "steps": 3,
        "clients": 2,
        "floats": 100,
        "hosts": 2,
        "times_faster_than_flower": pytest.approx(3000),
        "times_the_echo": pytest.approx(2),
    }
    assert "times_the_echo" not in written["carriers"]["session-simulated"]
    assert written["machine"]["cores"] >= 1


def test_the_table_of_carriers_shows_each_with_its_ratios():
    lines = rendered(carriers_table(CARRIERS)).splitlines()

    [session] = [line for line in lines if "session-deployed" in line]
    cells = [cell.strip() for cell in session.strip("│").split("│")]
    assert cells[1:] == ["3", "0.00200", "0.00100", "0.00300", "3000.0", "2.00"]
    assert any("10 clients on 4 hosts, 10 floats each way" in line for line in lines)


def test_the_json_of_steps_has_the_median_by_name_and_number_of_clients():
    written = steps_json(STEPS, {"nvflare": "not installed"})

    assert written["seconds_per_step"] == {
        "floor": {"1": 0.2, "2": 0.4},
        "session-deployed": {"1": 0.25, "2": pytest.approx(0.6)},
    }
    assert written["min_s"]["floor"]["1"] == 0.1
    assert written["max_s"]["floor"]["1"] == 0.3
    assert written["notes"] == {"nvflare": "not installed"}


def test_the_table_of_steps_shows_times_the_floor():
    lines = rendered(steps_table(STEPS)).splitlines()

    [session] = [line for line in lines if "session-deployed" in line]
    assert "1.25" in session
    assert "1.50" in session


def test_the_file_is_written_only_if_asked_for(tmp_path):
    write_json(None, {})
    write_json(tmp_path / "figures.json", {"a": 1})

    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": 1}
