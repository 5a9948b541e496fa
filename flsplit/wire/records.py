"""The records of a message as lists in the header, and back."""

from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flsplit.wire.checks import check_count, check_list, check_str
from flsplit.wire.errors import WireError, told
from flsplit.wire.values import CONFIG_TYPES, METRIC_TYPES, fill, read_value, write_value

Record = ArrayRecord | MetricRecord | ConfigRecord

MAX_DIMENSIONS = 64
"""As many as NumPy and torch can handle; a longer shape is refused."""


def write_records(content: RecordDict, segments: list[bytes]) -> list[Any]:
    """Return the records as lists; their raw bytes are added to `segments` in the same order."""
    return [_write_record(name, record, segments) for name, record in content.items()]


def read_records(field: str, value: Any, sizes: list[int]) -> list[Any]:
    """Check the lists and return a plan for `build_records`; segment sizes go to `sizes`."""
    plan: list[Any] = []
    names: set[str] = set()
    for index, item in enumerate(check_list(field, value)):
        at = f"{field}[{index}]"
        name, kind, entries = check_list(at, item, length=3)
        _check_new(f"{at}.name", name, names)
        if not isinstance(kind, str) or kind not in _READERS:
            raise WireError(f"{at}.kind", f"one of {sorted(_READERS)}", kind)
        plan.append((name, kind, _read_entries(f"{at}.entries", kind, entries, sizes)))
    return plan


def build_records(plan: list[Any], segments: Iterator[bytes]) -> RecordDict:
    """Return the records of `plan`, with their raw bytes taken from `segments`."""
    content = RecordDict()
    for name, kind, entries in plan:
        content[name] = _BUILDERS[kind](entries, segments)
    return content


def _write_record(name: str, record: Record, segments: list[bytes]) -> list[Any]:
    if isinstance(record, ArrayRecord):
        arrays = [_write_array(f"{name}.{key}", key, a, segments) for key, a in record.items()]
        return [name, "arrays", arrays]
    kind = "metrics" if isinstance(record, MetricRecord) else "config"
    entries = [
        [key, *write_value(f"{name}.{key}", value, segments)] for key, value in record.items()
    ]
    return [name, kind, entries]


def _write_array(field: str, key: str, array: Array, segments: list[bytes]) -> list[Any]:
    # An Array's attributes can be set to anything after it was made, so they are checked here:
    # bytes in particular, because anything mutable could change while it waits to be sent.
    if not isinstance(array.data, bytes):
        raise WireError(f"{field}.data", "bytes", told(type(array.data).__name__))
    shape = _check_shape(f"{field}.shape", list(array.shape))
    check_str(f"{field}.dtype", array.dtype)
    check_str(f"{field}.stype", array.stype)
    segments.append(array.data)
    return [key, array.dtype, shape, array.stype, len(array.data)]


def _read_entries(field: str, kind: str, value: Any, sizes: list[int]) -> list[Any]:
    read = _READERS[kind]
    keys: set[str] = set()
    entries = []
    for index, item in enumerate(check_list(field, value)):
        entry = read(f"{field}[{index}]", item, sizes)
        _check_new(f"{field}[{index}].key", entry[0], keys)
        entries.append(entry)
    return entries


def _read_array(field: str, value: Any, sizes: list[int]) -> tuple[Any, ...]:
    key, dtype, shape, stype, size = check_list(field, value, length=5)
    check_str(f"{field}.dtype", dtype)
    check_str(f"{field}.stype", stype)
    dimensions = _check_shape(f"{field}.shape", check_list(f"{field}.shape", shape))
    sizes.append(check_count(f"{field}.size", size))
    return key, dtype, tuple(dimensions), stype


def _read_metric(field: str, value: Any, sizes: list[int]) -> tuple[Any, ...]:
    return _read_typed(field, value, sizes, METRIC_TYPES)


def _read_config(field: str, value: Any, sizes: list[int]) -> tuple[Any, ...]:
    return _read_typed(field, value, sizes, CONFIG_TYPES)


def _read_typed(field: str, value: Any, sizes: list[int], types: frozenset[str]) -> tuple[Any, ...]:
    key, kind, payload = check_list(field, value, length=3)
    if not isinstance(kind, str) or kind not in types:
        raise WireError(f"{field}.type", f"one of {sorted(types)}", kind)
    return key, read_value(f"{field}.value", kind, payload, sizes)


def _build_arrays(entries: list[Any], segments: Iterator[bytes]) -> ArrayRecord:
    record = ArrayRecord()
    for key, dtype, shape, stype in entries:
        record[key] = Array(dtype, shape, stype, next(segments))
    return record


def _build_metrics(entries: list[Any], segments: Iterator[bytes]) -> MetricRecord:
    return MetricRecord({key: fill(value, segments) for key, value in entries})


def _build_config(entries: list[Any], segments: Iterator[bytes]) -> ConfigRecord:
    return ConfigRecord({key: fill(value, segments) for key, value in entries})


def _check_new(field: str, key: Any, seen: set[str]) -> None:
    check_str(field, key)
    if key in seen:
        raise WireError(field, "each name once", key)
    seen.add(key)


def _check_shape(field: str, shape: list[Any]) -> list[int]:
    if len(shape) > MAX_DIMENSIONS:
        raise WireError(field, f"at most {MAX_DIMENSIONS} dimensions", shape)
    return [check_count(field, length) for length in shape]


_READERS = {"arrays": _read_array, "metrics": _read_metric, "config": _read_config}
_BUILDERS: dict[str, Callable[[list[Any], Iterator[bytes]], Record]] = {
    "arrays": _build_arrays,
    "metrics": _build_metrics,
    "config": _build_config,
}
