"""What can be wrong with a run config, said before anything takes long."""

from torch import nn

from flsplit import split
from llm.models import RunConfig, cut_name, one_of
from llm.sequences import DATA


def check(model: nn.Module, config: RunConfig) -> None:
    """Refuse what could not be trained.

    Raises
    ------
    ValueError
        If ``data`` is unknown, or the server would have nothing to train.
    """
    one_of(config, "data", DATA)
    server = split(model, cut_name(config)).server
    if not any(parameter.requires_grad for parameter in server.parameters()):
        raise ValueError(
            f"adapt={config['adapt']!r} and train-head={str(config['train-head']).lower()} leave "
            "the server nothing to train, expected adapters in its blocks (adapt='both' or "
            "'server') or train-head=true"
        )
