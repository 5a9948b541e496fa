"""Quantities as people write them, ``"10 MHz"`` or ``"23 dBm"``, as numbers in SI units."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from flsplit.errors import ConfigError

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S.*?)?\s*")


def from_decibels(decibels: float) -> float:
    """Return the ratio (no unit) of ``decibels`` (dB): ``10^(dB / 10)``."""
    return float(10.0 ** (decibels / 10.0))


def to_decibels(ratio: float) -> float:
    """Return the decibels (dB) of a ``ratio`` (no unit): ``10 log10(ratio)``."""
    return 10.0 * math.log10(ratio)


def watts_from_dbm(dbm: float) -> float:
    """Return the power (W) of ``dbm`` (dBm, decibels over a milliwatt)."""
    return from_decibels(dbm) / 1e3


def _times(factor: float) -> Callable[[float], float]:
    return lambda number: number * factor


def _prefixed(unit: str, prefixes: str) -> dict[str, Callable[[float], float]]:
    factors = {"-": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    return {p.strip("-") + unit: _times(factors[p]) for p in prefixes}


@dataclass(frozen=True)
class Quantity:
    """A kind of quantity, such as power.

    Attributes
    ----------
    name : str
        What it is called in error messages.
    units : mapping of str to callable
        By the unit as it is written, what turns a number of it into SI units.
    """

    name: str
    units: Mapping[str, Callable[[float], float]]

    def parse(self, text: object) -> float:
        """Return ``text``, a number and a unit, in SI units.

        Raises
        ------
        ConfigError
            If it is no text, has no number, or its unit is missing or unknown.
        """
        example = f"for instance '5 {next(iter(self.units))}'"
        if not isinstance(text, str):
            raise ConfigError(f"{text!r} has no unit, expected a {self.name} {example}")
        match = _QUANTITY.fullmatch(text)
        if match is None:
            raise ConfigError(f"{text!r} is not a {self.name}, expected {example}")
        number, unit = float(match[1]), match[2] or ""
        if unit not in self.units:
            raise ConfigError(self._unknown(text, unit))
        try:
            found = self.units[unit](number)
        except OverflowError:
            found = math.inf
        if math.isinf(found):
            raise ConfigError(f"{text!r} is too large for a {self.name}")
        return found

    def _unknown(self, text: str, unit: str) -> str:
        near = get_close_matches(unit, self.units, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(self.units)
        what = f"the unit {unit!r} of {text!r} is unknown" if unit else f"{text!r} has no unit"
        return f"{what}{hint} (a {self.name} is in {known})"


FREQUENCY = Quantity("frequency", _prefixed("Hz", "MkG-"))
"""In Hz."""

POWER = Quantity("power", {**_prefixed("W", "-mk"), "dBm": watts_from_dbm})
"""In W."""

POWER_DENSITY = Quantity("power density", {"dBm/Hz": watts_from_dbm, **_prefixed("W/Hz", "-m")})
"""In W/Hz."""

GAIN = Quantity("gain", {"dB": from_decibels, "dBi": from_decibels})
"""As a ratio, without unit."""

SPREAD = Quantity("standard deviation in decibels", {"dB": _times(1.0)})
"""In dB."""

DISTANCE = Quantity("distance", {"m": _times(1.0), "km": _times(1e3)})
"""In m."""

SPEED = Quantity("computing speed", _prefixed("FLOP/s", "GMTk-"))
"""In FLOP/s."""

RATE = Quantity(
    "data rate",
    {
        **{f"{p}B/s": _times(8 * f) for p, f in (("M", 1e6), ("k", 1e3), ("G", 1e9), ("", 1.0))},
        **_prefixed("bit/s", "Mk-G"),
    },
)
"""In bit/s."""

SIZE = Quantity(
    "size",
    {
        **_prefixed("B", "MGk-"),
        **{f"{p}iB": _times(1024.0**i) for i, p in enumerate("KMG", start=1)},
    },
)
"""In bytes."""
