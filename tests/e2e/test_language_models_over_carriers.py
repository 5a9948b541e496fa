"""Language models trained by ``flwr run``: the same numbers over every carrier."""

import importlib

import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file

from flsplit import History, LocalGrid
from tests.flower_processes import REPOSITORY, simulation
from tests.language_models import MODELS

NUM_CLIENTS = 3
METHODS = ["PSL", "SplitFedV1", "SplitFedV2", "SGLR", "GAPSL"]
ROUNDS = {"SplitFedV1": 2}  # others one, which takes half the time
CARRIERS = {"flower": "flower", "session-2": "session"}

PROJECT = """[project]
name = "words"
version = "1.0.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "words.server_app:app"
clientapp = "words.client_app:app"

[tool.uv]
exclude-dependencies = ["flwr"]
"""

TASK = '''"""A model with its data, and how it is trained."""

import sys

import torch

sys.path.insert(0, {repository!r})

from flsplit import ModelLoss, client_app, strategies
from flsplit.carry.session import SessionSettings
from flsplit.seeds import seeded
from tests.language_models import MODELS


def build(kind):
    with seeded(0):
        return MODELS[kind][0](0.1)


def app_of(kind):
    _, cut, make, share = MODELS[kind]

    def data(context):
        part = make(9, 7 + int(context.node_config["partition-id"]))
        return part, part

    return client_app(model=lambda: build(kind), cut=cut, data=data, share=share, device="cpu")


def strategy_of(name, kind, hosts=0, **options):
    _, cut, _, share = MODELS[kind]
    return getattr(strategies, name)(
        model=build(kind), cut=cut, share=share, loss=ModelLoss(), server_lr=0.1, batch_size=4,
        local_steps=1, device="cpu", session=SessionSettings(max_hosts=hosts), **options,
    )
'''

CLIENT_APP = '''"""The clients of the model that the run configuration names."""

from words.task import app_of

app = app_of("{kind}")
'''

SERVER_APP = '''"""Train a model with every method over every carrier."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from safetensors.torch import save_file

from words.task import build, strategy_of

app = ServerApp()


@app.main()
def main(grid, context):
    torch.set_num_threads(1)
    for method in {methods!r}:
        for name, carrier in {carriers!r}.items():
            hosts = int(name[-1]) if carrier == "session" else 0
            strategy = strategy_of(method, "{kind}", hosts, carrier=carrier)
            initial = ArrayRecord(build("{kind}").state_dict())
            result = strategy.start(grid, initial, num_rounds={rounds!r}.get(method, 1))
            folder = Path({out!r}) / (method + "-" + name)
            folder.mkdir(parents=True)
            result.history.save(folder / "history.jsonl")
            save_file(result.arrays.to_torch_state_dict(), folder / "model.safetensors")
'''


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Write the projects, one for each model; give their common module."""
    for kind in MODELS:
        folder = tmp_path / kind / "words"
        folder.mkdir(parents=True)
        (folder.parent / "pyproject.toml").write_text(PROJECT)
        names = {
            "kind": kind, "repository": str(REPOSITORY), "methods": METHODS, "carriers": CARRIERS,
            "rounds": ROUNDS, "out": str(tmp_path / f"of-{kind}"),
        }  # fmt: skip
        (folder / "__init__.py").write_text("")
        for name, text in (
            ("task", TASK.replace("{repository!r}", repr(str(REPOSITORY)))),
            ("client_app", CLIENT_APP.format(**names)),
            ("server_app", SERVER_APP.format(**names)),
        ):
            (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "gpt")
    return importlib.import_module("words.task")


@pytest.mark.e2e
@pytest.mark.long
def test_language_models_give_the_same_numbers_over_all_carriers(task, tmp_path):
    with simulation(tmp_path, NUM_CLIENTS) as flower:
        for kind in MODELS:
            run = flower.run_app(tmp_path / kind)
            assert run.completed, run.log

    for kind in MODELS:
        for method in METHODS:
            initial = ArrayRecord(task.build(kind).state_dict())
            grid = LocalGrid(task.app_of(kind), NUM_CLIENTS, progress=False)
            rounds = ROUNDS.get(method, 1)
            expected = task.strategy_of(method, kind).start(grid, initial, num_rounds=rounds)
            assert expected.history[-1].left_out == []
            for carrier in CARRIERS:
                folder = tmp_path / f"of-{kind}" / f"{method}-{carrier}"
                history = History.load(folder / "history.jsonl")
                assert history.numbers() == expected.history.numbers(), folder.name
                weights = load_file(folder / "model.safetensors")
                for key, tensor in expected.arrays.to_torch_state_dict().items():
                    assert torch.equal(weights[key], tensor), (folder.name, key)
