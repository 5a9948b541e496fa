"""What came as JSON, against types: errors name the field, what was expected and what came."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert
from msgspec.structs import asdict

from flsplit.wire.wire_errors import Told, WireError

LEAST_INT = -(2**63)
GREATEST_INT = 2**64 - 1
"""Flower's own format holds signed and unsigned 64-bit integers; so does this one."""

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A length or a size."""

_PROBLEMS = (("Expected ", ""), ("Object missing required ", "a "), ("Object contains ", "no "))
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_PLACE = re.compile(r"(\[\d+\])\[(\d+)\].*")


def parse_json(field: str, raw: bytes) -> Any:
    """Parse strict JSON in UTF-8: no duplicate keys, no NaN, no runaway nesting."""
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(field, "JSON in UTF-8", Told(str(error))) from error


def fitted(field: str, value: Any, kind: Any, names: Sequence[str] | None = None) -> Any:
    """Return parsed JSON as the type `kind`, without any conversion but of integers to floats.

    ``names`` say what the positions of a list in a list are called; without, errors name ``field``
    alone, which is empty for the header as a whole.
    """
    try:
        return convert(value, kind)
    except ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
    found = value
    for key, index in _STEP.findall(path):
        found = found[key] if key else found[int(index)]
    if isinstance(found, dict):
        found = Told(f"keys {sorted(found)}")
    where = field
    if names is not None:
        path = _PLACE.sub(lambda at: f"{at[1]}.{names[int(at[2])]}", path.rstrip("`"))
        where = f"{field}{path}".removeprefix(".") or "header"
    expected = problem.partition(", got")[0]
    for beginning, replacement in _PROBLEMS:
        expected = expected.replace(beginning, replacement)
    raise WireError(where, expected, found)


def check_int(field: str, value: Any) -> None:
    """Refuse an integer out of range, which msgspec's own bounds are too narrow for."""
    if not LEAST_INT <= value <= GREATEST_INT:
        raise WireError(field, f"an integer from {LEAST_INT} to {GREATEST_INT}", value)


def check_ints(field: str, checked: Struct) -> None:
    """Refuse integers out of range among the values of `checked`."""
    for name, value in asdict(checked).items():
        if isinstance(value, int):
            check_int(f"{field}.{name}", value)


def check_once(field: str, part: str, names: list[str]) -> None:
    """Refuse a name that stands twice among those of the items of `field`."""
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for place, name in enumerate(names):
        if name in seen:
            raise WireError(f"{field}[{place}].{part}", "each name once", name)
        seen.add(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise WireError("object", "each key once", max(keys, key=keys.count))
    return found


def _refuse_constant(name: str) -> Any:
    raise WireError("number", "a finite JSON number", Told(name))


# msgspec's own decoder would let the last of two equal keys win. Made once: json.loads() with these
# arguments would make one for every header.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
