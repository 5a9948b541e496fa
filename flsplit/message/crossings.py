"""What crosses the cut, in messages: smashed data up, cut-layer gradients down.

A tensor alone travels as the one array of its record. Of a :class:`~flsplit.cut.Crossing` the
values travel by name, and beside them what the server needs to go on with the client's forward:
which trace it was, the numbers that differ from batch to batch, who needs a gradient. A trace
itself is sent once in a round (record ``traces``), and then known by its digest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor

from flsplit.cut import Crossing, CutError, Trace
from flsplit.cut.smashed import CutGradient, Smashed, differentiable
from flsplit.cut.trace import numbers_from_json, numbers_to_json
from flsplit.errors import ProtocolError
from flsplit.message.arrays import to_array, to_tensor
from flsplit.message.fields import WHOLE, Records, Slot, Written, record, refuse_others, value

MOST_TRACES = 32
"""How many traces a client takes for known to the server: those that it has sent last."""

_MAX_VALUES = 1000


@dataclass(frozen=True)
class Unresolved:
    """A crossing that came, whose trace is told by its digest."""

    values: dict[str, Tensor]
    digest: str
    numbers: tuple[Any, ...]
    aliases: frozenset[str]

    def resolved(self, traces: Mapping[str, Trace]) -> Crossing:
        """Return the crossing; ProtocolError if no such trace has come."""
        if self.digest not in traces:
            raise ProtocolError(f"crossing: trace is {self.digest!r}, which has not been sent")
        return Crossing(self.values, Trace(traces[self.digest].calls, self.numbers), self.aliases)


def put_smashed(
    arrays: dict[str, Array], crossings: dict[str, Any], place: str, smashed: Smashed
) -> None:
    """Add smashed data to what is to be two records."""
    if isinstance(smashed, Tensor):
        arrays[place] = to_array(smashed)
        return
    arrays |= {f"{place}:{name}": to_array(one) for name, one in smashed.values.items()}
    crossings[f"{place}.trace"] = smashed.trace.digest
    crossings[f"{place}.numbers"] = numbers_to_json(smashed.trace.numbers)
    crossings[f"{place}.learning"] = smashed.learning
    crossings[f"{place}.aliases"] = sorted(smashed.aliases)


def get_smashed(
    arrays: ArrayRecord, crossings: ConfigRecord | None, place: str, field: str
) -> Tensor | Unresolved:
    """Return the smashed data at a place; ProtocolError if it isn't there, or can't be read."""
    if crossings is None or f"{place}.trace" not in crossings:
        if place not in arrays:
            raise ProtocolError(f"{field}: there is no array {place!r}, but {list(arrays)[:5]}")
        return to_tensor(arrays[place], field=field)
    start = len(place) + 1
    values = {
        name[start:]: to_tensor(array, field=f"{field}[{name[:60]!r}]")
        for name, array in arrays.items()
        if name.startswith(f"{place}:")
    }
    if len(values) > _MAX_VALUES:
        raise ProtocolError(f"{field}: {len(values)} values cross, at most {_MAX_VALUES} may")
    learning = _names(crossings, f"{place}.learning", values)
    for name in learning:
        if not differentiable(values[name]):
            raise ProtocolError(f"{field}: {name!r} is {values[name].dtype} and wants a gradient")
        values[name].requires_grad_()
    try:
        numbers = numbers_from_json(value(crossings, f"{place}.numbers", str))
    except CutError as error:
        raise ProtocolError(f"crossing: {error}") from error
    aliases = frozenset(_names(crossings, f"{place}.aliases", values))
    return Unresolved(values, value(crossings, f"{place}.trace", str), numbers, aliases)


def _names(crossings: ConfigRecord, key: str, values: Mapping[str, Tensor]) -> list[str]:
    names = crossings.get(key, [])
    if not (isinstance(names, list) and all(name in values for name in names)):
        raise ProtocolError(f"crossing: {key} is {names!r}, expected some of {list(values)[:5]}")
    return [str(name) for name in names]


def one_smashed(key: str) -> Slot:
    """Return how the smashed data of one step travels."""

    def put(records: Written, smashed: Smashed) -> None:
        arrays: dict[str, Array] = {}
        crossings: dict[str, Any] = {}
        put_smashed(arrays, crossings, WHOLE, smashed)
        records[key] = ArrayRecord, arrays
        records["crossing"] = ConfigRecord, crossings

    def get(records: Records) -> Tensor | Unresolved:
        arrays, crossings = record(records, key, ArrayRecord), crossings_in(records)
        if crossings is None:
            refuse_others(arrays, key)
        return get_smashed(arrays, crossings, WHOLE, key)

    return Slot(key, put, get, required=True, alone=True)


def crossings_in(records: Records) -> ConfigRecord | None:
    """Return the record that describes crossings, None where tensors alone cross."""
    return record(records, "crossing", ConfigRecord) if "crossing" in records else None


def _put_traces(records: Written, traces: Mapping[str, Trace]) -> None:
    records["traces"] = ConfigRecord({key: one.to_json() for key, one in traces.items()})


def _get_traces(records: Records) -> dict[str, Trace]:
    found: dict[str, Trace] = {}
    for digest, text in record(records, "traces", ConfigRecord).items():
        try:
            trace = Trace.from_json(text) if isinstance(text, str) else None
        except CutError as error:
            raise ProtocolError(f"traces: {error}") from error
        if trace is None or trace.digest != digest:
            raise ProtocolError(f"traces: what came as {digest!r} is another trace or none")
        found[digest] = trace
    return found


TRACES = Slot("traces", _put_traces, _get_traces)
"""How traces travel that the server doesn't know yet, by digest."""


def _put_frozen(records: Written, frozen: bool) -> None:
    records["frozen"] = ConfigRecord({"frozen": frozen})


FROZEN = Slot("frozen", _put_frozen, lambda records: True, absent=False)
"""How a client says that it needs no cut-layer gradient."""


def one_gradient(key: str) -> Slot:
    """Return how a cut-layer gradient travels."""

    def put(records: Written, gradient: CutGradient) -> None:
        if isinstance(gradient, Tensor):
            arrays = {WHOLE: to_array(gradient)}
        else:
            arrays = {f"{WHOLE}:{name}": to_array(one) for name, one in gradient.items()}
        records[key] = ArrayRecord, arrays

    def get(records: Records) -> CutGradient:
        arrays: Any = records.get(key)
        if type(arrays) is not ArrayRecord:
            arrays = record(records, key, ArrayRecord)
        if list(arrays) == [WHOLE]:
            return to_tensor(arrays[WHOLE], field=key)
        if arrays:  # none where none of the values learns
            refuse_others(arrays, key)
        found = {}
        for name, array in arrays.items():
            if not name.startswith(f"{WHOLE}:"):
                raise ProtocolError(f"{key}: an array is called {name!r}, expected '0:' and a name")
            found[name[len(WHOLE) + 1 :]] = to_tensor(array, field=f"{key}[{name!r}]")
        return found

    return Slot(key, put, get, required=True)
