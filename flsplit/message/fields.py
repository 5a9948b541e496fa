"""Messages and plans as dataclasses: one codec between their fields and Flower's records.

A field that travels says so in its annotation: :class:`In` names the record of a plain value,
:class:`Slot` how anything else is written and read. What has neither stays where it is. Errors
say which field it is, what was expected and what came.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar, get_args, get_origin
from typing import get_type_hints as hints_of

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from flsplit.errors import ProtocolError
from flsplit.flower_internals import content_of
from flsplit.message.arrays import dtype_name, dtype_of, to_array, to_tensor
from flsplit.message.raised import shortened

Record = ArrayRecord | ConfigRecord | MetricRecord
Records = Mapping[str, Record]
Written = dict[str, Record | tuple[type[Record], dict[str, Any]]]
"""What is to be a message: records, or the kind and the values of each."""

T = TypeVar("T", ArrayRecord, ConfigRecord, MetricRecord)
Value = TypeVar("Value", bool, int, float, str)

WHOLE = "0"
"""The place of what a message has one of."""


@dataclass(frozen=True)
class In:
    """Where a plain value travels, and what it must at least be."""

    record: str = ""  # the record's name. One called ``metrics`` or ``memory`` is a MetricRecord
    least: float | None = None  # the smallest number allowed; of a list, in it
    key: str = ""  # the field's name there; by default that of the dataclass, in kebab-case
    length: int = 0  # how many numbers a list has at least
    most: float = math.inf  # the greatest
    longest: int | None = None  # how many it has at most


@dataclass(frozen=True)
class Slot:
    """How a value that is no plain field is written into a message and read from it."""

    record: str  # the record that tells whether it is there
    # Takes a message's records and the value, and adds what it is written in
    put: Callable[[Written, Any], None]
    get: Callable[[Records], Any]  # takes the records by name and returns the value
    required: bool = False  # whether every message has it; the value is None otherwise
    absent: object = None  # another value that isn't written: the field's default
    # Whether the value may be a tensor alone, which is the one array of the record then, raw.
    # Nearly always it is, and needs neither ``put`` nor ``get``.
    alone: bool = False


class _FieldAt(NamedTuple):
    name: str
    key: str
    kind: Any
    least: float | None
    most: float
    lengths: tuple[int, int | None]


_Group = tuple[str, Any, Sequence[_FieldAt]]
"""A record's name, its class, and its fields."""


def _entry(name: str, hint: Any, at: In) -> _FieldAt:
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(kind) in (tuple, Sequence):
        kind = tuple
    key, lengths = at.key or name.replace("_", "-"), (at.length, at.longest)
    return _FieldAt(name, key, kind, at.least, at.most, lengths)


def _said(hint: Any, kind: type) -> Any:
    """Return the ``In`` or ``Slot`` of an annotation, None if there is none."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((one for one in extras if isinstance(one, kind)), None)


class Content:
    """Base of dataclasses that are a message's content."""

    _groups: ClassVar[Sequence[_Group]] = ()
    _slots: ClassVar[Sequence[tuple[str, Slot]]] = ()

    def __init_subclass__(cls) -> None:
        """Read the annotations once."""
        groups: dict[str, list[_FieldAt]] = {}
        slots = []
        for name, hint in hints_of(cls, include_extras=True).items():
            if at := _said(hint, In):
                groups.setdefault(at.record, []).append(_entry(name, hint, at))
            elif slot := _said(hint, Slot):
                slots.append((name, slot))
        cls._slots = slots
        cls._groups = [
            (record, MetricRecord if record in ("metrics", "memory") else ConfigRecord, entries)
            for record, entries in groups.items()
        ]

    def to_content(self) -> RecordDict:
        """Return the content of a message."""
        records: Written = {}
        for record_name, make, entries in self._groups:
            fields = {}
            for name, key, kind, *_ in entries:
                found = getattr(self, name)
                if kind is tuple:
                    found = list(found)
                elif kind is torch.dtype:
                    found = dtype_name(found)
                fields[key] = found
            records[record_name] = make, fields
        for name, slot in self._slots:
            found = getattr(self, name)
            if slot.alone and isinstance(found, Tensor):
                records[slot.record] = ArrayRecord, {WHOLE: to_array(found)}
            elif found is not None and found is not slot.absent:
                slot.put(records, found)
        return content_of(records)

    @classmethod
    def from_content(cls, content: RecordDict | Records) -> Self:
        """Return what a message says; ProtocolError if it is malformed."""
        records: Records = content if type(content) is dict else dict(content.items())
        values = read_fields(records, cls._groups)
        for name, slot in cls._slots:
            found = records.get(slot.record)
            if slot.alone and type(found) is ArrayRecord:
                arrays = dict(found.items())
                if len(arrays) == 1 and WHOLE in arrays:
                    values[name] = to_tensor(arrays[WHOLE], field=slot.record)
                    continue
            if slot.required or found is not None:
                values[name] = slot.get(records)
        return cls(**values)


