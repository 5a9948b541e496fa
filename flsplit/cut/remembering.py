"""Remembers, in one process, what was found out about a model.

A simulated client is built anew for every message; to look at its model each time would take
several times as long as the step.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_MOST = 256
_found: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
_lock = Lock()


def remembered(key: Any, make: Callable[[], T], alive: Any = None) -> T:
    """Return what was found out under a key before, or find it out.

    ``alive`` has to live as long, see `fingerprint`.
    """
    with _lock:
        if key in _found:
            _found.move_to_end(key)
            found: T = _found[key][0]
            return found
    found = make()
    with _lock:
        _found[key] = found, alive
        while len(_found) > _MOST:
            _found.popitem(last=False)
    return found


def fingerprint(model: nn.Module) -> tuple[Any, Any]:
    """Return a key for models whose forwards are the same, and what the key is of.

    The key has identities of functions and classes in it, so it holds in this process, while
    what it is of is kept.
    """
    marks = tuple(
        (name, type(module), *(_mark(item) for item in vars(module).items()))
        for name, module in model.named_modules(remove_duplicate=False)
    )
    return (os.getpid(), hash(marks)), marks


def _mark(thing: Any, depth: int = 0) -> Any:
    match thing:
        case bool() | int() | float() | str() | None | torch.dtype() | type():
            return thing
        case Tensor():
            return tuple(thing.shape), thing.dtype, thing.requires_grad
        case tuple() | list() | set() | frozenset() if depth < 4:
            return tuple(_mark(item, depth + 1) for item in thing)
        case dict() if depth < 4:
            return tuple(_mark(item, depth + 1) for item in thing.items())
        case _ if callable(thing) and not isinstance(thing, nn.Module) and _is_hashable(thing):
            return thing
        case _ if depth < 2 and not isinstance(thing, nn.Module) and hasattr(thing, "__dict__"):
            return type(thing), _mark(vars(thing), depth + 1)  # a configuration, say
        case _:
            return type(thing)


def _is_hashable(thing: Any) -> bool:
    """Try it: a weak reference, say that of a hook's handle, may refer to what is not."""
    try:
        hash(thing)
    except TypeError:
        return False
    return True
