"""How a partition is written, and what pages call it."""

import json
import math
from typing import Any

from flsplit.errors import ConfigError

OWN = "own"  # the data come dealt out


def title_of(partition: str) -> str:
    """Return how pages call a partition."""
    name, arguments = parsed(partition)
    if name == "dirichlet" and list(arguments) == ["alpha"]:
        return f"Dirichlet({arguments['alpha']:g})"
    if name in ("iid", OWN) and not arguments:
        return {"iid": "IID", OWN: "as the app deals them"}[name]
    return f"{name}({', '.join(f'{k}={v}' for k, v in arguments.items())})"


def of_alpha(alpha: float) -> str:
    """Return the partition that an alpha stands for; infinity is IID."""
    return "iid" if math.isinf(alpha) else f"dirichlet:alpha={alpha:g}"


def parsed(partition: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of ``name:key=value,…``; values are JSON, or else text."""
    name, _, text = partition.partition(":")
    arguments = {}
    for one in filter(None, text.split(",")):
        key, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"--partition is {partition!r}, expected name:key=value,key=value")
        try:
            arguments[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key.strip()] = value
    return name, arguments
