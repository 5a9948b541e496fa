"""One forward of a model that ends at a cut or begins there, and how the modules report to it."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from flsplit.cut.cut_errors import CutError, UnknownCutError


class Reached(BaseException):
    """Ends a forward at the cut. Not an Exception: models catch those."""


@contextmanager
def eager() -> Iterator[None]:
    """Let compiled modules run uncompiled: compiled, nobody would see their calls."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Active(threading.local):
    """The run that goes on in this thread; another thread may run the same model."""

    run: "PartialForward | None" = None


_active = _Active()


class PartialForward:
    """One forward up to a cut, or from it; watches nothing of what happens in between.

    Of two cuts, the run is from the first one to the second.
    """

    watches = False
    """Whether modules before the cut are told to `module`, or called as ever."""

    def __init__(self, cut: str) -> None:
        first, second = places_of(cut)
        (self._layer, self._left), (self._last, self._rest) = place_of(first), place_of(second)
        self._grad = torch.is_grad_enabled()
        self.passed = False

    def module(self, stub: "Stub", args: Any, kwargs: Any) -> Any:
        """Call a module before the cut."""
        return stub.forward(*args, **kwargs)

    def layer_returned(self, name: str, output: Any) -> Any:
        """Be told that a cut layer returned; what this returns takes the output's place."""
        if name == self._last:
            self._rest -= 1
            if self.passed and not self._rest:
                self.output = output
                raise Reached
        if self.passed or name != self._layer:
            return None
        self._left -= 1
        if self._left:
            return None
        if torch.is_grad_enabled() != self._grad:
            raise CutError(
                f"the cut {name!r} lies in a region without gradients (torch.no_grad, a reentrant "
                "checkpoint): cut outside it"
            )
        self.passed = True
        return self.reach(output)

    def reach(self, output: Any) -> Any:
        """Do what is to be done at the cut."""
        self.output = output
        raise Reached

    def run(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Be the run that the model's hooks report to; return the output of a whole forward."""
        before, _active.run = _active.run, self
        try:
            return model(*args, **kwargs)
        except Reached:
            return None
        finally:
            _active.run = before


class Stub:
    """Stands in for the forward of one module, so that a run before the cut can skip it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.called, self.as_call = name, module, f"module {name}"
        self._own = vars(module).get("forward")  # somebody else may have replaced it, too
        self.__name__ = "forward"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        if self._own:
            return self._own(*args, **kwargs)
        return type(self.called).forward(self.called, *args, **kwargs)

    def put_back(self) -> None:
        """Let the module have its own forward again."""
        del vars(self.called)["forward"]
        if self._own:
            vars(self.called)["forward"] = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the run that goes on."""
        run = _active.run
        if run is not None and run.watches and not run.passed:
            return run.module(self, args, kwargs)
        if self._own:
            return self._own(*args, **kwargs)
        return type(self.called).forward(self.called, *args, **kwargs)


class AtCut:
    """The last forward hook of a cut layer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Tell the run that goes on."""
        run = _active.run
        return None if run is None else run.layer_returned(self.name, output)


@cache
def places_of(cut: str) -> tuple[str, str]:
    """Return the cut, and of two in ``"conv1,fc1"`` the second one, which is empty otherwise."""
    first, _, second = cut.partition(",")
    return first.strip(), second.strip()


@cache
def place_of(cut: str) -> tuple[str, int]:
    """Return the module's name and which of its calls a cut lies behind: ``"relu#2"``."""
    name, _, nth = cut.partition("#")
    if nth and not (nth.isdecimal() and int(nth)):
        raise UnknownCutError(f"{cut!r}: after '#' comes which call it is, 1, 2, …")
    return name, int(nth or 1)


def instrument(model: nn.Module, cut: str | None, names: frozenset[str] | None = None) -> None:
    """Let the modules of a copied model report to runs.

    ``names`` are the modules that a run may skip, by default all. Without a cut every module tells
    when it returned.
    """
    for name, module in model.named_modules():
        if not name or is_compiled(module):
            continue
        if names is None or name in names:
            vars(module)["forward"] = Stub(module, name)
        if cut is None:
            module.register_forward_hook(AtCut(name))
    for layer in {place_of(place)[0] for place in places_of(cut) if place} if cut else ():
        if not is_compiled(module := model.get_submodule(layer)):
            module.register_forward_hook(AtCut(layer))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is one that `torch.compile` made; asking torch would take seconds."""
    return type(module).__name__ == "OptimizedModule"


def uninstrument(module: nn.Module) -> None:
    """Undo in one module what `instrument` did."""
    stub = vars(module).get("forward")
    if isinstance(stub, Stub):
        stub.put_back()
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, AtCut):
            del module._forward_hooks[key]
