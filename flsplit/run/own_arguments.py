"""The arguments that a strategy's constructor takes."""

import inspect
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any

from flsplit.run.options import option_names
from flsplit.wireless.phases import SaysPhases


def argument_names(cls: type[SaysPhases]) -> list[str]:
    """Return the arguments that a strategy's constructor takes, its own ones first."""
    return own_argument_names(cls) + option_names()


def own_argument_names(cls: type[SaysPhases]) -> list[str]:
    """Return the arguments that a strategy takes beside the options of all."""
    return [parameter.name for parameter in own_parameters(cls)]


def own_parameters(cls: type[SaysPhases]) -> list[inspect.Parameter]:
    """Return the parameters that a strategy's constructor has beside the options of all."""
    own: list[inspect.Parameter] = []
    for one in cls.__mro__:
        if "__init__" in vars(one) and issubclass(one, SaysPhases):
            parameters = list(inspect.signature(one.__init__).parameters.values())[1:]
            own += [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return own


def kept_arguments(thing: object, names: Iterable[str]) -> dict[str, Any]:
    """Return what a thing was made with, as far as it keeps it under the argument's name."""
    kept = getattr(thing, "__dict__", {})
    found = {name: kept.get(name, kept.get(f"_{name}", MISSING)) for name in names}
    return {name: value for name, value in found.items() if value is not MISSING}
