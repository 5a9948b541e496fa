"""The commands' options, and what they measure without starting Flower."""

import json
import sys

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from flsplit.bench import commands, training_app, workload
from flsplit.bench.figures import BenchError
from flsplit.bench.grpc_echo import measure_echo
from flsplit.bench.steady import last_of_each_step
from flsplit.bench.step_times import MEASURES, measure_training

RUN = CliRunner()


def test_numbers_are_taken_apart():
    assert commands.numbers("1,2,4") == [1, 2, 4]
    for wrong in ("", "1,x", "0", "1,,2"):
        with pytest.raises(typer.BadParameter, match="--clients"):
            commands.numbers(wrong)


def test_an_unknown_name_is_refused_with_the_known_ones():
    assert commands.chosen("", ["a", "b"]) == ["a", "b"]
    assert commands.chosen("b", ["a", "b"]) == ["b"]
    with pytest.raises(typer.BadParameter, match="no 'c'; known: a, b"):
        commands.chosen("a,c", ["a", "b"])


@pytest.mark.parametrize("option", ["--clients", "--floats", "--steps"])
def test_less_than_one_is_refused(option):
    result = RUN.invoke(commands.bench, ["carriers", option, "0"])

    assert result.exit_code == 2
    assert option in result.output


def test_training_is_measured_and_written(tmp_path, monkeypatch):
    path, measured = tmp_path / "figures.json", {}

    def measure(*given, **options):
        measured["seconds"], notes = measure_training(*given, **options)
        return measured["seconds"], notes

    monkeypatch.setattr("flsplit.bench.step_times.measure_training", measure)
    arguments = ["--clients", "1,2", "--steps", "2", "--only", "floor,local,nvflare"]
    result = RUN.invoke(commands.bench, ["train", *arguments, "--json", str(path)])

    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    per_step = written["seconds_per_step"]
    assert per_step["floor"].keys() == per_step["local"].keys() == {"1", "2"}
    assert all(seconds > 0 for one in per_step.values() for seconds in one.values())
    assert ("nvflare" in per_step) != ("nvflare" in written["notes"])
    assert "floor" in result.output
    # As many steps as asked for.
    found = measured["seconds"]
    assert {len(found[name][n]) for name in ("floor", "local") for n in (1, 2)} == {2}


def test_all_carriers_of_the_json_can_be_measured():
    assert list(MEASURES) == ["floor", "local", "session-deployed", "session-simulated", "nvflare"]


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    workload._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(BenchError, match=r"pip install 'flsplit\[apps\]'"):
        workload.partition(workload.IMAGES, 0, 1)


def test_the_networks_take_the_data():
    for name, smashed in ((workload.IMAGES, (128, 16, 16)), (workload.QUICKSTART, (16, 8, 8))):
        model = workload.network(name)
        images, labels = workload.partition(name, 1, 4)[:5]

        assert model.client(images).shape == (5, *smashed)
        assert model(images).shape == (5, 10)
        assert labels.shape == (5,)


def test_the_stopwatch_leaves_out_the_warm_up(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(training_app.time, "perf_counter", lambda: float(next(now)) ** 2)
    watch = training_app.Stopwatch()

    optimizer = watch.adam([nn.Parameter(torch.zeros(1))], lr=0.1)

    for _ in range(training_app.WARM_UP + 2):
        optimizer.step()

    first = training_app.WARM_UP - 1
    assert watch.seconds() == [(first + 1) ** 2 - first**2, (first + 2) ** 2 - (first + 1) ** 2]


def test_of_the_lines_of_a_step_the_last_counts():
    assert last_of_each_step("0 5\n0 7\n100 8\n100 9\n") == [(0, 7), (100, 9)]


def test_an_echo_over_grpc():
    seconds = measure_echo(processes=2, clients=3, floats=1000, steps=4)

    assert len(seconds) == 4
    assert min(seconds) > 0
