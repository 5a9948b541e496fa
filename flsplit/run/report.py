"""What a run logs: the strategy's options at the start, one line per round."""

import datetime
from dataclasses import MISSING, fields

from flwr.app import ArrayRecord
from torch import nn

from flsplit.account.ledger import RoundEntry
from flsplit.client_parts import ClientPart
from flsplit.log import logger
from flsplit.run.method import SplitMethod
from flsplit.run.options import SplitOptions
from flsplit.run.own_arguments import kept_arguments


def log_start(strategy: SplitMethod, num_rounds: int, arrays: ArrayRecord) -> None:
    """Log what is about to run."""
    size = sum(len(array.data) for array in arrays.values()) / 2**20
    logger.info("Starting %s strategy:", type(strategy).__name__)
    logger.info("\t├── Number of rounds: %d", num_rounds)
    logger.info("\t├── ArrayRecord (%.2f MB)", size)


def log_summary(strategy: SplitMethod, own_arguments: list[str]) -> None:
    """Log the arguments as a tree, as Flower's strategies do."""
    options = strategy.options
    kept = "; labels and last layers stay with the clients" if options.keeps_labels else ""
    where = options.cut if options.several_cuts else options.default_cut
    logger.info("\t├──> Cut after %r%s:", where, kept)
    logger.info("\t│\t├── client segment: %s parameters", _count(strategy.parts.client))
    logger.info("\t│\t└── server segment: %s parameters", _count(strategy.parts.server))
    if own := kept_arguments(strategy, own_arguments):
        logger.info("\t├──> %s:", type(strategy).__name__)
        for name, value in own.items():
            logger.info("\t│\t├── %s: %s", name, _show(value))
    logger.info("\t└──> Options that are not at their default:")
    for name, value in _chosen(options).items():
        logger.info("\t\t├── %s: %s", name, _show(value))
    logger.info("\t\t└── seed: %d", options.seed)


def _chosen(options: SplitOptions) -> dict[str, object]:
    chosen = {}
    for one in fields(options):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = getattr(options, one.name)
        if one.name in ("model", "cut", "seed", "example"):
            continue
        if value != default and value != "":  # an app passes "" for what nobody gave
            chosen[one.name] = value
    return chosen


def log_round(entry: RoundEntry, num_rounds: int, seconds_left: float) -> None:
    """Log one line about a round that has ended."""
    left = datetime.timedelta(seconds=round(seconds_left))
    scores = {name: value for name, value in entry.evaluation.items() if name != "num-examples"}
    if not scores and entry.loss is not None:
        scores = {"train loss": entry.loss}
    text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    if entry.simulated_seconds is not None:
        text += f"  {entry.simulated_seconds:.2f} s on the fleet"
    logger.info(
        "round %d/%d  %s  %s  %.1f s  (%s left)",
        entry.round,
        num_rounds,
        text,
        _bytes(entry.traffic.training_bytes),
        entry.seconds,
        left,
    )


def _count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def _show(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    if isinstance(value, tuple) and any(isinstance(one, ClientPart) for one in value):
        return _show(list(value))
    if isinstance(value, (str, int, float, tuple, type(None))):
        return repr(value)
    if isinstance(value, ClientPart):
        arguments = ", ".join(f"{name}={_show(one)}" for name, one in value.arguments().items())
        return f"{type(value).__name__}({arguments})"
    return str(getattr(value, "__name__", type(value).__name__))


def _bytes(count: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
