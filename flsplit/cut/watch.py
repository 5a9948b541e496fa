"""Runs a model's own forward up to a cut, or from it.

- On the client, `Recording` numbers the calls before the cut, writes down what each returned
  (shapes, not values), and ends the forward there.
- On the server, `Replaying` lets no call before the cut compute anything: each returns what the
  client wrote down, as `Absent` tensors, which have a shape but no data. So no weights, random
  numbers or BatchNorm statistics of the client's part are touched. At the cut those that are
  needed later are swapped, object for object, for the values that came, the watching ends, and
  the rest is an ordinary forward. Touching any other `Absent` raises.

A module that is done before the cut, and of which nothing but its output is needed later, is one
call: on the client it runs unwatched, on the server it doesn't run at all.
"""

import copy
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

from flsplit.cut.cut_errors import CrossingError, CutError, PathError, UnknownCutError
from flsplit.cut.private import Unseen, is_innermost, no_torch_function, wrapper
from flsplit.cut.trace import Number, Same, Spec, Trace, map_tree, tensors_in
from flsplit.untrained import copied

# Calls that ask a tensor for what an `Absent` knows, too. So do all properties but these VIEWS.
# Every other call either computes or turns values into numbers, and so is written down.
ASKS_SIZES = {"size", "numel", "nelement", "__len__", "stride", "is_contiguous", "storage_offset"}
ASKS_SIZES |= {"is_same_size", "untyped_storage", ".shape", ".itemsize", ".nbytes"}
ASKS = ASKS_SIZES | {"dim", "ndimension", "is_floating_point", "is_complex", "is_signed"}
ASKS |= {"is_inference", "element_size", "get_device", "data_ptr", "has_torch_function"}
ASKS |= {"is_tensor", "register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
HOOKS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
VIEWS = {".T", ".mT", ".H", ".mH", ".data", ".real", ".imag", ".grad"}
NUMBERS = (bool, int, float, complex, str, list, tuple, torch.dtype, torch.device, type(None))

# Calls that only look at the shape, dtype and device of their first tensor.
LIKES = {f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")}
LIKES |= {f"new_{kind}" for kind in ("empty", "zeros", "ones", "full", "tensor")}


def name_of(func: Any) -> str:
    """Return what a call is called; a property has a dot before it."""
    name = getattr(func, "__name__", None) or str(func)
    return f".{func.__self__.__name__}" if name == "__get__" else name


def asks(name: str) -> bool:
    """Tell whether a call asks a tensor only for what an `Absent` knows."""
    return name in ASKS or (name[0] == "." and name not in VIEWS)


class Absent(Tensor):
    """A value of the other side: it has shape, dtype and device, but no data."""

    __torch_function__ = no_torch_function  # type: ignore[assignment]
    key: str

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make new tensors that are like this one; refuse to compute with it."""
        if func.__name__.partition(".")[0] in LIKES:
            like, *rest = args
            empty = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
            return func(empty, *rest, **kwargs or {})
        keys = [t.key for t in tensors_in((args, kwargs or {})) if isinstance(t, Absent)]
        raise CrossingError(
            f"{func} needs value {', '.join(keys)}, which was computed before the cut and did not "
            "cross: in the batch that the model was looked at with, nothing after the cut needed it"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        """Return its name: it has no data to show."""
        return f"Absent({self.key})"


class Reached(BaseException):
    """Ends a forward at the cut. Not an Exception: models catch those."""


# --------------------------------------------------------------------------------- hooks in models


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


def plain_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model, with TorchScript modules in the shells that watching needs."""
    memo = memo if memo is not None else {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if not name:
                raise CutError(
                    f"{type(model).__name__} is compiled by TorchScript: cut the model that it was "
                    "made of"
                )
            memo.setdefault(id(module), Scripted(module, hold=True))
    return copied(model, memo)


class Scripted(nn.Module):
    """Calls a TorchScript module, which takes neither hooks nor another forward.

    It has the module's parameters and buffers under the module's names, or none of them.
    """

    def __init__(self, script: nn.Module, *, hold: bool) -> None:
        super().__init__()
        vars(self)["script"] = script
        self.training = script.training
        if hold:
            self._hold(self, script)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return vars(self)["script"](*args, **kwargs)

    def train(self, mode: bool = True) -> "Scripted":
        """Train it, too."""
        vars(self)["script"].train(mode)
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scripted":
        """Copy the script, too, and hold the copy's tensors."""
        script = memo.get(id(vars(self)["script"])) or copy.deepcopy(vars(self)["script"], memo)
        other = Scripted(script, hold=bool(self._parameters or self._buffers or self._modules))
        memo[id(self)] = other
        other._forward_hooks = copy.deepcopy(self._forward_hooks, memo)
        if isinstance(stub := vars(self).get("forward"), Stub):
            vars(other)["forward"] = Stub(other, stub.name)
        return other

    @classmethod
    def _hold(cls, shell: nn.Module, script: nn.Module) -> None:
        for name, parameter in script.named_parameters(recurse=False):
            shell.register_parameter(
                name,
                nn.Parameter(parameter, parameter.requires_grad)
                if not isinstance(parameter, nn.Parameter)
                else parameter,
            )
        for name, buffer in script.named_buffers(recurse=False):
            shell.register_buffer(name, buffer)
        for name, child in script.named_children():
            shell.add_module(name, held := nn.Module())
            cls._hold(held, child)


# ----------------------------------------------------------------------------------------- watching


class Recording(TorchFunctionMode, PartialForward):
    """Writes down what the calls before the cut return.

    ``keys`` are the values to hold, ``"call.output"``; None for all. Modules in ``whole`` are one
    call.
    """

    watches = True

    def __init__(self, keys: set[str] | None, whole: frozenset[str], cut: str) -> None:
        TorchFunctionMode.__init__(self)
        PartialForward.__init__(self, cut)
        self.calls: list[tuple[str, Any]] = []
        self.numbers: list[Any] = []
        self.held: dict[str, Tensor] = {}
        self.asked = False  # whether forward asked for the size of anything
        self.read = False  # whether it made numbers of tensors
        self._keys, self._whole, self._resting = keys, whole, False

    @property
    def trace(self) -> Trace:
        """What was written down."""
        return Trace(tuple(self.calls), tuple(self.numbers))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call and write down what it returns."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not (self._resting or self.passed):
            self.write(name_of(func), (args, kwargs), output)
        return output

    def module(self, stub: Stub, args: Any, kwargs: Any) -> Any:
        """Call a module, as one call if it can be one."""
        if self._resting or stub.name not in self._whole:
            return stub.forward(*args, **kwargs)
        self._resting = True
        try:
            output = stub.forward(*args, **kwargs)
        finally:
            self._resting = False
        with Unseen():
            self.write(stub.as_call, (args, kwargs), output)
        return output

    def write(self, name: str, given: Any, output: Any) -> None:
        """Write down what a call returned."""
        if name in ASKS_SIZES:
            self.asked = True
        ins, outs = tensors_in(given), tensors_in(output)
        if not outs and (asks(name) or not ins):
            return
        if not outs and not isinstance(output, bool | type(None)):  # these are part of the route
            self.numbers.append(sendable(name, output))
            output = Number(len(self.numbers) - 1)
        self.read |= not outs
        place, known, n = len(self.calls), {id(t): i for i, t in enumerate(ins)}, -1

        def described(leaf: Any) -> Any:
            nonlocal n
            if not isinstance(leaf, Tensor):
                return leaf
            n += 1
            if id(leaf) in known:
                return Same(known[id(leaf)])
            key = f"{place}.{n}"
            if self._keys is None or key in self._keys:
                self.held[key] = leaf
            return Spec.of(leaf)

        self.calls.append((name, map_tree(described, output)))


def sendable(name: str, number: Any) -> Any:
    """Return what a call made of tensors, or refuse it if it is no number."""
    if not isinstance(number, NUMBERS):
        raise CrossingError(
            f"before the cut, {name} makes a {type(number).__name__} of a tensor, which can't be "
            "sent"
        )
    return number


class Script:
    """A trace, made ready for many runs: what doesn't change from batch to batch is made once.

    ``keys`` are the values that cross, whose stand-ins are swapped and so have to be new for each
    run.
    """

    def __init__(
        self, calls: tuple[tuple[str, Any], ...], keys: frozenset[str], device: torch.device
    ) -> None:
        self.calls, self.keys, self.device = calls, keys, device
        self.names = [name for name, _ in calls] + ["the cut"]
        self.skips = all(name.startswith("module ") for name, _ in calls[1:])
        """Whether no call but modules' has to be watched."""
        self.layer = None
        last = len(calls) - 1
        if last and isinstance(calls[last][1], Spec) and keys == {f"{last}.0"}:
            self.layer = self.names[last]
        """If what crosses is what this module returns: then it needn't be swapped in."""
        self.made = [self._make_once(place) for place in range(len(calls))]

    def _make_once(self, place: int) -> Any:
        """Return what a call returns on every run; None if it has to be made for each."""
        leaves: list[Any] = []
        map_tree(leaves.append, self.calls[place][1])
        if any(isinstance(leaf, Same | Number) for leaf in leaves):
            return None
        specs = sum(isinstance(leaf, Spec) for leaf in leaves)
        if self.layer is None and any(f"{place}.{n}" in self.keys for n in range(specs)):
            return None
        return self.make(place, (), (), {})

    def make(
        self, place: int, given: Any, numbers: tuple[Any, ...], held: dict[str, Tensor]
    ) -> Any:
        """Return what a call returns; `held` gets the stand-ins for what crosses."""
        n = -1

        def stand_in(leaf: Any) -> Any:
            nonlocal n
            if isinstance(leaf, Number):
                return numbers[leaf.n]
            if isinstance(leaf, Same):
                n += 1
                return tensors_in(given)[leaf.n]
            if not isinstance(leaf, Spec):
                return leaf
            n += 1
            absent: Absent = wrapper(Absent, leaf, self.device)
            absent.key = f"{place}.{n}"
            if self.layer is None and absent.key in self.keys:
                held[absent.key] = absent
            return absent

        return map_tree(stand_in, self.calls[place][1])


class Replaying(TorchFunctionMode, PartialForward):
    """Returns what the calls before the cut returned on the other side."""

    watches = True

    def __init__(
        self, script: Script, numbers: tuple[Any, ...], values: Mapping[str, Tensor], cut: str
    ) -> None:
        PartialForward.__init__(self, cut)
        self._script, self._names = script, script.names
        self._numbers, self._values = numbers, values
        self._held: dict[str, Tensor] = {}
        self._swapped: dict[str, Tensor] = {}
        self._place, self._watching = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what the call returned on the other side."""
        kwargs = kwargs or {}
        if self.passed:
            return func(*args, **kwargs)
        name, expected = name_of(func), self._names[self._place]
        if name == expected:
            return self._recall((args, kwargs))
        if name in HOOKS:  # the client's backward sees to these
            return None
        if asks(name) or not tensors_in((args, kwargs)):
            output = func(*args, **kwargs)
            if not tensors_in(output):
                return output
        raise PathError(
            f"call {self._place} before the cut was {expected} on the other side, is {name} here"
        )

    def module(self, stub: Stub, args: Any, kwargs: Any) -> Any:
        """Skip a module that was one call on the other side."""
        if self._names[self._place] == stub.as_call:
            return self._recall((args, kwargs))
        return stub.forward(*args, **kwargs)

    def reach(self, output: Any) -> Any:
        """Put what crosses in the place of what stood in for it, and end the watching."""
        calls = len(self._names) - 1
        if self._place != calls:
            raise PathError(
                f"the cut came after {calls} calls on the other side, after {self._place} here"
            )
        if self._script.layer is not None:
            self._end()
            with Unseen():  # it is none of forward's calls
                return next(iter(self._values.values())).clone()
        with Unseen(), torch.enable_grad():
            for key, value in self._values.items():
                if key not in self._held:
                    raise PathError(f"value {key} came, which no call before the cut returned")
                # A copy: forward may change it in place, which would change what the caller
                # holds, and which autograd refuses on a leaf.
                absent = self._held.pop(key)
                try:
                    swap_tensors(absent, value.clone())  # type: ignore[no-untyped-call]
                except RuntimeError as error:  # something in C++ refers to it
                    raise CrossingError(
                        f"value {key} crosses, and something around the cut keeps it: is the cut "
                        "inside of a checkpoint that takes the value? Then cut after the checkpoint"
                    ) from error
                self._swapped[key] = absent
        self._end()
        return None

    def _end(self) -> None:
        if self._watching and is_innermost(self):  # else it stays, but does nothing
            self._watching = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def go_on(self, model: nn.Module, extra: Mapping[str, Any]) -> Any:
        """Run a model, watched up to the cut."""
        args, kwargs = self._recall(())
        if self._script.skips:
            output = self.run(model, args, {**kwargs, **extra})
        else:
            self._watching = True
            self.__enter__()  # type: ignore[no-untyped-call]
            try:
                output = self.run(model, args, {**kwargs, **extra})
            finally:
                self._end()
        if self._last and self.passed:
            if self._rest:
                raise UnknownCutError(f"forward ended before the second cut {self._last!r}")
            return self.output
        return output

    def changed(self, key: str) -> bool:
        """Tell whether a value that crossed was changed in place."""
        return key in self._swapped and self._swapped[key]._version > 0

    def _recall(self, given: Any) -> Any:
        place = self._place
        if place == len(self._names) - 1:
            raise PathError("forward goes on before the cut, where the other side's had reached it")
        self._place += 1
        made = self._script.made[place]
        if made is None:
            made = self._script.make(place, given, self._numbers, self._held)
        return made