class Fields(Content):
    """Base of dataclasses that are one record, with all their fields."""

    def __init_subclass__(cls) -> None:
        """Read the annotations once."""
        hints = hints_of(cls, include_extras=True).items()
        plain = [(name, hint) for name, hint in hints if get_origin(hint) is not ClassVar]
        entries = [_entry(name, hint, _said(hint, In) or In()) for name, hint in plain]
        cls._groups = [("", ConfigRecord, entries)]

    def to_config(self) -> ConfigRecord:
        """Return the record."""
        return record(self.to_content(), "", ConfigRecord)

    @classmethod
    def from_config(cls, config: ConfigRecord) -> Self:
        """Return what a record says; ProtocolError if a field is missing, wrong or too small."""
        return cls.from_content({"": config})


def nested(key: str, kind: type[Fields]) -> Slot:
    """Return how a dataclass that is one record travels in a message."""

    def put(records: Written, value: Fields) -> None:
        records[key] = value.to_config()

    return Slot(key, put, lambda records: kind.from_config(record(records, key, ConfigRecord)))


# This runs for every message of every client: loops, and no call for each field.
def read_fields(records: Records, groups: Sequence[_Group]) -> dict[str, Any]:
    """Return plain fields by name."""
    values = {}
    for record_name, record_kind, entries in groups:
        source: Any = records.get(record_name)
        if type(source) is not record_kind:
            source = record(records, record_name, record_kind)
        fields: dict[str, Any] = dict(source.items())
        for name, key, kind, least, most, lengths in entries:
            if key not in fields:
                raise ProtocolError(f"field {key!r} is missing; there are {sorted(fields)}")
            found = fields[key]
            if type(found) is not kind:
                found = _converted(key, found, kind, least, most, lengths)
            elif least is not None and not least <= found <= most:
                raise _out_of_bounds(key, found, least, most)
            values[name] = found
    return values


def _converted(
    key: str,
    found: Any,
    kind: Any,
    least: float | None,
    most: float,
    lengths: tuple[int, int | None],
) -> Any:
    """Return a value of another type than the record's: an int for a float, a list, a dtype."""
    if kind is tuple:
        return _sizes(key, found, 1 if least is None else least, most, lengths)
    if kind is torch.dtype and type(found) is str:
        return dtype_of(found, field=key)
    if kind is not float or type(found) is not int:
        raise ProtocolError(
            f"field {key!r} is {shortened(repr(found), 60)} ({type(found).__name__}), expected a "
            f"{kind.__name__}"
        )
    if least is not None and not least <= found <= most:
        raise _out_of_bounds(key, found, least, most)
    return float(found)


def _out_of_bounds(key: str, found: Any, least: float, most: float) -> ProtocolError:
    expected = f"at most {most}" if found > most else f"at least {least}"
    return ProtocolError(f"field {key!r} is {found!r}, expected {expected}")


def _sizes(
    key: str, found: Any, least: float, most: float, lengths: tuple[int, int | None]
) -> tuple[int, ...]:
    shown, (length, longest) = shortened(repr(found), 60), lengths
    if not (isinstance(found, list) and len(found) >= length):
        raise ProtocolError(f"field {key!r} is {shown}, expected a list of sizes")
    if longest is not None and len(found) > longest:
        raise ProtocolError(f"field {key!r} has {len(found)} sizes, expected at most {longest}")
    if not all(type(size) is int and least <= size <= most for size in found):
        greatest = f", {most} at most" if most < math.inf else ""
        raise ProtocolError(
            f"field {key!r} is {shown}, expected sizes of {least} or more{greatest}"
        )
    return tuple(found)


def record(content: Records, key: str, kind: type[T]) -> T:
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
    group = ("it", type(fields), [_FieldAt("it", key, kind, minimum, math.inf, (0, None))])
    found: Value = read_fields({"it": fields}, [group])["it"]
    return found


def refuse_others(arrays: ArrayRecord, key: str) -> None:
    """Refuse arrays beside one that is alone, and none at all."""
    if WHOLE in arrays or not arrays:
        raise ProtocolError(f"record {key!r} holds {len(arrays)} arrays, expected one")
