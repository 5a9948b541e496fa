"""Reads a fleet from a TOML file."""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flsplit.errors import ConfigError, did_you_mean, located
from flsplit.wireless import units
from flsplit.wireless.fleet import Device, Fleet, Radio, Server

Reader = Callable[[Any], Any]
"""Turns what a file has into what a fleet has, or raises ConfigError."""


def _whole(least: int) -> Reader:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{value!r} is not a whole number of at least {least}")
        return value

    return read


def _of(kind: type, expected: str) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ConfigError(f"{value!r} is not {expected}")
        return value

    return read


_text = _of(str, "a text in quotes")

# By key: the field of the class, and what reads it
_Known = Mapping[str, tuple[str, Reader]]
_SERVER: _Known = {"compute": ("compute_flops", units.SPEED.parse)}
_RADIO: _Known = {
    "subchannels": ("num_subchannels", _whole(1)),
    "subchannel-bandwidth": ("subchannel_hz", units.FREQUENCY.parse),
    "noise": ("noise_w_per_hz", units.POWER_DENSITY.parse),
    "antenna-gain": ("antenna_gain", units.GAIN.parse),
    "downlink": ("downlink_w_per_hz", units.POWER_DENSITY.parse),
    "total-power": ("total_power_w", units.POWER.parse),
    "path-loss": ("path_loss", _text),
    "shadowing": ("shadowing_db", units.SPREAD.parse),
    "fading": ("fading", _of(bool, "true or false")),
}
_QUANTITIES: _Known = {
    "compute": ("compute_flops", units.SPEED.parse),
    "memory": ("memory_bytes", units.SIZE.parse),
    "distance": ("distance_m", units.DISTANCE.parse),
    "power": ("power_w", units.POWER.parse),
    "uplink": ("uplink_bps", units.RATE.parse),
    "downlink": ("downlink_bps", units.RATE.parse),
}
_ON_RADIO = ("distance", "power")
_ON_LINKS = ("uplink", "downlink")


def load_fleet(path: str | Path) -> Fleet:
    """Read a fleet from a TOML file, whose keys ``docs/planning.md`` describes.

    What is given as a range is drawn from the file's seed.

    Raises
    ------
    ConfigError
        If the file can't be read, or holds a key that does not exist (the nearest that does is
        named), a unit that is unknown, or what `Fleet` refuses.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the fleet {path} can't be read: {error}") from error
    with located(str(path)):
        return fleet_from(data)


def find_fleet(fleet: str | Path | Fleet) -> Fleet:
    """Return a fleet, read from its file unless it is one already.

    Raises
    ------
    ConfigError
        If the file can't be read; see `load_fleet`.
    """
    if isinstance(fleet, Fleet):
        return fleet
    if not Path(fleet).is_absolute() and not Path(fleet).exists():
        raise ConfigError(
            f"fleet is {str(fleet)!r}, but {Path.cwd()} has no such file; an app runs from a copy "
            "in another folder: give an absolute path"
        )
    return load_fleet(fleet)


def fleet_from(data: Mapping[str, Any]) -> Fleet:
    """Return the fleet that the tables of a TOML file describe; see `load_fleet`."""
    _check_keys("the fleet", data, ("seed", "server", "radio", "devices"))
    seed = _read("seed", data.get("seed", 0), _whole(0))
    server = Server(**_table("server", data.get("server"), _SERVER, required=("compute",)))
    radio = None
    if "radio" in data:
        needed = ("subchannels", "subchannel-bandwidth")
        radio = Radio(**_table("radio", data["radio"], _RADIO, required=needed))
    groups = data.get("devices")
    if not isinstance(groups, list) or not groups:
        raise ConfigError("the fleet has no [[devices]]")
    rng = np.random.default_rng([seed, len(groups)])
    devices: list[Device] = []
    for group in groups:
        devices += _devices(group, len(devices), radio is not None, rng)
    return Fleet(devices=tuple(devices), server=server, radio=radio, seed=seed)


def _devices(group: Any, first: int, on_radio: bool, rng: np.random.Generator) -> list[Device]:
    where = f"[[devices]] from device {first}"
    if not isinstance(group, Mapping):
        raise ConfigError(f"{where} is {group!r}, not a table")
    needed, useless = (_ON_RADIO, _ON_LINKS) if on_radio else (_ON_LINKS, _ON_RADIO)
    _check_keys(where, group, ("name", "count", *_QUANTITIES), required=("compute", *needed))
    for key in useless:
        if key in group:
            network = "with a [radio]" if on_radio else "without a [radio]"
            raise ConfigError(f"{where} has {key!r}, which means nothing {network}")
    count = _read(f"{where}: count", group.get("count", 1), _whole(1))
    name = _read(f"{where}: name", group.get("name", ""), _text)
    devices = []
    for index in range(count):
        # Without a name, a device's is its number, which is its client's in a simulation
        own = (f"{name}-{index}" if count > 1 else name) if name else str(first + index)
        drawn = {
            field: _draw(f"{where}: {key}", group[key], parse, rng)
            for key, (field, parse) in _QUANTITIES.items()
            if key in group
        }
        devices.append(Device(name=own, **drawn))
    return devices


def _draw(where: str, value: Any, parse: Reader, rng: np.random.Generator) -> float:
    if not isinstance(value, list):
        return float(_read(where, value, parse))
    if len(value) != 2:
        raise ConfigError(f"{where} is {value!r}, expected one value or [least, greatest]")
    low, high = (float(_read(where, bound, parse)) for bound in value)
    if low > high:
        raise ConfigError(f"{where} is {value!r}: the first is greater than the second")
    return float(rng.uniform(low, high))


def _table(name: str, table: Any, known: _Known, required: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"the fleet lacks the table [{name}]")
    _check_keys(f"[{name}]", table, tuple(known), required)
    return {
        known[key][0]: _read(f"[{name}] {key}", value, known[key][1])
        for key, value in table.items()
    }


def _read(where: str, value: Any, reader: Reader) -> Any:
    with located(where):
        return reader(value)


def _check_keys(
    where: str, table: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...] = ()
) -> None:
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{where} has no key {key!r}{hint} (there are {', '.join(known)})")
    for key in required:
        if key not in table:
            raise ConfigError(f"{where} lacks {key!r}")
