"""The server's run: no call before the cut computes; each returns what the client wrote down."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

from flsplit.cut.call_names import HOOKS, LIKES, asks, name_of
from flsplit.cut.cut_errors import CrossingError, PathError, UnknownCutError
from flsplit.cut.partial_forward import PartialForward, Stub
from flsplit.cut.private import Unseen, is_innermost, no_torch_function, wrapper
from flsplit.cut.trace import Number, Same, Spec, map_tree, tensors_in


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
