"""Functions that hold parts of a model: in a copy of it they go on calling the original's."""

from collections import deque
from collections.abc import Iterable, Mapping
from functools import _lru_cache_wrapper, partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.cut_errors import CutError
from flsplit.cut.partial_forward import is_compiled

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_OF_TORCH = vars(nn.Module()).keys() - _HOOKS.keys()
_DEEPEST = 8


def check_functions(model: nn.Module) -> None:
    """Refuse functions in modules' attributes and hooks that hold parts of the model by themselves.

    Segments are copies, and a function isn't copied. A bound method is, with its object, and so are
    the arguments of a `functools.partial`.
    """
    parts: dict[int, str] = {}
    for name, part in (
        *model.named_modules(),
        *model.named_parameters(),
        *model.named_buffers(),
    ):
        parts.setdefault(id(part), repr(name) if name else type(model).__name__)
    for path, module in model.named_modules():
        if is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in vars(module).items():
            if name not in _OF_TORCH and (found := _held(value, parts)):
                what = f"the function in {f'{path}.{name}'.lstrip('.')!r}"
                if name in _HOOKS:
                    what = f"a {_HOOKS[name]} of {parts[id(module)]}"
                raise CutError(
                    f"{what} holds {found} of the model by itself (a closure, a default): in the "
                    "segments, which are copies, it would go on calling the original, which isn't "
                    "trained. Write a method, which has self; a hook is given its module"
                )


def _held(thing: Any, parts: Mapping[int, str], depth: int = 0, *, kept: bool = False) -> str:
    """Name a part that ``thing`` holds in a function, or holds itself if it is ``kept`` in one."""
    if kept and id(thing) in parts:
        return parts[id(thing)]
    inside: Iterable[Any] = ()
    match thing:
        case nn.Module() | Tensor():
            pass
        case FunctionType():
            cells = map(_content, thing.__closure__ or ())
            defaults = (thing.__kwdefaults__ or {}).values()
            inside, kept = (*cells, *(thing.__defaults__ or ()), *defaults), True
        case _lru_cache_wrapper():
            inside, kept = (thing.__wrapped__,), True
        case MethodType():
            inside = thing.__self__, thing.__func__
        case partial():
            inside = thing.func, *thing.args, *thing.keywords.values()
        case Mapping():
            inside = list(thing.values())
        case list() | tuple() | set() | frozenset() | deque():
            inside = list(thing)
    if depth == _DEEPEST:
        return ""
    return next(filter(None, (_held(one, parts, depth + 1, kept=kept) for one in inside)), "")


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
