"""The server: trains the layers after the cut with the strategy that the run config names."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, UserConfig
from flwr.serverapp import Grid, ServerApp
from torch.optim import SGD

import flsplit
from flsplit import SessionSettings
from flsplit.run import make_strategy
from quickstart.output import output_dir, save_run
from quickstart.task import build_model, cut_of

APP_FOLDER = Path(__file__).resolve().parents[1]

logger = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write down what came of it."""
    config = context.run_config
    logger.info("flsplit %s, %s", flsplit.__version__, sys.executable)
    folder = output_dir(context)
    if (threads := int(config["torch-threads"])) > 0:
        torch.set_num_threads(threads)
    torch.manual_seed(int(config["seed"]))
    model = build_model(context)

    strategy = make_strategy(
        str(config["strategy"]),
        str(config["strategy-args"]),
        model=model,
        **strategy_options(config),
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(config["num-server-rounds"]),
    )
    save_run(result, folder)


def strategy_options(config: UserConfig) -> dict[str, Any]:
    """Take the strategy's options from the run config."""
    return {
        "cut": cut_of(config),
        "server_lr": float(config["learning-rate"]),
        "server_optimizer": partial(SGD, momentum=0.9),
        "batch_size": int(config["batch-size"]),
        "seed": int(config["seed"]),
        "carrier": str(config["carrier"]),
        "session": SessionSettings.from_run_config(config),
        "checkpoint_dir": str(config["checkpoint-dir"]),
        "resume": bool(config["resume"]),
        "fleet": fleet_path(str(config["fleet"])),
        "realtime": bool(config["realtime"]),
    }


def fleet_path(given: str) -> str:
    """Return where a fleet's file is; a relative path begins in the app's own folder."""
    return str(APP_FOLDER / given) if given else ""
