"""Finds what a trace would silently freeze.

Tracing runs a module's ``forward`` once, with stand-ins for its tensors, and keeps the calls
that it saw. Whatever else happens in that one run (a branch on the training mode, a tensor
made from constants, a random number, a counter) would be repeated as it was for ever. Each
guard here either keeps such a thing alive or raises `Frozen`.
"""

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Frozen(Exception):  # noqa: N818 - a reason, which the tracer turns into an error
    """What the trace would freeze, said of a forward: "it ..."."""


class TrainingFlag:
    """Stands for ``module.training`` while a model is traced.

    Handed on, as in ``F.dropout(x, training=self.training)``, it is read anew at every call of
    the segment. Asked, as in ``if self.training``, it raises.

    Parameters
    ----------
    path : str
        Name of the module in the model; empty for the model itself.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        """Record a read of the flag (torch.fx calls this for an argument it doesn't know)."""
        target = f"{self._path}.training" if self._path else "training"
        return tracer.create_node("get_attr", target, (), {})

    def _refuse(self, *_: object) -> NoReturn:
        raise Frozen(
            "it branches on self.training, which a trace would decide once and for all "
            "(handing it on, as in F.dropout(x, training=self.training), is fine)"
        )

    __bool__ = __eq__ = __ne__ = __int__ = __index__ = _refuse
    __hash__ = object.__hash__


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """Replace ``training`` of every module of `model` by a `TrainingFlag` inside the block.

    Not so in TorchScript modules, which take nothing but a bool and are never opened.
    """
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    modes = [module.training for _, module in modules]
    try:
        for path, module in modules:
            module.training = TrainingFlag(path)
        yield
    finally:
        for (_, module), mode in zip(modules, modes, strict=True):
            module.training = mode


class NoTensorWork(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises `Frozen` when a real tensor is computed: stand-ins never get as far as here."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Refuse the operator `func`."""
        raise Frozen(
            f"it computes a tensor that doesn't depend on its input ({func}), whose value and "
            "device a trace would keep for ever: make it in __init__, with "
            "register_buffer(name, tensor, persistent=False)"
        )


@contextmanager
def nothing_changes(module: nn.Module) -> Iterator[None]:
    """Raise `Frozen` at the end of the block if a Python side effect would be lost.

    Watched, and put back, are the plain attributes of `module` and its submodules and the random
    generators of Python and NumPy (torch's is `NoTensorWork`'s business).
    """
    attributes = {part: dict(vars(part)) for part in module.modules()}
    python, numpy = random.getstate(), _numpy_state()
    changed: list[str] = []
    try:
        yield
    finally:
        for part, before in attributes.items():
            changed += _put_back(part, before)
        drawn = random.getstate() != python or pickle.dumps(_numpy_state()) != pickle.dumps(numpy)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
    if changed:
        raise Frozen(f"it sets the attribute {changed[0]!r}, which would happen in the trace only")
    if drawn:
        raise Frozen("it draws a random number in Python, which a trace would keep for ever")


def torch_modes() -> tuple[bool, ...]:
    """Return what ``torch.no_grad``, ``inference_mode`` and ``autocast`` switch."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _put_back(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Give a module its attributes of before; return which were set, bound anew or deleted."""
    missing = object()
    now = vars(module)
    keys = dict.fromkeys([*before, *now])
    changed = [key for key in keys if before.get(key, missing) is not now.get(key, missing)]
    if changed:
        now.clear()
        now.update(before)
    return changed


def _numpy_state() -> dict[str, Any] | tuple[Any, ...]:
    return np.random.get_state()  # noqa: NPY002 - the generator that forwards would use
