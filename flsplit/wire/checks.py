"""Checks on parsed JSON, each of which names the field that fails."""

import json
import math
from collections.abc import Iterable
from typing import Any

from flsplit.wire.errors import WireError, told

LEAST_INT = -(2**63)
GREATEST_INT = 2**64 - 1
"""Flower's own format holds signed and unsigned 64-bit integers; so does this one."""


def parse_json(field: str, raw: bytes) -> Any:
    """Parse strict JSON in UTF-8: no duplicate keys, no NaN, no runaway nesting."""
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(field, "JSON in UTF-8", told(str(error))) from error


def check_object(field: str, value: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Return `value` if it is an object with exactly these keys."""
    if type(value) is not dict:
        raise WireError(field, "an object", value)
    wanted = set(keys)
    if value.keys() != wanted:
        found = told(f"keys {sorted(value)}")
        raise WireError(field, f"an object with exactly the keys {sorted(wanted)}", found)
    return value


def check_list(field: str, value: Any, length: int | None = None) -> list[Any]:
    """Return `value` if it is a list, of `length` items where that is given."""
    if type(value) is not list:
        raise WireError(field, "a list", value)
    if length is not None and len(value) != length:
        raise WireError(field, f"a list of {length}", value)
    return value


def check_str(field: str, value: Any) -> str:
    """Return `value` if it is a string."""
    if type(value) is not str:
        raise WireError(field, "a string", value)
    return value


def check_bool(field: str, value: Any) -> bool:
    """Return `value` if it is true or false."""
    if type(value) is not bool:
        raise WireError(field, "true or false", value)
    return value


def check_int(field: str, value: Any, least: int = LEAST_INT, greatest: int = GREATEST_INT) -> int:
    """Return `value` if it is an integer in this range; a boolean is none."""
    if type(value) is not int:
        raise WireError(field, "an integer", value)
    if not least <= value <= greatest:
        raise WireError(field, f"an integer from {least} to {greatest}", value)
    return value


def check_count(field: str, value: Any) -> int:
    """Return `value` if it can be a length or a size."""
    return check_int(field, value, least=0, greatest=2**63 - 1)


def check_number(field: str, value: Any) -> float:
    """Return `value` as a float if it is a finite number."""
    if type(value) is not float and type(value) is not int:
        raise WireError(field, "a number", value)
    try:
        number = float(value)
    except OverflowError as error:
        raise WireError(field, "a number in the range of a double", value) from error
    if not math.isfinite(number):
        raise WireError(field, "a finite number", value)
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise WireError("object", "each key once", key)
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise WireError("number", "a finite JSON number", told(name))


# Made once: json.loads() with these arguments would make one for every header.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
