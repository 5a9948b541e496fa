"""The quickstart app run over LocalGrid: what every real run must agree with."""

import tomllib

import torch
from flwr.app import ArrayRecord, Context, RecordDict

from flsplit import LocalGrid
from flsplit.run import make_strategy
from tests.flower_processes import REPOSITORY

QUICKSTART = REPOSITORY / "apps" / "quickstart"


def run_locally(num_clients, changes):
    """Return the result of the quickstart with a changed run config; its modules are importable."""
    from quickstart.client_app import app
    from quickstart.server_app import strategy_options
    from quickstart.task import build_model

    with (QUICKSTART / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)["tool"]["flwr"]["app"]["config"] | changes
    torch.manual_seed(config["seed"])
    model = build_model(Context(1, 1, {}, RecordDict(), config))
    strategy = make_strategy(
        config["strategy"], config["strategy-args"], model=model, **strategy_options(config)
    )
    grid = LocalGrid(app, num_clients, run_config=config)
    return strategy.start(
        grid, ArrayRecord(model.state_dict()), num_rounds=config["num-server-rounds"]
    )
