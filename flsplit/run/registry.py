"""Strategies by name: flsplit's own and anybody else's."""

import tomllib
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from flsplit.client_parts import make_part
from flsplit.errors import ConfigError, did_you_mean
from flsplit.run.options import refuse_unknown
from flsplit.run.own_arguments import argument_names
from flsplit.run.strategy import SplitStrategy
from flsplit.wireless.phases import Method, Training
from flsplit.wireless.profile import ModelProfile
from flsplit.wireless.unsplit import FEDAVG

GROUP = "flsplit.strategies"


def strategy_names() -> list[str]:
    """Return the names of all installed strategies."""
    return sorted(entry_points(group=GROUP).names)


def make_strategy(name: str, strategy_args: str = "{}", **options: Any) -> SplitStrategy:
    """Return the strategy called ``name``.

    Parameters
    ----------
    name : str
        An entry point of the group ``flsplit.strategies``, such as those of flsplit's own package.
    strategy_args : str
        Arguments as a TOML inline table, e.g. ``'{phi = 0.5, client-lr = 0.01}'``; a hyphen
        stands for an underscore. They go before ``options``. ``client-parts`` is a list of client
        parts, each a name or a table with the name and arguments:
        ``'{client-parts = ["clip", {name = "noise", sigma = 0.1}]}'``.
    **options
        Further arguments of the strategy.

    Raises
    ------
    ConfigError
        If there is no such strategy or client part, it has no such argument (the nearest that
        exists is named), or ``strategy_args`` is not an inline table.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        known = strategy_names()
        hint = did_you_mean(name, known)
        raise ConfigError(f"there is no strategy {name!r}{hint} (there are {', '.join(known)})")
    cls = next(iter(found)).load()
    if not (isinstance(cls, type) and issubclass(cls, SplitStrategy)):
        raise ConfigError(f"strategy {name!r} is {cls!r}, expected a subclass of SplitStrategy")
    arguments = options | _parse(strategy_args)
    refuse_unknown(f"strategy {name!r}", arguments, argument_names(cls))
    strategy: SplitStrategy = cls(**arguments)
    return strategy


def plan_method(
    name: str, strategy_args: str, model: nn.Module, profile: ModelProfile, training: Training
) -> tuple[Method, Training]:
    """Return the strategy called ``name`` as a plan takes it, and how it then trains.

    Name and arguments are as `make_strategy` takes them; ``fedavg`` stands for devices that train
    the whole model. A batch size and a number of steps in the arguments go before ``training``, as
    in a run they go before an app's own.

    ConfigError if there is no such strategy, or it refuses its arguments.
    """
    given = arguments_table(strategy_args)
    if name == FEDAVG.name:
        if given:
            raise ConfigError(f"{name} takes no strategy-args, but they are {strategy_args!r}")
        return FEDAVG, training
    # Making the strategy says what is wrong with its arguments; any cut will do for that.
    made = make_strategy(
        name,
        strategy_args,
        model=model,
        cut=profile.places[0].cut,
        batch_size=training.batch_size,
        local_steps=training.steps,
        device="cpu",
    )
    sizes = {"batch_size": made.options.batch_size, "steps": made.options.local_steps}
    return made.planned(name, given), replace(training, **sizes)


def arguments_table(strategy_args: str) -> dict[str, Any]:
    """Return the table that ``strategy_args`` is, as it is written.

    ConfigError if it is no TOML inline table.
    """
    try:
        loaded = tomllib.loads(f"args = {strategy_args or '{}'}")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"strategy-args is {strategy_args!r}, not TOML, expected as '{{phi = 0.5}}': {error}"
        ) from error
    table = loaded["args"]
    if not isinstance(table, dict) or len(loaded) > 1:
        raise ConfigError(
            f"strategy-args is {strategy_args!r}, expected a table as '{{phi = 0.5}}'"
        )
    return table


def _parse(strategy_args: str) -> dict[str, Any]:
    table = arguments_table(strategy_args)
    arguments = {key.replace("-", "_"): value for key, value in table.items()}
    if "client_parts" in arguments:
        if not isinstance(arguments["client_parts"], list):
            raise ConfigError(
                f"strategy-args: client-parts is {arguments['client_parts']!r}, expected a list as "
                '["clip", {name = "noise", sigma = 0.1}]'
            )
        arguments["client_parts"] = [make_part(one) for one in arguments["client_parts"]]
    return arguments
