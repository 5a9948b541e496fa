"""All carriers give the same numbers: LocalGrid, Flower's messages, sessions of any size.

One real run trains every method, one after the other: those that differ most over every carrier,
and those of a stranger's package by name, in an app that knows nothing of them.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.e2e.strangers import NAMES
from tests.flower_processes import simulation

NUM_CLIENTS = 4
SIZES = {"num-server-rounds": 2, "batch-size": 64}
METHODS = {
    # Simulated seconds are numbers, too.
    "splitfed-v1": SIZES | {"fleet": "fleet.toml"},
    "psl": SIZES
    | {
        "strategy-args": '{local-steps = 2, client-parts = ["clip", {name = "noise", sigma = 0.1},'
        " {name = 'proximal', mu = 0.1}]}",
    },
    "sglr": SIZES | {"strategy-args": "{phi = 0.5, alpha = 0.5}"},
    "epsl": SIZES | {"strategy-args": "{phi = 0.5, local-steps = 2}"},
    "gapsl": SIZES,
    "cyclesl": SIZES | {"strategy-args": "{server-batch-size = 24}"},
    "sfl-ga": SIZES,
    "fsl-sage": SIZES
    | {
        "num-server-rounds": 3,
        "strategy-args": "{upload-every = 2, align-every = 2, align-epochs = 20}",
    },
    # The second round begins with averaged auxiliary models.
    "cse-fsl": SIZES | {"strategy-args": "{upload-every = 2}"},
}
STRANGERS = dict.fromkeys(NAMES, SIZES)
PRIVATE = {"label-private": True}
KEEPING_LABELS = dict.fromkeys(("psl", "splitfed-v1", "sequential-sl"), SIZES | PRIVATE)
CARRIERS = {
    "flower": {"carrier": "flower"},
    **{
        f"session-{hosts}": {"carrier": "session", "session-max-hosts": hosts}
        for hosts in (1, 2, 4)
    },
}


def carriers_of(method):
    if method in STRANGERS:
        return ["session-2"]
    every = method in ("psl", "splitfed-v1", "fsl-sage")
    return list(CARRIERS) if every else ["flower", "session-2"]


SERVER_APP = '''"""Train every method over every carrier."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file

from flsplit.run import make_strategy
from quickstart.server_app import strategy_options
from quickstart.task import build_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    for folder, changes in json.loads({trainings!r}).items():
        config = {{**context.run_config, **changes}}
        torch.set_num_threads(config["torch-threads"])
        torch.manual_seed(config["seed"])
        model = build_model(context)
        strategy = make_strategy(
            config["strategy"], config["strategy-args"], model=model, **strategy_options(config)
        )
        initial = ArrayRecord(model.state_dict())
        print("TRAINING", Path(folder).name, flush=True)
        result = strategy.start(grid, initial, num_rounds=config["num-server-rounds"])
        Path(folder).mkdir()
        result.history.save(Path(folder) / "history.jsonl")
        arrays = {{name: torch.from_numpy(array.numpy()) for name, array in result.arrays.items()}}
        save_file(arrays, Path(folder) / "model.safetensors")
'''


def training_app(quickstart, tmp_path, methods):
    """Return a copy of the quickstart with a server that trains more than once."""
    trainings = {
        str(tmp_path / f"{method}-over-{carrier}"): changes
        | CARRIERS[carrier]
        | {"strategy": method}
        for method, changes in methods.items()
        for carrier in carriers_of(method)
    }
    folder = tmp_path / "app"
    shutil.copytree(quickstart, folder)
    source = SERVER_APP.format(trainings=json.dumps(trainings))
    (folder / "quickstart" / "many.py").write_text(source)
    project = folder / "pyproject.toml"
    old, new = '"quickstart.server_app:app"', '"quickstart.many:app"'
    assert project.read_text().count(old) == 1
    project.write_text(project.read_text().replace(old, new))
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize(
    "methods", [METHODS | STRANGERS, KEEPING_LABELS], ids=["methods", "keeping-labels"]
)
def test_all_carriers_give_the_same_numbers(methods, quickstart, package, tmp_path):
    app = training_app(quickstart, tmp_path, methods)
    if methods is KEEPING_LABELS:  # clients read it, too
        project = app / "pyproject.toml"
        project.write_text(project.read_text().replace("-private = false", "-private = true"))
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    with simulation(tmp_path, NUM_CLIENTS, {"PYTHONPATH": path}) as flower:
        run = flower.run_app(app, federation_config=["init-args-num-cpus=4"])
    assert run.completed, run.log
    for hosts in (1, 2, 4):
        assert f"{NUM_CLIENTS} clients served by {hosts} host{'s' * (hosts > 1)} over" in run.log

    for method, changes in methods.items():
        expected = run_locally(NUM_CLIENTS, changes | {"strategy": method})
        for carrier in carriers_of(method):
            folder = tmp_path / f"{method}-over-{carrier}"
            history = History.load(folder / "history.jsonl")
            assert history.numbers() == expected.history.numbers(), folder.name
            weights = load_file(folder / "model.safetensors")
            assert weights.keys() == expected.arrays.keys()
            for key, array in expected.arrays.items():
                assert torch.equal(weights[key], torch.from_numpy(array.numpy())), (
                    folder.name,
                    key,
                )
        if method == "fsl-sage":
            aligned = ["cosine-after-alignment" in entry.metrics for entry in expected.history]
            assert aligned == [True, False, True]  # in the round, from the first on
        if method == "stranger-careful":
            assert expected.history[0].metrics["kept"] < NUM_CLIENTS
