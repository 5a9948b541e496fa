"""The JSON header of a message: envelope, metadata, and the records or the error.

Every value of a metric or config record travels as a type name and a payload. Floats are written as
the sixteen hexadecimal digits of their big-endian IEEE 754 form, which keeps NaN, its payload bits
and the sign of zero; byte strings travel as segments after the header, which holds their sizes.
"""

import json
import struct
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from msgspec import UNSET, Meta, Struct, UnsetType, defstruct
from msgspec.structs import asdict

from flsplit.wire.strict import Count, check_int, check_ints, check_once, fitted, parse_json
from flsplit.wire.wire_errors import Told, WireError

Record = ArrayRecord | MetricRecord | ConfigRecord

MAX_DIMENSIONS = 64
"""As many as NumPy and torch can handle; a longer shape is refused."""


class Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """The address of one message within a session."""

    client: str  # which client of the host's cohort the message is for, or comes from
    # The number that a reply shares with the message it answers
    sequence: Annotated[int, Meta(ge=0)]
    # Raised when a host or client starts over, so that what is left over from before can be told
    # from what is new
    epoch: Annotated[int, Meta(ge=0)]
    kind: str = "message"  # what sort of message this is; free for the layers above


_Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]


class _MetadataFields(Struct, forbid_unknown_fields=True):
    run_id: int
    src_node_id: int
    dst_node_id: int
    src_task_id: int | None
    dst_task_id: int | None
    message_id: str
    reply_to_message_id: str
    group_id: str
    message_type: str
    created_at: _Finite
    ttl: _Finite


class _ErrorFields(Struct, forbid_unknown_fields=True):
    code: int
    reason: str | None


