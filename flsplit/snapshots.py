"""Snapshots of Python values: what is different once anything in them has changed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from sys import stdlib_module_names
from typing import Any

import torch

StandIn = Callable[[Any], tuple[Any, ...] | None]

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def snapshot(value: Any, held: dict[int, Any], stand_in: StandIn) -> Iterator[Any]:
    """Yield what tells a value from what it is after a change.

    ``stand_in`` says what is yielded in an object's place; None for what is to be looked into.
    What is ``held`` is left out. All objects are held from then on: an id is soon another one's.
    """
    if id(value) in held:
        return
    given = stand_in(value)
    if given is None and isinstance(value, _PLAIN):
        yield repr(value)  # NaN isn't equal to itself
        return
    held[id(value)] = value
    if given is not None:
        yield from given
        return
    yield "("
    for one in _inside(value):
        yield from snapshot(one, held, stand_in)
    yield ")"


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, torch.Generator):
        return (value.get_state().numpy().tobytes(),)
    kind = type(value)
    if hasattr(value, "__dict__") and kind.__module__.partition(".")[0] not in stdlib_module_names:
        return (kind.__qualname__, vars(value))
    try:  # an array, an iterator, a generator of random numbers
        _, *rest = value.__reduce_ex__(4)
    except Exception:  # what nobody can look into: a lock, a file
        return ()
    return [list(part) if isinstance(part, Iterator) else part for part in rest]
