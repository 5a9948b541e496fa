"""What can be wrong with a run config, said before anything takes long."""

import math

from flsplit.run import SplitStrategy
from llm.models import RunConfig, load_tokenizer, one_of
from llm.sequences import DATA

LEAST = {
    "num-server-rounds": 1,
    "base-steps": 0,
    "auxiliary-blocks": 0,
    "generate-tokens": 0,
    "temperature": 0,
}


def check(config: RunConfig, strategy: SplitStrategy) -> None:
    """Refuse what could not be trained, or not be shown at the end.

    Raises
    ------
    ValueError
        If ``data`` is unknown, a number is too small, the prompt and the text that is to follow
        are longer than the model's positions, or the server would have nothing to train.
    """
    one_of(config, "data", DATA)
    for key, least in LEAST.items():
        if not least <= float(config[key]) < math.inf:
            raise ValueError(f"{key}={config[key]}, expected {least} or more")
    prompt, further = load_tokenizer(config)(str(config["prompt"]))["input_ids"], 0
    if not bool(config["label-private"]):  # else no text is written
        further = int(config["generate-tokens"])
    most = strategy.options.model.config.max_position_embeddings
    if further and len(prompt) + further > most:
        raise ValueError(
            f"prompt has {len(prompt)} tokens and generate-tokens={further} are to follow, but "
            f"{config['model']} has {most} positions"
        )
    if not any(parameter.requires_grad for parameter in strategy.parts.server.parameters()):
        raise ValueError(
            f"adapt={config['adapt']!r} and train-head={str(config['train-head']).lower()} leave "
            "the server nothing to train, expected adapters in its blocks (adapt='both' or "
            "'server') or train-head=true"
        )
