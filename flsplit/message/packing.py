"""Packed tensors in messages: pieces in the place of an array, and what they were made of.

The array ``key`` of a record is replaced by its pieces ``key|piece``; the record ``packed`` has
dtype and shape by key. Who unpacks them knows from the round's plan with which client part.
"""

import math
from collections.abc import Callable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from flsplit.client_parts.compression import Packed
from flsplit.errors import ProtocolError
from flsplit.flower_internals import made
from flsplit.message.arrays import dtype_name, dtype_of, to_array, to_tensor
from flsplit.message.fields import record, value

PACKED = "packed"

_MOST_BYTES = 2**31  # that a tensor may have when it is unpacked
_MOST_DIMENSIONS = 16


def put_packed(content: RecordDict, name: str, packed: Mapping[str, Packed]) -> None:
    """Put pieces in the place of some arrays of the record ``name``."""
    arrays: dict[str, Array] = {}
    for key, array in content.array_records[name].items():
        if key in packed:
            pieces = packed[key].pieces.items()
            arrays |= {f"{key}|{piece}": to_array(tensor) for piece, tensor in pieces}
        else:
            arrays[key] = array
    content[name] = made(ArrayRecord, arrays)
    content[PACKED] = ConfigRecord(
        {
            key: " ".join([dtype_name(one.dtype), *map(str, one.shape)])
            for key, one in packed.items()
        }
    )


def unpacked(content: RecordDict, name: str, unpack: Callable[[str, Packed], Tensor]) -> RecordDict:
    """Return a message's content with arrays in the place of the pieces in the record ``name``.

    ``content`` stays as it is; ``unpack`` takes a key and what came.

    ProtocolError if what came can't be unpacked.
    """
    if PACKED not in content:
        return content
    records = dict(content.items())
    said, arrays = record(records, PACKED, ConfigRecord), record(records, name, ArrayRecord)
    found: dict[str, Array] = {}
    pieces: dict[str, dict[str, Tensor]] = {key: {} for key in said}
    for whole, array in arrays.items():
        key, _, piece = whole.rpartition("|")
        if key in pieces:
            found.setdefault(key, array)  # its place among the others
            pieces[key][piece] = to_tensor(array, field=f"{name}[{whole[:60]!r}]")
        else:
            found[whole] = array
    for key, own in pieces.items():
        if not own:
            raise ProtocolError(f"packed: {name} has no pieces of {key[:60]!r}")
        found[key] = to_array(unpack(key, _packed(own, value(said, key, str))))
    rest = {other: one for other, one in records.items() if other != PACKED}
    return made(RecordDict, rest | {name: made(ArrayRecord, found)})


def _packed(pieces: dict[str, Tensor], said: str) -> Packed:
    kind, *sizes = said.split(" ")
    dtype = dtype_of(kind, field="packed")
    plain = all(size.isascii() and size.isdecimal() and len(size) < 14 for size in sizes)
    if not (plain and 0 < len(sizes) <= _MOST_DIMENSIONS and dtype.is_floating_point):
        raise ProtocolError(
            f"packed: {said[:60]!r}, expected a floating-point dtype and 1 to {_MOST_DIMENSIONS} "
            "sizes"
        )
    shape = tuple(map(int, sizes))
    if (size := math.prod(shape) * dtype.itemsize) > _MOST_BYTES:
        raise ProtocolError(f"packed: a tensor of {size} bytes, at most {_MOST_BYTES} are unpacked")
    return Packed(pieces, shape, dtype)
