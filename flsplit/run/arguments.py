"""Checks of what strategies are made with."""

import math
from collections.abc import Sequence

from flsplit.errors import ConfigError


def number(
    name: str, value: object, minimum: float = -math.inf, maximum: float = math.inf
) -> float:
    """Return ``value`` as a float.

    ConfigError if it isn't a finite number from ``minimum`` to ``maximum``.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and minimum <= value <= maximum:  # type: ignore[arg-type, operator]
        return float(value)  # type: ignore[arg-type]
    bounds = [f"at least {minimum:g}"] * math.isfinite(minimum)
    bounds += [f"at most {maximum:g}"] * math.isfinite(maximum)
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise ConfigError(f"{name} is {value!r}, expected {expected}")


def fraction(name: str, value: object) -> float:
    """Return ``value`` as a float from 0 to 1, else raise ConfigError."""
    return number(name, value, 0.0, 1.0)


def whole(name: str, value: object, minimum: int) -> int:
    """Return ``value``, a whole number of at least ``minimum``, else raise ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    raise ConfigError(f"{name} is {value!r}, expected a whole number of at least {minimum}")


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """Return ``value``, one of the strings in ``known``, else raise ConfigError."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
    return value
