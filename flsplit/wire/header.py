"""The JSON header of a message: envelope, metadata, and the records or the error."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict

from flsplit.wire.checks import check_int, check_number, check_object, check_str, parse_json
from flsplit.wire.envelope import Envelope
from flsplit.wire.errors import WireError, told
from flsplit.wire.records import build_records, read_records, write_records

_ENVELOPE = ("client", "sequence", "epoch", "kind")
_INTS = ("run_id", "src_node_id", "dst_node_id")
_TASKS = ("src_task_id", "dst_task_id")
_STRINGS = ("message_id", "reply_to_message_id", "group_id", "message_type")
_NUMBERS = ("created_at", "ttl")
_METADATA = _INTS + _TASKS + _STRINGS + _NUMBERS
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked header: all of a message except the raw bytes, whose sizes it knows."""

    envelope: Envelope
    metadata: Metadata
    records: list[Any] | None
    error: Error | None
    sizes: list[int]

    def build(self, segments: Iterator[bytes]) -> Message:
        """Return the message, with its raw bytes taken from `segments`."""
        if self.error is not None:
            return make_message(self.metadata, error=self.error)
        return make_message(self.metadata, content=build_records(self.records or [], segments))


def write_header(envelope: Envelope, message: Message) -> tuple[bytes, list[bytes]]:
    """Return the header of `message` and the segments that follow it.

    Raises
    ------
    WireError
        If the message holds something that the format cannot carry.
    """
    segments: list[bytes] = []
    header: dict[str, Any] = {
        "envelope": {name: getattr(envelope, name) for name in _ENVELOPE},
        "metadata": {name: getattr(message.metadata, name) for name in _METADATA},
    }
    # What the other side would refuse is refused here, where the mistake was made.
    _read_envelope(header["envelope"])
    _check_metadata(header["metadata"])
    if message.has_error():
        header["error"] = _write_error(message.error)
    elif message.has_content():
        header["records"] = write_records(message.content, segments)
    else:
        raise WireError("message", "content or an error", told("neither"))
    return _ENCODER.encode(header).encode(), segments


def read_header(raw: bytes) -> Plan:
    """Return the checked header.

    Raises
    ------
    WireError
        If anything in it does not fit.
    """
    header = parse_json("header", raw)
    if not isinstance(header, dict):
        raise WireError("header", "an object", header)
    outcome = "error" if "error" in header else "records"
    check_object("header", header, ("envelope", "metadata", outcome))
    sizes: list[int] = []
    records = error = None
    if outcome == "error":
        error = _read_error(header["error"])
    else:
        records = read_records("records", header["records"], sizes)
    envelope = _read_envelope(header["envelope"])
    return Plan(envelope, _read_metadata(header["metadata"]), records, error, sizes)


def make_message(
    metadata: Metadata, content: RecordDict | None = None, error: Error | None = None
) -> Message:
    """Return a Flower message with exactly this metadata.

    Flower documents two ways to make a message, and both fill in the metadata from a process-wide
    task identity that only its own runtime sets. A message that was received has metadata already,
    so it goes through the `metadata` argument, as in Flower's own deserialisation.
    """
    return Message(content=content, error=error, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def _read_envelope(value: Any) -> Envelope:
    fields = check_object("envelope", value, _ENVELOPE)
    check_str("envelope.client", fields["client"])
    check_str("envelope.kind", fields["kind"])
    check_int("envelope.sequence", fields["sequence"], least=0)
    check_int("envelope.epoch", fields["epoch"], least=0)
    return Envelope(**fields)


def _read_metadata(value: Any) -> Metadata:
    fields = _check_metadata(value)
    try:
        return Metadata(**fields)
    except ValueError as error:
        raise WireError(
            "metadata.message_type", "a message type of Flower's", fields["message_type"]
        ) from error


def _check_metadata(value: Any) -> dict[str, Any]:
    fields = check_object("metadata", value, _METADATA)
    for name in _INTS:
        check_int(f"metadata.{name}", fields[name])
    for name in _TASKS:
        if fields[name] is not None:
            check_int(f"metadata.{name}", fields[name])
    for name in _STRINGS:
        check_str(f"metadata.{name}", fields[name])
    for name in _NUMBERS:
        fields[name] = check_number(f"metadata.{name}", fields[name])
    return fields


def _write_error(error: Error) -> dict[str, Any]:
    # Flower's error codes are members of an enumeration of integers in places.
    fields = {"code": int(error.code), "reason": error.reason}
    _read_error(fields)
    return fields


def _read_error(value: Any) -> Error:
    fields = check_object("error", value, ("code", "reason"))
    check_int("error.code", fields["code"])
    if fields["reason"] is not None:
        check_str("error.reason", fields["reason"])
    return Error(fields["code"], fields["reason"])
