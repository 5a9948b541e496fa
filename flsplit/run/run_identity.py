"""What a run is, as plain values by name: two runs with the same ones compute the same numbers."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from hashlib import blake2b
from inspect import signature
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from flsplit.client_parts import describe_parts
from flsplit.run.method import SplitMethod
from flsplit.run.own_arguments import kept_arguments, own_argument_names

Plain = bool | int | float | str | None
Identity = dict[str, Plain]
"""JSON can hold it."""

# Their functions are known by their names. A user's are known by what they do, too.
_LIBRARIES = ("builtins", "flsplit", "flwr", "numpy", "torch", "torchmetrics")
_SETTINGS = (bool, int, float, str, tuple, Tensor, FunctionType, partial)  # of a user's file
_PATIENCE = ("min_available_nodes",)  # for how many clients one waits changes no number
_DEEPEST = 5
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SHOWN = 8  # differences that an error lists
_SHORT = 200


_NO_NUMBERS = (
    "callbacks", "carrier", "checkpoint_dir", "device", "example", "fleet", "min_available_nodes",
    "overlap", "realtime", "resume", "session", "share_client_segments",
)  # fmt: skip
"""Options that may change when a run is resumed: they change no number, or the last digit."""


def identity_of(method: SplitMethod) -> Identity:
    """Return what a run of a method must have in common with the one that it resumes.

    All that changes numbers, by name; an option counts unless it is known to change none.
    """
    options, aggregator = method.options, method.aggregator
    found: Identity = {
        "strategy": type(method).__name__,
        "seed": options.seed,
        "client_parts": describe_parts(method.all_client_parts()),
        "client_strategy": "",
    }
    found |= describe_model("model", options.model)
    found |= describe_optimizer("server_optimizer", method.server.optimizer)
    if aggregator:
        found |= describe("client_strategy", aggregator.strategy)
    own = [name for name in own_argument_names(type(method)) if name not in _NO_NUMBERS]
    for name, value in kept_arguments(method, own).items():
        found |= describe(name, value)
    for one in fields(options):
        if one.name not in (*found, *_NO_NUMBERS):
            found |= describe(one.name, getattr(options, one.name))
    return found


def describe(name: str, value: Any, depth: int = 0, seen: frozenset[int] = frozenset()) -> Identity:
    """Return what a value is, under ``name`` and names that begin with it.

    Functions are told apart by their code and what it refers to, objects by their class and by
    what they keep of their constructor's arguments, modules by their layers and tensors.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return {name: value}
    if isinstance(value, Tensor):
        return {name: digest_of(value)}
    if isinstance(value, type):
        return {name: value.__name__}
    if isinstance(value, Path):
        return {}  # where something lies changes no number
    found: Identity = {name: _kind_of(value)}
    if depth < _DEEPEST and id(value) not in seen:
        for key, part in _parts_of(value):
            found |= describe(f"{name}{key}", part, depth + 1, seen | {id(value)})
    return found


def describe_model(name: str, model: nn.Module) -> Identity:
    """Return a model's layers and parameters, but not what the parameters' values are."""
    found: Identity = {name: type(model).__name__}
    for path, module in model.named_modules():
        if path:
            found[f"{name}.{path}"] = f"{type(module).__name__}({_extra(module)})"
    for path, one in model.named_parameters():
        shape = "?" if is_lazy(one) else tuple(one.shape)
        found[f"{name}.{path}"] = f"{one.dtype} {shape}{'' if one.requires_grad else ' frozen'}"
    return found


def describe_optimizer(name: str, optimizer: Optimizer) -> Identity:
    """Return an optimizer's class and what its groups are set to."""
    found: Identity = {name: type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        of_group = f"{name}[{index}]" if index else name
        found[f"{of_group}.parameters"] = len(group["params"])
        for key, value in group.items():
            if key not in ("params", "param_names"):
                found |= describe(f"{of_group}.{key}", value)
    return found


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words what is not the same in two identities; empty if all is."""
    names = [name for name in [*now, *(one for one in stored if one not in now)]
             if stored.get(name) != now.get(name) or (name in stored) != (name in now)]  # fmt: skip
    said = [
        f"with {name} {_said(stored, name)}, this one has {_said(now, name)}"
        for name in names[:_SHOWN]
    ]
    more = [f"and {len(names) - _SHOWN} more differences"] if len(names) > _SHOWN else []
    return "; ".join(said + more)


def _said(identity: Mapping[str, Any], name: str) -> str:
    if name not in identity:
        return "none"
    text = repr(identity[name])
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"


def _kind_of(value: Any) -> str:
    if isinstance(value, FunctionType):
        code = "" if _is_known(value) else f" #{digest_of(_code(value.__code__))}"
        return value.__qualname__ + code
    if isinstance(value, MethodType):
        return _kind_of(value.__func__)
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}({_extra(value)})"
    if isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        return str(value.__qualname__)
    return type(value).__name__


def _parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Return what a value is made of, under names to be added to its own."""
    if isinstance(value, Mapping):
        yield from ((f".{key}", one) for key, one in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", one) for index, one in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"[{one}]", True) for one in sorted(map(repr, value)))
    elif isinstance(value, partial):
        yield ".of", value.func
        yield from ((f"[{index}]", one) for index, one in enumerate(value.args))
        yield from ((f".{key}", one) for key, one in value.keywords.items())
    elif isinstance(value, FunctionType):
        yield from _free_of(value)
    elif isinstance(value, MethodType):
        yield ".self", value.__self__
        yield from _free_of(value.__func__)
    elif isinstance(value, nn.Module):
        yield from ((f".{key}", one) for key, one in value.named_children())
        own = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        yield from ((f".{key}", one) for key, one in own)
        if not own:
            yield from _arguments_of(value)
    else:
        yield from _arguments_of(value)


def _free_of(function: Any) -> Iterator[tuple[str, Any]]:
    """Return what a user's function refers to beside its arguments: around it, or in its file."""
    if _is_known(function):
        return
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        yield f".{name}", cell.cell_contents
    for name in _names_in(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, _SETTINGS) and not name.startswith("__"):
            yield f".{name}", value
    for index, default in enumerate(function.__defaults__ or ()):
        yield f"({index})", default
    yield from ((f".{key}", one) for key, one in (function.__kwdefaults__ or {}).items())


def _arguments_of(value: object) -> Iterator[tuple[str, Any]]:
    try:
        names = list(signature(type(value).__init__).parameters)[1:]
    except (TypeError, ValueError):
        return
    kept = kept_arguments(value, [name for name in names if name not in _PATIENCE])
    yield from ((f".{name}", one) for name, one in kept.items())


def _extra(module: nn.Module) -> str:
    return _ADDRESS.sub("", module.extra_repr())


def _is_known(function: Any) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _names_in(code: CodeType) -> list[str]:
    """Return the names that a function looks up where it was written, with functions in it."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names_in(one)]
    return sorted({*code.co_names, *inner})


def _code(code: CodeType) -> str:
    """Return what a function does, but not where it stands; the same in every process."""
    constants = [
        _code(one)
        if isinstance(one, CodeType)
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    return repr((code.co_code.hex(), code.co_names, constants))


def digest_of(value: Tensor | str) -> str:
    """Return in short what a tensor or a text holds."""
    if isinstance(value, str):
        return blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = blake2b(raw.tobytes(), digest_size=8).hexdigest()
    return f"{value.dtype} {tuple(value.shape)} #{digest}"
