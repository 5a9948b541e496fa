"""Nestings of tensors in an ``ArrayRecord``: each array is called by its place.

The place of a tensor alone is ``"0"``. Inside a dict, ``.name`` is added to it, inside a tuple or
list ``[0]``, so that the labels ``{"box": [a, b]}`` travel as ``0.box[0]`` and ``0.box[1]``.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord
from torch import Tensor

from flsplit.errors import DataError, ProtocolError
from flsplit.message.arrays import to_array, to_tensor
from flsplit.message.fields import WHOLE, Records, Slot, Written, record, refuse_others

_STEP = re.compile(r"\.([^.\[\]]{1,100})|\[(0|[1-9]\d{0,3})\]")
_MAX_DEPTH, _MAX_TENSORS = 8, 10_000


def nesting(key: str) -> Slot:
    """Return how a nesting of tensors travels raw, alone in a record."""

    def put(records: Written, tree: Any) -> None:
        records[key] = ArrayRecord, arrays_of(tree, WHOLE)

    def get(records: Records) -> Any:
        arrays = record(records, key, ArrayRecord)
        refuse_others(arrays, key)
        return get_nesting(arrays, WHOLE, field=key)

    return Slot(key, put, get, required=True, alone=True)


def arrays_of(tree: Any, place: str) -> dict[str, Array]:
    """Return the tensors of a nesting, by their places.

    DataError if there is something else than tensors in it, or a name that can't be written.
    """
    return {where: to_array(tensor) for where, tensor in _tensors_in(tree, place)}


def _tensors_in(tree: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, Mapping) and tree:
        for name, part in tree.items():
            if not (isinstance(name, str) and _STEP.fullmatch(f".{name}")):
                raise DataError(f"labels have the key {name!r}, expected a name without . [ and ]")
            yield from _tensors_in(part, f"{place}.{name}")
    elif isinstance(tree, tuple | list) and tree:
        for index, part in enumerate(tree):
            yield from _tensors_in(part, f"{place}[{index}]")
    else:
        raise DataError(f"labels hold a {type(tree).__name__}, expected tensors")


def get_nesting(arrays: ArrayRecord, place: str, *, field: str) -> Any:
    """Return the nesting whose arrays' names begin with ``place``; tuples come for lists, too.

    ProtocolError if there is none, or the arrays' names are no places of one nesting.
    """
    if len(arrays) == 1 and place in arrays:  # a tensor alone, as in most messages
        return to_tensor(arrays[place], field=field)
    own = {
        name[len(place) :]: array
        for name, array in arrays.items()
        if name == place or (name.startswith(place) and name[len(place)] in ".[")
    }
    if not own or len(own) > _MAX_TENSORS:
        raise ProtocolError(f"record {field!r} holds {len(own)} arrays called {place!r}")
    return _built(own, field, 0)


def _built(own: Mapping[str, Array], field: str, depth: int) -> Any:
    if list(own) == [""]:
        return to_tensor(own[""], field=field)
    parts: dict[str, dict[str, Array]] = {}
    for path, array in own.items():
        match = _STEP.match(path)
        if match is None or depth > _MAX_DEPTH:
            raise ProtocolError(f"record {field!r}: an array is called {path!r}, expected a place")
        parts.setdefault(match.group(), {})[path[match.end() :]] = array
    built = {step: _built(inner, field, depth + 1) for step, inner in parts.items()}
    if all(step.startswith(".") for step in built):
        return {step[1:]: part for step, part in built.items()}
    if list(built) != [f"[{index}]" for index in range(len(built))]:
        raise ProtocolError(f"record {field!r}: places {list(built)[:5]} are of no one nesting")
    return tuple(built.values())
