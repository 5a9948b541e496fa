"""Where a run's model, history and picture go."""

import logging
import time
from pathlib import Path

import torch
from flwr.app import Context
from safetensors.torch import save_file

from flsplit import draw_histories
from flsplit.run import SplitResult

logger = logging.getLogger("flwr")


def output_dir(context: Context) -> Path:
    """Return the folder that the run config's ``output-dir`` names, made if need be.

    By default that is a new folder under the user's home: the app itself runs from a copy, in
    another working directory, where a relative path would lead nowhere.

    Raises
    ------
    ValueError
        If ``output-dir`` is a relative path.
    """
    given = str(context.run_config["output-dir"])
    if given and not Path(given).is_absolute():
        raise ValueError(f"output-dir={given!r} must be an absolute path, or empty")
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-run-{context.run_id}"
    folder = Path(given) if given else Path.home() / "flsplit-runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_run(result: SplitResult, folder: Path) -> None:
    """Write model, history and picture, and say where they are and how good the model is."""
    arrays = {name: torch.from_numpy(array.numpy()) for name, array in result.arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    result.history.save(folder / "history.jsonl")
    draw_histories({"test accuracy": result.history}, folder / "accuracy.png")
    _, accuracies = result.history.series("accuracy")
    if not accuracies:
        logger.info("no client has test examples: no test accuracy")
    else:
        logger.info("test accuracy: %.3f", accuracies[-1])
    for what, name in (
        ("model", "model.safetensors"),
        ("history", "history.jsonl"),
        ("picture", "accuracy.png"),
    ):
        logger.info("%s: %s", what, folder / name)
