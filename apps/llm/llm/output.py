"""What comes out of a run: adapters as peft writes them, and a whole model as transformers does."""

import copy
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def output_folder(context: Context) -> Path:
    """Return the folder that ``output-dir`` names; by default a new one under the user's home.

    Raises
    ------
    ValueError
        If it is a relative path: the app runs from a copy, in another working directory.
    """
    given = str(context.run_config["output-dir"])
    if given and not Path(given).is_absolute():
        raise ValueError(f"output-dir={given!r} must be an absolute path, or empty")
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-llm-{context.run_id}"
    folder = Path(given) if given else Path.home() / "flsplit-runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_model(
    model: nn.Module,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> dict[str, Path]:
    """Write a trained model; return where what was written is.

    Parameters
    ----------
    model : nn.Module
        The model, with adapters or without; it gets the weights.
    state : mapping
        Weights by name, of the whole model.
    tokenizer : PreTrainedTokenizerBase
        Goes beside the model.
    folder : Path
        Adapters go to ``adapters`` in it, the model that has them merged to ``model``.
    """
    model.load_state_dict(state)
    written = {}
    if isinstance(model, PeftModel):
        model.save_pretrained(folder / "adapters")
        written["adapters"] = folder / "adapters"
        model = copy.deepcopy(model).merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {**written, "model": folder / "model"}
