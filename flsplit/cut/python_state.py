"""What modules keep beside parameters and lasting buffers, and whether a forward changes it.

None of that is in a state dict, so it would be neither handed on, nor averaged, nor resumed with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.partial_forward import is_compiled
from flsplit.cut.private import Unseen
from flsplit.snapshots import snapshot

_OF_TORCH = vars(nn.Module()).keys() - {"training"} | {"forward"}  # `instrument` puts that there


@dataclass(frozen=True)
class _Mark:
    """What stands for the value of an attribute, and changes with it."""

    value: Any
    text: Any
    tensors: list[Tensor]  # in it, of which the text says nothing


class KeptState:
    """What the modules of a model keep now, to be compared with what they keep later."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        with Unseen():  # these are none of forward's calls
            self._marks = dict(_marks(model))
            self._copies = {
                where: [tensor.detach().clone() for tensor in mark.tensors]
                for where, mark in self._marks.items()
            }
        self.tensors = {id(tensor) for mark in self._marks.values() for tensor in mark.tensors}
        """Ids of the tensors among it."""

    def changed(self, is_used: Callable[[Tensor], bool]) -> str:
        """Say what has changed since; nothing if nothing has.

        Tensors in whose place there are others now, or more, count if forward ``is_used`` them:
        what is only written makes no difference.
        """
        with Unseen():
            later = dict(_marks(self._model))
            for where, mark in self._marks.items():
                now = later.get(where)
                if now is None or now.text != mark.text:
                    kind = type(mark.value)
                    verb = "counts in" if kind in (bool, int, float, str) else "changes"
                    return f"{verb} {where!r} ({kind.__name__})"
                old_ones, new_ones = mark.tensors, list[Tensor | None](now.tensors)
                if len(new_ones) != len(old_ones):
                    new_ones = [None] * len(old_ones)
                for old, copy, new in zip(old_ones, self._copies[where], new_ones, strict=True):
                    same = new is not None and _same(copy, new)
                    if not same and (old is new or is_used(old)):
                        return f"changes {where!r}, which no state dict has"
        return ""


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether values are the same; where that isn't known, they are."""
    if any(type(t) is not Tensor or t.is_meta or t.is_nested for t in (a, b)):
        return True
    if a.device != b.device or {a.layout, b.layout} != {torch.strided}:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.equal(b) or bool((a != a).any())  # NaN


def _marks(model: nn.Module) -> Iterator[tuple[str, _Mark]]:
    known: dict[int, _Mark] = {}  # many modules have one configuration
    for path, module in model.named_modules():
        if is_compiled(module):
            continue
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                if id(value) not in known:
                    known[id(value)] = _mark(value)
                yield f"{path}.{name}".lstrip("."), known[id(value)]
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                yield f"{path}.{name}".lstrip("."), _Mark(buffer, "", [buffer])


def _mark(value: Any) -> _Mark:
    tensors: list[Tensor] = []

    def in_place(one: Any) -> tuple[Any, ...] | None:
        if isinstance(one, Tensor):
            if not isinstance(one, nn.Parameter):
                tensors.append(one)
            return ()
        if isinstance(one, nn.Module | FunctionType | MethodType | BuiltinFunctionType | type):
            return type(one).__qualname__, getattr(one, "__qualname__", "")
        return None

    text = blake2b()  # not the text itself: arrays may be large
    for one in snapshot(value, {}, in_place):
        text.update(repr(one).encode())
    return _Mark(value, text.digest(), tensors)
