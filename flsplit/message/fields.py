"""Reading a message's fields with errors that say what was expected and what came."""

from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flsplit.errors import ProtocolError

T = TypeVar("T", ArrayRecord, ConfigRecord, MetricRecord)
Value = TypeVar("Value", bool, int, float, str)


def record(content: RecordDict, key: str, kind: type[T]) -> T:
    """Return the record ``key``, which must be there and of ``kind``."""
    if key not in content:
        raise ProtocolError(f"record {key!r} is missing; the message holds {sorted(content)}")
    found = content[key]
    if not isinstance(found, kind):
        raise ProtocolError(
            f"record {key!r} is a {type(found).__name__}, expected a {kind.__name__}"
        )
    return found


def value(
    fields: ConfigRecord | MetricRecord,
    key: str,
    kind: type[Value],
    *,
    minimum: float | None = None,
) -> Value:
    """Return the field ``key`` of ``kind`` (an int passes for a float), at least ``minimum``."""
    if key not in fields:
        raise ProtocolError(f"field {key!r} is missing; there are {sorted(fields)}")
    found = fields[key]
    if kind is float and type(found) is int:
        found = float(found)
    if type(found) is not kind:
        raise ProtocolError(
            f"field {key!r} is {found!r} ({type(found).__name__}), expected a {kind.__name__}"
        )
    if minimum is not None and not found >= minimum:  # type: ignore[operator]
        raise ProtocolError(f"field {key!r} is {found!r}, expected at least {minimum}")
    return found


def sizes(fields: ConfigRecord | MetricRecord, key: str, *, least: int = 1) -> tuple[int, ...]:
    """Return the field ``key``, a list of at least ``least`` numbers of 1 or more."""
    found = fields.get(key)
    if not (isinstance(found, list) and len(found) >= least):
        raise ProtocolError(f"field {key!r} is {found!r}, expected a list of sizes")
    if not all(type(size) is int and size > 0 for size in found):
        raise ProtocolError(f"field {key!r} is {found!r}, expected sizes of 1 or more")
    return tuple(int(size) for size in found)


def only_array(content: RecordDict, key: str) -> Array:
    """Return the one array of the record ``key``."""
    arrays = record(content, key, ArrayRecord)
    if len(arrays) != 1:
        raise ProtocolError(f"record {key!r} holds {len(arrays)} arrays, expected one")
    return next(iter(arrays.values()))
