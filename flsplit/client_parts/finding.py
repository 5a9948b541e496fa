"""Client parts by name: what is sent of them, and what a client makes of it."""

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from flsplit.client_parts.client_part import ClientPart, refuse_without_hook
from flsplit.client_parts.compression import (
    PLACES,
    Compression,
    Difference,
    HalfPrecision,
    Int8,
    LowRank,
    TopK,
    compressing,
)
from flsplit.client_parts.defences import LabelNoise, NoPeek, Shuffle
from flsplit.client_parts.stock import Clip, Noise, Proximal
from flsplit.errors import ConfigError, ProtocolError, did_you_mean

GROUP = "flsplit.client_parts"

MAX_PARTS = 32
MAX_LENGTH = 8192  # characters of what is sent of them all

_STOCK: dict[str, type[ClientPart]] = {
    one.name: one
    for one in (
        *(Clip, Noise, Proximal, NoPeek, Shuffle, LabelNoise),
        *(Int8, HalfPrecision, TopK, LowRank, Difference),
    )
}


def part_names() -> list[str]:
    """Return the names of all client parts that are installed here."""
    return sorted({*_STOCK, *entry_points(group=GROUP).names})


def make_part(described: object) -> ClientPart:
    """Return a client part from its name, or a table with ``name`` and arguments.

    Raises
    ------
    ConfigError
        If there is no such part here, or it can't be made with these arguments.
    """
    table = {"name": described} if isinstance(described, str) else described
    if not (isinstance(table, Mapping) and isinstance(table.get("name"), str)):
        raise ConfigError(
            f'client part is {described!r}, expected a name or a table as {{name = "noise", '
            "sigma = 0.1}"
        )
    name = table["name"]
    found = _find(name)
    if found is None:
        known = part_names()
        raise ConfigError(
            f"there is no client part {name!r} (there are {', '.join(known)})"
            f"{did_you_mean(name, known)}"
        )
    arguments = {key.replace("-", "_"): one for key, one in table.items() if key != "name"}
    return _make(found, name, arguments)


def describe_parts(parts: Sequence[ClientPart]) -> str:
    """Return what is sent of a method's parts: for each its name, class and arguments, as JSON.

    ConfigError if something is no client part, or one that can't be sent.
    """
    described = []
    for part in parts:
        if not isinstance(part, ClientPart):
            raise ConfigError(f"client_parts: one of them is {part!r}, expected a ClientPart")
        cls = type(part)
        if not cls.name:
            raise ConfigError(f"client part {cls.__qualname__} has no name")
        arguments = part.arguments()
        part.check_state(arguments)
        if not isinstance(part, Compression | Shuffle):  # which do their work outside autograd
            refuse_without_hook(part)
        where = f"{cls.__module__}:{cls.__qualname__}"
        described.append({"name": cls.name, "class": where, "arguments": arguments})
    for record in PLACES:
        compressing(parts, record)  # refuses two
    text = json.dumps(described) if described else ""
    if len(described) > MAX_PARTS or len(text) > MAX_LENGTH:
        raise ConfigError(f"client_parts: at most {MAX_PARTS} of {MAX_LENGTH} characters")
    return text


def build_parts(text: str, own: Sequence[type[ClientPart]], client: str) -> list[ClientPart]:
    """Return the parts that a plan describes.

    ``own`` are classes that the ClientApp has beside those that are installed.

    ProtocolError if the text is malformed. ConfigError if this client has no part of a name, or
    can't make it with these arguments.
    """
    if not text:
        return []
    try:
        described = json.loads(text) if len(text) <= MAX_LENGTH else None
    except (ValueError, RecursionError):
        described = None
    if not (isinstance(described, list) and 0 < len(described) <= MAX_PARTS):
        raise _malformed(text)
    by_name = {cls.name: cls for cls in own}
    parts = []
    for one in described:
        if not (isinstance(one, dict) and {*one} == {"name", "class", "arguments"}):
            raise _malformed(text)
        name, arguments = one["name"], one["arguments"]
        if not (isinstance(name, str) and isinstance(arguments, dict)):
            raise _malformed(text)
        if not all(isinstance(value, (bool, int, float, str)) for value in arguments.values()):
            raise _malformed(text)
        found = by_name.get(name) or _find(name)
        if found is None:
            known = ", ".join(sorted({*part_names(), *by_name}))
            raise ConfigError(
                f"client {client!r} has no client part {name!r}, which the run needs (it has "
                f"{known}): install there what provides {str(one['class'])[:200]}, in the "
                f"entry-point group {GROUP}, or pass the class as client_app(client_parts=[…])"
            )
        parts.append(_make(found, name, arguments))
    return parts


def _malformed(text: str) -> ProtocolError:
    return ProtocolError(
        f"field 'client-parts' is {text[:80]!r}, expected a JSON list of up to {MAX_PARTS} tables "
        "with name, class and plain arguments"
    )


def _find(name: str) -> type[ClientPart] | None:
    # Our own are known without being installed, and nobody else's can stand in for them.
    if name in _STOCK:
        return _STOCK[name]
    for entry in entry_points(group=GROUP, name=name):
        cls = entry.load()
        if isinstance(cls, type) and issubclass(cls, ClientPart) and cls.name == name:
            return cls
        raise ConfigError(
            f"client part {name!r} is {cls!r}, expected a subclass of ClientPart of that name"
        )
    return None


def _make(cls: type[ClientPart], name: str, arguments: Mapping[str, Any]) -> ClientPart:
    known = list(inspect.signature(cls).parameters)
    if unknown := [one for one in arguments if one not in known]:
        raise ConfigError(
            f"client part {name!r} has no argument {unknown[0]!r} (it has {', '.join(known)})"
        )
    try:
        return cls(**arguments)
    except TypeError as error:  # an argument without a default is missing, or of a wrong type
        raise ConfigError(f"client part {name!r}: {error}") from error
