"""Quantities as people write them, ``"10 MHz"`` or ``"23 dBm"``, as numbers in SI units."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flsplit.errors import ConfigError, did_you_mean

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S.*?)?\s*")


def from_decibels(decibels: float) -> float:
    """Return the ratio (no unit) of ``decibels`` (dB): ``10^(dB / 10)``."""
    return float(10.0 ** (decibels / 10.0))


def watts_from_dbm(dbm: float) -> float:
    """Return the power (W) of ``dbm`` (dBm, decibels over a milliwatt)."""
    return from_decibels(dbm) / 1e3


Unit = float | Callable[[float], float]
"""What turns a number of a unit into SI units: a factor, or a function."""


def with_unit(value: float, unit: str, digits: str = ".4g") -> str:
    """Return a value of a unit (``B``, ``bit/s``) as people read it: ``2000``, ``B``: 2 kB."""
    factors = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
    prefix = next((p for p in ("G", "M", "k") if value >= factors[p]), "")
    return f"{value / factors[prefix]:{digits}} {prefix}{unit}"


def _prefixed(unit: str, prefixes: str) -> dict[str, Unit]:
    factors = {"-": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    return {p.strip("-") + unit: factors[p] for p in prefixes}


@dataclass(frozen=True)
class Quantity:
    """A kind of quantity, such as power, and its units as they are written."""

    name: str  # as error messages say it
    units: Mapping[str, Unit]

    def parse(self, text: object) -> float:
        """Return ``text``, a number and a unit, in SI units.

        ConfigError if it is no text, has no number, or its unit is missing or unknown.
        """
        example = f"for instance '5 {next(iter(self.units))}'"
        if not isinstance(text, str):
            raise ConfigError(f"{text!r} has no unit, expected a {self.name} {example}")
        match = _QUANTITY.fullmatch(text)
        if match is None:
            raise ConfigError(f"{text!r} is not a {self.name}, expected {example}")
        number, unit = float(match[1]), match[2] or ""
        if unit not in self.units:
            hint = did_you_mean(unit, self.units)
            what = f"the unit {unit!r} of {text!r} is unknown" if unit else f"{text!r} has no unit"
            raise ConfigError(f"{what}{hint} (a {self.name} is in {', '.join(self.units)})")
        convert = self.units[unit]
        try:
            found = convert(number) if callable(convert) else convert * number
        except OverflowError:  # of decibels
            found = math.inf
        if math.isinf(found):
            raise ConfigError(f"{text!r} is too large for a {self.name}")
        return found


# In Hz, W, W/Hz, as a ratio, in dB, m, FLOP/s, bit/s and bytes
FREQUENCY = Quantity("frequency", _prefixed("Hz", "MkG-"))
POWER = Quantity("power", {**_prefixed("W", "-mk"), "dBm": watts_from_dbm})
POWER_DENSITY = Quantity("power density", {"dBm/Hz": watts_from_dbm, **_prefixed("W/Hz", "-m")})
GAIN = Quantity("gain", {"dB": from_decibels, "dBi": from_decibels})
SPREAD = Quantity("standard deviation in decibels", {"dB": 1.0})
DISTANCE = Quantity("distance", {"m": 1.0, "km": 1e3})
SPEED = Quantity("computing speed", _prefixed("FLOP/s", "GMTk-"))
_BYTES_PER_SECOND: dict[str, Unit] = {"MB/s": 8e6, "kB/s": 8e3, "GB/s": 8e9, "B/s": 8.0}
RATE = Quantity("data rate", {**_BYTES_PER_SECOND, **_prefixed("bit/s", "Mk-G")})
_KIBI: dict[str, Unit] = {"KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3}
SIZE = Quantity("size", {**_prefixed("B", "MGk-"), **_KIBI})
