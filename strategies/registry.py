"""Strategies, rules and server passes by name: flsplit's own and anybody else's."""

import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from flsplit.client_parts import make_part
from flsplit.errors import ConfigError
from flsplit.server.passes import ServerPass
from flsplit.server.rules import GradientRule
from flsplit.strategies.base import SplitStrategy, argument_names
from flsplit.strategies.options import refuse_unknown
from flsplit.wireless.phases import Method, Training
from flsplit.wireless.profile import ModelProfile
from flsplit.wireless.unsplit import FEDAVG

GROUP = "flsplit.strategies"
RULES = "flsplit.rules"
PASSES = "flsplit.server_passes"

_KINDS = {GROUP: "strategy", RULES: "rule", PASSES: "server pass"}


def strategy_names() -> list[str]:
    """Return the names of all installed strategies."""
    return sorted(entry_points(group=GROUP).names)


def rule_names() -> list[str]:
    """Return the names of all installed gradient rules."""
    return sorted(entry_points(group=RULES).names)


def make_strategy(name: str, strategy_args: str = "{}", **options: Any) -> SplitStrategy:
    """Return the strategy called ``name``.

    Parameters
    ----------
    name : str
        An entry point of the group ``flsplit.strategies``, e.g. ``splitfed-v1``.
    strategy_args : str
        Arguments as a TOML inline table, e.g. ``'{phi = 0.5, client-lr = 0.01}'``; a hyphen
        stands for an underscore. They go before ``options``. ``rules`` is a list of rules and
        ``server-pass`` a server pass, each a name or a table with the name and arguments:
        ``client-parts`` is a list of client parts likewise:
        ``'{rules = ["split-lr", {name = "cut-gradient-averaging", phi = 0.5}]}'``,
        ``'{server-pass = {name = "replay", phi = 0.5}}'``.
    **options
        Further arguments of the strategy.

    Raises
    ------
    ConfigError
        If there is no such strategy, rule or server pass, it has no such argument (the nearest
        that exists is named), or ``strategy_args`` is not an inline table.
    """
    cls = _find(GROUP, name).load()
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

    Parameters
    ----------
    name : str
        As `make_strategy` takes it; or ``fedavg``, for devices that train the whole model.
    strategy_args : str
        As `make_strategy` takes them. A batch size and a number of steps in them go before
        ``training``, as in a run they go before an app's own.
    model : nn.Module
        The model.
    profile : ModelProfile
        Its profile.
    training : Training
        Batch size and steps.

    Raises
    ------
    ConfigError
        If there is no such strategy, or it refuses its arguments.
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


def make_rule(described: object) -> GradientRule:
    """Return a gradient rule from its name, or a table with ``name`` and arguments.

    Raises
    ------
    ConfigError
        If there is no such rule, or it can't be made with these arguments.
    """
    rule = _make(RULES, described)
    if not isinstance(rule, GradientRule):
        raise ConfigError(f"rule {described!r} is {rule!r}, expected a GradientRule")
    return rule


def make_server_pass(described: object) -> ServerPass:
    """Return a server pass from its name, or a table with ``name`` and arguments.

    Raises
    ------
    ConfigError
        If there is no such server pass, or it can't be made with these arguments.
    """
    made = _make(PASSES, described)
    if not isinstance(made, ServerPass):
        raise ConfigError(f"server pass {described!r} is {made!r}, expected a ServerPass")
    return made


def _make(group: str, described: object) -> object:
    kind = _KINDS[group]
    table = {"name": described} if isinstance(described, str) else described
    if not (isinstance(table, Mapping) and isinstance(table.get("name"), str)):
        raise ConfigError(
            f'{kind} is {described!r}, expected a name or a table as {{name = "…", phi = 0.5}}'
        )
    name = table["name"]
    arguments = {_python(key): value for key, value in table.items() if key != "name"}
    make = _find(group, name).load()
    refuse_unknown(f"{kind} {name!r}", arguments, list(inspect.signature(make).parameters))
    try:
        return make(**arguments)
    except TypeError as error:  # an argument without a default is missing
        raise ConfigError(f"{kind} {name!r}: {error}") from error


def _find(group: str, name: str) -> EntryPoint:
    found = entry_points(group=group, name=name)
    if not found:
        kind, known = _KINDS[group], sorted(entry_points(group=group).names)
        near = get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no {kind} {name!r}{hint} (there are {', '.join(known)})")
    return next(iter(found))


def arguments_table(strategy_args: str) -> dict[str, Any]:
    """Return the table that ``strategy_args`` is, as it is written.

    Raises
    ------
    ConfigError
        If it is no TOML inline table.
    """
    try:
        loaded = tomllib.loads(f"args = {strategy_args or '{}'}")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"strategy-args is {strategy_args!r}, not TOML: {error}") from error
    table = loaded["args"]
    if not isinstance(table, dict) or len(loaded) > 1:
        raise ConfigError(
            f"strategy-args is {strategy_args!r}, expected a table as '{{phi = 0.5}}'"
        )
    return table


def _parse(strategy_args: str) -> dict[str, Any]:
    table = arguments_table(strategy_args)
    arguments = {_python(key): value for key, value in table.items()}
    if "rules" in arguments:
        if not isinstance(arguments["rules"], list):
            raise ConfigError(
                f"strategy-args: rules is {arguments['rules']!r}, expected a list as "
                '[{name = "cut-gradient-averaging", phi = 0.5}]'
            )
        arguments["rules"] = [make_rule(one) for one in arguments["rules"]]
    if "client_parts" in arguments:
        if not isinstance(arguments["client_parts"], list):
            raise ConfigError(
                f"strategy-args: client-parts is {arguments['client_parts']!r}, expected a list as "
                '["clip", {name = "noise", sigma = 0.1}]'
            )
        arguments["client_parts"] = [make_part(one) for one in arguments["client_parts"]]
    if "server_pass" in arguments:
        arguments["server_pass"] = make_server_pass(arguments["server_pass"])
    return arguments


def _python(key: str) -> str:
    return key.replace("-", "_")
