"""The values of metric and config records, in a form that JSON can hold without loss.

Every value travels as a type name and a payload. Floats are written as the sixteen hexadecimal
digits of their big-endian IEEE 754 form, which keeps NaN, its payload bits and the sign of zero;
byte strings travel as segments after the header, which holds their sizes only.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flsplit.wire.checks import check_bool, check_count, check_int, check_list, check_str
from flsplit.wire.errors import WireError, told

METRIC_TYPES = frozenset({"int", "float", "int[]", "float[]", "empty"})
CONFIG_TYPES = METRIC_TYPES | {"bool", "str", "bytes", "bool[]", "str[]", "bytes[]"}

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "bool": check_bool,
    "int": check_int,
    "str": check_str,
}
_FLOAT_DIGITS = 16
_LOWER_HEX = re.compile("[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Awaited:
    """Stands for byte strings whose segments have not arrived yet."""

    count: int | None
    """How many belong in the list, or None where the value is one byte string."""


def write_value(field: str, value: Any, segments: list[bytes]) -> tuple[str, Any]:
    """Return type name and payload of `value`; byte strings are added to `segments`."""
    if isinstance(value, list):
        return _write_list(field, value, segments)
    kind = _kind(field, value)
    if kind == "float":
        return kind, struct.pack(">d", value).hex()
    if kind == "bytes":
        segments.append(value)
        return kind, len(value)
    return kind, _plain(field, kind, value)


def read_value(field: str, kind: str, payload: Any, sizes: list[int]) -> Any:
    """Return the value, or `Awaited`, with the sizes of its segments added to `sizes`."""
    if kind == "empty":
        check_list(field, payload, length=0)
        return []
    if kind == "float":
        return _read_floats(field, payload, count=1)[0]
    if kind == "float[]":
        return _read_floats(field, payload, count=None)
    if kind == "bytes":
        sizes.append(check_count(field, payload))
        return Awaited(count=None)
    if kind == "bytes[]":
        counts = [check_count(field, size) for size in _filled(field, payload)]
        sizes.extend(counts)
        return Awaited(count=len(counts))
    check = _CHECKS[kind.removesuffix("[]")]
    if kind.endswith("[]"):
        return [check(field, item) for item in _filled(field, payload)]
    return check(field, payload)


def fill(value: Any, segments: Iterator[bytes]) -> Any:
    """Return `value` with its byte strings taken from `segments`."""
    if not isinstance(value, Awaited):
        return value
    if value.count is None:
        return next(segments)
    return [next(segments) for _ in range(value.count)]


def _write_list(field: str, items: list[Any], segments: list[bytes]) -> tuple[str, Any]:
    if not items:
        return "empty", []
    kind = _kind(field, items[0])
    for item in items:
        # Flower lets booleans into a list of integers and sends them as integers. So do we.
        if _kind(field, item) != kind and not (kind == "int" and isinstance(item, int)):
            raise WireError(field, f"a list of {kind} only", item)
    if kind == "float":
        return "float[]", struct.pack(f">{len(items)}d", *items).hex()
    if kind == "bytes":
        segments.extend(items)
        return "bytes[]", [len(item) for item in items]
    return f"{kind}[]", [_plain(field, kind, item) for item in items]


def _plain(field: str, kind: str, value: Any) -> Any:
    # Subclasses, such as those of an enumeration, become what they are made of.
    if kind == "int":
        return check_int(field, int(value))
    return str(value) if kind == "str" else value


def _kind(field: str, value: Any) -> str:
    # A boolean is an integer to Python, so it is asked for first.
    for kind, cls in (("bool", bool), ("int", int), ("float", float), ("str", str)):
        if isinstance(value, cls):
            return kind
    if isinstance(value, bytes):
        return "bytes"
    raise WireError(field, "bool, int, float, str, bytes or a list of one of them", value)


def _filled(field: str, payload: Any) -> list[Any]:
    items = check_list(field, payload)
    if not items:
        raise WireError(field, "at least one item (an empty list has the type empty)", items)
    return items


def _read_floats(field: str, payload: Any, count: int | None) -> list[float]:
    text = check_str(field, payload)
    given, rest = divmod(len(text), _FLOAT_DIGITS)
    if rest or not given or given != (count or given):
        expected = f"{_FLOAT_DIGITS} hexadecimal digits" + ("" if count else " per float")
        raise WireError(field, expected, told(f"{len(text)} characters"))
    # bytes.fromhex() alone would also take white space between the digits.
    if not _LOWER_HEX.fullmatch(text):
        raise WireError(field, "lower-case hexadecimal digits", text)
    return list(struct.unpack(f">{given}d", bytes.fromhex(text)))