class _RecordEntry(Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    kind: str
    entries: list[Any]


class _ArrayEntry(Struct, array_like=True, forbid_unknown_fields=True):
    key: str
    dtype: str
    shape: Annotated[list[Count], Meta(max_length=MAX_DIMENSIONS)]
    stype: str
    size: Count


class _ValueEntry(Struct, array_like=True, forbid_unknown_fields=True):
    key: str
    type: str
    value: Any


class _Arrays(Struct):
    entries: list[_ArrayEntry]


class _Values(Struct):
    entries: list[_ValueEntry]


class _Fields(Struct, forbid_unknown_fields=True):
    envelope: Envelope
    metadata: _MetadataFields
    records: list[_RecordEntry] | UnsetType = UNSET
    error: _ErrorFields | UnsetType = UNSET


_METRICS = {
    "int": int,
    "float": Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")],
    "int[]": Annotated[list[int], Meta(min_length=1)],
    "float[]": Annotated[str, Meta(pattern=r"^([0-9a-f]{16})+\Z")],
    "empty": Annotated[list[int], Meta(max_length=0)],
}
_CONFIG = _METRICS | {
    "bool": bool,
    "str": str,
    "bytes": Count,
    "bool[]": Annotated[list[bool], Meta(min_length=1)],
    "str[]": Annotated[list[str], Meta(min_length=1)],
    "bytes[]": Annotated[list[Count], Meta(min_length=1)],
}
# msgspec remembers how to check a Struct, but no other type: hence a Struct around each.
_VALUES = {
    kind: defstruct("Value", [("value", value)], array_like=True) for kind, value in _CONFIG.items()
}
_ENTRIES = {
    "arrays": (_Arrays, _ArrayEntry.__struct_fields__),
    "metrics": (_Values, _ValueEntry.__struct_fields__),
    "config": (_Values, _ValueEntry.__struct_fields__),
}
_PYTHON_TYPES = {bool: "bool", int: "int", float: "float", str: "str", bytes: "bytes"}
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class CheckedHeader:
    """A checked header: all of a message except the raw bytes, whose sizes it knows."""

    envelope: Envelope
    metadata: Metadata
    records: list[_RecordEntry]
    error: Error | None
    sizes: list[int]

    def build(self, segments: Iterator[bytes]) -> Message:
        """Return the message, with its raw bytes taken from `segments`."""
        if self.error is not None:
            return make_message(self.metadata, error=self.error)
        content = RecordDict({one.name: _build(one, segments) for one in self.records})
        return make_message(self.metadata, content=content)


def write_header(envelope: Envelope, message: Message) -> tuple[bytes, list[bytes]]:
    """Return the header of `message` and the segments that follow it.

    WireError if the message holds something that the format cannot carry.
    """
    segments: list[bytes] = []
    metadata = message.metadata
    header: dict[str, Any] = {
        "envelope": asdict(envelope),
        "metadata": {name: getattr(metadata, name) for name in _MetadataFields.__struct_fields__},
    }
    if message.has_error():
        # Flower's error codes are members of an enumeration of integers in places.
        header["error"] = {"code": int(message.error.code), "reason": message.error.reason}
    elif not message.has_content():
        raise WireError("message", "content or an error", Told("neither"))
    # What the other side would refuse is refused here, where the mistake was made.
    _check_fields(header)
    if message.has_content():
        header["records"] = [
            _write_record(name, record, segments) for name, record in message.content.items()
        ]
    return _ENCODER.encode(header).encode(), segments


def read_header(raw: bytes) -> CheckedHeader:
    """Return the checked header; WireError if anything in it does not fit."""
    fields = _check_fields(parse_json("header", raw))
    if (fields.records is UNSET) is (fields.error is UNSET):
        found = "neither" if fields.error is UNSET else "both"
        raise WireError("header", "either records or error", Told(found))
    try:
        metadata = Metadata(**asdict(fields.metadata))
    except ValueError as error:
        kind = fields.metadata.message_type
        raise WireError("metadata.message_type", "a message type of Flower's", kind) from error
    records, sizes = fields.records or [], list[int]()
    _check_records(records, sizes)
    failure = Error(fields.error.code, fields.error.reason) if fields.error else None
    return CheckedHeader(fields.envelope, metadata, records, failure, sizes)


def make_message(
    metadata: Metadata, content: RecordDict | None = None, error: Error | None = None
) -> Message:
    """Return a Flower message with exactly this metadata.

    Flower documents two ways to make a message, and both fill in the metadata from a process-wide
    task identity that only its own runtime sets. A message that was received has metadata already,
    so it goes through the `metadata` argument, as in Flower's own deserialisation.
    """
    return Message(content=content, error=error, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def _check_fields(header: Any) -> _Fields:
    fields: _Fields = fitted("", header, _Fields, _RecordEntry.__struct_fields__)
    check_ints("envelope", fields.envelope)
    check_ints("metadata", fields.metadata)
    if fields.error:
        check_ints("error", fields.error)
    return fields


def _check_records(records: list[_RecordEntry], sizes: list[int]) -> None:
    """Check the entries, put them into their types, and add the segments' sizes to `sizes`."""
    check_once("records", "name", [record.name for record in records])
    for index, record in enumerate(records):
        at = f"records[{index}]"
        if record.kind not in _ENTRIES:
            raise WireError(f"{at}.kind", f"one of {sorted(_ENTRIES)}", record.kind)
        record_type, fields = _ENTRIES[record.kind]
        record.entries = fitted(at, {"entries": record.entries}, record_type, fields).entries
        check_once(f"{at}.entries", "key", [entry.key for entry in record.entries])
        for place, entry in enumerate(record.entries):
            if record.kind == "arrays":
                sizes.append(entry.size)
            else:
                types = _METRICS.keys() if record.kind == "metrics" else _CONFIG.keys()
                _check_value(f"{at}.entries[{place}]", entry, types, sizes)


def _check_value(at: str, entry: _ValueEntry, types: Collection[str], sizes: list[int]) -> None:
    if entry.type not in types:
        raise WireError(f"{at}.type", f"one of {sorted(types)}", entry.type)
    value = fitted(f"{at}.value", [entry.value], _VALUES[entry.type]).value
    items = value if isinstance(value, list) else [value]
    if entry.type in ("bytes", "bytes[]"):
        sizes += items
    elif entry.type in ("int", "int[]"):
        for item in items:
            check_int(f"{at}.value", item)


def _build(record: _RecordEntry, segments: Iterator[bytes]) -> Record:
    if record.kind == "arrays":
        arrays = ArrayRecord()
        for one in record.entries:
            arrays[one.key] = Array(one.dtype, tuple(one.shape), one.stype, next(segments))
        return arrays
    values = {one.key: _build_value(one, segments) for one in record.entries}
    return MetricRecord(values) if record.kind == "metrics" else ConfigRecord(values)


def _build_value(entry: _ValueEntry, segments: Iterator[bytes]) -> Any:
    match entry.type:
        case "float":
            return struct.unpack(">d", bytes.fromhex(entry.value))[0]
        case "float[]":
            return [one for (one,) in struct.iter_unpack(">d", bytes.fromhex(entry.value))]
        case "bytes":
            return next(segments)
        case "bytes[]":
            return [next(segments) for _ in entry.value]
    return entry.value


def _write_record(name: str, record: Record, segments: list[bytes]) -> list[Any]:
    if not isinstance(record, ArrayRecord):
        kind = "metrics" if isinstance(record, MetricRecord) else "config"
        values = record.items()
        return [name, kind, [[k, *_write_value(f"{name}.{k}", v, segments)] for k, v in values]]
    entries = []
    for key, array in record.items():
        # An Array's attributes can be set to anything after it was made, so they are checked here:
        # bytes in particular, because anything mutable could change while it waits to be sent.
        if not isinstance(array.data, bytes):
            raise WireError(f"{name}.{key}.data", "bytes", Told(type(array.data).__name__))
        segments.append(array.data)
        entries.append([key, array.dtype, list(array.shape), array.stype, len(array.data)])
    fitted(name, {"entries": entries}, *_ENTRIES["arrays"])
    return [name, "arrays", entries]


def _write_value(field: str, value: Any, segments: list[bytes]) -> tuple[str, Any]:
    items = value if isinstance(value, list) else [value]
    if not items:
        return "empty", []
    kind = _kind(field, items[0])
    for item in items:
        # Flower lets booleans into a list of integers and sends them as integers. So do we.
        if _kind(field, item) != kind and not (kind == "int" and isinstance(item, int)):
            raise WireError(field, f"a list of {kind} only", item)
    is_list = isinstance(value, list)
    if kind == "float":
        return f"float{'[]' * is_list}", struct.pack(f">{len(items)}d", *items).hex()
    payload = items
    if kind == "bytes":
        segments += items
        payload = [len(item) for item in items]
    elif kind != "bool":
        # Subclasses, such as those of an enumeration, become what they are made of.
        payload = [int(item) if kind == "int" else str(item) for item in items]
    if kind == "int":
        for item in payload:
            check_int(field, item)
    return (f"{kind}[]", payload) if is_list else (kind, payload[0])


def _kind(field: str, value: Any) -> str:
    # A boolean is an integer to Python, so it is asked for first.
    for cls, kind in _PYTHON_TYPES.items():
        if isinstance(value, cls):
            return kind
    raise WireError(field, "bool, int, float, str, bytes or a list of one of them", value)
